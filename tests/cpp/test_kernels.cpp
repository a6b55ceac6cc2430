// Every kernel row, forced in turn: bit-identical with `ref`, exact where the arithmetic is exact, and close to
// float64. Each test also asserts that the kernel it forced is the one that ran.
#include <algorithm>
#include <cstring>
#include <string>

#include "matrices.h"

namespace {

std::mt19937 random_bits(20240607);

// Whether the table has a kernel of this verb and width at exactly this level; then it must be the one that ran.
bool table_has(const std::string& name) {
  for (int i = 0; const char* row = lowbit_kernel_name(i, nullptr); i++)
    if (name == row) return true;
  return false;
}

void check_ran(const char* verb, int bits, const char* isa) {
  const std::string stem = bits ? format_name(bits) + "_" + verb : verb;
  const std::string wanted = stem + "__" + isa, ran = lowbit_last_kernel(verb);
  if (table_has(wanted)) CHECK(ran == wanted, "forced %s, ran %s", wanted.c_str(), ran.c_str());
}

std::string describe(const Case& c, int64_t tokens, int mode, const char* isa) {
  char text[200];
  snprintf(text, sizeof text, "%s %ldx%ld g%ld zeros %d perm %d scales %d/%d tokens %ld mode %d isa %s",
           format_name(c.bits).c_str(), long(c.rows), long(c.cols), long(c.group_size), c.zeros, c.perm, c.scale_shape,
           int(c.scale_dtype), long(tokens), mode, isa);
  return text;
}

// Exact: integers that the mode represents without error (int8's step is max/127, so only +-127 do whatever the chunk).
std::vector<uint8_t> random_activations(int64_t count, lowbit_dtype dtype, bool exact, int mode) {
  std::vector<uint8_t> x(size_t(count) * (dtype == LOWBIT_F32 ? 4 : 2));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; i++) {
    float value = normal(random_bits);
    if (random_bits() % 97 == 0) value *= 50;  // outliers
    if (exact)
      value = mode == LOWBIT_ACT_INT8 ? (random_bits() % 2 ? 127.0f : -127.0f) : float(int(random_bits() % 255) - 127);
    lowbit::store_float(x.data(), dtype, i, value);
  }
  return x;
}

// token_counts: the largest first.
void test_matmul(const Case& c, const std::vector<const char*>& isas, const std::vector<int64_t>& token_counts,
                 lowbit_dtype dtype, bool exact) {
  const TestMatrix w(c, random_bits);
  const int64_t most = token_counts.front();
  for (const int mode : {LOWBIT_ACT_FLOAT, LOWBIT_ACT_INT8}) {
    const auto x = random_activations(most * c.cols, dtype, exact, mode);
    std::vector<float> bias(size_t(c.rows));
    for (auto& b : bias) b = exact ? float(int(random_bits() % 64)) : float(random_bits() % 1000) / 500 - 1;
    std::vector<uint8_t> expected;
    const size_t width = dtype == LOWBIT_F32 ? 4 : 2;
    for (const char* isa : isas)
      for (const int64_t tokens : token_counts) {
        CHECK(lowbit_set_isa(isa) == LOWBIT_OK, "%s", lowbit_last_error());
        std::vector<uint8_t> y(size_t(tokens * c.rows) * width, 0xEE);
        const lowbit_status status = lowbit_matmul(&w.view, x.data(), dtype, tokens, c.cols, bias.data(), LOWBIT_F32,
                                                   y.data(), c.rows, lowbit_activations(mode), nullptr, 0);
        CHECK(status == LOWBIT_OK, "%s", lowbit_last_error());
        check_ran("matmul", c.bits, isa);
        check_ran("activations", 0, isa);
        if (expected.empty()) {  // the reference kernel with the most tokens comes first
          expected = y;
          for (int64_t m = 0; m < tokens; m++)
            for (int64_t n = 0; n < c.rows; n++) {
              double sum = 0, size = 0, weights = 0, largest = 0;
              for (int64_t k = 0; k < c.cols; k++) {
                const double weight = w.dense[size_t(n * c.cols + k)];
                const double value = lowbit::load_float(x.data(), dtype, m * c.cols + k);
                sum += weight * value;
                size += std::fabs(weight * value);
                weights += weight * weight;
                largest = std::max(largest, std::fabs(value));
              }
              const double got = lowbit::load_float(y.data(), dtype, m * c.rows + n), wanted = sum + bias[size_t(n)];
              // Rounding of x: uniform within a step, which is at most 2^-14 or 1/127 of the token's largest; six
              // standard deviations. Sums: fp32. Exact: scales are 1/4 to 1, so that sums have no more than 24 bits.
              const double step = largest * (mode == LOWBIT_ACT_FLOAT ? std::ldexp(1, -14) : 1.0 / 127);
              const double rounding = exact ? 0 : 6 * step * std::sqrt(weights / 12);
              const double bound =
                  exact && dtype == LOWBIT_F32
                      ? 0
                      : rounding + std::ldexp(size, -22) + (dtype == LOWBIT_F32 ? 0 : 1e-2 * std::fabs(wanted));
              CHECK(std::fabs(got - wanted) <= bound, "%s [%ld,%ld]: got %.9g, wanted %.9g, bound %g",
                    describe(c, tokens, mode, isa).c_str(), long(m), long(n), got, wanted, bound);
            }
        }
        CHECK(!memcmp(y.data(), expected.data(), y.size()), "%s differs from ref",
              describe(c, tokens, mode, isa).c_str());
      }
  }
  lowbit_set_isa("auto");
}

