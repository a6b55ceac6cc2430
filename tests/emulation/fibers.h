// Fibers: call stacks that hand the processor to each other. A switch saves the registers that a call preserves and
// changes the stack: a few nanoseconds, against microseconds for a system call or a thread.
#ifndef LOWBIT_EMULATION_FIBERS_H
#define LOWBIT_EMULATION_FIBERS_H

#include <stddef.h>

#if defined(__SANITIZE_ADDRESS__)
#define LOWBIT_FIBERS_ASAN 1
#else
#define LOWBIT_FIBERS_ASAN 0
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace lowbit {
namespace emulation {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Gives it a stack on which `body(argument)` starts at the first switch; it must never return. `colour` spreads the
  // stacks' hot ends over the cache's sets, which would otherwise all meet in one.
  void prepare(void (*body)(void*), void* argument, unsigned colour);
  // Leaves `from`, which is the running one, for `to`; returns when someone switches to `from` again.
  static void change(Fiber& from, Fiber& to);

 private:
  static void enter(Fiber* self);
  static void start();

  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
#if defined(__x86_64__)
  void* top_ = nullptr;  // where it left its registers
#else
  ucontext_t context_;
#endif
  // What AddressSanitizer must know: a thread's own stack is learned at the first switch away from it.
  const void* stack_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace emulation
}  // namespace lowbit
#endif
