// lowbit_gptq_solve: checks, packs the factor into strips, and hands panels of rows to the kernel of this machine.
//
// A panel holds up to 128 rows, so that each line of the factor (K^2/2 floats, read once a panel: what caches cannot
// hold) meets 128 rows. Rows never meet each other: how they are cut into panels and threads does not change a bit.
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstring>

#include "api/validate.h"
#include "dispatch/parallel.h"
#include "dispatch/select.h"
#include "lowbit/formats.h"
#include "solver/panel.h"
#include "solver/problem.h"

namespace lowbit {

constexpr int64_t kMaxDimension = int64_t(1) << 31;

lowbit_status normalise(const lowbit_gptq_options& options, int64_t rows, int64_t cols, Problem* problem) {
  const int bits = options.format;
  LOWBIT_TRY(check_format(bits));
  if (bits == kTrit && !options.symmetric)
    return fail(LOWBIT_INVALID_ARGUMENT, "symmetric: expected 1 for trit, got 0");
  if (rows < 1 || rows >= kMaxDimension)
    return fail(LOWBIT_INVALID_ARGUMENT, "rows: expected 1 to 2^31 - 1, got %" PRId64, rows);
  if (cols < 1 || cols >= kMaxDimension)
    return fail(LOWBIT_INVALID_ARGUMENT, "cols: expected 1 to 2^31 - 1, got %" PRId64, cols);
  int64_t group_size = options.group_size;
  if (group_size != -1 && group_size != cols && (group_size < 1 || group_size % kStripCols != 0))
    return fail(LOWBIT_INVALID_ARGUMENT,
                "group_size: expected a multiple of %d, cols (%" PRId64 ") or -1, got %" PRId64, kStripCols, cols,
                group_size);
  if (group_size == -1 || group_size > cols) group_size = cols;
  const lowbit_dtype dtype = options.scale_dtype;
  if (dtype != LOWBIT_F32 && dtype != LOWBIT_F16 && dtype != LOWBIT_BF16)
    return fail(LOWBIT_INVALID_ARGUMENT, "scale_dtype: expected f32, f16 or bf16, got %d", int(dtype));
  const int64_t block_size = options.block_size == 0 ? 128 : options.block_size;
  if (block_size < 1 || block_size % kStripCols != 0)
    return fail(LOWBIT_INVALID_ARGUMENT, "block_size: expected a multiple of %d or 0, got %" PRId64, kStripCols,
                block_size);
  *problem = {{bits, options.symmetric != 0, options.clip != 0, dtype},
              options.static_grids != 0,
              rows,
              cols,
              group_size,
              ceil_div(cols, group_size),
              block_size,
              ceil_div(cols, kStripCols)};
  return LOWBIT_OK;
}

namespace {

constexpr int64_t kPanelLaneGroups = 8;

lowbit_status check_group_index(const Problem& problem, const int32_t* group_index) {
  if (!group_index) return LOWBIT_OK;
  if (!problem.static_grids)
    return fail(LOWBIT_INVALID_ARGUMENT, "group_index: expected NULL without static_grids, got a pointer");
  for (int64_t k = 0; k < problem.cols; ++k)
    if (group_index[k] < 0 || group_index[k] >= problem.groups)
      return fail(LOWBIT_OUT_OF_RANGE, "group_index[%" PRId64 "]: expected 0 to %" PRId64 ", got %d", k,
                  problem.groups - 1, group_index[k]);
  return LOWBIT_OK;
}

lowbit_status check_static_grids(const Problem& problem, const float* scales, const uint8_t* zeros) {
  if (!problem.static_grids) return LOWBIT_OK;
  const int max_code = code_count(problem.rule.bits) - 1;
  for (int64_t i = 0; i < problem.rows * problem.groups; ++i) {
    const int64_t n = i / problem.groups, g = i % problem.groups;
    if (!(scales[i] > 0) || !std::isfinite(scales[i]))
      return fail(LOWBIT_INVALID_ARGUMENT,
                  "scales[%" PRId64 ", %" PRId64 "]: expected a positive finite number, got %g", n, g,
                  double(scales[i]));
    if (!problem.rule.symmetric && zeros[i] > max_code)
      return fail(LOWBIT_OUT_OF_RANGE, "zeros[%" PRId64 ", %" PRId64 "]: expected at most %d, got %d", n, g, max_code,
                  zeros[i]);
  }
  return LOWBIT_OK;
}

lowbit_status check_weight(const Problem& problem, const float* weight) {
  std::atomic<int64_t> bad{-1};
  parallel_for(problem.rows, 16, problem.rows * problem.cols < 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      uint32_t special = 0;  // an exponent of all ones is an infinity or a NaN
      for (int64_t k = 0; k < problem.cols; ++k) {
        uint32_t bits;
        memcpy(&bits, weight + n * problem.cols + k, sizeof bits);
        special |= uint32_t((bits & 0x7f800000) == 0x7f800000);
      }
      if (special) bad = n;
    }
  });
  if (bad < 0) return LOWBIT_OK;
  int64_t k = 0;
  while (std::isfinite(weight[bad * problem.cols + k])) ++k;
  return fail(LOWBIT_INVALID_ARGUMENT, "weight[%" PRId64 ", %" PRId64 "]: expected a finite number, got %g",
              int64_t(bad), k, double(weight[bad * problem.cols + k]));
}

