// fp32 to fp16 and bf16 on AVX2 and F16C, to nearest even: bf16 by integers, as bf16_from_float; NaN is quieted, not carried into
// infinity.
#ifndef LOWBIT_CPU_HALVES_AVX2_H
#define LOWBIT_CPU_HALVES_AVX2_H

#include <immintrin.h>

#include "cpu/inline.h"
#include "lowbit/lowbit.h"

namespace lowbit {
namespace {

LOWBIT_INLINE __m128i to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i halves = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

LOWBIT_INLINE __m128i to_half(__m256 v, lowbit_dtype dtype) {
  return dtype == LOWBIT_F16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT) : to_bf16(v);
}

}  // namespace
}  // namespace lowbit
#endif
