// Codes into lines and back, and the check of a matrix's values.
//   pack_codes    codes [rows][cols], one a byte, to lines [rows][row_lines][64] (formats.h): the bytes that
//                 lowbit_pack_codes writes; what lies beyond cols becomes the zero point of the row's last group
//   unpack_codes  the inverse, rows [row_begin, row_end), in packed column order
//   check         the smallest place of a bad scale, zero, perm entry and ternary byte
//
// A lane holds 16 byte columns of a unit, so 16 consecutive codes of every plane: loads and stores of 16 bytes, 64
// codes next to each other. Bound by HBM: int4 moves 1.5 bytes a code. Where rows do not start at a multiple of 16
// (cols % 16) the codes go byte by byte.
#include "cuda/line_codes.cuh"
#include "cuda/status.cuh"
#include "cuda/verbs.cuh"

namespace lowbit {
namespace cuda {
namespace {

constexpr int kQuads = 4, kColumns = 4 * kQuads;

__device__ __forceinline__ void report(int64_t* first_bad, int64_t place) {
  if (first_bad) atomic_min(reinterpret_cast<unsigned long long*>(first_bad), static_cast<unsigned long long>(place));
}

// Bits set in the bytes of `codes` that no code of the format is.
template <int Bits>
__device__ __forceinline__ uint32_t bad_bytes(uint32_t codes) {
  if (Bits == kTrit) return (codes & 0xfcfcfcfc) | (codes & codes >> 1 & 0x01010101);
  return codes & ~(uint32_t((1 << Bits) - 1) * 0x01010101);
}

// Four codes from place `at` on, all of the format: a bad one becomes its low bits (trit: 2), and is reported.
template <int Bits>
__device__ __forceinline__ uint32_t good_codes(uint32_t codes, int64_t at, int64_t* first_bad) {
  if (bad_bytes<Bits>(codes) == 0) return codes;
  for (int i = 3; i >= 0; i--)  // the smallest place is reported last
    if (const uint32_t byte = codes >> 8 * i & 255; bad_bytes<Bits>(byte)) {
      report(first_bad, at + i);
      const uint32_t good = Bits == kTrit ? 2 : byte & uint32_t((1 << Bits) - 1);
      codes ^= (byte ^ good) << 8 * i;
    }
  return codes;
}

// Four codes of a row from column k on; `zero` stands where the row has ended.
__device__ __forceinline__ uint32_t codes_and_padding(const uint8_t* row, uint32_t k, uint32_t cols, uint32_t zero) {
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) codes |= (k + i < cols ? uint32_t(ldg(row + k + i)) : zero) << 8 * i;
  return codes;
}

LOWBIT_HD constexpr uint32_t four_trit_bytes(uint32_t numbers) {
  return uint32_t(trit_byte(int(numbers & 255))) | uint32_t(trit_byte(int(numbers >> 8 & 255))) << 8 |
         uint32_t(trit_byte(int(numbers >> 16 & 255))) << 16 | uint32_t(trit_byte(int(numbers >> 24))) << 24;
}

template <int Bits>
__global__ void __launch_bounds__(32 * kRowWarps, 2)
    pack_rows(lowbit_matrix w, RowShape<Bits> shape, RowMap map, const uint8_t* codes, uint8_t* lines,
              int64_t* first_bad, bool wide) {
  using Part = Segment<kQuads, 1>;
  map.each([&](int64_t row, int64_t segment) {
    const uint32_t unit = Part::unit(segment, 0);
    const int byte = Part::byte();
    if (unit >= shape.units) return;
    const int64_t grid = (w.scale_rows == 1 ? 0 : row) * w.scale_cols + w.scale_cols - 1;  // the last group's
    const uint32_t zero =
        (w.zeros ? ldg(w.zeros + grid) : uint32_t(middle_code(Bits))) & ((1u << (Bits == kTrit ? 2 : Bits)) - 1);
    const bool short_unit = Bits == 3 && unit + 1 == shape.units && shape.last_low_lines == 1;
    const uint8_t* from = codes + row * shape.cols;
    Piece<Bits, kQuads> piece = {};
#pragma unroll
    for (int plane = 0; plane < RowShape<Bits>::kPlanes; plane++) {
      if (short_unit && plane >= 4) continue;  // a line that is not there has no high bits either
      const uint32_t k = shape.column(unit, plane, byte);
      uint32_t four[kQuads];
      if (wide && k + kColumns <= shape.cols) {
        spread(ldg(reinterpret_cast<const uint4*>(from + k)), four);
      } else {
#pragma unroll
        for (int quad = 0; quad < kQuads; quad++) four[quad] = codes_and_padding(from, k + 4 * quad, shape.cols, zero);
      }
#pragma unroll
      for (int quad = 0; quad < kQuads; quad++) {
        const uint32_t good = good_codes<Bits>(four[quad], row * shape.cols + k + 4 * quad, first_bad);
        if (Bits == kTrit) {
          piece.word[0][quad] = 3 * piece.word[0][quad] + good;  // each byte at most 3 * 80 + 2
        } else {
          piece.word[Bits == 3 ? plane / 4 : 0][quad] |= low_word<Bits>(good, plane);
          if (Bits == 3) piece.word[RowShape<Bits>::kLines - 1][quad] |= high_word(good, plane);
        }
      }
    }
    if (Bits == kTrit)
#pragma unroll
      for (int quad = 0; quad < kQuads; quad++) piece.word[0][quad] = four_trit_bytes(piece.word[0][quad]);
#pragma unroll
    for (int line = 0; line < RowShape<Bits>::kLines; line++)
      if (!(short_unit && line == 1))
        *reinterpret_cast<uint4*>(lines + row * shape.row_bytes + shape.line_offset(unit, line) + byte) =
            joined(piece.word[line]);
  });
}

template <int Bits>
__global__ void __launch_bounds__(32 * kRowWarps, 2)
    unpack_rows(const uint8_t* lines, RowShape<Bits> shape, RowMap map, int64_t row_begin, uint8_t* codes, bool wide) {
  using Part = Segment<kQuads, 1>;
  map.each([&](int64_t i, int64_t segment) {
    const uint32_t unit = Part::unit(segment, 0);
    const int byte = Part::byte();
    if (unit >= shape.units) return;
    Piece<Bits, kQuads> piece;
    piece.load(shape, lines + (row_begin + i) * shape.row_bytes, unit, byte);
    uint8_t* to = codes + i * shape.cols;
#pragma unroll
    for (int plane = 0; plane < RowShape<Bits>::kPlanes; plane++) {
      const uint32_t k = shape.column(unit, plane, byte);
      uint32_t four[kQuads];
#pragma unroll
      for (int quad = 0; quad < kQuads; quad++) four[quad] = piece.codes(plane, quad);
      if (wide && k + kColumns <= shape.cols) {
        *reinterpret_cast<uint4*>(to + k) = joined(four);
      } else {
#pragma unroll
        for (int quad = 0; quad < kQuads; quad++)
#pragma unroll 1  // unrolled, the addresses of all planes' bytes fill the registers
          for (uint32_t j = k + 4 * quad; j < min(k + 4 * quad + 4, shape.cols); j++, four[quad] >>= 8)
            to[j] = uint8_t(four[quad]);
      }
    }
  });
}

template <int Bits>
cudaError_t start_pack(const lowbit_matrix& w, const uint8_t* codes, uint8_t* lines, int64_t* first_bad,
                       cudaStream_t stream) {
  const RowShape<Bits> shape(w.cols);
  const RowMap map(w.rows, Segment<kQuads, 1>::count(shape.units));
  const bool wide = reinterpret_cast<uintptr_t>(codes) % 16 == 0 && w.cols % 16 == 0;
  return launch(pack_rows<Bits>, map.grid(), 32 * kRowWarps, 0, stream, w, shape, map, codes, lines, first_bad, wide);
}

template <int Bits>
cudaError_t start_unpack(const lowbit_matrix& w, int64_t row_begin, int64_t rows, uint8_t* codes, cudaStream_t stream) {
  const RowShape<Bits> shape(w.cols);
  const RowMap map(rows, Segment<kQuads, 1>::count(shape.units));
  const bool wide = reinterpret_cast<uintptr_t>(codes) % 16 == 0 && w.cols % 16 == 0;
  return launch(unpack_rows<Bits>, map.grid(), 32 * kRowWarps, 0, stream, w.codes, shape, map, row_begin, codes, wide);
}

// ---- the check: each thread walks an array in steps of the grid and reports the first bad place that it meets ----

constexpr int kThreads = 256;

dim3 grid_over(int64_t count) {
  const int64_t blocks = ceil_div(count, kThreads);
  return dim3(unsigned(blocks < 8192 ? blocks : 8192), 1, 1);
}

template <class IsBad>
__device__ __forceinline__ void find_first(int64_t count, int64_t* bad, IsBad is_bad) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads)
    if (is_bad(i)) return report(bad, i);
}

