// The vector type, the tiles and the kernels on top of them, compiled into one program for one instruction
// set without Python or PyTorch, against plain double arithmetic: so they can run under an emulator of
// another processor. Built and run by tests/kernels/test_vector_source.py. Prints what is wrong; returns how
// much. Bounds are those of the roundings: u = 2^-24 for a float32 operation (bfmmla rounds to odd: 2u), half
// a unit in the last place for a conversion.

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/amx.h"
#include "cpu/args.h"
#include "cpu/gemm.h"
#include "cpu/lane_sums.h"
#include "cpu/vocab_blocks.cpp"  // its conversions

namespace fastloss {
namespace FASTLOSS_ISA {
extern const Kernels kernels;
extern const GemmKernel gemm_bf16;
extern const HeadKernels head_kernels;
}  // namespace FASTLOSS_ISA
}  // namespace fastloss

#define FASTLOSS_TEXT_OF(name) #name
#define FASTLOSS_TEXT(name) FASTLOSS_TEXT_OF(name)

namespace {

using namespace fastloss;
using namespace fastloss::FASTLOSS_ISA;

int failures = 0;

__attribute__((format(printf, 2, 3))) void expect(bool is_so, const char* format, ...) {
  if (is_so) return;
  if (++failures > 40) return;
  va_list arguments;
  va_start(arguments, format);
  vprintf(format, arguments);
  va_end(arguments);
  printf("\n");
}

constexpr double kInf = std::numeric_limits<double>::infinity();
std::mt19937_64 generator(1);
double normal() { return std::normal_distribution<double>()(generator); }
bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// --- scalar references

struct Format {
  int digits, least_exponent;  // of the significand; of the least normal number
  double largest;
};
constexpr Format kBf16 = {8, -126, 0x1.fep127}, kF16 = {11, -14, 65504.0};

// To nearest, ties to even.
double rounded(double x, Format f) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);  // x = m 2^exponent, m in [1/2, 1)
  const int unit = std::max(exponent - f.digits, f.least_exponent - f.digits + 1);
  const double y = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return std::abs(y) > f.largest ? std::copysign(kInf, x) : y;
}

