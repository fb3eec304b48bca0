// One row's statistics, its cross-entropy and, with `Grad`, the gradient: row_stats and row_cross_entropy.
// Reads the row once from memory, writes the gradient once, over the logits if asked; a few numbers per row
// besides. One block per row: the row is long, and the gradient needs the row's sum before its first element.
#pragma once

#include "common/row_terms.h"
#include "gradient.h"
#include "running.h"

namespace fastloss::cuda {

__device__ inline void put(float* out, int64_t row, float value) {
  if (out) out[row] = value;
}

// Elements are dealt to threads by their index alone, never by the row's alignment: a row's bits are its own.
// The first `keep_packs` packs are also written to `keep`.
template <class T, bool General, bool Extra, bool Grad>
__device__ inline Running<T, Extra> read_row(const T* x, int vocab, const float* bias, const float* w,
                                             const Transform<General>& transform, unsigned char* keep,
                                             int keep_packs) {
  constexpr int N = Pack<T>::N,
                U = Extra || (General && N == 8) ? 2 : 4;  // loads in flight; more would spill
  if (!General) bias = nullptr;
  if (!Extra) w = nullptr;
  const int packs = vocab / N, step = blockDim.x;
  const bool bias_aligned = is_aligned(bias), w_aligned = is_aligned(w);
  const auto exponent = transform.template exponent<T>();
  Running<T, Extra> sums;
  float slope;
  const auto add = [&](int j, const Pack<T>& pack) {
    float values[N], b[N], weight[N];
    load_floats(bias, j * N, bias_aligned, 0.0f, b);
    load_floats(w, j * N, w_aligned, 1.0f, weight);
#pragma unroll
    for (int k = 0; k < N; ++k) values[k] = transform.value(pack[k], b[k], &slope);
    sums.add(exponent, values, weight);
  };
  T* const kept = reinterpret_cast<T*>(keep);
  int i = threadIdx.x;
  if (is_aligned(x)) {
    if constexpr (Grad) {
      i = for_each_pack<U>(
          i, keep_packs, step, [&](int j) { return load_pack(x + j * N, true); },
          [&](int j, const Pack<T>& pack) {
            *reinterpret_cast<uint4*>(kept + j * N) = pack.raw();
            add(j, pack);
          });
    }
    for_each_pack<U>(i, packs, step, [&](int j) { return load_pack(x + j * N, !Grad); }, add);
  } else {
    for_each_pack<1>(
        i, packs, step, [&](int j) { return load_pack_unaligned(x + j * N); },
        [&](int j, const Pack<T>& pack) {
          if (Grad && j < keep_packs) store_pack_unaligned(kept + j * N, pack);
          add(j, pack);
        });
  }
  for (int v = packs * N + threadIdx.x; v < vocab; v += step) {
    const float weight[1] = {w ? __ldg(w + v) : 1.0f};
    const float value[1] = {transform.value(to_float(x[v]), bias ? __ldg(bias + v) : 0.0f, &slope)};
    sums.add(exponent, value, weight);
  }
  return sums;
}

template <class T, bool General, bool Extra, bool Grad>
__global__ void __launch_bounds__(kMaxThreads, 2) row_forward_kernel(Logits in, CrossEntropy ce, Stats out,
                                                                     int keep_packs) {
  FASTLOSS_DYNAMIC_SHARED(shared);
  const int vocab = int(in.vocab);
  const Transform<General> of_all(in);
  const bool leader = threadIdx.x == 0;

  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(in.x) + row * in.row_stride;
    T* grad = Grad ? static_cast<T*>(ce.grad) + row * ce.grad_row_stride : nullptr;
    const int64_t wide_t = in.target ? in.target[row] : -1;

    if (in.target && wide_t == in.ignore_index) {
      if (leader) {
        put(out.loss, row, 0), put(out.logsumexp, row, 0), put(out.logprobs, row, 0),
            put(out.entropy, row, 0);
        put(out.log_sum_sq_probs, row, 0), put(out.mean_logits, row, 0);
        if (out.is_top1) out.is_top1[row] = 0;
        put(out.lse_parts, 2 * row, 0), put(out.lse_parts, 2 * row + 1, 0);
      }
      if (Grad) fill_row(grad, vocab, 0.0f, threadIdx.x, blockDim.x);
      continue;
    }

    const bool has_target = in.target && wide_t >= 0 && wide_t < in.vocab, bad = in.target && !has_target;
    const int t = has_target ? int(wide_t) : -1;
    const Transform<General> transform = of_all.of_row(in, row);
    const float* w_row = ce.w ? ce.w + row * ce.w_row_stride : nullptr;
    const bool weighs_all =
        in.target == nullptr || ce.terms.smooth != 0;  // else w is read at the target alone

    // The copy of the row sits as the row does with respect to 16 bytes, so that the second pass reads it in
    // vectors.
    const int offset = misalignment(x);
    const bool congruent = Grad && offset == misalignment(grad);
    const int kept = congruent ? keep_packs : 0;
    Running<T, Extra> sums = read_row<T, General, Extra, Grad>(
        x, vocab, in.bias, weighs_all ? w_row : nullptr, transform, shared + offset, kept);
    // Read here: after the long loop, which needs the registers, and before the barriers that let the
    // gradient begin.
    const float w_t = has_target && w_row ? w_row[t] : 1.0f;
    float value_t = 0, slope;
    if (leader && has_target)
      value_t = transform.value(to_float(x[t]), General && in.bias ? in.bias[t] : 0.0f, &slope);

    const auto exponent = transform.template exponent<T>();
    sums.combine_over_block(exponent);
    const bool has_nan = sums.powers != sums.powers;
    const float largest_z = exponent.scale * sums.max;
    if (fabsf(largest_z) == INFINITY) sums.powers = NAN;  // only -inf, or a +inf
    // Relative to the reference, and so exact for logits that are large and close together: log p, the
    // spread, the gradient.
    const float log_powers = logf(sums.powers), kE = exponent.kE;
    const float log_p_t = bad ? NAN : exponent.below(value_t, sums.reference) - log_powers;
    // With all of them, and both relative to the reference's z, loss = W lse - sum of w z.
    const float spread = Extra ? sums.weight * log_powers - sums.weight_x * kE : 0.0f;
    const float base = exponent.base_of(sums.reference), rest = exponent.rounded_off(sums.reference);
    const float log_sum = log_powers + rest, lse = base + log_sum;

    if (leader) {
      if (out.loss) {
        out.loss[row] = cross_entropy_loss(ce.terms, in.target != nullptr, w_t, -log_p_t, spread, lse);
      }
      put(out.logsumexp, row, lse);
      put(out.logprobs, row, log_p_t);
      put(out.lse_parts, 2 * row, base);
      put(out.lse_parts, 2 * row + 1, log_sum);
      if (out.is_top1) out.is_top1[row] = has_target && !has_nan && exponent.scale * value_t >= largest_z;
      if constexpr (Extra) {
        put(out.entropy, row, log_powers - sums.powers_x / sums.powers * kE);
        put(out.log_sum_sq_probs, row, logf(sums.powers_squared) - 2.0f * log_powers);
        put(out.mean_logits, row, base + (sums.x / float(vocab) * kE + rest));
      }
    }

    if constexpr (Grad) {
      const float factor = transform.scale * ce.grad_scale * (ce.grad_scale_ptr ? *ce.grad_scale_ptr : 1.0f);
      const float weight_sum = Extra ? sums.weight : 0.0f;
      auto k = cross_entropy_coefficients(ce.terms, in.target != nullptr, w_t, weight_sum, lse);
      if (bad) k.b = NAN;
      const RowGradient g = {sums.reference, k.a * factor, k.b / sums.powers * factor, 0.0f, k.d * factor};
      write_gradient<General, Extra, false>(x, grad, vocab, in.bias, weighs_all ? w_row : nullptr, t,
                                            transform, g, Kept{shared, offset, kept * Pack<T>::N},
                                            threadIdx.x, blockDim.x);
      __syncthreads();  // the next row's copy overwrites this one's
    }
  }
}

}  // namespace fastloss::cuda
