// gptq_cuda.cu on the emulator against lowbit_gptq_solve, bit for bit: codes, scales, zeros and loss.
#include <cmath>

#include "verbs_test.h"

using namespace lowbit;

namespace {

std::mt19937 generator(3);

struct Shape {
  int bits;
  int64_t rows, cols, group_size;
  bool symmetric, clip;
  lowbit_dtype scale_dtype;
  bool factor, ternary;  // ternary: weights that take three values a row
};

std::string name_of(const Shape& s, const char* kind) {
  return format_name(s.bits) + " " + std::to_string(s.rows) + "x" + std::to_string(s.cols) + " group " +
         std::to_string(s.group_size) + (s.symmetric ? " symmetric" : "") + (s.clip ? " clip" : "") + " scales " +
         std::to_string(s.scale_dtype) + (s.factor ? "" : " no factor") + " " + kind;
}

std::vector<float> some_weight(const Shape& s) {
  std::normal_distribution<float> normal(0, 0.05f);
  std::vector<float> weight(size_t(s.rows * s.cols));
  for (auto& w : weight) w = normal(generator);
  for (int64_t n = 0; n < s.rows; n++)
    for (int64_t k = 0; k < s.cols; k++) {
      float& w = weight[size_t(n * s.cols + k)];
      if (s.ternary) w = w < -0.02f ? -0.03f : w > 0.02f ? 0.03f : 0.0f;
      if (n % 5 == 2 && s.clip) w *= 1e-33f;        // too small for the search: every candidate is as good
      if (n % 5 == 3) w *= 1e-8f;                   // scales that underflow fp16
      if (n % 5 == 4 && k / 32 % 2 == 0) w = 0.0f;  // groups of zeros
    }
  return weight;
}

// Upper triangular with a positive diagonal; NaN where nobody may read.
std::vector<float> some_factor(int64_t cols) {
  std::normal_distribution<float> normal(0, 0.2f);
  std::vector<float> factor(size_t(cols * cols), NAN);
  for (int64_t i = 0; i < cols; i++)
    for (int64_t j = i; j < cols; j++)
      factor[size_t(i * cols + j)] =
          i == j ? 0.5f + std::fabs(normal(generator)) : normal(generator) / float(1 + j - i);
  return factor;
}

struct Solution {
  std::vector<uint8_t> codes, zeros;
  std::vector<float> scales;
  std::vector<double> loss;

