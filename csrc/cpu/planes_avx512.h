// Lines to registers on AVX-512: plane p of a row as 64 codes, one a byte, and 16 scales or zeros of a row as lanes.
// Everything here is in an unnamed namespace, so no copy compiled for AVX-512 can be linked into another file.
#ifndef LOWBIT_CPU_PLANES_AVX512_H
#define LOWBIT_CPU_PLANES_AVX512_H

#include <immintrin.h>

#include "cpu/inline.h"
#include "cpu/kernel.h"
#include "cpu/prefetch.h"

namespace lowbit {
namespace {

// The 64 codes of plane `plane + i` of a row of `planes` planes. Loops walk a row in blocks of kBlock planes (4, 8, 16
// or 32; `plane` is a multiple of it) and i is a constant once they are unrolled, so planes of one line share its load.
// kFetch: the line `ahead` of this one is asked for. The last int3 group of a row may lack its second low line.
// kTrit: `row` is where decode_trits has put the row's codes, one a byte.
template <int kBits, int kBlock, bool kFetch, int i>
LOWBIT_INLINE __m512i peel(const uint8_t* row, int64_t plane, int64_t planes, Ahead ahead = {}) {
  if constexpr (kBits == 8 || kBits == kTrit) {
    const uint8_t* line = row + plane * 64 + i * 64;
    if (kFetch) prefetch(line, ahead);
    return _mm512_loadu_si512(line);
  } else if constexpr (kBits == 4) {
    const uint8_t* line = row + plane * 32 + i / 2 * 64;
    if (kFetch && i % 2 == 0) prefetch(line, ahead);
    const __m512i v = _mm512_loadu_si512(line);
    return _mm512_and_si512(i % 2 ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
  } else if constexpr (kBits == 2) {
    const uint8_t* line = row + plane * 16 + i / 4 * 64;
    if (kFetch && i % 4 == 0) prefetch(line, ahead);
    const __m512i v = _mm512_loadu_si512(line);
    return _mm512_and_si512(i % 4 ? _mm512_srli_epi16(v, i % 4 * 2) : v, _mm512_set1_epi8(3));
  } else {
    // Blocks of 4 planes are half a group of three lines: which half is known at run time only.
    constexpr bool kHalf = kBlock < 8;
    const int64_t group = kHalf ? plane / 8 * 8 : plane + i / 8 * 8;
    const int j = kHalf ? int(plane / 4 % 2) : i % 8 / 4;
    const uint8_t* lines = kHalf ? row + plane / 8 * 192 : row + plane * 24 + i / 8 * 192;
    const uint8_t* high_line = lines + (planes - group < 5 ? 64 : 128);
    if (kFetch && i % 4 == 0) prefetch(lines + j * 64, ahead);
    if (kFetch && i % 8 == 0 && j == 0) prefetch(high_line, ahead);
    const __m512i low = _mm512_loadu_si512(lines + j * 64);
    __m512i high = _mm512_loadu_si512(high_line);
    // The high bits of line 1 lie two below those of line 0: bits 2, 3, 6, 7 now belong to planes 0, 1, 2, 3.
    high = kHalf ? _mm512_sll_epi16(high, _mm_cvtsi32_si128(2 * j)) : j ? _mm512_slli_epi16(high, 2) : high;
    // Per nibble: two low bits from one, the rest from the other (0xCA selects: mask ? low : high). The even planes
    // lie in place; for the odd ones the low bits come down by two, the high bit by one.
    const __m512i pairs = _mm512_set1_epi8(0x33);
    const __m512i codes =
        i % 2 == 0 ? _mm512_ternarylogic_epi32(pairs, low, high, 0xCA)
                   : _mm512_ternarylogic_epi32(pairs, _mm512_srli_epi16(low, 2), _mm512_srli_epi16(high, 1), 0xCA);
    return _mm512_and_si512(i % 4 >= 2 ? _mm512_srli_epi16(codes, 4) : codes, _mm512_set1_epi8(7));
  }
}

// A line of trits to its five planes. A byte b is a fraction of 256 whose base-3 digits are wanted (formats.h): the
// high byte of 27 * b is 9*d0 + 3*d1 + d2, and that of 9 * (27 * b mod 256) is 3*d3 + d4; two look-ups of each, three
// and two digits. vpmaddubsw multiplies the even bytes, then the odd ones.
struct TritDecoder {
  static constexpr int kScales = 1;  // see ScaledTritDecoder
  static constexpr int scale(int) { return 0; }

  __m512i digits[kTritPlanes], high_bytes, even27, odd27, nine;

  LOWBIT_INLINE TritDecoder() {
    alignas(64) uint8_t table[kTritPlanes][64] = {}, index[64];
    for (int a = 0; a < 27; a++) {
      table[0][a] = uint8_t(a / 9), table[1][a] = uint8_t(a / 3 % 3), table[2][a] = uint8_t(a % 3);
      table[3][a] = uint8_t(a / 3 % 3), table[4][a] = uint8_t(a % 3);  // of 9 numbers only
    }
    for (int i = 0; i < 64; i++) index[i] = uint8_t((i & 15) | 1);
    for (int p = 0; p < kTritPlanes; p++) digits[p] = _mm512_load_si512(table[p]);
    high_bytes = _mm512_load_si512(index);
    even27 = _mm512_set1_epi16(27), odd27 = _mm512_set1_epi16(27 << 8), nine = _mm512_set1_epi16(9);
  }

  LOWBIT_INLINE void decode(__m512i line, __m512i (&planes)[kTritPlanes]) const {
    const __m512i even = _mm512_maddubs_epi16(line, even27), odd = _mm512_maddubs_epi16(line, odd27);
    const __m512i even_rest = _mm512_maddubs_epi16(even, nine), odd_rest = _mm512_maddubs_epi16(odd, nine);
    const __mmask64 evens = 0x5555555555555555u;
    const __m512i three = _mm512_mask_shuffle_epi8(odd, evens, even, high_bytes);
    const __m512i two = _mm512_mask_shuffle_epi8(odd_rest, evens, even_rest, high_bytes);
    for (int p = 0; p < 3; p++) planes[p] = _mm512_permutexvar_epi8(three, digits[p]);
    for (int p = 3; p < kTritPlanes; p++) planes[p] = _mm512_permutexvar_epi8(two, digits[p]);
  }
};

// The last four digits of every byte, two bits each.
struct LastDigits {
  alignas(64) uint8_t of[256] = {};
  constexpr LastDigits() {
    for (int byte = 0; byte < 256; byte++) {
      const int q = trit_number(byte) % 81;
      of[byte] = uint8_t(q / 27 << 6 | q / 9 % 3 << 4 | q / 3 % 3 << 2 | q % 3);
    }
  }
};
constexpr LastDigits kLastDigits;

// Decodes a line to planes times 4^scale(plane): one operation more than TritDecoder needs, but most are of the kind that
// each of Zen 4's four pipes does, while vpmaddubsw shares the two of vpdpbusd (measured: a line 12 cycles with its 5
// products, where it took 15).
struct ScaledTritDecoder {
  static constexpr int kScales = 4;
  static constexpr int scale(int plane) { return plane == 0 ? 3 : 4 - plane; }

  __m512i last[4], fields[kScales];  // fields: the bits that have a factor

  LOWBIT_INLINE ScaledTritDecoder() {
    for (int i = 0; i < 4; i++) last[i] = _mm512_load_si512(kLastDigits.of + 64 * i);
    for (int i = 0; i < kScales; i++) fields[i] = _mm512_set1_epi8(int8_t(3 << 2 * i));
    for (auto& r : last) asm("" : "+v"(r));  // stay in registers: gcc 12 would load half of them for every line
    for (auto& f : fields) asm("" : "+v"(f));
  }

  LOWBIT_INLINE void decode(__m512i line, __m512i (&planes)[kTritPlanes]) const {
    const __m512i below = _mm512_permutex2var_epi8(last[0], line, last[1]);
    const __m512i above = _mm512_permutex2var_epi8(last[2], line, last[3]);
    const __m512i four = _mm512_mask_blend_epi8(_mm512_movepi8_mask(line), below, above);
    for (int p = 1; p < kTritPlanes; p++) planes[p] = _mm512_and_si512(four, fields[scale(p)]);
    // The first digit is 3 * byte / 256: the first two bits of 3/4 of the byte. Averages round up, hence the 1.
    const __m512i b = _mm512_subs_epu8(line, _mm512_set1_epi8(1));
    const __m512i three_quarters = _mm512_avg_epu8(_mm512_avg_epu8(b, _mm512_setzero_si512()), b);
    planes[0] = _mm512_and_si512(three_quarters, fields[scale(0)]);
  }
};

// Lines [line, line + count) of a row to one code a byte.
LOWBIT_INLINE void decode_trits(const TritDecoder& trits, const uint8_t* row, int64_t line, int64_t count,
                                uint8_t* to) {
  for (int64_t i = 0; i < count; i++) {
    __m512i planes[kTritPlanes];
    trits.decode(_mm512_loadu_si512(row + (line + i) * kLineBytes), planes);
    for (int p = 0; p < kTritPlanes; p++) _mm512_store_si512(to + (i * kTritPlanes + p) * 64, planes[p]);
  }
}

LOWBIT_INLINE void decode_trits(const uint8_t* row, int64_t line, int64_t count, uint8_t* to) {
  decode_trits(TritDecoder(), row, line, count, to);
}

// The planes of a row whose lines exist: a plane beyond them must not be peeled (trits: that hold columns of the
// matrix).
template <int kBits>
LOWBIT_INLINE int64_t stored_planes(int64_t cols) {
  constexpr int64_t kTogether = kBits == 8 || kBits == kTrit ? 1 : kBits == 4 ? 2 : 4;
  return ceil_div(row_planes(cols), kTogether) * kTogether;
}

LOWBIT_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xFFFF) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

// scales[at + j] as fp32 in lane j, 0 where the mask is.
LOWBIT_INLINE __m512 load_floats(const void* from, lowbit_dtype dtype, int64_t at, __mmask16 mask) {
  if (dtype == LOWBIT_F16)
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at));
  if (dtype == LOWBIT_BF16)
    return _mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at)), 16));
  return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + at);
}

