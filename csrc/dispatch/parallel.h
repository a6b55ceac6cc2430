// The executor: how a verb's work meets threads. Kernels know nothing of it.
// OpenMP by default, linked to the libgomp.so.1 that torch ships too, so that one process has one pool;
// std::thread for sanitizer builds (LOWBIT_EXECUTOR=std), whose tools do not understand OpenMP's barriers.
#pragma once

#include <cstdint>

namespace lowbit {

int executor_threads();  // threads that a parallel region would get here: 1 inside another region

// Calls part(argument, i, parts) for every i in [0, parts), each on its own thread; parts <= executor_threads().
void run_parts(int parts, void (*part)(void* argument, int index, int parts), void* argument);

// Calls body(begin, end) on pieces of [0, n) whose borders are multiples of `grain`, one contiguous piece a thread.
// `serial` keeps everything on this thread: for work smaller than the price of waking one.
template <class Body>
void parallel_for(int64_t n, int64_t grain, bool serial, Body&& body) {
  if (n <= 0) return;
  const int64_t grains = (n + grain - 1) / grain;
  const int64_t threads = serial ? 1 : executor_threads();
  const int parts = int(grains < threads ? grains : threads);
  if (parts <= 1) return body(int64_t(0), n);
  struct Work {
    Body* body;
    int64_t n, grain, grains;
  } work{&body, n, grain, grains};
  run_parts(
      parts,
      [](void* argument, int index, int parts) {
        const Work& w = *static_cast<Work*>(argument);
        const int64_t begin = w.grains * index / parts * w.grain;
        const int64_t end = w.grains * (index + 1) / parts * w.grain;
        (*w.body)(begin, end < w.n ? end : w.n);
      },
      &work);
}

}  // namespace lowbit
