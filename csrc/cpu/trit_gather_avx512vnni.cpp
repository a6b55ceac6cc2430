// trit gather, AVX-512: see gather_avx512vnni.h.
#include "cpu/gather_avx512vnni.h"

namespace lowbit {

void trit_gather__avx512vnni(const lowbit_matrix* w, const int64_t* ids, int64_t count, void* out,
                             lowbit_dtype out_dtype, int64_t out_stride) {
  gather<kTrit>(w, ids, count, out, out_dtype, out_stride);
}

}  // namespace lowbit
