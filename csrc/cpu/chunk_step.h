// The step of a chunk of activations from its largest magnitude: the one scalar part of docs/numerics.md that the
// vector kernels share.
#ifndef LOWBIT_CPU_CHUNK_STEP_H
#define LOWBIT_CPU_CHUNK_STEP_H

#include "cpu/float_types.h"
#include "cpu/inline.h"

namespace lowbit {
namespace {

struct ChunkStep {
  float step, inverse;  // v = round(x * inverse); inverse 0: every v is 0, whatever x is
};

// `largest`: the bits of max|x|, compared as integers so that a NaN counts as larger than infinity.
LOWBIT_INLINE ChunkStep chunk_step(uint32_t largest, bool two_digits) {
  if (largest >= 0x7F800000u) return {float_from_bits(0x7FC00000u), 0};
  if (largest < (127u - 100) << 23) return {0, 0};
  if (!two_digits) {
    const float a = float_from_bits(largest);
    return {a / 127.0f, 127.0f / a};
  }
  // 2^(f-14), twice that if a > 32639 * 2^(f-14): 32639 = 2^14 + 16255, whose last bit is bit 9 of the mantissa.
  const uint32_t exponent = (largest >> 23) - 14 + ((largest & 0x7FFFFFu) > 16255u << 9);
  return {float_from_bits(exponent << 23), float_from_bits((254 - exponent) << 23)};
}

}  // namespace
}  // namespace lowbit
#endif
