// Products of 17 tokens and more: y[m][n] = sum_k x[m][k] W[n][k] + bias[n], weights int2, int3, int4, int8, x fp16, bf16.
//
// A block of 8 warps takes 128 or 256 rows and 32 or 64 tokens; each warp has 16 or 32 of the rows and all of the tokens,
// so that a decoded fragment of weights meets 4 or 8 mma. Units of weights and activations come through 2 to 4 stages
// of cp.async, one block barrier a unit. Activations were brought into fragment order by stage.cu.
// Bound by the tensor cores from about 100 tokens on, by the bytes of W below. Sums are in the order of planes, of parts
// of K then: they do not depend on the number of tokens.
// Where sm_90a has wgmma, a kernel of its own would take the sizes above a few hundred tokens.
#ifndef LOWBIT_CUDA_TILE_CUH
#define LOWBIT_CUDA_TILE_CUH

#include "cuda/float_product.cuh"

namespace lowbit {
namespace cuda {

struct TileArguments {
  MatrixArguments w;
  Operands o;
  TilePlan plan;
  int32_t units;
  const uint16_t* x;  // [tokens][x_cols], the middle two of every four columns swapped
  const float* sums;  // [planes][tokens_padded]
  int64_t x_cols, tokens_padded;
  float* parts;       // [blocks][splits][outputs of a block], where splits > 1
  uint32_t* tickets;  // [blocks], zero between launches
};

template <int Bits, bool Bf16, int RowTiles, int TokenTiles, Scales Groups>
__global__ void __launch_bounds__(kThreads, 1) tile(const TileArguments a) {
  constexpr int kPlanes = Format<Bits>::kPlanes, kTokens = kTileTokens * TokenTiles;
  constexpr int kPieces = 8 * kPlanes;  // 16-byte pieces of a token's unit
  constexpr int kLaneSums = RowTiles * TokenTiles * 4;
  const MatrixArguments& w = a.w;
  const TilePlan& plan = a.plan;
  const int lane = int(threadIdx.x) & 31, warp = shuffle(int(threadIdx.x) >> 5, 0);
  const int64_t first_tile = (int64_t(blockIdx.x) * kWarps + warp) * RowTiles;
  const int64_t first_token = int64_t(blockIdx.y) * kTokens;
  const int32_t tokens = int32_t(min(int64_t(kTokens), int64_t(a.o.tokens) - first_token));
  const int32_t first_unit = int32_t(blockIdx.z) * plan.split_units;
  const int32_t end_unit = min(first_unit + plan.split_units, a.units);

  LaneRows rows[RowTiles];
#pragma unroll
  for (int r = 0; r < RowTiles; r++) rows[r] = LaneRows(w, first_tile + r, lane);
  auto copy_stage = [&](int32_t unit, uint32_t stage) {
    if (unit < end_unit) {
      for (int32_t i = int32_t(threadIdx.x); i < kTokens * kPieces; i += kThreads) {
        const int32_t token = i / kPieces, piece = i % kPieces;
        const int64_t from = first_token + min(token, tokens - 1);  // absent: the last, whose results nobody stores
        cp_async16(stage + uint32_t(token * plan.x_stride + 16 * piece),
                   a.x + from * a.x_cols + int64_t(unit) * 64 * kPlanes + 8 * piece);
      }
      for (int32_t i = int32_t(threadIdx.x); i < kPlanes * kTokens / 4; i += kThreads)
        cp_async16(stage + plan.sums_at + 16 * uint32_t(i),
                   a.sums + (int64_t(unit) * kPlanes + i / (kTokens / 4)) * a.tokens_padded + first_token +
                       i % (kTokens / 4) * 4);
#pragma unroll
      for (int r = 0; r < RowTiles; r++) {  // made anew each time: its addresses would take registers from the sums
        const int here = opaque(lane);
        UnitCopier<Bits, Groups> copier(w, here);
        copier.go_to(w, first_tile + r, here);
        copier.copy(w, unit, here, stage + plan.weights_at + uint32_t((warp * RowTiles + r) * plan.slot_bytes));
      }
    }
    cp_async_commit();
  };

  const uint32_t stages_end = uint32_t(plan.stages * plan.stage_bytes);
  for (int32_t i = 0; i < plan.stages - 1; i++) copy_stage(first_unit + i, uint32_t(i * plan.stage_bytes));

  float part[RowTiles][TokenTiles][4] = {};
  uint32_t stage = 0, copy_to = uint32_t((plan.stages - 1) * plan.stage_bytes);
#pragma unroll 1
  for (int32_t unit = first_unit; unit < end_unit; unit++) {
    if (plan.stages == 4)
      cp_async_wait<2>();
    else if (plan.stages == 3)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    sync_block();  // the stage is whole, and everyone has left the one that is copied into next
    copy_stage(unit + plan.stages - 1, copy_to);
    uint32_t x_at[TokenTiles];
#pragma unroll
    for (int n = 0; n < TokenTiles; n++)
      x_at[n] = stage + uint32_t((8 * n + (lane >> 2)) * plan.x_stride + 32 * (lane & 3));
    multiply_unit<Bits, Bf16, RowTiles, TokenTiles, Groups>(
        w, rows, stage + plan.weights_at + uint32_t(warp * RowTiles * plan.slot_bytes), uint32_t(plan.slot_bytes), lane,
        unit * kPlanes, x_at, stage + plan.sums_at + 8 * uint32_t(lane & 3), part);
    stage = stage + uint32_t(plan.stage_bytes) == stages_end ? 0 : stage + uint32_t(plan.stage_bytes);
    copy_to = copy_to + uint32_t(plan.stage_bytes) == stages_end ? 0 : copy_to + uint32_t(plan.stage_bytes);
  }
  cp_async_wait<0>();

  bool store = true;
  if (plan.splits > 1) {
    // Whoever finishes a tile last adds the parts of K, in order. Element (r, n, i) of thread t lies at [r, n, i][t].
    const int64_t block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
    float* mine = a.parts + (block * plan.splits + blockIdx.z) * kLaneSums * kThreads + threadIdx.x;
#pragma unroll
    for (int e = 0; e < kLaneSums; e++) mine[e * kThreads] = part[e / (4 * TokenTiles)][e / 4 % TokenTiles][e % 4];
    fence();
    sync_block();
    const uint32_t last = uint32_t(plan.splits) - 1;
    if (threadIdx.x == 0) sts<uint32_t>(stages_end, draw_ticket(a.tickets + block, last));
    sync_block();
    store = lds<uint32_t>(stages_end) == last;
    if (store) {
      fence();
      const float* all = a.parts + block * plan.splits * kLaneSums * kThreads + threadIdx.x;
#pragma unroll
      for (int e = 0; e < kLaneSums; e++) {
        float sum = 0;
        for (int32_t s = 0; s < plan.splits; s++)
          sum += ld_shared_result(all + (int64_t(s) * kLaneSums + e) * kThreads);
        part[e / (4 * TokenTiles)][e / 4 % TokenTiles][e % 4] = sum;
      }
    }
  }
  if (!store) return;
#pragma unroll
  for (int r = 0; r < RowTiles; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = (first_tile + r) * kTileRows + (lane >> 2) + 8 * half;
      if (row >= w.rows) continue;
      const float bias = a.o.bias ? load_float(a.o.bias, a.o.bias_dtype, row) : 0.0f;
#pragma unroll
      for (int n = 0; n < TokenTiles; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int32_t token = 8 * n + 2 * (lane & 3) + i;
          if (token < tokens)
            store_float(a.o.y, a.o.dtype, (first_token + token) * a.o.y_stride + row, part[r][n][2 * half + i] + bias);
        }
    }
}

}  // namespace cuda
}  // namespace lowbit
#endif
