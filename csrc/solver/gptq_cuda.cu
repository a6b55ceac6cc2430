// GPTQ on a GPU: the columns of lowbit_gptq_solve, the same codes, scales, zeros and loss bit for bit.
//
//   for each column i, in order:
//     q = scale * (code - zero),  e = (w_i - q) / U[i,i],  loss += e^2
//     w_j = fma(-e, U[i,j], w_j)   for every j > i
//
// weight [rows][cols] fp32, factor U [cols][cols] fp32. Every weight receives the errors of the columns before it one
// fma at a time in the order of the columns, whatever the blocking; grids and codes are solver/grid.h over one float a
// thread, and sums keep the order of the CPU's (solve_panel.h).
//
// Columns go in blocks of at most 128 that start where a group does, two kernels a block, queued one behind another:
//
//   solve_block  8 lanes a row, 16 columns of it in the registers of each; a column's error is computed by all 8 and
//                pushed onto the rest of the block at once. Bound by latency: a column waits for the one before it,
//                about 200 cycles of shuffle, two divisions and a rounding, 15 us for 128 of them. 4096 rows are 8
//                warps an SM, two a scheduler, which hide in that time what they issue.
//   push_block   W[:, j] -= errors * U[block, j] for every j beyond the block: a matrix product of tiles of 128 rows x
//                64 columns, 8 x 8 of them a thread, factor and errors through shared memory 16 columns of the block
//                at a time. Bound by fp32 fma: rows * cols^2 / 2 of them in all, 4096^3 / 2 at 33 T/s is 1.0 ms.
// (Arithmetic; measured nowhere yet.)
//
// Workspace: W as it becomes, [rows][cols rounded up to 16] fp32; a solved block leaves its errors there.
#include "cuda/ptx.cuh"
#include "cuda/status.cuh"
#include "cuda/verbs.cuh"
#include "lowbit/formats.h"
#include "solver/grid.h"
#include "solver/lanes_scalar.h"

