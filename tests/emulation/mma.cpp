// Tensor cores, by the fragment tables at the head of cuda/ptx.cuh. Lane 4g + c holds row g (of B and D: column, row g)
// at k = its own c: eight rows of a register, taken in the order of lanes, are a row-major matrix as they stand.
#include "block.h"

namespace lowbit {
namespace emulation {
namespace {

#define LOWBIT_INLINE inline __attribute__((always_inline))

LOWBIT_INLINE float widen_f16(uint16_t bits) { return cuda::from_f16(bits); }
LOWBIT_INLINE float widen_bf16(uint16_t bits) { return cuda::from_bf16(bits); }

typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(32)));

// A register of D holds every second column of eight rows, so sums and B are kept as even and odd columns. Products are
// exact in double (11 bits times 11), so that a fused and a separate addition agree; the sum is rounded to fp32 once.
template <float (*Widen)(uint16_t)>
LOWBIT_INLINE void multiply_16bit(Warp& warp) {
  uint16_t halves[4 * 64];
  double a[4 * 64];       // [register][row][k]
  float columns[2 * 64];  // [register][column][k]
  double b[16][2][4];     // [k][odd][column / 2]
  memcpy(halves, warp.a, sizeof warp.a);
  for (int i = 0; i < 4 * 64; i++) a[i] = double(Widen(halves[i]));
  memcpy(halves, warp.b, sizeof warp.b);
  for (int i = 0; i < 2 * 64; i++) columns[i] = Widen(halves[i]);
  for (int k = 0; k < 16; k++)
    for (int column = 0; column < 8; column++)
      b[k][column % 2][column / 2] = double(columns[k / 8 * 64 + 8 * column + k % 8]);

  for (int row = 0; row < 16; row += 4) {
    Doubles sum[4][2];
    const auto d = [&](int i, int odd) { return &warp.d[row / 8 * 2 + odd][4 * (row % 8 + i)]; };
    for (int i = 0; i < 4; i++) {
      for (int odd = 0; odd < 2; odd++) {
        Floats before;
        memcpy(&before, d(i, odd), sizeof before);
        sum[i][odd] = __builtin_convertvector(before, Doubles);
      }
    }
    for (int k = 0; k < 16; k++) {
      Doubles even, odd;
      memcpy(&even, b[k][0], sizeof even);
      memcpy(&odd, b[k][1], sizeof odd);
      const double* column = a + (row / 8 + k / 8 * 2) * 64 + row % 8 * 8 + k % 8;
      for (int i = 0; i < 4; i++) sum[i][0] += column[8 * i] * even, sum[i][1] += column[8 * i] * odd;
    }
    for (int i = 0; i < 4; i++) {
      for (int odd = 0; odd < 2; odd++) {
        const Floats after = __builtin_convertvector(sum[i][odd], Floats);
        memcpy(d(i, odd), &after, sizeof after);
      }
    }
  }
}

LOWBIT_INLINE void multiply_8bit(Warp& warp) {
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
