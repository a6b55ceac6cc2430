// A block in progress: its threads, its warps, its shared memory. Private to the emulator.
#ifndef LOWBIT_EMULATION_BLOCK_H
#define LOWBIT_EMULATION_BLOCK_H

#include <stdint.h>

#include <memory>
#include <vector>

#include "emulation.h"
#include "fibers.h"

namespace lowbit {
namespace emulation {

enum class Wait : uint8_t { None, Block, Warp, Exchange, MmaF16, MmaBf16, MmaU8s8 };

// A cp_async under way.
struct Copy {
  uint32_t at, size, group;
  uint8_t bytes[16];
};

struct Thread {
  Fiber fiber;
  int index, warp, lane;  // index = threadIdx.x
  int slot;               // its bit in the warp's masks: lanes run in the order of slots, which the seed permutes
  Wait wait;              // what it waits for, and where
  Place place;
  std::vector<Copy> copies;  // in the order of issue, those before `landed` are done
  size_t landed;
  uint32_t groups;  // committed so far
};

struct Warp {
  uint32_t ready, at_collective, at_barrier, exited;  // every slot is in one of these
  bool uniform;                                       // those at a collective are all at the same one: this
  Wait kind;
  int line;
  // Accesses of this warp's lanes since its last collective carry this stamp (shared.cpp).
  uint32_t stamp;
  // Operands and results of a collective, by lane. A lane touches only its own place.
  uint64_t value[32];
  uint8_t source[32];
  alignas(32) uint32_t a[4][32], b[2][32], d[4][32];
};

struct Block {
  int threads, warps;
  uint32_t id;             // over all launches, from 1
  uint32_t barrier_stamp;  // the least stamp of accesses since the last barrier
  uint32_t last_stamp;
  Warp warp[32];
  std::vector<std::unique_ptr<Thread>> thread;  // by 32 * warp + slot; the pool: as many as any launch had
  Thread* running;
};
extern Block block;
extern Counters counts;

__attribute__((format(printf, 2, 3))) void report(const Place& place, const char* format, ...);
bool room_for_message();  // formatting is worth while

void start_shared(size_t bytes);  // of a launch
void clear_shared();              // of a block

// d += a b, a warp's fragments by lane.
void multiply_f16(Warp& warp);
void multiply_bf16(Warp& warp);
void multiply_u8s8(Warp& warp);

}  // namespace emulation
}  // namespace lowbit
#endif
