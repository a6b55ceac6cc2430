// int8 bags, the reference: see gather_ref.h.
#include "cpu/gather_ref.h"

namespace lowbit {

void int8_bags__ref(const lowbit_matrix* w, const int64_t* ids, const float* weights, int64_t count,
                    int64_t plane_begin, int64_t plane_end, float* sum) {
  bags_ref<8>(w, ids, weights, count, plane_begin, plane_end, sum);
}

}  // namespace lowbit