namespace lowbit {
namespace cuda {
namespace {

using Math = Lanes<Scalar>;
using Grid = Math::LaneGrid;

constexpr int kBlock = 128;  // columns solved between two products
constexpr int kStrip = 16;   // columns whose losses are summed in fp32; groups and blocks start at multiples of it

struct Problem {
  GridRule rule;
  bool static_grids;
  int64_t rows, cols, group_size, groups;
  const float* weight;
  const float* factor;
  bool factor_wide;  // rows of the factor start at multiples of 16 bytes
  const int32_t* group_index;
  uint8_t* codes;
  float* scales;
  uint8_t* zeros;
  double* loss;
  float* work;  // [rows][stride]
  int64_t stride;
};

// The block in progress. Its weights, and all beyond, are up to date in `from`: the caller's weights before the first
// product (or where nothing is pushed), the workspace after.
struct Block {
  int64_t begin;
  int count;
  const float* from;
  int64_t from_stride;
  bool from_wide;
};

// Four floats of the factor's row i from column j on, those of the columns in [first, last); zeros for the others,
// which are not read.
__device__ __forceinline__ void stage_factor(const Problem& p, uint32_t at, int64_t i, int64_t j, int64_t first,
                                             int64_t last) {
  const float* from = p.factor + i * p.cols + j;
  if (j >= last || j + 4 <= first) {
    cp_async16(at, p.factor, 0);
  } else if (p.factor_wide && j >= first && j + 4 <= last) {
    cp_async16(at, from);
  } else {
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const bool inside = j + c >= first && j + c < last;
      cp_async4(at + 4 * c, inside ? from + c : p.factor, inside ? 4 : 0);
    }
  }
}

// ---- solve_block ----

constexpr int kTeam = 8, kQuads = kBlock / (4 * kTeam);  // lanes of a row; quad q of lane l: columns 32q + 4l ...
constexpr int kSolveWarps = 4, kSolveThreads = 32 * kSolveWarps, kSolveRows = kSolveThreads / kTeam;

// Shared memory: two stages of 32 rows of the factor, [32][128], and a row's errors and codes, apart by 4 banks a row.
constexpr int kStageRows = 4 * kTeam;
constexpr uint32_t kStageBytes = kStageRows * kBlock * 4;
constexpr uint32_t kErrorsAt = 2 * kStageBytes, kErrorRow = (kBlock + 4) * 4;
constexpr uint32_t kCodesAt = kErrorsAt + kSolveRows * kErrorRow, kCodeRow = kBlock + 4;
constexpr uint32_t kSolveShared = kCodesAt + kSolveRows * kCodeRow;

// Rows 32 * stage ... of the block's square of the factor, from its diagonal on.
__device__ __forceinline__ void stage_square(const Problem& p, const Block& block, int stage) {
  const uint32_t at = (stage & 1) * kStageBytes;
  const int64_t end = block.begin + block.count;
  for (int quad = int(threadIdx.x); quad < kStageRows * kBlock / 4; quad += kSolveThreads) {
    const int64_t i = block.begin + stage * kStageRows + quad / (kBlock / 4), j = block.begin + quad % (kBlock / 4) * 4;
    if (i < end) stage_factor(p, at + 16 * quad, i, j, i, end);
  }
}

// The grid of n weights: find_grid, its clipping search spread over the team. A team's lanes come here together.
__device__ __forceinline__ Grid team_grid(const float* x, int64_t n, const GridRule& rule) {
  if (!rule.clip) return Math::find_grid(x, n, 1, rule);
  const Math::Range range = Math::range(x, n, 1, rule);
  const float max_code = Math::largest_code(rule), unit = Math::clip_unit(range.largest);
  int best = int(threadIdx.x) % kTeam;
  float best_loss = Math::clipping_loss(x, n, 1, Math::clipped_grid(range, best, rule), max_code, unit);
  for (int i = best + kTeam; i < Math::clip_candidates(rule); i += kTeam) {
    const float loss = Math::clipping_loss(x, n, 1, Math::clipped_grid(range, i, rule), max_code, unit);
    if (loss < best_loss) best_loss = loss, best = i;
  }
  // The first of the smallest, as one after another would find it.
  for (int mask = 1; mask < kTeam; mask *= 2) {
    const float loss = shuffle_xor(best_loss, mask);
    const int i = shuffle_xor(best, mask);
    if (loss < best_loss || (loss == best_loss && i < best)) best_loss = loss, best = i;
  }
  return Math::clipped_grid(range, best, rule);
}

__device__ __forceinline__ Grid stored_grid(const Problem& p, int64_t row, int64_t group) {
  const int64_t at = row * p.groups + group;
  return {p.scales[at], p.rule.symmetric ? float(middle_code(p.rule.bits)) : float(p.zeros[at])};
}

__device__ __forceinline__ int64_t static_group(const Problem& p, int64_t column) {
  if (!p.group_index) return column / p.group_size;
  return max(int64_t(0), min(int64_t(ldg(p.group_index + column)), p.groups - 1));  // checked by nobody on the way here
}

__global__ void __launch_bounds__(kSolveThreads, 4) solve_block(Problem p, Block block) {
  const int lane = int(threadIdx.x) % kTeam, team = int(threadIdx.x) / kTeam;
  const int first_lane = int(threadIdx.x) % 32 - lane;  // of the team, in its warp
  const int64_t wanted = int64_t(blockIdx.x) * kSolveRows + team;
  const bool alive = wanted < p.rows;  // a team without a row follows the last one and writes nothing
  const int64_t row = alive ? wanted : p.rows - 1;
  const bool writes = alive && lane == 0;
  const float* from = block.from + row * block.from_stride + block.begin;
  const uint32_t errors = kErrorsAt + team * kErrorRow, codes = kCodesAt + team * kCodeRow;
  const float max_code = Math::largest_code(p.rule);

  float w[kQuads][4];
#pragma unroll
  for (int q = 0; q < kQuads; q++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int i = 4 * (kTeam * q + lane) + c;
      w[q][c] = i < block.count ? from[i] : 0.0f;
    }
  double loss = p.loss && block.begin > 0 ? p.loss[row] : 0.0;
  float strip_loss = 0;
  Grid grid[2] = {};  // of columns 2 * lane and 2 * lane + 1 of the strip

  if (p.factor) {
    stage_square(p, block, 0);
    cp_async_commit();
  }
  for (int q = 0; q < kQuads && q * kStageRows < block.count; q++) {
    const uint32_t stage = (q & 1) * kStageBytes;
    if (p.factor) {
      cp_async_wait<0>();
      sync_block();
      stage_square(p, block, q + 1);
      cp_async_commit();
    }
    for (int l = 0; l < kTeam; l++) {
      const int first = 4 * (kTeam * q + l);
      if (first >= block.count) break;
      const int64_t column = block.begin + first;
      if (first % kStrip == 0) {
        loss += double(strip_loss), strip_loss = 0;
        if (p.static_grids) {
#pragma unroll
          for (int c = 0; c < 2; c++)
            grid[c] = stored_grid(p, row, static_group(p, min(column + 2 * lane + c, p.cols - 1)));
        } else if (column % p.group_size == 0) {
          const int64_t n = min(p.group_size, p.cols - column);
          const float* x = from + first;
          if (p.factor && first > 0) {  // the registers are ahead of memory; the group ends in this block
            float* work = p.work + row * p.stride + block.begin;
            x = work + first;
#pragma unroll
            for (int Q = 0; Q < kQuads; Q++)
#pragma unroll
              for (int c = 0; c < 4; c++)
                if (const int i = 4 * (kTeam * Q + lane) + c; alive && i >= first && i < first + n) work[i] = w[Q][c];
            sync_warp();
          }
          grid[0] = grid[1] = team_grid(x, alive ? n : 0, p.rule);
          if (writes) {
            const int64_t at = row * p.groups + column / p.group_size;
            p.scales[at] = grid[0].scale;
            if (p.zeros) p.zeros[at] = uint8_t(grid[0].zero);
          }
        } else if (first == 0) {
          grid[0] = grid[1] = stored_grid(p, row, column / p.group_size);
        }
      }
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const int i = first + c;
        if (i >= block.count) break;
        const float mine = q == 0 ? w[0][c] : q == 1 ? w[1][c] : q == 2 ? w[2][c] : w[3][c];
        const int owner = first_lane + first % kStrip / 2 + c / 2;  // of the grid
        const Grid g = {shuffle(grid[c % 2].scale, owner), shuffle(grid[c % 2].zero, owner)};
        const float x = shuffle(mine, first_lane + l);
        const float code = Math::code(x, g, max_code);
        float e = x - Math::decode(code, g);
        if (p.factor) {
          const uint32_t factor_row = stage + (i % kStageRows) * (kBlock * 4);
          e = e / lds<float>(factor_row + 4 * i);
#pragma unroll
          for (int Q = 0; Q < kQuads; Q++) {
            if (Q < q) continue;
            // Columns up to i have been solved: what becomes of them is not read again.
            const float4 u = lds<float4>(factor_row + 16 * (kTeam * Q + lane));
            w[Q][0] = fmaf(-e, u.x, w[Q][0]);
            w[Q][1] = fmaf(-e, u.y, w[Q][1]);
            w[Q][2] = fmaf(-e, u.z, w[Q][2]);
            w[Q][3] = fmaf(-e, u.w, w[Q][3]);
          }
        }
        strip_loss = fmaf(e, e, strip_loss);
        if (lane == 0) {
          sts(errors + 4 * i, e);
          sts(codes + i, uint8_t(code));
        }
      }
    }
  }
  cp_async_wait<0>();
  if (writes && p.loss) p.loss[row] = loss + double(strip_loss);

