// y[m,n] = sum_c fma chain of float(I[m,n,c]) * (s[n,g(c)] * step[m,c])   on AVX-512 VNNI, many tokens, every format.
//
// A panel of 8 rows of W meets D streams of digits [k/4][16 tokens][4]: the two digits of one tile of 16 tokens, or, with
// one digit, one or two tiles. 4 codes of a row are broadcast to every token: 10 loads for 16 vpdpbusd, into 16 accumulators
// (with one stream, but for int4: 9 for 8). Where the codes come from:
//   int8                   the row as it lies
//   int4, one stream       the row as it lies: a byte has a code of each of two planes, and 16 times the second one
//                          serves as well (its sums are shifted back, exactly), so that a mask is all the decoding
//   otherwise              a stage of 512 columns (640 trits), decoded to bytes in L1 while the stage before it is
//                          multiplied; all stages of a panel are kept where further tiles will want them
// Slots of 16 chunks, 8 rows and 16 or 32 tokens are 8 or 16 KB of L1. Bound by vpdpbusd, N * K * M / 64 of them a digit.
// On Zen 4, one thread, 4096 x 4096 in cache, of what vpdpbusd does on registers: 128 tokens .78 to .86 (two digits), .71 to
// .83 (one); 16 tokens .72 to .82 and .60 to .67. The rest: finishing a chunk of 128 (one eighth of the time with one
// digit), decoding, adding the slots.
#ifndef LOWBIT_CPU_TILES_AVX512VNNI_H
#define LOWBIT_CPU_TILES_AVX512VNNI_H

#include <string.h>

#include "cpu/stage_avx512.h"

namespace lowbit {
namespace {

// sum += the products of 4 unsigned codes and 4 signed digits, in place. As asm because gcc 12 copies every accumulator
// of an unrolled loop into a second register and back around the intrinsic: 36 moves for 16 products.
LOWBIT_INLINE void add_products(__m512i& sum, __m512i codes, __m512i digits) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

// 4 codes of a row for every token.
LOWBIT_INLINE __m512i four_codes(const uint8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return _mm512_set1_epi32(four);
}

// Lines of memory to have brought nearer while something else is computed.
struct Lines {
  const uint8_t* at;
  const uint8_t* end;
  int at_once;

