// Where the planes of a row are peeled from: the row itself, or for trits a stage of it, decoded to bytes in L1.
// Included after the planes_*.h of an ISA, whose decode_trits it calls.
#ifndef LOWBIT_CPU_ROW_CODES_H
#define LOWBIT_CPU_ROW_CODES_H

#include "cpu/inline.h"
#include "cpu/kernel.h"

namespace lowbit {
namespace {

template <int kBits>
struct RowCodes {
  // The operands of peel for planes from `plane` on of a row of `planes`: where they lie, which they are there, and how
  // many there are.
  LOWBIT_INLINE void seek(const uint8_t* row, int64_t plane, int64_t planes, const uint8_t** from, int64_t* at,
                          int64_t* end) {
    *from = row, *at = plane, *end = planes;
  }
};

template <>
struct RowCodes<kTrit> {
  static constexpr int64_t kStage = 160;  // planes: whole lines, and whole blocks of every size
  alignas(64) uint8_t bytes[kStage * 64];

  LOWBIT_INLINE void seek(const uint8_t* row, int64_t plane, int64_t planes, const uint8_t** from, int64_t* at,
                          int64_t* end) {
    const int64_t stage = plane / kStage * kStage, count = planes - stage < kStage ? planes - stage : kStage;
    if (plane == stage) decode_trits(row, stage / kTritPlanes, ceil_div(count, kTritPlanes), bytes);
    *from = bytes, *at = plane - stage, *end = count;
  }
};

}  // namespace
}  // namespace lowbit
#endif
