// The whole test framework: CHECK prints the place and the values of a failed check and counts it; finish() is main's
// result.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace check {
inline long checks = 0, failures = 0;

inline int finish(const char* name) {
  std::printf("%s: %ld checks, %ld failed\n", name, checks, failures);
  return failures || !checks ? 1 : 0;  // a program that checked nothing has failed
}
}  // namespace check

#define CHECK(condition, ...)                                                \
  do {                                                                       \
    check::checks++;                                                         \
    if (!(condition)) {                                                      \
      if (check::failures++ < 20) {                                          \
        std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::fprintf(stderr, __VA_ARGS__);                                   \
        std::fprintf(stderr, "\n");                                          \
      }                                                                      \
    }                                                                        \
  } while (0)
