// What a decoder layer does between its products, every kernel forced in turn: the bits of `ref` on every level and number
// of threads, exact where the arithmetic is exact, close to float64 otherwise, nothing written beside what was asked for.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "matrices.h"

namespace {

std::mt19937 random_bits(77);
constexpr lowbit_dtype kDtypes[] = {LOWBIT_F32, LOWBIT_F16, LOWBIT_BF16};

size_t width(lowbit_dtype dtype) { return dtype == LOWBIT_F32 ? 4 : 2; }

// Half a unit in the last place of a dtype, relative.
double rounding(lowbit_dtype dtype) { return dtype == LOWBIT_F32 ? 0x1p-24 : dtype == LOWBIT_F16 ? 0x1p-11 : 0x1p-8; }

// Elements of a dtype, with 16 bytes behind the last that must stay as they are.
struct Elements {
  lowbit_dtype dtype;
  std::vector<uint8_t> bytes;

  Elements(lowbit_dtype type, int64_t count) : dtype(type), bytes(size_t(count) * width(type) + 16, 0xEE) {}
  template <class Make>
  static Elements of(lowbit_dtype type, int64_t count, Make make) {
    Elements made(type, count);
    for (int64_t i = 0; i < count; i++) lowbit::store_float(made.bytes.data(), type, i, make(i));
    return made;
  }
  static Elements normal(lowbit_dtype type, int64_t count, float size = 1) {
    std::normal_distribution<float> values;
    return of(type, count, [&](int64_t) { return size * values(random_bits); });
  }
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  double operator[](int64_t i) const { return lowbit::load_float(bytes.data(), dtype, i); }
  void check_end(const char* what) const {
    for (size_t i = bytes.size() - 16; i < bytes.size(); i++)
      CHECK(bytes[i] == 0xEE, "%s: written behind the end", what);
  }
};

double to_dtype(double value, lowbit_dtype dtype) {
  uint8_t bytes[4];
  lowbit::store_float(bytes, dtype, 0, float(value));
  return lowbit::load_float(bytes, dtype, 0);
}

// body() under every level of this machine and 1, 2 and 5 threads; `verb`'s kernel of that level must have run.
template <class Body>
void everywhere(const char* verb, Body body) {
  for (const char* isa : machine_isas())
    for (const int threads : {1, 2, 5}) {
      CHECK(lowbit_set_isa(isa) == LOWBIT_OK && lowbit_set_threads(threads) == LOWBIT_OK, "%s", lowbit_last_error());
      body(isa);
      const std::string wanted = std::string(verb) + "__" + isa, ran = lowbit_last_kernel(verb);
      bool exists = false;
      for (int i = 0; const char* row = lowbit_kernel_name(i, nullptr); i++) exists |= wanted == row;
      if (exists) CHECK(ran == wanted, "forced %s, ran %s", wanted.c_str(), ran.c_str());
    }
  lowbit_set_isa("auto");
  lowbit_set_threads(0);
}

void test_rms_norm(lowbit_dtype dtype, int64_t tokens, int64_t size, bool residual, bool exact) {
  const int64_t stride = size + 3;
  const auto sign = [&](int64_t) {
    return random_bits() % 2 ? 2.0f : -2.0f;
  };  // mean of squares 4, or 16 with a residual
  Elements x = exact ? Elements::of(dtype, tokens * stride, sign) : Elements::normal(dtype, tokens * stride);
  const Elements more = exact ? x : Elements::normal(dtype, tokens * size);
  const Elements weight =
      exact ? Elements::of(dtype, size, [](int64_t i) { return float(i % 7) - 3; }) : Elements::normal(dtype, size);
  const float eps = exact ? 0.0f : 1e-5f;
  const int64_t more_stride = exact ? stride : size;
  std::vector<uint8_t> first, first_sum;
  everywhere("rms_norm", [&](const char* isa) {
    Elements y(dtype, tokens * stride), sum(dtype, tokens * stride);
    CHECK(lowbit_rms_norm(x.data(), stride, residual ? more.data() : nullptr, more_stride, weight.data(), eps, dtype,
                          tokens, size, sum.data(), stride, y.data(), stride) == LOWBIT_OK,
          "%s", lowbit_last_error());
    y.check_end("rms_norm y");
    sum.check_end("rms_norm sum");
    for (int64_t m = 0; m + 1 < tokens; m++)
      for (size_t i = 0; i < 3 * width(dtype); i++)
        CHECK(y.bytes[size_t(m * stride + size) * width(dtype) + i] == 0xEE, "rms_norm: written between rows");
    if (!residual)
      CHECK(sum.bytes == Elements(dtype, tokens * stride).bytes, "rms_norm: sum written without a residual");
    if (!first.empty()) {
      CHECK(y.bytes == first && sum.bytes == first_sum, "rms_norm %s size %ld: not the bits of ref", isa, long(size));
      // In place: the sum in x's place, then y in x's.
      Elements in_place = x;
      CHECK(lowbit_rms_norm(in_place.data(), stride, residual ? more.data() : nullptr, more_stride, weight.data(), eps,
                            dtype, tokens, size, residual ? in_place.data() : nullptr, stride, y.data(),
                            stride) == LOWBIT_OK,
            "%s", lowbit_last_error());
      CHECK(y.bytes == first, "rms_norm %s: other results with sum in x's place", isa);
      return;
    }
    first = y.bytes, first_sum = sum.bytes;
    for (int64_t m = 0; m < tokens; m++) {
      double squares = 0;
      for (int64_t k = 0; k < size; k++) {
        const double s = residual ? to_dtype(x[m * stride + k] + more[m * more_stride + k], dtype) : x[m * stride + k];
        if (residual) CHECK(sum[m * stride + k] == s, "rms_norm: sum[%ld,%ld]", long(m), long(k));
        squares += s * s;
      }
      for (int64_t k = 0; k < size; k++) {
        const double s = residual ? sum[m * stride + k] : x[m * stride + k];
        const double wanted = weight[k] * s / std::sqrt(squares / double(size) + double(eps));
        const double bound = exact ? 0 : std::fabs(wanted) * (2.1 * rounding(dtype) + 1e-6) + 1e-7;
        CHECK(std::fabs(y[m * stride + k] - wanted) <= bound, "rms_norm size %ld [%ld,%ld]: got %.9g, wanted %.9g",
              long(size), long(m), long(k), y[m * stride + k], wanted);
      }
    }
  });
}

void test_silu_mul(lowbit_dtype dtype, int64_t tokens, int64_t size) {
  const float odd[] = {0.0f, -0.0f, 80.0f, -80.0f, 100.0f, -100.0f, 3e4f, -3e4f, 1e-7f, -15.5f};
  const int64_t stride = size + 5;
  Elements gate = Elements::normal(dtype, tokens * size, 4), up = Elements::normal(dtype, tokens * stride);
  for (int64_t i = 0; i < tokens * size && i < 10; i++) lowbit::store_float(gate.data(), dtype, i, odd[i]);
  std::vector<uint8_t> first;
  everywhere("silu_mul", [&](const char* isa) {
    Elements y(dtype, tokens * size), in_place = gate;
    CHECK(lowbit_silu_mul(gate.data(), size, up.data(), stride, dtype, tokens, size, y.data(), size) == LOWBIT_OK, "%s",
          lowbit_last_error());
    CHECK(lowbit_silu_mul(in_place.data(), size, up.data(), stride, dtype, tokens, size, in_place.data(), size) ==
              LOWBIT_OK,
          "%s", lowbit_last_error());
    CHECK(in_place.bytes == y.bytes, "silu_mul %s: other results in place", isa);
    if (!first.empty()) {
      CHECK(y.bytes == first, "silu_mul %s size %ld: not the bits of ref", isa, long(size));
      return;
    }
    first = y.bytes;
    for (int64_t m = 0; m < tokens; m++)
      for (int64_t k = 0; k < size; k++) {
        const double x = gate[m * size + k], wanted = x / (1 + std::exp(-x)) * up[m * stride + k];
        const double bound = std::fabs(wanted) * (2.1 * rounding(dtype) + 4e-7) + (dtype == LOWBIT_F16 ? 3e-7 : 1e-37);
        CHECK(std::fabs(y[m * size + k] - wanted) <= bound, "silu_mul of %.9g: got %.9g, wanted %.9g", x,
              y[m * size + k], wanted);
      }
  });
}

void test_silu_of_no_number() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  everywhere("silu_mul", [&](const char* isa) {
    float x[20], up[20], y[20];
    std::fill(x, x + 20, 1.0f), std::fill(up, up + 20, 2.0f);
    x[3] = nan, x[4] = infinity, up[17] = nan;
    CHECK(lowbit_silu_mul(x, 20, up, 20, LOWBIT_F32, 1, 20, y, 20) == LOWBIT_OK, "%s", lowbit_last_error());
    for (int i = 0; i < 20; i++)
      CHECK(i == 3 || i == 17 ? std::isnan(y[i])
            : i == 4          ? y[i] == infinity
                              : std::fabs(y[i] - 1.4621171f) < 1e-6f,
            "silu_mul %s [%d]: %g", isa, i, double(y[i]));
  });
}

