// int4 bags, AVX-512: see gather_avx512vnni.h.
#include "cpu/gather_avx512vnni.h"

namespace lowbit {

void int4_bags__avx512vnni(const lowbit_matrix* w, const int64_t* ids, const float* weights, int64_t count,
                           int64_t plane_begin, int64_t plane_end, float* sum) {
  bags<4>(w, ids, weights, count, plane_begin, plane_end, sum);
}

}  // namespace lowbit
