// The verbs on GPUs: the same checks as on the CPU, less those that would read device memory, then the call goes through
// the table of liblowbit_cuda (cuda/backend.h).
#include <cinttypes>
#include <cstdio>

#include "api/validate.h"
#include "cuda/matmul_plan.h"
#include "dispatch/cuda_loader.h"
#include "solver/problem.h"

namespace lowbit {
namespace {

// Everything a call needs of its GPU.
struct Target {
  const CudaBackend* backend;
  const lowbit_cuda_device* device;
};

lowbit_status find_target(const lowbit_cuda_queue* queue, Target* target) {
  if (!queue) return fail(LOWBIT_INVALID_ARGUMENT, "queue: expected a pointer, got NULL");
  LOWBIT_TRY(cuda_backend(&target->backend));
  return cuda_device(queue->device, &target->device);
}

template <class Call>
lowbit_status run(Call call) {
  CudaMessage message{};
  const lowbit_status status = call(&message);
  return status == LOWBIT_OK ? LOWBIT_OK : fail(status, "%s", message.text);
}

lowbit_status check_for_gpu(const lowbit_matrix* w, lowbit_matrix* m) {
  LOWBIT_TRY(check_layout(w, m));
  if (m->rows > INT32_MAX)  // blocks are counted in 32 bits
    return fail(LOWBIT_UNSUPPORTED, "rows: expected at most 2^31 - 1 on a GPU, got %" PRId64, m->rows);
  if (uintptr_t(m->codes) % 16)
    return fail(LOWBIT_INVALID_ARGUMENT, "codes: expected an address at a multiple of 16, got %p",
                static_cast<const void*>(m->codes));
  return LOWBIT_OK;
}

lowbit_status check_float(const char* name, lowbit_dtype dtype) {
  if (is_float(dtype)) return LOWBIT_OK;
  return fail(LOWBIT_INVALID_ARGUMENT, "%s: expected dtype f32, f16 or bf16, got %d", name, int(dtype));
}

lowbit_status check_rows(const lowbit_matrix& m, int64_t begin, int64_t end, const void* out) {
  if (begin < 0 || end < begin || end > m.rows)
    return fail(LOWBIT_OUT_OF_RANGE, "rows: expected a range inside [0, %" PRId64 "), got [%" PRId64 ", %" PRId64 ")",
                m.rows, begin, end);
  if (!out && end > begin) return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a pointer, got NULL");
  return LOWBIT_OK;
}

lowbit_status check_workspace(const void* workspace, size_t bytes, size_t needed) {
  if (!needed || (workspace && bytes >= needed && uintptr_t(workspace) % 256 == 0)) return LOWBIT_OK;
  return fail(LOWBIT_INVALID_ARGUMENT, "workspace: expected %zu bytes at a multiple of 256, got %zu at %p", needed,
              bytes, workspace);
}

lowbit_status check_matmul(const lowbit_matrix* w, int64_t tokens, lowbit_dtype dtype, lowbit_activations activations,
                           lowbit_matrix* m) {
  LOWBIT_TRY(check_for_gpu(w, m));
  LOWBIT_TRY(check_float("x", dtype));
  if (activations != LOWBIT_ACT_FLOAT && activations != LOWBIT_ACT_INT8)
    return fail(LOWBIT_INVALID_ARGUMENT, "activations: expected float or int8, got %d", int(activations));
  if (tokens < 0 || tokens > kMaxElements / (m->rows > m->cols ? m->rows : m->cols))
    return fail(LOWBIT_INVALID_ARGUMENT, "tokens: expected at least 0 and below 2^46 elements, got %" PRId64, tokens);
  return LOWBIT_OK;
}

// What lowbit_cuda_gather and lowbit_cuda_gather_bags share.
lowbit_status check_gather(const lowbit_matrix* w, const void* ids, lowbit_dtype id_dtype, int64_t count,
                           lowbit_id_policy policy, int64_t* first_bad, int64_t out_rows, void* out,
                           lowbit_dtype out_dtype, int64_t out_stride, CudaGather* call) {
  lowbit_matrix& m = call->w;
  LOWBIT_TRY(check_for_gpu(w, &m));
  LOWBIT_TRY(check_float("out", out_dtype));
  if (id_dtype != LOWBIT_I32 && id_dtype != LOWBIT_I64)
    return fail(LOWBIT_INVALID_ARGUMENT, "ids: expected dtype i32 or i64, got %d", int(id_dtype));
  if (policy != LOWBIT_IDS_ERROR && policy != LOWBIT_IDS_ZERO && policy != LOWBIT_IDS_CLAMP)
    return fail(LOWBIT_INVALID_ARGUMENT, "policy: expected error, zero or clamp, got %d", int(policy));
  if (policy == LOWBIT_IDS_ERROR && !first_bad)
    return fail(LOWBIT_INVALID_ARGUMENT, "first_bad: expected a pointer with policy error, got NULL");
  if (count < 0 || count > kMaxElements / m.cols || out_rows < 0 || out_rows > kMaxElements / m.cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "count: expected 0 or more below 2^46 elements, got %" PRId64, count);
  if (count > 0 && !ids) return fail(LOWBIT_INVALID_ARGUMENT, "ids: expected a pointer, got NULL");
  if (out_rows > 0 && !out) return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a pointer, got NULL");
  if (out_rows > 1 && out_stride < m.cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a stride of at least cols (%" PRId64 "), got %" PRId64, m.cols,
                out_stride);
  call->ids = ids;
  call->id_dtype = id_dtype;
  call->count = count;
  call->policy = policy;
  call->padding_id = -1;
  call->first_bad = policy == LOWBIT_IDS_ERROR ? first_bad : nullptr;
  call->out = out;
  call->out_dtype = out_dtype;
  call->out_stride = out_stride;
  return LOWBIT_OK;
}

lowbit_status solve_call(const lowbit_gptq_options* options, int64_t rows, int64_t cols, CudaSolve* call) {
  if (!options) return fail(LOWBIT_INVALID_ARGUMENT, "gptq: expected a pointer to options, got NULL");
  Problem problem;
  LOWBIT_TRY(normalise(*options, rows, cols, &problem));
  call->options = *options;
  call->options.group_size = problem.group_size;
  call->options.block_size = problem.block_size;
  call->rows = rows;
  call->cols = cols;
  call->groups = problem.groups;
  return LOWBIT_OK;
}

}  // namespace
}  // namespace lowbit

