// x[m,k] ~ step[m,c] * (256*high + low) on AVX2: activations to int8 digits per token and chunk (docs/numerics.md).
//
// A piece of 16 to 128 columns becomes fp32 in L1 with its largest magnitude, then digits and their sum, 16 columns at
// a time. Tiles go through 16 rows of digits in L1 and 8x8 transpositions of dwords. K*M of it against the N*K*M of the
// product.
#include "cpu/chunk_step.h"
#include "cpu/planes_avx2.h"

namespace lowbit {
namespace {

const void* token(const void* x, lowbit_dtype dtype, int64_t stride, int64_t m) {
  return static_cast<const char*>(x) + m * stride * (dtype == LOWBIT_F32 ? 4 : 2);
}

// Columns [k, k + count) of a token as fp32, zero beyond cols; column j lies at perm[j].
LOWBIT_INLINE void load_piece(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t k, int64_t cols,
                              int count, float* to) {
  int i = 0;
  if (!perm)
    for (; i + 8 <= count && k + i + 8 <= cols; i += 8) _mm256_store_ps(to + i, load_floats(x, dtype, k + i));
  for (; i < count; i++) to[i] = k + i < cols ? load_float_at(x, dtype, perm ? perm[k + i] : k + i) : 0;
}

LOWBIT_INLINE __m128i pack_bytes(__m256i a, __m256i b) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xD8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

LOWBIT_INLINE int32_t largest_lane(__m256i lanes) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

// The bits of the largest magnitude of `count` columns in L1.
LOWBIT_INLINE uint32_t largest_in(const float* v, int64_t count) {
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i bits = _mm256_castps_si256(_mm256_load_ps(v + i));
    largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)));
  }
  return uint32_t(largest_lane(largest));
}

// The same of columns [begin, end) of a token.
uint32_t largest_of(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t begin, int64_t end) {
  alignas(32) float v[kPiece];
  uint32_t largest = 0;
  for (int64_t k = begin; k < end; k += kPiece) {
    load_piece(x, dtype, perm, k, end, int(kPiece), v);
    const uint32_t here = largest_in(v, kPiece);
    largest = here > largest ? here : largest;
  }
  return largest;
}

// Digits of columns [k, k + count), at most 128, with a given step (`given`) or their own. Adds to *sum.
LOWBIT_INLINE ChunkStep quantize_piece(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t k, int64_t cols,
                                       int count, const ChunkStep* given, int8_t* high, int8_t* low, int32_t* sum) {
  alignas(32) float v[kPiece];
  load_piece(x, dtype, perm, k, cols, count, v);
  const ChunkStep s = given ? *given : chunk_step(largest_in(v, count), high != nullptr);
  if (s.inverse == 0) {
    memset(low, 0, size_t(count));
    if (high) memset(high, 0, size_t(count));
    return s;
  }
  const __m256 inverse = _mm256_set1_ps(s.inverse);
  __m256i total = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 16) {
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v + i), inverse));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v + i + 8), inverse));
    total = _mm256_add_epi32(total, _mm256_add_epi32(a, b));
    const __m128i low_bytes =
        pack_bytes(_mm256_srai_epi32(_mm256_slli_epi32(a, 24), 24), _mm256_srai_epi32(_mm256_slli_epi32(b, 24), 24));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), low_bytes);
    if (high) {
      const __m256i half = _mm256_set1_epi32(128);
      const __m128i high_bytes =
          pack_bytes(_mm256_srai_epi32(_mm256_add_epi32(a, half), 8), _mm256_srai_epi32(_mm256_add_epi32(b, half), 8));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), high_bytes);
    }
  }
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  *sum += _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
  return s;
}

void quantize_row(const void* x, lowbit_dtype dtype, const int32_t* perm, int64_t m, const Activations* out) {
  walk_row(
      *out, m,
      [&](int64_t k, int count, const ChunkStep* given, int8_t* high, int8_t* low, int32_t* sum) {
        return quantize_piece(x, dtype, perm, k, out->cols, count, given, high, low, sum);
      },
      [&](int64_t begin, int64_t end) { return largest_of(x, dtype, perm, begin, end); });
}

// 8 dwords of 8 rows, rows 128 bytes apart, to column after column, 64 bytes apart.
LOWBIT_INLINE void transpose(const int8_t* from, int8_t* to) {
  __m256i a[8], b[8];
  for (int r = 0; r < 8; r++) a[r] = load32(from + r * 128);
  for (int r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    a[r] = _mm256_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm256_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm256_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm256_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  // a[i] and a[4 + i]: dword i (low half) and 4 + i (high half) of rows 0-3 and 4-7.
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * 64), _mm256_permute2x128_si256(a[i], a[4 + i], 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (4 + i) * 64), _mm256_permute2x128_si256(a[i], a[4 + i], 0x31));
  }
}

// `count` columns of 16 rows of digits to [k/4][row][k%4].
LOWBIT_INLINE void interleave(const int8_t (*from)[128], int count, int8_t* to) {
  alignas(32) int8_t lines[8 * 64];
  for (int k = 0; k < count; k += 32) {
    for (int r = 0; r < kLanes; r += 8) transpose(from[r] + k, lines + r * 4);
    memcpy(to + k * kLanes, lines, size_t(count - k < 32 ? count - k : 32) * kLanes);
  }
}

void quantize_tile(const void* x, lowbit_dtype dtype, int64_t stride, const int32_t* perm, int64_t m, int tokens,
                   const Activations* out) {
  alignas(32) int8_t high_rows[kLanes][128] = {}, low_rows[kLanes][128] = {};
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
    interleave(low_rows, int(piece), low + k * kLanes);
    if (high) interleave(high_rows, int(piece), high + k * kLanes);
  }
  memset(low + k * kLanes, 0, size_t((a.cols_padded - k) * kLanes));
  if (high) memset(high + k * kLanes, 0, size_t((a.cols_padded - k) * kLanes));
}

}  // namespace

void activations__avx2(const void* x, lowbit_dtype dtype, int64_t stride, const int32_t* perm, int64_t m0, int64_t m1,
                       const Activations* out) {
  if (out->layout == Activations::kRows) {
    for (int64_t m = m0; m < m1; m++) quantize_row(token(x, dtype, stride, m), dtype, perm, m, out);
  } else {
    for (int64_t m = m0; m < m1; m += kLanes)
      quantize_tile(x, dtype, stride, perm, m, int(m1 - m < kLanes ? m1 - m : kLanes), out);
  }
}

}  // namespace lowbit
