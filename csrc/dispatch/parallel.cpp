#include "dispatch/parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#include "api/status.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lowbit {
namespace {
std::atomic<int> requested_threads{0};
#if !defined(_OPENMP)
thread_local bool inside = false;
#endif
}  // namespace

int executor_threads() {
  const int requested = requested_threads.load(std::memory_order_relaxed);
#if defined(_OPENMP)
  if (omp_in_parallel()) return 1;
  return requested > 0 ? requested : omp_get_max_threads();
#else
  if (inside) return 1;
  if (requested > 0) return requested;
  const unsigned cpus = std::thread::hardware_concurrency();
  return cpus > 0 ? int(cpus) : 1;
#endif
}

void run_parts(int parts, void (*part)(void*, int, int), void* argument) {
#if defined(_OPENMP)
  // A team may be smaller than asked for (thread limits), so parts are strided over it.
#pragma omp parallel num_threads(parts)
  for (int i = omp_get_thread_num(); i < parts; i += omp_get_num_threads()) part(argument, i, parts);
#else
  std::vector<std::thread> others;
  others.reserve(size_t(parts));
  for (int i = 1; i < parts; i++)
    others.emplace_back([=] {
      inside = true;
      part(argument, i, parts);
    });
  inside = true;
  part(argument, 0, parts);
  inside = false;
  for (auto& other : others) other.join();
#endif
}

}  // namespace lowbit

extern "C" {

lowbit_status lowbit_set_threads(int threads) {
  if (threads < 0 || threads > 4096)
    return lowbit::fail(LOWBIT_INVALID_ARGUMENT, "threads: expected 0 to 4096, got %d", threads);
  lowbit::requested_threads = threads;
  return LOWBIT_OK;
}

int lowbit_threads(void) { return lowbit::executor_threads(); }

const char* lowbit_executor(void) {
#if defined(_OPENMP)
  return "openmp";
#else
  return "std::thread";
#endif
}
}