void test_gather(const Case& c, const std::vector<const char*>& isas) {
  const TestMatrix w(c, random_bits);
  std::vector<int64_t> ids;
  for (int i = 0; i < 11; i++) ids.push_back(int64_t(random_bits() % unsigned(c.rows)));
  ids.push_back(c.rows + 5);  // a row of zeros
  const int64_t count = int64_t(ids.size());
  for (const lowbit_dtype dtype : {LOWBIT_F32, LOWBIT_F16, LOWBIT_BF16})
    for (const char* isa : isas) {
      CHECK(lowbit_set_isa(isa) == LOWBIT_OK, "%s", lowbit_last_error());
      std::vector<uint8_t> out(size_t(count * c.cols) * (dtype == LOWBIT_F32 ? 4 : 2), 0xEE);
      CHECK(lowbit_gather(&w.view, ids.data(), LOWBIT_I64, count, LOWBIT_IDS_ZERO, out.data(), dtype, c.cols) ==
                LOWBIT_OK,
            "%s", lowbit_last_error());
      check_ran("gather", c.bits, isa);
      for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < c.cols; k++) {
          // The product of a stored scale and a small integer, rounded once to fp32, then once to the output.
          const float exact = i + 1 == count ? 0.0f : float(w.dense[size_t(ids[size_t(i)] * c.cols + k)]);
          uint8_t wanted[4], *got = out.data() + size_t(i * c.cols + k) * (dtype == LOWBIT_F32 ? 4 : 2);
          lowbit::store_float(wanted, dtype, 0, exact == 0 ? 0.0f : exact);
          const float value = lowbit::load_float(got, dtype, 0);
          CHECK(value == lowbit::load_float(wanted, dtype, 0), "%s row %ld k %ld dtype %d: got %g, wanted %g",
                describe(c, count, 0, isa).c_str(), long(i), long(k), int(dtype), double(value), double(exact));
        }
    }
  lowbit_set_isa("auto");
}

std::mt19937 bag_bits(5);  // of their own: the products' bounds were set for the numbers that they draw

struct BagsCase {
  bool mean, weighted;
  int64_t padding;
};

