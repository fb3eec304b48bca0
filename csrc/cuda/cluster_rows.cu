// row_cross_entropy with its gradient where a cluster's shared memory holds two rows: sm_90 and newer.
// Reads a row once, by bulk copies, and writes its gradient once: 2 V sizeof(T) bytes per row.
// 1, 2, 4 or 8 blocks a row, each with a piece of it; the next row's copy is under way meanwhile.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cluster.h"
#include "cluster_rows.h"
#include "common/row_terms.h"
#include "device_limits.h"
#include "gradient.h"
#include "launch.h"
#include "running.h"

namespace fastloss::cuda {
namespace {

constexpr int kClusterThreads = 2 * kMaxThreads;  // one block on a multiprocessor: 72 registers a thread

// What a block has in shared memory behind its two pieces. Two of each: a block that is ahead is in the next
// row.
struct Exchange {
  float4 shares[2][kMaxCluster];  // of each block: its largest value, its sum of powers, the target's value
                                  // if it is there
  Arrivals copied[2], given[2];
};

__device__ inline void put_number(float* out, int64_t row, float value) {
  if (out) out[row] = value;
}

template <class T>
__global__ void __launch_bounds__(kClusterThreads, 1) cluster_rows_kernel(Logits in, CrossEntropy ce,
                                                                          Stats out, int piece) {
#if defined(FASTLOSS_EMULATE) || __CUDA_ARCH__ >= 900
  constexpr int N = Pack<T>::N, U = 4;
  FASTLOSS_DYNAMIC_SHARED(shared);
  Exchange& exchange = *reinterpret_cast<Exchange*>(shared + 2 * 16 * piece);
  const int rank = cluster_rank(), size = cluster_size(), step = blockDim.x, thread = threadIdx.x;
  const int64_t clusters = gridDim.x / size;
  const int vocab = int(in.vocab), packs = vocab / N;
  const int first = min(rank * piece, packs), mine = min(piece, packs - first);
  // The elements behind the last pack are the last block's, read and written one by one.
  const int rest = rank == size - 1 ? vocab - packs * N : 0;
  const Transform<false> of_all(in);

  if (thread == 0) {
    for (int i = 0; i < 2; ++i) start_counting(&exchange.copied[i]), start_counting(&exchange.given[i]);
  }
  cluster_barrier();  // every block of the cluster is there, and can be given numbers

  const auto is_ignored = [&](int64_t row) { return in.target[row] == in.ignore_index; };
  const auto fetch = [&](int64_t row, int stage) {
    if (thread != 0 || mine == 0 || row >= in.rows || is_ignored(row)) return;
    expect(&exchange.copied[stage], mine * 16);
    copy_bulk(shared + stage * 16 * piece, static_cast<const T*>(in.x) + row * in.row_stride + first * N,
              mine * 16, &exchange.copied[stage]);
  };

  uint32_t copies = 0, gives = 0;  // bit s: the parity of the phase that copied[s], given[s] is in
  int stage = 0, turn = 0;
  int64_t row = blockIdx.x / size;
  fetch(row, stage);
  for (; row < in.rows; row += clusters, stage ^= 1) {
    fetch(row + clusters, stage ^ 1);
    const T* x = static_cast<const T*>(in.x) + row * in.row_stride;
    T* grad = static_cast<T*>(ce.grad) + row * ce.grad_row_stride;
    const bool leader = rank == 0 && thread == 0;
    if (is_ignored(row)) {
      if (leader) {
        put_number(out.loss, row, 0), put_number(out.logsumexp, row, 0), put_number(out.logprobs, row, 0);
        if (out.is_top1) out.is_top1[row] = 0;
        put_number(out.lse_parts, 2 * row, 0), put_number(out.lse_parts, 2 * row + 1, 0);
      }
      fill_row(grad + first * N, mine * N + rest, 0.0f, thread, step);
      continue;
    }

    const int64_t wide_t = in.target[row];
    const bool bad = wide_t < 0 || wide_t >= in.vocab;
    const int t = bad ? -1 : int(wide_t);
    const Transform<false> transform = of_all.of_row(in, row);
    const auto exponent = transform.template exponent<T>();
    const float w_t = !bad && ce.w ? ce.w[row * ce.w_row_stride + t] : 1.0f;
    const float last = thread < rest ? to_float(x[packs * N + thread]) : 0.0f;

    if (mine > 0) wait_for(&exchange.copied[stage], copies >> stage & 1), copies ^= 1u << stage;
    const uint4* kept = reinterpret_cast<const uint4*>(shared + stage * 16 * piece);
    Running<T, false> sums;
    for_each_pack<U>(
        thread, mine, step, [&](int i) { return Pack<T>::of(kept[i]); },
        [&](int, const Pack<T>& pack) {
          float values[N];
          const float none[N] = {};
#pragma unroll
          for (int k = 0; k < N; ++k) values[k] = pack[k];
          sums.add(exponent, values, none);
        });
    if (thread < rest) {
      const float value[1] = {last}, none[1] = {};
      sums.add(exponent, value, none);
    }
    sums.combine_over_block(exponent);

    if (thread == 0) expect(&exchange.given[turn], 16 * size);
    if (thread < size) {
      // A block reads its own part of the row alone, and writes over it when it has the shares of all: no
      // fence is needed.
      const int at = t - first * N;
      const bool is_mine = at >= 0 && at < mine * N + rest;
      const float value =
          !is_mine ? 0.0f : to_float(at < mine * N ? reinterpret_cast<const T*>(kept)[at] : x[t]);
      give(&exchange.shares[turn][rank], thread, {sums.max, sums.powers, value, 0.0f}, &exchange.given[turn]);
    }
    wait_for(&exchange.given[turn], gives >> turn & 1), gives ^= 1u << turn;
    // The same order in every thread of the cluster: the same bits.
    float largest = -INFINITY, value_t = 0;
    for (int of = 0; of < size; ++of) {
      const float4 theirs = exchange.shares[turn][of];
      largest = fmaxf(largest, theirs.x), value_t += theirs.z;
    }
    Running<T, false> whole;
    whole.rebase(exponent, largest);
    for (int of = 0; of < size; ++of) {
      const float4 share = exchange.shares[turn][of];
      Running<T, false> theirs;
      theirs.rebase(exponent, share.x);
      theirs.powers = share.y;
      theirs.rebase(exponent, largest);
      whole.powers += theirs.powers;
    }
    turn ^= 1;

    const bool has_nan = whole.powers != whole.powers;
    const float largest_z = exponent.scale * whole.max;
    if (fabsf(largest_z) == INFINITY) whole.powers = NAN;  // only -inf, or a +inf
    const float log_powers = logf(whole.powers);           // relative to the reference, as is log p
    const float log_p_t = bad ? NAN : exponent.below(value_t, whole.reference) - log_powers;
    const float base = exponent.base_of(whole.reference),
                log_sum = log_powers + exponent.rounded_off(whole.reference), lse = base + log_sum;
    if (leader) {
      if (out.loss) out.loss[row] = cross_entropy_loss(ce.terms, true, w_t, -log_p_t, 0.0f, lse);
      put_number(out.logsumexp, row, lse);
      put_number(out.logprobs, row, log_p_t);
      put_number(out.lse_parts, 2 * row, base), put_number(out.lse_parts, 2 * row + 1, log_sum);
      if (out.is_top1) out.is_top1[row] = !bad && !has_nan && exponent.scale * value_t >= largest_z;
    }

    const float factor = transform.scale * ce.grad_scale * (ce.grad_scale_ptr ? *ce.grad_scale_ptr : 1.0f);
    auto k = cross_entropy_coefficients(ce.terms, true, w_t, 0.0f, lse);
    if (bad) k.b = NAN;
    const RowGradient g = {whole.reference, k.a * factor, k.b / whole.powers * factor, 0.0f, 0.0f};
    for (int j = thread; j < mine; j += step) {
      const int v = (first + j) * N;
      const float none[N] = {};
      float result[N];
      gradient_of<T, false, false>(Pack<T>::of(kept[j]), none, none, transform, g, t - v, result);
      store_pack(grad + v, result);
    }
    if (thread < rest) {
      const int v = packs * N + thread;
      const float logit[1] = {last}, none[1] = {};
      float result[1];
      gradient_of<T, false, false>(logit, none, none, transform, g, t - v, result);
      grad[v] = from_float<T>(result[0]);
    }
    __syncthreads();  // the row after the next is copied over this one
  }
#endif
}

bool is_aligned_rows(const void* p, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;
}

bool is_asked_for() {
  const char* value = std::getenv("FASTLOSS_CLUSTER_ROWS");
  return value && std::strcmp(value, "1") == 0;
}

// How the current device would run a call.
struct Plan {
  static constexpr int kStatic = 2048;  // bytes: the reduction's own, and what the system keeps