  LOWBIT_INLINE void fetch() {
    for (int i = 0; i < at_once && at < end; i++, at += kLineBytes)
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
  }
};

// slots[0..used) of 16 tokens, `apart` floats from one to the next, added as the tree of docs/numerics.md. The others hold
// nothing yet and count as 0. They are not even looked at: no thread may ever have touched their pages, and a load with an
// empty mask from such a page costs hundreds of clocks (Zen 4).
LOWBIT_INLINE __m512 add_slots(const float* slots, int64_t apart, int used) {
  __m512 a[kSlots];
  if (used == kSlots) {
    for (int j = 0; j < 8; j++)
      a[j] = _mm512_add_ps(_mm512_load_ps(slots + j * apart), _mm512_load_ps(slots + (j + 8) * apart));
    for (int width = 4; width > 0; width /= 2)
      for (int j = 0; j < width; j++) a[j] = _mm512_add_ps(a[j], a[j + width]);
    return a[0];
  }
  for (int j = 0; j < kSlots; j++) a[j] = j < used ? _mm512_load_ps(slots + j * apart) : _mm512_setzero_ps();
  for (int width = 8; width > 0; width /= 2)
    for (int j = 0; j < width; j++) a[j] = _mm512_add_ps(a[j], a[j + width]);
  return a[0];
}

// out[t * stride + r] = lane t of y[r], for t < tokens and the rows r of the mask.
LOWBIT_INLINE void store_four(const __m512* y, int64_t tokens, __mmask8 rows, float* out, int64_t stride) {
  __m512 pairs[4], fours[4];  // part q of fours[i] is token 4q + i of the four rows
  for (int r = 0; r < 4; r += 2) {
    pairs[r] = _mm512_unpacklo_ps(y[r], y[r + 1]);
    pairs[r + 1] = _mm512_unpackhi_ps(y[r], y[r + 1]);
  }
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(pairs[i / 2]), b = _mm512_castps_pd(pairs[2 + i / 2]);
    fours[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  }
  alignas(64) float tile[4][kLanes];
  for (int i = 0; i < 4; i++) _mm512_store_ps(tile[i], fours[i]);
  for (int64_t t = 0; t < tokens; t++) _mm_mask_storeu_ps(out + t * stride, rows, _mm_load_ps(tile[t % 4] + t / 4 * 4));
}

constexpr int kPanelRows = 8;

// 8 consecutive rows of W from `first` on, of which those from `skip` on are wanted: a block that ends before its last
// panel does takes rows again that it has had. Of a matrix with less than 8 rows one, 8 times.
struct Panel {
  int64_t first, skip;
  int64_t step;  // rows from one to the next: 1 or 0
  int count;     // rows that are wanted
};

// Where a panel's stages are decoded to: all of them, for later tiles to find, or two that take turns.
struct Stages {
  uint8_t* codes;
  int64_t last;  // stage s lies at place s & last
  bool decoded;
};

// Columns decoded at a time.
template <int kBits>
constexpr int64_t kStageCodes = kBits == kTrit ? 640 : 512;

// From row to row of a stage: 64 bytes more than a power of two apart, or they would share the sets of the L1.
template <int kBits>
constexpr int64_t kStageApart = kStageCodes<kBits> + 64;

// The product of a panel with kTiles tiles of tokens.
template <int kBits, int kChunk, bool kTwoDigits, int kTiles>
struct PanelByTiles {
  static constexpr int R = kPanelRows, T = kTiles, D = kTwoDigits ? 2 : kTiles;
  static constexpr bool kNibbles = kBits == 4 && D == 1, kDecodes = kBits != 8 && !kNibbles;
  static constexpr int64_t kStage = kStageCodes<kBits>, kApart = kStageApart<kBits>;
  static constexpr int64_t kPiece = kChunk <= 128 && kDecodes ? kChunk : kChunk < 64 ? kChunk : 64;
  static constexpr int64_t kPart = kPiece < 64 ? 64 : kPiece;  // of a stage: one row or two of the next are decoded
  static constexpr int64_t kFetchEvery = kNibbles ? 128 : kPart;
  using Sums = __m512i[R][D];

  const lowbit_matrix* w;
  const Activations* x;
  const Panel panel;
  const ChunkGrid grid;
  const int64_t row_bytes, digits_apart, sums_apart;
  const uint8_t* rows;      // codes of the first row
  const int8_t* digits[D];  // at column 0
  const float* steps;
  const int32_t* chunk_sums;
  const Stages& stages;
  Lines* next;
  alignas(64) float slots[kSlots][R][T][kLanes];
  alignas(64) float scales[R][kSlots];
  alignas(64) int32_t zeros[R][kSlots];

  LOWBIT_INLINE PanelByTiles(const lowbit_matrix* w, const Activations* x, const Panel& panel, int64_t tile,
                             const Stages& stages, Lines* next)
      : w(w),
        x(x),
        panel(panel),
        grid(w, kChunk),
        row_bytes(row_lines(kBits, w->cols) * kLineBytes),
        digits_apart(kLanes * x->cols_padded),
        sums_apart(kLanes * x->chunks_padded),
        rows(w->codes + panel.first * row_bytes),
        steps(x->step + tile * sums_apart),
        chunk_sums(x->sum + tile * sums_apart),
        stages(stages),
        next(next) {
    for (int d = 0; d < D; d++)
      digits[d] = kTwoDigits ? (d ? x->low : x->high) + tile * digits_apart : x->low + (tile + d) * digits_apart;
  }

  LOWBIT_INLINE void read_scales(int64_t c) {
    for (int r = 0; r < R; r++) {
      const int64_t n = panel.first + r * panel.step;
      _mm512_store_ps(scales[r], grid.scales(n, c));
      if (w->zeros) _mm512_store_si512(zeros[r], grid.zeros(n, c));
    }
  }

