// y[m,n] = sum_c fma chain of float(I[m,n,c]) * (s[n,g(c)] * step[m,c])   on AVX-512 VNNI, few tokens, every integer format.
//
// One row of W against up to 4 tokens, whose digits lie in rows. A block is 16 chunks. Each plane register (64 codes)
// meets 64 digits in vpdpbusd; the registers of 16 chunks become one, lane j = chunk j, by a transposing add of 15 merges
// (two shuffles and an add each), and scales, steps and sums are read as they lie. Bound by the memory for int4 and int8
// (.86 of a plain read, two digits, two threads of Zen 4 at 60 GB/s), by issue for int2 and int3 there: for int4 and
// two digits a line costs 4 vpdpbusd, 5 loads and about 8 other operations, 2.0 ns from L2. Two rows at a time save
// loads and 7-13% from L2, but take twice as long from DRAM: their two streams defeat the hardware's prefetchers.
#ifndef LOWBIT_CPU_ROWS_AVX512VNNI_H
#define LOWBIT_CPU_ROWS_AVX512VNNI_H

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

}  // namespace
}  // namespace lowbit
#endif
