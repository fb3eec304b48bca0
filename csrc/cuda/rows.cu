// Launchers of the row kernels: which instance, how many threads, how much of a row stays in shared memory.
// Reads a row once, and writes its gradient once: 2 V sizeof(T) bytes per row in row_cross_entropy.
// A block's threads follow from V and dtype alone, so every function adds a row up in the same order; the
// kernel of cluster_rows.cu, off unless it is asked for, in another.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cluster_rows.h"
#include "device_limits.h"
#include "forward.h"
#include "gradient.h"
#include "launch.h"

namespace fastloss::cuda {
namespace {

constexpr int kPacksPerThread = 4;
constexpr int64_t kMaxVocab = int64_t(1)
                              << 30;  // indices within a row are 32-bit, with room for an unrolled step

template <class T>
int threads_for(int64_t vocab) {
  const int64_t packs = vocab / Pack<T>::N;
  const int64_t threads = (packs + kPacksPerThread - 1) / kPacksPerThread;
  return int(std::clamp<int64_t>((threads + kWarp - 1) / kWarp * kWarp, kWarp, kMaxThreads));
}

const char* unusable(const Logits& in) {
  return in.vocab < 1 || in.vocab > kMaxVocab ? "vocab must be between 1 and 2^30" : nullptr;
}

// Half of a multiprocessor's shared memory, so that one block reads while another reduces or writes.
cudaError_t shared_per_block(int device, int* bytes) {
  constexpr int kStatic =
      2048;  // the reduction's own, and the kilobyte that the system keeps of each block's
  static OfDevice known;
  return known.get(device, bytes, [](int of, int* found) {
    int per_multiprocessor = 0, per_block = 0;
    cudaError_t error =
        cudaDeviceGetAttribute(&per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, of);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, of);
    *found = std::max(std::min(per_multiprocessor / 2, per_block) - kStatic, 0);
    return error;
  });
}

// Lets a kernel have as much as any row of it may want on the current device; what a launch takes is its own.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, OfDevice& allowed, int device, int bytes) {
  int unused = 0;
  return allowed.get(device, &unused, [&](int, int* done) {
    *done = bytes;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  });
}

template <class T, bool General, bool Extra, bool Grad>
const char* launch_forward(const Logits& in, const CrossEntropy& ce, const Stats& out, void* stream) {
  const auto kernel = row_forward_kernel<T, General, Extra, Grad>;
  int keep_packs = 0, shared = 0;
  if (Grad) {
    int device = 0, available = 0;
    if (const char* error = text_of(cudaGetDevice(&device))) return error;
    if (const char* error = text_of(shared_per_block(device, &available))) return error;
    keep_packs = int(std::min<int64_t>(in.vocab / Pack<T>::N, std::max(available / 16 - 1, 0)));
    shared = 16 * (keep_packs + 1);  // one more for a misaligned row
    if (shared > kSharedUnasked) {
      static OfDevice allowed;  // of this kernel
      if (const char* error = text_of(allow_shared(kernel, allowed, device, available))) return error;
    }
  }
  const dim3 grid(unsigned(std::min<int64_t>(in.rows, kMaxBlocks)));
  FASTLOSS_LAUNCH(kernel, grid, dim3(threads_for<T>(in.vocab)), shared, static_cast<cudaStream_t>(stream), in,
                  ce, out, keep_packs);
  return text_of(cudaGetLastError());
}

template <class T, bool General, bool Weights>
const char* launch_grad(const Logits& in, const Coefficients& k, void* stream) {
  const auto kernel = row_grad_kernel<T, General, Weights>;
  const int threads = std::min(threads_for<T>(in.vocab), kGradThreads);
  // Nothing is shared along a row: a long one is cut, each block doing four steps of its loop.
  const int64_t per_block = int64_t(threads) * kPacksPerThread * Pack<T>::N * 4;
  const dim3 grid(unsigned(std::min<int64_t>(in.rows, kMaxBlocks)),
                  unsigned(std::min<int64_t>((in.vocab + per_block - 1) / per_block, 64)));
  FASTLOSS_LAUNCH(kernel, grid, dim3(threads), 0, static_cast<cudaStream_t>(stream), in, k);
  return text_of(cudaGetLastError());
}

template <bool General, bool Extra, bool Grad>
const char* forward_of(const Logits& in, const CrossEntropy& ce, const Stats& out, void* stream) {
  return with_dtype(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch_forward<T, General, Extra, Grad>(in, ce, out, stream);
  });
}

// A row's own scale is one over a temperature, and not negative.
bool is_general(const Logits& in) { return in.bias || in.softcap > 0 || in.scale < 0; }

}  // namespace

const char* row_cross_entropy(const Logits& in, const CrossEntropy& ce, const Stats& out, void* stream) {
  if (in.rows == 0) return nullptr;
  if (const char* error = unusable(in)) return error;
  bool took = false;
  const char* error = cluster_cross_entropy(in, ce, out, stream, &took);
  if (error || took) return error;
  const bool sums_w = out.loss && (in.target == nullptr || ce.terms.smooth != 0);
  const bool extra = sums_w || out.entropy || out.log_sum_sq_probs || out.mean_logits;
  const auto pick = [&](auto general, auto more) {
    constexpr bool G = decltype(general)::value, E = decltype(more)::value;
    return ce.grad ? forward_of<G, E, true>(in, ce, out, stream)
                   : forward_of<G, E, false>(in, ce, out, stream);
  };
  const std::true_type yes;
  const std::false_type no;
  if (is_general(in)) return extra ? pick(yes, yes) : pick(yes, no);
  return extra ? pick(no, yes) : pick(no, no);
}

const char* row_stats(const Logits& in, const Stats& out, void* stream) {
  CrossEntropy none = {};
  none.terms.keep = 1.0f;
  return row_cross_entropy(in, none, out, stream);
}

const char* row_grad(const Logits& in, const Coefficients& k, void* stream) {
  if (in.rows == 0) return nullptr;
  if (const char* error = unusable(in)) return error;
  return with_dtype(in.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (is_general(in))
      return k.w ? launch_grad<T, true, true>(in, k, stream) : launch_grad<T, true, false>(in, k, stream);
    return k.w ? launch_grad<T, false, true>(in, k, stream) : launch_grad<T, false, false>(in, k, stream);
  });
}

const char* why_not() {
  cudaFuncAttributes attributes;
  const char* error = text_of(cudaFuncGetAttributes(&attributes, row_grad_kernel<float, false, false>));
  cudaGetLastError();  // this error is an answer: the next launch must not find it
  return error;
}

}  // namespace fastloss::cuda
