// y[m][n] = tile[m][n] + bias[n], rounded once to the output dtype; 8 outputs at a time. Bound by the bytes written.
#include <immintrin.h>

#include "cpu/float_types.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

// Round to nearest even by integers, as bf16_from_float; NaN is quieted instead of carried into infinity.
inline __m128i bf16_from_floats(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  return _mm256_castsi256_si128(packed);
}

}  // namespace

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
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(static_cast<uint16_t*>(y) + m * y_stride + n),
            dtype == LOWBIT_F16 ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : bf16_from_floats(value));
    }
    for (; n < rows; n++) store_float(y, dtype, m * y_stride + n, bias ? from[n] + bias[n] : from[n]);
  }
}

}  // namespace lowbit
