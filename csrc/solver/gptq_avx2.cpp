// The column solver on AVX2: solve_panel.h over two ymm of 8 rows each. Tile: 1 lane group x 4 columns = 8
// accumulators, the fewest that keep 2 fma a cycle at a latency of 4 busy, for 6 loads every 8 fma.
#include <immintrin.h>

#include "solver/solve_panel.h"

namespace lowbit {
namespace {

struct YmmPair {
  static constexpr int kTileGroups = 1, kTileCols = 4;
  struct T {
    __m256 a, b;
  };

  static T load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, T x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static void store_codes(uint8_t* p, T x) {
    const __m256i words = _mm256_packus_epi32(_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b));  // a0 b0 a1 b1
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);                                  // a0 a1 b0 b1
    const __m128i codes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
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

  static T round_to(T x, lowbit_dtype dtype) {
    if (dtype == LOWBIT_F16) {
      constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
      const T finite = min(x, set(65504.0f));
      return {_mm256_cvtph_ps(_mm256_cvtps_ph(finite.a, kNearest)),
              _mm256_cvtph_ps(_mm256_cvtps_ph(finite.b, kNearest))};
    }
    if (dtype == LOWBIT_BF16) {
      const T finite = min(x, set(0x1.fep127f));
      return {round_to_bf16(finite.a), round_to_bf16(finite.b)};
    }
    return min(x, set(0x1.fffffep127f));
  }
  static __m256 round_to_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(int(0xffff0000))));
  }

  static T inverse_fifth_root_seed(T t) { return {seed(t.a), seed(t.b)}; }
  static __m256 seed(__m256 t) {
    const __m256 bits = _mm256_cvtepi32_ps(_mm256_castps_si256(t));
    const __m256 estimate = _mm256_fmadd_ps(bits, _mm256_set1_ps(-0.2f), _mm256_set1_ps(kFifthRootMagic));
    return _mm256_castsi256_ps(_mm256_cvtps_epi32(estimate));
  }
};

}  // namespace

void gptq_solve__avx2(const SolvePanel* panel) { PanelSolver<YmmPair>{*panel}.solve(); }

}  // namespace lowbit
