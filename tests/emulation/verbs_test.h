// What the tests of the emulated verbs share: the queue, memory with guards around it, and the emulator's verdict.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "control.h"
#include "cuda/verbs.cuh"
#include "matrices.h"

constexpr lowbit_cuda_queue kQueue = {0, nullptr};
constexpr int kFormats[] = {2, 3, 4, 8, lowbit::kTrit};
constexpr int64_t kColumns[] = {1, 63, 64, 65, 129, 255, 257, 320, 511, 513, 1000};

// Runs lowbit::cuda::<verb>(...): it succeeds, and the emulator found nothing.
template <class Verb, class... A>
void run(const std::string& what, Verb verb, A... arguments) {
  lowbit::CudaMessage message = {};
  const lowbit_status status = verb(&kQueue, arguments..., &message);
  CHECK(status == LOWBIT_OK, "%s: %s", what.c_str(), message.text);
  CHECK(lowbit::emulation::violations() == 0, "%s: %s", what.c_str(), lowbit::emulation::message(0));
  lowbit::emulation::clear();
}

// `bytes` at `offset` from a multiple of 64, all 0xa5, between guards of 0xa5.
class Guarded {
 public:
  explicit Guarded(size_t bytes, size_t offset = 0) : bytes_(bytes), memory_(bytes + offset + 3 * kGuard, 0xa5) {
    start_ = kGuard + (64 - (reinterpret_cast<uintptr_t>(memory_.data()) + kGuard) % 64) % 64 + offset;
  }
  template <class T = uint8_t>
  T* get() {
    return reinterpret_cast<T*>(memory_.data() + start_);
  }
  bool intact() const {
    for (size_t i = 0; i < memory_.size(); i++)
      if ((i < start_ || i >= start_ + bytes_) && memory_[i] != 0xa5) return false;
    return true;
  }

 private:
  static constexpr size_t kGuard = 128;
  size_t bytes_, start_;
  std::vector<uint8_t> memory_;
};

inline size_t dtype_size(lowbit_dtype dtype) { return dtype == LOWBIT_F32 ? 4 : 2; }

// One of the group sizes that `cols` allows; -1 is one group a row.
inline int64_t some_group_size(int64_t cols, std::mt19937& random) {
  std::vector<int64_t> sizes = {-1};
  for (int64_t size : {16, 32, 48, 64, 80, 128, 192})
    if (size <= cols) sizes.push_back(size);
  return sizes[random() % sizes.size()];
}

// A random matrix of that format and width; scales of a random dtype and of each shape that its groups allow.
inline Case some_case(int bits, int64_t rows, int64_t cols, bool perm, std::mt19937& random) {
  Case c = {};
  c.bits = bits, c.rows = rows, c.cols = cols, c.perm = perm;
  c.group_size = some_group_size(cols, random);
  c.zeros = bits != lowbit::kTrit && random() % 2;
  c.scale_shape = c.group_size == -1 ? int(random() % 3) : 0;
  c.scale_dtype = lowbit_dtype(random() % 3);
  return c;
}

inline std::string name_of(const Case& c) {
  return format_name(c.bits) + " " + std::to_string(c.rows) + "x" + std::to_string(c.cols) + " group " +
         std::to_string(c.group_size) + (c.zeros ? " zeros" : "") + (c.perm ? " perm" : "") + " scales " +
         std::to_string(c.scale_shape) + "/" + std::to_string(c.scale_dtype);
}

// The matrix as a verb takes it: its group size normalised.
inline lowbit_matrix normalised(const TestMatrix& m) {
  lowbit_matrix w = m.view;
  if (w.group_size == -1) w.group_size = w.cols;
  return w;
}
