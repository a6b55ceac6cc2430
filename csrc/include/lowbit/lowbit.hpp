// C++17 over the C API of lowbit.h: a matrix that owns its memory, and exceptions instead of status codes.
// Header only: it adds no symbol to the library and needs nothing that lowbit.h does not offer.
//
//   auto w = lowbit::Matrix::pack(LOWBIT_INT4, rows, cols, 128, weights);   // weights: float [rows][cols]
//   std::vector<float> y = w.matmul(x);                                     // x: [tokens][cols] -> [tokens][rows]
//   std::vector<float> e = w.gather(ids);                                   // ids: [count]      -> [count][cols]
#ifndef LOWBIT_LOWBIT_HPP
#define LOWBIT_LOWBIT_HPP

#include <lowbit/lowbit.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace lowbit {

// A failed call: what() is lowbit_last_error(), which names the thing, what was expected and what was found.
class Error : public std::runtime_error {
 public:
  Error(lowbit_status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  lowbit_status status() const noexcept { return status_; }

 private:
  lowbit_status status_;
};

// One type for each status, for those who catch by type.
template <lowbit_status Status>
class ErrorOf : public Error {
 public:
  explicit ErrorOf(const std::string& message) : Error(Status, message) {}
};
using InvalidArgument = ErrorOf<LOWBIT_INVALID_ARGUMENT>;
using OutOfRange = ErrorOf<LOWBIT_OUT_OF_RANGE>;
using Unsupported = ErrorOf<LOWBIT_UNSUPPORTED>;
using OutOfMemory = ErrorOf<LOWBIT_OUT_OF_MEMORY>;
using NumericError = ErrorOf<LOWBIT_NUMERIC>;

// Throws the Error of a status; does nothing for LOWBIT_OK.
inline void check(lowbit_status status) {
  switch (status) {
    case LOWBIT_OK: return;
    case LOWBIT_INVALID_ARGUMENT: throw InvalidArgument(lowbit_last_error());
    case LOWBIT_OUT_OF_RANGE: throw OutOfRange(lowbit_last_error());
    case LOWBIT_UNSUPPORTED: throw Unsupported(lowbit_last_error());
    case LOWBIT_OUT_OF_MEMORY: throw OutOfMemory(lowbit_last_error());
    case LOWBIT_NUMERIC: throw NumericError(lowbit_last_error());
  }
  throw Error(status, lowbit_last_error());
}

// The lowbit_dtype of a C++ type. 16-bit floats have no type in C++17: they pass as addresses, through view().
template <class T>
constexpr lowbit_dtype dtype_of() {
  if constexpr (std::is_same_v<T, float>) {
    return LOWBIT_F32;
  } else if constexpr (std::is_same_v<T, int32_t>) {
    return LOWBIT_I32;
  } else {
    static_assert(std::is_same_v<T, int64_t>, "expected float, int32_t or int64_t");
    return LOWBIT_I64;
  }
}

struct PackOptions {
  bool symmetric = true;  // false: a zero point a group, as well as a scale
  bool clip = false;      // search the clipping of each group's range that minimises sum |error|^2.4
  lowbit_dtype scale_dtype = LOWBIT_F16;
};

// A packed matrix [rows][cols] that owns its codes, scales, zeros and perm. Movable; copies would be expensive and
// are not made by accident. Every member function is const and may be called from many threads at once. A matrix that
// was moved from throws InvalidArgument.
class Matrix {
 public:
  // Round to nearest from weights [rows][cols]. group_size: a multiple of 16, or -1 for one group a row.
  static Matrix pack(lowbit_format format, int64_t rows, int64_t cols, int64_t group_size, const float* weights,
                     const PackOptions& options = {}) {
    Matrix m(format, rows, cols, group_size, options.scale_dtype, nullptr);
    if (!options.symmetric) m.zeros_.resize(m.scale_count());
    check(lowbit_pack_float(format, rows, cols, group_size, weights, LOWBIT_F32, cols, options.scale_dtype,
                            options.clip, m.codes_.get(), m.scales_.data(),
                            m.zeros_.empty() ? nullptr : m.zeros_.data()));
    return m;
  }

  // From codes [rows][cols], one a byte and already in packed column order, and their scales [rows][groups] of
  // `scale_dtype`; zeros [rows][groups] or null (2^(bits-1) everywhere); perm [cols] or null. All of them are copied.
  static Matrix from_codes(lowbit_format format, int64_t rows, int64_t cols, int64_t group_size, const uint8_t* codes,
                           const void* scales, lowbit_dtype scale_dtype, const uint8_t* zeros = nullptr,
                           const int32_t* perm = nullptr) {
    Matrix m(format, rows, cols, group_size, scale_dtype, perm);
    if (!scales) throw InvalidArgument("scales: expected a pointer, got NULL");
    std::memcpy(m.scales_.data(), scales, m.scales_.size());
    if (zeros) m.zeros_.assign(zeros, zeros + m.scale_count());
    const lowbit_matrix view = m.view();
    check(lowbit_matrix_check(&view, 1));
    check(lowbit_pack_codes(&view, codes, m.codes_.get()));
    return m;
  }

  int64_t rows() const noexcept { return rows_; }
  int64_t cols() const noexcept { return cols_; }
  lowbit_format format() const noexcept { return format_; }

  // The C API's view of this matrix, valid for as long as the matrix lives and stays where it is.
  lowbit_matrix view() const noexcept {
    lowbit_matrix w{};
    w.format = format_;
    w.rows = rows_;
    w.cols = cols_;
    w.group_size = group_size_;
    w.codes = codes_.get();
    w.scales = scales_.data();
    w.scale_dtype = scale_dtype_;
    w.scale_rows = rows_;
    w.scale_cols = groups_;
    w.zeros = zeros_.empty() ? nullptr : zeros_.data();
    w.perm = perm_.empty() ? nullptr : perm_.data();
    return w;
  }