struct Shape {
  int64_t sequences, heads, kv_heads, size, past;
  bool rotated, own_angles;  // of each sequence
};

// mean: every place weighs the same; argmax: one place has all the weight. Both are exact.
enum class Kind { random, mean, argmax };

struct Step {
  Shape s;
  lowbit_dtype dtype;
  int64_t places;
  Elements q, k, v, cos, sin, keys, values;
  lowbit_decode_step view{};

  Step(const Shape& shape, lowbit_dtype type, Kind kind)
      : s(shape),
        dtype(type),
        places(s.past + 3),
        q(Elements::normal(type, s.sequences * (s.heads * s.size + 7))),
        k(Elements::normal(type, s.sequences * s.kv_heads * s.size)),
        v(Elements::normal(type, s.sequences * s.kv_heads * s.size)),
        cos(angles([](float a) { return std::cos(a); })),
        sin(angles([](float a) { return std::sin(a); })),
        keys(Elements::normal(type, s.sequences * s.kv_heads * places * s.size)),
        values(Elements::normal(type, s.sequences * s.kv_heads * places * s.size)) {
    view.dtype = type;
    view.sequences = s.sequences, view.heads = s.heads, view.kv_heads = s.kv_heads, view.head_size = s.size;
    view.past = s.past;
    view.scale = kind == Kind::mean ? 0.0f : kind == Kind::argmax ? 1024.0f : float(1 / std::sqrt(double(s.size)));
    view.q_stride = s.heads * s.size + 7;
    view.k_stride = view.v_stride = s.kv_heads * s.size;
    view.angle_stride = s.own_angles ? s.size : 0;
    view.cache_head_stride = places * s.size;
    view.cache_sequence_stride = s.kv_heads * places * s.size;
    view.y_stride = s.heads * s.size;
    auto small = [&](Elements* e, int64_t count) {
      for (int64_t i = 0; i < count; i++) lowbit::store_float(e->data(), type, i, float(int(random_bits() % 15) - 7));
    };
    if (kind == Kind::random) return;
    small(&values, s.sequences * s.kv_heads * places * s.size);
    small(&v, s.sequences * s.kv_heads * s.size);
    if (kind == Kind::mean) return;
    small(&q, s.sequences * (s.heads * s.size + 7));
    small(&k, s.sequences * s.kv_heads * s.size);
    small(&keys, s.sequences * s.kv_heads * places * s.size);
  }

