// A stage of a row: some hundred columns decoded to one code a byte, for kernels that meet them with many tokens.
#ifndef LOWBIT_CPU_STAGE_AVX512_H
#define LOWBIT_CPU_STAGE_AVX512_H

#include "cpu/planes_avx512.h"

namespace lowbit {
namespace {

// Decodes planes [plane, plane + kCount) of a row to bytes; planes that the row does not store become zero codes.
// kWhole: it stores them all.
template <int kBits, int kCount, bool kWhole, int i = 0>
LOWBIT_INLINE void decode_planes(const uint8_t* row, int64_t plane, int64_t planes, uint8_t* to) {
  if constexpr (i < kCount) {
    const __m512i codes =
        kWhole || plane + i < planes ? peel<kBits, kCount, false, i>(row, plane, planes) : _mm512_setzero_si512();
    _mm512_store_si512(to + i * 64, codes);
    decode_planes<kBits, kCount, kWhole, i + 1>(row, plane, planes, to);
  }
}

// Columns [k, k + kStage) of a row to bytes; k is a multiple of kStage.
template <int kBits, int64_t kStage>
struct StageDecoder {
  LOWBIT_INLINE void decode(const uint8_t* row, int64_t cols, int64_t k, uint8_t* to) const {
    constexpr int kCount = int(kStage / 64);
    const int64_t plane = k / 64, planes = stored_planes<kBits>(cols);
    if (plane + kCount <= planes)
      decode_planes<kBits, kCount, true>(row, plane, planes, to);
    else
      decode_planes<kBits, kCount, false>(row, plane, planes, to);
  }
};

template <int64_t kStage>
struct StageDecoder<kTrit, kStage> {
  const TritDecoder trits;

  // Bytes beyond the row stay what they were: its digits are zero there.
  LOWBIT_INLINE void decode(const uint8_t* row, int64_t cols, int64_t k, uint8_t* to) const {
    constexpr int64_t kLineCodes = 64 * kTritPlanes, kMost = kStage / kLineCodes;
    const int64_t line = k / kLineCodes, lines = row_lines(kTrit, cols) - line;
    decode_trits(trits, row, line, lines < kMost ? lines : kMost, to);
  }
};

}  // namespace
}  // namespace lowbit
#endif
