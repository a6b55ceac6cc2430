// out[i,k] = s[n,g] * float(code[n,k] - zero[n,g]), n = ids[i], rounded once to fp32, fp16 or bf16, on AVX-512.
//
// Codes of up to 4 bits look their value up: the 16 values of a group are computed and rounded once, then a register of
// codes becomes 32 halves (vpermw) or 16 floats (vpermps). int8 computes them. Bags add the floats to a sum that stays in
// the cache: sum[j] = fma(weights[i], value, sum[j]), in packed order. A row is a plane of 64 codes at a time;
// the lines of the next row are prefetched meanwhile. Bound by the memory: the output is 4 to 8 times the codes.
#ifndef LOWBIT_CPU_GATHER_AVX512VNNI_H
#define LOWBIT_CPU_GATHER_AVX512VNNI_H

#include <math.h>
#include <string.h>

#include "cpu/halves_avx512.h"
#include "cpu/planes_avx512.h"

namespace lowbit {
namespace {

// Scale and zero of the group that holds the next 16 columns of a row, column by column. Fields of the matrix are
// copied: the compiler must take every store of a value for a change of them.
struct GroupCursor {
  const void* scales;
  const uint8_t* zeros;
  int64_t group_size, base, end;  // base: index of the current group's scale; end: first column beyond the group
  lowbit_dtype scale_dtype;
  float scale;
  int zero;

  LOWBIT_INLINE void load() {
    scale = _mm512_cvtss_f32(load_floats(scales, scale_dtype, base, 1));
    if (zeros) zero = zeros[base];
  }
  // At column k of a row: a multiple of 64.
  LOWBIT_INLINE GroupCursor(const lowbit_matrix* w, int64_t row, int64_t k)
      : scales(w->scales),
        zeros(w->zeros),
        group_size(w->group_size),
        base((w->scale_rows == 1 ? 0 : row) * w->scale_cols + (w->scale_cols == 1 ? 0 : k / w->group_size)),
        end(w->scale_cols == 1 ? INT64_MAX : (k / w->group_size + 1) * w->group_size),
        scale_dtype(w->scale_dtype),
        zero(middle_code(w->format)) {
    load();
  }
  // Moves to the group of column k < cols, k = the last column asked for + 16; true if it is another one.
  LOWBIT_INLINE bool advance(int64_t k) {
    if (k < end) return false;
    base++;
    end += group_size;
    load();
    return true;
  }
};

// Sixteen codes (one a 32-bit lane) to floats.
LOWBIT_INLINE __m512 decode(__m512i codes, const GroupCursor& at) {
  return _mm512_mul_ps(_mm512_set1_ps(at.scale),
                       _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(at.zero))));
}

LOWBIT_INLINE __m512 group_table(const GroupCursor& at) {
  return decode(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), at);
}

template <int i>
LOWBIT_INLINE __m128i codes16(__m512i codes) {
  return _mm512_extracti32x4_epi32(codes, i);
}

// What becomes of a row: it is written as floats or as 16-bit floats, or added to a sum, times its weight.
enum class Into { kFloats, kHalves, kSum };

// Writes 64 columns of one row, in packed order, to out[0..count). The tables of the groups live in the decoder.
template <int kBits, Into kInto>
struct RowDecoder {
  static constexpr bool kTable = kBits <= 4, kHalf = kInto == Into::kHalves;
  GroupCursor at;
  lowbit_dtype dtype;
  __m512 floats;   // kTable, fp32: the values of the current group
  __m512i halves;  // kTable, 16 bits: those of the groups of the next 16 and the following 16 columns
  __m512 weight;   // kSum

  LOWBIT_INLINE RowDecoder(const lowbit_matrix* w, int64_t row, int64_t k, lowbit_dtype dtype, float weight)
      : at(w, row, k),
        dtype(dtype),
        floats(group_table(at)),
        halves(_mm512_setzero_si512()),
        weight(_mm512_set1_ps(weight)) {
    if (kTable && kHalf) halves = _mm512_broadcast_i64x4(to_half(floats, dtype));
  }

