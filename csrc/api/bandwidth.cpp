// The probe that benchmark rows are measured against: how fast this machine can read memory at all.
// One load a line with a prefetch into L2 4 KB ahead, and a plain stream of every word; the larger rate counts.
#include <chrono>
#include <mutex>

#include "api/status.h"
#include "dispatch/parallel.h"

namespace lowbit {
namespace {

uint64_t read_prefetched(const char* p, size_t bytes) {
  uint64_t sum[4] = {};
  for (size_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 4; j++) {
      __builtin_prefetch(p + i + size_t(64 * j) + 4096, 0, 2);  // running past the end is harmless
      sum[j] ^= *reinterpret_cast<const uint64_t*>(p + i + 64 * j);
    }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

uint64_t read_plain(const char* p, size_t bytes) {
  const uint64_t* words = reinterpret_cast<const uint64_t*>(p);
  uint64_t sum[4] = {};
  for (size_t i = 0; i + 4 <= bytes / 8; i += 4)
    for (size_t j = 0; j < 4; j++) sum[j] ^= words[i + j];
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
}

// The arena stays between calls: faulting it in anew would take longer than reading it.
struct Arena {
  std::mutex mutex;
  char* memory = nullptr;
  size_t bytes = 0;

  bool resize(size_t wanted) {
    if (wanted == bytes) return true;
    lowbit_free(memory, bytes);
    memory = static_cast<char*>(lowbit_alloc(wanted));
    bytes = memory ? wanted : 0;
    for (size_t i = 0; i < bytes; i += 8)  // written, so that no page is the shared page of zeros
      *reinterpret_cast<uint64_t*>(memory + i) = i * 0x9E3779B97F4A7C15u;
    return memory != nullptr;
  }
};

double pass(const char* memory, size_t bytes, int threads, uint64_t (*read)(const char*, size_t)) {
  struct Work {
    const char* memory;
    size_t part;
    uint64_t (*read)(const char*, size_t);
    volatile uint64_t sink;
  } work{memory, bytes / size_t(threads) / 256 * 256, read, 0};
  auto body = [](void* argument, int index, int) {
    Work& w = *static_cast<Work*>(argument);
    if (w.read(w.memory + w.part * size_t(index), w.part) == 1) w.sink = 1;  // the reads must not be optimised away
  };
  auto idle = [](void*, int, int) {};
  run_parts(threads, idle, nullptr);  // the threads are awake before the clock starts
  const auto start = std::chrono::steady_clock::now();
  run_parts(threads, body, &work);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return double(work.part) * threads / seconds.count() * 1e-9;
}

}  // namespace
}  // namespace lowbit

extern "C" double lowbit_read_bandwidth(size_t bytes, int threads) {
  using namespace lowbit;
  static Arena arena;
  const std::lock_guard<std::mutex> lock(arena.mutex);
  bytes = bytes / 4096 * 4096;
  if (bytes == 0 || threads < 1 || threads > 1024 || !arena.resize(bytes)) return 0;
  const double prefetched = pass(arena.memory, bytes, threads, read_prefetched);
  const double plain = pass(arena.memory, bytes, threads, read_plain);
  return prefetched > plain ? prefetched : plain;
}
