// Products on the emulated GPU: every format, kernel and kind of scales, on devices of each kind,
// against float64; exact where the arithmetic is; independent of the batch; with no violation of the emulator's rules
// and with proof that the kernel meant is the one that ran.
#include <cstring>

#include "control.h"
#include "cuda/verbs.cuh"
#include "matrices.h"

namespace {

std::mt19937 random_bits(20261122);

lowbit_cuda_device described(int architecture, int multiprocessors = 4) {
  lowbit::emulation::Device device = lowbit::emulation::device_of(architecture);
  device.multiprocessors = multiprocessors;
  lowbit::emulation::set_device(device);
  lowbit_cuda_device d{};
  d.arch = architecture;
  d.multiprocessors = multiprocessors;
  d.shared_per_block = int32_t(device.shared_per_block);
  d.shared_per_sm = int32_t(device.shared_per_multiprocessor);
  return d;
}

struct Run {
  const char* name;  // for messages
  lowbit_dtype dtype;
  lowbit_activations mode;
  bool exact;
};

std::string describe(const Case& c, const Run& run, int64_t tokens, const char* kernel) {
  char text[240];
  snprintf(text, sizeof text, "%s %s %ldx%ld g%ld zeros %d perm %d scales %d/%d tokens %ld dtype %d mode %d", run.name,
           kernel, long(c.rows), long(c.cols), long(c.group_size), c.zeros, c.perm, c.scale_shape, int(c.scale_dtype),
           long(tokens), int(run.dtype), int(run.mode));
  return text;
}

void check_clean(const std::string& what) {
  CHECK(lowbit::emulation::violations() == 0, "%s: %ld violations, %s", what.c_str(),
        long(lowbit::emulation::violations()), lowbit::emulation::message(0));
}

std::vector<uint8_t> activations(int64_t count, const Run& run) {
  std::vector<uint8_t> x(size_t(count) * (run.dtype == LOWBIT_F32 ? 4 : 2));
  std::normal_distribution<float> normal(0.3f);
  for (int64_t i = 0; i < count; i++) {
    float value = normal(random_bits);
    if (run.exact)
      value = run.mode == LOWBIT_ACT_INT8 ? (random_bits() % 2 ? 127.0f : -127.0f) : float(int(random_bits() % 7) - 3);
    lowbit::store_float(x.data(), run.dtype, i, value);
  }
  return x;
}

// The workspace is poisoned beyond its tickets, so that a kernel which counted on zeros shows.
std::vector<uint8_t> multiply(const TestMatrix& w, const lowbit_cuda_device& device, const std::vector<uint8_t>& x,
                              const Run& run, int64_t tokens, const std::vector<float>& bias, lowbit_cuda_plan* plan) {
  const lowbit_matrix& m = w.view;
  const size_t width = run.dtype == LOWBIT_F32 ? 4 : 2;
  CHECK(lowbit_cuda_matmul_plan(&device, &m, tokens, run.dtype, run.mode, plan) == LOWBIT_OK, "%s",
        lowbit_last_error());
  void* workspace = aligned_alloc(256, plan->workspace_bytes + 256);
  memset(workspace, 0xA5, plan->workspace_bytes + 256);
  memset(workspace, 0, plan->zeroed_bytes);
  std::vector<uint8_t> y(size_t(tokens * m.rows) * width, 0xEE);
  const lowbit_cuda_queue queue{0, nullptr};
  lowbit::CudaMatmul call{};
  call.w = m;
  if (m.group_size == -1) call.w.group_size = m.cols;
  call.x = x.data();
  call.dtype = run.dtype;
  call.tokens = tokens;
  call.x_stride = m.cols;
  call.bias = bias.data();
  call.bias_dtype = LOWBIT_F32;
  call.y = y.data();
  call.y_stride = m.rows;
  call.activations = run.mode;
  call.workspace = workspace;
  call.workspace_bytes = plan->workspace_bytes;
  lowbit::CudaMessage message{};
  for (int again = 0; again < 2; again++)  // the second call finds the tickets as the first left them
    CHECK(lowbit::cuda::matmul(&queue, &device, &call, &message) == LOWBIT_OK, "%s", message.text);
  for (size_t i = 0; i < 256; i++)
    CHECK(static_cast<uint8_t*>(workspace)[plan->workspace_bytes + i] == 0xA5, "written beyond the workspace");
  free(workspace);
  return y;
}

// token_counts: the largest first; smaller batches are its first tokens and must give the same bits, where the kernel
// is the same.
void test(const Case& c, const lowbit_cuda_device& device, const Run& run, const std::vector<int64_t>& token_counts,
          const char* kernel) {
  const TestMatrix w(c, random_bits);
  const auto x = activations(token_counts.front() * c.cols, run);
  std::vector<float> bias(size_t(c.rows));
  for (auto& b : bias) b = run.exact ? float(int(random_bits() % 64)) : float(random_bits() % 1000) / 500 - 1;
  std::vector<uint8_t> all;
  std::string all_by;
  for (const int64_t tokens : token_counts) {
    lowbit::emulation::clear();
    lowbit_cuda_plan plan;
    const auto y = multiply(w, device, x, run, tokens, bias, &plan);
    const std::string what = describe(c, run, tokens, plan.kernel);
    check_clean(what);
    CHECK(plan.kernel == format_name(c.bits) + "_" +
                             (kernel        ? kernel
                              : tokens > 16 ? "tile"
                                            : "decode"),
          "%s", what.c_str());
    const auto counters = lowbit::emulation::counters();
    const bool integer = strstr(plan.kernel, "integer"), plain = strstr(plan.kernel, "plain");
    CHECK((integer                    ? counters.mma_u8s8
           : run.dtype == LOWBIT_BF16 ? counters.mma_bf16
                                      : counters.mma_f16) > 0 ||
              plain,
          "%s: no tensor core was used", what.c_str());
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t n = 0; n < c.rows; n++) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < c.cols; k++) {
          const double product =
              w.dense[size_t(n * c.cols + k)] * lowbit::load_float(x.data(), run.dtype, m * c.cols + k);
          sum += product;
          size += product * product;
        }
        const double got = lowbit::load_float(y.data(), run.dtype, m * c.rows + n), wanted = sum + bias[size_t(n)];
        const double rounding = run.dtype == LOWBIT_F16 ? 1.0 / 2048 : run.dtype == LOWBIT_BF16 ? 1.0 / 256 : 1e-6;
        const double error = run.mode == LOWBIT_ACT_INT8 ? 2e-2 : integer ? 3e-4 : 1e-5;
        // Sums of integers below 2^24 are exact; what is left is the one rounding of the result.
        const double bound = run.exact ? rounding * std::fabs(wanted)
                                       : rounding * std::fabs(wanted) + error * std::sqrt(size * double(c.cols)) + 1e-6;
        CHECK(std::fabs(got - wanted) <= bound, "%s [%ld,%ld]: got %.9g, wanted %.9g, bound %g", what.c_str(), long(m),
              long(n), got, wanted, bound);
      }
    if (all.empty() || all_by != plan.kernel) all = y, all_by = plan.kernel;
    CHECK(!memcmp(y.data(), all.data(), y.size()), "%s: differs from the larger batch", what.c_str());
    // A trit row with one scale is one integer: the CPU's bits.
    if (integer && c.bits == lowbit::kTrit && c.group_size == -1) {
      std::vector<uint8_t> cpu(y.size());
      CHECK(lowbit_matmul(&w.view, x.data(), run.dtype, tokens, c.cols, bias.data(), LOWBIT_F32, cpu.data(), c.rows,
                          run.mode, nullptr, 0) == LOWBIT_OK,
            "%s", lowbit_last_error());
      CHECK(!memcmp(y.data(), cpu.data(), y.size()), "%s: differs from the CPU", what.c_str());
    }
  }
}

