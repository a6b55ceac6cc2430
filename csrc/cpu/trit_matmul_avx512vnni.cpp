// y[m,n] = s[n] * step[m] * sum_k (code[n,k] - 1) * v[m,k]   on AVX-512 VNNI and VBMI: ternary rows with one scale.
//
// A row of up to 40960 columns is ONE integer: its planes meet the digits in vpdpbusd and are added across the lanes
// once. A line of 320 weights costs 11 operations to decode (planes_avx512.h) and 5 vpdpbusd, 10 with two digits. On
// Zen 4 probably bound by the pipes that vpmaddubsw, vpermb and vpdpbusd share: 3.9 and 5.6 ns a line from L2, one
// thread, a clock between 2.2 and 3.4 GHz; where those pipes or the clock allow it, by the memory.
// Groups of columns with scales of their own and tiles of 16 tokens take the loops of all formats (rows_avx512vnni.h,
// tiles_avx512vnni.h).
#include "cpu/matmul_avx512vnni.h"

namespace lowbit {
namespace {

template <bool kTwoDigits, int kTokens>
LOWBIT_INLINE void whole_row(const TritDecoder& trits, const lowbit_matrix* w, const Activations* x, int64_t n,
                             int64_t m, Ahead ahead, float* out, int64_t out_stride) {
  constexpr int kLines = int(kTritChunk / (kTritPlanes * 64));  // of a chunk
  const int64_t lines = row_lines(kTrit, w->cols);
  const uint8_t* row = w->codes + n * lines * kLineBytes;
  const int64_t scale_at = scale_index(w, n, 0);
  const float scale = _mm512_cvtss_f32(load_floats(w->scales, w->scale_dtype, scale_at, 1));
  float slots[kTokens][kSlots] = {};
  for (int64_t c = 0; c < x->chunks; c++) {
    // Several sums for each digit: a chain of five products a line would wait for itself.
    constexpr int kSums = kTokens == 1 ? kTritPlanes : kTokens == 2 ? 2 : 1;
    __m512i h[kTokens][kSums], l[kTokens][kSums];
    for (int t = 0; t < kTokens; t++)
      for (int i = 0; i < kSums; i++) h[t][i] = l[t][i] = _mm512_setzero_si512();
    const int64_t end = (c + 1) * kLines < lines ? (c + 1) * kLines : lines;
    for (int64_t line = c * kLines; line < end; line++) {
      prefetch(row + line * kLineBytes, ahead);
      __m512i planes[kTritPlanes];
      trits.decode(_mm512_loadu_si512(row + line * kLineBytes), planes);
      for (int t = 0; t < kTokens; t++) {
        const int64_t at = (m + t) * x->cols_padded + line * (kTritPlanes * 64);
        for (int p = 0; p < kTritPlanes; p++) {
          if (kTwoDigits)
            h[t][p % kSums] =
                _mm512_dpbusd_epi32(h[t][p % kSums], planes[p], _mm512_loadu_si512(x->high + at + p * 64));
          l[t][p % kSums] = _mm512_dpbusd_epi32(l[t][p % kSums], planes[p], _mm512_loadu_si512(x->low + at + p * 64));
        }
      }
    }
    for (int t = 0; t < kTokens; t++) {
      for (int i = 1; i < kSums; i++) {
        h[t][0] = _mm512_add_epi32(h[t][0], h[t][i]);
        l[t][0] = _mm512_add_epi32(l[t][0], l[t][i]);
      }
      const __m512i sum = _mm512_add_epi32(l[t][0], _mm512_slli_epi32(h[t][0], 8));  // h is 0 in int8 mode
      const int64_t at = (m + t) * x->chunks_padded + c;
      // Modulo 2^32: the two sums may leave the int32 range, their difference does not.
      const uint32_t product = uint32_t(_mm512_reduce_add_epi32(sum)) - uint32_t(x->sum[at]);
      float* slot = slots[t] + c % kSlots;
      *slot = __builtin_fmaf(float(int32_t(product)), scale * x->step[at], *slot);
    }
  }
  for (int t = 0; t < kTokens; t++) {
    const bool one = x->chunks == 1;  // then the tree adds zeros
    out[(m + t) * out_stride] = one ? slots[t][0] + 0.0f : add_slots(_mm512_loadu_ps(slots[t]));
  }
}

template <bool kTwoDigits>
void whole_rows(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out, int64_t out_stride) {
  constexpr int kTogether = kTwoDigits ? 2 : 4;
  const TritDecoder trits;
  const Ahead ahead = prefetch_ahead<kTrit>((kTwoDigits ? 2 : 1) * x->cols_padded);
  for (int64_t n = n0; n < n1; n++) {
    int64_t m = 0;
    for (; m + kTogether <= x->tokens; m += kTogether)
      whole_row<kTwoDigits, kTogether>(trits, w, x, n, m, ahead, out + n - n0, out_stride);
    for (; m < x->tokens; m++) whole_row<kTwoDigits, 1>(trits, w, x, n, m, ahead, out + n - n0, out_stride);
  }
}

}  // namespace

void trit_matmul__avx512vnni(const lowbit_matrix* w, const Activations* x, int64_t n0, int64_t n1, float* out,
                             int64_t out_stride) {
  if (x->chunk != kTritChunk) return matmul<kTrit>(w, x, n0, n1, out, out_stride);
  if (x->layout == Activations::kRows)
    (x->high ? whole_rows<true> : whole_rows<false>)(w, x, n0, n1, out, out_stride);
  else
    (x->high ? matmul_tiles<kTrit, kTritChunk, true> : matmul_tiles<kTrit, kTritChunk, false>)(w, x, n0, n1, out,
                                                                                               out_stride);
}

}  // namespace lowbit
