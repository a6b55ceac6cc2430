// fp32 to fp16 and bf16 on AVX-512, to nearest even: bf16 by integers, as bf16_from_float; NaN is quieted, not carried into
// infinity.
#ifndef LOWBIT_CPU_HALVES_AVX512_H
#define LOWBIT_CPU_HALVES_AVX512_H

#include <immintrin.h>

#include "cpu/inline.h"
#include "lowbit/lowbit.h"

namespace lowbit {
namespace {

LOWBIT_INLINE __m256i to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(even, nan, quiet));
}

LOWBIT_INLINE __m256i to_half(__m512 v, lowbit_dtype dtype) {
  return dtype == LOWBIT_F16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : to_bf16(v);
}

}  // namespace
}  // namespace lowbit
#endif