  // sum((code - zero) * v) = sum(code * v) - zero * sum(v): the sums start with what is to be subtracted, 2^kShift times.
  template <int kShift>
  LOWBIT_INLINE void begin(int64_t c, Sums& sums) const {
    for (int t = 0; t < T; t++) {
      const __m512i sum = _mm512_loadu_si512(chunk_sums + t * sums_apart + c * kLanes);
      const __m512i v = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, kShift));
      for (int r = 0; r < R; r++) {
        sums[r][t] = _mm512_setzero_si512();
        sums[r][kTwoDigits ? 1 : t] =
            w->zeros ? _mm512_mullo_epi32(_mm512_set1_epi32(zeros[r][c % kSlots]), v) : _mm512_slli_epi32(v, kBits - 1);
      }
    }
  }

  // Adds chunk c to its slot.
  LOWBIT_INLINE void finish(int64_t c, const Sums& sums) {
    const int64_t slot = c % kSlots;
    const __mmask16 again = c < kSlots ? 0 : 0xFFFF;  // slots start at 0
    for (int t = 0; t < T; t++) {
      const __m512 step = _mm512_loadu_ps(steps + t * sums_apart + c * kLanes);
      for (int r = 0; r < R; r++) {
        const __m512i total =
            kTwoDigits ? _mm512_add_epi32(_mm512_slli_epi32(sums[r][0], 8), sums[r][D - 1]) : sums[r][t];
        const __m512 weight = _mm512_mul_ps(_mm512_set1_ps(scales[r][slot]), step);
        float* to = slots[slot][r][t];
        _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), weight, _mm512_maskz_load_ps(again, to)));
      }
    }
  }

  // Columns [k, k + kCodes), a byte each, `apart` from row to row.
  template <int kCodes>
  LOWBIT_INLINE void add_bytes(const uint8_t* code, int64_t apart, int64_t k, Sums& sums) const {
    for (int i = 0; i < kCodes; i += 4) {
      __m512i v[D];
      for (int d = 0; d < D; d++) v[d] = _mm512_loadu_si512(digits[d] + (k + i) * kLanes);
      for (int r = 0; r < R; r++) {
        const __m512i four = four_codes(code + r * apart + i);
        for (int d = 0; d < D; d++) add_products(sums[r][d], four, v[d]);
      }
    }
  }

  // Columns [k, k + kCodes) in the low nibbles of as many bytes, and the same of the next plane in the high ones.
  template <int kCodes>
  LOWBIT_INLINE void add_nibbles(const uint8_t* code, int64_t apart, int64_t k, Sums& low, Sums& high) const {
    const __m512i low_mask = _mm512_set1_epi8(15), high_mask = _mm512_set1_epi8(int8_t(0xF0));
    for (int i = 0; i < kCodes; i += 4) {
      __m512i v[D], u[D];
      for (int d = 0; d < D; d++) {
        v[d] = _mm512_loadu_si512(digits[d] + (k + i) * kLanes);
        u[d] = _mm512_loadu_si512(digits[d] + (k + i + 64) * kLanes);
      }
      for (int r = 0; r < R; r++) {
        const __m512i both = four_codes(code + r * apart + i);
        const __m512i a = _mm512_and_si512(both, low_mask), b = _mm512_and_si512(both, high_mask);
        for (int d = 0; d < D; d++) {
          add_products(low[r][d], a, v[d]);
          add_products(high[r][d], b, u[d]);
        }
      }
    }
  }

  LOWBIT_INLINE uint8_t* stage(int64_t k) const { return stages.codes + (k / kStage & stages.last) * (R * kApart); }

  // For every 64 columns from column k on a row of the stage after theirs is decoded; the last 128 of 640 have none.
  LOWBIT_INLINE void between(const StageDecoder<kBits, kStage>& decoder, int64_t k) {
    const int64_t at = k % kStage, after = k - at + kStage;
    if (stages.decoded || at % kPart || at >= R * 64) return;
    next->fetch();
    if (after >= w->cols) return;
    for (int64_t r = at / 64; r < (at + kPart) / 64; r++)
      decoder.decode(rows + r * panel.step * row_bytes, w->cols, after, stage(after) + r * kApart);
  }

  LOWBIT_INLINE void multiply_decoded() {
    const StageDecoder<kBits, kStage> decoder;
    for (int r = 0; r < R && !stages.decoded; r++)
      decoder.decode(rows + r * panel.step * row_bytes, w->cols, 0, stages.codes + r * kApart);
    for (int64_t c = 0; c < x->chunks; c++) {
      if (c % kSlots == 0) read_scales(c);
      if (kChunk <= 128) between(decoder, c * kChunk);  // here, where no sums are held
      Sums sums;
      begin<0>(c, sums);
      const int64_t end = (c + 1) * kChunk < x->cols ? (c + 1) * kChunk : x->cols;
      for (int64_t k = c * kChunk; k < end; k += kPiece) {
        if (kChunk > 128) between(decoder, k);
        add_bytes<kPiece>(stage(k) + k % kStage, kApart, k, sums);
      }
      finish(c, sums);
    }
  }

  LOWBIT_INLINE void multiply_bytes() {
    for (int64_t c = 0; c < x->chunks; c++) {
      if (c % kSlots == 0) read_scales(c);
      Sums sums;
      begin<0>(c, sums);
      const int64_t end = (c + 1) * kChunk < x->cols ? (c + 1) * kChunk : x->cols;
      for (int64_t k = c * kChunk; k < end; k += kPiece) {  // whole planes, for no more of a row is stored
        if (k % kPart == 0) next->fetch();
        add_bytes<kPiece>(rows + k, panel.step * row_bytes, k, sums);
      }
      finish(c, sums);
    }
  }

  LOWBIT_INLINE void multiply_nibbles() {
    constexpr int kLineChunks = 128 / kChunk, kPlaneChunks = kLineChunks / 2, kCodes = kChunk < 64 ? kChunk : 64;
    for (int64_t c0 = 0; c0 < x->chunks; c0 += kLineChunks) {
      if (c0 % kSlots == 0) read_scales(c0);
      next->fetch();
      const int64_t k = c0 * kChunk;
      Sums low, high;
      if (kLineChunks == 1) {
        begin<0>(c0, low);
        for (int r = 0; r < R; r++)
          for (int d = 0; d < D; d++) high[r][d] = _mm512_setzero_si512();
        add_nibbles<kCodes>(rows + k / 2, panel.step * row_bytes, k, low, high);
        for (int r = 0; r < R; r++)
          for (int d = 0; d < D; d++) low[r][d] = _mm512_add_epi32(low[r][d], _mm512_srai_epi32(high[r][d], 4));
        finish(c0, low);
      } else {
        for (int j = 0; j < kPlaneChunks; j++) {
          const int64_t c = c0 + j, after = c + kPlaneChunks;  // beyond the last chunk sums and steps are zero
          begin<0>(c, low);
          begin<4>(after, high);
          add_nibbles<kCodes>(rows + k / 2 + j * kCodes, panel.step * row_bytes, k + j * kCodes, low, high);
          finish(c, low);
          for (int r = 0; r < R; r++)
            for (int d = 0; d < D; d++) high[r][d] = _mm512_srai_epi32(high[r][d], 4);
          if (after < x->chunks) finish(after, high);
        }
      }
    }
  }

  // To out[m * out_stride + n - panel.first].
  LOWBIT_INLINE void write(int64_t tile, float* out, int64_t out_stride) {
    const int used = x->chunks < kSlots ? int(x->chunks) : kSlots;
    const uint32_t wanted = ((1u << panel.count) - 1) << panel.skip;
    for (int t = 0; t < T; t++) {
      const int64_t m = (tile + t) * kLanes, tokens = x->tokens - m < kLanes ? x->tokens - m : kLanes;
      for (int r0 = 0; r0 < R; r0 += 4) {
        __m512 y[4];
        for (int r = 0; r < 4; r++) y[r] = add_slots(slots[0][r0 + r][t], sizeof slots[0] / 4, used);
        store_four(y, tokens, __mmask8(wanted >> r0 & 15), out + m * out_stride + r0, out_stride);
      }
    }
  }
};

