// y[m,n] = sum_c fma chain of float(I[m,n,c]) * (s[n,g(c)] * step[m,c])   on AVX-512 VNNI, for every integer format.
//
// I[m,n,c] = sum over a chunk of (code - zero) * v, v = 256*high + low, is one exact integer (docs/numerics.md), so the
// two loops below may sum it in any order; both then add chunk c to slot c % 16 in fp32 and end in the same tree.
//
// kRows, few tokens: one row of W against up to 4 tokens. A block is 16 chunks. Each plane register (64 codes) meets 64
// digits in vpdpbusd; the registers of 16 chunks become one, lane j = chunk j, by a transposing add of 15 merges (two
// shuffles and an add each), and scales, steps and sums are read as they lie. Bound by the memory for int4 and int8
// (.86 of a plain read, two digits, two threads of Zen 4 at 60 GB/s), by issue for int2 and int3 there: for int4 and
// two digits a line costs 4 vpdpbusd, 5 loads and about 8 other operations, 2.0 ns from L2. Two rows at a time save
// loads and 7-13% from L2, but take twice as long from DRAM: their two streams defeat the hardware's prefetchers.
//
// kTiles, 16 tokens in the lanes: 8 rows of W are decoded to bytes in L1, 512 columns at a time; 4 codes are broadcast
// to every token and meet the digits [k/4][16][4]: 2 vpdpbusd for a row, 4 columns and 16 tokens. The 16 slots of 8
// rows are 8 KB of L1. Bound by vpdpbusd, 2 * N * K * M / 64 of them (one digit: as much by the broadcasts).
#ifndef LOWBIT_CPU_MATMUL_AVX512VNNI_H
#define LOWBIT_CPU_MATMUL_AVX512VNNI_H

#include <string.h>

#include "cpu/planes_avx512.h"
#include "cpu/row_codes.h"

