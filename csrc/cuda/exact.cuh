// Float arithmetic that is exactly what it says: nvcc may fuse a * b + c into one rounding, these are never fused.
#ifndef LOWBIT_CUDA_EXACT_CUH
#define LOWBIT_CUDA_EXACT_CUH

#include "cuda/platform.cuh"

namespace lowbit {
namespace cuda {

#if defined(LOWBIT_EMULATED)
inline float exact_add(float a, float b) { return a + b; }
inline float exact_mul(float a, float b) { return a * b; }
#else
__device__ __forceinline__ float exact_add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float exact_mul(float a, float b) { return __fmul_rn(a, b); }
#endif

}  // namespace cuda
}  // namespace lowbit
#endif