LOWBIT_INLINE __m512i load_bytes(const uint8_t* from, __mmask16 mask) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from));
}

// Scales and zeros of 16 consecutive chunks of one row, chunk c in lane c % 16; `per_group` chunks share a group.
// Lanes beyond the last chunk hold some scale of the row or 0: their chunk sums and steps are 0.
struct ChunkGrid {
  const lowbit_matrix* w;
  uint32_t per_group;

  LOWBIT_INLINE ChunkGrid(const lowbit_matrix* w, int64_t chunk)
      : w(w), per_group(w->scale_cols == 1 ? 1 : uint32_t(w->group_size / chunk)) {}

  // Lane j: (c + j) / per_group - c / per_group. In fp32: exact, since (c % per_group + j + 1/2) / per_group is at
  // least 1/2 / per_group away from an integer and the error below 2^-19.
  LOWBIT_INLINE __m512i lanes(int64_t c) const {
    const __m512 iota = _mm512_setr_ps(.5f, 1.5f, 2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f, 8.5f, 9.5f, 10.5f, 11.5f, 12.5f,
                                       13.5f, 14.5f, 15.5f);
    const __m512 position = _mm512_add_ps(iota, _mm512_set1_ps(float(uint32_t(c) % per_group)));
    return _mm512_cvttps_epi32(_mm512_div_ps(position, _mm512_set1_ps(float(per_group))));
  }

  LOWBIT_INLINE __m512 scales(int64_t row, int64_t c) const {
    const int64_t base = (w->scale_rows == 1 ? 0 : row) * w->scale_cols;
    if (w->scale_cols == 1)
      return _mm512_broadcastss_ps(_mm512_castps512_ps128(load_floats(w->scales, w->scale_dtype, base, 1)));
    const int64_t g = per_group == 1 ? c : uint32_t(c) / per_group;
    const __m512 s = load_floats(w->scales, w->scale_dtype, base + g, first_lanes(w->scale_cols - g));
    return per_group == 1 ? s : _mm512_permutexvar_ps(lanes(c), s);
  }

  LOWBIT_INLINE __m512i zeros(int64_t row, int64_t c) const {
    const int64_t base = (w->scale_rows == 1 ? 0 : row) * w->scale_cols;
    if (w->scale_cols == 1) return _mm512_set1_epi32(w->zeros[base]);
    const int64_t g = per_group == 1 ? c : uint32_t(c) / per_group;
    const __m512i z = load_bytes(w->zeros + base + g, first_lanes(w->scale_cols - g));
    return per_group == 1 ? z : _mm512_permutexvar_epi32(lanes(c), z);
  }
};

}  // namespace
}  // namespace lowbit
#endif
