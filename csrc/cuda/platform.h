// What the kernels take from CUDA beyond the language, so that g++ can compile them against an emulation.
// Reads and writes nothing.
// One launch macro and one name for dynamic shared memory: the two things whose syntax C++ does not have.
#pragma once

#ifdef FASTLOSS_EMULATE

#include "cuda_emulation.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#define FASTLOSS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define FASTLOSS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fastloss::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int64_t kMaxBlocks = 2147483647;

__device__ inline float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint16_t float_to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// One instruction, 1 ulp; the IEEE reciprocal has a slow path that every element would pay registers for.
__device__ inline float approximate_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace fastloss::cuda

#endif
