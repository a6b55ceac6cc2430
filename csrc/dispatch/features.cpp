#include "dispatch/features.h"

#include <cerrno>
#include <cstring>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lowbit {
namespace {

struct Feature {
  const char* name;
  bool present;
};

#if defined(__x86_64__)
// __builtin_cpu_supports asks cpuid and, for AVX registers and tiles, xgetbv: a CPU whose kernel does not save zmm says
// no.
#define FEATURE(name) Feature{name, __builtin_cpu_supports(name) != 0}
const Feature* features() {
  static const Feature list[] = {
      FEATURE("avx2"),       FEATURE("fma"),      FEATURE("f16c"),       FEATURE("avx512f"),    FEATURE("avx512bw"),
      FEATURE("avx512vl"),   FEATURE("avx512dq"), FEATURE("avx512vbmi"), FEATURE("avx512vnni"), FEATURE("avx512bf16"),
      FEATURE("avx512fp16"), FEATURE("avxvnni"),  FEATURE("amx-tile"),   FEATURE("amx-int8"),   {nullptr, false}};
  return list;
}
#undef FEATURE
#else
const Feature* features() {
  static const Feature list[] = {{nullptr, false}};
  return list;
}
#endif

std::string ask_for_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("arch_prctl(ARCH_REQ_XCOMP_PERM): ") + strerror(errno);
#else
  return "no way to ask for them is known here";
#endif
}

}  // namespace

bool cpu_has(const char* feature) {
  for (const Feature* f = features(); f->name; f++)
    if (!strcmp(f->name, feature)) return f->present;
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

int64_t l1_bytes() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 << 10;
}

const char* tiles_refused() {
  static const std::string reason = ask_for_tiles();
  return reason.c_str();
}

}  // namespace lowbit
