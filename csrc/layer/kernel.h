// What a decoder layer does to a token between its products: three kernels, each one text over lane types (rms_norm.h,
// silu_mul.h, decode_attention.h), the same bits on every instruction set. api/layer.cpp has checked what they are given.
//
// Why these exist at all: torch takes seven operators for a norm and some seventy for a layer, each 5 to 200 us on caches
// that the weights have just gone through: a quarter of a token's time when the weights are packed.
#ifndef LOWBIT_LAYER_KERNEL_H
#define LOWBIT_LAYER_KERNEL_H

#include <stdint.h>

#include "lowbit/lowbit.h"

namespace lowbit {

// x, residual, sum, y: [tokens][size], strides in elements; weight: [size]; all of dtype.
struct RmsNorm {
  lowbit_dtype dtype;
  int64_t size;
  const void* x;
  int64_t x_stride;
  const void* residual;  // or NULL: the norm is of x itself
  int64_t residual_stride;
  void* sum;  // x + residual, with it
  int64_t sum_stride;
  const void* weight;
  float eps;
  void* y;  // or NULL: the sum alone
  int64_t y_stride;
};
typedef void (*RmsNormKernel)(const RmsNorm* n, int64_t token_begin, int64_t token_end);

// gate, up, y: [tokens][size], strides in elements, of dtype. y may be gate or up.
struct SiluMul {
  lowbit_dtype dtype;
  int64_t size;
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* y;
  int64_t y_stride;
};
typedef void (*SiluMulKernel)(const SiluMul* s, int64_t token_begin, int64_t token_end);

// One kv head of one sequence is a unit: unit u = sequence * kv_heads + kv head.
typedef void (*DecodeAttentionKernel)(const lowbit_decode_step* a, int64_t unit_begin, int64_t unit_end);
constexpr int64_t kMaxHeadSize = 512;  // bounds what attention keeps on the stack

}  // namespace lowbit
#endif
