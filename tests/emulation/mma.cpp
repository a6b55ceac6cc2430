// Tensor cores, by the fragment tables at the head of cuda/ptx.cuh. Lane 4g + c holds row g (of B and D: column, row g)
// at k = its own c: eight rows of a register, taken in the order of lanes, are a row-major matrix as they stand.
#include "block.h"

namespace lowbit {
namespace emulation {
namespace {

inline __attribute__((always_inline)) float widen_f16(uint16_t bits) { return cuda::from_f16(bits); }
inline __attribute__((always_inline)) float widen_bf16(uint16_t bits) { return cuda::from_bf16(bits); }

// Products are exact in double (11 bits times 11), so that a fused and a separate addition agree; the sum is rounded to
// fp32 once.
template <float (*Widen)(uint16_t)>
inline __attribute__((always_inline)) void multiply_16bit(Warp& warp) {
  uint16_t halves[8 * 8];
  double a[16][16], b[16][8], d[16][8];
  for (int part = 0; part < 4; part++) {
    memcpy(halves, warp.a[part], sizeof halves);
    for (int row = 0; row < 8; row++)
      for (int k = 0; k < 8; k++) a[row + 8 * (part & 1)][k + 8 * (part >> 1)] = double(Widen(halves[8 * row + k]));
  }
  for (int part = 0; part < 2; part++) {
    memcpy(halves, warp.b[part], sizeof halves);
    float wide[64];
    for (int i = 0; i < 64; i++) wide[i] = Widen(halves[i]);
    for (int k = 0; k < 8; k++)
      for (int column = 0; column < 8; column++) b[8 * part + k][column] = double(wide[8 * column + k]);
  }
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++)
      d[row][column] = double(cuda::as_float(warp.d[row / 8 * 2 + column % 2][4 * (row % 8) + column / 2]));
  for (int row = 0; row < 16; row += 4) {
    double sum[4][8];
    memcpy(sum, d[row], sizeof sum);
    for (int k = 0; k < 16; k++)
      for (int i = 0; i < 4; i++)
        for (int column = 0; column < 8; column++) sum[i][column] += a[row + i][k] * b[k][column];
    memcpy(d[row], sum, sizeof sum);
  }
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++)
      warp.d[row / 8 * 2 + column % 2][4 * (row % 8) + column / 2] = cuda::as_bits(float(d[row][column]));
}

inline __attribute__((always_inline)) void multiply_8bit(Warp& warp) {
  int16_t a[16][32], b[8][32];
  for (int part = 0; part < 4; part++) {
    uint8_t bytes[8][16];
    memcpy(bytes, warp.a[part], sizeof bytes);
    for (int row = 0; row < 8; row++)
      for (int k = 0; k < 16; k++) a[row + 8 * (part & 1)][k + 16 * (part >> 1)] = bytes[row][k];
  }
  for (int part = 0; part < 2; part++) {
    int8_t bytes[8][16];
    memcpy(bytes, warp.b[part], sizeof bytes);
    for (int column = 0; column < 8; column++)
      for (int k = 0; k < 16; k++) b[column][k + 16 * part] = bytes[column][k];
  }
  for (int row = 0; row < 16; row++) {
    for (int column = 0; column < 8; column++) {
      int32_t sum = 0;
      for (int k = 0; k < 32; k++) sum += a[row][k] * b[column][k];
      warp.d[row / 8 * 2 + column % 2][4 * (row % 8) + column / 2] += uint32_t(sum);  // wraps, as the instruction
    }
  }
}

#if defined(__x86_64__)
const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#define LOWBIT_TWICE(name, body)                                             \
  __attribute__((target("avx2,fma"))) void name##_avx2(Warp& warp) { body; } \
  void name##_plain(Warp& warp) { body; }
#define LOWBIT_CHOOSE(name) (avx2 ? name##_avx2 : name##_plain)
#else
#define LOWBIT_TWICE(name, body) \
  void name##_plain(Warp& warp) { body; }
#define LOWBIT_CHOOSE(name) name##_plain
#endif

LOWBIT_TWICE(f16, multiply_16bit<widen_f16>(warp))
LOWBIT_TWICE(bf16, multiply_16bit<widen_bf16>(warp))
LOWBIT_TWICE(u8s8, multiply_8bit(warp))

}  // namespace

void multiply_f16(Warp& warp) { LOWBIT_CHOOSE(f16)(warp); }
void multiply_bf16(Warp& warp) { LOWBIT_CHOOSE(bf16)(warp); }
void multiply_u8s8(Warp& warp) { LOWBIT_CHOOSE(u8s8)(warp); }

}  // namespace emulation
}  // namespace lowbit