const lowbit_dtype kScaleDtypes[] = {LOWBIT_F32, LOWBIT_F16, LOWBIT_BF16};

void test_decode(int bits) {
  const bool trit = bits == lowbit::kTrit;
  const char* kernel = trit ? "integer" : nullptr;
  int turn = bits;
  const lowbit_cuda_device hopper = described(90);
  // Edges of planes, units, slices and chunks; whole-row scales of each shape; exact integers.
  for (const int64_t cols : {1, 16, 63, 65, 129, 255, 257, 320, 500, 513, 1000, 1025, 2049}) {
    const Case c{bits,     turn % 4 ? 17 : 1,      cols, -1, !trit && turn % 2 == 0, turn % 3 == 0,
                 turn % 3, kScaleDtypes[turn % 3], true};
    test(c, hopper, {"row", turn % 2 ? LOWBIT_F16 : LOWBIT_BF16, LOWBIT_ACT_FLOAT, true}, {3, 1}, kernel);
    turn++;
  }
  // Groups of whole units, whole planes, and finer ones.
  for (const int64_t group : {16, 32, 48, 64, 80, 128, 192, 256, 512}) {
    const int64_t cols = group < 100 ? 400 : 1031;
    const Case c{bits, 33, cols, group, !trit && turn % 2 == 0, turn % 4 == 1, 0, kScaleDtypes[turn % 3], false};
    test(c, hopper, {"group", turn % 2 ? LOWBIT_F16 : LOWBIT_BF16, LOWBIT_ACT_FLOAT, false}, {9, 8, 1}, kernel);
    turn++;
  }
  // Every number of tokens of a pass, many tiles of rows a block.
  test({bits, 150, 640, 128, false, false, 0, LOWBIT_F16, false}, hopper,
       {"tokens", LOWBIT_F16, LOWBIT_ACT_FLOAT, false}, {16, 15, 9, 8, 7, 5, 4, 3, 2, 1}, kernel);
  // Several chunks a block, and blocks that share rows: few rows, long rows, many multiprocessors.
  test({bits, 5, 9000, 128, !trit, false, 0, LOWBIT_F16, false}, described(90, 64),
       {"split", LOWBIT_BF16, LOWBIT_ACT_FLOAT, false}, {16, 8, 1}, kernel);
  test({bits, 40, 6200, -1, false, true, 1, LOWBIT_F32, false}, described(90, 1),
       {"rounds", LOWBIT_F16, LOWBIT_ACT_FLOAT, false}, {8, 1}, kernel);
  // int8 activations.
  for (const int64_t group : {int64_t(-1), int64_t(128), int64_t(32)})
    test({bits, 19, 700, group, !trit, true, 0, LOWBIT_F16, false}, hopper,
         {"int8", group == 128 ? LOWBIT_F32 : LOWBIT_F16, LOWBIT_ACT_INT8, false}, {18, 9, 1}, "integer");
  test({bits, 19, 700, -1, false, false, 2, LOWBIT_F32, true}, hopper, {"int8", LOWBIT_F32, LOWBIT_ACT_INT8, true},
       {3, 1}, "integer");
}

