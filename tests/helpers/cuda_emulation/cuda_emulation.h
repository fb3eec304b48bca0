// Enough of CUDA for g++ to compile csrc/cuda/rows.cu unchanged and run it on the CPU.
// The blocks of a launch run one after another. A block's CUDA threads are contexts of one thread that take
// turns at barriers (fibers.h). The race detector has two builds of it: one where they are threads of their
// own (threads.h), and, with FASTLOSS_CONCURRENT_BLOCKS, one where every block has a thread, all at once.
// Warps, blocks, the grid and shared memory are small here, so that every loop and every boundary is taken by
// short rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#ifndef FASTLOSS_EMULATED_WARP
#define FASTLOSS_EMULATED_WARP 8
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#if defined(__SANITIZE_THREAD__) && !defined(FASTLOSS_CONCURRENT_BLOCKS)
#define FASTLOSS_OF_BLOCK  // a block's threads are threads, and blocks run one after another
#else
#define FASTLOSS_OF_BLOCK thread_local  // blocks of a cluster, and concurrent ones, are threads
#endif
#define __shared__ static FASTLOSS_OF_BLOCK

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

#if defined(__SANITIZE_THREAD__) && !defined(FASTLOSS_CONCURRENT_BLOCKS)
#include "threads.h"
#else
#include "fibers.h"
#endif

namespace emulated {

struct Warp {
  Barrier barrier{FASTLOSS_EMULATED_WARP};
  double lanes[FASTLOSS_EMULATED_WARP];  // holds a float too
};

inline FASTLOSS_OF_BLOCK std::unique_ptr<Barrier> block;
inline FASTLOSS_OF_BLOCK std::vector<std::unique_ptr<Warp>> warps;
inline FASTLOSS_OF_BLOCK std::vector<uint4> shared;
inline int skipped_barrier =
    -1;  // the n-th __syncthreads of every launch is left out: the race detector must notice

inline void prepare_block(unsigned size, int shared_bytes) {
  block = std::make_unique<Barrier>(size);
  warps.clear();
  for (unsigned i = 0; i < size; i += FASTLOSS_EMULATED_WARP) warps.push_back(std::make_unique<Warp>());
  shared.assign(shared_bytes / 16 + 1, uint4{~0u, ~0u, ~0u, ~0u});
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, int shared_bytes, Arguments... arguments) {
  const auto one_thread = [&](unsigned t, unsigned b) {
    threadIdx = dim3(t, 0, 0), blockDim = size, gridDim = grid, blockIdx = dim3(b % grid.x, b / grid.x, 0);
    kernel(arguments...);
  };
#ifdef FASTLOSS_CONCURRENT_BLOCKS
  std::vector<std::thread> blocks;
  for (unsigned b = 0; b < grid.x * grid.y; ++b) {
    blocks.emplace_back([&, b] {
      prepare_block(size.x, shared_bytes);
      run_threads(size.x, [&](unsigned t) { one_thread(t, b); });
    });
  }
  for (std::thread& thread : blocks) thread.join();
#else
  prepare_block(size.x, shared_bytes);
  Barrier between_blocks(size.x);
  run_threads(size.x, [&](unsigned t) {
    for (unsigned b = 0; b < grid.x * grid.y; ++b) {
      one_thread(t, b);
      between_blocks.wait();
    }
  });
#endif
}

}  // namespace emulated

#define FASTLOSS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), emulated::launch(kernel, grid, block, shared_bytes, __VA_ARGS__))
#define FASTLOSS_DYNAMIC_SHARED(name) \
  unsigned char* name = reinterpret_cast<unsigned char*>(emulated::shared.data())

inline void __syncthreads() {
  if (emulated::barriers++ != emulated::skipped_barrier) emulated::block->wait();
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  emulated::Warp& warp = *emulated::warps[threadIdx.x / FASTLOSS_EMULATED_WARP];
  const int lane = threadIdx.x % FASTLOSS_EMULATED_WARP;
  warp.lanes[lane] = value;
  warp.barrier.wait();
  value = T(warp.lanes[lane ^ mask]);
  warp.barrier.wait();
  return value;
}

template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  emulated::Warp& warp = *emulated::warps[threadIdx.x / FASTLOSS_EMULATED_WARP];
  const int lane = threadIdx.x % FASTLOSS_EMULATED_WARP;
  warp.lanes[lane] = value;
  warp.barrier.wait();
  value = T(warp.lanes[lane < distance ? lane : lane - distance]);
  warp.barrier.wait();
  return value;
}

// As on a GPU, an atomic orders no other access: fences do. They are one variable here, which the race
// detector understands: what came before a fence comes before all that follows a later fence.
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
inline unsigned atomicExch(unsigned* p, unsigned value) {
  return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);
}
namespace emulated {
inline bool no_fences = false;  // the race detector must notice
inline unsigned fence;
}  // namespace emulated
inline void __threadfence() {
  if (!emulated::no_fences) __atomic_fetch_add(&emulated::fence, 1u, __ATOMIC_SEQ_CST);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess, cudaFuncAttributeMaxDynamicSharedMemorySize };
enum {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor
};
namespace emulated {
inline thread_local int device;  // the current one
inline std::atomic<int> asked[128],
    allowed[128];  // by device: questions about it, and kernels given more shared memory
}  // namespace emulated
inline const char* cudaGetErrorString(int) { return "emulated"; }
inline int cudaGetLastError() { return cudaSuccess; }
inline int cudaGetDevice(int* device) { return *device = emulated::device, cudaSuccess; }
// One KB is left for the copy of a row, on odd devices half of one: rows longer than that exercise the part
// that is read again.
inline int cudaDeviceGetAttribute(int* value, int, int device) {
  ++emulated::asked[device];
  return *value = 2 * (3072 - device % 2 * 512), cudaSuccess;
}
struct cudaFuncAttributes {};
template <class Kernel>
int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  ++emulated::allowed[emulated::device];
  return cudaSuccess;
}

namespace fastloss::cuda {

using std::min;

constexpr int kWarp = FASTLOSS_EMULATED_WARP;
constexpr int kMaxThreads = 2 * kWarp;
#ifdef FASTLOSS_CONCURRENT_BLOCKS
constexpr int64_t kMaxBlocks = 4;
#else
constexpr int64_t kMaxBlocks = 2;
#endif
constexpr int kSharedUnasked = 256;

inline float half_to_float(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return float(x);
}
inline uint32_t half_bits(float x) {
  const _Float16 half = _Float16(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline uint32_t two_half(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t bfloat16_bits(float x) {  // to nearest, ties to even
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t two_bfloat16(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
inline float approximate_reciprocal(float x) { return 1.0f / x; }

}  // namespace fastloss::cuda
