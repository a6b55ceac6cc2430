// y[m,n] = sum_c fma chain of float(I[m,n,c]) * (s[n,g(c)] * step[m,c])   on AVX2 and AVX-VNNI, for every format.
//
// The structure and the bits are those of matmul_avx512vnni.h with two registers of 8 lanes for the 16 slots.
// AVX2: products are vpmaddubsw (codes * digits, pairs added in 16 bits) and vpmaddwd, whose second operand is the
// weight of the digit (256 or 1). Sixteen bits hold 8 pairs: 8 * 2 * 15 * 128 = 30720; the codes of int8 are split into
// nibbles, two parts of weight 1 and 16, for that.
// AVX-VNNI: products are vpdpbusd, four of them added to 32 bits, where a chunk of every format fits: one part, and a
// shift for the weight.
//
// kRows: one row of W against 1 or 2 tokens, 16 chunks a block, a transposing add of 8 registers. Bound by issue slots:
// for 32 codes and a digit AVX2 takes 2 vpmaddubsw and about 2 more operations, AVX-VNNI one vpdpbusd and its load. Two rows
// may read the digits together (x->rows_share). Where lines are asked for in time (prefetch.h) that seldom pays here, one
// row and its sums being what 16 registers hold (blocking.cpp).
// kTiles: 4 rows are decoded to bytes in L1, 512 columns at a time, and meet the two digits of 8 tokens in the lanes, or
// the one of 16.
#ifndef LOWBIT_CPU_MATMUL_AVX2_H
#define LOWBIT_CPU_MATMUL_AVX2_H

#include "cpu/planes_avx2.h"
#include "cpu/row_codes.h"
#include "cpu/row_streams.h"

namespace lowbit {
namespace {

// The slots 0-7 and 8-15 added as the tree of docs/numerics.md.
LOWBIT_INLINE float add_slots(__m256 first, __m256 second) {
  const __m256 a8 = _mm256_add_ps(first, second);
  const __m128 a4 = _mm_add_ps(_mm256_castps256_ps128(a8), _mm256_extractf128_ps(a8, 1));
  const __m128 a2 = _mm_add_ps(a4, _mm_movehl_ps(a4, a4));
  return _mm_cvtss_f32(_mm_add_ss(a2, _mm_movehdup_ps(a2)));
}

// Which of the two the flags of the file allow. A test compiles AVX-VNNI's files for the AVX-512 encoding of vpdpbusd.
#if defined(__AVXVNNI__) || defined(__AVX512VNNI__)
constexpr bool kDotProducts = true;

// sums += the products of 4 unsigned codes and 4 signed digits in each lane of 32 bits, in place. As asm because gcc 12
// copies every accumulator of an unrolled loop into a second register and back around the intrinsic.
LOWBIT_INLINE void add_products(__m256i& sums, __m256i codes, __m256i digits) {
#if defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(digits));
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(digits));
#endif
}

LOWBIT_INLINE void add_products_in_place(__m256i& sums, __m256i codes, __m256i digits) {
  add_products(sums, codes, digits);
}

// total + weight * sums.
LOWBIT_INLINE __m256i add_weighted(__m256i total, __m256i sums, int weight) {
  return _mm256_add_epi32(total, weight == 1 ? sums : _mm256_slli_epi32(sums, __builtin_ctz(weight)));
}
#else
constexpr bool kDotProducts = false;

// sums += the products of 2 unsigned codes and 2 signed digits in each lane of 16 bits. The empty asm: gcc 12 makes all
// products of an unrolled loop first, on the stack, to add them as a tree.
LOWBIT_INLINE void add_products(__m256i& sums, __m256i codes, __m256i digits) {
  sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, digits));
  asm("" : "+x"(sums));
}

// The same in the register where the sums are, for loops that gcc does not unroll, where it would copy every one of them
// back. Elsewhere this is up to 15% slower.
LOWBIT_INLINE void add_products_in_place(__m256i& sums, __m256i codes, __m256i digits) {
  asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(_mm256_maddubs_epi16(codes, digits)));
}

// total + weight * (the 16-bit sums in pairs).
LOWBIT_INLINE __m256i add_weighted(__m256i total, __m256i sums, int weight) {
  return _mm256_add_epi32(total, _mm256_madd_epi16(sums, _mm256_set1_epi16(int16_t(weight))));
}
#endif