double value_of(BF16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
double value_of(F16 x) {
  const int exponent = x.bits >> 10 & 31, digits = x.bits & 1023;
  const double sign = x.bits >> 15 ? -1.0 : 1.0;
  if (exponent == 31) return digits ? NAN : sign * kInf;
  return sign * (exponent ? std::ldexp(1024 + digits, exponent - 25) : std::ldexp(digits, -24));
}
double value_of(float x) { return x; }
double value_of(double x) { return x; }

template <class T>
Format format_of();
template <>
Format format_of<BF16>() {
  return kBf16;
}
template <>
Format format_of<F16>() {
  return kF16;
}

// --- the vector type

std::vector<float> odd_floats() {
  std::vector<float> x = {
      0.0f,         -0.0f,         1.0f,        -1.0f,           INFINITY,     -INFINITY,    NAN,
      -NAN,         65519.9f,      65520.0f,    -65520.0f,       65536.0f,     0x1p-24f,     0x1p-25f,
      0x1.8p-25f,   0x1.8p-24f,    0x1p-14f,    0x1.ffcp-15f,    0x1.ffep-15f, 0x1.fffp-15f, __FLT_MAX__,
      -__FLT_MAX__, 0x1.fep127f,   0x1.ffp127f, 0x1.fefffep127f, __FLT_MIN__,  1e-45f,       0x1.01p0f,
      0x1.03p0f,    0x1.010002p0f, 0x1.002p0f,  0x1.006p0f,      0x1.002002p0f};
  for (int i = 0; i < 200000; ++i) x.push_back(bit_cast<float>(uint32_t(generator())));
  for (int i = 0; i < 20000; ++i) x.push_back(float(std::ldexp(normal(), int(generator() % 40) - 28)));
  while (x.size() % (2 * W)) x.push_back(1.0f);
  return x;
}

template <class T>
void check_conversions(const char* name) {
  const Format f = format_of<T>();
  std::vector<T> all(65536);
  for (int i = 0; i < 65536; ++i) all[i].bits = uint16_t(i);
  for (int i = 0; i < 65536; i += W) {
    float wide[W];
    store(wide, load(&all[i]));
    for (int k = 0; k < W; ++k) expect(same(wide[k], value_of(all[i + k])), "%s: load of %#x", name, i + k);
  }
  const std::vector<float> x = odd_floats();
  std::vector<T> one(x.size()), two(x.size());
  for (size_t i = 0; i < x.size(); i += W) store(&one[i], load(&x[i]));
  for (size_t i = 0; i < x.size(); i += 2 * W) store_two(&two[i], load(&x[i]), load(&x[i + W]));
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = rounded(x[i], f);
    const bool same_sign = std::isnan(want) || std::signbit(value_of(one[i])) == std::signbit(want);
    expect(same(value_of(one[i]), want) && same_sign, "%s: store of %a gives %a", name, x[i],
           value_of(one[i]));
    expect(one[i].bits == two[i].bits, "%s: store_two of %a gives another", name, x[i]);
  }
  T some[W];
  for (int count = 1; count <= W; ++count) {
    std::memset(some, 0x55, sizeof some);
    store_n(some, load(&x[100]), count);
    for (int k = 0; k < W; ++k) {
      expect(k < count ? some[k].bits == one[100 + k].bits : some[k].bits == 0x5555, "%s: store_n", name);
    }
    float wide[W];
    store(wide, load_n(&one[100], count));
    for (int k = 0; k < W; ++k) {
      expect(same(wide[k], k < count ? value_of(one[100 + k]) : 0.0), "%s: load_n", name);
    }
  }
  store_one(some, 0x1.006p0f);
  expect(value_of(some[0]) == rounded(0x1.006p0f, f), "%s: store_one", name);
}

// The roundings that the head takes where the processor has an instruction for them. AVX512_BF16 makes 0 of
// subnormal numbers.
template <class R>
void check_native_rounding() {
  const std::vector<float> x = odd_floats();
  for (size_t i = 0; i < x.size(); i += 2 * W) {
    BF16 got[2 * W];
    float alone[W];
    R::round_two(got, load(&x[i]), load(&x[i + W]));
    store(alone, R::rounded(load(&x[i])));
    for (int k = 0; k < 2 * W; ++k) {
      const double want = rounded(x[i + k], kBf16);
      const bool is_tiny = std::abs(x[i + k]) < __FLT_MIN__;
      expect(same(value_of(got[k]), want) || (is_tiny && value_of(got[k]) == 0), "native rounding of %a: %a",
             x[i + k], value_of(got[k]));
      if (k < W)
        expect(same(alone[k], value_of(got[k])), "native rounding of %a alone: %a", x[i + k], alone[k]);
    }
  }
}

