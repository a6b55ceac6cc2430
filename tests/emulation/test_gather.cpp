// gather.cu on the emulator against lowbit_gather and lowbit_unpack, bit for bit.
#include <sys/mman.h>

#include <climits>

#include "verbs_test.h"

using namespace lowbit;

namespace {

std::mt19937 generator(1);

struct Ids {
  lowbit_dtype dtype;
  std::vector<int64_t> wide;
  std::vector<int32_t> narrow;

  Ids(std::vector<int64_t> ids, bool narrow_ids)
      : dtype(narrow_ids ? LOWBIT_I32 : LOWBIT_I64), wide(std::move(ids)), narrow(wide.begin(), wide.end()) {}
  const void* get() const {
    return dtype == LOWBIT_I32 ? static_cast<const void*>(narrow.data()) : static_cast<const void*>(wide.data());
  }
};

CudaGather gather_of(const lowbit_matrix& w, lowbit_dtype out_dtype, int64_t stride, void* out) {
  CudaGather call = {};
  call.w = w;
  call.policy = LOWBIT_IDS_ZERO;
  call.padding_id = -1;
  call.out = out, call.out_dtype = out_dtype, call.out_stride = stride;
  return call;
}

// Rows of `cols` numbers at two strides; what lies between the rows was not touched.
void expect_rows(const std::string& what, const uint8_t* got, int64_t stride, const uint8_t* wanted, int64_t rows,
                 int64_t cols, size_t size) {
  int64_t differ = 0, touched = 0;
  for (int64_t i = 0; i < rows; i++) {
    differ += memcmp(got + size_t(i * stride) * size, wanted + size_t(i * cols) * size, size_t(cols) * size) != 0;
    for (int64_t j = cols * int64_t(size); i + 1 < rows && j < stride * int64_t(size); j++)
      touched += got[i * stride * int64_t(size) + j] != 0xa5;
  }
  CHECK(differ == 0, "%s: %lld rows differ", what.c_str(), static_cast<long long>(differ));
  CHECK(touched == 0, "%s: %lld bytes between rows", what.c_str(), static_cast<long long>(touched));
}

struct Layout {
  lowbit_dtype dtype;
  int64_t stride;
  size_t offset;  // of the first row from an aligned address
};

size_t span(const Layout& layout, int64_t rows, int64_t cols) {
  return size_t((rows - 1) * layout.stride + cols) * dtype_size(layout.dtype);
}

// Every kind of id with each policy, and the same rows as consecutive ones.
void test_rows(const Case& c, const Layout& layout) {
  const TestMatrix m(c, generator);
  const lowbit_matrix w = normalised(m);
  const size_t size = dtype_size(layout.dtype);
  const int64_t padding = generator() % 2 ? int64_t(generator() % unsigned(c.rows)) : -1;
  const Ids ids({c.rows - 1, 0, -1, c.rows, int64_t(generator() % unsigned(c.rows)), INT32_MIN, INT32_MAX, 0},
                generator() % 2);
  const int64_t count = int64_t(ids.wide.size());
  for (const lowbit_id_policy policy : {LOWBIT_IDS_ERROR, LOWBIT_IDS_ZERO, LOWBIT_IDS_CLAMP}) {
    const std::string what = name_of(c) + " policy " + std::to_string(policy) + " to " + std::to_string(layout.dtype);
    std::vector<uint8_t> wanted(size_t(count * c.cols) * size);
    const lowbit_id_policy on_cpu = policy == LOWBIT_IDS_CLAMP ? policy : LOWBIT_IDS_ZERO;
    CHECK(lowbit_gather(&m.view, ids.get(), ids.dtype, count, on_cpu, wanted.data(), layout.dtype, c.cols) == LOWBIT_OK,
          "%s", lowbit_last_error());
    for (int64_t i = 0; i < count; i++)
      if (padding >= 0 && ids.wide[size_t(i)] == padding)
        memset(wanted.data() + size_t(i * c.cols) * size, 0, size_t(c.cols) * size);
    Guarded out(span(layout, count, c.cols), layout.offset);
    int64_t first_bad = INT64_MAX;
    CudaGather call = gather_of(w, layout.dtype, layout.stride, out.get());
    call.ids = ids.get(), call.id_dtype = ids.dtype, call.count = count;
    call.policy = policy, call.padding_id = padding, call.first_bad = &first_bad;
    run(what, cuda::gather, &call);
    expect_rows(what, out.get(), layout.stride, wanted.data(), count, c.cols, size);
    CHECK(out.intact(), "%s: written outside", what.c_str());
    CHECK(first_bad == (policy == LOWBIT_IDS_ERROR ? 2 : INT64_MAX), "%s: first_bad %lld", what.c_str(),
          static_cast<long long>(first_bad));
  }
  const std::string what = name_of(c) + " unpack to " + std::to_string(layout.dtype);
  const int64_t begin = c.rows / 3, rows = c.rows - begin;
  std::vector<uint8_t> wanted(size_t(rows * c.cols) * size);
  CHECK(lowbit_unpack(&m.view, begin, c.rows, wanted.data(), layout.dtype, c.cols) == LOWBIT_OK, "%s",
        lowbit_last_error());
  Guarded out(span(layout, rows, c.cols), layout.offset);
  CudaGather call = gather_of(w, layout.dtype, layout.stride, out.get());
  call.row_begin = begin, call.count = rows;
  run(what, cuda::gather, &call);
  expect_rows(what, out.get(), layout.stride, wanted.data(), rows, c.cols, size);
  CHECK(out.intact(), "%s: written outside", what.c_str());
}

enum class Bags { kSum, kMean, kWeighted };

void test_bags(const Case& c, const Layout& layout, Bags kind) {
  const TestMatrix m(c, generator);
  const size_t size = dtype_size(layout.dtype);
  const int64_t padding = generator() % 2 ? 0 : -1;
  const Ids ids({0, c.rows - 1, 0, -5, c.rows / 2, c.rows, 0, 0, c.rows - 1}, generator() % 2);
  const int64_t count = int64_t(ids.wide.size());
  // An empty bag, one of padding only, and offsets that are outside, backwards or at the ends of int64.
  const std::vector<int64_t> offsets = {0, 3, 3, 6, 8, 9, 100, 2, -7, 5, INT64_MAX, INT64_MIN, 4};
  const int64_t bags = int64_t(offsets.size()) - 1;
  // Weights that make sums of every sign and size, -0 among them. (The bits of a NaN are each processor's own.)
  const std::vector<float> weights = {0.3f, -1e-38f, -1e-44f, -7, 1e30f, 2.5f, -0.0f, 1e-40f, -1};
  std::vector<float> rows(size_t(count * c.cols));
  CHECK(lowbit_gather(&m.view, ids.get(), ids.dtype, count, LOWBIT_IDS_ZERO, rows.data(), LOWBIT_F32, c.cols) ==
            LOWBIT_OK,
        "%s", lowbit_last_error());
  std::vector<uint8_t> wanted(size_t(bags * c.cols) * size);
  for (int64_t b = 0; b < bags; b++) {
    const int64_t begin = std::max<int64_t>(offsets[size_t(b)], 0), end = std::min(offsets[size_t(b) + 1], count);
    for (int64_t k = 0; k < c.cols; k++) {
      float sum = 0;
      int64_t counted = 0;
      for (int64_t i = begin; i < end; i++) {
        if (padding >= 0 && ids.wide[size_t(i)] == padding) continue;
        counted++;
        sum = fmaf(kind == Bags::kWeighted ? weights[size_t(i)] : 1.0f, rows[size_t(i * c.cols + k)], sum);
      }
      store_float(wanted.data(), layout.dtype, b * c.cols + k,
                  kind == Bags::kMean && counted ? sum / float(counted) : sum);
    }
  }
  const char* const names[] = {" sum to ", " mean to ", " weighted sum to "};
  const std::string what = name_of(c) + names[int(kind)] + std::to_string(layout.dtype);
  Guarded out(span(layout, bags, c.cols), layout.offset);
  int64_t first_bad = INT64_MAX;
  CudaGather call = gather_of(normalised(m), layout.dtype, layout.stride, out.get());
  call.ids = ids.get(), call.id_dtype = ids.dtype, call.count = count;
  call.offsets = offsets.data(), call.bags = bags;
  call.mean = kind == Bags::kMean, call.weights = kind == Bags::kWeighted ? weights.data() : nullptr;
  call.policy = LOWBIT_IDS_ERROR, call.padding_id = padding, call.first_bad = &first_bad;
  run(what, cuda::gather, &call);
  expect_rows(what, out.get(), layout.stride, wanted.data(), bags, c.cols, size);
  CHECK(out.intact(), "%s: written outside", what.c_str());
  CHECK(first_bad == 3, "%s: first_bad %lld", what.c_str(), static_cast<long long>(first_bad));
  // The CPU takes offsets that do not decrease.
  const std::vector<int64_t> ordered = {INT64_MIN, 1, 3, 3, 8, INT64_MAX};
  wanted.resize(5 * size_t(c.cols) * size);
  CHECK(lowbit_gather_bags(&m.view, ids.get(), ids.dtype, count, ordered.data(), 5, call.weights, call.mean,
                           LOWBIT_IDS_ZERO, padding, nullptr, wanted.data(), layout.dtype, c.cols) == LOWBIT_OK,
        "%s", lowbit_last_error());
  call.offsets = ordered.data(), call.bags = 5, call.policy = LOWBIT_IDS_ZERO;
  run(what, cuda::gather, &call);
  expect_rows(what + ", as on the CPU", out.get(), layout.stride, wanted.data(), 5, c.cols, size);
}

// A perm that is none: nothing is written outside the rows, whatever lands in them. Columns that it names twice are
// written by two lanes, which is the one thing that the emulator may object to.
void test_hostile_perm(int bits) {
  const Case c = some_case(bits, 3, 257, true, generator);
  TestMatrix m(c, generator);
  for (size_t k = 0; k < m.perm.size(); k += 2) m.perm[k] = k % 3 ? INT_MAX : k % 4 ? -1 : int32_t(c.cols);
  m.perm[1] = m.perm[255];
  const int64_t ids[] = {0, 1, 2}, offsets[] = {0, 2, 3, 3};
  for (const bool bags : {false, true}) {
    Guarded out(size_t(c.rows * c.cols) * 2);
    CudaGather call = gather_of(normalised(m), LOWBIT_F16, c.cols, out.get());
    call.count = c.rows;
    if (bags) call.ids = ids, call.id_dtype = LOWBIT_I64, call.offsets = offsets, call.bags = 3;
    CudaMessage message = {};
    CHECK(cuda::gather(&kQueue, &call, &message) == LOWBIT_OK, "%s", message.text);
    for (int64_t i = 0; i < emulation::violations() && i < emulation::kMessages; i++)
      CHECK(strstr(emulation::message(int(i)), "race"), "%s hostile: %s", name_of(c).c_str(),
            emulation::message(int(i)));
    emulation::clear();
    CHECK(out.intact(), "%s: a bad perm wrote outside", name_of(c).c_str());
  }
}

// Codes beyond 2^32 bytes and an output beyond 2^31 elements: memory that is only reserved, but for what is touched.
void test_far() {
  constexpr int64_t kRows = int64_t(1) << 27, kStride = (int64_t(1) << 31) + 8;
  const auto reserve = [](size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  };
  const size_t code_bytes = size_t(kRows) * 64, out_bytes = size_t(2 * kStride + 64) * 2;
  void *codes = reserve(code_bytes), *out = reserve(out_bytes);
  if (codes != MAP_FAILED && out != MAP_FAILED) {
    const float scale = 0.25f;
    lowbit_matrix w = {LOWBIT_INT8, kRows, 64,      64,     static_cast<uint8_t*>(codes), &scale, LOWBIT_F32,
                       1,           1,     nullptr, nullptr};
    for (int k = 0; k < 64; k++) static_cast<uint8_t*>(codes)[(kRows - 1) * 64 + k] = uint8_t(128 + k);
    const int64_t ids[] = {0, 1, kRows - 1};
    for (const bool gathers : {true, false}) {
      CudaGather call = gather_of(w, LOWBIT_F16, kStride, out);
      call.row_begin = kRows - 3, call.count = 3;
      if (gathers) call.ids = ids, call.id_dtype = LOWBIT_I64;
      run("far", cuda::gather, &call);
      for (int k = 0; k < 64; k++)
        CHECK(load_float(out, LOWBIT_F16, 2 * kStride + k) == 0.25f * float(k), "far, column %d", k);
      memset(static_cast<uint16_t*>(out) + 2 * kStride, 0xa5, 128);
    }
    uint8_t row[64];
    run("far", cuda::unpack_codes, &w, kRows - 1, kRows, row);
    for (int k = 0; k < 64; k++) CHECK(row[k] == 128 + k, "far, code %d", k);
  }
  if (codes != MAP_FAILED) munmap(codes, code_bytes);
  if (out != MAP_FAILED) munmap(out, out_bytes);
}

}  // namespace