void test_devices(int bits) {
  const bool trit = bits == lowbit::kTrit;
  const Case c{bits, 33, 1300, 64, !trit, false, 0, LOWBIT_F16, false},
      fine{bits, 9, 200, 48, !trit, true, 0, LOWBIT_BF16, false};
  for (const int arch : {75, 80, 86, 89, 100, 120}) {
    const char* kernel = trit ? "integer" : bits == 3 && arch == 75 ? "plain" : "decode";  // its ring needs over 64 KB
    test(c, described(arch), {"device", LOWBIT_F16, LOWBIT_ACT_FLOAT, false}, {16, 3}, kernel);
    test(fine, described(arch), {"device", LOWBIT_F16, LOWBIT_ACT_FLOAT, false}, {5}, trit ? "integer" : "decode");
  }
  // Without tensor cores for it: bf16 before sm_80, anything before sm_75, fp32 anywhere.
  test(c, described(75), {"plain", LOWBIT_BF16, LOWBIT_ACT_FLOAT, false}, {6, 1}, trit ? "integer" : "plain");
  test(c, described(70), {"plain", LOWBIT_F16, LOWBIT_ACT_FLOAT, false}, {6, 1}, "plain");
  test(c, described(70), {"plain", LOWBIT_F16, LOWBIT_ACT_INT8, false}, {6, 1}, "plain");
  test(fine, described(70), {"plain", LOWBIT_F32, LOWBIT_ACT_FLOAT, false}, {6, 1}, "plain");
  if (!trit) test(c, described(90), {"plain", LOWBIT_F32, LOWBIT_ACT_FLOAT, false}, {9, 1}, "plain");
}