template <class S>
void check_lanes() {
  typedef typename Lanes<S>::V V;
  typedef typename Lanes<S>::U U;
  constexpr int L = Lanes<S>::n;
  const S nan = std::numeric_limits<S>::quiet_NaN();
  const S edge[] = {0, -1, 3, S(kInf), S(-kInf), nan, std::numeric_limits<S>::max(), S(1e-30)};
  for (const S a : edge) {
    for (const S b : edge) {
      S high[L], low[L];
      store(high, max_or_second(V{} + a, V{} + b)), store(low, min_or_second(V{} + a, V{} + b));
      for (int k = 0; k < L; ++k) {
        expect(same(high[k], a > b ? a : b), "max_or_second(%g, %g) = %g", double(a), double(b),
               double(high[k]));
        expect(same(low[k], a < b ? a : b), "min_or_second(%g, %g) = %g", double(a), double(b),
               double(low[k]));
      }
    }
  }
  uint8_t bytes[L];
  S x[L];
  double sum = 0;
  for (int k = 0; k < L; ++k) bytes[k] = uint8_t(250 - 17 * k), x[k] = S(k * k - 5), sum += x[k];
  const U wide = widen_bytes<U>(bytes);
  for (int k = 0; k < L; ++k) expect(wide[k] == bytes[k], "widen_bytes: lane %d", k);
  const V v = load(x);
  expect(sum_lanes(v) == sum, "sum_lanes");
  expect(max_lanes(v) == x[L - 1], "max_lanes");
  expect(!any_lane(v != v), "any_lane of none");
  for (int k = 0; k < L; ++k) {
    V one = v;
    one[k] = nan;
    expect(any_lane(one != one), "any_lane of lane %d", k);
    const auto unequal = one != one;
    for (int j = 0; j < L; ++j) expect((unequal[j] != 0) == (j == k), "a mask's lane %d", j);
  }
  S many[3 * kBlock / 2];
  double total = 0, dot = 0, squares = 0, magnitude = 0;
  const int64_t n = 3 * kBlock / 2 - 3;
  for (int64_t i = 0; i < n; ++i) {
    many[i] = S(normal());
    total += many[i], dot += double(many[i]) * (many[i] - 0.5), squares += double(many[i]) * many[i];
    magnitude += std::abs(many[i]);
  }
  expect(std::abs(sum_block(many, n) - total) < 1e-12 * magnitude, "sum_block");
  expect(std::abs(dot_block(many, many, n, 0.5) - dot) < 1e-12 * (dot + magnitude), "dot_block");
  // Each lane adds n / (2 L) squares in S.
  const double u = std::numeric_limits<S>::epsilon() / 2;
  expect(std::abs(square_block(many, n) - squares) < (double(n) / (2 * L) + 2) * u * squares, "square_block");
  Sum<S> sums;
  for (int i = 0; i < 3; ++i) sums += v, sums.flush();
  expect(sums.total() == 3 * sum, "Sum");
}

template <class S>
void check_exponentials() {
  typedef typename Lanes<S>::V V;
  constexpr int L = Lanes<S>::n;
  typedef long double Exact;
  const double ulps = sizeof(S) == 8           ? 2.5
                      : FASTLOSS_CHECK_HAS_FMA ? 1.1
                                               : 1.5,
               lowest = ExpConstants<S>::lowest;
  double worst = 0, worst_tanh = 0, worst_slope = 0;
  for (int i = 0; i < 40000; i += L) {
    S x[L], e[L], any[L], t[L], slope[L];
    for (int k = 0; k < L; ++k) x[k] = S(lowest * 0.99 * (i + k) / 40000 * ((i + k) % 3 ? 1 : 0.01));
    V s;
    store(e, exp_nonpositive<S>(load(x))), store(any, exp_any<S>(-load(x)));
    store(t, tanh_and_slope<S>(load(x) * S(0.1), &s)), store(slope, s);
    for (int k = 0; k < L; ++k) {
      const auto unit = [](Exact y) {
        return std::ldexp(1.0, std::ilogb(y) - std::numeric_limits<S>::digits + 1);
      };
      const Exact want = std::exp(Exact(x[k])), up = std::exp(-Exact(x[k])), y = Exact(x[k] * S(0.1));
      worst = std::max(worst, double(std::abs(e[k] - want) / unit(want)));
      worst = std::max(worst, double(std::abs(any[k] - up) / unit(up)));
      if (y == 0) continue;
      const Exact tanh = std::tanh(y), q = std::exp(-2 * std::abs(y)), d = 4 * q / ((1 + q) * (1 + q));
      worst_tanh = std::max(worst_tanh, double(std::abs(t[k] - tanh) / unit(tanh)));
      worst_slope = std::max(worst_slope, double(std::abs(slope[k] - d) / d));
    }
  }
  expect(worst < ulps, "exp: %g ulp", worst);
  expect(worst_tanh < (sizeof(S) == 8 ? 6 : 3), "tanh: %g ulp", worst_tanh);
  expect(worst_slope < 16 * double(std::numeric_limits<S>::epsilon()), "slope of tanh: %g", worst_slope);
  const S nan = std::numeric_limits<S>::quiet_NaN();
  const auto exp_at = [](S x) { return exp_nonpositive<S>(V{} + x)[0]; };
  expect(
      exp_at(S(-kInf)) == 0 && exp_at(S(lowest * 1.01)) == 0 && exp_at(-std::numeric_limits<S>::max()) == 0,
      "exp far below");
  expect(std::isnan(exp_at(nan)) && exp_at(0) == 1 && exp_at(S(-0.0)) == 1, "exp of NaN and 0");
  V s;
  const S edges[] = {0, S(-0.0), S(kInf), S(-kInf), nan}, want[] = {0, S(-0.0), 1, -1, nan};
  for (int i = 0; i < 5; ++i)
    expect(same(tanh_and_slope<S>(V{} + edges[i], &s)[0], want[i]), "tanh of edge %d", i);
}

