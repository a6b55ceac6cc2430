// y[m,n] = s[n] * step[m] * sum_k (code[n,k] - 1) * v[m,k]   on AVX2 and AVX-VNNI: ternary rows with one scale.
//
// A row of up to 40960 columns is ONE integer. A line of 320 weights is decoded to bytes in L1 (planes_avx2.h), then its
// ten half planes meet the digits in vpdpbusd, or in vpmaddubsw: 16 bits hold 64 such sums of two products of at most
// 2 * 128. Bound by issue slots: about 60 operations to decode a line, 20 or 30 to multiply it by a digit. Groups of
// columns with scales of their own, and tiles of 16 tokens, are those of matmul_avx2.h.
#ifndef LOWBIT_CPU_TRIT_MATMUL_AVX2_H
#define LOWBIT_CPU_TRIT_MATMUL_AVX2_H

#include "cpu/matmul_avx2.h"

namespace lowbit {
namespace {

LOWBIT_INLINE uint32_t sum_of_lanes(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return uint32_t(_mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1))));
}

template <bool kTwoDigits, int kTokens>
LOWBIT_INLINE void whole_row(const lowbit_matrix* w, const Activations* x, int64_t n, int64_t m, float* out,
                             int64_t out_stride) {
  constexpr int kLines = int(kTritChunk / (kTritPlanes * 64));  // of a chunk
  const int64_t lines = row_lines(kTrit, w->cols);
  const uint8_t* row = w->codes + n * lines * kLineBytes;
  const float scale = load_float_at(w->scales, w->scale_dtype, scale_index(w, n, 0));
  alignas(32) float slots[kTokens][kSlots] = {};
  alignas(32) uint8_t codes[kTritPlanes * 64];
  for (int64_t c = 0; c < x->chunks; c++) {
    __m256i sum[kTokens];
    for (int t = 0; t < kTokens; t++) sum[t] = _mm256_setzero_si256();
    const int64_t end = (c + 1) * kLines < lines ? (c + 1) * kLines : lines;
    for (int64_t line = c * kLines; line < end; line++) {
      decode_trits(row, line, 1, codes);
      for (int t = 0; t < kTokens; t++) {
        const int64_t at = (m + t) * x->cols_padded + line * (kTritPlanes * 64);
        __m256i h = _mm256_setzero_si256(), l = h;
        for (int i = 0; i < kTritPlanes * 64; i += 32) {
          if (kTwoDigits) add_products(h, load32(codes + i), load32(x->high + at + i));
          add_products(l, load32(codes + i), load32(x->low + at + i));
        }
        if (kTwoDigits) sum[t] = add_weighted(sum[t], h, 256);
        sum[t] = add_weighted(sum[t], l, 1);
      }
    }
    for (int t = 0; t < kTokens; t++) {
      // Modulo 2^32: the two sums may leave the int32 range, their difference does not.
      const int64_t at = (m + t) * x->chunks_padded + c;
      const uint32_t product = sum_of_lanes(sum[t]) - uint32_t(x->sum[at]);
      float* slot = slots[t] + c % kSlots;
      *slot = __builtin_fmaf(float(int32_t(product)), scale * x->step[at], *slot);
    }
  }
  for (int t = 0; t < kTokens; t++)
    out[(m + t) * out_stride] = add_slots(_mm256_load_ps(slots[t]), _mm256_load_ps(slots[t] + 8));
}

template <bool kTwoDigits>
void whole_rows(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out, int64_t out_stride) {
  for (int64_t n = n0; n < n1; n++) {
    int64_t m = 0;
    for (; m + 2 <= x->tokens; m += 2) whole_row<kTwoDigits, 2>(w, x, n, m, out + n - n0, out_stride);
    if (m < x->tokens) whole_row<kTwoDigits, 1>(w, x, n, m, out + n - n0, out_stride);
  }
}

LOWBIT_INLINE void trit_matmul(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                               int64_t out_stride) {
  if (x->chunk != kTritChunk) return matmul<kTrit>(w, x, n0, n1, out, out_stride);
  if (x->layout == Activations::kRows)
    (x->high ? whole_rows<true> : whole_rows<false>)(w, x, n0, n1, out, out_stride);
  else
    (x->high ? matmul_tiles<kTrit, kTritChunk, true> : matmul_tiles<kTrit, kTritChunk, false>)(w, x, n0, n1, out,
                                                                                               out_stride);
}

}  // namespace
}  // namespace lowbit
#endif
