// Sixteen fp32 lanes as one zmm: lanes_ref.h's functions and bits on AVX-512.
#ifndef LOWBIT_CPU_LANES_AVX512_H
#define LOWBIT_CPU_LANES_AVX512_H

#include <immintrin.h>

#include "cpu/halves_avx512.h"

namespace lowbit {
namespace {

struct LanesAvx512 {
  static constexpr int kAccumulators = 16;  // that a loop may hold beside its operands
  using T = __m512;
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

  static T load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, T x) { _mm512_storeu_ps(p, x); }
  static T set(float x) { return _mm512_set1_ps(x); }
  static T add(T x, T y) { return _mm512_add_ps(x, y); }
  static T sub(T x, T y) { return _mm512_sub_ps(x, y); }
  static T mul(T x, T y) { return _mm512_mul_ps(x, y); }
  static T div(T x, T y) { return _mm512_div_ps(x, y); }
  static T fma(T x, T y, T z) { return _mm512_fmadd_ps(x, y, z); }
  static T fnma(T x, T y, T z) { return _mm512_fnmadd_ps(x, y, z); }
  static T abs(T x) { return _mm512_abs_ps(x); }
  static T round(T x) { return _mm512_roundscale_ps(x, kNearest); }
  static T min(T x, T y) { return _mm512_min_ps(x, y); }
  static T max(T x, T y) { return _mm512_max_ps(x, y); }
  static T if_less(T x, T y, T yes, T no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, y, _CMP_LT_OQ), no, yes);
  }

  template <lowbit_dtype D>
  static T load_as(const void* p, int64_t index) {
    if (D == LOWBIT_F32) return load(static_cast<const float*>(p) + index);
    return widen<D>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + index)));
  }
  template <lowbit_dtype D>
  static void store_as(void* p, int64_t index, T x) {
    if (D == LOWBIT_F32) return store(static_cast<float*>(p) + index, x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + index), to_half(x, D));
  }

  template <lowbit_dtype D>
  static T rounded(T x) {
    return D == LOWBIT_F32 ? x : widen<D>(to_half(x, D));
  }

  static T scale_by_power(T x, T n) {
    const __m512i whole = _mm512_cvtps_epi32(n), half = _mm512_srai_epi32(whole, 1);
    return mul(mul(x, power(half)), power(_mm512_sub_epi32(whole, half)));
  }

  static float sum(T x) {
    const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
    const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
  }
  // Halves are added as in sum(), two vectors at a time, so that 16 sums take 15 additions and not 16 times 4.
  static T sums(const T x[16]) {
    T by8[8], by4[4], by2[2];
    for (int i = 0; i < 8; i++)
      by8[i] = add(_mm512_shuffle_f32x4(x[i], x[i + 8], _MM_SHUFFLE(1, 0, 1, 0)),
                   _mm512_shuffle_f32x4(x[i], x[i + 8], _MM_SHUFFLE(3, 2, 3, 2)));
    for (int i = 0; i < 4; i++)
      by4[i] = add(_mm512_shuffle_f32x4(by8[i], by8[i + 4], _MM_SHUFFLE(2, 0, 2, 0)),
                   _mm512_shuffle_f32x4(by8[i], by8[i + 4], _MM_SHUFFLE(3, 1, 3, 1)));
    for (int i = 0; i < 2; i++) {
      const __m512d one = _mm512_castps_pd(by4[i]), other = _mm512_castps_pd(by4[i + 2]);
      by2[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)), _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
    }
    const T sums = add(_mm512_shuffle_ps(by2[0], by2[1], _MM_SHUFFLE(2, 0, 2, 0)),
                       _mm512_shuffle_ps(by2[0], by2[1], _MM_SHUFFLE(3, 1, 3, 1)));
    // They came as 0 2 1 3, 8 10 9 11, 4 6 5 7, 12 14 13 15.
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(order, sums);
  }
  static float largest(T x) { return _mm512_reduce_max_ps(x); }

 private:
  template <lowbit_dtype D>
  static T widen(__m256i x) {
    if (D == LOWBIT_F16) return _mm512_cvtph_ps(x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static __m512 power(__m512i n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }
};

}  // namespace
}  // namespace lowbit
#endif
