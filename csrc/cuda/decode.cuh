// Products of 1 to 16 tokens: y[m][n] = sum_k x[m][k] W[n][k] + bias[n]. The schedule; what a unit's product is, in
// floating point or in integers, is the class Product's (float_product.cuh, integer_product.cuh).
//
// Bound by the bytes of W. A block of 8 warps takes 16 rows; each warp sums its own slices of K (matmul_plan.h) and
// meets the others only when the rows are done: no barrier in the main loop. A warp keeps a ring of units under way by
// cp.async, each lane its own 16 bytes of two rows, so a block has 40-48 KB in flight, across the ends of rows too: the
// ring runs ahead into the block's next tile while this one is summed. Scales and zeros travel with their unit.
// The order of every sum is fixed: planes of a slice, slices of a chunk, chunks.
#ifndef LOWBIT_CUDA_DECODE_CUH
#define LOWBIT_CUDA_DECODE_CUH

#include "cuda/unit_ring.cuh"

namespace lowbit {
namespace cuda {

struct DecodeArguments {
  MatrixArguments w;
  Operands o;
  DecodePlan plan;
  Slices slices;
  int64_t first_token;  // of this pass
  void* parts;          // Sum [tiles][chunks][128 * token tiles], where blocks_y > 1
  uint32_t* tickets;    // [tiles], zero between launches
  // Activations as integers (integer_product.cuh): int8 [digits][tokens][x_cols], and for every span of columns
  const int8_t* digits;
  const float* steps;   // [tokens][spans]
  const int32_t* sums;  // [tokens][spans]
  int32_t x_cols, spans;
};

// The units of a tile that one warp sums: slice `warp` of each of a block's chunks, in order.
struct UnitWalk {
  int32_t unit, in_slice;