lowbit_status check_diagonal(const Problem& problem, const float* factor) {
  if (!factor) return LOWBIT_OK;
  for (int64_t k = 0; k < problem.cols; ++k) {
    const float u = factor[k * problem.cols + k];
    if (!(u > 0) || !std::isfinite(u))
      return fail(LOWBIT_NUMERIC, "factor[%" PRId64 ", %" PRId64 "]: expected a positive finite diagonal, got %g", k, k,
                  double(u));
  }
  return LOWBIT_OK;
}

// Strips of 16 columns, rows above and on the diagonal; columns beyond cols are those of the identity. Copied in
// squares of 16 x 16, row of squares by row of squares, so that the factor is read as it lies in memory.
void pack_factor(const Problem& problem, const float* factor, float* strips) {
  struct Work {
    int64_t cols, strips;
    const float* factor;
    float* out;
  } work{problem.cols, problem.strips, factor, strips};
  const int64_t threads = problem.cols < 512 ? 1 : executor_threads();
  run_parts(
      int(threads < problem.strips ? threads : problem.strips),
      [](void* argument, int index, int parts) {
        const Work& w = *static_cast<const Work*>(argument);
        for (int64_t above = index; above < w.strips; above += parts)  // rows 16 * above ..., interleaved: they shorten
          for (int64_t s = above; s < w.strips; ++s) {
            float* square = w.out + strip_offset(s) + above * kStripCols * kStripCols;
            const bool whole = s > above && (s + 1) * kStripCols <= w.cols;
            for (int64_t r = 0; r < kStripCols; ++r) {
              const int64_t i = above * kStripCols + r;
              float* row = square + r * kStripCols;
              for (int64_t c = 0; c < kStripCols && !whole; ++c) {
                const int64_t j = s * kStripCols + c;
                row[c] = i <= j && j < w.cols ? w.factor[i * w.cols + j] : i == j ? 1.0f : 0.0f;
              }
              if (whole) memcpy(row, w.factor + i * w.cols + s * kStripCols, kStripCols * sizeof(float));
            }
          }
      },
      &work);
}

// The caller's arrays.
struct Arrays {
  const float* weight;
  uint8_t* codes;
  float* scales;
  uint8_t* zeros;
  double* loss;
};

// Rows [first, first + rows) of the caller's arrays into the lanes of a panel; absent rows are rows of zeros.
void load_panel(const Problem& problem, const Arrays& a, int64_t first, int64_t rows, int64_t lane_groups,
                const PanelBuffers& b) {
  const int64_t cols = problem.cols, cols_padded = problem.strips * kStripCols, groups = problem.groups;
  for (int64_t g = 0; g < lane_groups; ++g) {
    float* weight = b.weight.get() + g * cols_padded * kSolverLanes;
    const int64_t lanes = rows - g * kSolverLanes < kSolverLanes ? rows - g * kSolverLanes : kSolverLanes;
    const float* source = a.weight + (first + g * kSolverLanes) * cols;
    for (int64_t k = 0; k < cols_padded; ++k)
      for (int64_t lane = 0; lane < kSolverLanes; ++lane)
        weight[k * kSolverLanes + lane] = lane < lanes && k < cols ? source[lane * cols + k] : 0.0f;
    if (!problem.static_grids) continue;
    for (int64_t i = 0; i < groups; ++i)
      for (int64_t lane = 0; lane < kSolverLanes; ++lane) {
        const int64_t at = (g * groups + i) * kSolverLanes + lane, n = (first + g * kSolverLanes + lane) * groups + i;
        b.scales[at] = lane < lanes ? a.scales[n] : 1.0f;
        b.zeros[at] =
            lane < lanes && !problem.rule.symmetric ? float(a.zeros[n]) : float(middle_code(problem.rule.bits));
      }
  }
}