__global__ void check_scales(lowbit_matrix w, int64_t* bad) {
  find_first(w.scale_rows * w.scale_cols, bad, [&](int64_t i) {
    const bool single = w.scale_dtype == LOWBIT_F32;
    const uint32_t bits =
        single ? ldg(static_cast<const uint32_t*>(w.scales) + i) : ldg(static_cast<const uint16_t*>(w.scales) + i);
    const uint32_t exponent = single ? 0x7f800000 : w.scale_dtype == LOWBIT_F16 ? 0x7c00 : 0x7f80;
    const bool is_zero = (bits & (single ? 0x7fffffff : 0x7fff)) == 0;
    return (bits & exponent) == exponent || (w.format == kTrit && is_zero);
  });
}

__global__ void check_zeros(lowbit_matrix w, int64_t* bad) {
  find_first(w.scale_rows * w.scale_cols, bad,
             [&](int64_t i) { return int(ldg(w.zeros + i)) >= code_count(w.format); });
}

__global__ void check_trits(lowbit_matrix w, int64_t bytes, int64_t* bad) {
  find_first(bytes, bad, [&](int64_t i) { return !is_trit_byte(ldg(w.codes + i)); });
}

// first[column] = the smallest j with perm[j] == column; it held 2^32 - 1.
__global__ void mark_columns(lowbit_matrix w, uint32_t* first) {
  for (int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x; j < w.cols; j += int64_t(gridDim.x) * kThreads)
    if (const uint32_t column = uint32_t(ldg(w.perm + j)); column < w.cols) atomic_min(first + column, uint32_t(j));
}

