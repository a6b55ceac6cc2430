// What kernels are given in the microbenchmarks: packed matrices with groups of 128 (trits: one scale), enough copies
// to come from DRAM in turn, and activations quantized as csrc/api/matmul.cpp does it. Values are random: no kernel's
// time depends on them.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#include "cpu/float_types.h"
#include "cpu/kernel.h"
#include "dispatch/blocking.h"
#include "dispatch/features.h"
#include "dispatch/select.h"

namespace micro {

constexpr int64_t kGroup = 128;
constexpr int64_t kRotateBytes = int64_t(500) << 20;

struct Shape {
  int64_t rows, cols;  // of a matrix
  int64_t ids;         // rows that a gather or a bag takes of it
};

// Memory on huge pages, as packed matrices have it: with small ones the same loops take up to three times as long. At
// least a whole one, because less is the heap's, and where it lies in its page would change from run to run.
class Pages {
 public:
  explicit Pages(size_t bytes)
      : bytes_(std::max(bytes, size_t(2) << 20)), memory_(static_cast<uint8_t*>(lowbit_alloc(bytes_))) {
    if (!memory_) {
      fprintf(stderr, "no memory for %zu bytes\n", bytes_);
      exit(1);
    }
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages() { lowbit_free(memory_, bytes_); }

  template <class T>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(memory_ + byte_offset);
  }

 private:
  size_t bytes_;
  uint8_t* memory_;
};

inline std::vector<float> random_floats(int64_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

// Copies of one matrix; they share the scales' values, not their memory.
class Matrices {
 public:
  Matrices(int bits, const Shape& shape, bool dram) : bits_(bits), codes_(shape.rows * shape.cols) {
    const int64_t group = bits == lowbit::kTrit ? shape.cols : kGroup, groups = shape.cols / group;
    const int64_t scales = bits == lowbit::kTrit ? 1 : shape.rows * groups;
    line_bytes_ = shape.rows * lowbit::row_lines(bits, shape.cols) * lowbit::kLineBytes;
    bytes_ = line_bytes_ + scales * 2;
    const int64_t stride = lowbit::ceil_div(bytes_, 4096) * 4096, copies = dram ? kRotateBytes / stride + 1 : 1;
    pages_ = std::make_unique<Pages>(size_t(stride * copies));
    views_.resize(size_t(copies));
    for (int64_t i = 0; i < copies; i++) {
      lowbit_matrix& view = views_[size_t(i)];
      view.format = lowbit_format(bits);
      view.rows = shape.rows;
      view.cols = shape.cols;
      view.group_size = group;
      view.codes = pages_->as<uint8_t>(i * stride);
      view.scales = pages_->as<uint8_t>(i * stride + line_bytes_);
      view.scale_dtype = LOWBIT_F16;
      view.scale_rows = bits == lowbit::kTrit ? 1 : shape.rows;
      view.scale_cols = groups;
      if (i == 0) fill(i * stride, scales);
      if (i > 0) memcpy(pages_->as<uint8_t>(i * stride), views_[0].codes, size_t(bytes_));
    }
  }

  const lowbit_matrix& operator[](int64_t i) const { return views_[size_t(i) % views_.size()]; }
  int64_t bytes() const { return bytes_; }  // codes and scales of one
  int64_t lines() const { return line_bytes_ / lowbit::kLineBytes; }

 private:
  void fill(int64_t offset, int64_t scales) {
    std::mt19937 random(1);
    std::vector<uint8_t> codes(static_cast<size_t>(codes_));
    for (uint8_t& code : codes) code = uint8_t(random() % unsigned(lowbit::code_count(bits_)));
    if (lowbit_pack_codes(&views_[0], codes.data(), pages_->as<uint8_t>(offset)) != LOWBIT_OK) {
      fprintf(stderr, "%s\n", lowbit_last_error());
      exit(1);
    }
    for (int64_t i = 0; i < scales; i++)
      lowbit::store_float(pages_->as<uint8_t>(offset + line_bytes_), LOWBIT_F16, i,
                          0.01f + float(random() % 64) / 4096);
  }

  int bits_;
  int64_t codes_;
  int64_t line_bytes_ = 0, bytes_ = 0;
  std::unique_ptr<Pages> pages_;
  std::vector<lowbit_matrix> views_;
};

// The matrices of a format. Those used last stay: a benchmark is called several times until its time is long enough.
inline const Matrices& matrices(int bits, const Shape& shape, bool dram) {
  static std::unique_ptr<Matrices> held;
  static std::tuple<int, int64_t, int64_t, bool> held_key;
  const auto key = std::make_tuple(bits, shape.rows, shape.cols, dram);
  if (!held || key != held_key) {
    held.reset();
    held = std::make_unique<Matrices>(bits, shape, dram);
    held_key = key;
  }
  return *held;
}

// Activations of a product with a matrix of `bits`, in the layout that so many tokens get at a level, and the floats they
// come from. quantize() fills them.
class Activated {
 public:
  Activated(int bits, int64_t cols, int64_t tokens, bool int8_mode, lowbit::Isa isa)
      : source_(random_floats(tokens * cols)) {
    const bool trit = bits == lowbit::kTrit;
    const int64_t padding = trit ? 640 : 512;
    const auto mode = int8_mode ? LOWBIT_ACT_INT8 : LOWBIT_ACT_FLOAT;
    view_.layout =
        lowbit::tokens_in_tiles(bits, mode, tokens, isa) ? lowbit::Activations::kTiles : lowbit::Activations::kRows;
    view_.tokens = tokens;
    view_.cols = cols;
    view_.cols_padded = lowbit::ceil_div(cols, padding) * padding;
    view_.chunk = lowbit::chunk_size(bits, cols, trit ? cols : kGroup);
    view_.chunks = lowbit::ceil_div(cols, view_.chunk);
    view_.chunks_padded = lowbit::ceil_div(view_.chunks, lowbit::kSlots) * lowbit::kSlots;
    view_.token_step = trit && int8_mode;
    view_.rows_share = (int8_mode ? 1 : 2) * tokens * view_.cols_padded >
                       lowbit::own_digit_bytes(bits, tokens, isa, lowbit::l1_bytes());
    const bool tiles = view_.layout == lowbit::Activations::kTiles;
    const int64_t places = tiles ? lowbit::ceil_div(tokens, lowbit::kLanes) * lowbit::kLanes : tokens;
    const int64_t digits = lowbit::ceil_div(places * view_.cols_padded, 64) * 64;
    const int64_t steps = lowbit::ceil_div(places * view_.chunks_padded * 4, 64) * 64;
    pages_ = std::make_unique<Pages>(size_t(2 * digits + 2 * steps));
    view_.low = pages_->as<int8_t>();
    view_.high = int8_mode ? nullptr : pages_->as<int8_t>(digits);
    view_.step = pages_->as<float>(2 * digits);
    view_.sum = pages_->as<int32_t>(2 * digits + steps);
  }

  void quantize(lowbit::ActivationsKernel kernel) const {
    kernel(source_.data(), LOWBIT_F32, view_.cols, nullptr, 0, view_.tokens, &view_);
  }
  const lowbit::Activations& view() const { return view_; }

 private:
  std::vector<float> source_;
  lowbit::Activations view_{};
  std::unique_ptr<Pages> pages_;
};

}  // namespace micro