// Codes as they can be multiplied without saturating: one part, or the two nibbles of int8.
template <int kBits>
constexpr int kParts = kBits == 8 && !kDotProducts ? 2 : 1;

template <int kPart, int kBits>
LOWBIT_INLINE __m256i code_part(__m256i codes) {
  if constexpr (kParts<kBits> == 1) return codes;
  return _mm256_and_si256(kPart ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(15));
}

// ---- few tokens: rows ----

// One register for each row and token: r[row * kTokens + token].
template <int kSums>
struct Sums {
  __m256i r[kSums];
};

// A step of the transposing add; level 3 is the last and puts registers 0-3 and 4-7 into the two halves.
template <int kLevel>
LOWBIT_INLINE __m256i merge(__m256i a, __m256i b) {
  if constexpr (kLevel == 1) return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
  if constexpr (kLevel == 2) return _mm256_add_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
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
  static constexpr int kPlanes = kChunk / 4;                      // 16 chunks of kChunk codes
  static constexpr int kPieces = kChunk >= 64 ? kChunk / 32 : 1;  // of 32 codes, in one register of partial sums
  static constexpr int kLevels = kChunk == 16 ? 2 : 3;            // 4 or 8 registers make 8 chunks
  static constexpr int kSums = kRows * kTokens;
  using S = Sums<kSums>;
  using Operands = BlockOperands<kRows, kTokens>;
  using Parts = __m256i[kParts<kBits>][kSums];

  // Checked at every node of the tree, so that the last block of a row costs what it holds; always true before it.
  LOWBIT_INLINE static bool stored(const Operands& o, int plane) { return o.plane + plane < o.planes; }

  // Sums of the pieces [i, kPieces) of a leaf, for every part and digit.
  template <int kPiece, int i>
  LOWBIT_INLINE static void add_pieces(const Operands& o, Parts& high, Parts& low) {
    if constexpr (i < kPieces) {
      constexpr int piece = kPiece + i, plane = piece / 2;
      if (!stored(o, plane)) return;
      __m256i codes[kRows];
      for (int r = 0; r < kRows; r++)
        codes[r] = peel<kBits, kPlanes, kBits != kTrit, plane, piece % 2>(o.row[r], o.plane, o.planes, o.ahead);
      for (int t = 0; t < kTokens; t++) {
        const __m256i dl = load32(o.low[t] + piece * 32), dh = kTwoDigits ? load32(o.high[t] + piece * 32) : dl;
        for (int r = 0; r < kRows; r++)
          for (int p = 0; p < kParts<kBits>; p++) {
            const __m256i part = p ? code_part<1, kBits>(codes[r]) : code_part<0, kBits>(codes[r]);
            if (kTwoDigits) add_products(high[p][r * kTokens + t], part, dh);
            add_products(low[p][r * kTokens + t], part, dl);
          }
      }
      add_pieces<kPiece, i + 1>(o, high, low);
    }
  }

  template <int kLeaf>
  LOWBIT_INLINE static S leaf(const Operands& o) {
    Parts high, low;
    for (int p = 0; p < kParts<kBits>; p++)
      for (int j = 0; j < kSums; j++) high[p][j] = low[p][j] = _mm256_setzero_si256();
    add_pieces<kLeaf * kPieces, 0>(o, high, low);
    S s;
    for (int j = 0; j < kSums; j++) {
      s.r[j] = _mm256_setzero_si256();
      for (int p = 0; p < kParts<kBits>; p++) {
        s.r[j] = add_weighted(s.r[j], low[p][j], p ? 16 : 1);
        if (kTwoDigits) s.r[j] = add_weighted(s.r[j], high[p][j], p ? 4096 : 256);
      }
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
      if (stored(o, kSecond * kPieces / 2)) b = tree<kLevel - 1, kSecond>(o);
      for (int j = 0; j < kSums; j++) a.r[j] = merge<kLevel>(a.r[j], b.r[j]);
      return a;
    }
  }

  // Lane j = sum(code * v) over chunk 8 * kHalf + j of the block.
  template <int kHalf>
  LOWBIT_INLINE static S chunk_sums(const Operands& o) {
    constexpr int kFirst = kHalf << kLevels;
    S s = {};
    if (stored(o, kFirst * kPieces / 2)) s = tree<kLevels, kFirst>(o);
    if constexpr (kChunk == 16) {
      // A piece holds two chunks, in its two halves.
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      for (int j = 0; j < kSums; j++) s.r[j] = _mm256_permutevar8x32_epi32(s.r[j], order);
    }
    return s;
  }
};

