// y[m,n] = sum_c fma chain of float(I[m,n,c]) * (s[n,g(c)] * step[m,c])   on AMX, for every format.
//
// kTiles. 64 columns of 16 tokens' digits are a B tile as they lie; 16 rows of W, decoded to bytes, are an A tile:
// TDPBUSD multiplies 16 rows, 64 columns and 16 tokens into int32 sums. A chunk of 128 is two of them a digit, one of 64
// is one, chunks of 32 and 16 fill a half and a quarter of one; a ternary row accumulates in its tile from end to end.
// The sums of a chunk then leave for the vector unit, which adds them to slot c % 16 as docs/numerics.md says.
//
// Register tile: 2 A (32 rows) x 2 B = 4 C, so that four products take four loads. The two B are the digits of one tile
// of tokens or, with one digit, two tiles of tokens. 32 rows are decoded into L1, 512 columns (a stage) at a time, and
// meet two tiles of tokens. The tile unit can multiply a chunk while the vector unit finishes the chunk before it and
// decodes a part of the next stage: the program issues the products of a chunk first, then vector work that does not
// depend on them, and leaves the overlap to the core.
// Stages are taken so that those which share slots follow each other: with chunks of 128, 4 slots of 16 are in use at a
// time, 16 KB of L1 instead of 64.
//
// Bounds, as an estimate from the instructions (not measured: this was written without such a CPU): for int4 and two
// digits, 32 rows x 128 columns x 16 tokens are 8 TDPBUSD of 16 cycles, beside 32 x 7 vector operations to finish and 32 x
// 3 to decode, half of that a tile of tokens: 128 cycles in the tile unit, about as many in two vector pipes. With chunks
// of 32 and 16 the vector unit alone decides.
//
// The tile state is set up and released once a call, which is up to 64 rows and 256 tokens: one LDTILECFG and one
// TILERELEASE for at least 6 tokens by every column, so that between calls a thread has no 8 KB for context switches to
// save. A thread's first tile instruction traps once, for the system to make room for them.
//
// kRows, few tokens: the kernel of avx512vnni.
#ifndef LOWBIT_CPU_MATMUL_AMX_H
#define LOWBIT_CPU_MATMUL_AMX_H

#include "cpu/amx_tiles.h"
#include "cpu/stage_avx512.h"

namespace lowbit {
namespace {

constexpr int kHalfRows = kMostTileRows;   // rows of W in an A tile
constexpr int kBlockRows = 2 * kHalfRows;  // rows of W that are decoded together
constexpr int kPanelTiles = 2;             // tiles of tokens that meet a decoded stage
constexpr int kFirstA = 4, kFirstB = 6;    // registers: A 4 and 5, B 6 and 7; C 2a + b is the product of A a and B b
constexpr int kSums = kHalfRows * kLanes;  // of a C tile
constexpr int64_t kRowBytes = kLanes * 4;  // of a B tile and a C tile

template <int kChunk>
constexpr int kStepCodes = kChunk < kMostTileBytes ? kChunk : kMostTileBytes;  // columns of one product

template <int kChunk>
TileShapes tile_shapes() {
  constexpr int kStep = kStepCodes<kChunk>;
  TileShapes shapes;
  auto set = [&](int tile, int rows, int bytes) {
    shapes.rows[tile] = uint8_t(rows);
    shapes.row_bytes[tile] = uint16_t(bytes);
  };
  for (int c = 0; c < kFirstA; c++) set(c, kHalfRows, kRowBytes);
  for (int i = 0; i < 2; i++) set(kFirstA + i, kHalfRows, kStep), set(kFirstB + i, kStep / 4, kRowBytes);
  return shapes;
}

// The C tiles of kA x kB products: cleared or fetched from `sums`, and put there.
template <int kA, int kB, int i = 0>
LOWBIT_INLINE void begin_sums(bool clear, const int32_t* sums) {
  if constexpr (i / 2 < kA) {
    if constexpr (i % 2 < kB) {
      if (clear)
        zero_tile<i>();
      else
        load_tile<i>(sums + i * kSums, kRowBytes);
    }
    begin_sums<kA, kB, i + 1>(clear, sums);
  }
}

template <int kA, int kB, int i = 0>
LOWBIT_INLINE void end_sums(int32_t* sums) {
  if constexpr (i / 2 < kA) {
    if constexpr (i % 2 < kB) store_tile<i>(sums + i * kSums, kRowBytes);
    end_sums<kA, kB, i + 1>(sums);
  }
}

// The transpose of 16 x 16.
LOWBIT_INLINE void transpose(__m512 (&r)[16]) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  auto unpack = [](__m512 a, __m512 b, bool high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  for (int i = 0; i < 16; i++) fours[i] = unpack(pairs[i / 4 * 4 + i % 4 / 2], pairs[i / 4 * 4 + i % 4 / 2 + 2], i % 2);
  // The 128-bit part p of fours[4g + j] is column 4p + j of rows 4g .. 4g+3.
  for (int j = 0; j < 4; j++) {
    const __m512 even0 = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
    const __m512 even1 = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512 odd0 = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xDD);
    const __m512 odd1 = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xDD);
    r[j] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(even0, even1, 0xDD);
    r[4 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    r[12 + j] = _mm512_shuffle_f32x4(odd0, odd1, 0xDD);
  }
}

// Columns decoded at a time: at most 512 (trits, whose lines hold 320: 640), and those of 16 chunks.
template <int kBits, int kChunk>
constexpr int64_t kTileCodes = kBits == kTrit      ? 640
                               : kChunk * 16 < 512 ? kChunk * 16
                                                   : 512;

// 32 rows of W by up to two tiles of tokens.
template <int kBits, int kChunk, bool kTwoDigits>
struct BlockByPanel {
  static constexpr int64_t kStage = kTileCodes<kBits, kChunk>, kRun = kChunk < kStage ? kChunk : kStage;
  static constexpr int kStageChunks = int(kStage / kRun);  // chunks of a stage, or the part of one
  static constexpr int kGrid = (kStageChunks + kSlots - 1) / kSlots * kSlots;
  // Stages so many apart begin at the same slot.
  static constexpr int64_t kPhases = kBits == kTrit ? 1 : kSlots * kChunk / kStage;
  static constexpr int kPairs = kTwoDigits ? 2 : 1;  // of B tiles in a panel
  static_assert(kStage % kRun == 0 && (kBits == kTrit || kPhases * kStage == kSlots * kChunk),
                "stages of whole chunks");

