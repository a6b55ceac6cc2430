#include "dispatch/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "api/status.h"

namespace lowbit {
namespace {

struct Feature {
  const char* name;
  bool present;
};

#if defined(__x86_64__)
// __builtin_cpu_supports asks cpuid and, for AVX registers, xgetbv: a CPU whose kernel does not save zmm says no.
#define FEATURE(name) Feature{name, __builtin_cpu_supports(name) != 0}
const Feature* features() {
  static const Feature list[] = {
      FEATURE("avx2"),       FEATURE("fma"),      FEATURE("f16c"),       FEATURE("avx512f"),    FEATURE("avx512bw"),
      FEATURE("avx512vl"),   FEATURE("avx512dq"), FEATURE("avx512vbmi"), FEATURE("avx512vnni"), FEATURE("avx512bf16"),
      FEATURE("avx512fp16"), FEATURE("avxvnni"),  FEATURE("amx-int8"),   {nullptr, false}};
  return list;
}
#undef FEATURE
#else
const Feature* features() {
  static const Feature list[] = {{nullptr, false}};
  return list;
}
#endif

bool have(const char* name) {
  for (const Feature* f = features(); f->name; f++)
    if (!strcmp(f->name, name)) return f->present;
  return false;
}

constexpr const char* kNames[] = {"ref", "avx2", "avx512vnni"};
constexpr int kLevels = 3;
constexpr int kAuto = -1;

std::atomic<int> forced{kAuto};
std::atomic<bool> environment_invalid{false};
std::once_flag environment_read;

lowbit_status parse(const char* name, int* level) {
  if (!strcmp(name, "auto")) return *level = kAuto, LOWBIT_OK;
  for (int i = 0; i < kLevels; i++)
    if (!strcmp(name, kNames[i])) {
      if (i > int(machine_isa()))
        return fail(LOWBIT_UNSUPPORTED, "isa %s: this machine offers at most %s (%s)", name, isa_name(machine_isa()),
                    lowbit_cpu_features());
      return *level = i, LOWBIT_OK;
    }
  return fail(LOWBIT_INVALID_ARGUMENT, "isa: expected auto, ref, avx2 or avx512vnni, got \"%.40s\"", name);
}

void read_environment() {
  const char* name = getenv("LOWBIT_ISA");
  int level = kAuto;
  if (name && *name) environment_invalid = parse(name, &level) != LOWBIT_OK;
  forced = level;
}

}  // namespace

Isa machine_isa() {
  static const Isa best = [] {
    const bool avx2 = have("avx2") && have("fma") && have("f16c");
    const bool avx512 = avx2 && have("avx512f") && have("avx512bw") && have("avx512vl") && have("avx512dq") &&
                        have("avx512vbmi") && have("avx512vnni");
    return avx512 ? Isa::avx512vnni : avx2 ? Isa::avx2 : Isa::ref;
  }();
  return best;
}

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

lowbit_status allowed_isa(Isa* isa) {
  std::call_once(environment_read, read_environment);
  if (environment_invalid) {
    int level;
    return parse(getenv("LOWBIT_ISA") ? getenv("LOWBIT_ISA") : "", &level);  // the message again, on this thread
  }
  const int level = forced.load(std::memory_order_relaxed);
  *isa = level == kAuto ? machine_isa() : Isa(level);
  return LOWBIT_OK;
}

}  // namespace lowbit

extern "C" {

lowbit_status lowbit_set_isa(const char* isa) {
  using namespace lowbit;
  if (!isa) return fail(LOWBIT_INVALID_ARGUMENT, "isa: expected a name, got NULL");
  std::call_once(environment_read, read_environment);
  int level;
  const lowbit_status status = parse(isa, &level);
  if (status == LOWBIT_OK) {
    forced = level;
    environment_invalid = false;
  }
  return status;
}

const char* lowbit_isa(void) {
  lowbit::Isa isa = lowbit::Isa::ref;
  return lowbit::allowed_isa(&isa) == LOWBIT_OK ? lowbit::isa_name(isa) : "invalid";
}

const char* lowbit_cpu_features(void) {
  static const std::string text = [] {
    std::string list;
    for (const lowbit::Feature* f = lowbit::features(); f->name; f++)
      if (f->present) list += (list.empty() ? "" : " ") + std::string(f->name);
    return list;
  }();
  return text.c_str();
}
}
