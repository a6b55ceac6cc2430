// lowbit.hpp from C++: weights packed from floats, checked against plain loops, and errors as exceptions.
// Exits with 0 when every value is right; names the first wrong one otherwise.
#include <lowbit/lowbit.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace {

void expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error(what);
}

void expect_close(float got, double expected, double tolerance, const std::string& what) {
  expect(std::fabs(got - expected) <= tolerance, what + ": expected " + std::to_string(expected) + " within " +
                                                     std::to_string(tolerance) + ", got " + std::to_string(got));
}

// The call has to throw E, with E's status and a message that names `thing`.
template <class E, class Call>
void expect_error(lowbit_status status, const std::string& thing, Call call) {
  try {
    call();
  } catch (const E& error) {
    expect(error.status() == status, thing + ": status " + std::to_string(error.status()));
    expect(std::string(error.what()).find(thing) != std::string::npos, thing + ": message \"" + error.what() + "\"");
    return;
  }
  throw std::runtime_error(thing + ": expected an exception");
}

std::vector<float> random_floats(size_t count, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  std::generate(values.begin(), values.end(), [&] { return normal(generator); });
  return values;
}

void check_matrix(lowbit_format format, int64_t rows, int64_t cols, int64_t group_size, bool symmetric) {
  std::mt19937 generator(7);
  const std::string name =
      "int" + std::to_string(int(format)) + " " + std::to_string(rows) + "x" + std::to_string(cols);
  const size_t width = size_t(cols), tokens = 4;
  const std::vector<float> weights = random_floats(size_t(rows) * width, generator);
  const std::vector<float> x = random_floats(tokens * width, generator);

  lowbit::PackOptions options;
  options.symmetric = symmetric;
  options.scale_dtype = LOWBIT_F32;
  lowbit::Matrix made = lowbit::Matrix::pack(format, rows, cols, group_size, weights.data(), options);
  const lowbit::Matrix w = std::move(made);
  expect(w.rows() == rows && w.cols() == cols && w.format() == format, name + ": shape or format");
  expect((w.view().zeros == nullptr) == symmetric, name + ": zeros");

  // Rounding is off by half a step at most; a grid's step divides twice its largest weight by its levels.
  const std::vector<float> unpacked = w.unpack();
  const int64_t span = group_size == -1 ? cols : group_size;
  for (int64_t n = 0; n < rows; n++)
    for (int64_t k = 0; k < cols; k++) {
      const auto begin = weights.begin() + n * cols + k / span * span;
      const auto end = weights.begin() + n * cols + std::min(cols, (k / span + 1) * span);
      const auto [low, high] = std::minmax_element(begin, end);
      const double step = 2 * double(std::max(-*low, *high)) / double((1 << int(format)) - 1);
      expect_close(unpacked[size_t(n * cols + k)], weights[size_t(n * cols + k)], 0.501 * step,
                   name + ": unpacked weight");
    }

  std::vector<float> bias = random_floats(size_t(rows), generator), y(tokens * size_t(rows));
  w.matmul(x.data(), int64_t(tokens), y.data(), bias.data());
  for (size_t m = 0; m < tokens; m++)
    for (size_t n = 0; n < size_t(rows); n++) {
      double sum = bias[n], size = std::fabs(sum);
      for (size_t k = 0; k < width; k++) {
        sum += double(x[m * width + k]) * unpacked[n * width + k];
        size += std::fabs(double(x[m * width + k]) * unpacked[n * width + k]);
      }
      expect_close(y[m * size_t(rows) + n], sum, 3e-4 * size, name + ": y");
    }
  std::vector<float> no_bias(y.size());
  w.matmul(x.data(), int64_t(tokens), no_bias.data());
  expect(no_bias == w.matmul(x), name + ": a vector and an address give different products");

  const std::vector<int64_t> ids = {rows - 1, 0, rows / 2};
  const std::vector<float> gathered = w.gather(ids);
  const std::vector<float> bags = w.gather_bags(ids, {0, int64_t(ids.size()), int64_t(ids.size())});
  for (size_t i = 0; i < ids.size(); i++)
    for (size_t k = 0; k < width; k++)
      expect(gathered[i * width + k] == unpacked[size_t(ids[i]) * width + k],
             name + ": gathered row " + std::to_string(i));
  for (size_t k = 0; k < width; k++) {
    const float sum = gathered[k] + gathered[width + k] + gathered[2 * width + k];
    expect(bags[k] == sum && bags[width + k] == 0, name + ": a bag of three rows, and an empty one");
  }
}

