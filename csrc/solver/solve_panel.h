// GPTQ (Frantar et al. 2022) over a panel of rows, written over a lane type V of 16 rows.
//
//   for each column i, in order:
//     q = scale * (code - zero),  e = (w_i - q) / U[i,i],  loss += e^2
//     w_j = fma(-e, U[i,j], w_j)   for every j > i
//
// Every weight receives the errors of the columns before it one fma at a time in the order of the columns. When they
// arrive is left to the schedule below, so neither the block size, the ISA nor the threads change a bit.
//
// The schedule is lazy: a strip of 16 columns is brought up to date when it is needed, from errors kept where the
// weights were. A block (128 columns) is brought up to date together, which is a matrix product, errors times
// factor, tiled in registers: kTileGroups lane groups x kTileCols columns of weights stay in registers while errors and
// factor stream by; chunks of kChunk columns of both stay in L1 and L2. Bound by fma throughput: 16 * K * K / 2 of
// them for 16 rows. Inside a strip 16 columns live in registers and each pushes its error to the rest.
#ifndef LOWBIT_SOLVER_SOLVE_PANEL_H
#define LOWBIT_SOLVER_SOLVE_PANEL_H

#include "solver/kernel.h"

namespace lowbit {

template <class V>
struct PanelSolver {
  using T = typename V::T;
  using Grid16 = typename Lanes<V>::LaneGrid;
  static constexpr int kLanes = kSolverLanes, kStrip = kStripCols;
  static constexpr int64_t kChunk = 256;

  const SolvePanel& p;
  const int64_t strips = (p.cols + kStrip - 1) / kStrip;
  const int64_t group_stride = strips * kStrip * kLanes;  // floats between two lane groups

