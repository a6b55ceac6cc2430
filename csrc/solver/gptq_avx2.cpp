// The column solver on AVX2: solve_panel.h over two ymm of 8 rows each. Tile: 1 lane group x 4 columns = 8
// accumulators, the fewest that keep 2 fma a cycle at a latency of 4 busy, for 6 loads every 8 fma.
#include "cpu/lanes_avx2.h"
#include "solver/solve_panel.h"

namespace lowbit {
namespace {

struct YmmPair : LanesAvx2 {
  static constexpr int kTileGroups = 1, kTileCols = 4;

  static void store_codes(uint8_t* p, T x) {
    const __m256i words = _mm256_packus_epi32(_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b));  // a0 b0 a1 b1
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);                                  // a0 a1 b0 b1
    const __m128i codes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), codes);
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
