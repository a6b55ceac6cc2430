// Codes in and out of lines, four byte columns at a time, and how warps are spread over rows: what gather.cu and
// pack.cu share.
//
// A plane is 64 consecutive columns, one in each byte of a line. A lane takes a piece, 4 * Quads neighbouring bytes of
// each line of a unit (formats.h), and so holds 4 * Quads consecutive columns of every plane: with Quads chosen for
// the output's type, each plane leaves in stores of 16 bytes a lane, 64 columns next to each other.
//
//   output     Quads   lanes of a line   units a warp   (T32,V) of one plane
//   1 byte     4       4                 8              lane l, i: unit l / 4,  column 16 (l % 4) + i
//   2 bytes    2       8                 4              lane l, i: unit l / 8,  column  8 (l % 8) + i
//   4 bytes    1       16                2              lane l, i: unit l / 16, column  4 (l % 16) + i
#ifndef LOWBIT_CUDA_LINE_CODES_CUH
#define LOWBIT_CUDA_LINE_CODES_CUH

#include "cuda/ptx.cuh"
#include "lowbit/formats.h"

namespace lowbit {
namespace cuda {

// ---- four bytes of a line ----

// Bit of plane `plane`'s lowest code bit in its byte, and (int3) of its high bit in the high line's.
template <int Bits>
LOWBIT_HD constexpr int code_shift(int plane) {
  return code_place(Bits, Format<Bits>::kPlanes * kPlaneCodes, plane * kPlaneCodes).shift;
}
LOWBIT_HD constexpr int high_shift(int plane) {
  return code_place(3, Format<3>::kPlanes * kPlaneCodes, plane * kPlaneCodes).high_shift;
}

// Digit `plane` of the bytes in 16-bit lanes, in the upper byte of each: 3^plane * byte mod 256 is the fraction that
// holds the remaining digits (formats.h), and fits: 255 * 81 < 2^16.
LOWBIT_HD constexpr uint32_t two_trits(uint32_t bytes, int plane) {
  return 3 * (bytes * uint32_t(81 / trit_power(plane)) & 0x00ff00ff);
}

// The codes of plane `plane` of four byte columns, one a byte. low: the word that holds them (int3: their low two
// bits); high: int3's word of high bits.
template <int Bits>
LOWBIT_HD constexpr uint32_t four_codes(uint32_t low, uint32_t high, int plane) {
  if (Bits == kTrit)
    return (two_trits(low & 0x00ff00ff, plane) >> 8 & 0x00030003) |
           (two_trits(low >> 8 & 0x00ff00ff, plane) & 0x03000300);
  if (Bits == 3) return (low >> code_shift<3>(plane) & 0x03030303) | (high >> high_shift(plane) & 0x01010101) << 2;
  return low >> code_shift<Bits>(plane) & uint32_t((1 << Bits) - 1) * 0x01010101;
}

// The inverse for integer formats: what four codes add to a word that still holds zero there.
template <int Bits>
LOWBIT_HD constexpr uint32_t low_word(uint32_t codes, int plane) {
  return (codes & uint32_t(Bits == 3 ? 3 : (1 << Bits) - 1) * 0x01010101) << code_shift<Bits>(plane);
}
LOWBIT_HD constexpr uint32_t high_word(uint32_t codes, int plane) {
  return (codes >> 2 & 0x01010101) << high_shift(plane);
}

// Every byte value, every plane, against formats.h.
template <int Bits>
constexpr bool four_codes_agree() {
  constexpr int64_t kCols = Format<Bits>::kPlanes * kPlaneCodes;
  for (int value = 0; value < 256; value++) {
    uint8_t line[Format<Bits>::kLines * kLineBytes] = {};
    for (int j = 0; j < Format<Bits>::kLines; j++) line[j * kLineBytes + 2] = uint8_t(value * (1 + 76 * j));
    for (int plane = 0; plane < Format<Bits>::kPlanes; plane++) {
      const uint32_t low = uint32_t(line[(Bits == 3 ? plane / 4 : 0) * kLineBytes + 2]) << 16;
      const uint32_t high = Bits == 3 ? uint32_t(line[2 * kLineBytes + 2]) << 16 : 0;
      const uint32_t code = uint32_t(get_code(Bits, kCols, line, plane * kPlaneCodes + 2));
      if (four_codes<Bits>(low, high, plane) != code << 16) return false;
    }
  }
  return true;
}
static_assert(four_codes_agree<2>() && four_codes_agree<3>() && four_codes_agree<4>() && four_codes_agree<8>() &&
                  four_codes_agree<kTrit>(),
              "the layout has one definition: formats.h");

// ---- a lane's piece of a unit ----

template <int Quads>
struct Words;
template <>
struct Words<1> {
  using Type = uint32_t;
};
template <>
struct Words<2> {
  using Type = uint2;
};
template <>
struct Words<4> {
  using Type = uint4;
};

__device__ __forceinline__ void spread(uint32_t from, uint32_t (&to)[1]) { to[0] = from; }
__device__ __forceinline__ void spread(uint2 from, uint32_t (&to)[2]) { to[0] = from.x, to[1] = from.y; }
__device__ __forceinline__ void spread(uint4 from, uint32_t (&to)[4]) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}
__device__ __forceinline__ uint32_t joined(const uint32_t (&from)[1]) { return from[0]; }
__device__ __forceinline__ uint2 joined(const uint32_t (&from)[2]) {
  uint2 to;
  to.x = from[0], to.y = from[1];
  return to;
}
__device__ __forceinline__ uint4 joined(const uint32_t (&from)[4]) {
  uint4 to;
  to.x = from[0], to.y = from[1], to.z = from[2], to.w = from[3];
  return to;
}

// What a row is made of. Columns fit 32 bits (cols < 2^31, and its padding is short), addresses do not.
template <int Bits>
struct RowShape {
  static constexpr int kPlanes = Format<Bits>::kPlanes, kLines = Format<Bits>::kLines;
  int64_t row_bytes;
  uint32_t cols, units;
  uint32_t last_low_lines;  // int3: low lines of a row's last unit, 1 or 2

