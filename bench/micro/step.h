// Instructions of a call, counted exactly where the CPU's counters are hidden: a child process runs it one by one
// (PTRACE_SINGLESTEP) and the parent counts the stops. Valgrind's tools cannot do it, they know no AVX-512.
//
// What is counted is user mode, as in meter.h, and the same in every run of one build. The child calls once before it
// is counted, so that binding a function on its first use is no part of it. Its stack begins with a page, as operands
// do (operands.h): memcpy takes another way when the low bits of its two addresses are close. A stop takes 20 us in a
// virtual machine, so calls are to be of some 100000 instructions.
#pragma once

#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace micro {

using Call = std::function<void()>;

struct Steps {
  int64_t instructions = 0;
  std::string failure;  // why there is no count; empty if there is one
};

// For who counts: its children take turns with it, and are woken faster where it is.
inline void stay_on_this_cpu() {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  sched_setaffinity(0, sizeof one, &one);
}

// The child. It tells its parent where to begin and to end by stopping itself.
inline int run_traced(void* argument) {
  const Call& call = *static_cast<const Call*>(argument);
  if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(errno);
  call();
  kill(getpid(), SIGSTOP);
  call();
  kill(getpid(), SIGSTOP);
  _exit(0);
}

// The parent: counts what the child does between its two stops, the end of the first kill() and the second included.
inline Steps count_between_stops(pid_t child) {
  Steps steps;
  bool begun = false;
  long last = 0;
  int status = 0;
  while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
    long signal = WSTOPSIG(status);
    if (signal == SIGSTOP) {
      if (begun) return steps;
      begun = true;
      ptrace(PTRACE_SETOPTIONS, child, nullptr, PTRACE_O_EXITKILL);
      signal = 0;
    } else if (begun && signal == SIGTRAP) {
      // A rep instruction (memset's stosb) stops after each of its iterations. It counts once, as the CPU counts it.
      const long at = ptrace(PTRACE_PEEKUSER, child, offsetof(user, regs.rip), nullptr);
      steps.instructions += at != last;
      last = at;
      signal = 0;
    }
    if (ptrace(begun ? PTRACE_SINGLESTEP : PTRACE_CONT, child, nullptr, signal) != 0) {
      steps.failure = std::string("ptrace: ") + strerror(errno);
      return steps;
    }
  }
  if (WIFSIGNALED(status))
    steps.failure = std::string("the traced process ended: ") + strsignal(WTERMSIG(status));
  else
    steps.failure = std::string("ptrace: ") + strerror(WEXITSTATUS(status));
  return steps;
}

inline Steps count_in_child(const Call& call) {
  alignas(4096) static char stack[size_t(8) << 20];
  // fork() with a stack of its own: memory is copied when it is written to.
  const pid_t child = clone(run_traced, stack + sizeof stack, SIGCHLD, const_cast<Call*>(&call));
  if (child < 0) return {0, std::string("clone: ") + strerror(errno)};
  const Steps steps = count_between_stops(child);
  if (waitpid(child, nullptr, WNOHANG) == 0) {  // else it has ended by itself
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  return steps;
}

// Instructions of `call`, without those of stopping around an empty one.
inline Steps count_instructions(const Call& call) {
  static const Steps empty = count_in_child([] {});
  if (!empty.failure.empty()) return empty;
  Steps steps = count_in_child(call);
  steps.instructions -= empty.instructions;
  return steps;
}

}  // namespace micro
