// The loss of docs/engine.md, statistics and gradient of rows, from logits that come a block of the
// vocabulary at a time. add, merge: running sums, rescaled where the maximum rises. finish: loss, statistics,
// coefficients. gradient: dz = a·[v = target] + b·p + c·p·log p + d·w over the block's logits, p from the
// final sums.

#ifndef FASTLOSS_ISA
#error "vocab_blocks.cpp is compiled once per instruction set, with -DFASTLOSS_ISA=avx512, avx2 or generic"
#endif

#include "vocab_blocks.h"

#include "head.h"
#include "row_math.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

struct BlockScratch {
  float *z, *e, *slope;
  explicit BlockScratch(void* memory)
      : z(static_cast<float*>(memory)), e(z + kBlock + W), slope(e + kBlock + W) {}
};
constexpr int64_t kScratch = 3 * (kBlock + W) * sizeof(float);

const float* weights_of(const CrossEntropy& c, int64_t row) {
  return c.w ? static_cast<const float*>(c.w) + row * c.w_row_stride : nullptr;
}

Wanted wanted(const HeadCall& c) { return wanted(c.stats, c.logits, c.ce); }

// --- selected classes
// ------------------------------------------------------------------------------------------------------------

// What is done with each entry of the row that names a column in [start, start + n): f(column - start, entry,
// whether it is the first that names it).
template <class F>
FASTLOSS_INLINE void each_selected(const HeadCall& c, int64_t row, int64_t start, int64_t n, F&& f) {
  const int32_t* const ids = c.selected + row * c.selected_count;
  int64_t at = 0;  // entries before the block: half of what is left a step, without a branch
  for (int64_t left = c.selected_count; left > 0;) {
    const int64_t half = (left + 1) / 2;
    at += ids[at + half - 1] < start ? half : 0;
    left -= half;
  }
  for (; at < c.selected_count && ids[at] < start + n; ++at) {
    f(ids[at] - start, at, at == 0 || ids[at] != ids[at - 1]);
  }
}

// The selected of z, the row's logits as the loss sees them, to the call's selected_logits. Left out of the
// sums, they become -inf: whether there were any.
__attribute__((noinline)) bool take_selected(const HeadCall& c, int64_t row, int64_t start, int64_t n,
                                             float* z) {
  float* const out = c.selected_logits + row * c.selected_count;
  bool any = false;
  each_selected(c, row, start, n, [&](int64_t column, int64_t entry, bool is_first) {
    out[entry] = is_first ? z[column] : out[entry - 1];
    if (c.selected_logprobs) return;
    z[column] = -__builtin_inff(), any = true;
  });
  return any;
}

// --- sums of chapters
// ----------------------------------------------------------------------------------------------------

int64_t sums_bytes(const HeadCall& c, int64_t chapters) {
  const Wanted want = wanted(c);
  const int64_t fields = 2 + want.entropy + want.square + want.sum_z + 2 * want.sum_w + (c.argmax != nullptr);
  return fields * chapters * c.logits.rows * int64_t(sizeof(double));
}

ChapterSums sums_of(const HeadCall& c, void* memory, int64_t chapter) {
  const Wanted want = wanted(c);
  const int64_t rows = c.logits.rows;
  double* at = static_cast<double*>(memory) + sums_bytes(c, chapter) / int64_t(sizeof(double));
  const auto take = [&](bool is_wanted) {
    double* const mine = is_wanted ? at : nullptr;
    at += is_wanted ? rows : 0;
    return mine;
  };
  ChapterSums s;
  s.max = take(true), s.sum = take(true), s.entropy = take(want.entropy), s.square = take(want.square);
  s.sum_z = take(want.sum_z), s.sum_w = take(want.sum_w), s.sum_wz = take(want.sum_w);
  s.best = take(c.argmax != nullptr);
  return s;
}

struct Running {
  double max, sum, entropy, square;
};

// Sums relative to their own maximum, added to those so far: one of the two factors is 1.
inline Running together(Wanted want, Running so_far, const Running& more) {
  const double max = more.max > so_far.max ? more.max : so_far.max;
  const double below = so_far.max - max, more_below = more.max - max;
  const double keep = below == 0 ? 1.0 : __builtin_exp(below);
  const double add = more_below == 0 ? 1.0 : __builtin_exp(more_below);
  if (want.entropy) {  // Σ e (z - max), before the sums it needs change
    const double old = keep != 0 ? keep * (so_far.entropy + so_far.sum * below) : 0.0;
    so_far.entropy = old + (add != 0 ? add * (more.entropy + more.sum * more_below) : 0.0);
  }
  if (want.square) so_far.square = keep * keep * so_far.square + add * add * more.square;
  so_far.sum = keep * so_far.sum + add * more.sum;
  so_far.max = max;
  return so_far;
}

