// The column solver on AVX-512: solve_panel.h over one zmm of 16 rows. Tile: 2 lane groups x 8 columns = 16
// accumulators, enough for 2 fma a cycle at a latency of 4, for 10 loads every 16 fma.
#include "cpu/lanes_avx512.h"
#include "solver/solve_panel.h"

namespace lowbit {
namespace {

struct Zmm : LanesAvx512 {
  static constexpr int kTileGroups = 2, kTileCols = 8;

  static void store_codes(uint8_t* p, T a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a)));
  }
  static T round_to(T x, lowbit_dtype dtype) {
    if (dtype == LOWBIT_F16) {
      const __m256i half = _mm512_cvtps_ph(min(x, set(65504.0f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      return _mm512_cvtph_ps(half);
    }
    if (dtype == LOWBIT_BF16) {
      const __m512i bits = _mm512_castps_si512(min(x, set(0x1.fep127f)));
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      return _mm512_castsi512_ps(_mm512_and_si512(sum, _mm512_set1_epi32(int(0xffff0000))));
    }
    return min(x, set(0x1.fffffep127f));
  }

  static T inverse_fifth_root_seed(T t) {
    const T bits = _mm512_cvtepi32_ps(_mm512_castps_si512(t));
    return _mm512_castsi512_ps(_mm512_cvtps_epi32(fma(bits, set(-0.2f), set(kFifthRootMagic))));
  }
};

}  // namespace

void gptq_solve__avx512vnni(const SolvePanel* panel) { PanelSolver<Zmm>{*panel}.solve(); }

}  // namespace lowbit
