// The CUDA runtime of the emulated device.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "control.h"
#include "cuda_words.h"

namespace lowbit {
namespace emulation {

Device device_of(int architecture) {
  // Table "Technical specifications per compute capability": shared memory of a multiprocessor; a block of sm_80 and
  // newer may have all but 1 KB of it.
  size_t kilobytes;
  switch (architecture) {
    case 70: kilobytes = 96; break;
    case 75: kilobytes = 64; break;
    case 80:
    case 87: kilobytes = 164; break;
    case 86:
    case 89:
    case 120: kilobytes = 100; break;
    default: kilobytes = 228; break;
  }
  return {architecture, 4, (kilobytes - (architecture >= 80)) << 10, kilobytes << 10};
}

namespace {
Device current = device_of(getenv("LOWBIT_EMULATED_ARCH") ? atoi(getenv("LOWBIT_EMULATED_ARCH")) : 90);
}

void set_device(const Device& device) { current = device; }
Device device() { return current; }

}  // namespace emulation
}  // namespace lowbit

using lowbit::emulation::current;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
  }
  return "unrecognized error code";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }  // launch() has returned it

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrWarpSize: *value = 32; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = current.multiprocessors; return cudaSuccess;
    case cudaDevAttrL2CacheSize: *value = 4 << 20; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = current.architecture / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = current.architecture % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = int(current.shared_per_multiprocessor);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(current.shared_per_block); return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device) return cudaErrorInvalidDevice;
  *properties = {};
  snprintf(properties->name, sizeof properties->name, "emulated sm_%d", current.architecture);
  properties->major = current.architecture / 10;
  properties->minor = current.architecture % 10;
  properties->multiProcessorCount = current.multiprocessors;
  properties->warpSize = 32;
  properties->l2CacheSize = 4 << 20;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = current.shared_per_block;
  properties->sharedMemPerMultiprocessor = current.shared_per_multiprocessor;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes) memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes) memmove(to, from, bytes);
  return cudaSuccess;
}
