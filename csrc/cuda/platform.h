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
constexpr int kMaxThreads =
    448;  // two such blocks leave a thread 72 registers; 512 would leave 64, and spills
constexpr int64_t kMaxBlocks = 2147483647;
constexpr int kSharedUnasked =
    48 * 1024;  // dynamic shared memory of a block that no kernel has to be allowed

__device__ inline float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
// The first argument goes to the low half: one conversion instruction for both.
__device__ inline uint32_t two_half(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return uint32_t(__half_as_ushort(both.x)) | uint32_t(__half_as_ushort(both.y)) << 16;
}
__device__ inline uint32_t two_bfloat16(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return uint32_t(__bfloat16_as_ushort(both.x)) | uint32_t(__bfloat16_as_ushort(both.y)) << 16;
}

// One instruction, 1 ulp; the IEEE reciprocal has a slow path that every element would pay registers for.
__device__ inline float approximate_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace fastloss::cuda

#endif
