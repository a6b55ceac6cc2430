// y[m,n] = s[n] * step[m] * sum_k (code[n,k] - 1) * v[m,k]   on AVX-512 VNNI and VBMI: ternary rows with one scale.
//
// A chunk is 40960 columns, so that a row is ONE integer or very few: its planes meet the digits in vpdpbusd and are
// added across the lanes once, for 16 rows together, whose scales, steps and results are then lanes too (row by row
// that was half of the instructions of a row of 2560 columns). A line of 320 weights costs 12 operations to decode and 5
// vpdpbusd, 10 with two digits. On Zen 4 bound by its pipes, which do 2 simple operations of 512 bits a clock, one shuffle
// and one vpdpbusd, and by 6 or 11 loads, one a clock: 11.5 to 13 clocks a line and 17.5 to 20 (rows of 2560 columns and
// more, from a cache), 3.2 and 4.9 ns at 3.67 GHz. Planes times factors (ScaledTritDecoder) took the decoding off the pipes of
// vpdpbusd: 15 to 16 clocks before, 21 to 22 with two digits. With more products than registers for their sums planes are
// decoded as they are.
// Where the digits leave little of the L1, two rows read them together (x->rows_share).
// Groups of columns with scales of their own and tiles of 16 tokens take the loops of all formats (rows_avx512vnni.h,
// tiles_avx512vnni.h).
#include "cpu/matmul_avx512vnni.h"

namespace lowbit {
namespace {

constexpr int kRowsTogether = 16;

// Whether planes are decoded times a factor, which needs a sum for each: as far as 32 registers hold them.
template <bool kTwoDigits, int kRows, int kTokens>
constexpr bool kDecodesScaled = kRows * kTokens <= (kTwoDigits ? 1 : 4);

template <bool kScaled>
struct DecoderOf {
  using Type = TritDecoder;
};
template <>
struct DecoderOf<true> {
  using Type = ScaledTritDecoder;
};

// In place where gcc 12 would copy the many sums of a loop back and forth; the intrinsic, whose digits need no register,
// where it does not: each is up to 6% slower in the other's place.
template <bool kInPlace>
LOWBIT_INLINE void add_products(__m512i& sum, __m512i codes, __m512i digits) {
  if (kInPlace)
    add_products(sum, codes, digits);
  else
    sum = _mm512_dpbusd_epi32(sum, codes, digits);
}

// to[r][t] = the 16 partial sums of `lines` lines of row r, which begins at `line + r * apart`, and the token whose digits
// there are high[t] and low[t]. kStream: the hint of the prefetch, known outside so that the loop has no branch.
template <bool kTwoDigits, bool kStream, int kRows, int kTokens, class Decoder>
LOWBIT_INLINE void row_sums(const Decoder& trits, const uint8_t* line, int64_t apart, int64_t lines,
                            const int8_t* const* high, const int8_t* const* low, int64_t ahead,
                            __m512i (&to)[kRows][kTokens]) {
  constexpr bool kScaled = Decoder::kScales > 1;
  // A sum for each factor; else several for each digit, as a chain of five products a line would wait for itself.
  constexpr int kSums = kScaled ? Decoder::kScales : kRows * kTokens == 1 ? kTritPlanes : kRows * kTokens == 2 ? 2 : 1;
  __m512i h[kRows][kTokens][kSums], l[kRows][kTokens][kSums];
  for (int r = 0; r < kRows; r++)
    for (int t = 0; t < kTokens; t++)
      for (int i = 0; i < kSums; i++) h[r][t][i] = l[r][t][i] = _mm512_setzero_si512();
  int64_t at = 0;
  const uint8_t* const end = line + lines * kLineBytes;
  do {  // a chunk has a line
    __m512i planes[kRows][kTritPlanes];
    for (int r = 0; r < kRows; r++) {
      prefetch(line + r * apart, Ahead{ahead, kStream});
      const __m512i codes = _mm512_loadu_si512(line + r * apart);
      trits.decode(codes, planes[r]);
    }
    for (int t = 0; t < kTokens; t++)
      for (int p = 0; p < kTritPlanes; p++) {
        const int i = kScaled ? Decoder::scale(p) : p % kSums;
        const __m512i digits = _mm512_loadu_si512(low[t] + at + p * 64);
        const __m512i digits256 = kTwoDigits ? _mm512_loadu_si512(high[t] + at + p * 64) : digits;
        for (int r = 0; r < kRows; r++) {
          if (kTwoDigits) add_products<kScaled>(h[r][t][i], planes[r][p], digits256);
          add_products<kScaled>(l[r][t][i], planes[r][p], digits);
        }
      }
    at += kTritPlanes * 64;
    line += kLineBytes;
  } while (line != end);
  for (int r = 0; r < kRows; r++)
    for (int t = 0; t < kTokens; t++) {
      for (int i = 1; i < kSums; i++) {  // exact: a multiple of the scale, and of either digit in 32 bits
        const int shift = kScaled ? 2 * i : 0;
        if (kTwoDigits) h[r][t][0] = _mm512_add_epi32(h[r][t][0], _mm512_srai_epi32(h[r][t][i], shift));
        l[r][t][0] = _mm512_add_epi32(l[r][t][0], _mm512_srai_epi32(l[r][t][i], shift));
      }
      to[r][t] = kTwoDigits ? _mm512_add_epi32(l[r][t][0], _mm512_slli_epi32(h[r][t][0], 8)) : l[r][t][0];
    }
}

// Lane r: the sum of the lanes of sums[r].
LOWBIT_INLINE __m512i add_lanes(__m512i (&sums)[kRowsTogether]) {
  for (int i = 0; i < 8; i++) sums[i] = merge<1>(sums[2 * i], sums[2 * i + 1]);
  for (int i = 0; i < 4; i++) sums[i] = merge<2>(sums[2 * i], sums[2 * i + 1]);
  for (int i = 0; i < 2; i++) sums[i] = merge<3>(sums[2 * i], sums[2 * i + 1]);
  return merge<4>(sums[0], sums[1]);
}

// Rows [n, n + count) and tokens [m, m + kTokens), kRows at a time.
template <bool kTwoDigits, int kRows, int kTokens>
LOWBIT_INLINE void rows_by_tokens(const lowbit_matrix* w, const Activations* x, int64_t n, int64_t count, int64_t m,
                                  Ahead ahead, float* out, int64_t out_stride) {
  const typename DecoderOf<kDecodesScaled<kTwoDigits, kRows, kTokens>>::Type trits;
  constexpr int64_t kLines = kTritChunk / (kTritPlanes * kPlaneCodes);  // of a chunk
  const int64_t lines = row_lines(kTrit, w->cols), row_bytes = lines * kLineBytes;
  const int64_t apart = count / kRows;
  const __mmask16 rows = first_lanes(count);
  const __m512 scales =
      w->scale_rows == 1 ? _mm512_broadcastss_ps(_mm512_castps512_ps128(load_floats(w->scales, w->scale_dtype, 0, 1)))
                         : load_floats(w->scales, w->scale_dtype, n, rows);
  __m512 slots[kTokens][kSlots];  // lane r is row n + r's
  for (int t = 0; t < kTokens; t++)
    for (int i = 0; i < kSlots; i++) slots[t][i] = _mm512_setzero_ps();
  for (int64_t c = 0; c < x->chunks; c++) {
    const int64_t begin = c * kLines, end = begin + kLines < lines ? begin + kLines : lines;
    const int8_t *high[kTokens], *low[kTokens];
    for (int t = 0; t < kTokens; t++) {
      const int64_t at = (m + t) * x->cols_padded + begin * (kTritPlanes * 64);
      high[t] = (kTwoDigits ? x->high : x->low) + at;
      low[t] = x->low + at;
    }
    __m512i sums[kTokens][kRowsTogether];
    const uint8_t* first = w->codes + n * row_bytes + begin * kLineBytes;
    auto multiply = [&](int64_t r, auto& together) {
      const uint8_t* line = first + r * row_bytes;
      if (ahead.l2)
        row_sums<kTwoDigits, true>(trits, line, apart * row_bytes, end - begin, high, low, ahead.bytes, together);
      else
        row_sums<kTwoDigits, false>(trits, line, apart * row_bytes, end - begin, high, low, ahead.bytes, together);
    };
    for (int64_t r = 0; r < apart; r++) {
      __m512i together[kRows][kTokens];
      multiply(r, together);
      for (int i = 0; i < kRows; i++)
        for (int t = 0; t < kTokens; t++) sums[t][r + i * apart] = together[i][t];
    }
    for (int64_t r = kRows * apart; r < count; r++) {
      __m512i alone[1][kTokens];
      multiply(r, alone);
      for (int t = 0; t < kTokens; t++) sums[t][r] = alone[0][t];
    }
    for (int64_t r = count; r < kRowsTogether; r++)
      for (int t = 0; t < kTokens; t++) sums[t][r] = _mm512_setzero_si512();
    for (int t = 0; t < kTokens; t++) {
      const int64_t at = (m + t) * x->chunks_padded + c;
      // Modulo 2^32: the two sums may leave the int32 range, their difference does not.
      const __m512i products = _mm512_sub_epi32(add_lanes(sums[t]), _mm512_set1_epi32(x->sum[at]));
      const __m512 weights = _mm512_mul_ps(scales, _mm512_set1_ps(x->step[at]));
      slots[t][c % kSlots] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), weights, slots[t][c % kSlots]);
    }
  }
  for (int t = 0; t < kTokens; t++) {
    for (int width = kSlots / 2; width > 0; width /= 2)
      for (int i = 0; i < width; i++) slots[t][i] = _mm512_add_ps(slots[t][i], slots[t][i + width]);
    _mm512_mask_storeu_ps(out + (m + t) * out_stride, rows, slots[t][0]);
  }
}

