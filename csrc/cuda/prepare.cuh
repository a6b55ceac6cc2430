// Activations in the order that operand B takes them, in global memory, for kernels whose blocks share them (prepare.cu).
#ifndef LOWBIT_CUDA_PREPARE_CUH
#define LOWBIT_CUDA_PREPARE_CUH

#include "cuda/arguments.cuh"

namespace lowbit {
namespace cuda {

struct PrepareArguments {
  MatrixArguments w;  // cols and perm
  Operands o;
  uint16_t* x;  // out [tokens][x_cols]: zero beyond the matrix, the middle two of every four columns swapped
  float* sums;  // out [x_cols / 64][tokens_padded]: of every plane; zero for absent tokens
  int32_t x_cols;
  int64_t tokens_padded;
};

cudaError_t prepare_activations(const PrepareArguments& arguments, cudaStream_t stream);

}  // namespace cuda
}  // namespace lowbit
#endif
