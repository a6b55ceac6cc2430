// Activations as integers, for the integer kernels: x ~ step * v, v = 256*high + low (quantize.cu).
#ifndef LOWBIT_CUDA_QUANTIZE_CUH
#define LOWBIT_CUDA_QUANTIZE_CUH

#include "cuda/arguments.cuh"

namespace lowbit {
namespace cuda {

struct QuantizeArguments {
  const void* x;
  const int32_t* perm;
  int64_t x_stride, tokens;
  int32_t dtype, cols, x_cols;  // x_cols: cols padded to whole units with zeros
  int32_t chunk;                // columns that share a step
  bool two_digits, token_step;  // token_step: one step a token, of at least 1e-5 / 127
  int32_t span, spans;          // columns whose sum is kept together with their step; spans of a token
  int8_t* digits;               // [digit][tokens][x_cols], low first
  float* steps;                 // [tokens][spans]
  int32_t* sums;                // [tokens][spans]
};

cudaError_t quantize_activations(const QuantizeArguments& arguments, cudaStream_t stream);

}  // namespace cuda
}  // namespace lowbit
#endif