  // Columns [k, k + kStage) of the block's rows: what is decoded and read ahead of the products.
  struct Stage {
    alignas(64) uint8_t codes[kBlockRows][kStage];
    alignas(64) float scales[kBlockRows][kGrid];
    alignas(64) int32_t zeros[kBlockRows][kGrid];
  };
  // A chunk whose products are under way.
  struct Product {
    const Stage* stage;
    const int32_t* sums;  // of the four C tiles
    int64_t chunk;
    int inside, pair;  // which chunk of the stage, which pair of B tiles
  };

  const lowbit_matrix* w;
  const Activations* x;
  const ChunkGrid grid;
  const StageDecoder<kBits, kStage> decoder;
  const int64_t row_bytes;
  int64_t rows[kBlockRows];  // beyond the block they repeat its last row, and are not written
  int count;
  int64_t first_tile;
  int tiles;  // of tokens: 1 or 2
  Stage stages[2];
  alignas(64) int32_t sums[kPairs][2][4 * kSums];
  alignas(64) float slots[kPanelTiles][kSlots][kBlockRows][kLanes];

  BlockByPanel(const lowbit_matrix* w, const Activations* x)
      : w(w), x(x), grid(w, kChunk), decoder{}, row_bytes(row_lines(kBits, w->cols) * kLineBytes) {}

  // Rows [r0, r1) of the stage that starts at column k. Their lines of the stage after it, at column `after`, are asked
  // for: the hardware's prefetchers follow neighbours, and phases jump.
  void prepare(Stage& stage, int64_t k, int64_t after, int r0, int r1) const {
    constexpr int64_t kSpan = kBits == kTrit ? 640 : 512, kSpanBytes = row_lines(kBits, kSpan) * kLineBytes;
    const int64_t c = k / kChunk;
    for (int r = r0; r < r1; r++) {
      const uint8_t* row = w->codes + rows[r] * row_bytes;
      decoder.decode(row, w->cols, k, stage.codes[r]);
      for (int64_t at = 0; at < kStage * kSpanBytes / kSpan; at += kLineBytes)
        prefetch(row + after * kSpanBytes / kSpan + at);
      for (int j = 0; j < kGrid && c + j < x->chunks; j += kSlots) {
        _mm512_store_ps(stage.scales[r] + j, grid.scales(rows[r], c + j));
        if (w->zeros) _mm512_store_si512(stage.zeros[r] + j, grid.zeros(rows[r], c + j));
      }
    }
  }

