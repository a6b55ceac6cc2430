// What a test asks of the emulated device: which GPU it poses as, in which order things run, what was found.
#ifndef LOWBIT_EMULATION_CONTROL_H
#define LOWBIT_EMULATION_CONTROL_H

#include <stddef.h>
#include <stdint.h>

namespace lowbit {
namespace emulation {

struct Device {
  int architecture;  // 10 * major + minor: 75 has plain copies for cp_async, below 80 there is no bf16 mma
  int multiprocessors;
  size_t shared_per_block, shared_per_multiprocessor;
};

// The GPU of that architecture, by the CUDA programming guide's table of shared memory; 4 multiprocessors.
Device device_of(int architecture);
// At start: device_of(the environment's LOWBIT_EMULATED_ARCH, or 90).
void set_device(const Device& device);
Device device();

// The order of blocks, of warps between barriers and of the lanes of a warp. 0: ascending; any other: drawn from it.
// With one, warps also take turns at warp collectives. At start: the environment's LOWBIT_EMULATED_SEED, or 0.
void set_seed(uint64_t seed);

// What no kernel may do (races, accesses out of bounds, divergence, ...). Nothing aborts: the count grows, the first
// messages are kept. What a program leaves uncleared is printed when it ends.
constexpr int kMessages = 32;
int64_t violations();
const char* message(int index);  // 0 <= index < kMessages; "" where there is none
void clear();                    // violations and counters

struct Counters {
  int64_t launches, blocks, barriers;
  int64_t shared_reads, shared_writes;  // calls of lds and sts
  int64_t mma_f16, mma_bf16, mma_u8s8;  // per warp
  int64_t async_bytes;                  // read from global memory by cp_async
};
Counters counters();

}  // namespace emulation
}  // namespace lowbit
#endif