  Solution(const Shape& s, int64_t groups)
      : codes(size_t(s.rows * s.cols), 0xa5),
        zeros(size_t(s.rows * groups), 0xa5),
        scales(size_t(s.rows * groups), -1.0f),
        loss(size_t(s.rows), -1.0) {}
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void expect_same(const std::string& what, const Solution& got, const Solution& wanted) {
  CHECK(same_bits(got.codes, wanted.codes), "%s: codes differ", what.c_str());
  CHECK(same_bits(got.scales, wanted.scales), "%s: scales differ", what.c_str());
  CHECK(same_bits(got.zeros, wanted.zeros), "%s: zeros differ", what.c_str());
  CHECK(same_bits(got.loss, wanted.loss), "%s: loss differs", what.c_str());
}

CudaSolve call_of(const Shape& s, const lowbit_gptq_options& options, const std::vector<float>& weight,
                  const std::vector<float>& factor, Solution* solution) {
  CudaSolve call = {};
  call.options = options;
  if (call.options.group_size == -1) call.options.group_size = s.cols;
  call.rows = s.rows, call.cols = s.cols, call.groups = ceil_div(s.cols, call.options.group_size);
  call.weight = weight.data(), call.factor = s.factor ? factor.data() : nullptr;
  call.codes = solution->codes.data(), call.scales = solution->scales.data();
  call.zeros = solution->zeros.data(), call.loss = solution->loss.data();
  return call;
}

void run_solve(const std::string& what, CudaSolve call) {
  const size_t bytes = cuda::solve_workspace(&call);
  Guarded workspace(bytes);
  call.workspace = workspace.get(), call.workspace_bytes = bytes;
  run(what, cuda::solve, &call);
  CHECK(workspace.intact(), "%s: written outside the workspace", what.c_str());
}

lowbit_gptq_options options_of(const Shape& s) {
  return {lowbit_format(s.bits), s.group_size, s.symmetric, s.clip, 0, s.scale_dtype, 0};
}

void test_solve(const Shape& s) {
  const std::vector<float> weight = some_weight(s), factor = s.factor ? some_factor(s.cols) : std::vector<float>();
  const lowbit_gptq_options options = options_of(s);
  const int64_t groups = s.group_size == -1 ? 1 : ceil_div(s.cols, s.group_size);
  Solution wanted(s, groups), got(s, groups);
  CHECK(lowbit_gptq_solve(&options, s.rows, s.cols, weight.data(), s.factor ? factor.data() : nullptr, nullptr,
                          wanted.codes.data(), wanted.scales.data(), wanted.zeros.data(),
                          wanted.loss.data()) == LOWBIT_OK,
        "%s", lowbit_last_error());
  const std::string what = name_of(s, "");
  run_solve(what, call_of(s, options, weight, factor, &got));
  expect_same(what, got, wanted);
}

// Grids given, groups of any order; then entries that no check let through, which must stay inside.
void test_static(Shape s) {
  const std::vector<float> weight = some_weight(s), factor = some_factor(s.cols);
  lowbit_gptq_options options = options_of(s);
  options.static_grids = 1;
  const int64_t groups = s.group_size == -1 ? 1 : ceil_div(s.cols, s.group_size);
  Solution wanted(s, groups);
  for (auto& scale : wanted.scales) scale = 0.001f + 0.02f * float(generator() % 1000) / 1000;
  for (auto& zero : wanted.zeros) zero = uint8_t(generator() % unsigned(code_count(s.bits)));
  Solution got = wanted;
  std::vector<int32_t> index(size_t(s.cols));
  for (auto& group : index) group = int32_t(generator() % unsigned(groups));
  for (const bool indexed : {false, true}) {
    const int32_t* group_index = indexed ? index.data() : nullptr;
    CHECK(lowbit_gptq_solve(&options, s.rows, s.cols, weight.data(), factor.data(), group_index, wanted.codes.data(),
                            wanted.scales.data(), wanted.zeros.data(), wanted.loss.data()) == LOWBIT_OK,
          "%s", lowbit_last_error());
    const std::string what = name_of(s, indexed ? "static, indexed" : "static");
    CudaSolve call = call_of(s, options, weight, factor, &got);
    call.group_index = group_index;
    run_solve(what, call);
    expect_same(what, got, wanted);
  }
  for (size_t k = 0; k < index.size(); k += 3) index[k] = k % 2 ? INT32_MAX : -1 - int32_t(k);
  CudaSolve call = call_of(s, options, weight, factor, &got);
  call.group_index = index.data();
  run_solve(name_of(s, "static, hostile"), call);
}

// Numbers that the caller should have refused: no loop hangs and nothing lands outside.
void test_hostile(int bits) {
  Shape s = {bits, 5, 200, 64, true, true, LOWBIT_F16, true, false};
  std::vector<float> weight = some_weight(s), factor = some_factor(s.cols);
  weight[7] = NAN, weight[300] = INFINITY, factor[0] = 0, factor[size_t(201 * 5)] = NAN;
  Solution got(s, 4);
  run_solve(name_of(s, "hostile"), call_of(s, options_of(s), weight, factor, &got));
}

}  // namespace

int main() {
  const lowbit_dtype dtypes[] = {LOWBIT_F32, LOWBIT_F16, LOWBIT_BF16};
  auto some_dtype = [&] { return dtypes[generator() % 3]; };
  for (const int bits : kFormats) {
    for (const int64_t cols : kColumns) {
      const bool symmetric = bits == kTrit || generator() % 2;
      const int64_t rows = cols > 400 ? 3 : 1 + int64_t(generator() % 19);
      test_solve({bits, rows, cols, some_group_size(cols, generator), symmetric, false, some_dtype(), true, false});
    }
    for (const int64_t group_size : {16, 32, 48, 64, 80, 112, 128, 144, 192, 320}) {
      const bool symmetric = bits == kTrit || generator() % 2;
      test_solve({bits, 5, 400, group_size, symmetric, false, some_dtype(), true, generator() % 2 == 0});
    }
    for (const lowbit_dtype dtype : dtypes) {
      test_solve({bits, 5, 272, 48, true, true, dtype, true, false});
      test_solve({bits, 4, 300, 192, bits == kTrit, true, dtype, true, true});
      test_solve({bits, 6, 130, 64, true, bits != 8, dtype, false, false});
      test_solve({bits, 5, 321, 160, bits == kTrit, false, dtype, false, false});
    }
    test_solve({bits, 131, 260, 128, true, false, LOWBIT_F16, true, false});  // a second tile of rows
    test_static({bits, 5, 257, 64, bits == kTrit, false, LOWBIT_F32, true, false});
    test_static({bits, 2, 131, -1, true, false, LOWBIT_F16, true, false});
    test_hostile(bits);
  }
  return check::finish("solver");
}
