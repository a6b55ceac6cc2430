// Lines to registers on AVX2: half a plane of a row (32 codes, one a byte), and 8 scales or zeros of a row as lanes.
// Everything here is in an unnamed namespace, so no copy compiled for AVX2 can be linked into another file.
#ifndef LOWBIT_CPU_PLANES_AVX2_H
#define LOWBIT_CPU_PLANES_AVX2_H

#include <immintrin.h>
#include <string.h>

#include "cpu/inline.h"
#include "cpu/kernel.h"
#include "cpu/prefetch.h"

namespace lowbit {
namespace {

LOWBIT_INLINE __m256i load32(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// Codes [32h, 32h + 32) of plane `plane + i` of a row of `planes` planes; see planes_avx512.h for the arguments.
template <int kBits, int kBlock, bool kFetch, int i, int h>
LOWBIT_INLINE __m256i peel(const uint8_t* row, int64_t plane, int64_t planes, Ahead ahead = {}) {
  if constexpr (kBits == 8 || kBits == kTrit) {
    const uint8_t* line = row + plane * 64 + i * 64;
    if (kFetch && h == 0) prefetch(line, ahead);
    return load32(line + 32 * h);
  } else if constexpr (kBits == 4) {
    const uint8_t* line = row + plane * 32 + i / 2 * 64;
    if (kFetch && h == 0 && i % 2 == 0) prefetch(line, ahead);
    const __m256i v = load32(line + 32 * h);
    return _mm256_and_si256(i % 2 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
  } else if constexpr (kBits == 2) {
    const uint8_t* line = row + plane * 16 + i / 4 * 64;
    if (kFetch && h == 0 && i % 4 == 0) prefetch(line, ahead);
    const __m256i v = load32(line + 32 * h);
    return _mm256_and_si256(i % 4 ? _mm256_srli_epi16(v, i % 4 * 2) : v, _mm256_set1_epi8(3));
  } else {
    // Blocks of 4 planes are half a group of three lines: which half is known at run time only.
    constexpr bool kHalf = kBlock < 8;
    const int64_t group = kHalf ? plane / 8 * 8 : plane + i / 8 * 8;
    const int j = kHalf ? int(plane / 4 % 2) : i % 8 / 4;
    const uint8_t* lines = kHalf ? row + plane / 8 * 192 : row + plane * 24 + i / 8 * 192;
    const uint8_t* high_line = lines + (planes - group < 5 ? 64 : 128);
    if (kFetch && h == 0 && i % 4 == 0) prefetch(lines + j * 64, ahead);
    if (kFetch && h == 0 && i % 8 == 0 && j == 0) prefetch(high_line, ahead);
    const __m256i low = load32(lines + j * 64 + 32 * h);
    __m256i high = load32(high_line + 32 * h);
    // The high bits of line 1 lie two below those of line 0: bits 2, 3, 6, 7 now belong to planes 0, 1, 2, 3.
    high = kHalf ? _mm256_sll_epi16(high, _mm_cvtsi32_si128(2 * j)) : j ? _mm256_slli_epi16(high, 2) : high;
    // Per nibble: two low bits from one, the rest from the other. The even planes lie in place; for the odd ones the
    // low bits come down by two, the high bit by one.
    const __m256i codes =
        i % 2 == 0 ? _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(0x33)),
                                     _mm256_andnot_si256(_mm256_set1_epi8(0x33), high))
                   : _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 2), _mm256_set1_epi8(0x33)),
                                     _mm256_andnot_si256(_mm256_set1_epi8(0x33), _mm256_srli_epi16(high, 1)));
    return _mm256_and_si256(i % 4 >= 2 ? _mm256_srli_epi16(codes, 4) : codes, _mm256_set1_epi8(7));
  }
}

// Lines [line, line + count) of a row of trits to one code a byte. A digit is how many of the thirds of 256 its byte
// has passed, 3 * b mod 256 the byte of the rest (formats.h); bytes are compared as signed ones, 128 lower.
LOWBIT_INLINE void decode_trits(const uint8_t* row, int64_t line, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i++)
    for (int h = 0; h < 2; h++) {
      __m256i rest = _mm256_xor_si256(load32(row + (line + i) * kLineBytes + 32 * h), _mm256_set1_epi8(-128));
      for (int p = 0; p < kTritPlanes; p++) {
        const __m256i first = _mm256_cmpgt_epi8(rest, _mm256_set1_epi8(85 - 128));
        const __m256i second = _mm256_cmpgt_epi8(rest, _mm256_set1_epi8(170 - 128));
        const __m256i digit = _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(first, second));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + (i * kTritPlanes + p) * 64 + 32 * h), digit);
        rest = _mm256_add_epi8(rest, _mm256_add_epi8(rest, rest));
      }
    }
}

