#include "api/status.h"

#include <cstdarg>
#include <cstdio>

namespace lowbit {
namespace {
thread_local char message[512] = "";
}

lowbit_status fail(lowbit_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace lowbit

extern "C" {

const char* lowbit_last_error(void) { return lowbit::message; }

const char* lowbit_status_name(lowbit_status status) {
  switch (status) {
    case LOWBIT_OK: return "ok";
    case LOWBIT_INVALID_ARGUMENT: return "invalid argument";
    case LOWBIT_OUT_OF_RANGE: return "out of range";
    case LOWBIT_UNSUPPORTED: return "unsupported";
    case LOWBIT_OUT_OF_MEMORY: return "out of memory";
    case LOWBIT_NUMERIC: return "numeric failure";
  }
  return "unknown status";
}

int32_t lowbit_abi_version(void) { return LOWBIT_ABI_VERSION; }
const char* lowbit_version(void) { return LOWBIT_VERSION; }
}