// The exponential of bfloat16 and float16: its bound over every FASTLOSS_CHECK_STRIDE-th float from -87 to 0.
void check_short_exponentials() {
  constexpr int64_t stride = FASTLOSS_CHECK_STRIDE;
  const uint32_t first = bit_cast<uint32_t>(-0x1p-40f), last = bit_cast<uint32_t>(-87.0f);
  double worst = 0;
  for (int64_t bits = first; bits <= int64_t(last); bits += stride * W) {
    float x[W], e[W];
    for (int k = 0; k < W; ++k) x[k] = bit_cast<float>(uint32_t(std::min(int64_t(last), bits + k * stride)));
    store(e, exp_short(load(x)));
    for (int k = 0; k < W; ++k) {
      const double want = std::exp(double(x[k]));
      worst = std::max(worst, std::abs(e[k] / want - 1) / (1.6e-7 + 2.8e-9 * -double(x[k])));
    }
  }
  expect(worst < (FASTLOSS_CHECK_HAS_FMA ? 1.0 : 1.6), "exp_short: %g of its bound", worst);
  const auto exp_at = [](float x) { return exp_short(F32V{} + x)[0]; };
  expect(exp_at(0.0f) == 1 && exp_at(-0.0f) == 1 && std::isnan(exp_at(NAN)), "exp_short of 0 and NaN");
  expect(exp_at(-INFINITY) == 0 && exp_at(-88.1f) == 0 && exp_at(-__FLT_MAX__) == 0, "exp_short far below");
}

void check_even_odd() {
  const std::vector<float> x = odd_floats();
  for (size_t i = 0; i < x.size(); i += 2 * W) {
    BF16 plain[2 * W], apart[2 * W];
    store(plain, load(&x[i])), store(plain + W, load(&x[i + W]));
    F32V even, odd;
    load_even_odd(plain, &even, &odd);
    for (int k = 0; k < W; ++k) {
      expect(same(even[k], value_of(plain[2 * k])) && same(odd[k], value_of(plain[2 * k + 1])),
             "load_even_odd");
      even[k] = x[i + 2 * k], odd[k] = x[i + 2 * k + 1];
    }
    store_even_odd(apart, even, odd);
    expect(!std::memcmp(apart, plain, sizeof plain), "store_even_odd");
  }
  for (const int64_t n : {int64_t(1), int64_t(W), int64_t(2 * W), int64_t(6 * W + 3), kBlock}) {
    BF16 z[kBlock];
    for (int64_t i = 0; i < n; ++i) store_one(&z[i], float(3 * normal()));
    double max = -kInf;
    for (int64_t i = 0; i < n; ++i) max = std::max(max, value_of(z[i]));
    expect(max_block(z, n) == max, "max_block of %d", int(n));
    for (int64_t i = 0; i < n; ++i) store_one(&z[i], -INFINITY);
    expect(max_block(z, n) == -__FLT_MAX__, "max_block of -inf");
  }
}

// --- tiles

template <class Op, class T>
struct Product {
  static constexpr int64_t P = Op::kPanel;
  typedef typename Op::Unit Unit;
  int64_t m, n, k;
  std::vector<T> a, b;
  std::vector<double> want, bound;

