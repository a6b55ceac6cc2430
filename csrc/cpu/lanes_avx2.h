// Sixteen fp32 lanes as two ymm: lanes_ref.h's functions and bits on AVX2, FMA and F16C.
#ifndef LOWBIT_CPU_LANES_AVX2_H
#define LOWBIT_CPU_LANES_AVX2_H

#include <immintrin.h>

#include "cpu/halves_avx2.h"

namespace lowbit {
namespace {

struct LanesAvx2 {
  static constexpr int kAccumulators = 4;  // that a loop may hold beside its operands
  struct T {
    __m256 a, b;
  };

  static T load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, T x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static T set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static T add(T x, T y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static T sub(T x, T y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static T mul(T x, T y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static T div(T x, T y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static T fma(T x, T y, T z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static T fnma(T x, T y, T z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
  static T abs(T x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
  }
  static T round(T x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
  }
  static T min(T x, T y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static T max(T x, T y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static T if_less(T x, T y, T yes, T no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
  }

  template <lowbit_dtype D>
  static T load_as(const void* p, int64_t index) {
    if (D == LOWBIT_F32) return load(static_cast<const float*>(p) + index);
    const __m128i* from = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + index);
    return {widen<D>(_mm_loadu_si128(from)), widen<D>(_mm_loadu_si128(from + 1))};
  }
  template <lowbit_dtype D>
  static void store_as(void* p, int64_t index, T x) {
    if (D == LOWBIT_F32) return store(static_cast<float*>(p) + index, x);
    __m128i* to = reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + index);
    _mm_storeu_si128(to, to_half(x.a, D));
    _mm_storeu_si128(to + 1, to_half(x.b, D));
  }

  template <lowbit_dtype D>
  static T rounded(T x) {
    return D == LOWBIT_F32 ? x : T{widen<D>(to_half(x.a, D)), widen<D>(to_half(x.b, D))};
  }

  static T scale_by_power(T x, T n) { return {scale_by_power(x.a, n.a), scale_by_power(x.b, n.b)}; }

  static float sum(T x) {
    const __m256 by8 = _mm256_add_ps(x.a, x.b);
    const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
    const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
  }
  static T sums(const T x[16]) { return {sums_of_8(x), sums_of_8(x + 8)}; }
  static float largest(T x) {
    const __m256 by8 = _mm256_max_ps(x.a, x.b);
    const __m128 by4 = _mm_max_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
    const __m128 by2 = _mm_max_ps(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(_mm_max_ss(by2, _mm_movehdup_ps(by2)));
  }

 private:
  template <lowbit_dtype D>
  static __m256 widen(__m128i x) {
    if (D == LOWBIT_F16) return _mm256_cvtph_ps(x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
  }
  static __m256 scale_by_power(__m256 x, __m256 n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
  }
  static __m256 power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
  // Halves are added as in sum(), two vectors at a time, so that a vector of 8 sums takes 15 additions and not 8 times 4.
  static __m256 sums_of_8(const T* x) {
    __m256 by8[8], by4[4], by2[2];
    for (int i = 0; i < 8; i++) by8[i] = _mm256_add_ps(x[i].a, x[i].b);
    for (int i = 0; i < 4; i++)
      by4[i] = _mm256_add_ps(_mm256_permute2f128_ps(by8[i], by8[i + 4], 0x20),
                             _mm256_permute2f128_ps(by8[i], by8[i + 4], 0x31));
    for (int i = 0; i < 2; i++) {
      const __m256d one = _mm256_castps_pd(by4[i]), other = _mm256_castps_pd(by4[i + 2]);
      by2[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(one, other)),
                             _mm256_castpd_ps(_mm256_unpackhi_pd(one, other)));
    }
    const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(by2[0], by2[1], _MM_SHUFFLE(2, 0, 2, 0)),
                                      _mm256_shuffle_ps(by2[0], by2[1], _MM_SHUFFLE(3, 1, 3, 1)));
    return _mm256_permute_ps(sums, _MM_SHUFFLE(3, 1, 2, 0));  // they came as 0 2 1 3, 4 6 5 7
  }
};

}  // namespace
}  // namespace lowbit
#endif