  // 32 columns to 16-bit floats.
  LOWBIT_INLINE void half_block(__m256i codes, int64_t k, int64_t cols, uint16_t* out) {
    const __mmask32 mask = cols - k >= 32 ? 0xFFFFFFFFu : (1u << (cols - k)) - 1;
    __m512i values;
    if constexpr (kTable) {
      if (at.advance(k)) halves = _mm512_broadcast_i64x4(to_half(group_table(at), dtype));
      const __m512i index = _mm512_cvtepu8_epi16(codes);
      if (k + 16 < cols && at.advance(k + 16)) {
        const __m256i next = to_half(group_table(at), dtype);
        const __m512i both = _mm512_inserti64x4(halves, next, 1);
        // vpermw indices: 0-15 the first group, 16-31 the second, for the second half of the lanes.
        const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
        values = _mm512_permutexvar_epi16(_mm512_or_si512(index, second), both);
        halves = _mm512_broadcast_i64x4(next);
      } else {
        values = _mm512_permutexvar_epi16(index, halves);
      }
    } else {
      at.advance(k);
      const __m256i first = to_half(decode(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes)), at), dtype);
      if (k + 16 < cols) at.advance(k + 16);
      const __m256i next = to_half(decode(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1)), at), dtype);
      values = _mm512_inserti64x4(_mm512_castsi256_si512(first), next, 1);
    }
    _mm512_mask_storeu_epi16(out, mask, values);
  }

  // 16 columns of the current group to fp32.
  LOWBIT_INLINE __m512 values16(__m128i codes) const {
    const __m512i index = _mm512_cvtepu8_epi32(codes);
    return kTable ? _mm512_permutexvar_ps(index, floats) : decode(index, at);
  }

  LOWBIT_INLINE void store(float* to, __m512 value) const {
    _mm512_storeu_ps(to, kInto == Into::kSum ? _mm512_fmadd_ps(weight, value, _mm512_loadu_ps(to)) : value);
  }

  // 16 columns of the current group to 16-bit floats.
  LOWBIT_INLINE void store16(uint16_t* to, __m128i codes) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_half(values16(codes), dtype));
  }

  LOWBIT_INLINE void float_block(__m128i codes, int64_t k, int64_t cols, float* out) {
    if (at.advance(k) && kTable) floats = group_table(at);
    const __mmask16 mask = first_lanes(cols - k);
    __m512 value = values16(codes);
    if constexpr (kInto == Into::kSum) value = _mm512_fmadd_ps(weight, value, _mm512_maskz_loadu_ps(mask, out));
    _mm512_mask_storeu_ps(out, mask, value);
  }

  LOWBIT_INLINE void plane(__m512i codes, int64_t k, int64_t cols, void* out) {
    const bool moved = at.advance(k);
    if constexpr (kTable) {
      if (moved && kHalf) halves = _mm512_broadcast_i64x4(to_half(group_table(at), dtype));
      if (moved && !kHalf) floats = group_table(at);
    }
    const bool whole = k + 64 <= at.end && k + 64 <= cols;  // one group, no tail: nothing to ask in between
    if constexpr (kHalf) {
      uint16_t* to = static_cast<uint16_t*>(out);
      const __m256i first = _mm512_castsi512_si256(codes), second = _mm512_extracti64x4_epi64(codes, 1);
      if (kTable && whole) {
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(first), halves));
        _mm512_storeu_si512(to + 32, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(second), halves));
      } else if (whole) {
        store16(to, codes16<0>(codes));
        store16(to + 16, codes16<1>(codes));
        store16(to + 32, codes16<2>(codes));
        store16(to + 48, codes16<3>(codes));
      } else {
        half_block(first, k, cols, to);
        if (k + 32 < cols) half_block(second, k + 32, cols, to + 32);
      }
    } else {
      float* to = static_cast<float*>(out);
      if (whole) {
        store(to, values16(codes16<0>(codes)));
        store(to + 16, values16(codes16<1>(codes)));
        store(to + 32, values16(codes16<2>(codes)));
        store(to + 48, values16(codes16<3>(codes)));
      } else {
        float_block(codes16<0>(codes), k, cols, to);
        if (k + 16 < cols) float_block(codes16<1>(codes), k + 16, cols, to + 16);
        if (k + 32 < cols) float_block(codes16<2>(codes), k + 32, cols, to + 32);
        if (k + 48 < cols) float_block(codes16<3>(codes), k + 48, cols, to + 48);
      }
    }
  }
};

// One row, four planes at a time (five of trits); `next` is the row decoded after it, whose lines are fetched
// meanwhile. With perm the values of a plane are scattered to their original columns one by one.
template <int kBits, Into kInto, class Element>
struct RowGather {
  static constexpr int kPlanes = kBits == kTrit ? kTritPlanes : 4;
  const lowbit_matrix* w;
  RowDecoder<kBits, kInto> decoder;
  const uint8_t* codes;
  Element* out;