  // Rows of C at most one vector apart; bounds count the roundings of products and sums.
  Product(int64_t m_, int64_t n_, int64_t k_, bool accumulate) : m(m_), n(n_), k(k_), a(m * k), b(n * k) {
    for (T& x : a) store_one(&x, float(normal()));
    for (T& x : b) store_one(&x, float(normal()));
    want.resize(m * n), bound.resize(m * n);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = accumulate ? 3.0 : 0.0, size = sum;
        for (int64_t q = 0; q < k; ++q) {
          const double p = value_of(a[i * k + q]) * value_of(b[j * k + q]);
          sum += p, size += std::abs(p);
        }
        want[i * n + j] = sum, bound[i * n + j] = double(2 * k + 4) * 0x1p-23 * size;
      }
    }
  }

  void compare(const std::vector<float>& c, int64_t stride, const char* what) const {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const double error = std::abs(c[i * stride + j] - want[i * n + j]);
        expect(error <= bound[i * n + j], "%s [%d, %d] over %d: C[%d, %d] = %g, not %g", what, int(m), int(n),
               int(k), int(i), int(j), c[i * stride + j], want[i * n + j]);
      }
      for (int64_t j = n; j < stride; ++j) expect(c[i * stride + j] == 3, "%s: beyond C's row", what);
    }
  }
};

// Op's multiply, with A by rows and by columns, B packed each way.
template <class Op, class T>
void check_tiles(const char* name) {
  typedef typename Op::Unit Unit;
  constexpr int64_t P = Op::kPanel, E = Op::kElements;
  const int64_t sizes[][3] = {{1, 1, E},           {2, 3, 3 * E},           {6, P, 10 * E},
                              {7, P + 1, 129 * E}, {13, 2 * P - 1, 64 * E}, {19, 3 * P, 7 * E},
                              {6, 2 * P, 31 * E}};
  for (const auto& size : sizes) {
    for (const bool accumulate : {false, true}) {
      const Product<Op, T> p(size[0], size[1], size[2], accumulate);
      const int64_t m = p.m, n = p.n, k = p.k, units = units_of<Op>(k), panels = (n + P - 1) / P,
                    stride = n + 2;
      std::vector<Unit> packed(panels * units * P + 64, Unit(77));
      for (int64_t j = 0; j < n; j += P) {
        const auto row = [&](int64_t i) { return &p.b[std::min(j + i, n - 1) * k]; };
        pack_transposed<Op, T>(row, std::min(P, n - j), k, &packed[j * units]);
      }
      std::vector<Unit> rows(m * units);
      for (int64_t i = 0; i < m; ++i) std::memcpy(&rows[i * units], &p.a[i * k], k * sizeof(T));
      std::vector<float> c(m * stride, 3.0f);
      multiply<Op, false>(
          m, n, units, [&](int64_t i) { return &rows[i * units]; }, 1, packed.data(), units * P,
          [&](int64_t i) { return &c[i * stride]; }, accumulate);
      p.compare(c, stride, name);
      // A token's bits do not depend on its place in a tile.
      for (int64_t i = 0; i < m; ++i) {
        std::vector<float> alone(stride, 3.0f);
        multiply<Op, false>(
            1, n, units, [&](int64_t) { return &rows[i * units]; }, 1, packed.data(), units * P,
            [&](int64_t) { return alone.data(); }, accumulate);
        expect(!std::memcmp(alone.data(), &c[i * stride], stride * sizeof(float)), "%s: row %d alone", name,
               int(i));
      }
      // B as k rows of n columns, in two ways; A as k rows of m columns.
      std::vector<T> b_rows(k * n), a_rows(k * m);
      for (int64_t q = 0; q < k; ++q) {
        for (int64_t j = 0; j < n; ++j) b_rows[q * n + j] = p.b[j * k + q];
        for (int64_t i = 0; i < m; ++i) a_rows[q * m + i] = p.a[i * k + q];
      }
      std::vector<Unit> packed_too(packed.size(), Unit(77)), packed_rows(packed.size(), Unit(77));
      const auto b_row = [&](int64_t q) { return &b_rows[q * n]; };
      pack_matrix<Op, T>(b_row, n, k, 0, units, packed_too.data(), units * P);
      for (int64_t j = 0; j < n; j += P) {
        pack_rows<Op, T>([&](int64_t q) { return b_row(q) + j; }, std::min(P, n - j), k,
                         &packed_rows[j * units], P);
      }
      const size_t bytes = panels * units * P * sizeof(Unit);
      expect(!std::memcmp(packed.data(), packed_too.data(), bytes), "%s: pack_matrix", name);
      expect(!std::memcmp(packed.data(), packed_rows.data(), bytes), "%s: pack_rows", name);
      const int64_t wide = round_up(m, 48);
      std::vector<Unit> columns(units * wide + 64);
      pack_rows<Op, T>([&](int64_t q) { return &a_rows[q * m]; }, m, k, columns.data(), wide);
      std::vector<float> by_columns(m * stride, 3.0f);
      multiply<Op, true>(
          m, n, units, [&](int64_t i) { return &columns[i]; }, wide, packed.data(), units * P,
          [&](int64_t i) { return &by_columns[i * stride]; }, accumulate);
      p.compare(by_columns, stride, name);
    }
  }
}

