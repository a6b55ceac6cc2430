// The library's one symbol: the table of verbs (backend.h), and what is asked of a device once.
#include "cuda/backend.h"

#include <string.h>

#include "cuda/status.cuh"
#include "cuda/verbs.cuh"

#if !defined(LOWBIT_CUDA_ARCHITECTURES)
#define LOWBIT_CUDA_ARCHITECTURES "emulated"
#endif

namespace lowbit {
namespace cuda {
namespace {

lowbit_status device_count(int32_t* count, CudaMessage* message) {
  int devices = 0, driver = 0, runtime = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  *count = error == cudaSuccess ? devices : 0;
  if (error == cudaSuccess && devices > 0) return LOWBIT_OK;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaGetLastError();  // the next call of anyone's starts clean
  char found[64] = "no driver was found";
  if (driver) snprintf(found, sizeof found, "the driver is for CUDA %d.%d", driver / 1000, driver % 1000 / 10);
  snprintf(message->text, sizeof message->text,
           "no usable GPU: %s; built with CUDA %d.%d for architectures %s, %s. Install an NVIDIA driver for CUDA %d or "
           "newer, or keep tensors on the CPU",
           error == cudaSuccess ? "no device was found" : cudaGetErrorString(error), runtime / 1000,
           runtime % 1000 / 10, LOWBIT_CUDA_ARCHITECTURES, found, runtime / 1000);
  return LOWBIT_UNSUPPORTED;
}

__global__ void nothing() {}

lowbit_status describe(int32_t index, lowbit_cuda_device* out, CudaMessage* message) {
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error != cudaSuccess) return succeed_or(error, "device", message);
  memset(out, 0, sizeof *out);
  snprintf(out->name, sizeof out->name, "%.127s", properties.name);
  out->arch = 10 * properties.major + properties.minor;
  out->multiprocessors = properties.multiProcessorCount;
  out->shared_per_block = int32_t(properties.sharedMemPerBlockOptin);
  out->shared_per_sm = int32_t(properties.sharedMemPerMultiprocessor);
  cudaDriverGetVersion(&out->driver);
  cudaRuntimeGetVersion(&out->runtime);
#if !defined(LOWBIT_EMULATED)
  // Whether any of the code in this library runs there: the driver knows best.
  const CurrentDevice current(index);
  cudaFuncAttributes attributes;
  error = current.error() != cudaSuccess ? current.error() : cudaFuncGetAttributes(&attributes, nothing);
  if (error != cudaSuccess) {
    cudaGetLastError();
    snprintf(message->text, sizeof message->text,
             "device %d: %s has compute capability %d.%d, and liblowbit_cuda was built for %s (%s). Rebuild with "
             "-DCMAKE_CUDA_ARCHITECTURES=%d",
             index, out->name, properties.major, properties.minor, LOWBIT_CUDA_ARCHITECTURES, cudaGetErrorString(error),
             out->arch);
    return LOWBIT_UNSUPPORTED;
  }
#else
  (void)nothing;
#endif
  return LOWBIT_OK;
}

const CudaBackend kBackend = {kCudaBackendVersion,
                              LOWBIT_CUDA_ARCHITECTURES,
                              device_count,
                              describe,
                              matmul,
                              gather,
                              pack_codes,
                              unpack_codes,
                              check,
                              solve_workspace,
                              solve};

}  // namespace
}  // namespace cuda
}  // namespace lowbit

extern "C" __attribute__((visibility("default"))) const lowbit::CudaBackend* lowbit_cuda_backend(int32_t version) {
  return version == lowbit::kCudaBackendVersion ? &lowbit::cuda::kBackend : nullptr;
}
