// What a CUDA error becomes: a status and a sentence. Shared by the host side of every kernel file.
#ifndef LOWBIT_CUDA_STATUS_CUH
#define LOWBIT_CUDA_STATUS_CUH

#include <stdio.h>

#include "cuda/backend.h"
#include "cuda/platform.cuh"

namespace lowbit {
namespace cuda {

inline lowbit_status succeed_or(cudaError_t error, const char* what, CudaMessage* message) {
  if (error == cudaSuccess) return LOWBIT_OK;
  snprintf(message->text, sizeof message->text, "%s: CUDA error %d, %s", what, int(error), cudaGetErrorString(error));
  return error == cudaErrorMemoryAllocation ? LOWBIT_OUT_OF_MEMORY : LOWBIT_UNSUPPORTED;
}

// Makes the caller's device current for one call, and what was current before afterwards.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = -1;
    error_ = before_ == device ? cudaSuccess : cudaSetDevice(device);
    changed_ = error_ == cudaSuccess && before_ != device;
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    if (changed_ && before_ >= 0) cudaSetDevice(before_);
  }
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1;
  bool changed_ = false;
  cudaError_t error_;
};

}  // namespace cuda
}  // namespace lowbit
#endif