namespace lowbit {
namespace {

// acc[0..15] added as the tree of docs/numerics.md.
LOWBIT_INLINE float add_slots(__m512 acc) {
  const __m256 a8 = _mm256_add_ps(_mm512_castps512_ps256(acc), _mm512_extractf32x8_ps(acc, 1));
  const __m128 a4 = _mm_add_ps(_mm256_castps256_ps128(a8), _mm256_extractf128_ps(a8, 1));
  const __m128 a2 = _mm_add_ps(a4, _mm_movehl_ps(a4, a4));
  return _mm_cvtss_f32(_mm_add_ss(a2, _mm_movehdup_ps(a2)));
}

// ---- few tokens: rows ----

// One register for each token.
template <int kTokens>
struct Sums {
  __m512i r[kTokens];
};

// A step of the transposing add: lanes of `a` and `b` are added in pairs, so that after levels 1 and 2 lane i % 4 of
// each 128-bit part belongs to register i of four, and after 3 and 4 part i / 4 to registers 4i .. 4i+3 in full.
template <int kLevel>
LOWBIT_INLINE __m512i merge(__m512i a, __m512i b) {
  if constexpr (kLevel == 1) return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  if constexpr (kLevel == 2) return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// What a block of 16 chunks reads: the row, the digits of the tokens at this block, where the row ends.
template <int kTokens>
struct BlockOperands {
  const uint8_t* row;
  const int8_t* high[kTokens];
  const int8_t* low[kTokens];
  int64_t plane, planes;  // first plane of the block; planes that the row stores
  Ahead ahead;            // of the prefetch
};

template <int kBits, int kChunk, bool kTwoDigits, int kTokens>
struct Block {
  static constexpr int kPlanes = kChunk / 4;                               // 16 chunks of kChunk codes
  static constexpr int kLeafPlanes = kChunk == 128 ? 2 : 1;                // planes of one register of partial sums
  static constexpr int kLevels = kChunk >= 64 ? 4 : kChunk == 32 ? 3 : 2;  // 16, 8 or 4 such registers
  using S = Sums<kTokens>;
  using Operands = BlockOperands<kTokens>;

  // Checked at every node of the tree, so that the last block of a row costs what it holds; always true before it.
  LOWBIT_INLINE static bool stored(const Operands& o, int plane) { return o.plane + plane < o.planes; }

  // Partial sums of one or two planes: high digits first, times 256, then the low digits on top of them.
  template <int kLeaf>
  LOWBIT_INLINE static S leaf(const Operands& o) {
    constexpr int p0 = kLeaf * kLeafPlanes, p1 = p0 + kLeafPlanes - 1;
    constexpr bool kFetch = kBits != kTrit;  // decoded already
    const __m512i c0 = peel<kBits, kPlanes, kFetch, p0>(o.row, o.plane, o.planes, o.ahead);
    __m512i c1 = _mm512_setzero_si512();
    constexpr bool kPairs = kBits == 2 || kBits == 3 || kBits == 4;  // lines of an even number of planes
    if (p1 > p0 && (kPairs || stored(o, p1))) c1 = peel<kBits, kPlanes, kFetch, p1>(o.row, o.plane, o.planes, o.ahead);
    S s;
    for (int t = 0; t < kTokens; t++) {
      __m512i sum = _mm512_setzero_si512();
      if (kTwoDigits) {
        sum = _mm512_dpbusd_epi32(sum, c0, _mm512_loadu_si512(o.high[t] + p0 * 64));
        if (p1 > p0) sum = _mm512_dpbusd_epi32(sum, c1, _mm512_loadu_si512(o.high[t] + p1 * 64));
        sum = _mm512_slli_epi32(sum, 8);
      }
      sum = _mm512_dpbusd_epi32(sum, c0, _mm512_loadu_si512(o.low[t] + p0 * 64));
      if (p1 > p0) sum = _mm512_dpbusd_epi32(sum, c1, _mm512_loadu_si512(o.low[t] + p1 * 64));
      s.r[t] = sum;
    }
    return s;
  }

  template <int kLevel, int kFirst>
  LOWBIT_INLINE static S tree(const Operands& o) {
    if constexpr (kLevel == 0) {
      return leaf<kFirst>(o);
    } else {
      constexpr int kSecond = kFirst + (1 << (kLevel - 1));
      S a = tree<kLevel - 1, kFirst>(o), b = {};
      if (stored(o, kSecond * kLeafPlanes)) b = tree<kLevel - 1, kSecond>(o);
      for (int t = 0; t < kTokens; t++) a.r[t] = merge<kLevel>(a.r[t], b.r[t]);
      return a;
    }
  }

  // Lane j = sum(code * v) over chunk j of the block.
  LOWBIT_INLINE static S chunk_sums(const Operands& o) {
    S s = tree<kLevels, 0>(o);
    if constexpr (kChunk <= 32) {
      // A plane holds 2 or 4 chunks, so lanes are [half][plane] or [part][plane] within planes: put them in order.
      const __m512i order = kChunk == 32 ? _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                                         : _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      for (int t = 0; t < kTokens; t++) s.r[t] = _mm512_permutexvar_epi32(order, s.r[t]);
    }
    return s;
  }
};

template <int kBits, int kChunk, bool kTwoDigits, int kTokens>
LOWBIT_INLINE void row_by_tokens(const lowbit_matrix* w, const Activations* x, int64_t n, int64_t m, float* out,
                                 int64_t out_stride) {
  using Chunks16 = Block<kBits, kChunk, kTwoDigits, kTokens>;
  const ChunkGrid grid(w, kChunk);
  const uint8_t* row = w->codes + n * row_lines(kBits, w->cols) * kLineBytes;
  const int64_t planes = stored_planes<kBits>(w->cols);
  RowCodes<kBits> codes;
  BlockOperands<kTokens> o;
  o.ahead = prefetch_ahead<kBits>((kTwoDigits ? 2 : 1) * x->cols_padded);
  __m512 acc[kTokens];
  for (int t = 0; t < kTokens; t++) acc[t] = _mm512_setzero_ps();

  int64_t c = 0;
  for (int64_t plane = 0; plane < planes; plane += Chunks16::kPlanes, c += 16) {
    codes.seek(row, plane, planes, &o.row, &o.plane, &o.planes);
    for (int t = 0; t < kTokens; t++) {
      o.high[t] = (kTwoDigits ? x->high : x->low) + (m + t) * x->cols_padded + plane * 64;
      o.low[t] = x->low + (m + t) * x->cols_padded + plane * 64;
    }
    const Sums<kTokens> sums = Chunks16::chunk_sums(o);
    const __m512 s = grid.scales(n, c);
    const __m512i z = w->zeros ? grid.zeros(n, c) : _mm512_setzero_si512();
    for (int t = 0; t < kTokens; t++) {
      const int64_t at = (m + t) * x->chunks_padded + c;
      const __m512i v = _mm512_loadu_si512(x->sum + at);
      const __m512i zv = w->zeros ? _mm512_mullo_epi32(z, v) : _mm512_slli_epi32(v, kBits - 1);
      const __m512 weight = _mm512_mul_ps(s, _mm512_loadu_ps(x->step + at));
      acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums.r[t], zv)), weight, acc[t]);
    }
  }
  for (int t = 0; t < kTokens; t++) out[(m + t) * out_stride] = add_slots(acc[t]);
}

