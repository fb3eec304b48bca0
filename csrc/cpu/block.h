// One block of a row: z and its maximum, exp(z - max) and its sum, the optional sums, the gradient.
// Reads up to kBlock logits (and bias, w), writes z, e, slope to scratch that stays in L1, or e / dx to the
// row. Separate short loops over L1: each option is one loop, not a factor in the number of template
// instances.
#pragma once

#include "args.h"
#include "math.h"

namespace fastloss {
namespace FASTLOSS_ISA {

template <class S>
constexpr S lowest_finite() {
  return sizeof(S) == 4 ? S(-__FLT_MAX__) : S(-__DBL_MAX__);
}

template <class V>
FASTLOSS_INLINE auto max_lanes(V v) {
  auto max = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(max); ++i) max = v[i] > max ? v[i] : max;
  return max;
}

// The factor of a row's logits.
template <class S>
double scale_of(const Logits& l, int64_t row) {
  return l.row_scale ? l.scale * double(static_cast<const S*>(l.row_scale)[row]) : l.scale;
}

// How logits become z. `plain`: z = x. Else z = scale * (x + bias), or outer * tanh((x + bias) / softcap).
template <class T>
struct Transform {
  using S = typename Acc<T>::S;
  bool plain;
  const S* bias;
  S scale, softcap, outer;

  explicit Transform(const Logits& l)
      : plain(!l.bias && l.scale == 1.0 && !(l.softcap > 0)),
        bias(static_cast<const S*>(l.bias)),
        scale(S(l.scale)),
        softcap(l.softcap > 0 ? S(l.softcap) : S(0)),
        outer(S(l.scale * l.softcap)) {}

  // With the row's own scale.
  Transform of_row(const Logits& l, int64_t row) const {
    if (!l.row_scale) return *this;
    Transform mine = *this;
    const double own = scale_of<S>(l, row);
    mine.plain = !l.bias && own == 1.0 && !(l.softcap > 0);
    mine.scale = S(own), mine.outer = S(own * l.softcap);
    return mine;
  }
};

// z of the n logits at x, in `scratch` (or x itself), padded with -inf to whole vectors. `max` starts at the
// lowest finite number, so that a block of only -inf subtracts to -inf and its exponentials are 0.
template <class T, class S = typename Acc<T>::S>
FASTLOSS_INLINE const S* load_block(const Transform<T>& f, const T* x, int64_t start, int64_t n, S* scratch,
                                    S* slope, S* max) {
  using V = typename Lanes<S>::V;
  constexpr int64_t L = Lanes<S>::n;
  V m0 = V{} + lowest_finite<S>(), m1 = m0, m2 = m0, m3 = m0;
  if constexpr (sizeof(T) == sizeof(S)) {
    if (f.plain && n % (4 * L) == 0) {
      for (int64_t i = 0; i < n; i += 4 * L) {
        m0 = max_or_second(load(x + i), m0);
        m1 = max_or_second(load(x + i + L), m1);
        m2 = max_or_second(load(x + i + 2 * L), m2);
        m3 = max_or_second(load(x + i + 3 * L), m3);
      }
      *max = max_lanes(max_or_second(max_or_second(m0, m1), max_or_second(m2, m3)));
      return x;
    }
  }
  const int64_t whole = n - n % L;
  auto each = [&](auto&& z_of) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + 2 * L <= whole; i += 2 * L) {
      const V z0 = z_of(i, load(x + i), L), z1 = z_of(i + L, load(x + i + L), L);
      store(scratch + i, z0);
      store(scratch + i + L, z1);
      m0 = max_or_second(z0, m0);
      m1 = max_or_second(z1, m1);
    }
    for (; i < n; i += L) {
      const int64_t count = n - i < L ? n - i : L;
      store(scratch + i, z_of(i, load_upto(x + i, count), count));
      for (int64_t k = count; k < L; ++k) scratch[i + k] = -S(__builtin_inff());
      m0 = max_or_second(load(scratch + i), m0);
    }
  };
  const S* bias = f.bias ? f.bias + start : nullptr;
  auto biased = [&](int64_t i, V v, int64_t count)
                    __attribute__((always_inline)) { return bias ? v + load_upto(bias + i, count) : v; };
  if (f.plain) {
    each([](int64_t, V v, int64_t) __attribute__((always_inline)) { return v; });
  } else if (f.softcap > 0) {
    each([&](int64_t i, V v, int64_t count) __attribute__((always_inline)) {
      V s;
      const V t = tanh_and_slope<S>(biased(i, v, count) / f.softcap, &s);
      store(slope + i, s);
      return f.outer * t;
    });
  } else {
    each([&](int64_t i, V v, int64_t count)
             __attribute__((always_inline)) { return f.scale * biased(i, v, count); });
  }
  *max = max_lanes(max_or_second(m0, m1));
  return scratch;
}

