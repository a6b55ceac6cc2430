// A product that is rounded by itself: nvcc would fuse it with a sum that it goes into.
#ifndef LOWBIT_CUDA_EXACT_CUH
#define LOWBIT_CUDA_EXACT_CUH

#include "cuda/platform.cuh"

namespace lowbit {
namespace cuda {

#if defined(LOWBIT_EMULATED)
inline float exact_mul(float a, float b) { return a * b; }
#else
__device__ __forceinline__ float exact_mul(float a, float b) { return __fmul_rn(a, b); }
#endif

}  // namespace cuda
}  // namespace lowbit
#endif