// The planes of a row whose lines exist: a plane beyond them must not be peeled (trits: that hold columns of the
// matrix).
template <int kBits>
LOWBIT_INLINE int64_t stored_planes(int64_t cols) {
  constexpr int64_t kTogether = kBits == 8 || kBits == kTrit ? 1 : kBits == 4 ? 2 : 4;
  return ceil_div(row_planes(cols), kTogether) * kTogether;
}

// from[at .. at + 8) as fp32.
LOWBIT_INLINE __m256 load_floats(const void* from, lowbit_dtype dtype, int64_t at) {
  if (dtype == LOWBIT_F32) return _mm256_loadu_ps(static_cast<const float*>(from) + at);
  const uint16_t* halves = static_cast<const uint16_t*>(from) + at;
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves));
  return dtype == LOWBIT_F16 ? _mm256_cvtph_ps(h)
                             : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

LOWBIT_INLINE float load_float_at(const void* from, lowbit_dtype dtype, int64_t at) {
  float lanes[8] = {};
  memcpy(lanes, static_cast<const char*>(from) + at * (dtype == LOWBIT_F32 ? 4 : 2), dtype == LOWBIT_F32 ? 4 : 2);
  return _mm256_cvtss_f32(load_floats(lanes, dtype, 0));
}

// Scales and zeros of 8 consecutive chunks of one row, chunk c in lane c % 8; `per_group` chunks share a group.
// Lanes beyond the last chunk hold some scale of the row or 0: their chunk sums and steps are 0.
struct ChunkGrid {
  const lowbit_matrix* w;
  uint32_t per_group;

  LOWBIT_INLINE ChunkGrid(const lowbit_matrix* w, int64_t chunk)
      : w(w), per_group(w->scale_cols == 1 ? 1 : uint32_t(w->group_size / chunk)) {}

  LOWBIT_INLINE int64_t base(int64_t row) const { return (w->scale_rows == 1 ? 0 : row) * w->scale_cols; }

  // Elements g(c) .. g(c + 7) of a row of scales or zeros, one by one; 0 beyond the row.
  template <class Element>
  LOWBIT_INLINE void spread(const void* from, int64_t row, int64_t c, Element* lanes) const {
    int64_t g = c / per_group, inside = c % per_group;
    for (int j = 0; j < 8; j++) {
      lanes[j] = g < w->scale_cols ? static_cast<const Element*>(from)[base(row) + g] : Element(0);
      if (++inside == int64_t(per_group)) inside = 0, g++;
    }
  }

  // Apart from the loops, which would otherwise hold dozens of copies.
  __attribute__((noinline)) __m256 spread_scales(int64_t row, int64_t c) const {
    float floats[8];
    uint16_t halves[8];
    if (w->scale_dtype == LOWBIT_F32)
      spread(w->scales, row, c, floats);
    else
      spread(w->scales, row, c, halves);
    return load_floats(w->scale_dtype == LOWBIT_F32 ? static_cast<const void*>(floats) : halves, w->scale_dtype, 0);
  }

  __attribute__((noinline)) __m256i spread_zeros(int64_t row, int64_t c) const {
    uint8_t lanes[8];
    spread(w->zeros, row, c, lanes);
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes)));
  }

  LOWBIT_INLINE __m256 scales(int64_t row, int64_t c) const {
    if (w->scale_cols == 1) return _mm256_set1_ps(load_float_at(w->scales, w->scale_dtype, base(row)));
    if (per_group != 1 || c + 8 > w->scale_cols) return spread_scales(row, c);
    return load_floats(w->scales, w->scale_dtype, base(row) + c);
  }

  LOWBIT_INLINE __m256i zeros(int64_t row, int64_t c) const {
    if (w->scale_cols == 1) return _mm256_set1_epi32(w->zeros[base(row)]);
    if (per_group != 1 || c + 8 > w->scale_cols) return spread_zeros(row, c);
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(w->zeros + base(row) + c)));
  }
};

}  // namespace
}  // namespace lowbit
#endif
