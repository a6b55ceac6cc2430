// x[m,k] ~ step[m,c] * (256*high + low) on AVX-512: activations to int8 digits per token and chunk (docs/numerics.md).
//
// A piece of 16 to 128 columns is 1 to 8 registers of fp32: one pass for the largest magnitude (as integers, so that a
// NaN counts as larger than infinity; wider chunks take one more pass over x), one for the digits and their sum. Tiles
// go through 16 rows of digits in L1 and a 16x16 transposition of dwords. Bound by latency (a maximum across lanes and
// a scalar step for each chunk), about 1 ns for 10 columns: K*M of it against the N*K*M of the product.
#include <string.h>

#include "cpu/chunk_step.h"
#include "cpu/planes_avx512.h"

namespace lowbit {
namespace {

// Columns [k, k + 16) of a token as fp32, zero beyond cols; column j lies at perm[j].
LOWBIT_INLINE __m512 load_columns(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t k, int64_t cols) {
  const __mmask16 mask = first_lanes(cols - k);
  if (!perm) return load_floats(x, dtype, k, mask);
  if (dtype == LOWBIT_F32)
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, _mm512_maskz_loadu_epi32(mask, perm + k), x, 4);
  // 16-bit gathers do not exist, and one of 32 bits would read past the last column.
  alignas(32) uint16_t lanes[16] = {};
  for (int64_t j = 0; j < 16 && k + j < cols; j++) lanes[j] = static_cast<const uint16_t*>(x)[perm[k + j]];
  return load_floats(lanes, dtype, 0, 0xFFFF);
}

LOWBIT_INLINE __m512i magnitudes(__m512 v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
}

// The bits of the largest magnitude of columns [begin, end).
uint32_t largest_of(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t begin, int64_t end) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = begin; k < end; k += 16)
    largest = _mm512_max_epi32(largest, magnitudes(load_columns(x, dtype, perm, k, end)));
  return uint32_t(_mm512_reduce_max_epi32(largest));
}

// Digits of columns [k, k + count), at most 128, with a given step (`given`) or their own. Adds to *sum.
LOWBIT_INLINE ChunkStep quantize_piece(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t k, int64_t cols,
                                       int count, const ChunkStep* given, int8_t* high, int8_t* low, int32_t* sum) {
  __m512 v[8];
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < count / 16; i++) {
    v[i] = load_columns(x, dtype, perm, k + 16 * i, cols);
    if (!given) largest = _mm512_max_epi32(largest, magnitudes(v[i]));
  }
  const ChunkStep s = given ? *given : chunk_step(uint32_t(_mm512_reduce_max_epi32(largest)), high != nullptr);
  const __mmask16 live = s.inverse != 0 ? 0xFFFF : 0;
  const __m512 inverse = _mm512_set1_ps(s.inverse);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < count / 16; i++) {
    const __m512i q = _mm512_maskz_cvtps_epi32(live, _mm512_mul_ps(v[i], inverse));
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + 16 * i), _mm512_cvtepi32_epi8(q));
    if (high) {
      const __m512i q_high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + 16 * i), _mm512_cvtepi32_epi8(q_high));
    }
  }
  *sum += _mm512_reduce_add_epi32(total);
  return s;
}

const void* token(const void* x, lowbit_dtype dtype, int64_t stride, int64_t m) {
  return static_cast<const char*>(x) + m * stride * (dtype == LOWBIT_F32 ? 4 : 2);
}

void quantize_row(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t m, const Activations* out) {
  walk_row(
      *out, m,
      [&](int64_t k, int count, const ChunkStep* given, int8_t* high, int8_t* low, int32_t* sum) {
        return quantize_piece(x, dtype, perm, k, out->cols, count, given, high, low, sum);
      },
      [&](int64_t begin, int64_t end) { return largest_of(x, dtype, perm, begin, end); });
}