// --- a segment
// -----------------------------------------------------------------------------------------------------------

// How floats become numbers of type T: logits that are kept, and gradients. With AVX512_BF16 and NEON's bf16
// (kNative) that is an instruction; in AVX512_BF16's subnormal numbers become 0.
template <class T, bool kNative>
struct Rounding;

template <>
struct Rounding<float, false> {
  static FASTLOSS_INLINE F32V rounded(F32V v) { return v; }
  static FASTLOSS_INLINE void store_rounded(float* p, F32V v) { store(p, v); }
  static FASTLOSS_INLINE void round_two(float* p, F32V v0, F32V v1) { store_two(p, v0, v1); }
};

template <>
struct Rounding<BF16, false> {
  static FASTLOSS_INLINE F32V rounded(F32V v) { return bit_cast<F32V>(bf16_bits(v) << 16); }
  static FASTLOSS_INLINE void store_rounded(BF16* p, F32V v) {
    const U16V bits = __builtin_convertvector(bit_cast<U32V>(v) >> 16, U16V);
    memcpy(p, &bits, sizeof bits);
  }
  static FASTLOSS_INLINE void round_two(BF16* p, F32V v0, F32V v1) { store_two(p, v0, v1); }
};

#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
template <>
struct Rounding<BF16, true> : Rounding<BF16, false> {
  static FASTLOSS_INLINE F32V rounded(F32V v) {
    __m256i bits;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(v));
    return F32V(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
  }
  static FASTLOSS_INLINE void round_two(BF16* p, F32V v0, F32V v1) {
    __m512i bits;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(bits) : "v"(v0), "v"(v1));
    _mm512_storeu_si512(p, bits);
  }
};
#elif defined(FASTLOSS_NEON_BF16)
template <>
struct Rounding<BF16, true> : Rounding<BF16, false> {
  static FASTLOSS_INLINE F32V rounded(F32V v) {
    const uint16x4_t bits = vreinterpret_u16_bf16(vcvt_bf16_f32(float32x4_t(v)));
    return F32V(vreinterpretq_f32_u32(vshll_n_u16(bits, 16)));
  }
  static FASTLOSS_INLINE void round_two(BF16* p, F32V v0, F32V v1) {
    const bfloat16x8_t both = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(float32x4_t(v0)), float32x4_t(v1));
    vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_bf16(both));
  }
};
#endif

FASTLOSS_INLINE F32V load_logits(const float* p) { return load(p); }
FASTLOSS_INLINE F32V load_logits(const BF16* p) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
  // GCC 12 widens a vector of 16 in two halves.
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return F32V(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
#else
  return load(p);
#endif
}

FASTLOSS_INLINE float largest(F32V v) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
  return _mm512_reduce_max_ps(__m512(v));
#else
  return max_lanes(v);
#endif
}

// The two halves in double, added.
FASTLOSS_INLINE F64V halves(F32V v) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
  const __m512 x = __m512(v);
  return F64V(_mm512_cvtps_pd(_mm512_castps512_ps256(x)) + _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
#else
  float lanes[W];
  store(lanes, v);
  return widen(lanes) + widen(lanes + W / 2);
#endif
}

FASTLOSS_INLINE double total(F64V v) {
#if defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64
  return _mm512_reduce_add_pd(__m512d(v));
#else
  return sum_lanes(v);
#endif
}

// The row's logit i with the head's bias.
FASTLOSS_INLINE F32V with_bias(const float* bias, const float* x, int64_t i, int64_t n) {
  return bias ? F32V(load(x + i) + load_upto(bias + i, n - i)) : load(x + i);
}

