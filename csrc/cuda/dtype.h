// Logits in storage (float32, bfloat16, float16) and 16 bytes of them at a time.
// 16 bytes per load or store; N elements of the row's dtype.
// Conversions work on bits, so that the same lines compile for the device and for the emulation.
#pragma once

#include "platform.h"

namespace fastloss::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(float16 x) { return half_to_float(x.bits); }

template <class T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (__is_same(T, bfloat16)) {
    return {float_to_bfloat16(x)};
  } else {
    return {float_to_half(x)};
  }
}

template <class T>
struct alignas(16) Pack {
  static constexpr int N = 16 / sizeof(T);
  T v[N];
};

template <class T>
__device__ inline bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Bytes past the last 16-byte boundary.
template <class T>
__device__ inline int misalignment(const T* p) {
  return int(reinterpret_cast<uintptr_t>(p) % 16);
}

template <class T>
__device__ inline Pack<T> unpack(uint4 raw) {
  Pack<T> pack;
  memcpy(&pack, &raw, 16);
  return pack;
}

template <class T>
__device__ inline uint4 pack_bits(const Pack<T>& pack) {
  uint4 raw;
  memcpy(&raw, &pack, 16);
  return raw;
}

// Logits are read through L2 only: never through the read-only path, since the gradient may overwrite them.
// `once` marks lines that nobody reads again, so that L2 gives them up before those that a second pass needs.
template <class T>
__device__ inline Pack<T> load_pack(const T* p, bool once) {
  const uint4* address = reinterpret_cast<const uint4*>(p);
  return unpack<T>(once ? __ldcs(address) : __ldcg(address));
}

// A misaligned row is read element by element: the neighbouring lanes' elements are then in L1.
template <class T>
__device__ inline Pack<T> load_pack_unaligned(const T* p) {
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < Pack<T>::N; ++k) pack.v[k] = p[k];
  return pack;
}

template <class T>
__device__ inline void store_pack(T* p, const Pack<T>& pack) {
  __stcs(reinterpret_cast<uint4*>(p), pack_bits(pack));
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
