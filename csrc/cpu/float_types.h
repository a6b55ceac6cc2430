// fp16 and bf16 by integer arithmetic: the definition that vcvtph2ps, vcvtps2ph and the vector bf16 code agree with.
// All roundings are to nearest even; NaN stays NaN (quieted, payload truncated).
#ifndef LOWBIT_CPU_FLOAT_TYPES_H
#define LOWBIT_CPU_FLOAT_TYPES_H

#include <stdint.h>
#include <string.h>

#include "lowbit/lowbit.h"

namespace lowbit {
namespace {  // internal linkage: these headers are compiled for several instruction sets

inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_from_bf16(uint16_t half) { return float_from_bits(uint32_t(half) << 16); }

inline uint16_t bf16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_from_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 31)  // infinity, or NaN quieted as the hardware does
    return float_from_bits(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact
    const float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return float_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t f16_from_float(float value) {
  const uint32_t bits = bits_from_float(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {                                 // below 2^-14: units of 2^-24
    // Adding 0.5 moves the value to where one unit in the last place of fp32 is 2^-24; the addition rounds to even.
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return uint16_t(sign | (bits_from_float(shifted) - 0x3f000000));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return uint16_t(sign | ((magnitude + 0xfff + odd - (112u << 23)) >> 13));
}

inline float load_float(const void* data, lowbit_dtype dtype, int64_t index) {
  if (dtype == LOWBIT_F32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  return dtype == LOWBIT_F16 ? float_from_f16(half) : float_from_bf16(half);
}

inline void store_float(void* data, lowbit_dtype dtype, int64_t index, float value) {
  if (dtype == LOWBIT_F32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] = dtype == LOWBIT_F16 ? f16_from_float(value) : bf16_from_float(value);
}

}  // namespace
}  // namespace lowbit
#endif