// Bags of every length there is: empty ones, one row, many batches of rows; offsets that begin after the first id and
// end beyond the last. Exact where scales are powers of two and weights integers, close to float64 otherwise, and the
// same bits on every level and number of threads.
void test_bags(const Case& c, const std::vector<const char*>& isas, lowbit_dtype dtype) {
  const TestMatrix w(c, bag_bits);
  const int64_t padding = c.rows / 2, count = 400;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < count; i++) ids.push_back(int64_t(bag_bits() % unsigned(c.rows)));
  ids[7] = -3, ids[9] = c.rows, ids[10] = padding;
  const std::vector<int32_t> narrow(ids.begin(), ids.end());
  const std::vector<int64_t> offsets = {2, 3, 3, 17, 17, 19, 250, 251, 380, 1000};
  const int64_t bags = int64_t(offsets.size()) - 1;
  std::vector<float> weights;
  for (int64_t i = 0; i < count; i++)
    weights.push_back(c.powers_of_two ? float(int(bag_bits() % 9) - 4) : float(bag_bits() % 2000) / 700 - 1);
  for (const BagsCase& bag_case :
       {BagsCase{false, false, -1}, BagsCase{true, false, padding}, BagsCase{false, true, padding}}) {
    std::vector<uint8_t> first;
    for (const char* isa : isas)
      for (const int threads : {1, 2, 5}) {
        CHECK(lowbit_set_isa(isa) == LOWBIT_OK && lowbit_set_threads(threads) == LOWBIT_OK, "%s", lowbit_last_error());
        const bool wide = threads == 2;
        std::vector<uint8_t> out(size_t(bags * (c.cols + 3)) * (dtype == LOWBIT_F32 ? 4 : 2), 0xEE);
        CHECK(lowbit_gather_bags(&w.view, wide ? static_cast<const void*>(ids.data()) : narrow.data(),
                                 wide ? LOWBIT_I64 : LOWBIT_I32, count, offsets.data(), bags,
                                 bag_case.weighted ? weights.data() : nullptr, bag_case.mean, LOWBIT_IDS_ZERO,
                                 bag_case.padding, nullptr, out.data(), dtype, c.cols + 3) == LOWBIT_OK,
              "%s", lowbit_last_error());
        check_ran("bags", c.bits, isa);
        if (!first.empty()) {
          CHECK(out == first, "%s, %d threads: not the bits of ref", describe(c, count, 0, isa).c_str(), threads);
          continue;
        }
        first = out;
        for (int64_t b = 0; b < bags; b++)
          for (int64_t k = 0; k < c.cols; k++) {
            double sum = 0, size = 0, counted = 0;
            for (int64_t i = offsets[size_t(b)]; i < std::min(offsets[size_t(b) + 1], count); i++) {
              const int64_t id = ids[size_t(i)];
              if (bag_case.padding >= 0 && id == bag_case.padding) continue;
              counted++;
              if (id < 0 || id >= c.rows) continue;
              const double value =
                  w.dense[size_t(id * c.cols + k)] * (bag_case.weighted ? double(weights[size_t(i)]) : 1.0);
              sum += value, size += std::fabs(value);
            }
            const bool exact = c.powers_of_two && !bag_case.mean && dtype == LOWBIT_F32;
            const double wanted = bag_case.mean && counted > 0 ? sum / counted : sum;
            const double got = lowbit::load_float(out.data(), dtype, b * (c.cols + 3) + k);
            const double last = dtype == LOWBIT_F32 ? 0 : std::fabs(wanted) * (dtype == LOWBIT_F16 ? 1e-3 : 8e-3);
            CHECK(std::fabs(got - wanted) <= (exact ? 0 : 1e-5 * size + last + 1e-7),
                  "%s bag %ld k %ld mean %d weighted %d: got %g, wanted %g", describe(c, count, 0, isa).c_str(),
                  long(b), long(k), bag_case.mean, bag_case.weighted, got, wanted);
          }
        for (size_t at = size_t(c.cols) * (dtype == LOWBIT_F32 ? 4 : 2), i = 0; i < 6; i++)
          CHECK(out[at + i] == 0xEE, "%s: written between rows", describe(c, count, 0, isa).c_str());
      }
  }
  lowbit_set_isa("auto");
  lowbit_set_threads(0);
}

// The largest integers that a ternary row can give: every weight 1 (or -1), every digit at its end.
void test_largest_sums(const std::vector<const char*>& isas) {
  const int64_t cols = lowbit::kTritChunk;
  const Case c{lowbit::kTrit, 2, cols, -1, false, false, 2, LOWBIT_F32, true};
  TestMatrix w(c, random_bits);
  for (int64_t k = 0; k < cols; k++) w.codes[size_t(k)] = 2, w.codes[size_t(cols + k)] = 0;
  CHECK(lowbit_pack_codes(&w.view, w.codes.data(), w.lines.data()) == LOWBIT_OK, "%s", lowbit_last_error());
  const float scale = lowbit::load_float(w.scales.data(), LOWBIT_F32, 0);
  for (const int mode : {LOWBIT_ACT_FLOAT, LOWBIT_ACT_INT8})
    for (const int64_t tokens : {1, 2, 17})
      for (const char* isa : isas) {
        const float value = mode == LOWBIT_ACT_FLOAT ? 32639 : 127;
        const std::vector<float> x(size_t(tokens * cols), value);
        std::vector<float> y(size_t(tokens * 2));
        CHECK(lowbit_set_isa(isa) == LOWBIT_OK, "%s", lowbit_last_error());
        CHECK(lowbit_matmul(&w.view, x.data(), LOWBIT_F32, tokens, cols, nullptr, LOWBIT_F32, y.data(), 2,
                            lowbit_activations(mode), nullptr, 0) == LOWBIT_OK,
              "%s", lowbit_last_error());
        for (int64_t m = 0; m < tokens; m++)
          for (int64_t n = 0; n < 2; n++) {
            const float wanted = float(int64_t(value) * cols) * scale * (n ? -1 : 1);
            CHECK(y[size_t(m * 2 + n)] == wanted, "%s mode %d: got %g, wanted %g", isa, mode,
                  double(y[size_t(m * 2 + n)]), double(wanted));
          }
      }
  lowbit_set_isa("auto");
}

}  // namespace