  // y[m][n] = sum_k x[m][k] * W[n][k] + bias[n]: x [tokens][cols], y [tokens][rows], bias [rows] or null.
  void matmul(const float* x, int64_t tokens, float* y, const float* bias = nullptr,
              lowbit_activations activations = LOWBIT_ACT_FLOAT) const {
    const lowbit_matrix w = view();
    check(lowbit_matmul(&w, x, LOWBIT_F32, tokens, cols_, bias, LOWBIT_F32, y, rows_, activations, nullptr, 0));
  }

  // The same for x [tokens][cols] in a vector, whose length gives the number of tokens.
  std::vector<float> matmul(const std::vector<float>& x) const {
    const auto cols = static_cast<size_t>(cols_);
    if (cols == 0 || x.size() % cols != 0)
      throw InvalidArgument("x: expected a multiple of cols (" + std::to_string(cols_) + ") values, got " +
                            std::to_string(x.size()));
    const size_t tokens = x.size() / cols;
    std::vector<float> y(tokens * static_cast<size_t>(rows_));
    matmul(x.data(), static_cast<int64_t>(tokens), y.data());
    return y;
  }

  // out[i][:] = W[ids[i]][:] in original column order: ids int32_t or int64_t [count], out [count][cols].
  template <class Id>
  void gather(const Id* ids, int64_t count, float* out, lowbit_id_policy policy = LOWBIT_IDS_ERROR) const {
    const lowbit_matrix w = view();
    check(lowbit_gather(&w, ids, dtype_of<Id>(), count, policy, out, LOWBIT_F32, cols_));
  }

  template <class Id>
  std::vector<float> gather(const std::vector<Id>& ids) const {
    std::vector<float> out(ids.size() * static_cast<size_t>(cols_));
    gather(ids.data(), static_cast<int64_t>(ids.size()), out.data());
    return out;
  }

  // Embedding bags: out[b][:] = the sum (mean: over the rows counted) of W[ids[i]][:], times weights[i] if there are
  // any, for offsets[b] <= i < offsets[b + 1]; ids [count], offsets [bags + 1], weights [count] or null, out
  // [bags][cols]; padding_id is left out.
  template <class Id>
  void gather_bags(const Id* ids, int64_t count, const int64_t* offsets, int64_t bags, float* out,
                   const float* weights = nullptr, bool mean = false, lowbit_id_policy policy = LOWBIT_IDS_ERROR,
                   int64_t padding_id = -1) const {
    const lowbit_matrix w = view();
    check(lowbit_gather_bags(&w, ids, dtype_of<Id>(), count, offsets, bags, weights, mean, policy, padding_id, nullptr,
                             out, LOWBIT_F32, cols_));
  }

  // The sums of bags that end where the next one begins: offsets [bags + 1].
  template <class Id>
  std::vector<float> gather_bags(const std::vector<Id>& ids, const std::vector<int64_t>& offsets) const {
    const size_t bags = offsets.empty() ? 0 : offsets.size() - 1;
    std::vector<float> out(bags * static_cast<size_t>(cols_));
    gather_bags(ids.data(), static_cast<int64_t>(ids.size()), offsets.data(), static_cast<int64_t>(bags), out.data());
    return out;
  }

  // The weights as floats [rows][cols], in original column order.
  std::vector<float> unpack() const {
    std::vector<float> out(static_cast<size_t>(rows_) * static_cast<size_t>(cols_));
    const lowbit_matrix w = view();
    check(lowbit_unpack(&w, 0, rows_, out.data(), LOWBIT_F32, cols_));
    return out;
  }

 private:
  struct Free {
    size_t bytes;
    void operator()(uint8_t* memory) const noexcept { lowbit_free(memory, bytes); }
  };

  // Checks the shape before anything is sized by it, then allocates.
  Matrix(lowbit_format format, int64_t rows, int64_t cols, int64_t group_size, lowbit_dtype scale_dtype,
         const int32_t* perm)
      : format_(format),
        rows_(rows),
        cols_(cols),
        group_size_(group_size == -1 ? cols : group_size),
        groups_(cols > 0 && group_size_ > 0 ? (cols - 1) / group_size_ + 1 : 0),
        scale_dtype_(scale_dtype) {
    const uint8_t placeholder = 0;  // shapes are checked without a look at codes or scales
    lowbit_matrix shape = view();
    shape.codes = &placeholder;
    shape.scales = &placeholder;
    shape.perm = perm;
    check(lowbit_matrix_check(&shape, 0));
    const size_t bytes = static_cast<size_t>(rows * lowbit_row_lines(format, cols)) * 64;
    codes_ = {static_cast<uint8_t*>(lowbit_alloc(bytes)), Free{bytes}};
    if (!codes_) throw OutOfMemory("codes: no memory for " + std::to_string(bytes) + " bytes");
    scales_.resize(scale_count() * (scale_dtype == LOWBIT_F32 ? 4 : 2));
    if (perm) perm_.assign(perm, perm + cols);
  }

  size_t scale_count() const noexcept { return static_cast<size_t>(rows_) * static_cast<size_t>(groups_); }

  lowbit_format format_;
  int64_t rows_, cols_, group_size_, groups_;
  lowbit_dtype scale_dtype_;
  std::unique_ptr<uint8_t, Free> codes_{nullptr, Free{0}};
  std::vector<unsigned char> scales_;
  std::vector<uint8_t> zeros_;
  std::vector<int32_t> perm_;
};

}  // namespace lowbit
#endif
