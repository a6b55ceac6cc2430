// out[i,k] = s[n,g] * float(code[n,k] - zero[n,g]), n = ids[i], rounded once to fp32, fp16 or bf16, on AVX2.
//
// To 16 bits, codes of up to 4 bits look their value up: the 16 values of a group are computed and rounded once, their
// low and high bytes become two vpshufb tables. Everything else is computed. Bags add the floats to a sum that stays in
// the cache: sum[j] = fma(weights[i], value, sum[j]), in packed order. A row is a plane of 64 codes at a time;
// the lines of the next row are prefetched meanwhile. Bound by the memory: the output is 4 to 8 times the codes.
#ifndef LOWBIT_CPU_GATHER_AVX2_H
#define LOWBIT_CPU_GATHER_AVX2_H

#include <math.h>

#include "cpu/halves_avx2.h"
#include "cpu/planes_avx2.h"

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
    scale = load_float_at(scales, scale_dtype, base);
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

// Eight codes (bytes in the low half) to floats.
LOWBIT_INLINE __m256 decode(__m128i codes, const GroupCursor& at) {
  const __m256i offset = _mm256_sub_epi32(_mm256_cvtepu8_epi32(codes), _mm256_set1_epi32(at.zero));
  return _mm256_mul_ps(_mm256_set1_ps(at.scale), _mm256_cvtepi32_ps(offset));
}

// Low and high bytes of the 16-bit values of the 16 codes of a group.
struct ByteTables {
  __m128i low, high;

  LOWBIT_INLINE ByteTables(const GroupCursor& at, lowbit_dtype dtype) {
    const __m128i a = to_half(decode(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0), at), dtype);
    const __m128i b = to_half(decode(_mm_setr_epi8(8, 9, 10, 11, 12, 13, 14, 15, 0, 0, 0, 0, 0, 0, 0, 0), at), dtype);
    const __m128i byte = _mm_set1_epi16(255);
    low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
    high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  }
};

// What becomes of a row: it is written as floats or as 16-bit floats, or added to a sum, times its weight.
enum class Into { kFloats, kHalves, kSum };

// Writes planes of one row, in packed order and in full; columns beyond cols get the values of the last group.
template <int kBits, Into kInto>
struct RowDecoder {
  static constexpr bool kHalf = kInto == Into::kHalves, kTable = kBits <= 4 && kHalf;
  GroupCursor at;
  lowbit_dtype dtype;
  ByteTables tables;  // kTable: of the current group
  __m256 weight;      // kSum

  LOWBIT_INLINE RowDecoder(const lowbit_matrix* w, int64_t row, int64_t k, lowbit_dtype dtype, float weight)
      : at(w, row, k), dtype(dtype), tables(at, dtype), weight(_mm256_set1_ps(weight)) {}

  LOWBIT_INLINE void move(int64_t k, int64_t cols) {
    if (k < cols && at.advance(k) && kTable) tables = ByteTables(at, dtype);
  }

  LOWBIT_INLINE void store(float* to, __m256 value) const {
    _mm256_storeu_ps(to, kInto == Into::kSum ? _mm256_fmadd_ps(weight, value, _mm256_loadu_ps(to)) : value);
  }

  // 16 columns.
  LOWBIT_INLINE void sixteen(__m128i codes, int64_t k, int64_t cols, void* out) {
    move(k, cols);
    if constexpr (kHalf) {
      __m128i* to = static_cast<__m128i*>(out);
      if constexpr (kTable) {
        const __m128i low = _mm_shuffle_epi8(tables.low, codes), high = _mm_shuffle_epi8(tables.high, codes);
        _mm_storeu_si128(to, _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(low, high));
      } else {
        _mm_storeu_si128(to, to_half(decode(codes, at), dtype));
        _mm_storeu_si128(to + 1, to_half(decode(_mm_srli_si128(codes, 8), at), dtype));
      }
    } else {
      float* to = static_cast<float*>(out);
      store(to, decode(codes, at));
      store(to + 8, decode(_mm_srli_si128(codes, 8), at));
    }
  }
};

// One row, four planes at a time; `next` is the row decoded after it, whose lines are fetched meanwhile. With perm the
// values of a plane are scattered to their original columns one by one.
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
      const int64_t first = kBits == kTrit ? 0 : plane;
      const __m256i a = peel<kBits, 4, false, i, 0>(from, first, row_planes(cols));
      const __m256i b = peel<kBits, 4, false, i, 1>(from, first, row_planes(cols));
      alignas(32) Element values[64];
      const bool aside = kInto != Into::kSum && (w->perm || k + 64 > cols);  // a sum has room for whole planes
      Element* to = aside ? values : out + k;
      decoder.sixteen(_mm256_castsi256_si128(a), k, cols, to);
      decoder.sixteen(_mm256_extracti128_si256(a, 1), k + 16, cols, to + 16);
      decoder.sixteen(_mm256_castsi256_si128(b), k + 32, cols, to + 32);
      decoder.sixteen(_mm256_extracti128_si256(b, 1), k + 48, cols, to + 48);
      if (aside && w->perm) {
        for (int64_t j = 0; j < 64 && k + j < cols; j++) out[w->perm[k + j]] = values[j];
      } else if (aside) {
        memcpy(out + k, values, size_t(cols - k) * sizeof(Element));
      }
      planes<i + 1>(from, plane);
    }
  }

  LOWBIT_INLINE void row(const uint8_t* next, int64_t row_bytes, int64_t plane_begin, int64_t plane_end) {
    if constexpr (kBits == kTrit) {
      alignas(32) uint8_t bytes[kTritPlanes * 64];
      for (int64_t line = plane_begin / kTritPlanes; line * kTritPlanes < plane_end; line++) {
        prefetch(next + line * kLineBytes);
        decode_trits(codes, line, 1, bytes);
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