// e = exp(z - ref), n elements of z padded to whole vectors, e written exactly; the sum in double. e may be
// z. Meanwhile it prefetches the next block, from `next` on, and where the next output goes, unless
// `next_out` is 0: the arithmetic here hides the memory that the next maximum and store would wait for. Both
// may be past the end: a prefetch does not fault.
template <class T, class S = typename Acc<T>::S>
FASTLOSS_INLINE double exp_block(const S* z, int64_t n, S ref, S* e, uintptr_t next, uintptr_t next_out) {
  using V = typename Lanes<S>::V;
  constexpr int64_t L = Lanes<S>::n;
  V s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (unsigned byte = 0; byte < 4 * L * sizeof(T); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(next + i * sizeof(T) + byte));
      if (next_out) __builtin_prefetch(reinterpret_cast<const void*>(next_out + i * sizeof(T) + byte), 1);
    }
    const V e0 = exp_of<T>(load(z + i) - ref), e1 = exp_of<T>(load(z + i + L) - ref);
    const V e2 = exp_of<T>(load(z + i + 2 * L) - ref), e3 = exp_of<T>(load(z + i + 3 * L) - ref);
    store(e + i, e0);
    store(e + i + L, e1);
    store(e + i + 2 * L, e2);
    store(e + i + 3 * L, e3);
    s0 += e0, s1 += e1, s2 += e2, s3 += e3;
  }
  for (; i < n; i += L) {
    const V e0 = exp_of<T>(load(z + i) - ref);
    s0 += e0;
    if (n - i < L) {
      store_n(e + i, e0, n - i);
    } else {
      store(e + i, e0);
    }
  }
  return sum_lanes((s0 + s1) + (s2 + s3));
}

// The largest of n logits, at least the lowest finite number; and exp_block of the logits themselves, whose
// exponentials of every whole 2 W are written with those at even places first. A shorter way for logits that
// are z.
FASTLOSS_INLINE float max_block(const BF16* x, int64_t n) {
  F32V m0 = F32V{} + lowest_finite<float>(), m1 = m0, m2 = m0, m3 = m0, even, odd;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    load_even_odd(x + i, &even, &odd);
    m0 = max_or_second(even, m0), m1 = max_or_second(odd, m1);
    load_even_odd(x + i + 2 * W, &even, &odd);
    m2 = max_or_second(even, m2), m3 = max_or_second(odd, m3);
  }
  float max = max_lanes(max_or_second(max_or_second(m0, m1), max_or_second(m2, m3)));
  for (; i < n; ++i) {
    const float one = bit_cast<float>(uint32_t(x[i].bits) << 16);
    max = one > max ? one : max;
  }
  return max;
}

FASTLOSS_INLINE double exp_even_odd(const BF16* x, int64_t n, float ref, float* e, uintptr_t next,
                                    uintptr_t next_out) {
  F32V s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (unsigned byte = 0; byte < 4 * W * sizeof(BF16); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(next + i * sizeof(BF16) + byte));
      if (next_out) __builtin_prefetch(reinterpret_cast<const void*>(next_out + i * sizeof(BF16) + byte), 1);
    }
    F32V z0, z1, z2, z3;
    load_even_odd(x + i, &z0, &z1), load_even_odd(x + i + 2 * W, &z2, &z3);
    const F32V e0 = exp_short(z0 - ref), e1 = exp_short(z1 - ref);
    const F32V e2 = exp_short(z2 - ref), e3 = exp_short(z3 - ref);
    store(e + i, e0), store(e + i + W, e1), store(e + i + 2 * W, e2), store(e + i + 3 * W, e3);
    s0 += e0, s1 += e1, s2 += e2, s3 += e3;
  }
  for (; i + 2 * W <= n; i += 2 * W) {
    F32V z0, z1;
    load_even_odd(x + i, &z0, &z1);
    const F32V e0 = exp_short(z0 - ref), e1 = exp_short(z1 - ref);
    store(e + i, e0), store(e + i + W, e1);
    s0 += e0, s1 += e1;
  }
  double sum = sum_lanes((s0 + s1) + (s2 + s3));
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    const F32V rest = exp_short(load_n(x + i, count) - ref);
    store_n(e + i, rest, count);
    for (int64_t k = 0; k < count; ++k) sum += rest[k];
  }
  return sum;
}

// z in the order of exp_even_odd's exponentials, padded with -inf to whole vectors.
FASTLOSS_INLINE void widen_even_odd(const BF16* x, int64_t n, float* z) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    F32V even, odd;
    load_even_odd(x + i, &even, &odd);
    store(z + i, even), store(z + i + W, odd);
  }
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    store(z + i, load_n(x + i, count));
    for (int64_t k = count; k < W; ++k) z[i + k] = -__builtin_inff();
  }
}

