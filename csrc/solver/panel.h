// The memory of one panel of the solver (solver/kernel.h): what a thread allocates once and fills panel by panel.
#ifndef LOWBIT_SOLVER_PANEL_H
#define LOWBIT_SOLVER_PANEL_H

#include <utility>

#include "solver/kernel.h"

namespace lowbit {

// Memory of lowbit_alloc: huge pages, because a panel walks the whole factor.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) : bytes_(size_t(count) * sizeof(T)), data_(static_cast<T*>(lowbit_alloc(bytes_))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_) lowbit_free(data_, bytes_);
  }

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  size_t bytes_ = 0;
  T* data_ = nullptr;
};

// One thread's buffers: a panel, transposed.
struct PanelBuffers {
  Buffer<float> weight, scales, zeros;
  Buffer<uint8_t> codes;
  Buffer<double> loss;
  Buffer<int64_t> pushed;

  PanelBuffers(int64_t strips, int64_t groups, int64_t lane_groups)
      : weight(lane_groups * kSolverLanes * strips * kStripCols),
        scales(lane_groups * kSolverLanes * groups),
        zeros(lane_groups * kSolverLanes * groups),
        codes(lane_groups * kSolverLanes * strips * kStripCols),
        loss(lane_groups * kSolverLanes),
        pushed(strips) {}

  explicit operator bool() const { return weight && scales && zeros && codes && loss && pushed; }
};

}  // namespace lowbit
#endif
