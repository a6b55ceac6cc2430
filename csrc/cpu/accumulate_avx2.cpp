// sum[k] = fma(weights[i], rows[i][k], sum[k]), row after row: 32 columns stay in registers while the rows go by, so a
// sum is read and written once, whatever the number of rows. Bound by the rows read, which lie in the cache.
#include <immintrin.h>
#include <math.h>

#include "cpu/inline.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

// 8 * kRegisters columns.
template <int kRegisters>
LOWBIT_INLINE void add_columns(const float* rows, int64_t stride, const float* weights, int64_t count, float* sum) {
  __m256 total[kRegisters];
  for (int j = 0; j < kRegisters; j++) total[j] = _mm256_loadu_ps(sum + 8 * j);
  for (int64_t i = 0; i < count; i++) {
    const float* row = rows + i * stride;
    const __m256 weight = weights ? _mm256_broadcast_ss(weights + i) : _mm256_set1_ps(1.0f);
    for (int j = 0; j < kRegisters; j++) total[j] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(row + 8 * j), total[j]);
  }
  for (int j = 0; j < kRegisters; j++) _mm256_storeu_ps(sum + 8 * j, total[j]);
}

}  // namespace

void accumulate__avx2(const float* rows, int64_t stride, const float* weights, int64_t count, int64_t cols,
                      float* sum) {
  int64_t k = 0;
  for (; k + 32 <= cols; k += 32) add_columns<4>(rows + k, stride, weights, count, sum + k);
  for (; k + 8 <= cols; k += 8) add_columns<1>(rows + k, stride, weights, count, sum + k);
  for (; k < cols; k++)
    for (int64_t i = 0; i < count; i++) sum[k] = fmaf(weights ? weights[i] : 1.0f, rows[i * stride + k], sum[k]);
}

}  // namespace lowbit