// The largest of the row's n logits without their bias; fills the last vector with -inf, and keeps the logits
// that are to be kept. Those of a narrower type are kept with their bias and relative to the largest of them,
// so that rounding errs most where the probability is smallest: by |z - max|·2^-9 in a term that is at most
// exp(z - max).
template <class T, class R>
FASTLOSS_INLINE float keep_row(const HeadCall& c, float* x, int64_t row, int64_t start, int64_t n) {
  const int64_t whole = (n + W - 1) / W * W;
  for (int64_t i = n; i < whole; ++i) x[i] = -__builtin_inff();
  const auto largest_of = [&](auto&& at) __attribute__((always_inline)) {
    F32V m0 = F32V{} + lowest_finite<float>(), m1 = m0;
    int64_t i = 0;
    for (; i + 2 * W <= whole; i += 2 * W) m0 = max_or_second(at(i), m0), m1 = max_or_second(at(i + W), m1);
    for (; i < whole; i += W) m0 = max_or_second(at(i), m0);
    return largest(max_or_second(m0, m1));
  };
  const float max = largest_of([=](int64_t i) __attribute__((always_inline)) { return load(x + i); });
  if (row >= c.stored + c.more) return max;
  const float* bias = nullptr;
  float origin = 0;
  if (sizeof(T) == 2) {
    bias = c.logits.bias ? static_cast<const float*>(c.logits.bias) + start : nullptr;
    const auto biased = [=](int64_t i) __attribute__((always_inline)) { return with_bias(bias, x, i, n); };
    origin = *kept_origin(c, row, start) = bias ? largest_of(biased) : max;
  }
  for (int64_t at = 0; at < n; at += kKept) {
    T* const out = kept_logits<T>(c, row, start + at);
    const int64_t count = n - at < kKept ? n - at : kKept;
    if (count % W == 0) {
      for (int64_t k = 0; k < count; k += W) {
        R::store_rounded(out + k, R::rounded(with_bias(bias, x, at + k, n) - origin));
      }
    } else {
      for (int64_t k = at; k < at + count; ++k)
        store_one(out + (k - at), x[k] + (bias ? bias[k] : 0) - origin);
    }
  }
  return max;
}

// What a segment adds to its chapter, of a few rows side by side.
constexpr int64_t kGroup = 8;
struct Group {
  double max[kGroup], sum[kGroup], entropy[kGroup], square[kGroup];
};

// Σ e, Σ e (z - max) and Σ e² with e = exp(z - max), of whole vectors. The largest logits are counted, not
// added: where one dominates, its 1 would swallow the low bits of its float lane, and they are 1 - p.
template <bool kEntropy, bool kSquare>
FASTLOSS_INLINE void add_exponentials(const float* z, int64_t whole, float max, int64_t g, Group* out) {
  constexpr int kSums = 4;
  F32V sum[kSums] = {}, entropy[2] = {}, square[2] = {};  // more would not fit the registers
  U32V largest_ones{};                                    // minus their number
  const auto add = [&](int k, int64_t i) __attribute__((always_inline)) {
    const F32V v = load(z + i), below = v - max, e = exp_nonpositive<float>(below);
    const U32V is_largest = bit_cast<U32V>(v >= max);
    const F32V others = bit_cast<F32V>(bit_cast<U32V>(e) & ~is_largest);  // a NaN is not >= and stays
    largest_ones += is_largest;
    sum[k] += others;
    if (kEntropy) entropy[k % 2] += e == 0.0f ? F32V{} : e * below;
    if (kSquare) square[k % 2] += others * others;
  };
  int64_t i = 0;
  for (; i + kSums * W <= whole; i += kSums * W) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) add(k, i + k * W);
  }
  for (; i < whole; i += W) add(0, i);
  const F64V ones = halves(__builtin_convertvector(-largest_ones, F32V));
  out->max[g] = max;
  out->sum[g] = total(halves((sum[0] + sum[1]) + (sum[2] + sum[3])) + ones);
  if (max > __FLT_MAX__) out->sum[g] = __builtin_nan("");
  if (kEntropy) out->entropy[g] = total(halves(entropy[0] + entropy[1]));
  if (kSquare) out->square[g] = total(halves(square[0] + square[1]) + ones);
}

