// Weights on their way to operand A: units of 16 rows, copied to a warp's ring in shared memory behind the registers'
// back, with their scales and zeros.
#ifndef LOWBIT_CUDA_UNIT_RING_CUH
#define LOWBIT_CUDA_UNIT_RING_CUH

#include "cuda/arguments.cuh"

namespace lowbit {
namespace cuda {

// The group of a plane of a unit; planes beyond the last column belong to the last group.
template <Scales Groups>
__device__ __forceinline__ int32_t unit_group(const MatrixArguments& w, int32_t plane) {
  const int32_t group = plane_group(w, plane);
  return Groups == Scales::unit ? group : min(group, w.groups - 1);  // a unit has a column of its one group
}

// What a lane copies of a tile of 16 rows: bytes 16c .. 16c+15 of the lines of rows g and g + 8 (the last row again
// where there is none), and the scales of row `lane` (lanes 16 to 31: the zeros of row lane - 16).
template <int Bits, Scales Groups>
struct UnitCopier {
  const uint8_t* lines[2];
  uintptr_t side;       // address of the row's first scale, or zero
  uint32_t side_bytes;  // of a scale, or zero
  bool zeros;           // without any, lanes 16 to 31 copy scales again: no lane goes a way of its own
  bool last;            // one of the last two tiles: the array may end within an aligned word of theirs

  UnitCopier() = default;
  __device__ __forceinline__ UnitCopier(const MatrixArguments& w, int lane)
      : lines{},
        side(0),
        side_bytes(lane >= 16 && w.zeros ? 1 : uint32_t(w.scale_bytes)),
        zeros(lane >= 16 && w.zeros),
        last(false) {}

  __device__ __forceinline__ void go_to(const MatrixArguments& w, int64_t tile, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t row = min(tile * kTileRows + (lane >> 2) + 8 * r, w.rows - 1);
      lines[r] = w.codes + row * w.row_lines * kLineBytes + 16 * (lane & 3);
    }
    const int64_t row = min(tile * kTileRows + (lane & 15), w.rows - 1);
    side = reinterpret_cast<uintptr_t>(zeros ? static_cast<const void*>(w.zeros) : w.scales) +
           uintptr_t(row * w.scale_row_stride) * side_bytes;
    last = (tile + 2) * kTileRows >= w.rows || !w.scale_row_stride;
  }

  // Starts the copies of one unit into a slot:
  //   lines  [line][r][lane] 16 bytes
  //   words  [scale_words][32]: the aligned words that hold the scales of 16 rows, then their zeros
  __device__ __forceinline__ void copy(const MatrixArguments& w, int32_t unit, int lane, uint32_t slot) const {
    constexpr int kLines = Format<Bits>::kLines, kPlanes = Format<Bits>::kPlanes;
    // A row's last int3 unit may store one low line and its high line: the second low line is then the first again,
    // whose columns lie beyond the row and meet zeros.
    const bool is_short = Bits == 3 && (unit + 1) * kLines > w.row_lines;
#pragma unroll
    for (int line = 0; line < kLines; line++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        cp_async16(slot + uint32_t((line * 2 + r) * 512 + lane * 16),
                   lines[r] + (int64_t(unit) * kLines + (is_short && line ? line - 1 : line)) * kLineBytes);
    if constexpr (Groups == Scales::fine) return;  // finer groups read their scales as they need them
#pragma unroll
    for (int i = 0; i < scale_words(Groups, kPlanes); i++) {
      const int32_t group = unit_group<Groups>(w, unit * kPlanes + i * shared_planes(Groups, kPlanes));
      const uintptr_t word = (side + uint32_t(group) * side_bytes) & ~uintptr_t(3);
      const uint32_t at = slot + uint32_t(kLines * 1024 + 128 * i + 4 * lane);
      if (!last) {
        cp_async4(at, reinterpret_cast<const void*>(word));
      } else {  // not a byte beyond the array
        const uintptr_t end = zeros ? reinterpret_cast<uintptr_t>(w.zeros) + uintptr_t(w.scale_count)
                                    : reinterpret_cast<uintptr_t>(w.scales) + uintptr_t(w.scale_count * w.scale_bytes);
        cp_async4(at, reinterpret_cast<const void*>(word), uint32_t(min(end - word, uintptr_t(4))));
      }
    }
  }
};

// The rows g and g + 8 of a tile whose results a lane holds, and where in its aligned word a scale of theirs lies.
struct LaneRows {
  int64_t row[2];
  uint32_t scale_low[2], zero_low[2];  // low bits of the address of the row's first scale and zero

  LaneRows() = default;
  __device__ __forceinline__ LaneRows(const MatrixArguments& w, int64_t tile, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      row[r] = min(tile * kTileRows + (lane >> 2) + 8 * r, w.rows - 1);
      const uint32_t first = uint32_t(row[r] * w.scale_row_stride);
      scale_low[r] = uint32_t(reinterpret_cast<uintptr_t>(w.scales)) + first * uint32_t(w.scale_bytes);
      zero_low[r] = uint32_t(reinterpret_cast<uintptr_t>(w.zeros)) + first;
    }
  }
};

// Scales and zeros of rows g and g + 8, from where they lie.
template <int Bits>
__device__ __forceinline__ void load_scales(const MatrixArguments& w, const LaneRows& rows, int32_t group,
                                            float (&scale)[2], int (&zero)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    scale[r] = load_scale(w, rows.row[r], group);
    zero[r] = w.zeros ? int(ldg(w.zeros + rows.row[r] * w.scale_row_stride + group)) : middle_code(Bits);
  }
}

// The same out of the words of a slot.
template <int Bits>
__device__ __forceinline__ void read_words(const MatrixArguments& w, const LaneRows& rows, uint32_t words,
                                           int32_t group, int lane, float (&scale)[2], int (&zero)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const uint32_t at = words + uint32_t(4 * (8 * r + (lane >> 2)));
    if (w.scale_dtype == LOWBIT_F32) {
      scale[r] = lds<float>(at);
    } else {
      const uint16_t bits = lds<uint16_t>(at + ((rows.scale_low[r] + 2 * uint32_t(group)) & 2));
      scale[r] = w.scale_dtype == LOWBIT_F16 ? from_f16(bits) : from_bf16(bits);
    }
    zero[r] = middle_code(Bits);
    if (w.zeros) zero[r] = lds<uint8_t>(at + 64 + ((rows.zero_low[r] + uint32_t(group)) & 3));
  }
}

}  // namespace cuda
}  // namespace lowbit
#endif
