// Rows of a packed matrix as floats, for every format:
//   gather  out[i][perm[k]] = scale[n][g] * (code[n][k] - zero[n][g]),  n = ids[i], g = k / group_size
//   bags    out[b][perm[k]] = sum over i of bag b of that, times weights[i] if there are any, in fp32, in the order of
//           ids; mean: over the rows counted
// One product in fp32, rounded once to the output's dtype: the bits of the CPU's gather. A row is added by a fused
// multiply-add, with a weight of 1 where there are none: that is the plain addition.
//
// ids [count] int32 or int64 (none: consecutive rows, which is unpack); out [count or bags][out_stride].
// gather_rows: a warp takes a segment of a row (line_codes.cuh), about 1024 columns, 2 KB of 16-bit output, 16 bytes a
// lane and store. gather_permuted: a block takes a row and puts it in order in shared memory, so that the row still
// leaves in one piece; stored from where they are decoded, 16-bit columns would take a 32-byte sector each.
// Bound by HBM: int4 to 16 bits moves 2.5 bytes a column, so at 4.3 TB/s an SM has to make 7.6 values a cycle, which
// leaves 16 instructions a value; int4 takes about 12 (counted in its SASS, not timed). Enough warps are resident to
// cover id -> codes -> store.
#include "cuda/exact.cuh"
#include "cuda/line_codes.cuh"
#include "cuda/status.cuh"
#include "cuda/verbs.cuh"

namespace lowbit {
namespace cuda {
namespace {

template <lowbit_dtype Dtype>
constexpr int kBytes = Dtype == LOWBIT_F32 ? 4 : 2;

// Steps that give a lane about four planes, so that its loads are under way together.
template <int Bits>
constexpr int kSteps = Format<Bits>::kPlanes == 1   ? 4
                       : Format<Bits>::kPlanes == 2 ? 2
                                                    : 1;

// Bits of a value, rounded once.
template <lowbit_dtype Dtype>
__device__ __forceinline__ uint32_t rounded(float value) {
  if (Dtype == LOWBIT_F32) return as_bits(value);
  return Dtype == LOWBIT_F16 ? to_f16(value) : to_bf16(value);
}

template <lowbit_dtype Dtype>
__device__ __forceinline__ void store_value(void* out, int64_t at, float value) {
  if (Dtype == LOWBIT_F32)
    static_cast<float*>(out)[at] = value;
  else
    static_cast<uint16_t*>(out)[at] = uint16_t(rounded<Dtype>(value));
}

// 4 * Quads columns of output row `row` from column k on. wide: rows start where a store of them all may.
template <lowbit_dtype Dtype, int Quads>
__device__ __forceinline__ void store_columns(const CudaGather& call, bool wide, int64_t row, uint32_t k,
                                              const float (&value)[4 * Quads]) {
  constexpr int kCount = 4 * Quads, kWords = kCount * kBytes<Dtype> / 4;
  const uint32_t cols = uint32_t(call.w.cols);
  const int64_t start = row * call.out_stride;
  if (wide && k + kCount <= cols) {
    uint32_t word[kWords];
#pragma unroll
    for (int i = 0; i < kWords; i++)
      word[i] = Dtype == LOWBIT_F32
                    ? rounded<Dtype>(value[i])
                    : rounded<Dtype>(value[2 * i % kCount]) | rounded<Dtype>(value[(2 * i + 1) % kCount]) << 16;
    uint8_t* to = static_cast<uint8_t*>(call.out) + (start + k) * kBytes<Dtype>;
    *reinterpret_cast<typename Words<kWords>::Type*>(to) = joined(word);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i++)
    if (k + i < cols) store_value<Dtype>(call.out, start + k + i, value[i]);
}

// The original column of column k; an entry of perm that is no column comes back as one beyond cols.
__device__ __forceinline__ uint32_t original(const CudaGather& call, uint32_t k) {
  return k < uint32_t(call.w.cols) ? uint32_t(ldg(call.w.perm + k)) : UINT32_MAX;
}

// The row that place i asks for: `skip` when it is padding, `none` when it is a row of zeros. `reports`: this thread
// says so when the id is bad.
constexpr int64_t kNone = -1, kSkip = -2;

__device__ __forceinline__ int64_t row_of(const CudaGather& call, int64_t i, bool reports) {
  if (!call.ids) return call.row_begin + i;
  const int64_t id = call.id_dtype == LOWBIT_I64 ? ldg(static_cast<const int64_t*>(call.ids) + i)
                                                 : int64_t(ldg(static_cast<const int32_t*>(call.ids) + i));
  if (call.padding_id >= 0 && id == call.padding_id) return kSkip;
  if (id >= 0 && id < call.w.rows) return id;
  if (call.policy == LOWBIT_IDS_CLAMP) return id < 0 ? 0 : call.w.rows - 1;
  if (call.policy == LOWBIT_IDS_ERROR && reports && call.first_bad)
    atomic_min(reinterpret_cast<unsigned long long*>(call.first_bad), static_cast<unsigned long long>(i));
  return kNone;
}

struct Grid {
  float scale, bias;  // bias: 2^23 + zero
};

// A grid as it lies in memory. Kept apart from what it means, so that no load waits for the one before it.
struct StoredGrid {
  uint32_t scale, zero;

