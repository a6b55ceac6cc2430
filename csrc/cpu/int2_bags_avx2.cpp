// int2 bags, AVX2: see gather_avx2.h.
#include "cpu/gather_avx2.h"

namespace lowbit {

void int2_bags__avx2(const lowbit_matrix* w, const int64_t* ids, const float* weights, int64_t count,
                     int64_t plane_begin, int64_t plane_end, float* sum) {
  bags<2>(w, ids, weights, count, plane_begin, plane_end, sum);
}

}  // namespace lowbit