  __device__ __forceinline__ void start(int32_t first) { unit = first, in_slice = 0; }
  __device__ __forceinline__ void advance(int32_t slice_units) {
    unit++;
    if (++in_slice == slice_units) in_slice = 0, unit += (kWarps - 1) * slice_units;
  }
};

template <class Product>
__global__ void __launch_bounds__(kThreads, Product::kResident) decode(const DecodeArguments a) {
  using Sum = typename Product::Sum;
  constexpr int Bits = Product::kBits, TokenTiles = Product::kTokenTiles;
  constexpr int kPlanes = Format<Bits>::kPlanes, kTileOutputs = kTileRows * kTileTokens;
  constexpr int kOutputs = kTileOutputs * TokenTiles;  // of 16 rows; one thread each
  const MatrixArguments& w = a.w;
  const DecodePlan& plan = a.plan;
  const int lane = int(threadIdx.x) & 31, warp = shuffle(int(threadIdx.x) >> 5, 0);
  const int64_t tiles = (w.rows + kTileRows - 1) / kTileRows;
  const int32_t tokens = int32_t(min(int64_t(plan.pass_tokens), int64_t(a.o.tokens) - a.first_token));
  const int32_t slice_units = a.slices.slice_units, chunk_units = kWarps * slice_units;
  const int32_t first_chunk = int32_t(blockIdx.y) * plan.block_chunks;
  const int32_t chunks = min(plan.block_chunks, a.slices.chunks - first_chunk);
  const int32_t first_unit = first_chunk * chunk_units,
                end_unit = min(first_unit + chunks * chunk_units, a.slices.units);
  const int32_t warp_unit = first_unit + warp * slice_units;  // this warp's first; it has none where that is the end

  const uint32_t ring = plan.ring_at + uint32_t(warp * plan.depth * plan.slot_bytes);
  const uint32_t ring_end = ring + uint32_t(plan.depth * plan.slot_bytes);
  UnitCopier<Bits, Product::kScales> copier(w, lane);
  UnitWalk copied;  // the next unit to be copied
  int64_t copy_tile = warp_unit < end_unit ? int64_t(blockIdx.x) : tiles;
  uint32_t copy_slot = ring, slot = ring;
  copied.start(warp_unit);
  if (copy_tile < tiles) copier.go_to(w, copy_tile, lane);
  auto copy_next = [&] {
    if (copy_tile < tiles) {
      copier.copy(w, copied.unit, lane, copy_slot);
      copied.advance(slice_units);
      if (copied.unit >= end_unit) {
        copied.start(warp_unit);
        copy_tile += gridDim.x;
        if (copy_tile < tiles) copier.go_to(w, copy_tile, lane);
      }
    }
    cp_async_commit();  // an empty group where nothing is left, so that the counting goes on
    copy_slot += uint32_t(plan.slot_bytes);
    if (copy_slot == ring_end) copy_slot = ring;
  };
  for (int i = 1; i < plan.depth; i++) copy_next();

  Product::stage(a, tokens, first_unit, end_unit - first_unit);
  sync_block();
  const Product product(a, lane, tokens);

  int32_t half = 0;  // which of the two buffers of sums this round writes
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const LaneRows rows(w, tile, lane);
    // What one thread adds up and stores: element j of the fragments, lane j / 4, register j % 4.
    const int j = int(threadIdx.x), in_tile = j % kTileOutputs;
    const int64_t row = tile * kTileRows + (in_tile >> 4) + 8 * (in_tile >> 1 & 1);
    const int32_t token = 8 * (j / kTileOutputs) + 2 * (in_tile >> 2 & 3) + (in_tile & 1);
    const bool owns = j < kOutputs && token < tokens && row < w.rows;
    Sum total = 0;
    UnitWalk walk;
    walk.start(warp_unit);
    for (int32_t round = 0; round < chunks; round += plan.round_chunks) {
      const int32_t round_end = min(round + plan.round_chunks, chunks);
      const uint32_t sums = plan.rounds_at + uint32_t(half * plan.round_chunks * kWarps * kOutputs * 4);
      half ^= 1;
      for (int32_t chunk = round; chunk < round_end; chunk++) {
        Sum part[TokenTiles][4] = {};
#pragma unroll 1
        for (int32_t i = 0; i < slice_units && walk.unit < end_unit; i++) {
          // The unit is here once all but the newest groups are, for every lane's part of it after sync_warp; and then
          // every lane has also left the slot that is copied into next.
          if (plan.depth == ring_depth(Bits, 2))
            cp_async_wait<ring_depth(Bits, 2) - 2>();
          else if (plan.depth == ring_depth(Bits, 1))
            cp_async_wait<ring_depth(Bits, 1) - 2>();
          else
            cp_async_wait<0>();
          sync_warp();
          copy_next();
          product.multiply_unit(w, rows, slot, walk.unit * kPlanes, (walk.unit - first_unit) * kPlanes, part);
          walk.advance(slice_units);
          slot += uint32_t(plan.slot_bytes);
          if (slot == ring_end) slot = ring;
        }
#pragma unroll
        for (int n = 0; n < TokenTiles; n++)
          sts<typename Product::Sum4>(
              sums + uint32_t((((chunk - round) * kWarps + warp) * kOutputs + kTileOutputs * n + 4 * lane) * 4),
              {part[n][0], part[n][1], part[n][2], part[n][3]});
      }
      sync_block();
      // The other warps go on with the next round, in the other buffer; nobody comes back to this one before the next
      // barrier, which these threads reach when they have read it.
      for (int32_t chunk = round; chunk < round_end && j < kOutputs; chunk++) {
        Sum sum = 0;
#pragma unroll
        for (int s = 0; s < kWarps; s++)
          sum += lds<Sum>(sums + uint32_t((((chunk - round) * kWarps + s) * kOutputs + j) * 4));
        if (plan.blocks_y == 1)
          total += sum;
        else
          static_cast<Sum*>(a.parts)[(tile * a.slices.chunks + first_chunk + chunk) * kOutputs + j] = sum;
      }
    }
    bool store = owns;
    if (plan.blocks_y > 1) {
      // Whoever finishes a tile last adds the sums of all chunks, in order.
      fence();
      sync_block();
      const uint32_t last_ticket = uint32_t(plan.blocks_y) - 1;
      if (threadIdx.x == 0) sts<uint32_t>(plan.ticket_at, draw_ticket(a.tickets + tile, last_ticket));
      sync_block();
      store = owns && lds<uint32_t>(plan.ticket_at) == last_ticket;
      if (store) {
        fence();
        for (int32_t chunk = 0; chunk < a.slices.chunks; chunk++)
          total += ld_shared_result(static_cast<const Sum*>(a.parts) + (tile * a.slices.chunks + chunk) * kOutputs + j);
      }
    }
    if (store) {
      float y = Product::finish(a, row, token, total);
      if (a.o.bias) y += load_float(a.o.bias, a.o.bias_dtype, row);
      store_float(a.o.y, a.o.dtype, (a.first_token + token) * a.o.y_stride + row, y);
    }
  }
  cp_async_wait<0>();
}

}  // namespace cuda
}  // namespace lowbit
#endif