  __device__ __forceinline__ Grid read(lowbit_dtype dtype) const {
    const float value = dtype == LOWBIT_F32   ? as_float(scale)
                        : dtype == LOWBIT_F16 ? from_f16(uint16_t(scale))
                                              : from_bf16(uint16_t(scale));
    return {value, 8388608.0f + float(zero)};
  }
};

// Columns that start at a multiple of 4 * Quads have one grid: groups are multiples of 16.
template <int Bits>
__device__ __forceinline__ StoredGrid grid_of(const lowbit_matrix& w, int64_t row, uint32_t k) {
  const int64_t group = w.scale_cols == 1 ? 0 : k / uint32_t(w.group_size);
  const int64_t at = (w.scale_rows == 1 ? 0 : row) * w.scale_cols + group;
  StoredGrid grid;
  grid.scale = w.scale_dtype == LOWBIT_F32 ? ldg(static_cast<const uint32_t*>(w.scales) + at)
                                           : uint32_t(ldg(static_cast<const uint16_t*>(w.scales) + at));
  grid.zero = w.zeros ? uint32_t(ldg(w.zeros + at)) : uint32_t(middle_code(Bits));
  return grid;
}

// A lane's piece of a unit with the grid of each plane. All of its loads go out together and none is behind a branch:
// what lies beyond the row reads something of the row, and is never stored.
template <int Bits, int Quads>
struct GridPiece {
  Piece<Bits, Quads> piece;
  StoredGrid grid[RowShape<Bits>::kPlanes];

