// Random packed matrices and their float64 meaning, for the kernel tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/float_types.h"
#include "lowbit/formats.h"
#include "lowbit/lowbit.h"

struct Case {
  int bits;  // or lowbit::kTrit
  int64_t rows, cols, group_size;
  bool zeros, perm;
  int scale_shape;  // 0: [rows, groups], 1: [rows, 1], 2: [1, 1] (1 and 2 with one group a row)
  lowbit_dtype scale_dtype;
  bool powers_of_two;  // scales whose products are exact
};

struct TestMatrix {
  lowbit_matrix view{};
  std::vector<uint8_t> codes, lines, zeros, scales;
  std::vector<int32_t> perm;
  std::vector<double> dense;  // [rows][cols], original column order

  TestMatrix(const Case& c, std::mt19937& random) {
    const int64_t group = c.group_size == -1 ? c.cols : c.group_size, groups = (c.cols + group - 1) / group;
    const int64_t scale_rows = c.scale_shape == 2 ? 1 : c.rows, scale_cols = c.scale_shape ? 1 : groups;
    auto below = [&](int n) { return int(random() % unsigned(n)); };
    codes.resize(size_t(c.rows * c.cols));
    for (auto& code : codes) code = uint8_t(below(lowbit::code_count(c.bits)));
    const size_t scale_bytes = c.scale_dtype == LOWBIT_F32 ? 4 : 2;
    scales.resize(size_t(scale_rows * scale_cols) * scale_bytes);
    std::vector<float> scale_values(size_t(scale_rows * scale_cols));
    for (size_t i = 0; i < scale_values.size(); i++) {
      const float value =
          c.powers_of_two ? std::ldexp(1.0f, below(3) - 2) : 0.001f + 0.01f * float(random() % 1000) / 1000;
      lowbit::store_float(scales.data(), c.scale_dtype, int64_t(i), value);
      scale_values[i] = lowbit::load_float(scales.data(), c.scale_dtype, int64_t(i));
    }
    if (c.zeros)
      for (size_t i = 0; i < scale_values.size(); i++) zeros.push_back(uint8_t(below(lowbit::code_count(c.bits))));
    if (c.perm) {
      for (int64_t k = 0; k < c.cols; k++) perm.push_back(int32_t(k));
      for (int64_t k = c.cols - 1; k > 0; k--) std::swap(perm[size_t(k)], perm[size_t(below(int(k) + 1))]);
    }
    lines.resize(size_t(c.rows * lowbit::row_lines(c.bits, c.cols) * 64));
    view.format = lowbit_format(c.bits);
    view.rows = c.rows;
    view.cols = c.cols;
    view.group_size = c.group_size;
    view.codes = lines.data();
    view.scales = scales.data();
    view.scale_dtype = c.scale_dtype;
    view.scale_rows = scale_rows;
    view.scale_cols = scale_cols;
    view.zeros = c.zeros ? zeros.data() : nullptr;
    view.perm = c.perm ? perm.data() : nullptr;
    CHECK(lowbit_pack_codes(&view, codes.data(), lines.data()) == LOWBIT_OK, "%s", lowbit_last_error());
    CHECK(lowbit_matrix_check(&view, 1) == LOWBIT_OK, "%s", lowbit_last_error());
    dense.resize(codes.size());
    for (int64_t n = 0; n < c.rows; n++)
      for (int64_t k = 0; k < c.cols; k++) {
        const int64_t at = (scale_rows == 1 ? 0 : n) * scale_cols + (scale_cols == 1 ? 0 : k / group);
        const int zero = c.zeros ? zeros[size_t(at)] : lowbit::middle_code(c.bits);
        dense[size_t(n * c.cols + (c.perm ? perm[size_t(k)] : k))] =
            double(scale_values[size_t(at)]) * (codes[size_t(n * c.cols + k)] - zero);
      }
  }
};

inline std::string format_name(int bits) { return bits == lowbit::kTrit ? "trit" : "int" + std::to_string(bits); }

// Instruction sets of this machine, each forced in turn.
inline std::vector<const char*> machine_isas() {
  std::vector<const char*> list;
  for (const char* isa : {"ref", "avx2", "avxvnni", "avx512vnni", "amx"})
    if (lowbit_set_isa(isa) == LOWBIT_OK) list.push_back(isa);
  lowbit_set_isa("auto");
  return list;
}
