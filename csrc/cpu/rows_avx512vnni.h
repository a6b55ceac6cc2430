// y[m,n] = sum_c fma chain of float(I[m,n,c]) * (s[n,g(c)] * step[m,c])   on AVX-512 VNNI, few tokens, every integer format.
//
// One row of W, or several, against up to 4 tokens, whose digits lie in rows. A block is 16 chunks. Each plane register (64
// codes) meets 64 digits in vpdpbusd; the registers of 16 chunks become one, lane j = chunk j, by a transposing add of 15
// merges (two shuffles and an add each), and scales, steps and sums are read as they lie. Bound by the memory for int4
// and int8 (.9 to .95 of a plain read, two threads of Zen 4 at 35 GB/s; .7 to .8 at 55), by issue for int2 and int3 there: for int4
// and two digits a line costs 4 vpdpbusd, 6 loads and about 8 other operations, 2.0 ns from L2.
//
// Two rows (int8: three) read each digit once where that pays (x->rows_share, blocking.cpp): with several tokens, in float
// mode, and where the digits leave little of the L1, so that every line would wait for them to come from L2. It pays with
// lines asked for in time alone (row_streams.h); from a cache it is 1.1 to 1.25 times as fast for one token.
// Walking the columns in pieces whose digits fit, 64 rows a piece, is .55 to .85 times as fast: 2 KB of a row are too short
// a stream for the prefetchers, with the next row's piece asked for by software too.
#ifndef LOWBIT_CPU_ROWS_AVX512VNNI_H
#define LOWBIT_CPU_ROWS_AVX512VNNI_H

#include "cpu/lanes_avx512.h"
#include "cpu/planes_avx512.h"
#include "cpu/row_codes.h"
#include "cpu/row_streams.h"

namespace lowbit {
namespace {

// One register for each row and token: r[row * kTokens + token].
template <int kSums>
struct Sums {
  __m512i r[kSums];
};

// A step of the transposing add: lanes of `a` and `b` are added in pairs, so that after levels 1 and 2 lane i % 4 of
// each 128-bit part belongs to register i of four, and after 3 and 4 part i / 4 to registers 4i .. 4i+3 in full.
// kNarrow: lanes hold 16 bits' worth, so that two registers become one by a pack and vpmaddwd, an operation less.
template <int kLevel, bool kNarrow = false>
LOWBIT_INLINE __m512i merge(__m512i a, __m512i b) {
  if constexpr (kNarrow && kLevel <= 2) return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1));
  if constexpr (kLevel == 1) return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  if constexpr (kLevel == 2) return _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD));
}

// What a block of 16 chunks reads: the rows, the digits of the tokens at this block, where the row ends.
template <int kRows, int kTokens>
struct BlockOperands {
  const uint8_t* row[kRows];
  const int8_t* high[kTokens];
  const int8_t* low[kTokens];
  int64_t plane, planes;  // first plane of the block; planes that the row stores
  Ahead ahead;            // of the prefetch
};

template <int kBits, int kChunk, bool kTwoDigits, int kRows, int kTokens>
struct Block {
  static constexpr int kPlanes = kChunk / 4;                               // 16 chunks of kChunk codes
  static constexpr int kLeafPlanes = kChunk == 128 ? 2 : 1;                // planes of one register of partial sums
  static constexpr int kLevels = kChunk >= 64 ? 4 : kChunk == 32 ? 3 : 2;  // 16, 8 or 4 such registers
  static constexpr int kSums = kRows * kTokens;
  // With one digit a lane of a leaf is at most 8 codes times 127, and twice that after level 1: 16 bits hold int4's, too.
  // From DRAM int2 is .99 to 1.06 times as fast; int3 is not, and int4 not from a cache either, for vpmaddwd shares the
  // pipes of vpdpbusd (Zen 4).
  static constexpr bool kNarrow = !kTwoDigits && kBits == 2 && kTokens <= 2;
  using S = Sums<kSums>;
  using Operands = BlockOperands<kRows, kTokens>;

  // Checked at every node of the tree, so that the last block of a row costs what it holds; always true before it.
  LOWBIT_INLINE static bool stored(const Operands& o, int plane) {
    return __builtin_expect(o.plane + plane < o.planes, true);
  }