// Rows n, n + apart, ... and tokens [m, m + kTokens).
template <int kBits, int kChunk, bool kTwoDigits, int kRows, int kTokens>
LOWBIT_INLINE void rows_by_tokens(const lowbit_matrix* w, const Activations* x, int64_t n, int64_t apart, int64_t m,
                                  Ahead ahead, float* out, int64_t out_stride) {
  using Chunks16 = Block<kBits, kChunk, kTwoDigits, kRows, kTokens>;
  const ChunkGrid grid(w, kChunk);
  const int64_t row_bytes = row_lines(kBits, w->cols) * kLineBytes, planes = stored_planes<kBits>(w->cols);
  RowCodes<kBits> codes[kRows];
  BlockOperands<kRows, kTokens> o;
  o.ahead = ahead;
  __m256 acc[kRows * kTokens][2];
  for (auto& slots : acc) slots[0] = slots[1] = _mm256_setzero_ps();

  // Chunks [c, c + 8), whose sums are I + zero * sum(v), to half a register of slots.
  auto add_chunks = [&](const Sums<kRows * kTokens>& sums, int64_t c, int half) {
    for (int r = 0; r < kRows; r++) {
      const __m256 s = grid.scales(n + r * apart, c);
      const __m256i z = w->zeros ? grid.zeros(n + r * apart, c) : _mm256_setzero_si256();
      for (int t = 0; t < kTokens; t++) {
        const int64_t at = (m + t) * x->chunks_padded + c;
        const int i = r * kTokens + t;
        const __m256i v = load32(x->sum + at);
        const __m256i zv = w->zeros ? _mm256_mullo_epi32(z, v) : _mm256_slli_epi32(v, kBits - 1);
        const __m256 weight = _mm256_mul_ps(s, _mm256_loadu_ps(x->step + at));
        acc[i][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sums.r[i], zv)), weight, acc[i][half]);
      }
    }
  };
  int64_t c = 0;
  for (int64_t plane = 0; plane < planes; plane += Chunks16::kPlanes, c += 16) {
    for (int r = 0; r < kRows; r++)
      codes[r].seek(w->codes + (n + r * apart) * row_bytes, plane, planes, &o.row[r], &o.plane, &o.planes);
    for (int t = 0; t < kTokens; t++) {
      o.high[t] = (kTwoDigits ? x->high : x->low) + (m + t) * x->cols_padded + plane * 64;
      o.low[t] = x->low + (m + t) * x->cols_padded + plane * 64;
    }
    add_chunks(Chunks16::template chunk_sums<0>(o), c, 0);
    add_chunks(Chunks16::template chunk_sums<1>(o), c + 8, 1);
  }
  for (int r = 0; r < kRows; r++)
    for (int t = 0; t < kTokens; t++) {
      const int i = r * kTokens + t;
      out[(m + t) * out_stride + r * apart] = add_slots(acc[i][0], acc[i][1]);
    }
}

// A row after the other, each meeting all tokens, two at a time.
template <int kBits, int kChunk, bool kTwoDigits>
__attribute__((noinline)) void each_row(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1,
                                        Ahead ahead, float* out, int64_t out_stride) {
  for (int64_t n = n0; n < n1; n++) {
    int64_t m = 0;
    for (; m + 2 <= x->tokens; m += 2)
      rows_by_tokens<kBits, kChunk, kTwoDigits, 1, 2>(w, x, n, 0, m, ahead, out + n - n0, out_stride);
    if (m < x->tokens) rows_by_tokens<kBits, kChunk, kTwoDigits, 1, 1>(w, x, n, 0, m, ahead, out + n - n0, out_stride);
  }
}

// kRows that share digits: first with some of the tokens, then with the next.
template <int kBits, int kChunk, bool kTwoDigits, int kRows, int kTokens>
__attribute__((noinline)) void rows_apart(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1,
                                          int64_t m, float* out, int64_t out_stride) {
  const auto multiply = [&](auto rows, int64_t n, int64_t apart, Ahead ahead) __attribute__((always_inline)) {
    rows_by_tokens<kBits, kChunk, kTwoDigits, rows.value, kTokens>(w, x, n, apart, m, ahead, out + n - n0, out_stride);
  };
  each_stream_row<kBits, kRows>(w, n0, n1, multiply);
}