  template <class F>
  Elements angles(F function) {  // deterministic: cos and sin belong together
    return Elements::of(dtype, s.sequences * s.size, [&](int64_t i) {
      return function(0.37f * float(i % (s.size / 2)) + 1.1f * float(s.own_angles ? i / s.size : 0));
    });
  }

  lowbit_status run(Elements* y) {
    view.q = q.data(), view.k = k.data(), view.v = v.data();
    view.cos = s.rotated ? cos.data() : nullptr, view.sin = s.rotated ? sin.data() : nullptr;
    view.keys = keys.data(), view.values = values.data(), view.y = y->data();
    return lowbit_decode_attention(&view);
  }

  double rotated(const Elements& x, int64_t row, int64_t sequence, int64_t d) const {
    if (!s.rotated) return x[row + d];
    const int64_t half = s.size / 2, angle = (s.own_angles ? sequence * s.size : 0) + d;
    const double other = d < half ? -x[row + d + half] : x[row + d - half];
    return to_dtype(to_dtype(x[row + d] * cos[angle], dtype) + to_dtype(other * sin[angle], dtype), dtype);
  }
};

void test_attention(const Shape& s, lowbit_dtype dtype, Kind kind) {
  Step step(s, dtype, kind);
  const Elements keys_before = step.keys, values_before = step.values;
  std::vector<uint8_t> first, first_keys, first_values;
  everywhere("decode_attention", [&](const char* isa) {
    Elements y(dtype, s.sequences * s.heads * s.size);
    step.keys = keys_before, step.values = values_before;
    CHECK(step.run(&y) == LOWBIT_OK, "%s", lowbit_last_error());
    y.check_end("decode_attention");
    if (!first.empty()) {
      CHECK(y.bytes == first && step.keys.bytes == first_keys && step.values.bytes == first_values,
            "decode_attention %s heads %ld/%ld size %ld past %ld: not the bits of ref", isa, long(s.heads),
            long(s.kv_heads), long(s.size), long(s.past));
      return;
    }
    first = y.bytes, first_keys = step.keys.bytes, first_values = step.values.bytes;
    for (int64_t n = 0; n < s.sequences; n++)
      for (int64_t g = 0; g < s.kv_heads; g++) {
        const int64_t base = (n * s.kv_heads + g) * step.places * s.size, token = (n * s.kv_heads + g) * s.size;
        for (int64_t t = 0; t < step.places; t++)
          for (int64_t d = 0; d < s.size; d++) {
            const int64_t at = base + t * s.size + d;
            const bool own = t == s.past;
            CHECK(step.keys[at] == (own ? step.rotated(step.k, token, n, d) : keys_before[at]) &&
                      step.values[at] == (own ? step.v[token + d] : values_before[at]),
                  "decode_attention: cache at place %ld of %ld", long(t), long(s.past));
          }
        const int64_t shared = s.heads / s.kv_heads;
        for (int64_t h = g * shared; h < (g + 1) * shared; h++) {
          std::vector<double> weights(size_t(s.past) + 1);
          double top = -1e300, total = 0;
          for (int64_t t = 0; t <= s.past; t++) {
            double score = 0;
            for (int64_t d = 0; d < s.size; d++)
              score +=
                  step.rotated(step.q, n * step.view.q_stride + h * s.size, n, d) * step.keys[base + t * s.size + d];
            weights[size_t(t)] = score * double(step.view.scale);
            top = std::max(top, weights[size_t(t)]);
          }
          for (double& w : weights) total += w = std::exp(w - top);
          for (int64_t d = 0; d < s.size; d++) {
            double wanted = 0, size = 0;
            for (int64_t t = 0; t <= s.past; t++) {
              const double part = weights[size_t(t)] / total * step.values[base + t * s.size + d];
              wanted += part, size += std::fabs(part);
            }
            const double got = y[(n * s.heads + h) * s.size + d];
            const double bound =
                kind == Kind::random ? 2e-6 * size + 1.1 * rounding(dtype) * std::fabs(wanted) + 1e-7 : 0;
            CHECK(std::fabs(got - wanted) <= bound,
                  "decode_attention size %ld past %ld head %ld: got %.9g, wanted %.9g", long(s.size), long(s.past),
                  long(h), got, wanted);
          }
        }
      }
  });
}

