// One new token of a sequence, over the keys and values of those before it and its own:
//   q, k <- rotated;  cache[past] <- k, v;  y[h] = sum_t softmax_t(scale * q[h] . keys[t]) * values[t],  t <= past.
// Rotation rounds as Transformers' apply_rotary_pos_emb does (each product, then the sum, to the dtype); everything after
// it is fp32 until y. The softmax is taken over blocks of 16 keys at once: the largest score so far is what exponents are
// relative to, and sums are scaled down when it grows.
// A unit is a kv head with the query heads that share it, up to 8 at a time, so that a key is converted once for all of
// them. Bound by the cache: 2 * past * size elements a unit, read once for 8 query heads.
#ifndef LOWBIT_LAYER_DECODE_ATTENTION_H
#define LOWBIT_LAYER_DECODE_ATTENTION_H

#include <math.h>

#include "cpu/float_types.h"
#include "layer/elements.h"

namespace lowbit {
namespace {

constexpr int64_t kQueries = 8;  // query heads at a time
constexpr int kKeys = 16;        // keys of a block: one vector of scores

// to[size] = x rotated by cos and sin [size], fp32 values of the dtype; x as it is without them.
template <class L, lowbit_dtype D>
LOWBIT_INLINE void rotate(const void* x, const void* cos, const void* sin, int64_t size, float* to) {
  using T = typename L::T;
  const int64_t half = size / 2;
  for (int64_t d = 0; d < size; d += kVector) {
    T value = L::template load_as<D>(x, d);
    if (cos) {
      // The other half, negated for the first: [-x2, x1]. Halves may end within a vector, so lanes come one by one there.
      T other;
      if (half % kVector == 0) {
        other = L::template load_as<D>(x, d < half ? d + half : d - half);
        if (d < half) other = L::sub(L::set(0.0f), other);
      } else {
        alignas(64) float lanes[kVector];
        for (int64_t i = 0; i < kVector; i++)
          lanes[i] = d + i < half ? -load_float(x, D, d + i + half) : load_float(x, D, d + i - half);
        other = L::load(lanes);
      }
      const T straight = L::template rounded<D>(L::mul(value, L::template load_as<D>(cos, d)));
      const T across = L::template rounded<D>(L::mul(other, L::template load_as<D>(sin, d)));
      value = L::template rounded<D>(L::add(straight, across));
    }
    L::store(to + d, value);
  }
}

// products[r][t] = the lanes whose sum is q[r] . keys[t], for 16 keys of which `held` are there; the others are the last one.
// As many accumulators as registers allow, so that a key that was widened meets all queries.
template <class L, lowbit_dtype D, int Q>
LOWBIT_INLINE void multiply_keys(const float* q, int64_t size, const void* keys, int64_t held,
                                 typename L::T (&products)[Q][kKeys]) {
  using T = typename L::T;
  constexpr int kTogether = L::kAccumulators > Q ? L::kAccumulators / Q : 1;  // keys
  for (int first = 0; first < kKeys; first += kTogether) {
    const void* key[kTogether];
    T sums[Q][kTogether];
    for (int i = 0; i < kTogether; i++) {
      key[i] = element<D>(keys, (first + i < held ? first + i : held - 1) * size);
      for (int r = 0; r < Q; r++) sums[r][i] = L::set(0.0f);
    }
    for (int64_t d = 0; d < size; d += kVector) {
      T part[kTogether];
      for (int i = 0; i < kTogether; i++) part[i] = L::template load_as<D>(key[i], d);
      for (int r = 0; r < Q; r++) {
        const T query = L::load(q + r * size + d);
        for (int i = 0; i < kTogether; i++) sums[r][i] = L::fma(query, part[i], sums[r][i]);
      }
    }
    for (int r = 0; r < Q; r++)
      for (int i = 0; i < kTogether; i++) products[r][first + i] = sums[r][i];
  }
}

// y[r] += sum of weights[r][t] * values[t] over the `held` values, columns [begin, end), kVectors vectors of them at a time.
template <class L, lowbit_dtype D, int Q, int kVectors>
LOWBIT_INLINE void add_values(const float (&weights)[Q][kKeys], const void* values, int64_t held, int64_t size,
                              int64_t begin, int64_t end, float* y) {
  using T = typename L::T;
  for (int64_t d = begin; d < end; d += kVectors * kVector) {
    T sums[Q][kVectors];
    for (int r = 0; r < Q; r++)
      for (int i = 0; i < kVectors; i++) sums[r][i] = L::load(y + r * size + d + i * kVector);
    for (int64_t t = 0; t < held; t++) {
      T part[kVectors];
      for (int i = 0; i < kVectors; i++) part[i] = L::template load_as<D>(values, t * size + d + i * kVector);
      for (int r = 0; r < Q; r++) {
        const T weight = L::set(weights[r][t]);
        for (int i = 0; i < kVectors; i++) sums[r][i] = L::fma(weight, part[i], sums[r][i]);
      }
    }
    for (int r = 0; r < Q; r++)
      for (int i = 0; i < kVectors; i++) L::store(y + r * size + d + i * kVector, sums[r][i]);
  }
}

// What Q query heads, [Q][size] fp32 and scaled, see of `count` keys and values: y [Q][size] fp32.
template <class L, lowbit_dtype D, int Q>
void attend(const float* q, int64_t size, const void* keys, const void* values, int64_t count, float* y) {
  using T = typename L::T;
  constexpr int kVectors = L::kAccumulators / 2 > Q ? L::kAccumulators / 2 / Q : 1;
  const int64_t whole = size / (kVectors * kVector) * (kVectors * kVector);
  alignas(64) float weights[Q][kKeys], places[kVector];
  float top[Q], total[Q];
  for (int r = 0; r < Q; r++) {
    top[r] = -INFINITY;
    total[r] = 0;
  }
  for (int64_t d = 0; d < Q * size; d += kVector) L::store(y + d, L::set(0.0f));
  for (int i = 0; i < kVector; i++) places[i] = float(i);
  const T place = L::load(places);

  for (int64_t first = 0; first < count; first += kKeys) {
    const int64_t held = count - first < kKeys ? count - first : kKeys;
    const T absent = L::set(float(held));
    T products[Q][kKeys];
    multiply_keys<L, D, Q>(q, size, element<D>(keys, first * size), held, products);
    for (int r = 0; r < Q; r++) {
      const T scores = L::if_less(place, absent, L::sums(products[r]), L::set(-INFINITY));
      const float block_top = L::largest(scores), new_top = block_top > top[r] ? block_top : top[r];
      const T shift = L::set(new_top);
      const T weight = L::if_less(place, absent, exponential<L>(L::sub(scores, shift)), L::set(0.0f));
      L::store(weights[r], weight);
      if (new_top != top[r]) {  // what was summed so far fades; of nothing, before the first block, 0 is left
        alignas(64) float fade[kVector];
        L::store(fade, exponential<L>(L::sub(L::set(top[r]), shift)));
        total[r] *= fade[0];
        for (int64_t d = 0; d < size; d += kVector)
          L::store(y + r * size + d, L::mul(L::load(y + r * size + d), L::set(fade[0])));
      }
      total[r] += L::sum(weight);
      top[r] = new_top;
    }
    const void* block = element<D>(values, first * size);
    add_values<L, D, Q, kVectors>(weights, block, held, size, 0, whole, y);
    add_values<L, D, Q, 1>(weights, block, held, size, whole, size, y);
  }
  for (int r = 0; r < Q; r++)
    for (int64_t d = 0; d < size; d += kVector)
      L::store(y + r * size + d, L::div(L::load(y + r * size + d), L::set(total[r])));
}

template <class L, lowbit_dtype D>
void decode_attention(const lowbit_decode_step& a, int64_t unit_begin, int64_t unit_end) {
  alignas(64) float rotated[kQueries * kMaxHeadSize], seen[kQueries * kMaxHeadSize];
  const int64_t size = a.head_size, shared = a.heads / a.kv_heads;
  for (int64_t unit = unit_begin; unit < unit_end; unit++) {
    const int64_t sequence = unit / a.kv_heads, head = unit % a.kv_heads;
    const void* cos = a.cos ? element<D>(a.cos, sequence * a.angle_stride) : nullptr;
    const void* sin = a.cos ? element<D>(a.sin, sequence * a.angle_stride) : nullptr;
    void* keys = element<D>(a.keys, sequence * a.cache_sequence_stride + head * a.cache_head_stride);
    void* values = element<D>(a.values, sequence * a.cache_sequence_stride + head * a.cache_head_stride);

    rotate<L, D>(element<D>(a.k, sequence * a.k_stride + head * size), cos, sin, size, rotated);
    for (int64_t d = 0; d < size; d += kVector) L::template store_as<D>(keys, a.past * size + d, L::load(rotated + d));
    memcpy(element<D>(values, a.past * size), element<D>(a.v, sequence * a.v_stride + head * size),
           size_t(size * bytes_of<D>()));

    for (int64_t first = 0; first < shared; first += kQueries) {
      const int64_t queries = shared - first < kQueries ? shared - first : kQueries,
                    at = (head * shared + first) * size;
      for (int64_t r = 0; r < queries; r++) {
        float* query = rotated + r * size;
        rotate<L, D>(element<D>(a.q, sequence * a.q_stride + at + r * size), cos, sin, size, query);
        for (int64_t d = 0; d < size; d += kVector) L::store(query + d, L::mul(L::load(query + d), L::set(a.scale)));
      }
      // A number of queries that registers are laid out for; absent ones are zeros and their result is not looked at.
      const int64_t places = queries > 4 ? 8 : queries > 2 ? 4 : queries;
      for (int64_t d = queries * size; d < places * size; d += kVector) L::store(rotated + d, L::set(0.0f));
      const auto attend_all = places == 8   ? attend<L, D, 8>
                              : places == 4 ? attend<L, D, 4>
                              : places == 2 ? attend<L, D, 2>
                                            : attend<L, D, 1>;
      attend_all(rotated, size, keys, values, a.past + 1, seen);
      for (int64_t d = 0; d < queries * size; d += kVector)
        L::template store_as<D>(a.y, sequence * a.y_stride + at + d, L::load(seen + d));
    }
  }
}

}  // namespace
}  // namespace lowbit
#endif