template <int kBits, int kChunk, bool kTwoDigits>
void matmul_rows(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out, int64_t out_stride) {
  constexpr int kTogether = kTwoDigits ? 2 : 4;  // tokens that share the codes of a row: what 32 registers hold
  for (int64_t n = n0; n < n1; n++) {
    int64_t m = 0;
    for (; m + kTogether <= x->tokens; m += kTogether)
      row_by_tokens<kBits, kChunk, kTwoDigits, kTogether>(w, x, n, m, out + n - n0, out_stride);
    for (; m < x->tokens; m++) row_by_tokens<kBits, kChunk, kTwoDigits, 1>(w, x, n, m, out + n - n0, out_stride);
  }
}

// ---- many tokens: tiles ----

// sum += the products of 4 unsigned codes and 4 signed digits, in place. As asm because gcc 12 copies every accumulator
// of an unrolled loop into a second register and back around the intrinsic: 36 moves for 16 products.
LOWBIT_INLINE void add_products(__m512i& sum, __m512i codes, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

constexpr int kTileRows = 8;  // rows of W that share a load of digits: 16 accumulators with two digits

// Columns decoded at a time: 4 KB of L1 for 8 rows (5 KB of trits, whose lines hold 320).
template <int kBits, int kChunk>
constexpr int64_t kTileCodes = kBits == kTrit      ? 640
                               : kChunk * 16 < 512 ? kChunk * 16
                                                   : 512;

// Decodes planes [plane, plane + kCount) of a row to bytes; planes that the row does not store become zero codes.
template <int kBits, int kCount, int i = 0>
LOWBIT_INLINE void decode_planes(const uint8_t* row, int64_t plane, int64_t planes, uint8_t* to) {
  if constexpr (i < kCount) {
    const __m512i codes =
        plane + i < planes ? peel<kBits, kCount, false, i>(row, plane, planes) : _mm512_setzero_si512();
    _mm512_store_si512(to + i * 64, codes);
    decode_planes<kBits, kCount, i + 1>(row, plane, planes, to);
  }
}

// Decodes columns [k, k + kStage) of kTileRows rows.
template <int kBits, int64_t kStage>
__attribute__((noinline)) void decode_stage(const lowbit_matrix* w, const int64_t* rows, int64_t k,
                                            uint8_t (*codes)[kStage]) {
  const int64_t row_bytes = row_lines(kBits, w->cols) * kLineBytes, planes = stored_planes<kBits>(w->cols);
  if constexpr (kBits == kTrit) {
    const TritDecoder trits;
    const int64_t line = k / 64 / kTritPlanes, lines = row_bytes / kLineBytes - line, most = kStage / 64 / kTritPlanes;
    for (int r = 0; r < kTileRows; r++)  // bytes beyond the row stay what they were: its digits are zero there
      decode_trits(trits, w->codes + rows[r] * row_bytes, line, lines < most ? lines : most, codes[r]);
  } else {
    for (int r = 0; r < kTileRows; r++)
      decode_planes<kBits, kStage / 64>(w->codes + rows[r] * row_bytes, k / 64, planes, codes[r]);
  }
}

template <int kBits, int kChunk, bool kTwoDigits>
void rows_by_tile(const lowbit_matrix* w, const Activations* x, const int64_t* rows, int count, int64_t tile,
                  float* out, int64_t out_stride) {
  constexpr int R = kTileRows;
  constexpr int64_t kStage = kTileCodes<kBits, kChunk>, kRun = kChunk < kStage ? kChunk : kStage;
  alignas(64) uint8_t codes[R][kStage];
  alignas(64) float slots[kSlots][R][kLanes];
  alignas(64) float scales[R][kSlots];
  alignas(64) int32_t zeros[R][kSlots];
  const ChunkGrid grid(w, kChunk);
  const int8_t* high = (kTwoDigits ? x->high : x->low) + tile * kLanes * x->cols_padded;
  const int8_t* low = x->low + tile * kLanes * x->cols_padded;
  const float* steps = x->step + tile * x->chunks_padded * kLanes;
  const int32_t* sums = x->sum + tile * x->chunks_padded * kLanes;
  for (int j = 0; j < kSlots; j++)
    for (int r = 0; r < R; r++) _mm512_store_ps(slots[j][r], _mm512_setzero_ps());

  for (int64_t c = 0; c < x->chunks; c++) {
    const int slot = int(c % kSlots);
    if (slot == 0) {
      for (int r = 0; r < R; r++) {
        _mm512_store_ps(scales[r], grid.scales(rows[r], c));
        if (w->zeros) _mm512_store_si512(zeros[r], grid.zeros(rows[r], c));
      }
    }
    __m512i h[R], l[R];
    for (int r = 0; r < R; r++) h[r] = l[r] = _mm512_setzero_si512();
    const int64_t end = (c + 1) * kChunk < x->cols ? (c + 1) * kChunk : x->cols;
    for (int64_t k = c * kChunk; k < end; k += kRun) {  // once, but for a chunk wider than a stage
      if (k % kStage == 0) decode_stage<kBits, kStage>(w, rows, k, codes);
      const uint8_t* code = codes[0] + k % kStage;
      for (int i = 0; i < kRun; i += 4) {
        const __m512i dl = _mm512_loadu_si512(low + (k + i) * kLanes);
        const __m512i dh = kTwoDigits ? _mm512_loadu_si512(high + (k + i) * kLanes) : dl;
        for (int r = 0; r < R; r++) {
          int32_t four_codes;
          memcpy(&four_codes, code + r * kStage + i, 4);
          const __m512i four = _mm512_set1_epi32(four_codes);
          if (kTwoDigits) add_products(h[r], four, dh);
          add_products(l[r], four, dl);
        }
      }
    }
    const __m512i v = _mm512_loadu_si512(sums + c * kLanes);
    const __m512 step = _mm512_loadu_ps(steps + c * kLanes);
    const __m512i symmetric = _mm512_slli_epi32(v, kBits - 1);
    for (int r = 0; r < R; r++) {
      const __m512i zv = w->zeros ? _mm512_mullo_epi32(_mm512_set1_epi32(zeros[r][slot]), v) : symmetric;
      const __m512i total = kTwoDigits ? _mm512_add_epi32(_mm512_slli_epi32(h[r], 8), l[r]) : l[r];
      const __m512 weight = _mm512_mul_ps(_mm512_set1_ps(scales[r][slot]), step);
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(total, zv));
      _mm512_store_ps(slots[slot][r], _mm512_fmadd_ps(sum, weight, _mm512_load_ps(slots[slot][r])));
    }
  }

  const int64_t m = tile * kLanes, tokens = x->tokens - m < kLanes ? x->tokens - m : kLanes;
  for (int r = 0; r < count; r++) {
    for (int width = kSlots / 2; width > 0; width /= 2)
      for (int j = 0; j < width; j++)
        _mm512_store_ps(slots[j][r], _mm512_add_ps(_mm512_load_ps(slots[j][r]), _mm512_load_ps(slots[j + width][r])));
    for (int64_t t = 0; t < tokens; t++) out[(m + t) * out_stride + r] = slots[0][r][t];
  }
}