// A layer of random matrices of mixed formats, and the calls that lowbit_decode_layer stands for, one after the other.
struct Layer {
  int64_t hidden, heads, kv_heads, size, inner;
  std::vector<TestMatrix> matrices;
  Elements bias, weights;
  lowbit_decoder_layer view{};

  Layer(lowbit_dtype dtype, bool head_norms, lowbit_activations mode)
      : hidden(96),
        heads(6),
        kv_heads(2),
        size(32),
        inner(160),
        bias(Elements::normal(LOWBIT_F32, 192)),
        weights(Elements::normal(dtype, 96)) {
    const int64_t shapes[7][2] = {{heads * size, hidden}, {kv_heads * size, hidden}, {kv_heads * size, hidden},
                                  {hidden, heads * size}, {inner, hidden},           {inner, hidden},
                                  {hidden, inner}};
    const int formats[7] = {4, 4, 8, 3, 2, 4, 4};
    for (int i = 0; i < 7; i++)
      matrices.emplace_back(Case{formats[i], shapes[i][0], shapes[i][1], 32, i == 1, i == 5, 0, LOWBIT_F16, false},
                            random_bits);
    lowbit_linear* const linears[] = {&view.q, &view.k, &view.v, &view.o, &view.gate, &view.up, &view.down};
    for (int i = 0; i < 7; i++)
      *linears[i] = {&matrices[size_t(i)].view, i < 3 ? bias.data() : nullptr, LOWBIT_F32, mode};
    view.input = {weights.data(), 1e-5f}, view.output = {weights.data(), 1e-6f};
    if (head_norms) view.q_norm = view.k_norm = {weights.data(), 1e-4f};
  }
};

