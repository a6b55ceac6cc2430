// The grid of one group and the code of one weight: grid.h with one lane.
#include "solver/grid.h"

#include "solver/lanes_scalar.h"

namespace lowbit {

Grid find_grid(const float* x, int64_t n, int64_t stride, int bits, bool symmetric, int clip,
               lowbit_dtype scale_dtype) {
  const auto grid = Lanes<Scalar>::find_grid(x, n, stride, {bits, symmetric, clip != 0, scale_dtype});
  return {grid.scale, int(grid.zero)};
}

int quantize_code(float w, Grid grid, int bits) {
  return int(Lanes<Scalar>::code(w, {grid.scale, float(grid.zero)}, float((1 << bits) - 1)));
}

}  // namespace lowbit
