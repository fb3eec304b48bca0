// Logits in storage (float32, bfloat16, float16) and 16 bytes of them at a time.
// 16 bytes per load or store; N elements of the row's dtype.
// Conversions work on bits, so that the same lines compile for the device and for the emulation.
#pragma once

#include <cstdint>
#include <type_traits>

#include "platform.h"

namespace fastloss::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The bits of two neighbours in one word, or of one float32: what a pack holds and the conversions work on.
template <class T>
constexpr int kPerWord = 4 / sizeof(T);

template <class T>
__device__ inline float float_in(uint32_t word, int k) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(word);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return __uint_as_float(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    return half_to_float(uint16_t(k % 2 == 0 ? word : word >> 16));
  }
}

template <class T>
__device__ inline uint32_t word_of(const float* x) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(x[0]);
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return two_bfloat16(x[0], x[1]);
  } else {
    return two_half(x[0], x[1]);
  }
}

__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline uint32_t bits_of(bfloat16 x) { return x.bits; }
__device__ inline uint32_t bits_of(float16 x) { return x.bits; }

template <class T>
__device__ inline float to_float(T x) {
  return float_in<T>(bits_of(x), 0);
}

template <class T>
__device__ inline T from_bits(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(bits);
  } else {
    return {uint16_t(bits)};
  }
}

template <class T>
__device__ inline T from_float(float x) {
  const float two[2] = {x, 0.0f};
  return from_bits<T>(word_of<T>(two));
}

template <class T>
struct Pack {
  static constexpr int N = 16 / sizeof(T);
  uint32_t word[4];

  __device__ float operator[](int k) const { return float_in<T>(word[k / kPerWord<T>], k); }
  __device__ static Pack of(uint4 raw) { return {{raw.x, raw.y, raw.z, raw.w}}; }
  __device__ uint4 raw() const { return {word[0], word[1], word[2], word[3]}; }
};

constexpr float kLog2E = 1.4426950408889634f;

// 2^x in one instruction; below 2^-126 it is 0.
__device__ inline float approximate_exp2(float x) {
#ifdef FASTLOSS_EMULATE
  return exp2f(x);
#else
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#endif
}

// Bytes past the last 16-byte boundary.
template <class T>
__device__ inline int misalignment(const T* p) {
  return int(reinterpret_cast<uintptr_t>(p) % 16);
}

template <class T>
__device__ inline bool is_aligned(const T* p) {
  return misalignment(p) == 0;
}

// Logits are read through L2 only: never through the read-only path, since the gradient may overwrite them.
// `once` marks lines that nobody reads again, so that L2 gives them up before those that a second pass needs.
template <class T>
__device__ inline Pack<T> load_pack(const T* p, bool once) {
  const uint4* address = reinterpret_cast<const uint4*>(p);
  return Pack<T>::of(once ? __ldcs(address) : __ldcg(address));
}

// A misaligned row is read element by element: the neighbouring lanes' elements are then in L1.
template <class T>
__device__ inline Pack<T> load_pack_unaligned(const T* p) {
  constexpr int per_word = kPerWord<T>;
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pack.word[i] = bits_of(p[i * per_word]);
    if constexpr (per_word == 2) pack.word[i] |= bits_of(p[2 * i + 1]) << 16;
  }
  return pack;
}

template <class T>
__device__ inline void store_pack(T* p, const float (&x)[Pack<T>::N]) {
  constexpr int per_word = kPerWord<T>;
  const uint4 raw = {word_of<T>(x), word_of<T>(x + per_word), word_of<T>(x + 2 * per_word),
                     word_of<T>(x + 3 * per_word)};
  __stcs(reinterpret_cast<uint4*>(p), raw);
}

template <class T>
__device__ inline void store_anywhere(T* p, const float (&x)[Pack<T>::N], bool aligned) {
  if (aligned) {
    store_pack(p, x);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<T>::N; ++k) p[k] = from_float<T>(x[k]);
  }
}

template <class T>
__device__ inline void store_pack_unaligned(T* p, const Pack<T>& pack) {
#pragma unroll
  for (int k = 0; k < Pack<T>::N; ++k)
    p[k] = from_bits<T>(pack.word[k / kPerWord<T>] >> (k % kPerWord<T> * 16));
}

// A thread's packs from `i` on, `step` apart, in groups of U whose loads are all under way before the first
// is used; then in groups of half as many, so that no load of the loop asks for the end. Returns the first
// index past the end.
template <int U, class Index, class Load, class Use>
__device__ inline Index for_each_pack(Index i, Index end, Index step, const Load& load, const Use& use) {
  decltype(load(i)) pack[U];
  for (; i + (U - 1) * step < end; i += U * step) {
#pragma unroll
    for (int u = 0; u < U; ++u) pack[u] = load(i + u * step);
#pragma unroll
    for (int u = 0; u < U; ++u) use(i + u * step, pack[u]);
  }
  if constexpr (U > 1) i = for_each_pack<U / 2>(i, end, step, load, use);
  return i;
}

// N floats at `v` of a bias or a weight vector, `absent` for each where there is no vector.
template <int N>
__device__ inline void load_floats(const float* vector, int v, bool aligned, float absent, float (&out)[N]) {
  const float* p = vector + (vector ? v : 0);
  if (vector == nullptr) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = absent;
  } else if (N % 4 == 0 && aligned) {
#pragma unroll
    for (int k = 0; k < N / 4; ++k) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(p) + k);
      out[4 * k] = four.x, out[4 * k + 1] = four.y, out[4 * k + 2] = four.z, out[4 * k + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = __ldg(p + k);
  }
}

}  // namespace fastloss::cuda