void test_layer(lowbit_dtype dtype, bool head_norms, lowbit_activations mode, int64_t sequences) {
  Layer layer(dtype, head_norms, mode);
  const lowbit_decoder_layer& l = layer.view;
  Step step({sequences, layer.heads, layer.kv_heads, layer.size, 5, true, true}, dtype, Kind::random);
  Elements unused(dtype, sequences * layer.heads * layer.size);
  CHECK(step.run(&unused) == LOWBIT_OK, "%s", lowbit_last_error());
  const Elements keys = step.keys, values = step.values, x = Elements::normal(dtype, sequences * layer.hidden);

  auto made = [&](int64_t width) { return Elements(dtype, sequences * width); };
  const int64_t hidden = layer.hidden, q_width = layer.heads * layer.size, kv_width = layer.kv_heads * layer.size;
  Elements normed = made(hidden), sum = made(hidden), out = made(hidden), wanted = made(hidden);
  Elements q = made(q_width), k = made(kv_width), v = made(kv_width), seen = made(q_width);
  Elements gate = made(layer.inner), up = made(layer.inner);
  auto multiply = [&](const lowbit_linear& linear, const Elements& from, Elements* to) {
    CHECK(lowbit_matmul(linear.w, from.data(), dtype, sequences, linear.w->cols, linear.bias, linear.bias_dtype,
                        to->data(), linear.w->rows, linear.activations, nullptr, 0) == LOWBIT_OK,
          "%s", lowbit_last_error());
  };
  auto norm = [&](const lowbit_norm& n, const Elements& from, const void* residual, int64_t rows, int64_t width,
                  void* to) {
    CHECK(lowbit_rms_norm(from.data(), width, residual, width, n.weight, n.eps, dtype, rows, width, sum.data(), width,
                          to, width) == LOWBIT_OK,
          "%s", lowbit_last_error());
  };
  norm(l.input, x, nullptr, sequences, hidden, normed.data());
  multiply(l.q, normed, &q), multiply(l.k, normed, &k), multiply(l.v, normed, &v);
  if (head_norms) {
    norm(l.q_norm, q, nullptr, sequences * layer.heads, layer.size, q.data());
    norm(l.k_norm, k, nullptr, sequences * layer.kv_heads, layer.size, k.data());
  }
  lowbit_decode_step attention = step.view;
  attention.q = q.data(), attention.k = k.data(), attention.v = v.data(), attention.y = seen.data();
  attention.q_stride = attention.y_stride = q_width, attention.k_stride = attention.v_stride = kv_width;
  CHECK(lowbit_decode_attention(&attention) == LOWBIT_OK, "%s", lowbit_last_error());
  multiply(l.o, seen, &out);
  norm(l.output, out, x.data(), sequences, hidden, normed.data());
  multiply(l.gate, normed, &gate), multiply(l.up, normed, &up);
  CHECK(lowbit_silu_mul(gate.data(), layer.inner, up.data(), layer.inner, dtype, sequences, layer.inner, gate.data(),
                        layer.inner) == LOWBIT_OK,
        "%s", lowbit_last_error());
  multiply(l.down, gate, &out);
  for (int64_t i = 0; i < sequences * hidden; i++) lowbit::store_float(wanted.data(), dtype, i, float(out[i] + sum[i]));
  const Elements wanted_keys = step.keys, wanted_values = step.values;

  everywhere("decode_attention", [&](const char* isa) {
    for (const bool in_place : {false, true}) {
      step.keys = keys, step.values = values;
      lowbit_decode_step given = step.view;
      given.q = given.k = given.v = given.y = nullptr, given.heads = given.kv_heads = 0;
      Elements y = in_place ? x : made(hidden);
      const void* from = in_place ? y.data() : x.data();
      CHECK(lowbit_decode_layer(&l, &given, from, y.data()) == LOWBIT_OK, "%s", lowbit_last_error());
      CHECK(y.bytes == wanted.bytes && step.keys.bytes == wanted_keys.bytes && step.values.bytes == wanted_values.bytes,
            "decode_layer %s: not the bits of its calls one by one", isa);
    }
  });
}