using namespace lowbit;

extern "C" {

const char* lowbit_cuda_architectures(void) {
  const CudaBackend* backend;
  return cuda_backend(&backend) == LOWBIT_OK ? backend->architectures : "";
}

lowbit_status lowbit_cuda_device_count(int32_t* count) {
  if (!count) return fail(LOWBIT_INVALID_ARGUMENT, "count: expected a pointer, got NULL");
  *count = 0;
  const CudaBackend* backend;
  LOWBIT_TRY(cuda_backend(&backend));
  return run([&](CudaMessage* message) { return backend->device_count(count, message); });
}

lowbit_status lowbit_cuda_describe(int32_t device, lowbit_cuda_device* description) {
  if (!description) return fail(LOWBIT_INVALID_ARGUMENT, "description: expected a pointer, got NULL");
  const lowbit_cuda_device* found;
  LOWBIT_TRY(cuda_device(device, &found));
  *description = *found;
  return LOWBIT_OK;
}

lowbit_status lowbit_cuda_matmul_plan(const lowbit_cuda_device* device, const lowbit_matrix* w, int64_t tokens,
                                      lowbit_dtype dtype, lowbit_activations activations, lowbit_cuda_plan* plan) {
  if (!device || !plan) return fail(LOWBIT_INVALID_ARGUMENT, "device and plan: expected pointers, got NULL");
  lowbit_matrix m;
  LOWBIT_TRY(check_matmul(w, tokens, dtype, activations, &m));
  const cuda::MatmulPlan p = cuda::plan_matmul(m, tokens < 1 ? 1 : tokens, dtype, activations, *device);
  const bool trit = m.format == LOWBIT_TRIT;
  if (trit)
    snprintf(plan->kernel, sizeof plan->kernel, "trit_%s", cuda::kernel_name(p.kernel));
  else
    snprintf(plan->kernel, sizeof plan->kernel, "int%d_%s", int(m.format), cuda::kernel_name(p.kernel));
  plan->prefers_unpack = p.prefers_unpack;
  plan->workspace_bytes = tokens ? size_t(p.workspace_bytes) : 0;
  plan->zeroed_bytes = tokens ? size_t(p.zeroed_bytes) : 0;
  return LOWBIT_OK;
}

lowbit_status lowbit_cuda_matmul(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const void* x,
                                 lowbit_dtype dtype, int64_t tokens, int64_t x_stride, const void* bias,
                                 lowbit_dtype bias_dtype, void* y, int64_t y_stride, lowbit_activations activations,
                                 void* workspace, size_t workspace_bytes) {
  CudaMatmul call{};
  LOWBIT_TRY(check_matmul(w, tokens, dtype, activations, &call.w));
  if (bias) LOWBIT_TRY(check_float("bias", bias_dtype));
  Target target;
  LOWBIT_TRY(find_target(queue, &target));
  if (tokens == 0) return LOWBIT_OK;
  if (!x || !y) return fail(LOWBIT_INVALID_ARGUMENT, "x and y: expected pointers, got NULL");
  if (tokens > 1 && (x_stride < call.w.cols || y_stride < call.w.rows))
    return fail(LOWBIT_INVALID_ARGUMENT,
                "strides: expected at least cols (%" PRId64 ") and rows (%" PRId64 "), got %" PRId64 " and %" PRId64,
                call.w.cols, call.w.rows, x_stride, y_stride);
  const cuda::MatmulPlan plan = cuda::plan_matmul(call.w, tokens, dtype, activations, *target.device);
  LOWBIT_TRY(check_workspace(workspace, workspace_bytes, size_t(plan.workspace_bytes)));
  call.x = x;
  call.dtype = dtype;
  call.tokens = tokens;
  call.x_stride = x_stride;
  call.bias = bias;
  call.bias_dtype = bias_dtype;
  call.y = y;
  call.y_stride = y_stride;
  call.activations = activations;
  call.workspace = workspace;
  call.workspace_bytes = workspace_bytes;
  return run([&](CudaMessage* message) { return target.backend->matmul(queue, target.device, &call, message); });
}

lowbit_status lowbit_cuda_gather(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const void* ids,
                                 lowbit_dtype id_dtype, int64_t count, lowbit_id_policy policy, int64_t padding_id,
                                 int64_t* first_bad, void* out, lowbit_dtype out_dtype, int64_t out_stride) {
  CudaGather call{};
  LOWBIT_TRY(check_gather(w, ids, id_dtype, count, policy, first_bad, count, out, out_dtype, out_stride, &call));
  call.padding_id = padding_id;
  Target target;
  LOWBIT_TRY(find_target(queue, &target));
  if (count == 0) return LOWBIT_OK;
  return run([&](CudaMessage* message) { return target.backend->gather(queue, &call, message); });
}

lowbit_status lowbit_cuda_gather_bags(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const void* ids,
                                      lowbit_dtype id_dtype, int64_t count, const int64_t* offsets, int64_t bags,
                                      const float* weights, int mean, lowbit_id_policy policy, int64_t padding_id,
                                      int64_t* first_bad, void* out, lowbit_dtype out_dtype, int64_t out_stride) {
  CudaGather call{};
  LOWBIT_TRY(check_gather(w, ids, id_dtype, count, policy, first_bad, bags, out, out_dtype, out_stride, &call));
  if (bags > 0 && !offsets) return fail(LOWBIT_INVALID_ARGUMENT, "offsets: expected a pointer, got NULL");
  if (mean && weights) return fail(LOWBIT_INVALID_ARGUMENT, "weights: expected NULL with mean, got a pointer");
  call.padding_id = padding_id;
  call.offsets = offsets;
  call.bags = bags;
  call.weights = weights;
  call.mean = mean != 0;
  Target target;
  LOWBIT_TRY(find_target(queue, &target));
  if (bags == 0) return LOWBIT_OK;
  return run([&](CudaMessage* message) { return target.backend->gather(queue, &call, message); });
}

lowbit_status lowbit_cuda_unpack(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t row_begin,
                                 int64_t row_end, void* out, lowbit_dtype out_dtype, int64_t out_stride) {
  CudaGather call{};
  LOWBIT_TRY(check_for_gpu(w, &call.w));
  LOWBIT_TRY(check_float("out", out_dtype));
  LOWBIT_TRY(check_rows(call.w, row_begin, row_end, out));
  if (row_end - row_begin > 1 && out_stride < call.w.cols)
    return fail(LOWBIT_INVALID_ARGUMENT, "out: expected a stride of at least cols (%" PRId64 "), got %" PRId64,
                call.w.cols, out_stride);
  Target target;
  LOWBIT_TRY(find_target(queue, &target));
  if (row_end == row_begin) return LOWBIT_OK;
  call.row_begin = row_begin;
  call.count = row_end - row_begin;
  call.policy = LOWBIT_IDS_ZERO;
  call.padding_id = -1;
  call.out = out;
  call.out_dtype = out_dtype;
  call.out_stride = out_stride;
  return run([&](CudaMessage* message) { return target.backend->gather(queue, &call, message); });
}

lowbit_status lowbit_cuda_unpack_codes(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t row_begin,
                                       int64_t row_end, uint8_t* out) {
  lowbit_matrix m;
  LOWBIT_TRY(check_for_gpu(w, &m));
  LOWBIT_TRY(check_rows(m, row_begin, row_end, out));
  Target target;
  LOWBIT_TRY(find_target(queue, &target));
  if (row_end == row_begin) return LOWBIT_OK;
  return run(
      [&](CudaMessage* message) { return target.backend->unpack_codes(queue, &m, row_begin, row_end, out, message); });
}

lowbit_status lowbit_cuda_pack_codes(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const uint8_t* codes,
                                     uint8_t* codes_out, int64_t* first_bad) {
  if (!w) return fail(LOWBIT_INVALID_ARGUMENT, "matrix: expected a pointer, got NULL");
  if (!codes || !codes_out) return fail(LOWBIT_INVALID_ARGUMENT, "codes: expected pointers, got NULL");
  lowbit_matrix view = *w, m;  // its scales play no part: any pointer stands for them in the checks
  view.codes = codes_out;
  view.scales = codes;
  view.scale_dtype = LOWBIT_F32;
  view.perm = nullptr;
  LOWBIT_TRY(check_for_gpu(&view, &m));
  Target target;
  LOWBIT_TRY(find_target(queue, &target));
  return run([&](CudaMessage* message) {
    return target.backend->pack_codes(queue, &m, codes, codes_out, first_bad, message);
  });
}

lowbit_status lowbit_cuda_matrix_check(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t* bad,
                                       void* workspace, size_t workspace_bytes) {
  lowbit_matrix m;
  LOWBIT_TRY(check_for_gpu(w, &m));
  if (!bad) return fail(LOWBIT_INVALID_ARGUMENT, "bad: expected a pointer, got NULL");
  LOWBIT_TRY(check_workspace(workspace, workspace_bytes, m.perm ? size_t(4 * m.cols) : 0));
  Target target;
  LOWBIT_TRY(find_target(queue, &target));
  return run([&](CudaMessage* message) {
    return target.backend->check(queue, &m, bad, static_cast<uint32_t*>(workspace), message);
  });
}

lowbit_status lowbit_cuda_gptq_workspace(const lowbit_gptq_options* options, int64_t rows, int64_t cols,
                                         size_t* bytes) {
  if (!bytes) return fail(LOWBIT_INVALID_ARGUMENT, "bytes: expected a pointer, got NULL");
  CudaSolve call{};
  LOWBIT_TRY(solve_call(options, rows, cols, &call));
  const CudaBackend* backend;
  LOWBIT_TRY(cuda_backend(&backend));
  *bytes = backend->solve_workspace(&call);
  return LOWBIT_OK;
}

lowbit_status lowbit_cuda_gptq_solve(const lowbit_cuda_queue* queue, const lowbit_gptq_options* options, int64_t rows,
                                     int64_t cols, const float* weight, const float* factor, const int32_t* group_index,
                                     uint8_t* codes, float* scales, uint8_t* zeros, double* loss, void* workspace,
                                     size_t workspace_bytes) {
  CudaSolve call{};
  LOWBIT_TRY(solve_call(options, rows, cols, &call));
  if (!weight || !codes || !scales)
    return fail(LOWBIT_INVALID_ARGUMENT, "gptq: expected pointers to weight, codes and scales, got NULL");
  if (!call.options.symmetric && !zeros)
    return fail(LOWBIT_INVALID_ARGUMENT, "zeros: expected a pointer for an asymmetric grid, got NULL");
  if (group_index && !call.options.static_grids)
    return fail(LOWBIT_INVALID_ARGUMENT, "group_index: expected NULL without static_grids, got a pointer");
  Target target;
  LOWBIT_TRY(find_target(queue, &target));
  LOWBIT_TRY(check_workspace(workspace, workspace_bytes, target.backend->solve_workspace(&call)));
  call.weight = weight;
  call.factor = factor;
  call.group_index = group_index;
  call.codes = codes;
  call.scales = scales;
  call.zeros = zeros;
  call.loss = loss;
  call.workspace = workspace;
  call.workspace_bytes = workspace_bytes;
  return run([&](CudaMessage* message) { return target.backend->solve(queue, &call, message); });
}
}
