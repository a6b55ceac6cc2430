// The column solver in plain C++: solve_panel.h over 16 floats.
#include "cpu/lanes_ref.h"
#include "solver/lanes_scalar.h"
#include "solver/solve_panel.h"

namespace lowbit {
namespace {

struct Plain16 : LanesRef {
  static constexpr int kTileGroups = 1, kTileCols = 4;
  using S = Scalar;

  static void store_codes(uint8_t* p, T a) {
    for (int i = 0; i < kSolverLanes; ++i) p[i] = uint8_t(a.lane[i]);
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