void check_gemm(bool tiles) {
  for (const int64_t k : {1, 2, 33, 70}) {
    for (const bool accumulate : {false, true}) {
      const Product<BFloat16Pairs, BF16> p(51, 37, k, accumulate);
      std::vector<BF16> a(k * p.m), b(k * p.n);
      for (int64_t q = 0; q < k; ++q) {
        for (int64_t i = 0; i < p.m; ++i) a[q * p.m + i] = p.a[i * k + q];
        for (int64_t j = 0; j < p.n; ++j) b[q * p.n + j] = p.b[j * k + q];
      }
      std::vector<float> c(p.m * p.n, 3.0f);
      const Gemm g = {&a[0].bits, p.m, &b[0].bits, p.n, c.data(), p.n, p.m, p.n, k, accumulate, tiles, tiles};
      std::vector<char> scratch(gemm_bf16.scratch_bytes(g, 1) + 64);
      gemm_bf16.run(g, 1, reinterpret_cast<void*>((uintptr_t(scratch.data()) + 63) / 64 * 64));
      p.compare(c, p.n, tiles ? "gemm in tiles" : "gemm");
    }
  }
}

// --- rows

struct Scored {
  double lse, entropy, logp;
  std::vector<double> p;
};
Scored score(const std::vector<double>& z, int64_t target) {
  double max = -kInf, sum = 0;
  for (const double v : z) max = std::max(max, v);
  for (const double v : z) sum += std::exp(v - max);
  Scored s{max + std::log(sum), 0, 0, {}};
  for (const double v : z) {
    s.p.push_back(std::exp(v - s.lse));
    if (s.p.back() > 0) s.entropy -= s.p.back() * (v - s.lse);
  }
  s.logp = z[target] - s.lse;
  return s;
}

