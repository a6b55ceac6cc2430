// The GPU section of the C API: what is refused and in which words, and that every verb goes through the loader to the
// library and back. The library is the emulated one, opened by name as the real one is.
#include <cstdlib>
#include <cstring>

#include "control.h"
#include "matrices.h"

namespace {

std::mt19937 random_bits(4);
const lowbit_cuda_queue kQueue = {0, nullptr};

void refused(lowbit_status got, lowbit_status wanted, const char* words) {
  CHECK(got == wanted, "expected %s, got %s: %s", lowbit_status_name(wanted), lowbit_status_name(got),
        lowbit_last_error());
  CHECK(strstr(lowbit_last_error(), words), "expected \"%s\" in \"%s\"", words, lowbit_last_error());
}

void test_device() {
  int32_t count = -1;
  CHECK(lowbit_cuda_device_count(&count) == LOWBIT_OK && count == 1, "%d devices: %s", count, lowbit_last_error());
  CHECK(!strcmp(lowbit_cuda_architectures(), "emulated"), "%s", lowbit_cuda_architectures());
  lowbit_cuda_device device;
  CHECK(lowbit_cuda_describe(0, &device) == LOWBIT_OK && device.arch == 90 && device.multiprocessors == 4, "sm_%d",
        device.arch);
  refused(lowbit_cuda_describe(1, &device), LOWBIT_INVALID_ARGUMENT, "device: expected an index in [0, 1), got 1");
  refused(lowbit_cuda_describe(-1, &device), LOWBIT_INVALID_ARGUMENT, "device");
  refused(lowbit_cuda_device_count(nullptr), LOWBIT_INVALID_ARGUMENT, "count");
}

void test_matmul() {
  const TestMatrix w({4, 20, 300, 128, true, false, 0, LOWBIT_F16, true}, random_bits);
  lowbit_cuda_device device;
  lowbit_cuda_describe(0, &device);
  lowbit_cuda_plan plan;
  CHECK(lowbit_cuda_matmul_plan(&device, &w.view, 0, LOWBIT_F16, LOWBIT_ACT_FLOAT, &plan) == LOWBIT_OK &&
            !plan.workspace_bytes,
        "M = 0");
  CHECK(lowbit_cuda_matmul_plan(&device, &w.view, 40, LOWBIT_F16, LOWBIT_ACT_FLOAT, &plan) == LOWBIT_OK, "%s",
        lowbit_last_error());
  CHECK(!strcmp(plan.kernel, "int4_tile") && plan.workspace_bytes > 0, "%s", plan.kernel);
  std::vector<uint16_t> x(40 * 300, 0x3c00), y(40 * 20);
  void* workspace = aligned_alloc(256, plan.workspace_bytes);
  memset(workspace, 0, plan.workspace_bytes);
  auto call = [&](const lowbit_cuda_queue* queue, lowbit_dtype dtype, int64_t tokens, int64_t x_stride, void* scratch,
                  size_t bytes) {
    return lowbit_cuda_matmul(queue, &w.view, x.data(), dtype, tokens, x_stride, nullptr, LOWBIT_F32, y.data(), 20,
                              LOWBIT_ACT_FLOAT, scratch, bytes);
  };
  CHECK(call(&kQueue, LOWBIT_F16, 40, 300, workspace, plan.workspace_bytes) == LOWBIT_OK, "%s", lowbit_last_error());
  CHECK(call(&kQueue, LOWBIT_F16, 0, 300, nullptr, 0) == LOWBIT_OK, "%s", lowbit_last_error());
  for (int64_t n = 0; n < 20; n++) {
    double sum = 0;
    for (int64_t k = 0; k < 300; k++) sum += w.dense[size_t(n * 300 + k)];
    const double got = lowbit::load_float(y.data(), LOWBIT_F16, 39 * 20 + n);
    CHECK(std::fabs(got - sum) <= std::fabs(sum) / 1000, "row %ld: got %g, wanted %g", long(n), got, sum);
  }
  refused(call(&kQueue, LOWBIT_F16, 40, 300, workspace, plan.workspace_bytes - 1), LOWBIT_INVALID_ARGUMENT,
          "workspace: expected");
  refused(call(&kQueue, LOWBIT_F16, 40, 300, nullptr, 0), LOWBIT_INVALID_ARGUMENT, "workspace");
  refused(call(&kQueue, LOWBIT_F16, 40, 299, workspace, plan.workspace_bytes), LOWBIT_INVALID_ARGUMENT, "strides");
  refused(call(&kQueue, LOWBIT_I32, 40, 300, workspace, plan.workspace_bytes), LOWBIT_INVALID_ARGUMENT,
          "x: expected dtype");
  refused(call(&kQueue, LOWBIT_F16, -1, 300, workspace, plan.workspace_bytes), LOWBIT_INVALID_ARGUMENT, "tokens");
  const lowbit_cuda_queue elsewhere = {3, nullptr};
  refused(call(&elsewhere, LOWBIT_F16, 1, 300, workspace, plan.workspace_bytes), LOWBIT_INVALID_ARGUMENT,
          "device: expected");
  refused(call(nullptr, LOWBIT_F16, 1, 300, workspace, plan.workspace_bytes), LOWBIT_INVALID_ARGUMENT, "queue");
  lowbit_matrix bad = w.view;
  bad.codes += 8;
  refused(lowbit_cuda_matmul(&kQueue, &bad, x.data(), LOWBIT_F16, 1, 300, nullptr, LOWBIT_F32, y.data(), 20,
                             LOWBIT_ACT_FLOAT, nullptr, 0),
          LOWBIT_INVALID_ARGUMENT, "codes: expected an address at a multiple of 16");
  bad = w.view;
  bad.rows = int64_t(1) << 31;
  bad.scale_rows = bad.rows;
  refused(lowbit_cuda_matmul(&kQueue, &bad, x.data(), LOWBIT_F16, 1, 300, nullptr, LOWBIT_F32, y.data(), bad.rows,
                             LOWBIT_ACT_FLOAT, nullptr, 0),
          LOWBIT_UNSUPPORTED, "rows: expected at most 2^31 - 1 on a GPU");
  free(workspace);
}

// A perm that nobody checked gives bad numbers and reads nothing that is not its own.
void test_hostile_perm() {
  TestMatrix w({4, 20, 300, 128, false, true, 0, LOWBIT_F16, true}, random_bits);
  for (size_t k = 0; k < w.perm.size(); k++) w.perm[k] = k % 3 ? int32_t(k * 1000003) : -int32_t(k);
  std::vector<uint16_t> x(300, 0x3c00), y(20);
  CHECK(lowbit_cuda_matmul(&kQueue, &w.view, x.data(), LOWBIT_F16, 1, 300, nullptr, LOWBIT_F32, y.data(), 20,
                           LOWBIT_ACT_FLOAT, nullptr, 0) == LOWBIT_OK,
        "%s", lowbit_last_error());
}

void test_rows() {
  const TestMatrix w({3, 9, 130, 64, false, false, 0, LOWBIT_BF16, false}, random_bits);
  std::vector<float> out(9 * 130), wanted(9 * 130);
  std::vector<uint8_t> codes(9 * 130), lines(w.lines.size());
  CHECK(lowbit_cuda_unpack(&kQueue, &w.view, 2, 9, out.data(), LOWBIT_F32, 130) == LOWBIT_OK, "%s",
        lowbit_last_error());
  CHECK(lowbit_unpack(&w.view, 2, 9, wanted.data(), LOWBIT_F32, 130) == LOWBIT_OK, "%s", lowbit_last_error());
  CHECK(out == wanted, "unpack differs from the CPU");
  CHECK(lowbit_cuda_unpack_codes(&kQueue, &w.view, 0, 9, codes.data()) == LOWBIT_OK && codes == w.codes,
        "unpack_codes");
  CHECK(
      lowbit_cuda_pack_codes(&kQueue, &w.view, w.codes.data(), lines.data(), nullptr) == LOWBIT_OK && lines == w.lines,
      "pack_codes");
  refused(lowbit_cuda_unpack(&kQueue, &w.view, 2, 10, out.data(), LOWBIT_F32, 130), LOWBIT_OUT_OF_RANGE,
          "rows: expected a range");

  const int64_t ids[] = {3, 9, 0, -1};
  int64_t bad = INT64_MAX;
  CHECK(lowbit_cuda_gather(&kQueue, &w.view, ids, LOWBIT_I64, 4, LOWBIT_IDS_ERROR, -1, &bad, out.data(), LOWBIT_F32,
                           130) == LOWBIT_OK,
        "%s", lowbit_last_error());
  CHECK(bad == 1, "the first bad id is at 1, got %ld", long(bad));
  const int64_t offsets[] = {0, 2, 2, 4};
  CHECK(lowbit_cuda_gather_bags(&kQueue, &w.view, ids, LOWBIT_I64, 4, offsets, 3, nullptr, 1, LOWBIT_IDS_ZERO, -1,
                                nullptr, out.data(), LOWBIT_F32, 130) == LOWBIT_OK,
        "%s", lowbit_last_error());
  CHECK(out[130] == 0 && out[259] == 0, "an empty bag is zeros");
  const float weights[] = {1, 2, 3, 4};
  refused(lowbit_cuda_gather_bags(&kQueue, &w.view, ids, LOWBIT_I64, 4, offsets, 3, weights, 1, LOWBIT_IDS_ZERO, -1,
                                  nullptr, out.data(), LOWBIT_F32, 130),
          LOWBIT_INVALID_ARGUMENT, "weights: expected NULL with mean");
  refused(lowbit_cuda_gather(&kQueue, &w.view, ids, LOWBIT_F32, 4, LOWBIT_IDS_ZERO, -1, nullptr, out.data(), LOWBIT_F32,
                             130),
          LOWBIT_INVALID_ARGUMENT, "ids: expected dtype");
  refused(lowbit_cuda_gather(&kQueue, &w.view, ids, LOWBIT_I64, 4, LOWBIT_IDS_ERROR, -1, nullptr, out.data(),
                             LOWBIT_F32, 130),
          LOWBIT_INVALID_ARGUMENT, "first_bad");
  refused(lowbit_cuda_gather(&kQueue, &w.view, ids, LOWBIT_I64, 4, LOWBIT_IDS_ZERO, -1, nullptr, out.data(), LOWBIT_F32,
                             100),
          LOWBIT_INVALID_ARGUMENT, "stride");

  std::vector<int64_t> places(4, INT64_MAX);
  TestMatrix damaged({4, 9, 130, 64, true, true, 0, LOWBIT_F32, false}, random_bits);
  void* scratch = aligned_alloc(256, 1024);
  CHECK(lowbit_cuda_matrix_check(&kQueue, &damaged.view, places.data(), scratch, 1024) == LOWBIT_OK, "%s",
        lowbit_last_error());
  for (const int64_t place : places) CHECK(place == INT64_MAX, "nothing is wrong, got %ld", long(place));
  damaged.zeros[5] = 16;
  damaged.perm[7] = damaged.perm[3];
  CHECK(lowbit_cuda_matrix_check(&kQueue, &damaged.view, places.data(), scratch, 1024) == LOWBIT_OK, "%s",
        lowbit_last_error());
  CHECK(places[0] == INT64_MAX && places[1] == 5 && places[2] == 7, "got %ld %ld %ld", long(places[0]), long(places[1]),
        long(places[2]));
  free(scratch);
}

void test_solver() {
  const int64_t rows = 5, cols = 48;
  std::vector<float> weight(size_t(rows * cols)), scales(size_t(rows * 3)), cpu_scales(scales.size());
  for (auto& v : weight) v = float(int(random_bits() % 2001) - 1000) / 1000;
  std::vector<uint8_t> codes(weight.size()), cpu_codes(weight.size());
  const lowbit_gptq_options options = {LOWBIT_INT4, 16, 1, 0, 0, LOWBIT_F16, 0};
  size_t bytes = 0;
  CHECK(lowbit_cuda_gptq_workspace(&options, rows, cols, &bytes) == LOWBIT_OK && bytes > 0, "%s", lowbit_last_error());
  void* workspace = aligned_alloc(256, (bytes + 255) / 256 * 256);
  CHECK(lowbit_cuda_gptq_solve(&kQueue, &options, rows, cols, weight.data(), nullptr, nullptr, codes.data(),
                               scales.data(), nullptr, nullptr, workspace, bytes) == LOWBIT_OK,
        "%s", lowbit_last_error());
  CHECK(lowbit_gptq_solve(&options, rows, cols, weight.data(), nullptr, nullptr, cpu_codes.data(), cpu_scales.data(),
                          nullptr, nullptr) == LOWBIT_OK,
        "%s", lowbit_last_error());
  CHECK(codes == cpu_codes && scales == cpu_scales, "the solver differs from the CPU's");
  refused(lowbit_cuda_gptq_solve(&kQueue, &options, rows, cols, weight.data(), nullptr, nullptr, codes.data(),
                                 scales.data(), nullptr, nullptr, nullptr, 0),
          LOWBIT_INVALID_ARGUMENT, "workspace");
  lowbit_gptq_options wrong = options;
  wrong.group_size = 17;
  refused(lowbit_cuda_gptq_workspace(&wrong, rows, cols, &bytes), LOWBIT_INVALID_ARGUMENT, "group_size");
  free(workspace);
}

}  // namespace

int main() {
  setenv("LOWBIT_CUDA_LIBRARY", LOWBIT_EMULATED_LIBRARY, 1);
  test_device();
  test_matmul();
  test_hostile_perm();
  test_rows();
  test_solver();
  CHECK(lowbit::emulation::violations() == 0, "%s", lowbit::emulation::message(0));
  lowbit::emulation::clear();
  return check::finish("GPU C API");
}
