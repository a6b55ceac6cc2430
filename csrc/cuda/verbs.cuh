// The host side of every verb: picks a launch, queues it. One a kernel file; backend.cu puts them into the table, and
// backend.h says what each takes.
#ifndef LOWBIT_CUDA_VERBS_CUH
#define LOWBIT_CUDA_VERBS_CUH

#include "cuda/backend.h"

namespace lowbit {
namespace cuda {

lowbit_status matmul(const lowbit_cuda_queue* queue, const lowbit_cuda_device* device, const CudaMatmul* call,
                     CudaMessage* message);
lowbit_status gather(const lowbit_cuda_queue* queue, const CudaGather* call, CudaMessage* message);
lowbit_status pack_codes(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const uint8_t* codes, uint8_t* lines,
                         int64_t* first_bad, CudaMessage* message);
lowbit_status unpack_codes(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t row_begin, int64_t row_end,
                           uint8_t* codes, CudaMessage* message);
lowbit_status check(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t* bad, uint32_t* first,
                    CudaMessage* message);
size_t solve_workspace(const CudaSolve* call);
lowbit_status solve(const lowbit_cuda_queue* queue, const CudaSolve* call, CudaMessage* message);

}  // namespace cuda
}  // namespace lowbit
#endif