  // A warp writes its rows one after another, 32 columns at a time.
  sync_warp();
  const bool pushes = p.factor && block.begin + block.count < p.cols;
  const int warp_team = team - team % (32 / kTeam);
  for (int r = warp_team; r < warp_team + 32 / kTeam; r++) {
    const int64_t n = int64_t(blockIdx.x) * kSolveRows + r;
    if (n >= p.rows) break;
    for (int i = int(threadIdx.x) % 32; i < block.count; i += 32) {
      p.codes[n * p.cols + block.begin + i] = lds<uint8_t>(kCodesAt + r * kCodeRow + i);
      if (pushes) p.work[n * p.stride + block.begin + i] = lds<float>(kErrorsAt + r * kErrorRow + 4 * i);
    }
  }
}

// ---- push_block ----

constexpr int kPushRows = 128, kPushCols = 64, kChunk = 16, kPushThreads = 128;

// Shared memory, twice: errors [128 rows][16], rows 20 floats apart (four neighbours in different banks), and the
// factor [16][64]. Thread t has rows t / 8 + 16i and columns 4 (t % 8) + 32h + c.
constexpr uint32_t kErrorStride = (kChunk + 4) * 4, kFactorAt = kPushRows * kErrorStride;
constexpr uint32_t kPushStage = kFactorAt + kChunk * kPushCols * 4;

__device__ __forceinline__ void stage_product(const Problem& p, const Block& block, int64_t row, int64_t column,
                                              int chunk) {
  const uint32_t at = (chunk & 1) * kPushStage;
  const int64_t k = block.begin + chunk * kChunk;
  const int thread = int(threadIdx.x);
#pragma unroll
  for (int quad = thread; quad < kPushRows * kChunk / 4; quad += kPushThreads) {
    const int r = quad / (kChunk / 4), c = quad % (kChunk / 4) * 4;
    const bool inside = row + r < p.rows;
    cp_async16(at + r * kErrorStride + 4 * c, p.work + (inside ? row + r : 0) * p.stride + k + c, inside ? 16 : 0);
  }
#pragma unroll
  for (int quad = thread; quad < kChunk * kPushCols / 4; quad += kPushThreads)
    stage_factor(p, at + kFactorAt + 16 * quad, k + quad / (kPushCols / 4), column + quad % (kPushCols / 4) * 4, column,
                 p.cols);
  cp_async_commit();
}

__global__ void __launch_bounds__(kPushThreads, 3) push_block(Problem p, Block block) {
  const int tx = int(threadIdx.x) % 8, ty = int(threadIdx.x) / 8;
  const int64_t row = int64_t(blockIdx.x) * kPushRows;
  const int64_t column = block.begin + block.count + int64_t(blockIdx.y) * kPushCols;
  stage_product(p, block, row, column, 0);

  float sum[8][2][4];
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t r = row + ty + 16 * i, j = column + 4 * tx + 32 * h;
      const float* from = block.from + r * block.from_stride + j;
      if (r < p.rows && block.from_wide && j + 4 <= p.cols) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        sum[i][h][0] = four.x, sum[i][h][1] = four.y, sum[i][h][2] = four.z, sum[i][h][3] = four.w;
      } else {
#pragma unroll
        for (int c = 0; c < 4; c++) sum[i][h][c] = r < p.rows && j + c < p.cols ? from[c] : 0.0f;
      }
    }

  for (int chunk = 0; chunk < block.count / kChunk; chunk++) {
    cp_async_wait<0>();
    sync_block();
    if (chunk + 1 < block.count / kChunk) stage_product(p, block, row, column, chunk + 1);
    const uint32_t at = (chunk & 1) * kPushStage;
#pragma unroll
    for (int quad = 0; quad < kChunk / 4; quad++) {
      float e[8][4];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float4 four = lds<float4>(at + (ty + 16 * i) * kErrorStride + 16 * quad);
        e[i][0] = four.x, e[i][1] = four.y, e[i][2] = four.z, e[i][3] = four.w;
      }
#pragma unroll
      for (int k = 0; k < 4; k++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float4 u = lds<float4>(at + kFactorAt + (4 * quad + k) * (kPushCols * 4) + 16 * tx + 128 * h);
#pragma unroll
          for (int i = 0; i < 8; i++) {
            sum[i][h][0] = fmaf(-e[i][k], u.x, sum[i][h][0]);
            sum[i][h][1] = fmaf(-e[i][k], u.y, sum[i][h][1]);
            sum[i][h][2] = fmaf(-e[i][k], u.z, sum[i][h][2]);
            sum[i][h][3] = fmaf(-e[i][k], u.w, sum[i][h][3]);
          }
        }
    }
  }

