// x[m,k] ~ step[m,c] * (256*high + low) on AVX-512: activations to int8 digits per token and chunk (docs/numerics.md).
//
// A chunk of 16 to 128 columns is 1 to 8 registers of fp32: one pass for the largest magnitude (as integers, so that a
// NaN counts as larger than infinity), one for the digits and their sum. Tiles go through 16 rows of digits in L1 and a
// 16x16 transposition of dwords. Bound by latency (a maximum across lanes and a scalar step for each chunk), about 1 ns
// for 10 columns: K*M of it against the N*K*M of the product.
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

// Digits of columns [k, k + chunk) of one token, and their step and sum.
LOWBIT_INLINE void quantize_chunk(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t k, int64_t cols,
                                  int chunk, int8_t* high, int8_t* low, float* step, int32_t* sum) {
  __m512 v[8];
  __m512i largest = _mm512_setzero_si512();
  for (int i = 0; i < chunk / 16; i++) {
    v[i] = load_columns(x, dtype, perm, k + 16 * i, cols);
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7FFFFFFF));
    largest = _mm512_max_epi32(largest, magnitude);
  }
  const ChunkStep s = chunk_step(uint32_t(_mm512_reduce_max_epi32(largest)), high != nullptr);
  const __mmask16 live = s.inverse != 0 ? 0xFFFF : 0;
  const __m512 inverse = _mm512_set1_ps(s.inverse);
  __m512i total = _mm512_setzero_si512();
  for (int i = 0; i < chunk / 16; i++) {
    const __m512i q = _mm512_maskz_cvtps_epi32(live, _mm512_mul_ps(v[i], inverse));
    total = _mm512_add_epi32(total, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + 16 * i), _mm512_cvtepi32_epi8(q));
    if (high) {
      const __m512i q_high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + 16 * i), _mm512_cvtepi32_epi8(q_high));
    }
  }
  *step = s.step;
  *sum = _mm512_reduce_add_epi32(total);
}

const void* token(const void* x, lowbit_dtype dtype, int64_t stride, int64_t m) {
  return static_cast<const char*>(x) + m * stride * (dtype == LOWBIT_F32 ? 4 : 2);
}

void quantize_row(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t m, const Activations* out) {
  int8_t* low = out->low + m * out->cols_padded;
  int8_t* high = out->high ? out->high + m * out->cols_padded : nullptr;
  float* step = out->step + m * out->chunks_padded;
  int32_t* sum = out->sum + m * out->chunks_padded;
  for (int64_t c = 0; c < out->chunks; c++) {
    const int64_t k = c * out->chunk;
    quantize_chunk(x, dtype, perm, k, out->cols, int(out->chunk), high ? high + k : nullptr, low + k, step + c,
                   sum + c);
  }
  const int64_t end = out->chunks * out->chunk;
  memset(low + end, 0, size_t(out->cols_padded - end));
  if (high) memset(high + end, 0, size_t(out->cols_padded - end));
  memset(step + out->chunks, 0, size_t(out->chunks_padded - out->chunks) * 4);
  memset(sum + out->chunks, 0, size_t(out->chunks_padded - out->chunks) * 4);
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
  alignas(64) int8_t high_rows[kLanes][128] = {}, low_rows[kLanes][128] = {};
  int8_t* low = out->low + m * out->cols_padded;
  int8_t* high = out->high ? out->high + m * out->cols_padded : nullptr;
  float* step = out->step + m * out->chunks_padded;
  int32_t* sum = out->sum + m * out->chunks_padded;
  const int64_t chunk = out->chunk;
  const int64_t bytes = chunk < 64 ? chunk * kLanes : 64 * kLanes;  // of one transposition
  memset(step, 0, size_t(out->chunks_padded) * kLanes * 4);
  memset(sum, 0, size_t(out->chunks_padded) * kLanes * 4);
  alignas(64) int8_t lines[64 * kLanes];
  for (int64_t c = 0; c < out->chunks; c++) {
    for (int t = 0; t < tokens; t++)
      quantize_chunk(token(x, dtype, stride, m + t), dtype, perm, c * chunk, out->cols, int(chunk),
                     high ? high_rows[t] : nullptr, low_rows[t], step + c * kLanes + t, sum + c * kLanes + t);
    for (int64_t k = 0; k < chunk; k += 64) {
      const int64_t at = (c * chunk + k) * kLanes;
      interleave(low_rows[0] + k, lines);
      memcpy(low + at, lines, size_t(bytes));
      if (!high) continue;
      interleave(high_rows[0] + k, lines);
      memcpy(high + at, lines, size_t(bytes));
    }
  }
  const int64_t end = out->chunks * chunk * kLanes;
  memset(low + end, 0, size_t(out->cols_padded * kLanes - end));
  if (high) memset(high + end, 0, size_t(out->cols_padded * kLanes - end));
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
