// Without a CUDA library every GPU call is refused with one sentence that says what is missing and what to do, and the
// plan of a product, which needs no GPU, is still given.
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "lowbit/lowbit.h"

int main() {
  setenv("LOWBIT_CUDA_LIBRARY", "/nonexistent/liblowbit_cuda.so.0", 1);
  int32_t count = 7;
  CHECK(lowbit_cuda_device_count(&count) == LOWBIT_UNSUPPORTED && count == 0, "%d", count);
  CHECK(
      strstr(lowbit_last_error(), "/nonexistent/liblowbit_cuda.so.0") && strstr(lowbit_last_error(), "LOWBIT_CUDA=ON"),
      "%s", lowbit_last_error());
  CHECK(!strcmp(lowbit_cuda_architectures(), ""), "%s", lowbit_cuda_architectures());
  const uint8_t codes[64] alignas(64) = {};
  const float scale = 1, x[16] = {};
  float y = 0;
  lowbit_matrix w{};
  w.format = LOWBIT_INT4, w.rows = 1, w.cols = 16, w.group_size = -1, w.codes = codes, w.scales = &scale,
  w.scale_rows = w.scale_cols = 1;
  const lowbit_cuda_queue queue = {0, nullptr};
  CHECK(lowbit_cuda_matmul(&queue, &w, x, LOWBIT_F32, 1, 16, nullptr, LOWBIT_F32, &y, 1, LOWBIT_ACT_FLOAT, nullptr,
                           0) == LOWBIT_UNSUPPORTED,
        "%s", lowbit_last_error());
  lowbit_cuda_device device{};
  device.arch = 90, device.multiprocessors = 132, device.shared_per_block = 227 << 10, device.shared_per_sm = 228 << 10;
  lowbit_cuda_plan plan;
  CHECK(lowbit_cuda_matmul_plan(&device, &w, 4096, LOWBIT_F16, LOWBIT_ACT_FLOAT, &plan) == LOWBIT_OK &&
            plan.prefers_unpack && !strcmp(plan.kernel, "int4_tile"),
        "%s", plan.kernel);
  return check::finish("no GPU");
}