// Layers in one call: the bits of the calls one by one, and of the norm after them.
void test_layers(lowbit_dtype dtype, int64_t sequences) {
  const Layer first(dtype, false, LOWBIT_ACT_FLOAT), second(dtype, true, LOWBIT_ACT_INT8);
  const lowbit_decoder_layer* layers[] = {&first.view, &second.view, &first.view};
  const Step made({sequences, first.heads, first.kv_heads, first.size, 5, true, true}, dtype, Kind::random);
  const Elements x = Elements::normal(dtype, sequences * first.hidden), weight = Elements::normal(dtype, first.hidden);
  const lowbit_norm last = {weight.data(), 1e-5f}, none = {nullptr, 1e-5f};
  auto caches = [&] {
    std::vector<Elements> all;
    for (int i = 0; i < 3; i++) all.push_back(made.keys), all.push_back(made.values);
    return all;
  };
  auto steps = [&](std::vector<Elements>& cache) {
    std::vector<lowbit_decode_step> all(3, made.view);
    for (size_t i = 0; i < 3; i++)
      all[i].keys = cache[2 * i].data(), all[i].values = cache[2 * i + 1].data(), all[i].cos = made.cos.data(),
      all[i].sin = made.sin.data();
    return all;
  };
  everywhere("decode_attention", [&](const char* isa) {
    std::vector<Elements> apart = caches(), together = caches();
    Elements wanted = x, y(dtype, sequences * first.hidden);
    const auto given = steps(apart);
    for (size_t i = 0; i < 3; i++)
      CHECK(lowbit_decode_layer(layers[i], &given[i], wanted.data(), wanted.data()) == LOWBIT_OK, "%s",
            lowbit_last_error());
    for (const lowbit_norm* norm : {static_cast<const lowbit_norm*>(nullptr), &none, &last}) {
      if (norm == &last)
        CHECK(lowbit_rms_norm(wanted.data(), first.hidden, nullptr, 0, last.weight, last.eps, dtype, sequences,
                              first.hidden, nullptr, 0, wanted.data(), first.hidden) == LOWBIT_OK,
              "%s", lowbit_last_error());
      together = caches();
      CHECK(lowbit_decode_layers(layers, steps(together).data(), 3, norm, x.data(), y.data()) == LOWBIT_OK, "%s",
            lowbit_last_error());
      CHECK(y.bytes == wanted.bytes, "decode_layers %s: not the bits of its calls one by one", isa);
      for (size_t i = 0; i < 6; i++) CHECK(together[i].bytes == apart[i].bytes, "%s: cache %zu", isa, i);
    }
  });

  std::vector<Elements> cache = caches();
  Elements y = x;
  auto refused = [&](auto change, int count, const char* words) {
    auto given = steps(cache);
    change(&given[2]);
    CHECK(lowbit_decode_layers(layers, given.data(), count, &last, x.data(), y.data()) == LOWBIT_INVALID_ARGUMENT &&
              std::strstr(lowbit_last_error(), words),
          "expected \"%s\", got %s", words, lowbit_last_error());
    CHECK(y.bytes == x.bytes && cache[0].bytes == made.keys.bytes, "refused layers wrote");
  };
  using S = lowbit_decode_step*;
  refused([](S) {}, 0, "layers and steps: expected at least one, got 0");
  refused([](S s) { s->sequences++; }, 3, "layers[2]: expected 96 columns");
  refused([](S s) { s->head_size = 0; }, 3, "head_size");
  layers[1] = nullptr;
  refused([](S) {}, 3, "layer and step: expected pointers");
}