__global__ void check_perm(lowbit_matrix w, const uint32_t* first, int64_t* bad) {
  find_first(w.cols, bad, [&](int64_t j) {
    const uint32_t column = uint32_t(ldg(w.perm + j));
    return column >= w.cols || ldg(first + column) < j;
  });
}

cudaError_t start_check(const lowbit_matrix& w, int64_t* bad, uint32_t* first, cudaStream_t stream) {
  const int64_t scales = w.scale_rows * w.scale_cols;
  cudaError_t error = launch(check_scales, grid_over(scales), kThreads, 0, stream, w, bad);
  if (error == cudaSuccess && w.zeros) error = launch(check_zeros, grid_over(scales), kThreads, 0, stream, w, bad + 1);
  if (error == cudaSuccess && w.perm) {
    error = cudaMemsetAsync(first, 0xff, size_t(w.cols) * sizeof *first, stream);
    if (error == cudaSuccess) error = launch(mark_columns, grid_over(w.cols), kThreads, 0, stream, w, first);
    if (error == cudaSuccess) error = launch(check_perm, grid_over(w.cols), kThreads, 0, stream, w, first, bad + 2);
  }
  if (error == cudaSuccess && w.format == kTrit) {
    const int64_t bytes = w.rows * row_lines(kTrit, w.cols) * kLineBytes;
    error = launch(check_trits, grid_over(bytes), kThreads, 0, stream, w, bytes, bad + 3);
  }
  return error;
}

}  // namespace

lowbit_status pack_codes(const lowbit_cuda_queue* queue, const lowbit_matrix* w, const uint8_t* codes, uint8_t* lines,
                         int64_t* first_bad, CudaMessage* message) {
  const CurrentDevice current(queue->device);
  if (current.error() != cudaSuccess) return succeed_or(current.error(), "pack_codes", message);
  const cudaStream_t stream = static_cast<cudaStream_t>(queue->stream);
  const int format = w->format;
  const cudaError_t error = format == 2   ? start_pack<2>(*w, codes, lines, first_bad, stream)
                            : format == 3 ? start_pack<3>(*w, codes, lines, first_bad, stream)
                            : format == 4 ? start_pack<4>(*w, codes, lines, first_bad, stream)
                            : format == 8 ? start_pack<8>(*w, codes, lines, first_bad, stream)
                                          : start_pack<kTrit>(*w, codes, lines, first_bad, stream);
  return succeed_or(error, "pack_codes", message);
}

lowbit_status unpack_codes(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t row_begin, int64_t row_end,
                           uint8_t* codes, CudaMessage* message) {
  const int64_t rows = row_end - row_begin;
  if (rows == 0) return LOWBIT_OK;
  const CurrentDevice current(queue->device);
  if (current.error() != cudaSuccess) return succeed_or(current.error(), "unpack_codes", message);
  const cudaStream_t stream = static_cast<cudaStream_t>(queue->stream);
  const int format = w->format;
  const cudaError_t error = format == 2   ? start_unpack<2>(*w, row_begin, rows, codes, stream)
                            : format == 3 ? start_unpack<3>(*w, row_begin, rows, codes, stream)
                            : format == 4 ? start_unpack<4>(*w, row_begin, rows, codes, stream)
                            : format == 8 ? start_unpack<8>(*w, row_begin, rows, codes, stream)
                                          : start_unpack<kTrit>(*w, row_begin, rows, codes, stream);
  return succeed_or(error, "unpack_codes", message);
}

lowbit_status check(const lowbit_cuda_queue* queue, const lowbit_matrix* w, int64_t* bad, uint32_t* first,
                    CudaMessage* message) {
  const CurrentDevice current(queue->device);
  if (current.error() != cudaSuccess) return succeed_or(current.error(), "check", message);
  return succeed_or(start_check(*w, bad, first, static_cast<cudaStream_t>(queue->stream)), "check", message);
}

}  // namespace cuda
}  // namespace lowbit
