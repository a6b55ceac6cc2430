// Failures leave the library as a status code and, per thread, one message that names the thing, the expected, the
// actual.
#pragma once

#include "lowbit/lowbit.h"

namespace lowbit {

// Records the message for lowbit_last_error() on this thread and returns `status`, so that checks read `return
// fail(...)`.
lowbit_status fail(lowbit_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace lowbit