  __device__ __forceinline__ void load(const CudaGather& call, const RowShape<Bits>& shape, int64_t row, uint32_t unit,
                                       int byte) {
    piece.load(shape, call.w.codes + row * shape.row_bytes, min(unit, shape.units - 1), byte);
#pragma unroll
    for (int plane = 0; plane < RowShape<Bits>::kPlanes; plane++)
      grid[plane] = grid_of<Bits>(call.w, row, min(shape.column(unit, plane, byte), shape.cols - 1));
  }
  // Every value 0 * (0 - 0).
  __device__ __forceinline__ void clear() {
    piece = {};
#pragma unroll
    for (int plane = 0; plane < RowShape<Bits>::kPlanes; plane++) grid[plane] = {0, 0};
  }
  // The columns of a plane. A byte below the exponent of 2^23 (0x4b000000) is 2^23 + byte; the difference to 2^23 +
  // zero is exact.
  __device__ __forceinline__ void values(int plane, lowbit_dtype scale_dtype, float (&value)[4 * Quads]) const {
    const Grid g = grid[plane].read(scale_dtype);
#pragma unroll
    for (int j = 0; j < 4 * Quads; j++) {
      const uint32_t number = byte_perm(piece.codes(plane, j / 4), 0x4b000000, 0x7440 | uint32_t(j % 4));
      value[j] = exact_mul(g.scale, as_float(number) - g.bias);
    }
  }
};

template <int Bits, lowbit_dtype Dtype>
__global__ void __launch_bounds__(32 * kRowWarps, Bits == 3 ? 3 : 4)  // int3: eight planes a lane
    gather_rows(CudaGather call, RowShape<Bits> shape, RowMap map, bool wide) {
  constexpr int kQuads = 4 / kBytes<Dtype>, kCount = kSteps<Bits>;
  using Part = Segment<kQuads, kCount>;
  map.each([&](int64_t i, int64_t segment) {
    const int64_t row = row_of(call, i, segment == 0 && threadIdx.x % 32 == 0);
    const int byte = Part::byte();
    GridPiece<Bits, kQuads> part[kCount];
#pragma unroll
    for (int step = 0; step < kCount; step++)
      if (row >= 0)
        part[step].load(call, shape, row, Part::unit(segment, step), byte);
      else
        part[step].clear();
#pragma unroll
    for (int step = 0; step < kCount; step++)
#pragma unroll
      for (int plane = 0; plane < RowShape<Bits>::kPlanes; plane++) {
        float value[4 * kQuads];
        part[step].values(plane, call.w.scale_dtype, value);
        store_columns<Dtype, kQuads>(call, wide, i, shape.column(Part::unit(segment, step), plane, byte), value);
      }
  });
}

// A row in windows of 48 KB of output: each column of the window goes to its place in shared memory, then the window to
// the output. Wider rows are decoded once a window. A column that perm leaves out (a bad one can) is zero.
constexpr uint32_t kWindowBytes = 48 * 1024;

template <int Bits, lowbit_dtype Dtype>
__global__ void __launch_bounds__(32 * kRowWarps, 4)
    gather_permuted(CudaGather call, RowShape<Bits> shape, uint32_t segments, bool wide) {
  using Part = Segment<1, 1>;
  constexpr uint32_t kSize = kBytes<Dtype>, kWindow = kWindowBytes / kSize;
  const uint32_t thread = threadIdx.x, threads = 32 * kRowWarps;
  for (int64_t i = blockIdx.x; i < call.count; i += gridDim.x) {
    const int64_t row = row_of(call, i, thread == 0);
    for (uint32_t first = 0; first < shape.cols; first += kWindow) {
      const uint32_t bytes = min(kWindow, shape.cols - first) * kSize;
      for (uint32_t at = 16 * thread; at < bytes; at += 16 * threads) sts(at, make_uint4(0, 0, 0, 0));
      sync_block();
      for (uint32_t segment = thread / 32; segment < segments && row >= 0; segment += kRowWarps) {
        const uint32_t unit = Part::unit(segment, 0);
        GridPiece<Bits, 1> part;
        part.load(call, shape, row, unit, Part::byte());
#pragma unroll
        for (int plane = 0; plane < RowShape<Bits>::kPlanes; plane++) {
          float value[4];
          part.values(plane, call.w.scale_dtype, value);
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const uint32_t column = original(call, shape.column(unit, plane, Part::byte()) + j);
            const uint32_t at = (column - first) * kSize;
            if (column < first || column >= shape.cols || column - first >= kWindow) continue;
            if (kSize == 4)
              sts(at, value[j]);
            else
              sts(at, uint16_t(rounded<Dtype>(value[j])));
          }
        }
      }
      sync_block();
      uint8_t* to = static_cast<uint8_t*>(call.out) + (i * call.out_stride + first) * kSize;
      const uint32_t whole = wide ? bytes / 16 * 16 : 0;
      for (uint32_t at = 16 * thread; at < whole; at += 16 * threads)
        *reinterpret_cast<uint4*>(to + at) = lds<uint4>(at);
      for (uint32_t at = whole + 2 * thread; at < bytes; at += 2 * threads)
        *reinterpret_cast<uint16_t*>(to + at) = lds<uint16_t>(at);
      sync_block();
    }
  }
}

// A lane keeps the sums of four columns of every plane of its unit, and has the loads of a few rows under way: a bag is
// bound by the latency of its rows, one after another.
template <int Bits, lowbit_dtype Dtype>
__global__ void __launch_bounds__(32 * kRowWarps, 2)
    gather_bags(CudaGather call, RowShape<Bits> shape, RowMap map, bool wide) {
  constexpr int kPlanes = RowShape<Bits>::kPlanes, kAhead = kPlanes > 4 ? 2 : 4;
  using Part = Segment<1, 1>;
  map.each([&](int64_t bag, int64_t segment) {
    const uint32_t unit = Part::unit(segment, 0);
    const int byte = Part::byte();
    const int64_t begin = max(ldg(call.offsets + bag), int64_t(0)), end = min(ldg(call.offsets + bag + 1), call.count);
    float sum[kPlanes][4] = {};
    int64_t counted = 0;
    for (int64_t i = begin; i < end; i += kAhead) {
      int64_t row[kAhead];
      float weight[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ahead++) {
        row[ahead] = i + ahead < end ? row_of(call, i + ahead, segment == 0 && threadIdx.x % 32 == 0) : kSkip;
        counted += row[ahead] != kSkip;
        // What is left out is zeros times -0: -0, the one number that changes no sum, not even -0.
        weight[ahead] = row[ahead] == kSkip ? -0.0f : call.weights ? ldg(call.weights + i + ahead) : 1.0f;
      }
      GridPiece<Bits, 1> part[kAhead];
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ahead++)
        if (row[ahead] >= 0)
          part[ahead].load(call, shape, row[ahead], unit, byte);
        else
          part[ahead].clear();
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ahead++)
#pragma unroll
        for (int plane = 0; plane < kPlanes; plane++) {
          float value[4];
          part[ahead].values(plane, call.w.scale_dtype, value);
#pragma unroll
          for (int j = 0; j < 4; j++) sum[plane][j] = fmaf(weight[ahead], value[j], sum[plane][j]);
        }
    }
#pragma unroll
    for (int plane = 0; plane < kPlanes; plane++) {
      if (call.mean && counted > 0)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[plane][j] = sum[plane][j] / float(counted);
      const uint32_t k = shape.column(unit, plane, byte);
      if (call.w.perm) {
#pragma unroll
        for (int j = 0; j < 4; j++)
          if (const uint32_t column = original(call, k + j); column < shape.cols)
            store_value<Dtype>(call.out, bag * call.out_stride + column, sum[plane][j]);
      } else {
        store_columns<Dtype, 1>(call, wide, bag, k, sum[plane]);
      }
    }
  });
}