// A group's segment, added to the sums of `count` rows.
FASTLOSS_INLINE void add_group(Wanted want, const ChapterSums& sums, int64_t row, int64_t count,
                               const Group& more) {
  constexpr int64_t H = W / 2;
  const auto put_n = [&](double* to, F64V v, int64_t n) { n >= H ? store(to, v) : store_n(to, v, n); };
  for (int64_t g = 0; g < count; g += H) {
    const int64_t n = count - g, at = row + g;
    const F64V old_max = load_upto(sums.max + at, n), old_sum = load_upto(sums.sum + at, n);
    const F64V more_max = load_upto(more.max + g, n), more_sum = load_upto(more.sum + g, n);
    const F64V max = max_or_second(more_max, old_max);
    const F64V below = old_max - max, more_below = more_max - max;
    const F64V keep = exp_nonpositive<double>(below), add = exp_nonpositive<double>(more_below);
    put_n(sums.max + at, max, n);
    put_n(sums.sum + at, keep * old_sum + add * more_sum, n);
    if (want.entropy) {
      const F64V old = load_upto(sums.entropy + at, n), entropy = load_upto(more.entropy + g, n);
      put_n(sums.entropy + at, keep * (old + old_sum * below) + add * (entropy + more_sum * more_below), n);
    }
    if (want.square) {
      const F64V old = load_upto(sums.square + at, n), square = load_upto(more.square + g, n);
      put_n(sums.square + at, keep * keep * old + add * add * square, n);
    }
  }
}

template <class T, class R>
void add(const HeadCall& c, const ChapterSums& sums, const StripeOfLogits& stripe, void* memory) {
  const BlockScratch scratch(memory);
  static_assert(kGroup * kSegment <= kBlock, "a group's transformed logits are in the scratch");
  const Logits& l = c.logits;
  const Transform<float> plain(l);
  const Wanted want = wanted(c);
  const int64_t start = stripe.start, n = stripe.width, whole = (n + W - 1) / W * W;
  const bool first = start % kChapter == 0;
  for (int64_t begin = stripe.begin; begin < stripe.end; begin += kGroup) {
    const int64_t count = stripe.end - begin < kGroup ? stripe.end - begin : kGroup;
    const float* z[kGroup];
    float max[kGroup];
    for (int64_t g = 0; g < count; ++g) {
      const int64_t row = begin + g;
      if (first) {
        sums.max[row] = lowest_finite<float>(), sums.sum[row] = 0;
        double* const others[] = {sums.entropy, sums.square, sums.sum_z, sums.sum_w, sums.sum_wz, sums.best};
        for (double* const field : others) {
          if (field) field[row] = 0;
        }
      }
      const RowKind kind = kind_of(l, row);
      z[g] = nullptr;
      if (kind == RowKind::ignored) continue;
      float* const x = stripe.z + (row - stripe.begin) * stripe.stride;
      const Transform<float> f = plain.of_row(c.logits, row);
      if (f.plain && c.selected_logits) take_selected(c, row, start, n, x);
      max[g] = keep_row<T, R>(c, x, row, start, n);
      z[g] = x;
      if (!f.plain) {
        float* const transformed = scratch.z + g * kSegment;
        z[g] = load_block(f, x, start, n, transformed, scratch.slope, &max[g]);
        if (c.selected_logits && take_selected(c, row, start, n, transformed)) {
          max[g] = lowest_finite<float>();
          for (int64_t i = 0; i < n; ++i) max[g] = transformed[i] > max[g] ? transformed[i] : max[g];
        }
      }
      const int64_t t = kind == RowKind::normal && l.target ? l.target[row] - start : -1;
      if (t >= 0 && t < n) {
        c.state[row].z_target = z[g][t];
        c.state[row].slope_target = l.softcap > 0 ? scratch.slope[t] : 1.0;
      }
      if (want.sum_z) sums.sum_z[row] += sum_block(z[g], n);
      const float* const w = want.sum_w ? weights_of(c.ce, row) : nullptr;
      if (w) {
        sums.sum_w[row] += sum_block(w + start, n);
        sums.sum_wz[row] += dot_block(w + start, z[g], n);
      }
      if (c.argmax && max[g] > sums.max[row]) {
        int64_t i = 0;
        while (i + 1 < n && z[g][i] != max[g]) ++i;
        sums.best[row] = double(start + i);
      }
    }
    Group group;
    for (int64_t g = 0; g < count; ++g) {
      if (!z[g]) {
        group.max[g] = lowest_finite<float>(), group.sum[g] = group.entropy[g] = group.square[g] = 0;
      } else if (want.entropy && want.square) {
        add_exponentials<true, true>(z[g], whole, max[g], g, &group);
      } else if (want.entropy) {
        add_exponentials<true, false>(z[g], whole, max[g], g, &group);
      } else if (want.square) {
        add_exponentials<false, true>(z[g], whole, max[g], g, &group);
      } else {
        add_exponentials<false, false>(z[g], whole, max[g], g, &group);
      }
    }
    add_group(want, sums, begin, count, group);
    if (c.mass) {
      float* const mass = c.mass + start / kSegment * l.rows + begin;
      for (int64_t g = 0; g < count; ++g) mass[g] = float(group.max[g] + __builtin_log(group.sum[g]));
    }
  }
}

