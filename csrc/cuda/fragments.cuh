// From the words of a line to operand A of mma.sync: how codes of int2, int3, int4 and int8 become fp16 or bf16 numbers.
//
// Weights are the left operand, Y^T = W X^T: the 16 rows of A are 16 rows of W, the 8 columns of B are 8 tokens. Lane
// 4g + c of a warp holds bytes 16c .. 16c+15 of the lines of rows g and g + 8, four words w of four bytes each. Word w
// of plane p is one k16 step of mma: its bytes 0, 2 are the first pair of the fragment, 1, 3 the second, so
//   column of slot j of the step:  64p + 16c + 4w + 2(j & 1) + (j >> 1)
// and activations lie in shared memory in natural order, the middle two of every four swapped.
//
// Codes go into the tensor core raw, and what they are worth is settled in fp32 once a plane (Terms below):
//   fp16   the code as a subnormal, left at the bit where it lies: code * 2^(bit - 24)
//   bf16   128 + code * 2^To, the code shifted to the top of the seven bits of the mantissa; int8 as two halves
// Either is exact, no number carries an offset above its own size (1024 + code would cost 0.4-2% of a product whose
// activations have a mean), and an error is that of fp32 sums: 1e-5.
#ifndef LOWBIT_CUDA_FRAGMENTS_CUH
#define LOWBIT_CUDA_FRAGMENTS_CUH

#include "cuda/ptx.cuh"
#include "lowbit/formats.h"

namespace lowbit {
namespace cuda {

template <int Bits, bool Bf16>
struct Terms {
  static constexpr int kLines = Format<Bits>::kLines, kPlanes = Format<Bits>::kPlanes;
  static constexpr int kTerms = Bits == 8 && Bf16 ? 2 : 1;  // products that make up one plane
  static constexpr int kWidth = kTerms == 2 ? 4 : Bits;     // bits of a code in a term
  static constexpr int kTo = Bf16 ? 7 - kWidth : 0;         // bf16: where they go
  static constexpr float kBase = Bf16 ? 128.0f : 0.0f;      // the number of code 0

  // The bit of a byte of plane_word where term t of plane p begins.
  LOWBIT_HD static constexpr int position(int p, int t) {
    return Bits == 8 ? 4 * t : Bits == 4 ? 4 * p : Bits == 2 ? 2 * p : 4 * (p >> 1 & 1);
  }
  // What one step of the code is worth in the fragment, and its inverse times what the term is worth in the code.
  LOWBIT_HD static constexpr float step(int p, int t) {
    return Bf16 ? float(1 << kTo) : 1.0f / float(1 << (24 - position(p, t)));
  }
  LOWBIT_HD static constexpr float worth(int p, int t) { return (t ? 16.0f : 1.0f) / step(p, t); }
  // The part of a zero point that term t sees.
  LOWBIT_HD static constexpr int zero_part(int zero, int t) { return kTerms == 1 ? zero : t ? zero >> 4 : zero & 15; }

  // One word of a unit's lines as the word that holds plane p: int3 joins its low and high bits to nibbles.
  LOWBIT_HD static constexpr uint32_t plane_word(const uint32_t (&line)[kLines], int p) {
    if (Bits != 3) return line[0];
    const int j = p >> 2, odd = p & 1;
    const uint32_t low = line[j < kLines ? j : 0] >> 2 * odd, bit = line[kLines - 1];
    const uint32_t high = j == 0 ? bit >> odd : bit << (2 - odd);
    return (low & 0x33333333u) | (high & ~0x33333333u);
  }
  // Bytes 0 and 2 (odd: 1 and 3) of that word as a pair of numbers.
  LOWBIT_HD static constexpr uint32_t pair(uint32_t word, int p, int t, int odd) {
    const uint32_t mask = (1u << kWidth) - 1;
    if (!Bf16) return word >> 8 * odd & (mask << position(p, t)) * 0x00010001u;
    const int shift = position(p, t) + 8 * odd - kTo;
    const uint32_t moved = word >> (shift > 0 ? shift : 0) << (shift < 0 ? -shift : 0);
    return (moved & (mask << kTo) * 0x00010001u) | 0x43004300u;
  }
};

// The column, counted from the unit's first, that slot j (0..3: first pair, second pair) of word w, lane part c and
// plane p meets.
LOWBIT_HD constexpr int slot_column(int p, int c, int w, int j) {
  return 64 * p + 16 * c + 4 * w + 2 * (j & 1) + (j >> 1);
}

template <bool Bf16>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (Bf16)
    mma_bf16(d, a, b0, b1);
  else
    mma_f16(d, a, b0, b1);
}

template <bool Bf16>
__device__ __forceinline__ float from_16(uint16_t bits) {
  return Bf16 ? from_bf16(bits) : from_f16(bits);
}

__device__ __forceinline__ float load_float(const void* from, int dtype, int64_t i) {
  if (dtype == LOWBIT_F32) return ldg(static_cast<const float*>(from) + i);
  const uint16_t bits = ldg(static_cast<const uint16_t*>(from) + i);
  return dtype == LOWBIT_F16 ? from_f16(bits) : from_bf16(bits);
}

__device__ __forceinline__ void store_float(void* to, int dtype, int64_t i, float value) {
  if (dtype == LOWBIT_F32)
    static_cast<float*>(to)[i] = value;
  else
    static_cast<uint16_t*>(to)[i] = dtype == LOWBIT_F16 ? to_f16(value) : to_bf16(value);
}

}  // namespace cuda
}  // namespace lowbit
#endif