void test_layer_refusals() {
  auto refused = [](auto change, const char* words) {
    Layer layer(LOWBIT_F32, true, LOWBIT_ACT_FLOAT);
    Step step({1, 6, 2, 32, 5, true, false}, LOWBIT_F32, Kind::random);
    Elements y(LOWBIT_F32, 6 * 32);
    CHECK(step.run(&y) == LOWBIT_OK, "%s", lowbit_last_error());
    const std::vector<uint8_t> keys = step.keys.bytes;
    const void* x = y.data();
    change(&layer.view, &step.view, &x);
    CHECK(lowbit_decode_layer(&layer.view, &step.view, x, y.data()) == LOWBIT_INVALID_ARGUMENT &&
              std::strstr(lowbit_last_error(), words),
          "expected \"%s\", got %s", words, lowbit_last_error());
    CHECK(step.keys.bytes == keys, "a refused layer wrote");
  };
  using L = lowbit_decoder_layer*;
  using S = lowbit_decode_step*;
  using X = const void**;
  refused([](L l, S, X) { l->down.w = l->q.w; }, "down: expected [96, 160], got [192, 96]");
  refused([](L l, S, X) { l->v.w = l->q.w; }, "v: expected [64, 96], got [192, 96]");
  refused([](L l, S, X) { l->up.w = nullptr; }, "matrix: expected a pointer");
  refused([](L l, S, X) { l->input.weight = nullptr; }, "weight: expected a pointer");
  refused([](L, S s, X) { s->head_size = 48; },
          "head_size: expected a divisor of the rows of q (192) and k (64), got 48");
  refused([](L, S s, X) { s->head_size = 0; }, "head_size");
  refused([](L, S s, X) { s->dtype = LOWBIT_I32; }, "dtype");
  refused([](L, S s, X) { s->sequences = int64_t(1) << 45; }, "sequences: expected 0 or more");
  refused([](L, S s, X) { s->values = nullptr; }, "values: expected a pointer");
  refused([](L, S, X x) { *x = nullptr; }, "x and y: expected pointers");
  CHECK(lowbit_decode_layer(nullptr, nullptr, nullptr, nullptr) == LOWBIT_INVALID_ARGUMENT, "no layer");
}

void test_refusals() {
  float x[64] = {}, y[64];
  auto refused = [](lowbit_status status, const char* words) {
    CHECK(status == LOWBIT_INVALID_ARGUMENT && std::strstr(lowbit_last_error(), words), "expected \"%s\", got %d: %s",
          words, int(status), lowbit_last_error());
  };
  auto norm = [&](const void* in, const void* residual, const void* weight, float eps, lowbit_dtype dtype,
                  int64_t tokens, int64_t size, int64_t stride, void* sum) {
    return lowbit_rms_norm(in, stride, residual, stride, weight, eps, dtype, tokens, size, sum, stride, y, stride);
  };
  refused(norm(x, nullptr, x, 0, LOWBIT_I32, 1, 8, 8, nullptr), "dtype: expected f32, f16 or bf16, got 3");
  refused(norm(nullptr, nullptr, x, 0, LOWBIT_F32, 1, 8, 8, nullptr), "x: expected a pointer");
  refused(norm(x, nullptr, nullptr, 0, LOWBIT_F32, 1, 8, 8, nullptr), "weight: expected a pointer");
  refused(norm(x, x, x, 0, LOWBIT_F32, 1, 8, 8, nullptr), "sum: expected a pointer");
  refused(norm(x, nullptr, x, NAN, LOWBIT_F32, 1, 8, 8, nullptr), "eps: expected at least 0");
  refused(norm(x, nullptr, x, 0, LOWBIT_F32, 2, 8, 7, nullptr), "x stride: expected at least 8, got 7");
  refused(norm(x, nullptr, x, 0, LOWBIT_F32, 1, 0, 8, nullptr), "size: expected 1 to 2^46, got 0");
  refused(norm(x, nullptr, x, 0, LOWBIT_F32, -1, 8, 8, nullptr), "tokens: expected 0 or more");
  CHECK(norm(nullptr, nullptr, nullptr, 0, LOWBIT_F32, 0, 8, 8, nullptr) == LOWBIT_OK, "no tokens, no pointers");
  CHECK(lowbit_rms_norm(x, 8, x, 8, nullptr, 0, LOWBIT_F32, 1, 8, y, 8, nullptr, 8) == LOWBIT_OK, "the sum alone");
  refused(lowbit_silu_mul(x, 8, nullptr, 8, LOWBIT_F32, 1, 8, y, 8), "up: expected a pointer");
  refused(lowbit_silu_mul(x, 8, x, 8, LOWBIT_F32, int64_t(1) << 45, 8, y, 8), "below 2^46 elements");

  const Shape shape{1, 2, 1, 16, 3, true, false};
  auto attention = [&](auto change) {
    Step step(shape, LOWBIT_F32, Kind::random);
    Elements out(LOWBIT_F32, 32);
    CHECK(step.run(&out) == LOWBIT_OK, "%s", lowbit_last_error());
    change(&step.view);
    return lowbit_decode_attention(&step.view);
  };
  using View = lowbit_decode_step*;
  refused(lowbit_decode_attention(nullptr), "step: expected a pointer");
  refused(attention([](View v) { v->dtype = LOWBIT_I64; }), "dtype");
  refused(attention([](View v) { v->head_size = 24; }), "head_size: expected a multiple of 16 up to 512, got 24");
  refused(attention([](View v) { v->head_size = 528; }), "head_size");
  refused(attention([](View v) { v->kv_heads = 0; }), "heads: expected a multiple of kv_heads (0, at least 1), got 2");
  refused(attention([](View v) { v->heads = 3, v->kv_heads = 2; }), "heads: expected a multiple of kv_heads (2");
  refused(attention([](View v) { v->past = -1; }), "past: expected 0 or more");
  refused(attention([](View v) { v->past = int64_t(1) << 44; }), "past: expected 0 or more, below 2^46");
  refused(attention([](View v) { v->sequences = -1; }), "sequences: expected 0 or more");
  refused(attention([](View v) { v->sequences = 2, v->q_stride = 31; }), "q stride: expected at least 32, got 31");
  refused(attention([](View v) { v->sin = nullptr; }), "cos and sin: expected both or neither");
  refused(attention([](View v) { v->values = nullptr; }), "values: expected a pointer");
  refused(attention([](View v) { v->y = nullptr; }), "y: expected a pointer");
  refused(attention([](View v) { v->kv_heads = 2, v->cache_head_stride = 48; }),
          "keys stride: expected at least 64, got 48");
  CHECK(attention([](View v) { v->sequences = 0, v->q = nullptr; }) == LOWBIT_OK, "no sequences, no pointers");
}

}  // namespace