  // The products of columns [k, end), within a chunk: kA halves of the rows by kB tiles of digits. `first`: the chunk
  // begins here, else its sums go on.
  template <int kA, int kB>
  void multiply(const uint8_t* code, const int8_t* const (&digits)[2], int64_t k, int64_t end, bool first,
                int32_t* to) const {
    constexpr int kStep = kStepCodes<kChunk>;
    begin_sums<kA, kB>(first, to);
    for (; k < end; k += kStep, code += kStep) {
      load_tile<kFirstA>(code, kStage);
      load_tile<kFirstB>(digits[0] + k * kLanes, kRowBytes);
      multiply_tiles<0, kFirstA, kFirstB>();
      if constexpr (kB == 2) load_tile<kFirstB + 1>(digits[1] + k * kLanes, kRowBytes);
      if constexpr (kB == 2) multiply_tiles<1, kFirstA, kFirstB + 1>();
      if constexpr (kA == 2) load_tile<kFirstA + 1>(code + kHalfRows * kStage, kStage);
      if constexpr (kA == 2) multiply_tiles<2, kFirstA + 1, kFirstB>();
      if constexpr (kA == 2 && kB == 2) multiply_tiles<3, kFirstA + 1, kFirstB + 1>();
    }
    end_sums<kA, kB>(to);
  }

  void multiply(const uint8_t* code, int64_t k, int64_t end, int pair, bool first, int32_t* to) const {
    const bool one = !kTwoDigits && tiles == 1;  // tile of digits
    const int64_t tile = first_tile + pair, next = kTwoDigits || one ? tile : tile + 1;
    const int64_t tile_bytes = kLanes * x->cols_padded;
    const int8_t* const digits[2] = {(kTwoDigits ? x->high : x->low) + tile * tile_bytes, x->low + next * tile_bytes};
    if (count > kHalfRows && one) return multiply<2, 1>(code, digits, k, end, first, to);
    if (count > kHalfRows) return multiply<2, 2>(code, digits, k, end, first, to);
    if (one) return multiply<1, 1>(code, digits, k, end, first, to);
    multiply<1, 2>(code, digits, k, end, first, to);
  }

  // Adds the sums of a chunk, for tile t of the panel's tokens, to its slot.
  template <bool kZeros>
  void finish(const Product& p, int t) {
    const int64_t at = ((first_tile + t) * x->chunks_padded + p.chunk) * kLanes;
    const __m512i v = _mm512_loadu_si512(x->sum + at);
    const __m512 step = _mm512_loadu_ps(x->step + at);
    const __m512i symmetric = _mm512_slli_epi32(v, kBits - 1);
    const __mmask16 begun = p.chunk < kSlots ? 0 : 0xFFFF;  // a slot's first chunk finds it at zero
    const float* scales = p.stage->scales[0] + p.inside;
    const int32_t* zeros = p.stage->zeros[0] + p.inside;
    const int32_t* sum = p.sums + (kTwoDigits ? 0 : t * kSums);
    float* slot = slots[t][p.chunk % kSlots][0];
    for (int r0 = 0; r0 < count; r0 += kHalfRows, sum += 2 * kSums)
#pragma GCC unroll 4
      for (int i = 0; i < kHalfRows; i++) {
        const int r = r0 + i;
        __m512i total = _mm512_load_si512(sum + i * kLanes);
        if (kTwoDigits)
          total = _mm512_add_epi32(_mm512_slli_epi32(total, 8), _mm512_load_si512(sum + kSums + i * kLanes));
        const __m512i zv = kZeros ? _mm512_mullo_epi32(_mm512_set1_epi32(zeros[r * kGrid]), v) : symmetric;
        const __m512 weight = _mm512_mul_ps(_mm512_set1_ps(scales[r * kGrid]), step);
        const __m512 acc = _mm512_maskz_load_ps(begun, slot + r * kLanes);
        const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(total, zv));
        _mm512_store_ps(slot + r * kLanes, _mm512_fmadd_ps(product, weight, acc));
      }
  }

  void finish(const Product& p) {
    for (int t = kTwoDigits ? p.pair : 0; t < (kTwoDigits ? p.pair + 1 : tiles); t++)
      w->zeros ? finish<true>(p, t) : finish<false>(p, t);
  }

  // The slots of a tile of tokens added as the tree of docs/numerics.md, rows in the lanes of what is written.
  void write(int t, float* out, int64_t out_stride) {
    const int used = int(x->chunks < kSlots ? x->chunks : kSlots);
    const int64_t m = (first_tile + t) * kLanes, tokens = x->tokens - m < kLanes ? x->tokens - m : kLanes;
    for (int r0 = 0; r0 < count; r0 += kHalfRows) {
      __m512 totals[kHalfRows];
      for (int r = 0; r < kHalfRows; r++) {
        __m512 acc[kSlots];
        for (int j = 0; j < kSlots; j++)  // not an empty mask: tiles_avx512vnni.h
          acc[j] = j < used ? _mm512_load_ps(slots[t][j][r0 + r]) : _mm512_setzero_ps();
        for (int width = kSlots / 2; width > 0; width /= 2)
          for (int j = 0; j < width; j++) acc[j] = _mm512_add_ps(acc[j], acc[j + width]);
        totals[r] = acc[0];
      }
      transpose(totals);
      for (int64_t i = 0; i < tokens; i++)
        _mm512_mask_storeu_ps(out + (m + i) * out_stride + r0, first_lanes(count - r0), totals[i]);
    }
  }