#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int64_t r = row + ty + 16 * i, j = column + 4 * tx + 32 * h;
      float* to = p.work + r * p.stride + j;
      if (r < p.rows && j + 4 <= p.cols) {
        *reinterpret_cast<float4*>(to) = make_float4(sum[i][h][0], sum[i][h][1], sum[i][h][2], sum[i][h][3]);
      } else {
#pragma unroll
        for (int c = 0; c < 4; c++)
          if (r < p.rows && j + c < p.cols) to[c] = sum[i][h][c];
      }
    }
}

// ---- the schedule ----

bool rows_are_wide(const float* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 4 == 0;
}

int64_t workspace_stride(int64_t cols) { return ceil_div(cols, kStrip) * kStrip; }

Problem problem_of(const CudaSolve& call) {
  const lowbit_gptq_options& o = call.options;
  Problem p = {};
  p.rule = {o.format, o.symmetric != 0, o.clip != 0, o.scale_dtype};
  p.static_grids = o.static_grids != 0;
  p.rows = call.rows, p.cols = call.cols, p.groups = call.groups;
  p.group_size = o.group_size == -1 || o.group_size > call.cols ? call.cols : o.group_size;
  p.weight = call.weight, p.factor = call.factor, p.group_index = call.group_index;
  p.factor_wide = rows_are_wide(call.factor, call.cols);
  p.codes = call.codes, p.scales = call.scales, p.zeros = call.zeros, p.loss = call.loss;
  p.work = static_cast<float*>(call.workspace), p.stride = workspace_stride(call.cols);
  return p;
}

