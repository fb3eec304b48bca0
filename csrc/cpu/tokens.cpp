// value_loss and kl_estimate of docs/sequences.md ("Single tokens"). Each reads its inputs once and writes
// its output once. Vectors of tokens; a part of value_loss adds up in lanes for kBlock tokens, beyond that in
// double.

#include "tokens.h"

#include "args.h"
#include "common/token_terms.h"
#include "lane_sums.h"

namespace fastloss {
namespace FASTLOSS_ISA {
namespace {

constexpr int64_t kBlock = 256;  // tokens that are added up in float

template <class S>
FASTLOSS_INLINE VectorOf<S> take(const void* p, int64_t i, int64_t count) {
  const S* const from = static_cast<const S*>(p) + i;
  return count >= Lanes<S>::n ? load(from) : load_n(from, count);
}

template <class S>
FASTLOSS_INLINE void put(void* p, int64_t i, int64_t count, VectorOf<S> v) {
  S* const to = static_cast<S*>(p) + i;
  if (count >= Lanes<S>::n) {
    store(to, v);
  } else {
    store_n(to, v, count);
  }
}

template <class S, bool clips, bool shares>
void value_part(const ValueLoss& call, int64_t part) {
  using V = VectorOf<S>;
  using U = typename Lanes<S>::U;
  constexpr int64_t L = Lanes<S>::n;
  const S range = S(call.clip_range);
  const int64_t begin = part * kValuePart, end = begin + kValuePart < call.n ? begin + kValuePart : call.n;
  // What the moments count from: the part's first token.
  const S *values = static_cast<const S*>(call.values), *returns = static_cast<const S*>(call.returns);
  int64_t first = begin;
  while (first < end && !call.mask[first]) ++first;
  const S returns_from = first < end ? returns[first] : S(0);
  const S missed_from = first < end ? returns[first] - values[first] : S(0);

  Sum<S> loss, value_sum, returns_sum, returns_squares, missed_sum, missed_squares;
  MaskOf<V> tokens = {}, clipped = {};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t last = block + kBlock < end ? block + kBlock : end;
    for (int64_t i = block; i < last; i += L) {
      const int64_t count = last - i;
      uint8_t bytes[L] = {};
      memcpy(bytes, call.mask + i, count < L ? count : L);
      const MaskOf<V> live = MaskOf<V>(widen_bytes<U>(bytes)) > 0;
      const V value = take<S>(call.values, i, count), target = take<S>(call.returns, i, count);
      const V old = clips ? take<S>(call.old, i, count) : V{};
      const ValueTerm<V> term = value_term(value, target, old, clips, range);
      const V share = shares ? take<S>(call.share, i, count) : splat<V>(S(1));
      put<S>(call.grad, i, count, live ? share * term.slope : V{});
      const V r = live ? target - returns_from : V{}, m = live ? (target - value) - missed_from : V{};
      loss += live ? share * term.loss : V{};
      value_sum += live ? value : V{};
      returns_sum += r, returns_squares += r * r;
      missed_sum += m, missed_squares += m * m;
      tokens -= live, clipped -= term.clipped & live;
    }
    loss.flush(), value_sum.flush();
    returns_sum.flush(), returns_squares.flush(), missed_sum.flush(), missed_squares.flush();
  }
  ValuePart& out = call.parts[part];
  out.tokens = sum_lanes(tokens), out.clipped = sum_lanes(clipped);
  out.loss = loss.total(), out.values = value_sum.total();
  const Moments r = moments_of(out.tokens, returns_from, returns_sum.total(), returns_squares.total());
  const Moments m = moments_of(out.tokens, missed_from, missed_sum.total(), missed_squares.total());
  out.returns_mean = r.mean, out.returns_squares = r.squares;
  out.missed_mean = m.mean, out.missed_squares = m.squares;
}

template <class S>
void value_parts(const ValueLoss& call, int64_t begin, int64_t end) {
  const auto run = call.old     ? call.share ? &value_part<S, true, true> : &value_part<S, true, false>
                   : call.share ? &value_part<S, false, true>
                                : &value_part<S, false, false>;
  for (int64_t part = begin; part < end; ++part) run(call, part);
}

void value_loss(const ValueLoss& call, int dtype, int64_t begin, int64_t end) {
  return dtype == kFloat64 ? value_parts<double>(call, begin, end) : value_parts<float>(call, begin, end);
}

void finish_value(const ValueLoss& call, int dtype) {
  const int64_t count = call.count();
  int64_t first = 0;
  while (first < count && !(call.parts[first].tokens > 0)) ++first;
  const ValuePart from = first < count ? call.parts[first] : ValuePart{};
  ValueTotal total = {};
  for (int64_t part = first; part < count; ++part) {
    total.add(call.parts[part], from.returns_mean, from.missed_mean);
  }
  dtype == kFloat64 ? put_value<double>(call, total) : put_value<float>(call, total);
}

template <class S>
void estimates(const KlEstimate& call, int64_t begin, int64_t end) {
  using V = VectorOf<S>;
  Options<S> o = {};
  o.kl_kind = call.kind;
  for (int64_t i = begin; i < end; i += Lanes<S>::n) {
    const int64_t count = end - i;
    V slope;
    const V kl = kl_of(o, take<S>(call.ref, i, count) - take<S>(call.logprobs, i, count), &slope);
    put<S>(call.out, i, count, call.upstream ? take<S>(call.upstream, i, count) * slope : kl);
  }
}

void kl_estimate(const KlEstimate& call, int dtype, int64_t begin, int64_t end) {
  return dtype == kFloat64 ? estimates<double>(call, begin, end) : estimates<float>(call, begin, end);
}

}  // namespace

extern const TokenKernels token_kernels;
const TokenKernels token_kernels = {value_loss, finish_value, kl_estimate};

}  // namespace FASTLOSS_ISA
}  // namespace fastloss