// --- a row
// ---------------------------------------------------------------------------------------------------------------

void merge(const HeadCall& c, const ChapterSums& sums, bool first, int64_t begin, int64_t end) {
  const Wanted want = wanted(c);
  for (int64_t row = begin; row < end; ++row) {
    RowState& s = c.state[row];
    if (first) {
      s.max = lowest_finite<float>(), s.best = 0;
      s.sum = s.entropy = s.square = s.sum_z = s.sum_w = s.sum_wz = 0;
    }
    if (kind_of(c.logits, row) == RowKind::ignored) continue;
    const Running so_far{s.max, s.sum, s.entropy, s.square};
    const Running more{sums.max[row], sums.sum[row], want.entropy ? sums.entropy[row] : 0,
                       want.square ? sums.square[row] : 0};
    if (sums.best && more.max > so_far.max) s.best = sums.best[row];
    const Running all = together(want, so_far, more);
    s.max = all.max, s.sum = all.sum, s.entropy = all.entropy, s.square = all.square;
    if (want.sum_z) s.sum_z += sums.sum_z[row];
    if (want.sum_w) s.sum_w += sums.sum_w[row], s.sum_wz += sums.sum_wz[row];
  }
}

double weight_of(const HeadCall& c, int64_t row) { return c.token_weight ? c.token_weight[row] : 1.0; }

// Computed as write_stats computes a target's.
void write_selected_logprobs(const HeadCall& c, int64_t row, const RowSums& r) {
  if (!c.selected_logprobs) return;
  const int64_t first = row * c.selected_count;
  for (int64_t i = first; i < first + c.selected_count; ++i) {
    c.selected_logprobs[i] = float((double(c.selected_logits[i]) - r.max) - r.log_sum);
  }
}

void finish(const HeadCall& c, int64_t begin, int64_t end) {
  using S = float;
  const Logits& l = c.logits;
  const Stats& stats = c.stats;
  const Wanted want = wanted(c);
  for (int64_t row = begin; row < end; ++row) {
    RowState& s = c.state[row];
    const RowKind kind = kind_of(l, row);
    s.kind = double(kind);
    s.log_sum = s.a = s.b = s.c = s.d = 0;
    if (kind != RowKind::normal || !l.target) s.z_target = 0, s.slope_target = 1;
    if (kind == RowKind::ignored) {
      write_ignored<S>(stats, row);
      if (c.argmax) c.argmax[row] = 0;
      continue;
    }
    const bool bad = kind == RowKind::bad;
    RowSums r;
    r.max = s.max, r.sum = s.sum, r.z_target = s.z_target, r.slope_target = s.slope_target;
    r.sum_z = s.sum_z, r.sum_w = s.sum_w, r.sum_wz = s.sum_wz;
    finish_sums(want, s.entropy, s.square, &r);
    // No class is left beside the selected ones, or none that is possible.
    if (s.sum == 0 && leaves_out_selected(c)) r.log_sum = r.lse = -__builtin_inff();
    write_selected_logprobs(c, row, r);
    write_stats<S>(stats, row, r, double(l.vocab), bad);
    if (c.argmax) c.argmax[row] = int64_t(s.best);
    if (bad) {
      put<S>(stats.loss, row, __builtin_nan(""));
      continue;
    }
    const RowLoss g = loss_of_row(c.ce, l.target != nullptr, l.target ? l.target[row] : -1,
                                  weights_of(c.ce, row), double(l.vocab), r);
    put<S>(stats.loss, row, g.loss * weight_of(c, row));
    const double k = c.ce.grad_scale * scale_of<float>(c.logits, row) * weight_of(c, row);
    s.log_sum = r.log_sum;
    s.a = (g.a + (g.d != 0 ? g.d * g.w_t : 0.0)) * k, s.b = g.b * k, s.d = g.d * k;
  }
}