  const char* error = nullptr;
  int device = 0, most = 0;  // bytes of shared memory that a block may have
  int64_t packs = 0;
  int size = 1, log_size = 0;  // of a cluster
  const char* why_not;         // the other row kernel computes the call

  Plan(const Logits& in, const CrossEntropy& ce, const Stats& out) : why_not(find(in, ce, out)) {}

  int64_t needed() const {
    return 2 * 16 * ((packs + size - 1) / size) + int64_t(sizeof(Exchange)) + kStatic;
  }

 private:
  const char* find(const Logits& in, const CrossEntropy& ce, const Stats& out) {
    const bool is_wide = in.dtype == kFloat32;
    const int64_t bytes = is_wide ? 4 : 2;
    packs = in.vocab * bytes / 16;
    if (!is_asked_for()) return "only FASTLOSS_CLUSTER_ROWS=1 asks for it";
    if (!ce.grad) return "no gradient is made with the loss";
    if (!in.target || ce.terms.smooth != 0) return "it takes class labels, and no smoothing";
    if (in.bias || in.softcap > 0 || in.scale < 0) return "it takes no bias, soft-cap or negative scale";
    if (out.entropy || out.log_sum_sq_probs || out.mean_logits) return "it makes no such statistics";
    if (!is_aligned_rows(in.x, in.row_stride * bytes) ||
        !is_aligned_rows(ce.grad, ce.grad_row_stride * bytes))
      return "a row or its gradient does not begin at a multiple of 16 bytes";
    static OfDevice majors, limits;
    int major = 0;
    if ((error = text_of(cudaGetDevice(&device)))) return nullptr;
    if ((error = ask(majors, &major, cudaDevAttrComputeCapabilityMajor))) return nullptr;
    if (major < 9) return "it needs sm_90 or newer";
    if ((error = ask(limits, &most, cudaDevAttrMaxSharedMemoryPerBlockOptin))) return nullptr;
    while (size < kMaxCluster && needed() > most) size *= 2, ++log_size;
    return needed() > most ? "two rows do not fit into a cluster's shared memory" : nullptr;
  }

