// Activations on their way to operand B: into shared memory, in natural order with the middle two of every four columns
// swapped (fragments.cuh), beside the sums that zero points are multiplied by.
//
//   x      16 bits, token t at x_at + t * x_stride, columns [first_col, first_col + cols), zero beyond the matrix
//   sums   fp32 [plane][tokens_padded]; Fine: [plane][4][tokens_padded], every 16 columns apart
// A sum is formed by 8 lanes in a fixed order, so it does not depend on the launch.
#ifndef LOWBIT_CUDA_STAGE_CUH
#define LOWBIT_CUDA_STAGE_CUH

#include "cuda/arguments.cuh"

namespace lowbit {
namespace cuda {

// Eight columns of token t, col .. col + 7, as they lie in x.
__device__ __forceinline__ uint4 load_8_columns(const MatrixArguments& w, const Operands& o, int64_t t, int32_t col) {
  const uint16_t* x = static_cast<const uint16_t*>(o.x) + t * o.x_stride;
  if (o.x_vectors && col + 8 <= w.cols) return ldg(reinterpret_cast<const uint4*>(x + col));
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t half[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int32_t k = col + 2 * i + j;
      if (k >= w.cols) continue;
      // A perm that nobody checked reads another column, never another's memory.
      const int32_t from = w.perm ? int32_t(min(uint32_t(ldg(w.perm + k)), uint32_t(w.cols - 1))) : k;
      half[j] = ldg(x + from);
    }
    pair[i] = half[0] | half[1] << 16;
  }
  return make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

__device__ __forceinline__ uint4 swap_middles(const uint4& v) {
  return make_uint4(byte_perm(v.x, v.y, 0x5410), byte_perm(v.x, v.y, 0x7632), byte_perm(v.z, v.w, 0x5410),
                    byte_perm(v.z, v.w, 0x7632));
}

template <bool Bf16>
__device__ __forceinline__ float sum_8(const uint4& v) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  float pair[4];
#pragma unroll
  for (int i = 0; i < 4; i++) pair[i] = from_16<Bf16>(uint16_t(word[i])) + from_16<Bf16>(uint16_t(word[i] >> 16));
  return (pair[0] + pair[1]) + (pair[2] + pair[3]);
}

// By all threads of the block; a block barrier must follow.
template <bool Bf16, bool Fine>
__device__ void stage_activations(const MatrixArguments& w, const Operands& o, int64_t first_token, int32_t tokens,
                                  int32_t tokens_padded, int32_t first_col, int32_t cols, uint32_t x_at,
                                  int32_t x_stride, uint32_t sums_at) {
  const int32_t eights = cols / 8, items = tokens * eights;  // of 8 columns; a plane is 8 of them, 8 lanes
  for (int32_t base = 0; base < items; base += int32_t(blockDim.x)) {
    const int32_t i = base + int32_t(threadIdx.x), t = i / eights, at = i - t * eights;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (i < items) {
      v = load_8_columns(w, o, first_token + t, first_col + 8 * at);
      sts<uint4>(x_at + uint32_t(t * x_stride + 16 * at), swap_middles(v));
    }
    float sum = sum_8<Bf16>(v);
    sum += shuffle_xor(sum, 1);
    const int32_t plane = at >> 3;
    if (Fine) {
      if (i < items && !(at & 1))
        sts<float>(sums_at + uint32_t(4 * ((plane * 4 + (at >> 1 & 3)) * tokens_padded + t)), sum);
    } else {
      sum += shuffle_xor(sum, 2);
      sum += shuffle_xor(sum, 4);
      if (i < items && !(at & 7)) sts<float>(sums_at + uint32_t(4 * (plane * tokens_padded + t)), sum);
    }
  }
  // Lanes of absent tokens compute too: their sums are zero, and nobody stores their results.
  const int32_t absent = tokens_padded - tokens, rows = cols / (Fine ? 16 : 64);
  for (int32_t i = int32_t(threadIdx.x); i < rows * absent; i += int32_t(blockDim.x))
    sts<float>(sums_at + uint32_t(4 * (i / absent * tokens_padded + tokens + i % absent)), 0.0f);
}

}  // namespace cuda
}  // namespace lowbit
#endif