// out = factor · e + d from what exp_even_odd wrote.
FASTLOSS_INLINE void write_even_odd(BF16* out, const float* e, int64_t n, float factor, float d) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    store_even_odd(out + i, factor * load(e + i) + d, factor * load(e + i + W) + d);
  }
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    store_n(out + i, factor * load_n(e + i, count) + d, count);
  }
}

// Σ e·(z - ref) with 0·(-inf) = 0; z is padded to whole vectors, e is not.
template <class S>
FASTLOSS_INLINE double entropy_block(const S* z, const S* e, int64_t n, S ref) {
  using V = typename Lanes<S>::V;
  constexpr int64_t L = Lanes<S>::n;
  V s0{}, s1{};
  auto term = [&](V ei, V zi) __attribute__((always_inline)) { return ei == S(0) ? V{} : ei * (zi - ref); };
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    s0 += term(load(e + i), load(z + i));
    s1 += term(load(e + i + L), load(z + i + L));
  }
  for (; i < n; i += L) {
    const V ei = load_upto(e + i, n - i);
    s0 += term(ei, load(z + i));
  }
  return sum_lanes(s0 + s1);
}

template <class S>
FASTLOSS_INLINE double square_block(const S* e, int64_t n) {
  using V = typename Lanes<S>::V;
  constexpr int64_t L = Lanes<S>::n;
  V s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const V e0 = load(e + i), e1 = load(e + i + L);
    s0 += e0 * e0, s1 += e1 * e1;
  }
  for (; i < n; i += L) {
    const V e0 = load_upto(e + i, n - i);
    s0 += e0 * e0;
  }
  return sum_lanes(s0 + s1);
}

// Σ (v - origin), in double lanes: the mean of logits near 0 is a small difference of large sums.
template <class S>
FASTLOSS_INLINE double sum_block(const S* v, int64_t n, double origin = 0) {
  constexpr int64_t H = W / 2;
  F64V s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * H <= n; i += 2 * H) s0 += widen(v + i) - origin, s1 += widen(v + i + H) - origin;
  double sum = sum_lanes(s0 + s1);
  for (; i < n; ++i) sum += v[i] - origin;
  return sum;
}

// Σ w (z - origin).
template <class S>
FASTLOSS_INLINE double dot_block(const S* w, const S* z, int64_t n, double origin = 0) {
  constexpr int64_t H = W / 2;
  F64V s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * H <= n; i += 2 * H)
    s0 += widen(w + i) * (widen(z + i) - origin), s1 += widen(w + i + H) * (widen(z + i + H) - origin);
  double sum = sum_lanes(s0 + s1);
  for (; i < n; ++i) sum += double(w[i]) * (z[i] - origin);
  return sum;
}

// out[i] = value(i) rounded to T; value(i, count) may read `count` elements from i on.
template <class T, class Value, class S = typename Acc<T>::S>
FASTLOSS_INLINE void write_block(T* out, int64_t n, Value&& value) {
  constexpr int64_t L = Lanes<S>::n;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const auto g0 = value(i, L), g1 = value(i + L, L);
    store_two(out + i, g0, g1);
  }
  for (; i < n; i += L) {
    const int64_t count = n - i < L ? n - i : L;
    if (count == L) {
      store(out + i, value(i, L));
    } else {
      store_n(out + i, value(i, count), count);
    }
  }
}

// dx = (main(i) + d·w) · slope for the combinations that occur. w may be null (1), slope may be null (1).
template <class T, class Main, class S = typename Acc<T>::S>
FASTLOSS_INLINE void gradient_block(T* out, int64_t n, S d, const S* w, const S* slope, Main&& main) {
  using V = typename Lanes<S>::V;
  if (!slope && d == S(0)) {  // d·w = 0 for every finite w; a NaN d compares unequal
    write_block(out, n, main);
  } else if (!slope && !w) {
    write_block(out, n,
                [&](int64_t i, int64_t c) __attribute__((always_inline)) { return V(main(i, c) + d); });
  } else {
    write_block(out, n, [&](int64_t i, int64_t c) __attribute__((always_inline)) {
      V g = main(i, c);
      g += w ? d * load_upto(w + i, c) : V{} + d;
      return slope ? V(g * load_upto(slope + i, c)) : g;
    });
  }
}

// b·p + c·p·log p with p = exp((z - ref) - rest), ref + rest = lse, 0·(-inf) = 0. z is padded to whole
// vectors.
template <class T, bool kC, class S, class V = typename Lanes<S>::V>
FASTLOSS_INLINE V gradient_from_z(const S* z, S ref, S rest, S b, S c) {
  const V log_p = (load(z) - ref) - rest;
  const V p = exp_of<T>(min_or_second(V{} + ExpConstants<S>::highest, log_p));
  if (!kC) return b * p;
  const V g = p * (b + c * log_p);
  return p == S(0) ? V{} : g;
}

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