void store_panel(const Problem& problem, const Arrays& a, int64_t first, int64_t rows, const PanelBuffers& b) {
  const int64_t cols = problem.cols, cols_padded = problem.strips * kStripCols, groups = problem.groups;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t g = row / kSolverLanes, lane = row % kSolverLanes, n = first + row;
    const uint8_t* codes = b.codes.get() + g * cols_padded * kSolverLanes + lane;
    for (int64_t k = 0; k < cols; ++k) a.codes[n * cols + k] = codes[k * kSolverLanes];
    if (a.loss) a.loss[n] = b.loss[row];
    for (int64_t i = 0; i < groups && !problem.static_grids; ++i) {
      const int64_t at = (g * groups + i) * kSolverLanes + lane;
      a.scales[n * groups + i] = b.scales[at];
      if (a.zeros) a.zeros[n * groups + i] = uint8_t(b.zeros[at]);
    }
  }
}

// Rows in panels of equal size, as many panels a thread as kPanelLaneGroups makes necessary.
int64_t lane_groups_of_a_panel(int64_t rows, int64_t threads) {
  const int64_t lane_groups = ceil_div(rows, kSolverLanes);
  const int64_t panels_a_thread = ceil_div(lane_groups, threads * kPanelLaneGroups);
  return ceil_div(lane_groups, threads * panels_a_thread);
}

lowbit_status solve_panels(const Problem& problem, SolveKernel kernel, const float* factor, const int32_t* group_index,
                           const Arrays& arrays) {
  const int64_t threads = problem.rows * problem.cols < 1 << 14 ? 1 : executor_threads();
  const int64_t lane_groups = lane_groups_of_a_panel(problem.rows, threads);
  const int64_t panel_rows = lane_groups * kSolverLanes, panels = ceil_div(problem.rows, panel_rows);
  std::atomic<int64_t> next{0};
  std::atomic<bool> no_memory{false};
  const int parts = int(panels < threads ? panels : threads);
  // Panels are taken one by one: a thread that another process slows down takes fewer.
  auto work = [&] {
    const PanelBuffers buffers(problem.strips, problem.groups, lane_groups);
    if (!buffers) {
      no_memory = true;
      return;
    }
    for (int64_t i = next++; i < panels; i = next++) {
      const int64_t first = i * panel_rows,
                    rows = problem.rows - first < panel_rows ? problem.rows - first : panel_rows;
      const int64_t used = ceil_div(rows, kSolverLanes);
      load_panel(problem, arrays, first, rows, used, buffers);
      const SolvePanel panel = {problem.rule,
                                problem.static_grids,
                                problem.cols,
                                problem.group_size,
                                problem.groups,
                                problem.block_size,
                                factor,
                                group_index,
                                used,
                                buffers.weight.get(),
                                buffers.scales.get(),
                                buffers.zeros.get(),
                                buffers.codes.get(),
                                buffers.loss.get(),
                                buffers.pushed.get()};
      kernel(&panel);
      store_panel(problem, arrays, first, rows, buffers);
    }
  };
  if (parts == 1)
    work();
  else
    run_parts(parts, [](void* argument, int, int) { (*static_cast<decltype(work)*>(argument))(); }, &work);
  if (no_memory)
    return fail(LOWBIT_OUT_OF_MEMORY, "gptq: no memory for a panel of %" PRId64 " x %" PRId64, panel_rows,
                problem.cols);
  return LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

extern "C" lowbit_status lowbit_gptq_solve(const lowbit_gptq_options* options, int64_t rows, int64_t cols,
                                           const float* weight, const float* factor, const int32_t* group_index,
                                           uint8_t* codes, float* scales, uint8_t* zeros, double* loss) {
  using namespace lowbit;
  if (!options || !weight || !codes || !scales)
    return fail(LOWBIT_INVALID_ARGUMENT, "gptq: expected pointers to options, weight, codes and scales, got NULL");
  Problem problem;
  if (lowbit_status status = normalise(*options, rows, cols, &problem)) return status;
  if (!problem.rule.symmetric && !zeros)
    return fail(LOWBIT_INVALID_ARGUMENT, "zeros: expected a pointer for an asymmetric grid, got NULL");
  if (lowbit_status status = check_group_index(problem, group_index)) return status;
  if (lowbit_status status = check_static_grids(problem, scales, zeros)) return status;
  if (lowbit_status status = check_weight(problem, weight)) return status;
  if (lowbit_status status = check_diagonal(problem, factor)) return status;
  SolveKernel kernel;
  if (lowbit_status status = select<Verb::solve>(0, &kernel)) return status;
  Buffer<float> strips;
  if (factor) {
    strips = Buffer<float>(strip_offset(problem.strips));
    if (!strips) return fail(LOWBIT_OUT_OF_MEMORY, "gptq: no memory for a factor of %" PRId64 " columns", cols);
    pack_factor(problem, factor, strips.get());
  }
  return solve_panels(problem, kernel, strips.get(), group_index, {weight, codes, scales, zeros, loss});
}