template <int Bits, lowbit_dtype Dtype>
cudaError_t start(const CudaGather& call, cudaStream_t stream) {
  const RowShape<Bits> shape(call.w.cols);
  const int bytes = call.offsets ? 4 * kBytes<Dtype> : 16;  // of a store
  const bool wide = reinterpret_cast<uintptr_t>(call.out) % bytes == 0 && call.out_stride * kBytes<Dtype> % bytes == 0;
  if (call.offsets) {
    const RowMap map(call.bags, Segment<1, 1>::count(shape.units));
    return launch(gather_bags<Bits, Dtype>, map.grid(), 32 * kRowWarps, 0, stream, call, shape, map, wide);
  }
  if (call.w.perm) {
    const dim3 grid(unsigned(call.count < INT32_MAX ? call.count : INT32_MAX), 1, 1);
    const int64_t row_bytes = ceil_div(call.w.cols * kBytes<Dtype>, 16) * 16;
    return launch(gather_permuted<Bits, Dtype>, grid, 32 * kRowWarps,
                  size_t(row_bytes < kWindowBytes ? row_bytes : kWindowBytes), stream, call, shape,
                  uint32_t(Segment<1, 1>::count(shape.units)), wide);
  }
  const RowMap map(call.count, Segment<4 / kBytes<Dtype>, kSteps<Bits>>::count(shape.units));
  return launch(gather_rows<Bits, Dtype>, map.grid(), 32 * kRowWarps, 0, stream, call, shape, map, wide);
}

template <int Bits>
cudaError_t start_format(const CudaGather& call, cudaStream_t stream) {
  return call.out_dtype == LOWBIT_F32   ? start<Bits, LOWBIT_F32>(call, stream)
         : call.out_dtype == LOWBIT_F16 ? start<Bits, LOWBIT_F16>(call, stream)
                                        : start<Bits, LOWBIT_BF16>(call, stream);
}

}  // namespace

lowbit_status gather(const lowbit_cuda_queue* queue, const CudaGather* call, CudaMessage* message) {
  if ((call->offsets ? call->bags : call->count) == 0) return LOWBIT_OK;
  const CurrentDevice current(queue->device);
  if (current.error() != cudaSuccess) return succeed_or(current.error(), "gather", message);
  const cudaStream_t stream = static_cast<cudaStream_t>(queue->stream);
  const int format = call->w.format;
  const cudaError_t error = format == 2   ? start_format<2>(*call, stream)
                            : format == 3 ? start_format<3>(*call, stream)
                            : format == 4 ? start_format<4>(*call, stream)
                            : format == 8 ? start_format<8>(*call, stream)
                                          : start_format<kTrit>(*call, stream);
  return succeed_or(error, "gather", message);
}

}  // namespace cuda
}  // namespace lowbit