  // Planes [plane, plane + kPlanes), peeled from `from` (trits: from where they were decoded to).
  template <int i>
  LOWBIT_INLINE void planes(const uint8_t* from, int64_t plane) {
    if constexpr (i < kPlanes) {
      const int64_t k = (plane + i) * 64, cols = w->cols;
      if (k >= cols) return;
      const __m512i plane_codes = peel<kBits, 4, false, i>(from, kBits == kTrit ? 0 : plane, row_planes(cols));
      if (kInto == Into::kSum || !w->perm) {
        decoder.plane(plane_codes, k, cols, out + k);
      } else {
        alignas(64) Element values[64];
        decoder.plane(plane_codes, k, cols, values);
        for (int64_t j = 0; j < 64 && k + j < cols; j++) out[w->perm[k + j]] = values[j];
      }
      planes<i + 1>(from, plane);
    }
  }

  LOWBIT_INLINE void row(const uint8_t* next, int64_t row_bytes, int64_t plane_begin, int64_t plane_end) {
    if constexpr (kBits == kTrit) {
      const TritDecoder trits;
      alignas(64) uint8_t bytes[kTritPlanes * 64];
      for (int64_t line = plane_begin / kTritPlanes; line * kTritPlanes < plane_end; line++) {
        prefetch(next + line * kLineBytes);
        decode_trits(trits, codes, line, 1, bytes);
        planes<0>(bytes, line * kTritPlanes);
      }
    } else {
      for (int64_t plane = plane_begin; plane < plane_end; plane += 4) {
        // Four planes are 32 * kBits bytes; their lines may be begun by the block before.
        const int64_t begin = ceil_div(plane * 8 * kBits, kLineBytes) * kLineBytes;
        for (int64_t at = begin; at < (plane + 4) * 8 * kBits && at < row_bytes; at += kLineBytes) prefetch(next + at);
        planes<0>(codes, plane);
      }
    }
  }
};

LOWBIT_INLINE const uint8_t* next_row(const lowbit_matrix* w, const int64_t* ids, int64_t i, int64_t count,
                                      int64_t row_bytes) {
  return w->codes + (i + 1 < count && ids[i + 1] >= 0 ? ids[i + 1] : ids[i]) * row_bytes;
}

template <int kBits, Into kInto, class Element>
void gather_rows(const lowbit_matrix* w, const int64_t* ids, int64_t count, Element* out, lowbit_dtype dtype,
                 int64_t out_stride) {
  const int64_t row_bytes = row_lines(kBits, w->cols) * kLineBytes;
  for (int64_t i = 0; i < count; i++, out += out_stride) {
    if (ids[i] < 0) {
      memset(out, 0, size_t(w->cols) * sizeof(Element));
      continue;
    }
    RowGather<kBits, kInto, Element> gather = {w, RowDecoder<kBits, kInto>(w, ids[i], 0, dtype, 1.0f),
                                               w->codes + ids[i] * row_bytes, out};
    gather.row(next_row(w, ids, i, count, row_bytes), row_bytes, 0, row_planes(w->cols));
  }
}

template <int kBits>
LOWBIT_INLINE void gather(const lowbit_matrix* w, const int64_t* ids, int64_t count, void* out, lowbit_dtype dtype,
                          int64_t out_stride) {
  if (dtype == LOWBIT_F32)
    gather_rows<kBits, Into::kFloats>(w, ids, count, static_cast<float*>(out), dtype, out_stride);
  else
    gather_rows<kBits, Into::kHalves>(w, ids, count, static_cast<uint16_t*>(out), dtype, out_stride);
}

template <int kBits>
LOWBIT_INLINE void bags(const lowbit_matrix* w, const int64_t* ids, const float* weights, int64_t count,
                        int64_t plane_begin, int64_t plane_end, float* sum) {
  const int64_t row_bytes = row_lines(kBits, w->cols) * kLineBytes;
  for (int64_t i = 0; i < count; i++) {
    const float weight = weights ? weights[i] : 1.0f;
    if (ids[i] < 0) {
      for (int64_t k = plane_begin * 64; k < plane_end * 64; k++) sum[k] = fmaf(weight, 0.0f, sum[k]);
      continue;
    }
    RowGather<kBits, Into::kSum, float> gather = {
        w, RowDecoder<kBits, Into::kSum>(w, ids[i], plane_begin * 64, LOWBIT_F32, weight),
        w->codes + ids[i] * row_bytes, sum};
    gather.row(next_row(w, ids, i, count, row_bytes), row_bytes, plane_begin, plane_end);
  }
}

}  // namespace
}  // namespace lowbit
#endif
