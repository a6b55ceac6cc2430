// The schedules of GPU products, on the host: every unit of every row is summed once and by one warp, everything fits
// where it is said to lie, nothing about a sum depends on the batch or the device, and the choice of kernel is the one
// that the documentation states.
#include <cstring>
#include <initializer_list>
#include <set>

#include "check.h"
#include "cuda/matmul_plan.h"

using namespace lowbit;
using namespace lowbit::cuda;

namespace {

struct Gpu {
  int arch, multiprocessors, per_block, per_sm;
};
const Gpu kGpus[] = {{70, 80, 96, 96},     {75, 40, 64, 64},    {80, 108, 163, 164},
                     {86, 84, 99, 100},    {89, 128, 99, 100},  {90, 132, 227, 228},
                     {100, 148, 227, 228}, {120, 170, 99, 100}, {90, 1, 227, 228}};

lowbit_cuda_device device_of(const Gpu& g) {
  lowbit_cuda_device d{};
  d.arch = g.arch;
  d.multiprocessors = g.multiprocessors;
  d.shared_per_block = g.per_block * 1024;
  d.shared_per_sm = g.per_sm * 1024;
  return d;
}

lowbit_matrix matrix(int bits, int64_t rows, int64_t cols, int64_t group) {
  lowbit_matrix w{};
  w.format = lowbit_format(bits);
  w.rows = rows;
  w.cols = cols;
  w.group_size = group;
  w.scale_rows = rows;
  w.scale_cols = ceil_div(cols, group);
  return w;
}

// The units of a row, as the warps of the blocks of one tile walk them: chunks of 8 slices.
void test_slices(int bits, int64_t cols) {
  const Slices s(bits, cols);
  CHECK(int64_t(s.units) * unit_cols(bits) >= cols && int64_t(s.units - 1) * unit_cols(bits) < cols, "units");
  CHECK(s.slice_units >= 1 && s.chunks >= 1 && int64_t(s.chunks) * s.chunk_units() >= s.units, "%d: %ld", bits,
        long(cols));
  CHECK(int64_t(s.chunks - 1) * s.chunk_units() < s.units, "an empty chunk: %d, %ld columns", bits, long(cols));
  std::set<int64_t> seen;
  for (int32_t chunk = 0; chunk < s.chunks; chunk++)
    for (int warp = 0; warp < kWarps; warp++)
      for (int32_t i = 0; i < s.slice_units; i++) {
        const int64_t unit = (int64_t(chunk) * kWarps + warp) * s.slice_units + i;
        if (unit < s.units) seen.insert(unit);
      }
  CHECK(int64_t(seen.size()) == s.units, "%d: %ld columns, %zu of %d units", bits, long(cols), seen.size(), s.units);
}

void test_plan(int bits, int64_t rows, int64_t cols, int64_t group, int64_t tokens, lowbit_dtype dtype,
               lowbit_activations mode, const Gpu& gpu) {
  const lowbit_cuda_device d = device_of(gpu);
  const lowbit_matrix w = matrix(bits, rows, cols, group);
  const MatmulPlan p = plan_matmul(w, tokens, dtype, mode, d);
  const Slices s(bits, cols);
  char what[160];
  snprintf(what, sizeof what, "format %d %ldx%ld g%ld tokens %ld dtype %d mode %d sm_%d %s", bits, long(rows),
           long(cols), long(group), long(tokens), int(dtype), int(mode), gpu.arch, kernel_name(p.kernel));

  const bool trit = bits == kTrit, int8 = mode == LOWBIT_ACT_INT8, integers = trit || int8;
  const bool tensor_cores = gpu.arch >= 80 || (gpu.arch == 75 && (integers || dtype == LOWBIT_F16));
  if (!tensor_cores || (!integers && dtype == LOWBIT_F32))
    CHECK(p.kernel == Kernel::plain, "%s", what);
  else if (integers)
    CHECK(p.kernel == Kernel::integer || (bits == 3 && gpu.arch == 75), "%s", what);
  else if (tokens <= 16 || p.scales == Scales::fine)
    CHECK(p.kernel == Kernel::decode || (bits == 3 && gpu.arch == 75), "%s", what);
  else
    CHECK(p.kernel == Kernel::tile || (bits == 3 && gpu.per_block < 128), "%s", what);
  if (tokens <= 16 || int8) CHECK(!p.prefers_unpack, "%s", what);
  if (tokens >= 4096 && !int8) CHECK(p.prefers_unpack, "%s", what);

  // The workspace: tickets, parts, activations, each behind the other, and the tickets whole.
  CHECK(p.workspace_bytes % 256 == 0 && p.zeroed_bytes <= p.workspace_bytes, "%s", what);
  if (p.digits)
    CHECK(p.x_at >= p.zeroed_bytes && p.steps_at >= p.x_at + p.digits * tokens * p.x_cols && p.sums_at > p.steps_at,
          "%s", what);

  if (p.kernel == Kernel::decode || p.kernel == Kernel::integer) {
    const DecodePlan& q = p.decode;
    CHECK(q.pass_tokens >= 1 && q.pass_tokens <= 16 && q.shared_bytes <= uint32_t(d.shared_per_block), "%s: %u bytes",
          what, q.shared_bytes);
    CHECK(q.depth >= 2 && q.slot_bytes % 16 == 0 && q.ring_at % 16 == 0 && q.rounds_at % 16 == 0 && q.sums_at % 16 == 0,
          "%s", what);
    CHECK(q.sums_at < q.ring_at + 1 && q.ring_at < q.rounds_at && q.rounds_at < q.ticket_at &&
              q.ticket_at < q.shared_bytes,
          "%s", what);
    CHECK(int64_t(q.blocks_y) * q.block_chunks >= s.chunks && int64_t(q.blocks_y - 1) * q.block_chunks < s.chunks, "%s",
          what);
    CHECK(q.blocks_x >= 1 && q.blocks_x <= ceil_div(rows, kTileRows), "%s", what);
    CHECK(q.round_chunks >= 1 && q.round_chunks <= q.block_chunks, "%s", what);
    // Eight tokens' 16-byte pieces at one column lie in different banks.
    if (!p.digits) CHECK(q.x_stride % 32 == 16, "%s: stride %d", what, q.x_stride);
    if (p.digits) CHECK(q.x_stride % 128 == 64, "%s: stride %d", what, q.x_stride);
    if (q.blocks_y > 1) CHECK(p.zeroed_bytes >= 4 * ceil_div(rows, kTileRows), "%s", what);
  }
  if (p.kernel == Kernel::tile) {
    const TilePlan& q = p.tile;
    CHECK(q.shared_bytes <= uint32_t(d.shared_per_block) && q.stages >= 2 && q.stages <= 4, "%s: %u bytes", what,
          q.shared_bytes);
    CHECK(q.x_stride % 32 == 16 && q.sums_at % 16 == 0 && q.weights_at % 16 == 0 && q.stage_bytes % 16 == 0, "%s",
          what);
    CHECK(int64_t(q.splits) * q.split_units >= s.units && int64_t(q.splits - 1) * q.split_units < s.units, "%s", what);
    // How K is cut depends on the matrix and the device, not on the tokens.
    const MatmulPlan other = plan_matmul(w, tokens + 5, dtype, mode, d);
    if (other.tile.row_tiles == q.row_tiles) CHECK(other.tile.splits == q.splits, "%s", what);
  }
}

}  // namespace

int main() {
  for (const int bits : {kTrit, 2, 3, 4, 8}) {
    for (int64_t cols = 1; cols < 700; cols++) test_slices(bits, cols);
    for (const int64_t cols :
         {1000, 2047, 2048, 2049, 4096, 5120, 8192, 10944, 11008, 14336, 28672, 40960, 40961, 131072})
      test_slices(bits, cols);
    for (const Gpu& gpu : kGpus)
      for (const int64_t cols : {16, 128, 1000, 2049, 4096, 8192, 11008, 28672})
        for (const int64_t rows : {1, 17, 1024, 4096, 28672, 128256})
          for (const int64_t group : {int64_t(16), int64_t(64), int64_t(128), cols})
            for (const int64_t tokens : {1, 2, 7, 8, 9, 16, 17, 33, 64, 500, 4096})
              for (const int mode : {0, 1})
                if (group <= cols)
                  for (const lowbit_dtype dtype : {LOWBIT_F16, LOWBIT_BF16, LOWBIT_F32})
                    test_plan(bits, rows, cols, group, tokens, dtype, lowbit_activations(mode), gpu);
  }
  return check::finish("GPU plans");
}