  explicit RowShape(int64_t columns)
      : row_bytes(row_lines(Bits, columns) * kLineBytes),
        cols(uint32_t(columns)),
        units(uint32_t(ceil_div(row_planes(columns), kPlanes))),
        last_low_lines(uint32_t(row_lines(Bits, columns) - int64_t(units - 1) * kLines - 1)) {}

  // Byte offset in a row of line `line` of a unit (int3: 0 and 1 are the low lines, 2 the high line). Where a row has
  // no second low line, the first stands in for it: what is read there lies beyond cols.
  __device__ __forceinline__ int64_t line_offset(uint32_t unit, int line) const {
    const bool short_unit = Bits == 3 && last_low_lines == 1 && unit + 1 == units;
    return (int64_t(unit) * kLines + (short_unit ? line / 2 : line)) * kLineBytes;
  }
  __device__ __forceinline__ uint32_t column(uint32_t unit, int plane, int byte) const {
    return (unit * kPlanes + uint32_t(plane)) * uint32_t(kPlaneCodes) + uint32_t(byte);
  }
};

// The bytes that a lane takes of a unit.
template <int Bits, int Quads>
struct Piece {
  uint32_t word[Format<Bits>::kLines][Quads];

  // `row` lies at a multiple of 16, as every line does.
  __device__ __forceinline__ void load(const RowShape<Bits>& shape, const uint8_t* row, uint32_t unit, int byte) {
    using Type = typename Words<Quads>::Type;
#pragma unroll
    for (int line = 0; line < Format<Bits>::kLines; line++)
      spread(ldg(reinterpret_cast<const Type*>(row + shape.line_offset(unit, line) + byte)), word[line]);
  }
  __device__ __forceinline__ uint32_t codes(int plane, int quad) const {
    if (Bits == 3) return four_codes<Bits>(word[plane / 4][quad], word[Format<Bits>::kLines - 1][quad], plane);
    return four_codes<Bits>(word[0][quad], 0, plane);
  }
};

// ---- warps over rows ----

constexpr int kRowWarps = 8;  // warps of a block

// A row is cut into segments, one a warp, so that one row is as fast as its longest segment. A block is `wide`
// segments of kRowWarps / wide rows; grid x runs along the rows, y along the segments.
struct RowMap {
  int64_t rows, segments;
  int log2_wide;

  RowMap(int64_t row_count, int64_t segment_count) : rows(row_count), segments(segment_count), log2_wide(0) {
    while ((1 << log2_wide) < kRowWarps && (1 << log2_wide) < segments) log2_wide++;
  }
  dim3 grid() const {
    const int64_t x = ceil_div(rows, kRowWarps >> log2_wide), y = ceil_div(segments, int64_t(1) << log2_wide);
    return dim3(unsigned(x < INT32_MAX ? x : INT32_MAX), unsigned(y < 65535 ? y : 65535), 1);
  }
  // act(row, segment) for everything that falls to this warp.
  template <class Act>
  __device__ __forceinline__ void each(Act act) const {
    const int warp = int(threadIdx.x) / 32, high = kRowWarps >> log2_wide, wide = 1 << log2_wide;
    for (int64_t row = int64_t(blockIdx.x) * high + (warp >> log2_wide); row < rows; row += int64_t(gridDim.x) * high)
      for (int64_t segment = int64_t(blockIdx.y) * wide + (warp & (wide - 1)); segment < segments;
           segment += int64_t(gridDim.y) * wide)
        act(row, segment);
  }
};

// The pieces of a segment: Steps of them a lane.
template <int Quads, int Steps>
struct Segment {
  static constexpr int kLanesOfLine = 64 / (4 * Quads), kUnits = 32 / kLanesOfLine;  // units of a step
  static int64_t count(int64_t units) { return ceil_div(units, kUnits * Steps); }
  static __device__ __forceinline__ uint32_t unit(int64_t segment, int step) {
    return uint32_t(segment * Steps + step) * kUnits + (threadIdx.x % 32) / kLanesOfLine;
  }
  static __device__ __forceinline__ int byte() { return int(threadIdx.x % kLanesOfLine) * 4 * Quads; }
};

}  // namespace cuda
}  // namespace lowbit
#endif