// 64 columns of 16 rows of digits, rows 128 bytes apart, to [k/4][row][k%4].
// A 16x16 transposition of dwords: pairs, then quads within 128-bit parts, then the parts.
LOWBIT_INLINE void interleave(const int8_t* from, int8_t* to) {
  __m512i a[16], b[16];
  for (int r = 0; r < 16; r++) a[r] = _mm512_load_si512(from + r * 128);
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  // a[4q + i], part p: dword 4p + i of rows 4q .. 4q+3.
  for (int i = 0; i < 4; i++) {
    const __m512i even_lo = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88),
                  odd_lo = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xDD);
    const __m512i even_hi = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const __m512i odd_hi = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xDD);
    _mm512_storeu_si512(to + i * 64, _mm512_shuffle_i32x4(even_lo, even_hi, 0x88));
    _mm512_storeu_si512(to + (4 + i) * 64, _mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88));
    _mm512_storeu_si512(to + (8 + i) * 64, _mm512_shuffle_i32x4(even_lo, even_hi, 0xDD));
    _mm512_storeu_si512(to + (12 + i) * 64, _mm512_shuffle_i32x4(odd_lo, odd_hi, 0xDD));
  }
}

void quantize_tile(const void* x, lowbit_dtype dtype, int64_t stride, const int32_t* perm, int64_t m, int tokens,
                   const Activations* out) {
  alignas(64) int8_t high_rows[kLanes][128] = {}, low_rows[kLanes][128] = {}, lines[64 * kLanes];
  const Activations& a = *out;
  int8_t* low = a.low + m * a.cols_padded;
  int8_t* high = a.high ? a.high + m * a.cols_padded : nullptr;
  float* step = a.step + m * a.chunks_padded;
  int32_t* sum = a.sum + m * a.chunks_padded;
  memset(step, 0, size_t(a.chunks_padded) * kLanes * 4);
  memset(sum, 0, size_t(a.chunks_padded) * kLanes * 4);
  const int64_t piece = a.chunk < kPiece ? a.chunk : kPiece;
  ChunkStep wide[kLanes]{};
  int64_t k = 0;
  for (; k < a.cols; k += piece) {
    const int64_t c = k / a.chunk;
    for (int t = 0; t < tokens; t++) {
      const void* from = token(x, dtype, stride, m + t);
      auto largest = [&](int64_t begin, int64_t end) { return largest_of(from, dtype, perm, begin, end); };
      const ChunkStep* given = shared_step(a, k, wide + t, largest);
      step[c * kLanes + t] = quantize_piece(from, dtype, perm, k, a.cols, int(piece), given,
                                            high ? high_rows[t] : nullptr, low_rows[t], sum + c * kLanes + t)
                                 .step;
    }
    for (int64_t i = 0; i < piece; i += 64) {
      const int64_t at = (k + i) * kLanes, bytes = (piece < 64 ? piece : 64) * kLanes;
      interleave(low_rows[0] + i, lines);
      memcpy(low + at, lines, size_t(bytes));
      if (!high) continue;
      interleave(high_rows[0] + i, lines);
      memcpy(high + at, lines, size_t(bytes));
    }
  }
  memset(low + k * kLanes, 0, size_t((a.cols_padded - k) * kLanes));
  if (high) memset(high + k * kLanes, 0, size_t((a.cols_padded - k) * kLanes));
}

}  // namespace

void activations__avx512vnni(const void* x, lowbit_dtype dtype, int64_t stride, const int32_t* perm, int64_t m0,
                             int64_t m1, const Activations* out) {
  if (out->layout == Activations::kRows) {
    for (int64_t m = m0; m < m1; m++) quantize_row(token(x, dtype, stride, m), dtype, perm, m, out);
  } else {
    for (int64_t m = m0; m < m1; m += kLanes)
      quantize_tile(x, dtype, stride, perm, m, int(m1 - m < kLanes ? m1 - m : kLanes), out);
  }
}

}  // namespace lowbit
