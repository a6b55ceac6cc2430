// How a product is cut up on a GPU: pure arithmetic over (format, N, K, tokens, device), for the host alone, so that
// every schedule is tested where there is no GPU. liblowbit answers lowbit_cuda_matmul_plan with it and liblowbit_cuda
// launches by it.
//
//   unit     the columns that one step decodes: 64 (int8), 128 (int4), 256 (int2), 512 (int3), 320 (trit)
//   slice    `slice_units` consecutive units of a row: what one warp sums into one number
//   chunk    8 slices, one for each warp of a block
//   y[m][n] = sum over chunks of (sum over the 8 slices), in order, then + bias
// Units, slices and chunks depend on format and K alone, and so do the bits of a result: how many tokens share a launch,
// how many chunks a block takes and on which device only decide who adds what where.
#ifndef LOWBIT_CUDA_MATMUL_PLAN_H
#define LOWBIT_CUDA_MATMUL_PLAN_H

#include "lowbit/formats.h"
#include "lowbit/lowbit.h"

namespace lowbit {
namespace cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // of a block, in every product kernel
constexpr int kTileRows = 16;                      // rows of W of one mma
constexpr int kTileTokens = 8;                     // tokens of one mma

constexpr int unit_planes(int bits) {
  return bits == 8 ? 1 : bits == 4 ? 2 : bits == 2 ? 4 : bits == 3 ? 8 : kTritPlanes;
}
constexpr int unit_cols(int bits) { return 64 * unit_planes(bits); }
constexpr int unit_lines(int bits) { return bits == 3 ? 3 : 1; }

enum class Kernel { plain, decode, tile, integer };

constexpr const char* kernel_name(Kernel kernel) {
  return kernel == Kernel::plain    ? "plain"
         : kernel == Kernel::decode ? "decode"
         : kernel == Kernel::tile   ? "tile"
                                    : "integer";
}

// Sums of a product: depends on format and K alone.
struct Slices {
  int32_t units;        // of a row
  int32_t slice_units;  // of a slice; the last slices of a row may have fewer, or none
  int32_t chunks;       // of 8 slices