template <class T>
void check_rows(const char* name, int dtype, double unit, bool formed) {
  using S = typename Acc<T>::S;
  const double u = std::numeric_limits<S>::epsilon();
  for (const int64_t vocab : {1, 5, 64, 2048, 5003}) {
    constexpr int64_t rows = 3;
    const double scale = formed ? 0.7 : 1.0, cap = formed ? 4.0 : 0.0, factor = 0.25;
    std::vector<T> x(rows * vocab), grad(rows * vocab);
    std::vector<S> bias(vocab), loss(rows), lse(rows), entropy(rows);
    std::vector<int64_t> target(rows);
    for (T& v : x) store_one(&v, S(3 * normal()));
    for (S& v : bias) v = S(normal());
    for (int64_t& t : target) t = int64_t(generator() % uint64_t(vocab));
    if (vocab > 5 && target[0] != 2) store_one(&x[2], S(-kInf));
    const Logits l = {x.data(), dtype,         rows,   vocab,
                      vocab,    target.data(), -100,   formed ? bias.data() : nullptr,
                      scale,    cap,           nullptr};
    Stats s = {};
    s.loss = loss.data(), s.logsumexp = lse.data(), s.entropy = entropy.data();
    const CrossEntropy c = {nullptr, 0, {1, 0, 0}, factor, grad.data(), vocab};
    std::vector<char> scratch(kernels.scratch_bytes(l, true) + 64);
    kernels.row_cross_entropy(l, c, s, 0, rows,
                              reinterpret_cast<void*>((uintptr_t(scratch.data()) + 63) / 64 * 64));
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<double> z(vocab), slope(vocab, scale);
      for (int64_t i = 0; i < vocab; ++i) {
        const double v = value_of(x[row * vocab + i]) + (formed ? double(bias[i]) : 0.0),
                     t = std::tanh(v / cap);
        z[i] = formed ? scale * cap * t : v;
        if (formed) slope[i] = scale * (1 - t * t);
      }
      const Scored want = score(z, target[row]);
      const double size = 30 * u * (1 + std::abs(want.lse));
      expect(std::abs(lse[row] - want.lse) <= size, "%s: lse %g, not %g", name, double(lse[row]), want.lse);
      expect(std::abs(loss[row] + want.logp) <= 2 * size, "%s: loss %g, not %g", name, double(loss[row]),
             -want.logp);
      expect(std::abs(entropy[row] - want.entropy) <= 2 * size, "%s: entropy %g, not %g", name,
             double(entropy[row]), want.entropy);
      for (int64_t i = 0; i < vocab; ++i) {
        const double g = factor * slope[i] * (want.p[i] - (i == target[row])),
                     got = value_of(grad[row * vocab + i]);
        const double tiny = dtype == kFloat16 ? 0x1p-25 : 0;
        const double of_slope = formed ? 16 * u * std::abs(g) : 0;
        expect(std::abs(got - g) <=
                   unit * std::abs(g) + of_slope + 60 * u * factor * want.p[i] + 60 * u * u + tiny,
               "%s: gradient %g, not %g", name, got, g);
      }
    }
  }
}

// --- the head