  // Partial sums of one or two planes: high digits first, times 256, then the low digits on top of them.
  template <int kLeaf>
  LOWBIT_INLINE static S leaf(const Operands& o) {
    constexpr int p0 = kLeaf * kLeafPlanes, p1 = p0 + kLeafPlanes - 1;
    constexpr bool kFetch = kBits != kTrit;                          // decoded already
    constexpr bool kPairs = kBits == 2 || kBits == 3 || kBits == 4;  // lines of an even number of planes
    const bool second = p1 > p0 && (kPairs || stored(o, p1));
    __m512i c0[kRows], c1[kRows];
    for (int r = 0; r < kRows; r++) {
      c0[r] = peel<kBits, kPlanes, kFetch, p0>(o.row[r], o.plane, o.planes, o.ahead);
      c1[r] = _mm512_setzero_si512();
      if (second) c1[r] = peel<kBits, kPlanes, kFetch, p1>(o.row[r], o.plane, o.planes, o.ahead);
    }
    S s;
    for (int t = 0; t < kTokens; t++) {
      __m512i sum[kRows];
      for (int r = 0; r < kRows; r++) sum[r] = _mm512_setzero_si512();
      if (kTwoDigits) {
        add_products(sum, c0, o.high[t] + p0 * 64);
        if (p1 > p0) add_products(sum, c1, o.high[t] + p1 * 64);
        for (int r = 0; r < kRows; r++) sum[r] = _mm512_slli_epi32(sum[r], 8);
      }
      add_products(sum, c0, o.low[t] + p0 * 64);
      if (p1 > p0) add_products(sum, c1, o.low[t] + p1 * 64);
      for (int r = 0; r < kRows; r++) s.r[r * kTokens + t] = sum[r];
    }
    return s;
  }

  LOWBIT_INLINE static void add_products(__m512i (&sum)[kRows], const __m512i (&codes)[kRows], const int8_t* digits) {
    __m512i d = _mm512_loadu_si512(digits);
    // gcc 12 loads it for every row, as vpdpbusd's operand in memory. In a register it makes int4 .97 to 1.08 times as fast
    // from DRAM (two tokens in float mode gain), 1.02 to 1.06 from a cache; int8 gains more there, but takes up to 1.2 times
    // the time from DRAM (Zen 4).
    if (kBits == 4 && kRows > 1 && kTokens <= 2) asm("" : "+v"(d));
    for (int r = 0; r < kRows; r++) sum[r] = _mm512_dpbusd_epi32(sum[r], codes[r], d);
  }

  template <int kLevel, int kFirst>
  LOWBIT_INLINE static S tree(const Operands& o) {
    if constexpr (kLevel == 0) {
      return leaf<kFirst>(o);
    } else {
      constexpr int kSecond = kFirst + (1 << (kLevel - 1));
      S a = tree<kLevel - 1, kFirst>(o), b = {};
      if (stored(o, kSecond * kLeafPlanes)) b = tree<kLevel - 1, kSecond>(o);
      for (int i = 0; i < kSums; i++) a.r[i] = merge<kLevel, kNarrow>(a.r[i], b.r[i]);
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
      for (int i = 0; i < kSums; i++) s.r[i] = _mm512_permutexvar_epi32(order, s.r[i]);
    }
    return s;
  }
};

