// The column solver on AVX-512: solve_panel.h over one zmm of 16 rows. Tile: 2 lane groups x 8 columns = 16
// accumulators, enough for 2 fma a cycle at a latency of 4, for 10 loads every 16 fma.
#include <immintrin.h>

#include "solver/solve_panel.h"

namespace lowbit {
namespace {

struct Zmm {
  static constexpr int kTileGroups = 2, kTileCols = 8;
  using T = __m512;

  static T load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, T a) { _mm512_storeu_ps(p, a); }
  static void store_codes(uint8_t* p, T a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a)));
  }
  static T set(float x) { return _mm512_set1_ps(x); }
  static T add(T a, T b) { return _mm512_add_ps(a, b); }
  static T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static T div(T a, T b) { return _mm512_div_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static T fnma(T a, T b, T c) { return _mm512_fnmadd_ps(a, b, c); }
  static T abs(T a) { return _mm512_abs_ps(a); }
  static T round(T a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static T min(T a, T b) { return _mm512_min_ps(a, b); }
  static T max(T a, T b) { return _mm512_max_ps(a, b); }
  static T if_less(T a, T b, T yes, T no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
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