int main() {
  for (const int bits : kFormats) {
    for (const int64_t cols : kColumns)
      for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_F16, LOWBIT_BF16}) {
        // Rows one behind another; rows that are aligned, with a gap; rows that are not.
        const int64_t aligned = (cols + 7) / 8 * 8 + 8;
        const Layout layouts[] = {{dtype, cols, 0}, {dtype, aligned, 0}, {dtype, aligned, dtype_size(dtype)}};
        for (const Layout& layout : layouts) test_rows(some_case(bits, 5, cols, false, generator), layout);
        test_rows(some_case(bits, 1 + int64_t(generator() % 9), cols, true, generator), layouts[generator() % 3]);
        test_bags(some_case(bits, 4, cols, generator() % 4 == 0, generator), layouts[generator() % 3],
                  Bags(generator() % 3));
      }
    test_rows(some_case(bits, 37, 2560, false, generator), {LOWBIT_F16, 2560, 0});
    test_rows(some_case(bits, 1, 10944, false, generator), {LOWBIT_BF16, 10944, 0});
    // More than a window of permuted columns, in both sizes of output.
    test_rows(some_case(bits, 2, 12288 + 517, true, generator), {LOWBIT_F32, 12288 + 520, 0});
    test_rows(some_case(bits, 2, 24576 + 64, true, generator), {LOWBIT_F16, 24576 + 64, 0});
    test_hostile_perm(bits);
  }
  test_far();
  return check::finish("gather");
}
