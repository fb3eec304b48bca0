// dx_v = (a [v = t] + p_v (b + c log p_v) + d w_v) slope_v over one row, and row_grad, which does only that.
// Reads the row once (from shared memory where the caller kept it) and writes it once.
// 16-byte vectors aligned to the row written, 4 in flight per thread; row_grad cuts long rows over gridDim.y.
#pragma once

#include "transform.h"

namespace fastloss::cuda {

// p_v = power(exponent(v)) and log p_v = exponent(v) log 2 or exponent(v), up to what b and c contain; all
// four contain scale.
struct RowGradient {
  float reference, a, b, c, d;
};

// The part of a row that is in shared memory, element v at byte `offset + v * sizeof(T)`.
struct Kept {
  const unsigned char* bytes;
  int offset;
  int elements;
};

// Elements [0, head) and [head + body, vocab) one by one, the body in packs. An `out` misaligned differently
// than `x` has no body. Elementwise, so the split changes no bit of the result.
struct Split {
  int head, packs, edges;

  template <class T>
  __device__ static Split of(const T* x, const T* out, int vocab) {
    constexpr int N = Pack<T>::N;
    const int past = misalignment(out);
    const int head = min(past == 0 ? 0 : int((16 - past) / sizeof(T)), vocab);
    if (past != misalignment(x)) return {vocab, 0, vocab};
    const int packs = (vocab - head) / N;
    return {head, packs, vocab - packs * N};
  }

  template <int N>
  __device__ int edge(int i) const {
    return i < head ? i : i + packs * N;
  }
};

// `x[k]` is the logit in float32: of a pack, or of an array of one.
template <class T, bool General, bool Entropy, int N, class X>
__device__ inline void gradient_of(const X& x, const float (&bias)[N], const float (&w)[N],
                                   const Transform<General>& transform, const RowGradient& g, int target_at,
                                   float (&dx)[N]) {
  const auto exponent = transform.template exponent<T>();
  float slope[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float d = exponent(transform.value(x[k], bias[k], &slope[k]), g.reference);
    const float coefficient = Entropy ? fmaf(g.c, fmaxf(d, -200.0f), g.b) : g.b;  // 0 * -inf = 0
    dx[k] = fmaf(exponent.power(d), coefficient, g.d * w[k]);
  }
  if (unsigned(target_at) < unsigned(N)) {
#pragma unroll
    for (int k = 0; k < N; ++k) dx[k] += k == target_at ? g.a : 0.0f;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) dx[k] *= slope[k];
}

// `x` may be `out`: each element is read by the thread that writes it, before it does.
template <bool General, bool Weights, bool Entropy, class T>
__device__ inline void write_gradient(const T* x, T* out, int vocab, const float* bias, const float* w,
                                      int target, const Transform<General>& transform, const RowGradient& g,
                                      const Kept& kept, int first, int step) {
  // Loads in flight: more would spill, and a row that is kept in shared memory needs few.
  constexpr int N = Pack<T>::N, U = !Entropy || ((General || Weights) && N == 8) ? 2 : 4;
  const Split split = Split::of(x, out, vocab);
  if (!General) bias = nullptr;
  if (!Weights) w = nullptr;

  for (int i = first; i < split.edges; i += step) {
    const int v = split.template edge<N>(i);
    const float logit[1] = {to_float(x[v])};
    float b[1], weight[1], result[1];
    load_floats(bias, v, false, 0.0f, b);
    load_floats(w, v, false, 1.0f, weight);
    gradient_of<T, General, Entropy>(logit, b, weight, transform, g, target - v, result);
    out[v] = from_float<T>(result[0]);
  }

  const bool bias_aligned = bias && is_aligned(bias + split.head),
             w_aligned = w && is_aligned(w + split.head);
  const auto write = [&](int i, const Pack<T>& pack) {
    const int v = split.head + i * N;
    float b[N], weight[N], result[N];
    load_floats(bias, v, bias_aligned, 0.0f, b);
    load_floats(w, v, w_aligned, 1.0f, weight);
    gradient_of<T, General, Entropy>(pack, b, weight, transform, g, target - v, result);
    store_pack(out + v, result);
  };
  int i = first;
  if constexpr (!Entropy) {  // only the kernel that has just read the row keeps any of it
    const int kept_packs =
        kept.elements < split.head ? 0 : min((kept.elements - split.head) / N, split.packs);
    const unsigned char* bytes = kept.bytes + kept.offset + split.head * int(sizeof(T));
    i = for_each_pack<U>(
        i, kept_packs, step,
        [&](int j) { return Pack<T>::of(*reinterpret_cast<const uint4*>(bytes + j * 16)); }, write);
  }
  for_each_pack<U>(
      i, split.packs, step, [&](int j) { return load_pack(x + split.head + j * N, true); }, write);
}

template <class T>
__device__ inline void fill_row(T* out, int vocab, float value, int first, int step) {
  constexpr int N = Pack<T>::N;
  const Split split = Split::of(out, out, vocab);
  float values[N];
#pragma unroll
  for (int k = 0; k < N; ++k) values[k] = value;
  for (int i = first; i < split.edges; i += step) out[split.template edge<N>(i)] = from_float<T>(value);
  for (int i = first; i < split.packs; i += step) store_pack(out + split.head + i * N, values);
}

__device__ inline float at_row(const float* values, int64_t row) { return values ? values[row] : 0.0f; }

constexpr int kGradThreads = 256;  // three such blocks leave a thread 80 registers

template <class T, bool General, bool Weights>
__global__ void __launch_bounds__(kGradThreads, 3) row_grad_kernel(Logits in, Coefficients k) {
  const int vocab = int(in.vocab);
  const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  const Transform<General> of_all(in);
  for (int64_t row = blockIdx.x; row < in.rows; row += gridDim.x) {
    const int64_t t = in.target ? in.target[row] : -1;
    T* out = static_cast<T*>(k.out) + row * k.out_row_stride;
    const bool ignored = in.target && t == in.ignore_index;
    if (ignored || (in.target && (t < 0 || t >= in.vocab))) {
      fill_row(out, vocab, ignored ? 0.0f : NAN, first, step);
      continue;
    }
    // p = power / sum, with log p = exponent kE - log sum, relative to the reference: b and c take in what is
    // constant.
    const Transform<General> transform = of_all.of_row(in, row);
    const auto exponent = transform.template exponent<T>();
    const float reference = exponent.reference_of_base(k.lse_parts[2 * row]);
    const float log_sum = k.lse_parts[2 * row + 1] - exponent.rounded_off(reference),
                over_sum = expf(-log_sum);
    const float scale = transform.scale, b = at_row(k.b, row) * scale, c = at_row(k.c, row) * scale;
    const RowGradient g = {reference, at_row(k.a, row) * scale, (b - c * log_sum) * over_sum,
                           c * exponent.kE * over_sum, at_row(k.d, row) * scale};
    write_gradient<General, Weights, true>(static_cast<const T*>(in.x) + row * in.row_stride, out, vocab,
                                           in.bias, k.w ? k.w + row * k.w_row_stride : nullptr, int(t),
                                           transform, g, Kept{nullptr, 0, 0}, first, step);
  }
}

}  // namespace fastloss::cuda