void check_codes() {
  const std::vector<uint8_t> codes = {0, 15, 8, 3, 7, 1};
  const std::vector<float> scales = {0.5f, 2.0f};
  const std::vector<uint8_t> zeros = {8, 1};
  const std::vector<int32_t> perm = {2, 0, 1};
  const lowbit::Matrix w = lowbit::Matrix::from_codes(LOWBIT_INT4, 2, 3, -1, codes.data(), scales.data(), LOWBIT_F32,
                                                      zeros.data(), perm.data());
  expect(w.unpack() == std::vector<float>{3.5f, 0.0f, -4.0f, 12.0f, 0.0f, 4.0f}, "from_codes: unpacked values");
  const std::vector<uint8_t> wide = {0, 16, 8, 3, 7, 1};
  expect_error<lowbit::OutOfRange>(LOWBIT_OUT_OF_RANGE, "codes[0, 1]", [&] {
    lowbit::Matrix::from_codes(LOWBIT_INT4, 2, 3, -1, wide.data(), scales.data(), LOWBIT_F32);
  });
}

// Ternary weights keep their scale and come back exactly; 321 columns take two lines of five trits a byte.
void check_ternary() {
  const int64_t rows = 5, cols = 321;
  std::vector<float> weights(size_t(rows * cols)), x(size_t(cols), 2.0f);
  for (size_t i = 0; i < weights.size(); i++) weights[i] = 0.375f * float(int(i * 7 % 3) - 1);
  const lowbit::Matrix w = lowbit::Matrix::pack(LOWBIT_TRIT, rows, cols, -1, weights.data());
  expect(lowbit_row_lines(LOWBIT_TRIT, cols) == 2, "trit: lines");
  expect(w.unpack() == weights, "trit: unpacked weights");
  const std::vector<float> y = w.matmul(x);
  for (size_t n = 0; n < size_t(rows); n++) {
    float sum = 0;
    for (size_t k = 0; k < size_t(cols); k++) sum += 2.0f * weights[n * size_t(cols) + k];
    expect(y[n] == sum, "trit: y");
  }
}

void check_errors() {
  const std::vector<float> weights(64, 1.0f);
  expect_error<lowbit::InvalidArgument>(LOWBIT_INVALID_ARGUMENT, "group_size",
                                        [&] { lowbit::Matrix::pack(LOWBIT_INT4, 2, 32, 24, weights.data()); });
  expect_error<lowbit::InvalidArgument>(LOWBIT_INVALID_ARGUMENT, "shape",
                                        [&] { lowbit::Matrix::pack(LOWBIT_INT4, -1, 32, 16, weights.data()); });
  lowbit::Matrix w = lowbit::Matrix::pack(LOWBIT_INT4, 2, 32, 16, weights.data());
  expect_error<lowbit::OutOfRange>(LOWBIT_OUT_OF_RANGE, "ids[0]", [&] { w.gather(std::vector<int32_t>{2}); });
  expect_error<lowbit::InvalidArgument>(LOWBIT_INVALID_ARGUMENT, "x", [&] { w.matmul(std::vector<float>(31)); });
  const lowbit::Matrix taken = std::move(w);
  expect_error<lowbit::Error>(LOWBIT_INVALID_ARGUMENT, "codes", [&] { w.unpack(); });
}

}  // namespace

int main() {
  try {
    for (const lowbit_format format : {LOWBIT_INT2, LOWBIT_INT3, LOWBIT_INT4, LOWBIT_INT8})
      for (const bool symmetric : {true, false}) {
        check_matrix(format, 3, 64, -1, symmetric);
        check_matrix(format, 65, 272, 16, symmetric);
        check_matrix(format, 16, 384, 128, symmetric);
      }
    check_codes();
    check_ternary();
    check_errors();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::printf("C++ %s: every value as expected\n", lowbit_version());
}