template <int kBits, int kChunk, bool kTwoDigits>
void matmul_rows(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out, int64_t out_stride) {
  constexpr bool kCanShare = kBits != kTrit && kChunk >= 32;
  constexpr int kTogether = kParts<kBits> == 2 && kTwoDigits ? 1 : 2;  // tokens: what 16 registers hold of two rows
  const Ahead ahead = prefetch_ahead<false>();
  if (!kCanShare || !x->rows_share) return each_row<kBits, kChunk, kTwoDigits>(w, x, n0, n1, ahead, out, out_stride);
  if constexpr (kCanShare) {
    int64_t m = 0;
    for (; m + kTogether <= x->tokens; m += kTogether)
      rows_apart<kBits, kChunk, kTwoDigits, 2, kTogether>(w, x, n0, n1, m, out, out_stride);
    if (m < x->tokens) rows_apart<kBits, kChunk, kTwoDigits, 2, 1>(w, x, n0, n1, m, out, out_stride);
  }
}

// ---- many tokens: tiles ----

constexpr int kTileRows = 4;  // rows of W that share two loads of digits: 8 accumulators

// Columns decoded at a time.
template <int kBits, int kChunk>
constexpr int64_t kTileCodes = kBits == kTrit      ? 640
                               : kChunk * 16 < 512 ? kChunk * 16
                                                   : 512;

// Decodes planes [plane, plane + kCount) of a row to bytes, part by part `stride` bytes apart; planes that the row does
// not store become zero codes.
template <int kBits, int kCount, int i = 0>
LOWBIT_INLINE void decode_planes(const uint8_t* row, int64_t plane, int64_t planes, uint8_t* to, int64_t stride) {
  if constexpr (i < kCount) {
    __m256i a = _mm256_setzero_si256(), b = a;
    if (plane + i < planes) {
      a = peel<kBits, kCount, false, i, 0>(row, plane, planes);
      b = peel<kBits, kCount, false, i, 1>(row, plane, planes);
    }
    __m256i* first = reinterpret_cast<__m256i*>(to + i * 64);
    _mm256_store_si256(first, code_part<0, kBits>(a));
    _mm256_store_si256(first + 1, code_part<0, kBits>(b));
    if (kParts<kBits> == 2) {
      __m256i* second = reinterpret_cast<__m256i*>(to + stride + i * 64);
      _mm256_store_si256(second, code_part<1, kBits>(a));
      _mm256_store_si256(second + 1, code_part<1, kBits>(b));
    }
    decode_planes<kBits, kCount, i + 1>(row, plane, planes, to, stride);
  }
}

// Decodes columns [k, k + kStage) of kTileRows rows.
template <int kBits, int64_t kStage>
__attribute__((noinline)) void decode_stage(const lowbit_matrix* w, const int64_t* rows, int64_t k,
                                            uint8_t (*codes)[kTileRows][kStage]) {
  const int64_t row_bytes = row_lines(kBits, w->cols) * kLineBytes, planes = stored_planes<kBits>(w->cols);
  if constexpr (kBits == kTrit) {
    const int64_t line = k / 64 / kTritPlanes, lines = row_bytes / kLineBytes - line, most = kStage / 64 / kTritPlanes;
    for (int r = 0; r < kTileRows; r++)  // bytes beyond the row stay what they were: its digits are zero there
      decode_trits(w->codes + rows[r] * row_bytes, line, lines < most ? lines : most, codes[0][r]);
  } else {
    for (int r = 0; r < kTileRows; r++)
      decode_planes<kBits, kStage / 64>(w->codes + rows[r] * row_bytes, k / 64, planes, codes[0][r],
                                        kTileRows * kStage);
  }
}