template <int kBits, int kChunk, bool kTwoDigits, int kTiles>
__attribute__((noinline)) void panel_by_tiles(const lowbit_matrix* w, const Activations* x, const Panel& panel,
                                              int64_t tile, const Stages& stages, Lines* next, float* out,
                                              int64_t out_stride) {
  using Product = PanelByTiles<kBits, kChunk, kTwoDigits, kTiles>;
  Product product(w, x, panel, tile, stages, next);
  if constexpr (Product::kNibbles)
    product.multiply_nibbles();
  else if constexpr (Product::kDecodes)
    product.multiply_decoded();
  else
    product.multiply_bytes();
  product.write(tile, out, out_stride);
}

// Tiles [begin, end), kTiles at a time, against rows [n0, n1), 8 at a time.
template <int kBits, int kChunk, bool kTwoDigits, int kTiles>
LOWBIT_INLINE void panels_by_tiles(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, int64_t begin,
                                   int64_t end, float* out, int64_t out_stride) {
  using Product = PanelByTiles<kBits, kChunk, kTwoDigits, kTiles>;
  constexpr int64_t kStages = Product::kDecodes ? 24 : 1;  // 12288 columns; 110 KB of stack, 135 of trits
  alignas(64) uint8_t codes[kStages * kPanelRows * kStageApart<kBits>];
  const bool keep = end - begin > kTiles && x->cols <= kStages * kStageCodes<kBits>;
  const int64_t row_bytes = row_lines(kBits, w->cols) * kLineBytes;
  const bool narrow = w->rows < kPanelRows;
  for (int64_t n = n0; n < n1; n += narrow ? 1 : kPanelRows) {
    Panel panel = {n, 0, 0, 1};
    if (!narrow) {
      const int64_t first = n + kPanelRows <= w->rows ? n : w->rows - kPanelRows;
      panel = {first, n - first, 1, n1 - n < kPanelRows ? int(n1 - n) : kPanelRows};
    }
    // While a panel meets its first tiles, the next one comes nearer.
    const int64_t after = n + 2 * kPanelRows < w->rows ? n + 2 * kPanelRows : w->rows;
    Lines next = {w->codes + (n + kPanelRows) * row_bytes, w->codes + after * row_bytes,
                  int(ceil_div(kPanelRows * row_bytes / kLineBytes, ceil_div(w->cols, Product::kFetchEvery)))};
    for (int64_t tile = begin; tile < end; tile += kTiles) {
      const Stages stages = {codes, keep ? -1 : 1, keep && tile > begin};
      panel_by_tiles<kBits, kChunk, kTwoDigits, kTiles>(w, x, panel, tile, stages, &next, out + panel.first - n0,
                                                        out_stride);
    }
  }
}

template <int kBits, int kChunk, bool kTwoDigits>
void matmul_tiles(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                  int64_t out_stride) {
  const int64_t tiles = ceil_div(x->tokens, kLanes), pairs = tiles / 2 * 2;
  if constexpr (kTwoDigits) {
    panels_by_tiles<kBits, kChunk, true, 1>(w, x, n0, n1, 0, tiles, out, out_stride);
  } else {
    if (pairs > 0) panels_by_tiles<kBits, kChunk, false, 2>(w, x, n0, n1, 0, pairs, out, out_stride);
    if (pairs < tiles) panels_by_tiles<kBits, kChunk, false, 1>(w, x, n0, n1, pairs, tiles, out, out_stride);
  }
}

}  // namespace
}  // namespace lowbit
#endif
