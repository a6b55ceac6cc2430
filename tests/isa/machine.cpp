// dispatch/features.h of a machine that has, beside what this one has, AVX-VNNI and AMX where they can be stood in for.
#include "machine.h"

#include <string>

#include "dispatch/features.h"

namespace lowbit {
namespace {

struct Feature {
  const char* name;
  bool present;
};

#define FEATURE(name) Feature{name, __builtin_cpu_supports(name) != 0}
const Feature* features() {
  static const bool vnni = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  static const Feature list[] = {FEATURE("avx2"),       FEATURE("fma"),      FEATURE("f16c"),     FEATURE("avx512f"),
                                 FEATURE("avx512bw"),   FEATURE("avx512vl"), FEATURE("avx512dq"), FEATURE("avx512vbmi"),
                                 FEATURE("avx512vnni"), {"avxvnni", vnni},   {"amx-tile", vnni},  {"amx-int8", vnni},
                                 {nullptr, false}};
  return list;
}
#undef FEATURE

}  // namespace

bool tiles_are_refused = false;
int64_t l1_size = 32 << 10;

bool cpu_has(const char* feature) {
  for (const Feature* f = features(); f->name; f++)
    if (std::string(f->name) == feature) return f->present;
  return false;
}

const char* cpu_features() {
  static const std::string text = [] {
    std::string list;
    for (const Feature* f = features(); f->name; f++)
      if (f->present) list += (list.empty() ? "" : " ") + std::string(f->name);
    return list;
  }();
  return text.c_str();
}

int64_t l1_bytes() { return l1_size; }
const char* tiles_refused() { return tiles_are_refused ? "a test said so" : ""; }

}  // namespace lowbit
