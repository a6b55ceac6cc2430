// trit gather, AVX2: see gather_avx2.h.
#include "cpu/gather_avx2.h"

namespace lowbit {

void trit_gather__avx2(const lowbit_matrix* w, const int64_t* ids, int64_t count, void* out, lowbit_dtype out_dtype,
                       int64_t out_stride) {
  gather<kTrit>(w, ids, count, out, out_dtype, out_stride);
}

}  // namespace lowbit
