// What the layer's kernels need of lanes beyond arithmetic: rows whose end is not a whole vector, and exp.
#ifndef LOWBIT_LAYER_ELEMENTS_H
#define LOWBIT_LAYER_ELEMENTS_H

#include <string.h>

#include "cpu/inline.h"
#include "layer/kernel.h"

namespace lowbit {
namespace {

constexpr int64_t kVector = 16;

template <lowbit_dtype D>
constexpr int64_t bytes_of() {
  return D == LOWBIT_F32 ? 4 : 2;
}

template <lowbit_dtype D>
LOWBIT_INLINE const void* element(const void* p, int64_t index) {
  return static_cast<const char*>(p) + index * bytes_of<D>();
}
template <lowbit_dtype D>
LOWBIT_INLINE void* element(void* p, int64_t index) {
  return static_cast<char*>(p) + index * bytes_of<D>();
}

// `count` elements, 1 to 16, from `index` on; zeros beyond.
template <class L, lowbit_dtype D>
LOWBIT_INLINE typename L::T load_part(const void* p, int64_t index, int64_t count) {
  if (count >= kVector) return L::template load_as<D>(p, index);
  char part[kVector * bytes_of<D>()] = {};
  memcpy(part, element<D>(p, index), size_t(count * bytes_of<D>()));
  return L::template load_as<D>(part, 0);
}
template <class L, lowbit_dtype D>
LOWBIT_INLINE void store_part(void* p, int64_t index, int64_t count, typename L::T x) {
  if (count >= kVector) return L::template store_as<D>(p, index, x);
  char part[kVector * bytes_of<D>()];
  L::template store_as<D>(part, 0, x);
  memcpy(element<D>(p, index), part, size_t(count * bytes_of<D>()));
}

// e^x to 2 units in the last place: x = n ln 2 + r, |r| <= ln(2) / 2, and a polynomial of r (Cephes' expf). 0 below -103.98,
// infinity above 88.73, NaN of NaN.
template <class L>
LOWBIT_INLINE typename L::T exponential(typename L::T x) {
  using T = typename L::T;
  x = L::min(L::set(110.0f), L::max(L::set(-110.0f), x));  // a NaN, as second operand, stays
  const T n = L::round(L::mul(x, L::set(1.44269504f)));
  T r = L::fma(n, L::set(-0.693359375f), x);  // the high part of ln 2 has few digits: n times it is exact
  r = L::fma(n, L::set(2.12194440e-4f), r);
  T p = L::set(1.9875691500e-4f);
  p = L::fma(p, r, L::set(1.3981999507e-3f));
  p = L::fma(p, r, L::set(8.3334519073e-3f));
  p = L::fma(p, r, L::set(4.1665795894e-2f));
  p = L::fma(p, r, L::set(1.6666665459e-1f));
  p = L::fma(p, r, L::set(5.0000001201e-1f));
  p = L::fma(L::mul(r, r), p, L::add(r, L::set(1.0f)));
  return L::scale_by_power(p, n);
}

// kernel<D>(argument, begin, end) for the dtype of the argument.
#define LOWBIT_BY_DTYPE(name, kernel, argument)                                   \
  void name(const argument* a, int64_t begin, int64_t end) {                      \
    if (a->dtype == LOWBIT_F32) return kernel<Lanes, LOWBIT_F32>(*a, begin, end); \
    if (a->dtype == LOWBIT_F16) return kernel<Lanes, LOWBIT_F16>(*a, begin, end); \
    kernel<Lanes, LOWBIT_BF16>(*a, begin, end);                                   \
  }

}  // namespace
}  // namespace lowbit
#endif