// Columns of the block that starts at `begin`: whole groups, or a part of one. A group's grid is found at its start,
// from weights that have received every error before it, so a group larger than a block starts one.
int block_columns(const Problem& p, int64_t begin) {
  const int64_t left = p.cols - begin;
  if (p.static_grids || p.group_size >= p.cols) return int(left < kBlock ? left : kBlock);
  const int64_t in_group = p.group_size - begin % p.group_size;
  const int64_t most =
      p.group_size > kBlock ? (in_group < kBlock ? in_group : kBlock) : kBlock / p.group_size * p.group_size;
  return int(left < most ? left : most);
}

cudaError_t start(const Problem& p, cudaStream_t stream) {
  Block block = {0, 0, p.weight, p.cols, rows_are_wide(p.weight, p.cols)};
  for (; block.begin < p.cols; block.begin += block.count) {
    block.count = block_columns(p, block.begin);
    const dim3 solve_grid(unsigned(ceil_div(p.rows, kSolveRows)), 1, 1);
    cudaError_t error = launch(solve_block, solve_grid, kSolveThreads, kSolveShared, stream, p, block);
    if (error != cudaSuccess) return error;
    const int64_t beyond = p.cols - block.begin - block.count;
    if (!p.factor || beyond == 0) continue;
    const dim3 push_grid(unsigned(ceil_div(p.rows, kPushRows)), unsigned(ceil_div(beyond, kPushCols)), 1);
    error = launch(push_block, push_grid, kPushThreads, 2 * kPushStage, stream, p, block);
    if (error != cudaSuccess) return error;
    block.from = p.work, block.from_stride = p.stride, block.from_wide = true;
  }
  return cudaSuccess;
}

}  // namespace

// rows * (cols rounded up to 16) floats, with or without a factor.
size_t solve_workspace(const CudaSolve* call) {
  return size_t(call->rows) * size_t(workspace_stride(call->cols)) * sizeof(float);
}

lowbit_status solve(const lowbit_cuda_queue* queue, const CudaSolve* call, CudaMessage* message) {
  const CurrentDevice current(queue->device);
  if (current.error() != cudaSuccess) return succeed_or(current.error(), "gptq", message);
  return succeed_or(start(problem_of(*call), static_cast<cudaStream_t>(queue->stream)), "gptq", message);
}

}  // namespace cuda
}  // namespace lowbit