int main() {
  const auto isas = machine_isas();
  CHECK(isas.size() >= 1 && !strcmp(isas[0], "ref"), "no ref");
  const lowbit_dtype dtypes[] = {LOWBIT_F32, LOWBIT_F16, LOWBIT_BF16};
  int turn = 0;
  for (const int bits : {lowbit::kTrit, 2, 3, 4, 8}) {
    const bool may_have_zeros = bits != lowbit::kTrit;
    // Every length around a plane, a line and an int3 group, whole-row scales of each shape.
    for (const int64_t cols :
         {1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 320, 511, 512, 513, 1000, 2049, 4097}) {
      const bool zeros = may_have_zeros && turn % 2, perm = turn % 3 == 0;
      const Case c{bits, 3, cols, -1, zeros, perm, turn % 3, dtypes[turn / 3 % 3], true};
      test_matmul(c, isas, {5, 1, 2}, LOWBIT_F32, true);
      test_gather({bits, 7, cols, -1, zeros, perm, turn % 3, dtypes[turn % 3], false}, isas);
      turn++;
    }
    // Every chunk size and groups that are several chunks, with tails, zeros, odd N and every number of tokens that
    // matters.
    for (const int64_t group : {16, 32, 48, 64, 80, 96, 128, 192, 256}) {
      for (const int64_t cols : {int64_t(group), 3 * group, int64_t(1031)}) {
        if (cols < group) continue;
        const Case exact{bits, 9, cols, group, may_have_zeros && turn % 2 == 0, turn % 3 == 1, 0, dtypes[turn % 3],
                         true};
        test_matmul(exact, isas, {17, 1, 8}, LOWBIT_F32, true);
        Case random = exact;
        random.powers_of_two = false;
        test_matmul(random, isas, {19, 16, 15, 9, 8, 7, 3, 1}, dtypes[turn % 3], false);
        test_gather(random, isas);
        if (turn % 4 == 0) test_bags(turn % 8 ? random : exact, isas, dtypes[turn / 4 % 3]);
        turn++;
      }
    }
    for (const int64_t cols : {1, 7, 33, 1003, 4097})
      test_bags({bits, cols == 7 ? 1 : 50, cols, -1, may_have_zeros, cols == 33, int(cols % 3), LOWBIT_F16, cols > 7},
                isas, LOWBIT_F32);
    // More rows than a block, more tokens than two tiles, one row, one token.
    test_matmul({bits, 131, 384, 128, may_have_zeros, false, 0, LOWBIT_F16, false}, isas, {33, 32, 31, 16, 1},
                LOWBIT_BF16, false);
    test_matmul({bits, 1, 256, 64, false, true, 0, LOWBIT_F32, false}, isas, {16, 1}, LOWBIT_F16, false);
    // Rows longer than what kernels keep decoded for later tiles, and than the digits that fit the first-level cache.
    test_matmul({bits, 11, 15489, 128, may_have_zeros, false, 0, LOWBIT_F16, false}, isas, {49, 7, 2, 1}, LOWBIT_F32,
                false);
    test_matmul({bits, 67, 130, -1, false, false, 1, LOWBIT_BF16, false}, isas, {300, 257, 256, 1}, LOWBIT_F32, false);
  }
  // Ternary rows that end in a line, a pair of lines and the stages that kernels decode at a time; rows of several
  // chunks.
  for (const int64_t cols : {319, 321, 639, 640, 641, 960, 2560, 10239, 10241, 40960, 40961, 81921}) {
    const int scale_shape = turn++ % 2 ? 1 : 2;
    test_matmul({lowbit::kTrit, 9, cols, -1, false, false, scale_shape, LOWBIT_F32, true}, isas, {17, 5, 1}, LOWBIT_F32,
                true);
    test_matmul({lowbit::kTrit, 9, cols, -1, false, cols < 10000, scale_shape, LOWBIT_F16, false}, isas, {17, 3, 1},
                LOWBIT_BF16, false);
    if (cols >= 10239)
      test_matmul({lowbit::kTrit, 3, cols, 128, false, false, 0, LOWBIT_F16, false}, isas, {17, 1}, LOWBIT_F32, false);
  }
  test_largest_sums(isas);
  return check::finish("kernels");
}