void test_tile(int bits) {
  int turn = bits;
  for (const int64_t group : {-1, 64, 128, 512}) {
    const Case c{bits, 145, 1100, group, turn % 2 == 0, turn % 3 == 0, 0, kScaleDtypes[turn % 3], turn % 2 == 0};
    const Run run{"tile", turn % 2 ? LOWBIT_F16 : LOWBIT_BF16, LOWBIT_ACT_FLOAT, false};
    test(c, described(90), run, {70, 33, 17}, "tile");
    turn++;
  }
  test({bits, 130, 520, 128, true, false, 0, LOWBIT_F16, true}, described(90),
       {"tile", LOWBIT_F16, LOWBIT_ACT_FLOAT, true}, {65, 40}, "tile");
  // 32 rows a warp; parts of K; devices with less shared memory.
  test({bits, 300, 520, 128, false, false, 0, LOWBIT_F16, false}, described(90, 1),
       {"wide", LOWBIT_F16, LOWBIT_ACT_FLOAT, false}, {64}, "tile");
  test({bits, 20, 6000, 128, false, false, 0, LOWBIT_F16, false}, described(90, 8),
       {"parts", LOWBIT_BF16, LOWBIT_ACT_FLOAT, false}, {40, 20}, "tile");
  for (const int arch : {75, 80, 89})
    test({bits, 40, 700, 128, false, false, 0, LOWBIT_F16, false}, described(arch),
         {"tile", LOWBIT_F16, LOWBIT_ACT_FLOAT, false}, {33, 18},
         bits != 3 || arch == 80 ? "tile"
         : arch == 75            ? "plain"
                                 : "decode");
}

// More tokens than one launch's grid takes: the last part is small, and still the same kernel's.
void test_parts_of_a_batch() {
  const Case c{8, 3, 16, -1, false, false, 0, LOWBIT_F32, true};
  const Run run{"parts", LOWBIT_F16, LOWBIT_ACT_FLOAT, true};
  const lowbit_cuda_device device = described(90);
  const TestMatrix w(c, random_bits);
  const int64_t tokens = 65535 * 4 + 5;
  const auto x = activations(tokens * c.cols, run);
  lowbit::emulation::clear();
  lowbit_cuda_plan plan;
  const auto y = multiply(w, device, x, run, tokens, std::vector<float>(3), &plan);
  check_clean("parts of a batch");
  for (int64_t m = tokens - 40; m < tokens; m++)
    for (int64_t n = 0; n < c.rows; n++) {
      double wanted = 0;
      for (int64_t k = 0; k < c.cols; k++)
        wanted += w.dense[size_t(n * c.cols + k)] * lowbit::load_float(x.data(), run.dtype, m * c.cols + k);
      const double got = lowbit::load_float(y.data(), run.dtype, m * c.rows + n);
      CHECK(std::fabs(got - wanted) <= std::fabs(wanted) / 2048, "token %ld row %ld: got %g, wanted %g", long(m),
            long(n), got, wanted);
    }
}

}  // namespace

int main(int count, char** arguments) {
  // An argument picks a format: 1 (trit), 2, 3, 4 or 8.
  for (const int bits : {4, 8, 2, 3, lowbit::kTrit}) {
    if (count > 1 && atoi(arguments[1]) != bits) continue;
    for (const uint64_t seed : {0, 7}) {
      lowbit::emulation::set_seed(seed);
      test_decode(bits);
      if (seed) continue;
      test_devices(bits);
      if (bits != lowbit::kTrit) test_tile(bits);
    }
  }
  if (count == 1) test_parts_of_a_batch();
  lowbit::emulation::clear();
  return check::finish("GPU products");
}
