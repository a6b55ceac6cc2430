// What a .cu file of this room is written in: CUDA C++, and under LOWBIT_EMULATED the same words on the host, so that
// the very same kernels run in tests on a machine with no GPU (tests/emulation).
//
// The rules that make one text serve both:
//   - a kernel is `__global__ void`, launched by launch(); its block may have any number of whole warps;
//   - all shared memory is one dynamic arena, addressed by byte offsets through lds / sts / cp_async (ptx.cuh), so
//     that the emulator can check bounds and races;
//   - all inline PTX, warp collectives and barriers are functions of ptx.cuh;
//   - fp16 and bf16 are bits in uint16_t, two of them in a uint32_t; ptx.cuh converts;
//   - no library device functions beyond fmaf, rintf, fabsf, fminf, fmaxf, min and max.
#ifndef LOWBIT_CUDA_PLATFORM_CUH
#define LOWBIT_CUDA_PLATFORM_CUH

#include <stdint.h>

#if defined(LOWBIT_EMULATED)
#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <tuple>

namespace lowbit {
namespace cuda {

// Starts kernel(arguments...) on the caller's stream. Nothing is awaited: a failed launch is what is reported.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   A... arguments) {
  // Above 48 KB a kernel must be told, on every device; telling it again is allowed at any time, in a capture too.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  std::tuple<P...> values{P(arguments)...};
  return std::apply(
      [&](P&... value) {
        void* addresses[] = {&value...};
        return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(unsigned(threads)), addresses,
                                shared_bytes, stream);
      },
      values);
}

}  // namespace cuda
}  // namespace lowbit
#endif
#endif