  constexpr Slices(int bits, int64_t cols)
      : units(int32_t(ceil_div(cols, unit_cols(bits)))), slice_units(0), chunks(0) {
    // A chunk of about 2048 columns: its activations for 16 tokens are 64 KB of shared memory.
    const int32_t most = 2048 / (kWarps * unit_cols(bits)) > 1 ? 2048 / (kWarps * unit_cols(bits)) : 1;
    const int32_t even = int32_t(ceil_div(units, kWarps));
    slice_units = even < most ? even : most;
    chunks = int32_t(ceil_div(units, kWarps * slice_units));
  }
  constexpr int32_t chunk_units() const { return kWarps * slice_units; }
};

// ---- decode: 1 to 16 tokens at a time, a block of 8 warps that share 16 rows and split K ----

// How scales meet planes: one a unit of 16 rows (groups of whole units, or whole rows), one a plane (groups that are a
// multiple of 64 columns), finer ones, for which sums of activations are kept for every 16 columns, or one a pair of
// planes (groups that are a multiple of 128 columns, where a unit has more).
enum class Scales { unit, plane, fine, pair };

constexpr Scales scales_of(int bits, int64_t cols, int64_t group_size, bool one_a_row) {
  return one_a_row || group_size >= cols || group_size % unit_cols(bits) == 0 ? Scales::unit
         : group_size % 128 == 0 && (bits == 2 || bits == 3)                  ? Scales::pair
         : group_size % 64 == 0                                               ? Scales::plane
                                                                              : Scales::fine;
}

// Planes of a unit that share a scale, and the words of scales that a unit has.
LOWBIT_HD constexpr int shared_planes(Scales scales, int planes) {
  return scales == Scales::unit ? planes : scales == Scales::pair ? 2 : 1;
}
LOWBIT_HD constexpr int scale_words(Scales scales, int planes) {
  return scales == Scales::fine ? 0 : planes / shared_planes(scales, planes);
}

// A slot of a ring: the lines of one unit of 16 rows, then a word for the scale and one for the zero of each row.
constexpr int32_t slot_bytes(int bits, Scales scales) {
  return kTileRows * 64 * unit_lines(bits) + 128 * scale_words(scales, unit_planes(bits));
}

// What a block keeps of its tokens' activations in shared memory.
struct Staged {
  int32_t x_stride;  // bytes between two tokens
  int32_t x_bytes, sums_bytes;
};

// fp16 or bf16: an odd multiple of 16 bytes, so that eight tokens' 16-byte pieces meet every bank once.
constexpr Staged staged_floats(int32_t planes, int32_t tokens, Scales scales) {
  const int32_t stride = 128 * planes + 16, padded = tokens > kTileTokens ? 2 * kTileTokens : kTileTokens;
  return {stride, stride * tokens, 4 * planes * padded * (scales == Scales::fine ? 4 : 1)};
}

// Columns that share a step and a sum of integer activations, in shared memory.
enum class Spans { whole, plane, fine };  // the row; 64; 16

// int8 digits: 64 bytes over a multiple of 128, for the same reason. A step and a sum for every span.
constexpr Staged staged_digits(int32_t planes, int32_t tokens, int32_t digits, Spans spans) {
  const int32_t stride = 64 * (planes | 1), padded = tokens > kTileTokens ? 2 * kTileTokens : kTileTokens;
  return {stride, digits * stride * tokens,
          spans == Spans::whole ? 0 : 8 * planes * padded * (spans == Spans::fine ? 4 : 1)};
}

struct DecodePlan {
  int32_t pass_tokens;   // tokens of one launch: 1, 2, 4, 8 or 16
  int32_t depth;         // slots of a warp's ring
  int32_t slot_bytes;    // of one unit
  int32_t round_chunks;  // chunks summed between two barriers
  int32_t block_chunks;  // chunks of a block; blocks_y blocks share a tile of rows
  int32_t blocks_x, blocks_y;
  int32_t x_stride;  // bytes of a token's activations in shared memory: an odd multiple of 16
  uint32_t sums_at, ring_at, rounds_at, ticket_at, shared_bytes;  // what lies behind the activations
};

// Units of a warp's ring: what there is room for. An int3 unit has three lines.
LOWBIT_HD constexpr int ring_depth(int bits, int level) {
  return level == 2 ? (bits == 3 ? 3 : 7) : level == 1 && bits != 3 ? 4 : 2;
}

constexpr int32_t align_up(int32_t bytes, int32_t to) { return (bytes + to - 1) / to * to; }

// Blocks of a multiprocessor that registers allow: two leave a thread 128, which these kernels do not fit.
LOWBIT_HD constexpr int resident_blocks(int bits, int token_tiles, bool integers, Spans spans) {
  return bits == 3 || (bits == 2 && token_tiles == 2 && !integers) ||
                 (bits == kTrit && (token_tiles == 2 || spans == Spans::plane))
             ? 1
             : 2;
}

// digits: 0 where activations stay floating point.
constexpr DecodePlan try_decode(int bits, const Slices& s, int64_t rows, int32_t pass_tokens, Scales scales,
                                int32_t digits, Spans spans, int ring, int32_t block_chunks, int32_t round_chunks,
                                const lowbit_cuda_device& d) {
  DecodePlan p{};
  p.pass_tokens = pass_tokens;
  p.depth = ring_depth(bits, ring);
  p.slot_bytes = slot_bytes(bits, scales);
  p.round_chunks = round_chunks;
  p.block_chunks = block_chunks;
  const int32_t staged = block_chunks * s.chunk_units() < s.units ? block_chunks * s.chunk_units() : s.units;
  const int32_t tiles_n = pass_tokens > kTileTokens ? 2 : 1;  // tiles of 8 tokens
  const int32_t planes = staged * unit_planes(bits);
  const Staged x =
      digits ? staged_digits(planes, pass_tokens, digits, spans) : staged_floats(planes, pass_tokens, scales);
  p.x_stride = x.x_stride;
  p.sums_at = uint32_t(x.x_bytes);
  p.ring_at = uint32_t(align_up(x.x_bytes + x.sums_bytes, 128));
  p.rounds_at = p.ring_at + uint32_t(kWarps * p.depth * p.slot_bytes);
  p.ticket_at = p.rounds_at + uint32_t(2 * round_chunks * kWarps * tiles_n * kTileRows * kTileTokens * 4);
  p.shared_bytes = p.ticket_at + 16;
  const int64_t tiles = ceil_div(rows, kTileRows);
  p.blocks_y = int32_t(ceil_div(s.chunks, block_chunks));
  const int64_t resident =
      d.shared_per_sm / int32_t(p.shared_bytes + 1024) < 2 ? 1 : resident_blocks(bits, tiles_n, digits > 0, spans);
  const int64_t wide = int64_t(d.multiprocessors) * resident / p.blocks_y;
  p.blocks_x = int32_t(tiles < wide ? tiles : wide > 1 ? wide : 1);
  return p;
}

// The largest pass, then the deepest ring and the most chunks a block that fit; fewer chunks a block where rows are too
// few to give every multiprocessor a tile.
constexpr DecodePlan plan_decode(int bits, int64_t rows, int64_t cols, int64_t tokens, Scales scales, int32_t digits,
                                 Spans spans, const lowbit_cuda_device& d) {
  const Slices s(bits, cols);
  const int64_t tiles = ceil_div(rows, kTileRows);
  const int64_t split = tiles < d.multiprocessors ? ceil_div(d.multiprocessors, tiles) : 1;
  const int32_t most_chunks = int32_t(ceil_div(s.chunks, split < s.chunks ? split : s.chunks));
  int32_t pass = 1;
  while (pass < 2 * kTileTokens && pass < tokens) pass *= 2;
  for (; pass >= 1; pass /= 2)
    for (int ring = 2; ring >= 0; ring--)
      for (int32_t chunks = most_chunks; chunks >= 1; chunks = chunks > 1 ? (chunks + 1) / 2 : 0)
        for (int32_t round = chunks > 1 ? 2 : 1; round >= 1; round--) {
          const DecodePlan p = try_decode(bits, s, rows, pass, scales, digits, spans, ring, chunks, round, d);
          if (p.shared_bytes <= uint32_t(d.shared_per_block)) return p;
        }
  return DecodePlan{};  // pass_tokens 0: int3 with the 64 KB of sm_75
}

// ---- tile: 17 and more tokens, a block of 8 warps, each with its own rows and all of the block's tokens ----

struct TilePlan {
  int32_t row_tiles;    // of 16 rows a warp: 1 or 2
  int32_t token_tiles;  // of 8 tokens a block: 4 or 8
  Scales scales;        // unit or plane
  int32_t stages;       // units under way: 2, 3 or 4; 0: no tile kernel fits this device
  int32_t splits;       // parts of K, summed in order: a function of (N, K) and the device
  int32_t split_units;
  int32_t slot_bytes;  // of one warp's unit of 16 rows
  int32_t x_stride;    // bytes of a token's unit in shared memory
  int32_t stage_bytes;
  uint32_t sums_at, weights_at;  // within a stage
  uint32_t shared_bytes;
};

constexpr TilePlan plan_tile(int bits, int64_t rows, int64_t cols, int64_t tokens, Scales scales,
                             const lowbit_cuda_device& d) {
  const int32_t units = int32_t(ceil_div(cols, unit_cols(bits)));
  // 32 rows a warp halve what a block reads of its activations, where that leaves few multiprocessors idle. Registers
  // allow it to int4 and int2 with 64 tokens.
  const bool wide =
      (bits == 4 || bits == 2) && tokens > 32 && 4 * ceil_div(rows, 2 * kTileRows * kWarps) >= 3 * d.multiprocessors;
  for (int32_t row_tiles = wide ? 2 : 1; row_tiles >= 1; row_tiles--)
    for (int32_t token_tiles = tokens > 32 ? 8 : 4; token_tiles >= (row_tiles == 2 ? 8 : 4); token_tiles /= 2)
      for (int32_t stages = 4; stages >= 2; stages--) {
        TilePlan p{};
        p.row_tiles = row_tiles;
        p.token_tiles = token_tiles;
        p.stages = stages;
        p.scales = row_tiles == 2 || bits < 4 ? Scales::plane : scales;  // scales that outlive a plane take registers
        p.slot_bytes = slot_bytes(bits, p.scales);
        p.x_stride = 2 * unit_cols(bits) + 16;
        p.sums_at = uint32_t(p.x_stride * kTileTokens * token_tiles);
        p.weights_at = p.sums_at + uint32_t(4 * unit_planes(bits) * kTileTokens * token_tiles);
        p.stage_bytes = int32_t(p.weights_at) + kWarps * row_tiles * p.slot_bytes;
        p.shared_bytes = uint32_t(stages * p.stage_bytes) + 16;  // and a ticket
        if (p.shared_bytes > uint32_t(d.shared_per_block)) continue;
        const int64_t row_blocks = ceil_div(rows, kTileRows * kWarps * row_tiles);
        const int64_t wanted = row_blocks < d.multiprocessors ? d.multiprocessors / row_blocks : 1;
        const int64_t most = ceil_div(units, 4);  // a part has at least four units
        p.split_units = int32_t(ceil_div(units, wanted < most ? wanted : most));
        p.splits = int32_t(ceil_div(units, p.split_units));
        return p;
      }
  return TilePlan{};
}

// ---- the choice ----

struct MatmulPlan {
  Kernel kernel;
  bool prefers_unpack;
  Scales scales;
  int32_t digits;  // of integer activations; 0: they stay floating point
  Spans spans;
  int32_t span, chunk;  // integer activations: columns of a sum, and of a step
  int64_t x_cols;       // columns of prepared activations: whole units
  DecodePlan decode;
  TilePlan tile;
  // The workspace: tickets (zero between calls), partial sums, prepared activations.
  int64_t zeroed_bytes, parts_at, x_at, steps_at, sums_at, workspace_bytes;
};

// Tokens from which unpacking and the framework's dense product take over. Estimates until measured: an unpack moves
// 2.5 bytes a weight once, and a dense product runs at twice the rate of the tile kernel where there is wgmma.
constexpr int64_t unpack_tokens(int arch) { return arch >= 90 ? 384 : 768; }

constexpr int64_t align256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

constexpr MatmulPlan plan_matmul(const lowbit_matrix& w, int64_t tokens, lowbit_dtype dtype,
                                 lowbit_activations activations, const lowbit_cuda_device& d) {
  const int bits = w.format;
  const bool trit = bits == kTrit, one_a_row = w.scale_cols == 1, int8 = activations == LOWBIT_ACT_INT8;
  MatmulPlan p{};
  p.scales = scales_of(bits, w.cols, w.group_size, one_a_row);
  const Slices s(bits, w.cols);
  p.x_cols = int64_t(s.units) * unit_cols(bits);
  const bool integers = trit || int8;
  const bool floats = d.arch >= 80 || (d.arch >= 75 && dtype == LOWBIT_F16);
  const bool needs_plain = d.arch < 75 || (!integers && (dtype == LOWBIT_F32 || !floats));
  if (integers) {
    p.digits = int8 ? 1 : 2;
    p.chunk = int32_t(chunk_size(bits, w.cols, w.group_size));
    const bool whole = trit && w.group_size == w.cols && w.cols <= kTritChunk;
    p.spans = whole ? Spans::whole : p.chunk >= 64 ? Spans::plane : Spans::fine;
    p.span = whole ? int32_t(p.x_cols) : p.spans == Spans::plane ? 64 : 16;
    p.scales = whole ? Scales::fine : p.spans == Spans::plane ? Scales::plane : Scales::fine;
  }
  if (needs_plain) {
    p.kernel = Kernel::plain;
    p.prefers_unpack = tokens > 16 && !int8;
    if (!int8) p.digits = 0;
  } else if (integers) {
    p.kernel = Kernel::integer;
    p.prefers_unpack = tokens > 16 && !int8;
    p.decode = plan_decode(bits, w.rows, w.cols, tokens, p.scales, p.digits, p.spans, d);
  } else {
    p.kernel = Kernel::decode;
    p.decode = plan_decode(bits, w.rows, w.cols, tokens, p.scales, 0, Spans::whole, d);
    p.prefers_unpack = tokens >= unpack_tokens(d.arch) || (p.scales == Scales::fine && tokens > 64);
    if (tokens > 16 && p.scales != Scales::fine) {
      p.tile = plan_tile(bits, w.rows, w.cols, tokens, p.scales, d);
      if (p.tile.stages) p.kernel = Kernel::tile;
    }
  }
  if (p.kernel != Kernel::plain && p.kernel != Kernel::tile && !p.decode.pass_tokens) {
    p.kernel = Kernel::plain;
    if (!int8) p.digits = 0;
    p.prefers_unpack = tokens > 16 && !int8;
  }
  int64_t at = 0;
  if (p.kernel == Kernel::tile) {
    const int64_t block_rows = kTileRows * kWarps * p.tile.row_tiles, block_tokens = kTileTokens * p.tile.token_tiles;
    const int64_t blocks = ceil_div(w.rows, block_rows) * ceil_div(tokens, block_tokens);
    if (p.tile.splits > 1) {
      p.zeroed_bytes = align256(4 * blocks);
      p.parts_at = at = p.zeroed_bytes;
      at += 4 * blocks * block_rows * block_tokens * p.tile.splits;
    }
    const int64_t padded = ceil_div(tokens, block_tokens) * block_tokens;
    p.x_at = at = align256(at);
    p.sums_at = at = align256(at + 2 * tokens * p.x_cols);
    at += 4 * padded * (p.x_cols / 64);
  } else {
    if (p.kernel != Kernel::plain && p.decode.blocks_y > 1) {
      const int64_t tiles = ceil_div(w.rows, kTileRows), tiles_n = p.decode.pass_tokens > kTileTokens ? 2 : 1;
      p.zeroed_bytes = align256(4 * tiles);
      p.parts_at = at = p.zeroed_bytes;
      at += tiles * s.chunks * tiles_n * kTileRows * kTileTokens * 4;
    }
    if (p.digits) {
      const int64_t spans = ceil_div(p.x_cols, p.span);
      p.x_at = at = align256(at);
      p.steps_at = at = align256(at + p.digits * tokens * p.x_cols);
      p.sums_at = at = align256(at + 4 * tokens * spans);
      at += 4 * tokens * spans;
    }
  }
  p.workspace_bytes = align256(at);
  return p;
}

}  // namespace cuda
}  // namespace lowbit
#endif