template <int kBits, int kChunk, bool kTwoDigits, int kRows, int kTokens>
LOWBIT_INLINE void rows_by_tokens(const lowbit_matrix* w, const Activations* x, int64_t n, int64_t apart, int64_t m,
                                  Ahead ahead, float* out, int64_t out_stride) {
  using Chunks16 = Block<kBits, kChunk, kTwoDigits, kRows, kTokens>;
  const ChunkGrid grid(w, kChunk);
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; r++) rows[r] = w->codes + (n + r * apart) * row_lines(kBits, w->cols) * kLineBytes;
  const int64_t planes = stored_planes<kBits>(w->cols);
  RowCodes<kBits> codes[kRows];
  BlockOperands<kRows, kTokens> o;
  o.ahead = ahead;
  __m512 acc[kRows * kTokens];
  for (int i = 0; i < kRows * kTokens; i++) acc[i] = _mm512_setzero_ps();

  int64_t c = 0;
  for (int64_t plane = 0; plane < planes; plane += Chunks16::kPlanes, c += 16) {
    for (int r = 0; r < kRows; r++) codes[r].seek(rows[r], plane, planes, &o.row[r], &o.plane, &o.planes);
    for (int t = 0; t < kTokens; t++) {
      o.high[t] = (kTwoDigits ? x->high : x->low) + (m + t) * x->cols_padded + plane * 64;
      o.low[t] = x->low + (m + t) * x->cols_padded + plane * 64;
    }
    const Sums<kRows * kTokens> sums = Chunks16::chunk_sums(o);
    for (int r = 0; r < kRows; r++) {
      const __m512 s = grid.scales(n + r * apart, c);
      const __m512i z = w->zeros ? grid.zeros(n + r * apart, c) : _mm512_setzero_si512();
      for (int t = 0; t < kTokens; t++) {
        const int64_t at = (m + t) * x->chunks_padded + c;
        const int i = r * kTokens + t;
        const __m512i v = _mm512_loadu_si512(x->sum + at);
        const __m512i zv = w->zeros ? _mm512_mullo_epi32(z, v) : _mm512_slli_epi32(v, kBits - 1);
        const __m512 weight = _mm512_mul_ps(s, _mm512_loadu_ps(x->step + at));
        acc[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums.r[i], zv)), weight, acc[i]);
      }
    }
  }
  for (int r = 0; r < kRows; r++)  // the tree of docs/numerics.md
    for (int t = 0; t < kTokens; t++) out[(m + t) * out_stride + r * apart] = LanesAvx512::sum(acc[r * kTokens + t]);
}

// Calls pass(Count, first token) for all tokens: kMost at a time, then two, then one.
template <int kMost, class Pass>
LOWBIT_INLINE void each_pass(int64_t tokens, Pass&& pass) {
  int64_t m = 0;
  for (; m + kMost <= tokens; m += kMost) pass(Count<kMost>(), m);
  if (kMost > 2 && m + 2 <= tokens) pass(Count<2>(), m), m += 2;
  if (m < tokens) pass(Count<1>(), m);
}

// Tokens that share the codes of a row: what 32 registers hold.
template <bool kTwoDigits>
constexpr int kMostTokens = kTwoDigits ? 2 : 4;

// A row after the other, each meeting all tokens.
template <int kBits, int kChunk, bool kTwoDigits>
__attribute__((noinline)) void each_row(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1,
                                        Ahead ahead, float* out, int64_t out_stride) {
  for (int64_t n = n0; n < n1; n++)
    each_pass<kMostTokens<kTwoDigits>>(x->tokens, [&](auto width, int64_t m) __attribute__((always_inline)) {
      rows_by_tokens<kBits, kChunk, kTwoDigits, 1, width.value>(w, x, n, 0, m, ahead, out + n - n0, out_stride);
    });
}

// kRows that share digits: first with some of the tokens, then with the next.
template <int kBits, int kChunk, bool kTwoDigits, int kRows, int kTokens>
__attribute__((noinline)) void rows_apart(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1,
                                          int64_t m, float* out, int64_t out_stride) {
  constexpr bool kFast = kBits == 8 && !kTwoDigits && kTokens == 1;  // see prefetch_ahead
  const auto multiply = [&](auto rows, int64_t n, int64_t apart, Ahead ahead) __attribute__((always_inline)) {
    if (kFast) ahead.bytes = 0;
    rows_by_tokens<kBits, kChunk, kTwoDigits, rows.value, kTokens>(w, x, n, apart, m, ahead, out + n - n0, out_stride);
  };
  each_stream_row<kBits, kRows>(w, n0, n1, multiply);
}

template <int kBits, int kChunk, bool kTwoDigits>
void matmul_rows(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out, int64_t out_stride) {
  constexpr int kSharing = kBits == kTrit || kChunk < 32 ? 1 : kBits == 8 ? 3 : 2;  // rows that share digits
  if (kSharing == 1 || !x->rows_share)
    each_row<kBits, kChunk, kTwoDigits>(w, x, n0, n1, prefetch_ahead<kBits == 8>(), out, out_stride);
  else
    each_pass<kMostTokens<kTwoDigits>>(x->tokens, [&](auto width, int64_t m) {
      rows_apart<kBits, kChunk, kTwoDigits, kSharing, width.value>(w, x, n0, n1, m, out, out_stride);
    });
}

}  // namespace
}  // namespace lowbit
#endif
