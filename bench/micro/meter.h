// What stands beside a time in the microbenchmarks: the bandwidth probe right before and after, and the CPU's own
// counters of cycles and instructions where the system lets us read them.
#pragma once

#include <benchmark/benchmark.h>
#include <linux/perf_event.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "lowbit/lowbit.h"

namespace micro {

constexpr size_t kProbeBytes = size_t(256) << 20;
// A row is marked (bench/README.md) when its two probes differ by more, or others had more of this thread's core.
constexpr double kProbeSpread = 0.20, kBusyShare = 0.08;

// Cycles and instructions of this thread in user mode, as one group: what is counted is counted for the same time.
class Counters {
 public:
  Counters() {
    leader_ = open(PERF_COUNT_HW_CPU_CYCLES, -1);
    if (leader_ < 0) {
      reason_ = std::string("perf_event_open: ") + strerror(errno);
      return;
    }
    if (open(PERF_COUNT_HW_INSTRUCTIONS, leader_) < 0) {
      reason_ = std::string("perf_event_open, instructions: ") + strerror(errno);
      close(leader_);
      leader_ = -1;
    }
  }

  bool available() const { return leader_ >= 0; }
  const std::string& reason() const { return reason_; }  // why not

  void start() {
    if (!available()) return;
    ioctl(leader_, PERF_EVENT_IOC_RESET, PERF_IOC_FLAG_GROUP);
    ioctl(leader_, PERF_EVENT_IOC_ENABLE, PERF_IOC_FLAG_GROUP);
  }

  // False where nothing was counted, for example because another program holds the counters.
  bool stop(double* cycles, double* instructions) {
    if (!available()) return false;
    ioctl(leader_, PERF_EVENT_IOC_DISABLE, PERF_IOC_FLAG_GROUP);
    uint64_t values[3] = {};  // their number, then theirs
    if (read(leader_, values, sizeof values) != ssize_t(sizeof values) || values[1] == 0) return false;
    *cycles = double(values[1]);
    *instructions = double(values[2]);
    return true;
  }

 private:
  static int open(uint64_t event, int group) {
    perf_event_attr attributes{};
    attributes.size = sizeof attributes;
    attributes.type = PERF_TYPE_HARDWARE;
    attributes.config = event;
    attributes.disabled = group < 0;
    attributes.exclude_kernel = attributes.exclude_hv = 1;
    attributes.read_format = PERF_FORMAT_GROUP;
    return int(syscall(SYS_perf_event_open, &attributes, 0, -1, group, 0));
  }

  int leader_ = -1;
  std::string reason_;
};

inline Counters& counters() {
  static Counters all;
  return all;
}

// Around the loop of a benchmark: made before it, report() after it.
class Meter {
 public:
  Meter() : before_(lowbit_read_bandwidth(kProbeBytes, 1)) {
    counters().start();
    cpu_start_ = cpu_seconds();
    start_ = std::chrono::steady_clock::now();
  }

  // bytes, operations, lines: of one iteration; 0 leaves out what depends on it.
  void report(benchmark::State& state, double bytes, double operations, double lines) {
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start_;
    const double others = 1 - (cpu_seconds() - cpu_start_) / seconds.count();
    double cycles = 0, instructions = 0;
    const bool counted = counters().stop(&cycles, &instructions);
    const double after = lowbit_read_bandwidth(kProbeBytes, 1), probe = (before_ + after) / 2;
    const double iterations = double(state.iterations()), rate = iterations / seconds.count() * 1e-9;
    state.counters["GB/s"] = bytes * rate;
    state.counters["probe"] = probe;
    state.counters["share"] = probe > 0 ? bytes * rate / probe : 0;
    if (operations > 0) state.counters["GOP/s"] = operations * rate;
    if (counted && lines > 0) {
      state.counters["cycles/line"] = cycles / iterations / lines;
      state.counters["instructions/line"] = instructions / iterations / lines;
    }
    const double spread = probe > 0 ? std::abs(before_ - after) / probe : 0;
    std::string label;
    if (spread > kProbeSpread) label += " probes differ by " + std::to_string(int(spread * 100)) + "%";
    if (others > kBusyShare) label += " others had " + std::to_string(int(others * 100)) + "% of the core";
    if (!label.empty()) state.SetLabel("busy:" + label);
  }

 private:
  static double cpu_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
  }

  double before_, cpu_start_ = 0;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace micro