  // out + m * out_stride: of row n.
  void run(int64_t n, int row_count, int64_t tile, int tile_count, float* out, int64_t out_stride) {
    count = row_count, first_tile = tile, tiles = tile_count;
    for (int r = 0; r < kBlockRows; r++) rows[r] = n + (r < count ? r : count - 1);
    const int used_rows = count > kHalfRows ? kBlockRows : kHalfRows, pairs = kTwoDigits ? tiles : 1;
    const int64_t stage_count = ceil_div(x->cols, kStage);
    auto stage_after = [&](int64_t s) {  // the next one with the same slots, or the first of the next phase
      const int64_t phase = s % kPhases;
      return s + kPhases < stage_count ? s + kPhases : phase + 1 < kPhases ? phase + 1 : stage_count;
    };

    Product pending{};
    int parity[kPairs] = {};  // which sums a pair's chunk goes to: the other ones may still be read
    int at = 0;
    prepare(stages[0], 0, stage_after(0) * kStage, 0, used_rows);
    for (int64_t s = 0; s < stage_count; at ^= 1) {
      const int64_t next = stage_after(s), after = next < stage_count ? stage_after(next) : next;
      const int64_t k0 = s * kStage, stage_end = k0 + kStage < x->cols ? k0 + kStage : x->cols;
      const int chunks = int(ceil_div(stage_end - k0, kRun)), parts = pairs * chunks;
      for (int part = 0; part < parts; part++) {
        const int pair = part / chunks, inside = part % chunks;
        const int64_t k = k0 + inside * kRun, end = k + kRun < x->cols ? k + kRun : x->cols, c = k / kChunk;
        int32_t* to = sums[pair][parity[pair]];
        multiply(stages[at].codes[0] + (k - k0), k, end, pair, k % kChunk == 0, to);
        if (pending.stage) finish(pending);
        pending.stage = nullptr;
        if (end % kChunk == 0 || end == x->cols) {
          pending = {&stages[at], to, c, inside, pair};
          parity[pair] ^= 1;
        }
        if (next < stage_count)
          prepare(stages[at ^ 1], next * kStage, after * kStage, used_rows * part / parts,
                  used_rows * (part + 1) / parts);
      }
      s = next;
    }
    finish(pending);
    for (int t = 0; t < tiles; t++) write(t, out, out_stride);
  }
};

template <int kBits, int kChunk, bool kTwoDigits>
void matmul_amx_tiles(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                      int64_t out_stride) {
  BlockByPanel<kBits, kChunk, kTwoDigits> block(w, x);
  const int64_t tiles = ceil_div(x->tokens, kLanes);
  configure_tiles(tile_shapes<kChunk>());
  for (int64_t tile = 0; tile < tiles; tile += kPanelTiles)
    for (int64_t n = n0; n < n1; n += kBlockRows)
      block.run(n, int(n1 - n < kBlockRows ? n1 - n : kBlockRows), tile,
                int(tiles - tile < kPanelTiles ? tiles - tile : kPanelTiles), out + n - n0, out_stride);
  release_tiles();
}

template <int kBits, int kChunk>
LOWBIT_INLINE void matmul_amx_chunk(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                                    int64_t out_stride) {
  (x->high ? matmul_amx_tiles<kBits, kChunk, true> : matmul_amx_tiles<kBits, kChunk, false>)(w, x, n0, n1, out,
                                                                                             out_stride);
}

template <int kBits>
LOWBIT_INLINE void matmul_amx(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                              int64_t out_stride) {
  if (kBits == kTrit && x->chunk == kTritChunk)
    return matmul_amx_chunk<kBits, kBits == kTrit ? int(kTritChunk) : 128>(w, x, n0, n1, out, out_stride);
  if (x->chunk == 128) return matmul_amx_chunk<kBits, 128>(w, x, n0, n1, out, out_stride);
  if (x->chunk == 64) return matmul_amx_chunk<kBits, 64>(w, x, n0, n1, out, out_stride);
  if (x->chunk == 32) return matmul_amx_chunk<kBits, 32>(w, x, n0, n1, out, out_stride);
  return matmul_amx_chunk<kBits, 16>(w, x, n0, n1, out, out_stride);
}

}  // namespace
}  // namespace lowbit
#endif
