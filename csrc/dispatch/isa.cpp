#include "dispatch/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "api/status.h"
#include "dispatch/features.h"

namespace lowbit {
namespace {

#define AVX2 "avx2 fma f16c"
#define AVX512VNNI AVX2 " avx512f avx512bw avx512vl avx512dq avx512vbmi avx512vnni"
struct Level {
  const char* name;
  const char* features;  // that its kernels use
};
constexpr Level kLevels[] = {{"ref", ""},
                             {"avx2", AVX2},
                             {"avxvnni", AVX2 " avxvnni"},
                             {"avx512vnni", AVX512VNNI},
                             {"amx", AVX512VNNI " amx-tile amx-int8"}};
#undef AVX2
#undef AVX512VNNI
constexpr int kLevelCount = sizeof kLevels / sizeof kLevels[0];
static_assert(kLevelCount == int(Isa::amx) + 1, "one level for each Isa");
constexpr int kAuto = -1;

std::atomic<int> forced{kAuto};
std::atomic<bool> environment_invalid{false};
std::once_flag environment_read;

// What this machine lacks for a level, in words; "" if nothing.
std::string find_missing(Isa isa) {
  std::string lacking;
  for (const char* at = kLevels[int(isa)].features; *at;) {
    const std::string feature(at, strcspn(at, " "));
    if (!cpu_has(feature.c_str())) lacking += " " + feature;
    at += feature.size();
    at += strspn(at, " ");
  }
  if (!lacking.empty()) return "the CPU lacks" + lacking;
  if (isa != Isa::amx || !*tiles_refused()) return "";
  return std::string("the CPU has AMX, but the system refuses its tiles: ") + tiles_refused();
}

// Found once; AMX apart, because a process that is held to less does not ask for its tiles.
const std::string& missing(Isa isa) {
  if (isa == Isa::amx) {
    static const std::string text = find_missing(Isa::amx);
    return text;
  }
  static const std::string texts[] = {find_missing(Isa::ref), find_missing(Isa::avx2), find_missing(Isa::avxvnni),
                                      find_missing(Isa::avx512vnni)};
  return texts[int(isa)];
}

int level_named(const char* name) {
  for (int i = 0; i < kLevelCount; i++)
    if (!strcmp(name, kLevels[i].name)) return i;
  return -1;
}

lowbit_status parse(const char* name, int* level) {
  if (!strcmp(name, "auto")) return *level = kAuto, LOWBIT_OK;
  const int i = level_named(name);
  if (i < 0)
    return fail(LOWBIT_INVALID_ARGUMENT, "isa: expected auto, ref, avx2, avxvnni, avx512vnni or amx, got \"%.40s\"",
                name);
  if (!offered(Isa(i)))
    return fail(LOWBIT_UNSUPPORTED, "isa %s: not offered by this machine, whose best is %s: %s", name,
                isa_name(machine_isa()), missing(Isa(i)).c_str());
  return *level = i, LOWBIT_OK;
}

void read_environment() {
  const char* name = getenv("LOWBIT_ISA");
  int level = kAuto;
  if (name && *name) environment_invalid = parse(name, &level) != LOWBIT_OK;
  forced = level;
}

}  // namespace

bool offered(Isa isa) { return missing(isa).empty(); }

Isa machine_isa() {
  static const Isa best = [] {
    int level = kLevelCount - 1;
    while (level > 0 && !offered(Isa(level))) level--;
    return Isa(level);
  }();
  return best;
}

const char* isa_name(Isa isa) { return kLevels[int(isa)].name; }

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

const char* lowbit_isa_missing(const char* isa) {
  const int level = isa ? lowbit::level_named(isa) : -1;
  return level < 0 ? nullptr : lowbit::missing(lowbit::Isa(level)).c_str();
}

const char* lowbit_cpu_features(void) { return lowbit::cpu_features(); }
}