  template <class Attribute>
  const char* ask(OfDevice& known, int* value, Attribute attribute) const {
    return text_of(known.get(
        device, value, [&](int of, int* found) { return cudaDeviceGetAttribute(found, attribute, of); }));
  }
};

template <class T>
const char* launch(const Plan& plan, const Logits& in, const CrossEntropy& ce, const Stats& out,
                   void* stream) {
  const auto kernel = cluster_rows_kernel<T>;
  static OfDevice allowed, active[4];  // active: by the logarithm of a cluster's size
  int unused = 0, at_once = 0;
  cudaError_t error = allowed.get(plan.device, &unused, [&](int, int* done) {
    *done = plan.most - Plan::kStatic;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, *done);
  });
  if (error != cudaSuccess) return text_of(error);
  // Not the multiprocessors over the size: a cluster lies within one group of them, and one cluster too many
  // would begin when all others are done.
  error = active[plan.log_size].get(plan.device, &at_once, [&](int, int* found) {
    return active_clusters(kernel, plan.size, kClusterThreads, plan.most - Plan::kStatic, found);
  });
  if (error != cudaSuccess) return text_of(error);
  if (at_once < 1) return "no cluster of the row kernel fits on this device";
  const int clusters = int(std::min(in.rows, int64_t(at_once)));
  const int piece = int((plan.packs + plan.size - 1) / plan.size);
  return text_of(launch_clusters(kernel, clusters, plan.size, kClusterThreads,
                                 int(plan.needed()) - Plan::kStatic, static_cast<cudaStream_t>(stream), in,
                                 ce, out, piece));
}

}  // namespace

const char* why_no_clusters(const Logits& in, const CrossEntropy& ce, const Stats& out) {
  const Plan plan(in, ce, out);
  return plan.error ? plan.error : plan.why_not;
}

const char* cluster_cross_entropy(const Logits& in, const CrossEntropy& ce, const Stats& out, void* stream,
                                  bool* took) {
  const Plan plan(in, ce, out);
  *took = !plan.error && !plan.why_not;
  if (!*took) return plan.error;
  return with_dtype(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch<T>(plan, in, ce, out, stream);
  });
}

}  // namespace fastloss::cuda