// Tiles of tokens outside, rows inside: the codes of a row block stay in L2 and are decoded again for each tile.
template <int kBits, int kChunk, bool kTwoDigits>
void matmul_tiles(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                  int64_t out_stride) {
  for (int64_t tile = 0; tile * kLanes < x->tokens; tile++) {
    for (int64_t n = n0; n < n1; n += kTileRows) {
      const int count = n1 - n < kTileRows ? int(n1 - n) : kTileRows;
      int64_t rows[kTileRows];  // rows beyond the block repeat its last one and are not written
      for (int r = 0; r < kTileRows; r++) rows[r] = n + (r < count ? r : count - 1);
      rows_by_tile<kBits, kChunk, kTwoDigits>(w, x, rows, count, tile, out + n - n0, out_stride);
    }
  }
}

template <int kBits, int kChunk>
LOWBIT_INLINE void matmul_chunk(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                                int64_t out_stride) {
  if (x->layout == Activations::kRows)
    (x->high ? matmul_rows<kBits, kChunk, true> : matmul_rows<kBits, kChunk, false>)(w, x, n0, n1, out, out_stride);
  else
    (x->high ? matmul_tiles<kBits, kChunk, true> : matmul_tiles<kBits, kChunk, false>)(w, x, n0, n1, out, out_stride);
}

template <int kBits>
LOWBIT_INLINE void matmul(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                          int64_t out_stride) {
  if (x->chunk == 128) return matmul_chunk<kBits, 128>(w, x, n0, n1, out, out_stride);
  if (x->chunk == 64) return matmul_chunk<kBits, 64>(w, x, n0, n1, out, out_stride);
  if (x->chunk == 32) return matmul_chunk<kBits, 32>(w, x, n0, n1, out, out_stride);
  return matmul_chunk<kBits, 16>(w, x, n0, n1, out, out_stride);
}

}  // namespace
}  // namespace lowbit
#endif
