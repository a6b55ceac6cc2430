// The executor: how a verb's work meets threads. Kernels know nothing of it.
// OpenMP by default, linked to the libgomp.so.1 that torch ships too, so that one process has one pool;
// std::thread for sanitizer builds (LOWBIT_EXECUTOR=std), whose tools do not understand OpenMP's barriers.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

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
    std::remove_reference_t<Body>* body;
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

constexpr int kMostShares = 64;  // of a helping loop; with more threads it is a plain parallel_for

// parallel_for for work in memory: body(begin, end) on pieces of `step` (a multiple of `grain`), each thread beginning
// with a contiguous share of its own and, done with that, going on with what is left of the others'. Two cores seldom
// read equally fast: they share them with other programs, or one of them is a smaller core.
template <class Body>
void parallel_for_helping(int64_t n, int64_t grain, int64_t step, bool serial, Body&& body) {
  const int64_t grains = (n + grain - 1) / grain;
  const int64_t threads = serial ? 1 : executor_threads();
  const int parts = int(grains < threads ? grains : threads);
  if (parts <= 1 || parts > kMostShares) return parallel_for(n, grain, serial, body);
  struct Share {
    alignas(64) std::atomic<int64_t> next;
    int64_t end;
  };
  Share shares[kMostShares];
  for (int i = 0; i < parts; i++) {
    const int64_t end = grains * (i + 1) / parts * grain;
    shares[i].next.store(grains * i / parts * grain, std::memory_order_relaxed);
    shares[i].end = end < n ? end : n;
  }
  auto part = [&](int index) {
    for (int i = 0; i < parts; i++) {
      Share& share = shares[(index + i) % parts];
      for (int64_t begin; (begin = share.next.fetch_add(step, std::memory_order_relaxed)) < share.end;)
        body(begin, begin + step < share.end ? begin + step : share.end);
    }
  };
  run_parts(parts, [](void* argument, int index, int) { (*static_cast<decltype(part)*>(argument))(index); }, &part);
}

}  // namespace lowbit