template <int kBits, int kChunk, bool kTwoDigits>
void rows_by_tile(const lowbit_matrix* w, const Activations* x, const int64_t* rows, int count, int64_t tile,
                  float* out, int64_t out_stride) {
  constexpr int R = kTileRows;
  constexpr int64_t kStage = kTileCodes<kBits, kChunk>, kRun = kChunk < kStage ? kChunk : kStage;
  constexpr int kSum = int(kDotProducts ? kRun : kRun < 32 ? kRun : 32);  // columns whose products the lanes can hold
  alignas(32) uint8_t codes[kParts<kBits>][R][kStage];
  alignas(32) float slots[kSlots][R][kLanes];
  alignas(32) float scales[R][kSlots];
  alignas(32) int32_t zeros[R][kSlots];
  const ChunkGrid grid(w, kChunk);
  // Two streams of digits: of 8 tokens both digits, or the only one of all 16 tokens. The second begins here.
  constexpr int kHalves = kTwoDigits ? 1 : 2;
  const int8_t* low = x->low + tile * kLanes * x->cols_padded;
  const int8_t* second = kTwoDigits ? x->high + tile * kLanes * x->cols_padded : low + 8 * 4;
  memset(slots, 0, sizeof slots);

  for (int64_t c = 0; c < x->chunks; c++) {
    const int slot = int(c % kSlots);
    if (slot % 8 == 0) {
      for (int r = 0; r < R; r++) {
        _mm256_store_ps(scales[r] + slot, grid.scales(rows[r], c));
        if (w->zeros) _mm256_store_si256(reinterpret_cast<__m256i*>(zeros[r] + slot), grid.zeros(rows[r], c));
      }
    }
    alignas(32) int32_t totals[2][R][8] = {};
    const int64_t end = (c + 1) * kChunk < x->cols ? (c + 1) * kChunk : x->cols;
    for (int64_t k = c * kChunk; k < end; k += kRun) {  // once, but for a chunk wider than a stage
      if (k % kStage == 0) decode_stage<kBits, kStage>(w, rows, k, codes);
      for (int t = 0; t < kLanes; t += 8 * kHalves) {
        __m256i total[kHalves][R];
        for (int h = 0; h < kHalves; h++)
          for (int r = 0; r < R; r++) total[h][r] = load32(totals[t / 8 + h][r]);
        for (int p = 0; p < kParts<kBits>; p++) {
          for (int first = 0; first < kRun; first += kSum) {
            __m256i sums[R][2];
            for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
            const uint8_t* code = codes[p][0] + k % kStage + first;
            const int64_t at = (k + first) * kLanes + t * 4;
            for (int i = 0; i < kSum; i += 4) {
              const __m256i d0 = load32(low + at + i * kLanes), d1 = load32(second + at + i * kLanes);
              for (int r = 0; r < R; r++) {
                int32_t four_codes;
                memcpy(&four_codes, code + r * kStage + i, 4);
                const __m256i four = _mm256_set1_epi32(four_codes);
                add_products_in_place(sums[r][0], four, d0);
                add_products_in_place(sums[r][1], four, d1);
              }
            }
            for (int r = 0; r < R; r++) {
              total[0][r] = add_weighted(total[0][r], sums[r][0], p ? 16 : 1);
              __m256i& other = total[kHalves - 1][r];
              other = add_weighted(other, sums[r][1], (p ? 16 : 1) * (kTwoDigits ? 256 : 1));
            }
          }
        }
        for (int h = 0; h < kHalves; h++)
          for (int r = 0; r < R; r++) _mm256_store_si256(reinterpret_cast<__m256i*>(totals[t / 8 + h][r]), total[h][r]);
      }
    }
    for (int t = 0; t < kLanes; t += 8) {
      const int64_t at = (tile * x->chunks_padded + c) * kLanes + t;
      const __m256i v = load32(x->sum + at);
      const __m256 step = _mm256_loadu_ps(x->step + at);
      for (int r = 0; r < R; r++) {
        const __m256i zv =
            w->zeros ? _mm256_mullo_epi32(_mm256_set1_epi32(zeros[r][slot]), v) : _mm256_slli_epi32(v, kBits - 1);
        const __m256 weight = _mm256_mul_ps(_mm256_set1_ps(scales[r][slot]), step);
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_sub_epi32(load32(totals[t / 8][r]), zv));
        _mm256_store_ps(slots[slot][r] + t, _mm256_fmadd_ps(sum, weight, _mm256_load_ps(slots[slot][r] + t)));
      }
    }
  }

  const int64_t m = tile * kLanes, tokens = x->tokens - m < kLanes ? x->tokens - m : kLanes;
  for (int width = kSlots / 2; width > 0; width /= 2)
    for (int j = 0; j < width; j++)
      for (int r = 0; r < R; r++)
        for (int t = 0; t < kLanes; t++) slots[j][r][t] += slots[j + width][r][t];
  for (int r = 0; r < count; r++)
    for (int64_t t = 0; t < tokens; t++) out[(m + t) * out_stride + r] = slots[0][r][t];
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
