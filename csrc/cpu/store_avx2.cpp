// y[m][n] = tile[m][n] + bias[n], rounded once to the output dtype; 8 outputs at a time. Bound by the bytes written.
#include <immintrin.h>

#include "cpu/float_types.h"
#include "cpu/halves_avx2.h"
#include "cpu/kernel.h"

namespace lowbit {

void store__avx2(const float* tile, int64_t tile_stride, const float* bias, int64_t tokens, int64_t rows, void* y,
                 lowbit_dtype dtype, int64_t y_stride) {
  for (int64_t m = 0; m < tokens; m++) {
    const float* from = tile + m * tile_stride;
    int64_t n = 0;
    for (; n + 8 <= rows; n += 8) {
      __m256 value = _mm256_loadu_ps(from + n);
      if (bias) value = _mm256_add_ps(value, _mm256_loadu_ps(bias + n));
      if (dtype == LOWBIT_F32)
        _mm256_storeu_ps(static_cast<float*>(y) + m * y_stride + n, value);
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(y) + m * y_stride + n),
                         to_half(value, dtype));
    }
    for (; n < rows; n++) store_float(y, dtype, m * y_stride + n, bias ? from[n] + bias[n] : from[n]);
  }
}

}  // namespace lowbit
