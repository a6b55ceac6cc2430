// trit gather, reference: see gather_ref.h.
#include "cpu/gather_ref.h"

namespace lowbit {

void trit_gather__ref(const lowbit_matrix* w, const int64_t* ids, int64_t count, void* out, lowbit_dtype out_dtype,
                      int64_t out_stride) {
  gather_ref<kTrit>(w, ids, count, out, out_dtype, out_stride);
}

}  // namespace lowbit