// Probabilities sorted as far as `leave_out` needs it: four bins from one power of 2 to the next, the first
// for all below 2^-64.
constexpr int64_t kBins = 4 * 64 + 2;
inline int64_t bin_of(float p) {
  const int64_t bin = int64_t(bit_cast<uint32_t>(p) >> 21) - 4 * (127 - 64);
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

// Whether a segment that may be left out is kept: random bits of what the row's sum is, so that they are
// others in every step and the same for the same input.
inline bool is_kept(const RowState& s, int64_t row, int64_t segment) {
  uint64_t x = bit_cast<uint64_t>(s.log_sum) ^ (bit_cast<uint64_t>(s.max) << 17);
  x += uint64_t(row) * 0x9e3779b97f4a7c15u + uint64_t(segment) * 0xd1b54a32d192ed03u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return (x ^ (x >> 31)) % kOneIn == 0;
}

void leave_out(const HeadCall& c, int64_t begin, int64_t end) {
  const Logits& l = c.logits;
  const int64_t segments = (l.vocab + kSegment - 1) / kSegment;
  // One that is kept errs by kOneIn - 1 times its probability, one that is left out by once.
  const double most = c.skip / (kOneIn - 1);
  for (int64_t row = begin; row < end; ++row) {
    const RowState& s = c.state[row];
    float* const mass = c.mass + row;
    if (s.kind != 0) {  // an ignored row has no gradient, a bad one NaN everywhere
      for (int64_t k = 0; k < segments; ++k) mass[k * l.rows] = s.kind == double(RowKind::bad) ? 1 : kLeftOut;
      continue;
    }
    const int64_t own = l.target[row] / kSegment;
    double bins[kBins] = {};
    for (int64_t k = 0; k < segments; ++k) {
      float& p = mass[k * l.rows];
      p = float(__builtin_exp((double(p) - s.max) - s.log_sum));
      if (k != own && p >= 0) bins[bin_of(p)] += p;  // a NaN stays
    }
    double sum = 0;
    int64_t bin = 0;  // the first that has no room as a whole
    for (; bin < kBins && sum + bins[bin] <= most; ++bin) sum += bins[bin];
    for (int64_t k = 0; k < segments; ++k) {
      const float p = mass[k * l.rows];
      bool is_least = false;
      if (k != own && p >= 0) {
        const int64_t mine = bin_of(p);
        is_least = mine < bin || (mine == bin && sum + p <= most);
        if (mine == bin && is_least) sum += p;
      }
      mass[k * l.rows] = !is_least ? 1 : is_kept(s, row, k) ? float(kOneIn) : kLeftOut;
    }
  }
}

void set_coefficients(const HeadCall& c, int64_t begin, int64_t end) {
  const Coefficients& g = c.given;
  for (int64_t row = begin; row < end; ++row) {
    RowState& s = c.state[row];
    s = RowState{};
    const RowKind kind = kind_of(c.logits, row);
    s.kind = double(kind);
    if (kind != RowKind::normal) continue;
    s.max = get<float>(g.lse_parts, 2 * row), s.log_sum = get<float>(g.lse_parts, 2 * row + 1);
    const float* const w = weights_of(c.ce, row);
    const double k = scale_of<float>(c.logits, row) * weight_of(c, row);
    s.b = get<float>(g.b, row) * k, s.c = get<float>(g.c, row) * k, s.d = get<float>(g.d, row) * k;
    s.a = get<float>(g.a, row) * k;
    if (c.logits.target && s.d != 0) s.a += s.d * (w ? double(w[c.logits.target[row]]) : 1.0);
  }
}

// --- the gradient
// --------------------------------------------------------------------------------------------------------

// factor · e^(z - lse), offset = -lse · log2(e): as exact as bfloat16 needs (2^f within 4e-6, the argument
// within 2^-24 of z).
FASTLOSS_INLINE F32V scaled_probability(F32V z, float offset, float factor) {
  constexpr float log2e = 0x1.715476p+0f, round = 12582912.0f + 127.0f;
  F32V t = z * log2e + offset;
  t = max_or_second(F32V{} - 127.0f, t);  // a NaN stays
  const F32V bits = t + round;            // its low bits are the biased exponent
  const F32V f = t - (bits - round);
  F32V p = f * 0x1.3a02ccp-7f + 0x1.c9fc46p-5f;
  p = p * f + 0x1.ec0378p-3f;
  p = p * f + 0x1.62e12cp-1f;
  p = p * f + 1.0f;
  return p * (bit_cast<F32V>(bit_cast<U32V>(bits) << 23) * factor);
}

// Products read whole steps of K. Last of all, because `out` may lie over the logits.
template <class T>
void zero_to_32(T* out, int64_t n) {
  for (; n % 32 != 0; ++n) store_one(out + n, 0.0f);
}

// The row's logits, from what was kept of them.
template <class T>
void load_kept(const HeadCall& c, int64_t row, int64_t start, int64_t n, float* x) {
  for (int64_t at = 0; at < n; at += kKept) {
    const T* const from = kept_logits<T>(c, row, start + at);
    const int64_t count = n - at < kKept ? n - at : kKept;
    const float origin = sizeof(T) == 2 ? *kept_origin(c, row, start + at) : 0.0f;
    if (count % W == 0) {
      for (int64_t i = 0; i < count; i += W) store(x + at + i, load_logits(from + i) + origin);
    } else {
      write_block(x + at, count, [=](int64_t i, int64_t left) { return load_upto(from + i, left) + origin; });
    }
  }
  if (sizeof(T) == 2 && c.logits.bias) {
    const float* const bias = static_cast<const float*>(c.logits.bias) + start;
    for (int64_t i = 0; i < n; ++i) x[i] = __builtin_isinf(bias[i]) ? 0.0f : x[i] - bias[i];
  }
}

template <class T>
__attribute__((noinline)) void give_selected(const HeadCall& c, int64_t row, int64_t start, int64_t n,
                                             T* out) {
  const float* const given = c.selected_gradient + row * c.selected_count;
  each_selected(c, row, start, n, [&](int64_t column, int64_t entry, bool is_first) {
    if (is_first) store_one(out + column, given[entry]);
  });
}

template <class T, class R>
void gradient(const HeadCall& c, const StripeOfLogits& stripe, bool kept, void* out_memory,
              int64_t out_stride, void* memory) {
  const BlockScratch scratch(memory);
  const Logits& l = c.logits;
  const Transform<float> plain(l);
  const int64_t start = stripe.start, n = stripe.width;
  for (int64_t i = stripe.begin; i < stripe.end; ++i) {
    const int64_t row = stripe.row(i);
    const RowState& s = c.state[row];
    T* const out = static_cast<T*>(out_memory) + (i - stripe.begin) * out_stride;
    if (s.kind != 0) {
      fill_row<T>(out, n, s.kind == double(RowKind::bad) ? __builtin_nanf("") : 0.0f);
      zero_to_32(out, n);
      continue;
    }
    float* const x = stripe.z + (i - stripe.begin) * stripe.stride;
    const Transform<float> f = plain.of_row(c.logits, row);
    const int64_t t = l.target ? l.target[row] - start : -1;
    const bool here = t >= 0 && t < n;
    double z_target, slope_target = 1;
    const float ref = float(s.max), log_sum = float(s.log_sum), with_log = float(s.c);
    const float b = float(s.b) * (c.mass ? c.mass[start / kSegment * l.rows + row] : 1.0f);
    if (sizeof(T) == 2 && f.plain && s.c == 0 && s.d == 0 && n % (2 * W) == 0) {
      const auto write = [&](const auto* from, int64_t at, int64_t count,
                             float origin) __attribute__((always_inline)) {
        const float offset = float(((origin - s.max) - s.log_sum) * 1.4426950408889634);
        for (int64_t i = 0; i < count; i += 2 * W) {
          const F32V v0 = load_logits(from + i), v1 = load_logits(from + i + W);
          R::round_two(out + at + i, scaled_probability(v0, offset, b), scaled_probability(v1, offset, b));
        }
      };
      z_target = 0;
      if (kept) {
        for (int64_t at = 0; at < n; at += kKept) {
          const T* const from = kept_logits<T>(c, row, start + at);
          const float origin = *kept_origin(c, row, start + at);
          if (here && at <= t && t < at + kKept) z_target = double(load_n(from + (t - at), 1)[0]) + origin;
          write(from, at, n - at < kKept ? n - at : kKept, origin);
        }
      } else {
        if (here) z_target = double(x[t]);
        write(x, 0, n, 0.0f);
      }
    } else {
      if (kept) load_kept<T>(c, row, start, n, x);
      const float* z = x;
      float* const slope = l.softcap > 0 ? scratch.slope : nullptr;
      if (!f.plain || n % W != 0) {
        float max;
        z = load_block(f, x, start, n, scratch.z, scratch.slope, &max);
      }
      z_target = here ? double(z[t]) : 0.0;  // read before it is overwritten
      if (here && slope) slope_target = slope[t];
      const float* const w = weights_of(c.ce, row);
      const auto write = [&](auto main) __attribute__((always_inline)) {
        gradient_block(out, n, float(s.d), w ? w + start : nullptr, slope, main);
      };
      if (s.c == 0) {
        write([=](int64_t i, int64_t) __attribute__((always_inline)) {
          return gradient_from_z<float, false>(z + i, ref, log_sum, b, 0.0f);
        });
      } else {
        write([=](int64_t i, int64_t) __attribute__((always_inline)) {
          return gradient_from_z<float, true>(z + i, ref, log_sum, b, with_log);
        });
      }
    }
    zero_to_32(out, n);
    if (here) {
      const double log_p = (z_target - s.max) - s.log_sum, p = __builtin_exp(log_p);
      const double c_term = s.c != 0 && p != 0 ? s.c * p * log_p : 0.0;
      store_one(out + t, float((s.a + s.b * p + c_term) * slope_target));
    }
    if (c.selected_gradient) give_selected(c, row, start, n, out);
  }
}

template <class T>
void exponentials(const HeadCall& c, const ChapterSums* sums, const StripeOfLogits& stripe, void* out_memory,
                  int64_t out_stride, float* factor, void* memory) {
  const BlockScratch scratch(memory);
  const Logits& l = c.logits;
  const Transform<float> plain(l);
  const int64_t start = stripe.start, n = stripe.width;
  for (int64_t row = stripe.begin; row < stripe.end; ++row) {
    const int64_t i = row - stripe.begin;
    RowState& s = c.state[row];
    T* const out = static_cast<T*>(out_memory) + i * out_stride;
    factor[i] = 1;
    if (kind_of(l, row) == RowKind::ignored) {
      fill_row<T>(out, n, 0.0f);
      zero_to_32(out, n);
      continue;
    }
    const float* z = stripe.z + i * stripe.stride;
    const Transform<float> f = plain.of_row(c.logits, row);
    float max;
    if (!f.plain || n % W != 0) z = load_block(f, z, start, n, scratch.z, scratch.slope, &max);
    double largest_so_far = sums ? sums->max[row] : s.max;  // this chapter's, if it is not over
    if (sums && start + n > kChapter && s.max > largest_so_far) largest_so_far = s.max;
    if (start > 0 && largest_so_far != s.d_hidden_max) {
      factor[i] = float(__builtin_exp(s.d_hidden_max - largest_so_far));
    }
    s.d_hidden_max = largest_so_far;
    const float* const slope = l.softcap > 0 ? scratch.slope : nullptr;
    const float ref = float(largest_so_far);
    gradient_block(out, n, 0.0f, static_cast<const float*>(nullptr), slope,
                   [=](int64_t k, int64_t)
                       __attribute__((always_inline)) { return exp_nonpositive<float>(load(z + k) - ref); });
    zero_to_32(out, n);
    const int64_t t = l.target ? l.target[row] - start : -1;
    // The target's own term is small where p is near 1: it comes at the end.
    if (t >= 0 && t < n) store_one(out + t, 0.0f);
  }
}

template <class F>
void with_rounding(const HeadCall& c, F&& f) {
  if (c.weight_dtype != kBFloat16) return f(float{}, Rounding<float, false>{});
#if (defined(__AVX512F__) && FASTLOSS_VECTOR_BYTES == 64) || defined(FASTLOSS_NEON_BF16)
  if (c.rounds_natively) return f(BF16{}, Rounding<BF16, true>{});
#endif
  f(BF16{}, Rounding<BF16, false>{});
}

void add_of(const HeadCall& c, const ChapterSums& sums, const StripeOfLogits& stripe, void* memory) {
  with_rounding(c, [&](auto type, auto r) { add<decltype(type), decltype(r)>(c, sums, stripe, memory); });
}
void gradient_of(const HeadCall& c, const StripeOfLogits& stripe, bool kept, void* out, int64_t out_stride,
                 void* memory) {
  with_rounding(c, [&](auto type, auto r) {
    gradient<decltype(type), decltype(r)>(c, stripe, kept, out, out_stride, memory);
  });
}
void exponentials_of(const HeadCall& c, const ChapterSums* sums, const StripeOfLogits& stripe, void* out,
                     int64_t out_stride, float* factor, void* memory) {
  with_rounding(c, [&](auto type, auto) {
    exponentials<decltype(type)>(c, sums, stripe, out, out_stride, factor, memory);
  });
}

}  // namespace

extern const VocabKernels vocab_kernels;
const VocabKernels vocab_kernels = {kScratch, sums_bytes, sums_of,          add_of,      merge,
                                    finish,   leave_out,  set_coefficients, gradient_of, exponentials_of};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
