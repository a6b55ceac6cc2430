// Every GPU verb and every kind of kernel once, on small shapes, against liblowbit's own CPU verbs and float64, through
// the C API alone: what `make gpu STAGE=sanitize` runs under compute-sanitizer, where a program has to be short. Built
// against the emulated device too (tests/emulation), so that it runs where there is no GPU.
//
// Buffers have exactly the size that the API asks for and start as 0xa5: a byte too far is an error of memcheck's, a
// result that was not written is one of ours.
#include <cstring>
#include <set>

#include "cuda/matmul_plan.h"
#include "matrices.h"

#if defined(LOWBIT_EMULATED)
static void* device_new(size_t bytes) { return aligned_alloc(256, bytes / 256 * 256 + 256); }
static void device_delete(void* memory) { free(memory); }
static void copy(void* to, const void* from, size_t bytes) {
  if (bytes) memcpy(to, from, bytes);
}
static void fill(void* to, int value, size_t bytes) { memset(to, value, bytes); }
static bool synchronised() { return true; }
#else
#include <cuda_runtime_api.h>
static void need(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA error %d, %s\n", int(error), cudaGetErrorString(error));
  std::exit(1);
}
static void* device_new(size_t bytes) {
  void* memory = nullptr;
  need(cudaMalloc(&memory, bytes ? bytes : 1));
  return memory;
}
static void device_delete(void* memory) { cudaFree(memory); }
static void copy(void* to, const void* from, size_t bytes) { need(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }
static void fill(void* to, int value, size_t bytes) { need(cudaMemset(to, value, bytes)); }
static bool synchronised() { return cudaDeviceSynchronize() == cudaSuccess; }
#endif

namespace {

constexpr lowbit_cuda_queue kQueue = {0, nullptr};
constexpr int kFormats[] = {4, 8, 2, 3, lowbit::kTrit};

template <class T>
class OnDevice {
 public:
  explicit OnDevice(size_t count, int byte = 0xa5)
      : count_(count), at_(static_cast<T*>(device_new(count * sizeof(T)))) {
    fill(at_, byte, count * sizeof(T));
  }
  explicit OnDevice(const std::vector<T>& values)
      : count_(values.size()), at_(static_cast<T*>(device_new(values.size() * sizeof(T)))) {
    copy(at_, values.data(), count_ * sizeof(T));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { device_delete(at_); }
  T* get() const { return at_; }
  std::vector<T> back() const {
    CHECK(synchronised(), "the device reported an error");
    std::vector<T> values(count_);
    copy(values.data(), at_, count_ * sizeof(T));
    return values;
  }

 private:
  size_t count_;
  T* at_;
};

using Bytes = OnDevice<uint8_t>;

// A matrix of the host, on the device.
class DeviceMatrix {
 public:
  explicit DeviceMatrix(const TestMatrix& m)
      : lines_(m.lines), scales_(m.scales), zeros_(m.zeros), perm_(m.perm), view(m.view) {
    view.codes = lines_.get();
    view.scales = scales_.get();
    view.zeros = m.view.zeros ? zeros_.get() : nullptr;
    view.perm = m.view.perm ? perm_.get() : nullptr;
  }

 private:
  Bytes lines_, scales_, zeros_;
  OnDevice<int32_t> perm_;

 public:
  lowbit_matrix view;
};

void ok(lowbit_status status, const std::string& what) {
  CHECK(status == LOWBIT_OK, "%s: %s", what.c_str(), lowbit_last_error());
}

size_t size_of(lowbit_dtype dtype) { return dtype == LOWBIT_F32 ? 4 : 2; }

// Values as they lie in memory.
std::vector<uint8_t> stored(const std::vector<float>& values, lowbit_dtype dtype) {
  std::vector<uint8_t> bytes(values.size() * size_of(dtype));
  for (size_t i = 0; i < values.size(); i++) lowbit::store_float(bytes.data(), dtype, int64_t(i), values[i]);
  return bytes;
}

lowbit_cuda_device device;
std::set<std::string> kernels;  // that products were planned for

struct Product {
  lowbit_dtype dtype;
  lowbit_activations activations;
  bool bias;
};

// y of `tokens` tokens against float64. Scales that are powers of two meet small integers: then every bit is right.
void multiply(const Case& c, const TestMatrix& m, const DeviceMatrix& w, int64_t tokens, const Product& p,
              std::mt19937& random) {
  const bool exact = c.powers_of_two;
  const std::string what = format_name(c.bits) + " " + std::to_string(c.rows) + "x" + std::to_string(c.cols) +
                           ", groups of " + std::to_string(c.group_size) + ", " + std::to_string(tokens) + " tokens, " +
                           (p.dtype == LOWBIT_F32   ? "f32"
                            : p.dtype == LOWBIT_F16 ? "f16"
                                                    : "bf16") +
                           (p.activations == LOWBIT_ACT_INT8 ? ", int8" : "");
  std::vector<float> values(size_t(tokens * c.cols)), bias(size_t(c.rows), 0.0f);
  for (auto& v : values)
    v = exact ? float(random() % 32 == 0) * float(int(random() % 3) - 1)
              : float(int(random() % 2001) - 1000) / 1000 + 0.3f;
  if (p.bias)
    for (auto& v : bias) v = float(int(random() % 9) - 4);
  const std::vector<uint8_t> x = stored(values, p.dtype);
  for (size_t i = 0; i < values.size(); i++) values[i] = lowbit::load_float(x.data(), p.dtype, int64_t(i));

  lowbit_cuda_plan plan;
  ok(lowbit_cuda_matmul_plan(&device, &w.view, tokens, p.dtype, p.activations, &plan), what);
  kernels.insert(plan.kernel);
  OnDevice<uint8_t> on_x(x), on_bias(stored(bias, p.dtype)), on_y(size_t(tokens * c.rows) * size_of(p.dtype));
  OnDevice<uint8_t> workspace(plan.workspace_bytes);
  fill(workspace.get(), 0, plan.zeroed_bytes);
  for (int turn = 0; turn < 2; turn++)  // the second finds the workspace as the first has left it
    ok(lowbit_cuda_matmul(&kQueue, &w.view, on_x.get(), p.dtype, tokens, c.cols, p.bias ? on_bias.get() : nullptr,
                          p.dtype, on_y.get(), c.rows, p.activations, plan.workspace_bytes ? workspace.get() : nullptr,
                          plan.workspace_bytes),
       what);
  const std::vector<uint8_t> y = on_y.back();
  double difference = 0, norm = 0;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t n = 0; n < c.rows; n++) {
      double expected = double(bias[size_t(n)]);
      for (int64_t k = 0; k < c.cols; k++)
        expected += double(values[size_t(t * c.cols + k)]) * m.dense[size_t(n * c.cols + k)];
      if (exact) {  // rounded once, as the kernel stores it
        const std::vector<uint8_t> rounded = stored({float(expected)}, p.dtype);
        expected = lowbit::load_float(rounded.data(), p.dtype, 0);
      }
      const double d = lowbit::load_float(y.data(), p.dtype, t * c.rows + n) - expected;
      difference += d * d;
      norm += expected * expected;
    }
  const double error = std::sqrt(difference / (norm > 0 ? norm : 1));
  const double most = exact                                 ? 0
                      : p.activations == LOWBIT_ACT_INT8    ? 2e-2
                      : p.dtype == LOWBIT_F32 && c.bits > 1 ? 1e-5
                      : p.dtype == LOWBIT_BF16              ? 4e-3
                                                            : 2e-3;
  CHECK(error <= most, "%s, %s: error %.2e, expected at most %.0e", what.c_str(), plan.kernel, error, most);
}

void test_products(int bits, std::mt19937& random) {
  const int64_t unit = lowbit::cuda::unit_cols(bits);
  int turn = 0;
  for (const int64_t group : {int64_t(-1), int64_t(64), unit, int64_t(16)}) {
    for (const bool exact : {false, true}) {
      const Case c{bits,
                   45,
                   2 * unit + 37,
                   group,
                   bits != lowbit::kTrit && turn % 2 == 0,
                   turn % 3 == 0,
                   0,
                   exact ? LOWBIT_F32 : lowbit_dtype(turn % 3),
                   exact};
      turn++;
      const TestMatrix m(c, random);
      const DeviceMatrix w(m);
      for (const lowbit_dtype dtype : {LOWBIT_F16, LOWBIT_BF16})
        for (const int64_t tokens : {1, 11, 20, 70})
          if (!exact || (dtype == LOWBIT_F16 && tokens != 70))
            multiply(c, m, w, tokens, {dtype, LOWBIT_ACT_FLOAT, turn % 2 == 0}, random);
      if (exact) continue;
      multiply(c, m, w, 5, {LOWBIT_F32, LOWBIT_ACT_FLOAT, true}, random);
      for (const int64_t tokens : {1, 16}) multiply(c, m, w, tokens, {LOWBIT_F16, LOWBIT_ACT_INT8, false}, random);
    }
  }
  // Parts of K, which the last block adds; and 32 rows a warp, where rows are many.
  const Case parts{bits, 20, 6000, 128, false, false, 0, LOWBIT_F16, false};
  const Case wide{bits, 256 * ((3 * int64_t(device.multiprocessors) + 3) / 4), 256, 128, false, false, 0, LOWBIT_F16,
                  false};
  for (const Case& c : {parts, wide}) {
    if (c.rows > 1000 && bits != 2 && bits != 4) continue;
    const TestMatrix m(c, random);
    const DeviceMatrix w(m);
    for (const int64_t tokens : {1, 64}) multiply(c, m, w, tokens, {LOWBIT_F16, LOWBIT_ACT_FLOAT, false}, random);
  }
}

void test_gather(int bits, std::mt19937& random) {
  int turn = 0;
  for (const int64_t cols : {int64_t(65), 4 * int64_t(lowbit::cuda::unit_cols(bits))})
    for (const bool perm : {false, true}) {
      const Case c{bits, 50, cols, 16, bits != lowbit::kTrit, perm, 0, lowbit_dtype(turn % 3), false};
      const TestMatrix m(c, random);
      const DeviceMatrix w(m);
      const std::string what = format_name(bits) + " gather, " + std::to_string(cols) + " columns";
      const lowbit_dtype dtype = lowbit_dtype(turn++ % 3);
      const size_t row = size_t(cols) * size_of(dtype);
      const std::vector<int64_t> ids = {3, 49, 0, -1, 17, 50, 17, 8, 2};
      const std::vector<int32_t> ids32(ids.begin(), ids.end());
      const int64_t count = int64_t(ids.size());
      std::vector<uint8_t> expected(ids.size() * row);

      ok(lowbit_gather(&m.view, ids.data(), LOWBIT_I64, count, LOWBIT_IDS_ZERO, expected.data(), dtype, cols), what);
      OnDevice<int64_t> on_ids(ids), first_bad(std::vector<int64_t>{INT64_MAX});
      OnDevice<int32_t> on_ids32(ids32);
      Bytes out(expected.size());
      ok(lowbit_cuda_gather(&kQueue, &w.view, on_ids.get(), LOWBIT_I64, count, LOWBIT_IDS_ERROR, -1, first_bad.get(),
                            out.get(), dtype, cols),
         what);
      CHECK(out.back() == expected, "%s: not the CPU's bits", what.c_str());
      CHECK(first_bad.back()[0] == 3, "%s: expected id 3 to be named", what.c_str());

      ok(lowbit_gather(&m.view, ids.data(), LOWBIT_I64, count, LOWBIT_IDS_CLAMP, expected.data(), dtype, cols), what);
      ok(lowbit_cuda_gather(&kQueue, &w.view, on_ids32.get(), LOWBIT_I32, count, LOWBIT_IDS_CLAMP, -1, nullptr,
                            out.get(), dtype, cols),
         what);
      CHECK(out.back() == expected, "%s: not the CPU's bits", what.c_str());

      const std::vector<int64_t> offsets = {0, 2, 2, 9};
      const std::vector<float> weights = {0.5f, -2, 1e-3f, 7, 0, 3, -0.25f, 1, 4};
      OnDevice<int64_t> on_offsets(offsets);
      OnDevice<float> on_weights(weights);
      expected.resize(3 * row);
      Bytes bags(expected.size());
      for (const bool weighted : {false, true})
        for (const int mean : {0, 1}) {
          if (weighted && mean) continue;
          ok(lowbit_gather_bags(&m.view, ids.data(), LOWBIT_I64, count, offsets.data(), 3,
                                weighted ? weights.data() : nullptr, mean, LOWBIT_IDS_CLAMP, 17, nullptr,
                                expected.data(), dtype, cols),
             what);
          ok(lowbit_cuda_gather_bags(&kQueue, &w.view, on_ids.get(), LOWBIT_I64, count, on_offsets.get(), 3,
                                     weighted ? on_weights.get() : nullptr, mean, LOWBIT_IDS_CLAMP, 17, nullptr,
                                     bags.get(), dtype, cols),
             what);
          CHECK(bags.back() == expected, "%s: bags (mean %d, weighted %d): not the CPU's bits", what.c_str(), mean,
                weighted);
        }

      expected.resize(20 * row);
      ok(lowbit_unpack(&m.view, 7, 27, expected.data(), dtype, cols), what);
      Bytes rows(expected.size());
      ok(lowbit_cuda_unpack(&kQueue, &w.view, 7, 27, rows.get(), dtype, cols), what);
      CHECK(rows.back() == expected, "%s: unpack: not the CPU's bits", what.c_str());
    }
}

void test_codes(int bits, std::mt19937& random) {
  for (const int64_t cols : {int64_t(130), 3 * int64_t(lowbit::cuda::unit_cols(bits))}) {
    const Case c{bits, 33, cols, 48, bits != lowbit::kTrit, true, 0, LOWBIT_F16, false};
    const TestMatrix m(c, random);
    const DeviceMatrix w(m);
    const std::string what = format_name(bits) + " codes, " + std::to_string(cols) + " columns";
    Bytes codes(m.codes), lines(m.lines.size()), back(m.codes.size());
    OnDevice<int64_t> bad(std::vector<int64_t>(4, INT64_MAX));
    ok(lowbit_cuda_pack_codes(&kQueue, &w.view, codes.get(), lines.get(), bad.get()), what);
    CHECK(lines.back() == m.lines, "%s: not the lines of lowbit_pack_codes", what.c_str());
    ok(lowbit_cuda_unpack_codes(&kQueue, &w.view, 0, c.rows, back.get()), what);
    CHECK(back.back() == m.codes, "%s: not the codes that went in", what.c_str());

    Bytes workspace(4 * size_t(cols));
    ok(lowbit_cuda_matrix_check(&kQueue, &w.view, bad.get(), workspace.get(), 4 * size_t(cols)), what);
    CHECK(bad.back() == std::vector<int64_t>(4, INT64_MAX), "%s: a good matrix was refused", what.c_str());
    std::vector<uint8_t> scales = m.scales;
    scales[2 * 5 + 1] = 0x7c, scales[2 * 5] = 0;  // infinity
    const Bytes on_scales(scales);
    lowbit_matrix spoilt = w.view;
    spoilt.scales = on_scales.get();
    ok(lowbit_cuda_matrix_check(&kQueue, &spoilt, bad.get(), workspace.get(), 4 * size_t(cols)), what);
    CHECK(bad.back()[0] == 5, "%s: expected scale 5 to be named", what.c_str());
  }
}

void test_solver(int bits, std::mt19937& random) {
  const int64_t rows = 40, cols = 200;
  std::vector<float> weight(size_t(rows * cols)), factor(size_t(cols * cols), 0.0f);
  for (auto& v : weight) v = float(int(random() % 2001) - 1000) / 1000;
  for (int64_t i = 0; i < cols; i++)
    for (int64_t j = i; j < cols; j++)
      factor[size_t(i * cols + j)] = i == j ? 1.0f : float(int(random() % 201) - 100) / 2000;
  for (const bool push : {true, false}) {
    lowbit_gptq_options o{};
    o.format = lowbit_format(bits);
    o.group_size = 64;
    o.symmetric = bits == lowbit::kTrit;
    o.clip = push;
    o.scale_dtype = LOWBIT_F16;
    const std::string what = format_name(bits) + " solver";
    const size_t groups = 4;
    std::vector<uint8_t> codes(weight.size()), zeros(size_t(rows) * groups);
    std::vector<float> scales(zeros.size());
    std::vector<double> loss(size_t(rows), 0.0);
    ok(lowbit_gptq_solve(&o, rows, cols, weight.data(), push ? factor.data() : nullptr, nullptr, codes.data(),
                         scales.data(), o.symmetric ? nullptr : zeros.data(), loss.data()),
       what);
    size_t bytes = 0;
    ok(lowbit_cuda_gptq_workspace(&o, rows, cols, &bytes), what);
    OnDevice<float> on_weight(weight), on_factor(factor), on_scales(scales.size());
    Bytes on_codes(codes.size()), on_zeros(zeros.size()), workspace(bytes);
    OnDevice<double> on_loss(loss.size());
    ok(lowbit_cuda_gptq_solve(&kQueue, &o, rows, cols, on_weight.get(), push ? on_factor.get() : nullptr, nullptr,
                              on_codes.get(), on_scales.get(), o.symmetric ? nullptr : on_zeros.get(), on_loss.get(),
                              workspace.get(), bytes),
       what);
    CHECK(on_codes.back() == codes, "%s: not the CPU's codes", what.c_str());
    CHECK(on_scales.back() == scales, "%s: not the CPU's scales", what.c_str());
    if (!o.symmetric) CHECK(on_zeros.back() == zeros, "%s: not the CPU's zeros", what.c_str());
    CHECK(on_loss.back() == loss, "%s: not the CPU's loss", what.c_str());
  }
}

}  // namespace

int main(int count, char** arguments) {
#if defined(LOWBIT_EMULATED)
  setenv("LOWBIT_CUDA_LIBRARY", LOWBIT_EMULATED_LIBRARY, 1);
#endif
  int32_t devices = 0;
  if (lowbit_cuda_device_count(&devices) != LOWBIT_OK || devices == 0) {
    std::printf("skipped: %s\n", lowbit_last_error());
    return 77;
  }
  ok(lowbit_cuda_describe(0, &device), "describe");
  std::printf("%s, sm_%d, liblowbit_cuda for %s\n", device.name, device.arch, lowbit_cuda_architectures());
  // An argument picks a format: 1 (trit), 2, 3, 4 or 8.
  for (const int bits : kFormats) {
    if (count > 1 && atoi(arguments[1]) != bits) continue;
    std::mt19937 random{unsigned(bits)};
    test_products(bits, random);
    test_gather(bits, random);
    test_codes(bits, random);
    test_solver(bits, random);
  }
  std::printf("kernels:");
  for (const std::string& name : kernels) std::printf(" %s", name.c_str());
  std::printf("\n");
  if (count == 1 && device.arch >= 80)
    for (const int bits : {2, 3, 4, 8})
      for (const std::string kind : {"_plain", "_decode", "_tile", "_integer"}) {
        if (bits == 3 && kind == "_tile" && device.shared_per_block < 160 << 10) continue;  // three lines a unit
        CHECK(kernels.count(format_name(bits) + kind), "no product ran %s%s", format_name(bits).c_str(), kind.c_str());
      }
  return check::finish("every kernel");
}