template <class T>
void check_head(const char* name, bool pairs, bool tiles, bool rounds_natively) {
  constexpr int64_t rows = 101, dim = 66, vocab = 517;
  constexpr bool narrow = sizeof(T) == 2;
  std::vector<T> hidden(rows * dim), weight(vocab * dim), d_weight(vocab * dim);
  for (T& v : hidden) store_one(&v, float(normal()));
  for (T& v : weight) store_one(&v, float(2 * normal() / std::sqrt(double(dim))));
  std::vector<int64_t> target(rows);
  for (int64_t& t : target) t = int64_t(generator() % vocab);
  std::vector<float> loss(rows), lse(rows), entropy(rows), d_hidden(rows * dim),
      origins((vocab / kSegment + 1) * rows);
  std::vector<RowState> state(rows);
  HeadCall c{};
  c.logits = {nullptr, narrow ? kBFloat16 : kFloat32, rows, vocab, 0, target.data(), -100, nullptr, 1.0, 0.0,
              nullptr};
  c.ce.terms = {1, 0, 0}, c.ce.grad_scale = 0.5;
  c.stats.loss = loss.data(), c.stats.logsumexp = lse.data(), c.stats.entropy = entropy.data();
  c.state = state.data(), c.dim = dim, c.hidden = hidden.data(), c.hidden_stride = dim,
  c.hidden_dtype = c.logits.dtype;
  c.weight = weight.data(), c.weight_stride = dim, c.weight_dtype = c.logits.dtype,
  c.d_weight = d_weight.data();
  c.stored = 40, c.origins = origins.data(), c.d_hidden = d_hidden.data(), c.split = rows, c.width = 128;
  c.pairs = pairs, c.tiles = tiles, c.emulate = tiles, c.rounds_natively = rounds_natively;
  std::vector<char> scratch(head_kernels.scratch_bytes(c, 1) + 64);
  head_kernels.run(c, reinterpret_cast<void*>((uintptr_t(scratch.data()) + 63) / 64 * 64), 0, 1);

  // As tests/kernels/test_cpu_head.py compares: a logit on the edge of two roundings may take the other one.
  std::vector<double> want_hidden(rows * dim), want_weight(vocab * dim);
  const double rounding = 2 * (narrow ? 0x1p-8 : 2e-6);
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> z(vocab);
    for (int64_t v = 0; v < vocab; ++v) {
      for (int64_t k = 0; k < dim; ++k)
        z[v] += value_of(hidden[row * dim + k]) * value_of(weight[v * dim + k]);
    }
    const Scored want = score(z, target[row]);
    const double size = 2e-6 * (1 + std::abs(want.lse));  // statistics are of float32 logits
    expect(std::abs(lse[row] - want.lse) <= size, "%s: lse %g, not %g", name, lse[row], want.lse);
    expect(std::abs(loss[row] + want.logp) <= 2 * size, "%s: loss %g, not %g", name, loss[row], -want.logp);
    expect(std::abs(entropy[row] - want.entropy) <= 4 * size, "%s: entropy %g, not %g", name, entropy[row],
           want.entropy);
    for (int64_t v = 0; v < vocab; ++v) {
      double dz = 0.5 * (want.p[v] - (v == target[row]));
      if (narrow) dz = rounded(dz, kBf16);
      for (int64_t k = 0; k < dim; ++k) {
        want_hidden[row * dim + k] += dz * value_of(weight[v * dim + k]);
        want_weight[v * dim + k] += dz * value_of(hidden[row * dim + k]);
      }
    }
  }
  const auto compare = [&](const std::vector<double>& want, auto&& got, const char* what) {
    double largest = 0, error = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      largest = std::max(largest, std::abs(want[i])),
      error = std::max(error, std::abs(value_of(got[i]) - want[i]));
    }
    expect(error <= rounding * largest, "%s: %s errs by %g of %g", name, what, error, largest);
  };
  compare(want_hidden, d_hidden, "d hidden");
  compare(want_weight, d_weight, "d weight");
}

}  // namespace

int main() {
  check_conversions<BF16>("bfloat16");
  check_conversions<F16>("float16");
  check_native_rounding<Rounding<BF16, false>>();
#if defined(FASTLOSS_NEON_BF16)
  check_native_rounding<Rounding<BF16, true>>();
#endif
  check_lanes<float>();
  check_lanes<double>();
  check_exponentials<float>();
  check_exponentials<double>();
  check_short_exponentials();
  check_even_odd();
  check_tiles<FloatUnits, float>("tiles of floats");
#if !defined(FASTLOSS_CHECK_NO_PAIRS)  // AVX-512 without AVX512_BF16
  check_tiles<BFloat16Pairs, BF16>("tiles of pairs");
  check_gemm(false);
  check_head<BF16>("head of pairs", true, false, false);
#endif
#if defined(FASTLOSS_NEON_BF16)
  check_head<BF16>("head of pairs, rounded by the processor", true, false, true);
#endif
  check_gemm(true);
  check_head<BF16>("head of tiles", true, true, false);
  check_head<BF16>("head of bfloat16", false, false, false);
  check_head<float>("head of floats", false, false, false);
  for (const bool formed : {false, true}) {
    check_rows<float>("rows of float32", kFloat32, 0x1p-24, formed);
    check_rows<double>("rows of float64", kFloat64, 0x1p-53, formed);
    check_rows<BF16>("rows of bfloat16", kBFloat16, 0x1p-8, formed);
    check_rows<F16>("rows of float16", kFloat16, 0x1p-11, formed);
  }
  printf(FASTLOSS_TEXT(FASTLOSS_ISA) ": %d failures\n", failures);
  return failures ? 1 : 0;
}
