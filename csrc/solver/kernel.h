// The solver's kernel: GPTQ over one panel of rows, all columns. One symbol an ISA (gptq_solve__*), all instantiations
// of solve_panel.h, all giving the same bits.
//
// Rows of W are independent given the factor, so 16 of them lie in the lanes of a register and a column is one
// register. A panel holds `lane_groups` times 16 rows, transposed, so that every line of the factor that is fetched is
// used for all of them:
//
//   weight  [lane_groups][cols_padded][16]   row r of the panel is lane r % 16 of lane group r / 16
//   factor  strips of 16 columns, strip t = columns 16t .. 16t+15 of U down to its diagonal: [16t + 16][16]
//           strip t starts at 128 * t * (t + 1) floats
#ifndef LOWBIT_SOLVER_KERNEL_H
#define LOWBIT_SOLVER_KERNEL_H

#include <stdint.h>

#include "solver/grid.h"

namespace lowbit {

constexpr int kSolverLanes = 16;
constexpr int kStripCols = 16;  // columns solved in registers; groups start at multiples of it

static constexpr int64_t strip_offset(int64_t strip) { return kStripCols * kStripCols / 2 * strip * (strip + 1); }

struct SolvePanel {
  GridRule rule;
  bool static_grids;
  int64_t cols, group_size, groups;
  int64_t block_size;          // columns between two updates of many strips; a multiple of kStripCols
  const float* factor;         // packed strips, or NULL: nothing is pushed on (round to nearest)
  const int32_t* group_index;  // [cols], or NULL: column / group_size
  int64_t lane_groups;
  float* weight;    // in: weights, zero beyond cols; out: weighted errors
  float* scales;    // [lane_groups][groups][16], in (static) or out
  float* zeros;     // [lane_groups][groups][16], as floats
  uint8_t* codes;   // out [lane_groups][cols_padded][16]
  double* loss;     // out [lane_groups][16]
  int64_t* pushed;  // scratch [strips]: columns whose errors a strip has received
};

typedef void (*SolveKernel)(const SolvePanel* panel);

}  // namespace lowbit
#endif
