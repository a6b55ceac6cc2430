// The column solver in plain C++: solve_panel.h over 16 floats.
#include "solver/lanes_scalar.h"
#include "solver/solve_panel.h"

namespace lowbit {
namespace {

struct Plain16 {
  static constexpr int kTileGroups = 1, kTileCols = 4;
  struct T {
    float lane[kSolverLanes];
  };

  template <class F>
  static T each(F f) {
    T out;
    for (int i = 0; i < kSolverLanes; ++i) out.lane[i] = f(i);
    return out;
  }
  using S = Scalar;
  static T load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float* p, T a) {
    for (int i = 0; i < kSolverLanes; ++i) p[i] = a.lane[i];
  }
  static void store_codes(uint8_t* p, T a) {
    for (int i = 0; i < kSolverLanes; ++i) p[i] = uint8_t(a.lane[i]);
  }
  static T set(float x) {
    return each([&](int) { return x; });
  }
  static T add(T a, T b) {
    return each([&](int i) { return S::add(a.lane[i], b.lane[i]); });
  }
  static T sub(T a, T b) {
    return each([&](int i) { return S::sub(a.lane[i], b.lane[i]); });
  }
  static T mul(T a, T b) {
    return each([&](int i) { return S::mul(a.lane[i], b.lane[i]); });
  }
  static T div(T a, T b) {
    return each([&](int i) { return S::div(a.lane[i], b.lane[i]); });
  }
  static T fma(T a, T b, T c) {
    return each([&](int i) { return S::fma(a.lane[i], b.lane[i], c.lane[i]); });
  }
  static T fnma(T a, T b, T c) {
    return each([&](int i) { return S::fma(-a.lane[i], b.lane[i], c.lane[i]); });
  }
  static T abs(T a) {
    return each([&](int i) { return S::abs(a.lane[i]); });
  }
  static T round(T a) {
    return each([&](int i) { return S::round(a.lane[i]); });
  }
  static T min(T a, T b) {
    return each([&](int i) { return S::min(a.lane[i], b.lane[i]); });
  }
  static T max(T a, T b) {
    return each([&](int i) { return S::max(a.lane[i], b.lane[i]); });
  }
  static T if_less(T a, T b, T yes, T no) {
    return each([&](int i) { return S::if_less(a.lane[i], b.lane[i], yes.lane[i], no.lane[i]); });
  }
  static T round_to(T x, lowbit_dtype dtype) {
    return each([&](int i) { return S::round_to(x.lane[i], dtype); });
  }
  static T inverse_fifth_root_seed(T t) {
    return each([&](int i) { return S::inverse_fifth_root_seed(t.lane[i]); });
  }
};

}  // namespace

void gptq_solve__ref(const SolvePanel* panel) { PanelSolver<Plain16>{*panel}.solve(); }

}  // namespace lowbit
