// Finds liblowbit_cuda.so and its table of verbs on the first GPU call.
#pragma once

#include "cuda/backend.h"

namespace lowbit {

// The table; LOWBIT_UNSUPPORTED with what is missing. Looked for once: at LOWBIT_CUDA_LIBRARY, else beside liblowbit.
lowbit_status cuda_backend(const CudaBackend** backend);

// What the device is, asked of it once; refused when nothing in the library runs on it.
lowbit_status cuda_device(int32_t index, const lowbit_cuda_device** device);

}  // namespace lowbit