template <bool kTwoDigits, int kRows>
void whole_rows(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out, int64_t out_stride) {
  Ahead ahead = prefetch_ahead<false>();
  // Rows together are as many streams, each of a few rows: what comes next in each are those of the next call.
  if (kRows > 1) ahead = {kRowsTogether * row_lines(kTrit, w->cols) * kLineBytes, true};
  for (int64_t n = n0; n < n1; n += kRowsTogether) {
    const int64_t count = n1 - n < kRowsTogether ? n1 - n : kRowsTogether;
    each_pass<kMostTokens<kTwoDigits>>(x->tokens, [&](auto width, int64_t m) __attribute__((always_inline)) {
      rows_by_tokens<kTwoDigits, kRows, width.value>(w, x, n, count, m, ahead, out + n - n0, out_stride);
    });
  }
}

}  // namespace

void trit_matmul__avx512vnni(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                             int64_t out_stride) {
  if (x->chunk != kTritChunk) return matmul<kTrit>(w, x, n0, n1, out, out_stride);
  if (x->layout == Activations::kRows)
    (x->rows_share ? (x->high ? whole_rows<true, 2> : whole_rows<false, 2>)
                   : (x->high ? whole_rows<true, 1> : whole_rows<false, 1>))(w, x, n0, n1, out, out_stride);
  else
    (x->high ? matmul_tiles<kTrit, kTritChunk, true> : matmul_tiles<kTrit, kTritChunk, false>)(w, x, n0, n1, out,
                                                                                               out_stride);
}

}  // namespace lowbit
