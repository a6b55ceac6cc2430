// One call of the solver but its pointers, for the CPU and for GPUs.
#ifndef LOWBIT_SOLVER_PROBLEM_H
#define LOWBIT_SOLVER_PROBLEM_H

#include "solver/grid.h"

namespace lowbit {

// Normalised: group_size at most cols, block_size what the caller or the default says.
struct Problem {
  GridRule rule;
  bool static_grids;
  int64_t rows, cols, group_size, groups, block_size, strips;
};

// Refuses options that no call could accept.
lowbit_status normalise(const lowbit_gptq_options& options, int64_t rows, int64_t cols, Problem* problem);

}  // namespace lowbit
#endif
