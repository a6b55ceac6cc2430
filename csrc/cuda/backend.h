// The table that liblowbit_cuda hands to liblowbit: every GPU verb, versioned. Plain data, no CUDA type, so that
// liblowbit needs no CUDA header and finds the library with dlopen on the first GPU call (dispatch/cuda_loader.h).
//
// Arguments have been checked by api/cuda.cpp: kernels trust them. Pointers are device pointers unless they say `host`.
// Every call is queued on the caller's stream and returns without waiting; none allocates.
#ifndef LOWBIT_CUDA_BACKEND_H
#define LOWBIT_CUDA_BACKEND_H

#include <stddef.h>
#include <stdint.h>

#include "lowbit/lowbit.h"

namespace lowbit {

constexpr int32_t kCudaBackendVersion = 2;

// Where a failed call says what happened; liblowbit copies it to the thread's message.
struct CudaMessage {
  char text[384];
};

struct CudaMatmul {
  lowbit_matrix w;
  const void* x;
  lowbit_dtype dtype;  // of x and y
  int64_t tokens, x_stride;
  const void* bias;
  lowbit_dtype bias_dtype;
  void* y;
  int64_t y_stride;
  lowbit_activations activations;
  void* workspace;
  size_t workspace_bytes;
};

struct CudaGather {
  lowbit_matrix w;
  const void* ids;  // NULL: rows row_begin, row_begin + 1, ...
  lowbit_dtype id_dtype;
  int64_t row_begin, count;
  lowbit_id_policy policy;  // ids outside: ZERO and ERROR give a row of zeros, CLAMP the nearest row
  int64_t padding_id;       // a row of zeros wherever it stands (bags: left out); -1: none
  int64_t* first_bad;       // ERROR: the smallest place of an id outside, if any is; set to INT64_MAX before
  const int64_t* offsets;   // [bags + 1] into ids: one sum or mean a bag; NULL: one row an id
  int64_t bags;
  const float* weights;  // [count]: of each row in its sum; NULL: 1
  bool mean;
  void* out;
  lowbit_dtype out_dtype;
  int64_t out_stride;
};

struct CudaSolve {
  lowbit_gptq_options options;  // normalised
  int64_t rows, cols, groups;
  const float* weight;
  const float* factor;         // [cols][cols] or NULL
  const int32_t* group_index;  // [cols] or NULL
  uint8_t* codes;
  float* scales;
  uint8_t* zeros;
  double* loss;
  void* workspace;
  size_t workspace_bytes;
};

struct CudaBackend {
  int32_t version;
  const char* architectures;  // "75 80 90a", and "+PTX" where newer devices may compile at load

  lowbit_status (*device_count)(int32_t* count, CudaMessage* message);
  lowbit_status (*device)(int32_t index, lowbit_cuda_device* device, CudaMessage* message);

  // workspace: see lowbit_cuda_plan. The first `zeroed` bytes of it are zero before and after every call.
  lowbit_status (*matmul)(const lowbit_cuda_queue* queue, const lowbit_cuda_device* device, const CudaMatmul* call,
                          CudaMessage* message);
  lowbit_status (*gather)(const lowbit_cuda_queue* queue, const CudaGather* call, CudaMessage* message);
  // codes [rows][cols], one a byte, from and to lines. *first_bad (may be NULL): the smallest place of a code that the
  // format lacks, if any; set to INT64_MAX before.
  lowbit_status (*pack_codes)(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const uint8_t* codes,
                              uint8_t* lines, int64_t* first_bad, CudaMessage* message);
  lowbit_status (*unpack_codes)(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t row_begin,
                                int64_t row_end, uint8_t* codes, CudaMessage* message);
  // bad[0..3]: see lowbit_cuda_matrix_check. first: scratch [cols], may be NULL without a perm.
  lowbit_status (*check)(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t* bad, uint32_t* first,
                         CudaMessage* message);
  size_t (*solve_workspace)(const CudaSolve* call);
  lowbit_status (*solve)(const lowbit_cuda_queue* queue, const CudaSolve* call, CudaMessage* message);
};

}  // namespace lowbit

// The one symbol of the library. NULL when it cannot serve that version.
extern "C" const lowbit::CudaBackend* lowbit_cuda_backend(int32_t version);

#endif