int main() {
  for (const lowbit_dtype dtype : kDtypes) {
    for (const bool residual : {false, true}) {
      for (const int64_t size : {1, 15, 16, 17, 100, 2048, 2051}) test_rms_norm(dtype, 3, size, residual, false);
      test_rms_norm(dtype, 37, 1024, residual, false);  // enough for several threads
      test_rms_norm(dtype, 2, 131, residual, true);
    }
    for (const int64_t size : {1, 15, 16, 33, 4099}) test_silu_mul(dtype, 3, size);
    test_silu_mul(dtype, 40, 1024);
    for (const Kind kind : {Kind::random, Kind::mean, Kind::argmax}) {
      const bool rotated = kind == Kind::random;
      for (const int64_t past : {0, 1, 15, 31, 127}) {  // with the new one: powers of two, whose mean is exact
        test_attention({1, 4, 2, 16, past, rotated, false}, dtype, kind);
        test_attention({2, 9, 1, 64, past, rotated, true}, dtype, kind);
      }
    }
    for (const int64_t past : {2, 14, 16, 33})
      for (const int64_t heads : {1, 2, 3, 5, 7, 8, 17})
        test_attention({1, 2 * heads, 2, 48, past, true, false}, dtype, Kind::random);
    test_attention({3, 4, 4, 80, 20, true, true}, dtype, Kind::random);    // halves that end within a vector
    test_attention({1, 2, 1, 512, 40, true, false}, dtype, Kind::random);  // the largest head
    test_attention({2, 32, 8, 128, 700, true, false}, dtype, Kind::random);
    test_attention({1, 8, 2, 64, 100, false, false}, dtype, Kind::random);
  }
  for (const lowbit_dtype dtype : kDtypes)
    for (const bool head_norms : {false, true})
      for (const lowbit_activations mode : {LOWBIT_ACT_FLOAT, LOWBIT_ACT_INT8})
        for (const int64_t sequences : {1, 3}) test_layer(dtype, head_norms, mode, sequences);
  for (const auto dtype : {LOWBIT_F32, LOWBIT_BF16})
    for (const int64_t sequences : {1, 3}) test_layers(dtype, sequences);
  test_layer_refusals();
  test_silu_of_no_number();
  test_refusals();
  return check::finish("test_layer");
}