  // w[c] of `Groups` lane groups -= errors[i] * factor[i][c] for i in [begin, end), c in a tile of V::kTileCols.
  template <int Groups>
  static inline void push_tile(float* w, const float* errors, const float* factor, int64_t count, int64_t stride) {
    T sum[Groups][V::kTileCols];
#pragma GCC unroll 4
    for (int g = 0; g < Groups; ++g)
#pragma GCC unroll 16
      for (int c = 0; c < V::kTileCols; ++c) sum[g][c] = V::load(w + g * stride + c * kLanes);
    for (int64_t i = 0; i < count; ++i, errors += kLanes, factor += kStrip) {
      T e[Groups];
#pragma GCC unroll 4
      for (int g = 0; g < Groups; ++g) e[g] = V::load(errors + g * stride);
#pragma GCC unroll 16
      for (int c = 0; c < V::kTileCols; ++c) {
        const T u = V::set(factor[c]);
#pragma GCC unroll 4
        for (int g = 0; g < Groups; ++g) sum[g][c] = V::fnma(e[g], u, sum[g][c]);
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < Groups; ++g)
#pragma GCC unroll 16
      for (int c = 0; c < V::kTileCols; ++c) V::store(w + g * stride + c * kLanes, sum[g][c]);
  }

  template <int Groups>
  void push_strip(int64_t lane_group, int64_t strip, int64_t begin, int64_t end) const {
    float* base = p.weight + lane_group * group_stride;
    const float* factor = p.factor + strip_offset(strip) + begin * kStrip;
    for (int c = 0; c < kStrip; c += V::kTileCols)
      push_tile<Groups>(base + (strip * kStrip + c) * kLanes, base + begin * kLanes, factor + c, end - begin,
                        group_stride);
  }

  // Brings strips [first, last) up to date with the errors of columns [0, column).
  void push(int64_t first, int64_t last, int64_t column) const {
    if (!p.factor) return;
    int64_t oldest = column;
    for (int64_t s = first; s < last; ++s) oldest = p.pushed[s] < oldest ? p.pushed[s] : oldest;
    for (int64_t chunk = oldest; chunk < column; chunk += kChunk) {
      const int64_t end = chunk + kChunk < column ? chunk + kChunk : column;
      for (int64_t g = 0; g < p.lane_groups; g += V::kTileGroups)
        for (int64_t s = first; s < last; ++s) {
          const int64_t begin = p.pushed[s] > chunk ? p.pushed[s] : chunk;
          if (begin >= end) continue;
          if (g + V::kTileGroups <= p.lane_groups)
            push_strip<V::kTileGroups>(g, s, begin, end);
          else
            for (int64_t h = g; h < p.lane_groups; ++h) push_strip<1>(h, s, begin, end);
        }
    }
    for (int64_t s = first; s < last; ++s)
      if (p.pushed[s] < column) p.pushed[s] = column;
  }

  void find_group_grids(int64_t group, int64_t begin, int64_t end) const {
    for (int64_t g = 0; g < p.lane_groups; ++g) {
      const float* w = p.weight + g * group_stride + begin * kLanes;
      const Grid16 grid = Lanes<V>::find_grid(w, end - begin, kLanes, p.rule);
      const int64_t at = (g * p.groups + group) * kLanes;
      V::store(p.scales + at, grid.scale);
      V::store(p.zeros + at, grid.zero);
    }
  }

  int64_t group_of(int64_t column) const {
    if (column >= p.cols) return 0;
    return p.group_index ? p.group_index[column] : column / p.group_size;
  }

  // Solves the 16 columns of a strip, weights in registers.
  void solve_strip(int64_t strip) const {
    const T max_code = Lanes<V>::largest_code(p.rule);
    const float* u = p.factor ? p.factor + strip_offset(strip) + strip * kStrip * kStrip : nullptr;
    int64_t group[kStrip];
    for (int c = 0; c < kStrip; ++c) group[c] = group_of(strip * kStrip + c) * kLanes;
    for (int64_t g = 0; g < p.lane_groups; ++g) {
      const int64_t at = g * group_stride + strip * kStrip * kLanes, grids = g * p.groups * kLanes;
      T w[kStrip], sum = V::set(0.0f);
#pragma GCC unroll 16
      for (int c = 0; c < kStrip; ++c) w[c] = V::load(p.weight + at + c * kLanes);
#pragma GCC unroll 16
      for (int c = 0; c < kStrip; ++c) {
        const Grid16 grid = {V::load(p.scales + grids + group[c]), V::load(p.zeros + grids + group[c])};
        const T code = Lanes<V>::code(w[c], grid, max_code);
        T e = V::sub(w[c], Lanes<V>::decode(code, grid));
        if (u) {
          e = V::div(e, V::set(u[c * kStrip + c]));
#pragma GCC unroll 16
          for (int j = c + 1; j < kStrip; ++j) w[j] = V::fnma(e, V::set(u[c * kStrip + j]), w[j]);
        }
        sum = V::fma(e, e, sum);
        V::store(p.weight + at + c * kLanes, e);
        V::store_codes(p.codes + at + c * kLanes, code);
      }
      float loss[kLanes];
      V::store(loss, sum);
      for (int lane = 0; lane < kLanes; ++lane) p.loss[g * kLanes + lane] += double(loss[lane]);
    }
  }

  void solve() const {
    for (int64_t s = 0; s < strips; ++s) p.pushed[s] = 0;
    for (int64_t i = 0; i < p.lane_groups * kLanes; ++i) p.loss[i] = 0;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t column = s * kStrip;
      if (column % p.block_size == 0) {
        const int64_t last = s + p.block_size / kStrip;
        push(s, last < strips ? last : strips, column);
      }
      push(s, s + 1, column);
      if (!p.static_grids && column % p.group_size == 0) {
        const int64_t end = column + p.group_size < p.cols ? column + p.group_size : p.cols;
        push(s, (end + kStrip - 1) / kStrip, column);
        find_group_grids(column / p.group_size, column, end);
      }
      solve_strip(s);
    }
  }
};

}  // namespace lowbit
#endif
