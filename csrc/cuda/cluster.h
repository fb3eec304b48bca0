// Clusters of blocks, bulk copies into shared memory and the barriers that count their bytes: sm_90 and
// newer. Reads and writes what a bulk copy names; 4 bytes per number given to another block of the cluster.
// Every PTX instruction of cluster_rows.cu is here, so that the emulation replaces this file alone.
#pragma once

#include "platform.h"

namespace fastloss::cuda {

constexpr int kMaxCluster = 8;  // what every device with clusters can do

}  // namespace fastloss::cuda

#ifdef FASTLOSS_EMULATE

#include "cluster_emulation.h"

#else

#include <cuda_runtime.h>

namespace fastloss::cuda {

// Counts the bytes of bulk copies and of what other blocks give; 8 bytes of shared memory. One thread
// announces them, all wait.
struct Arrivals {
  uint64_t state;
};

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

#if __CUDA_ARCH__ >= 900

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

__device__ inline int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return int(size);
}

// Of every thread of every block: what came before it, shared memory of other blocks included, is seen after.
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// One thread; the fence shows the barriers to the unit that copies.
__device__ inline void start_counting(Arrivals* arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One thread: the phase is over when so many bytes have come, before or after this.
__device__ inline void expect(Arrivals* arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)),
               "r"(bytes)
               : "memory");
}

// 16 bytes into the place of `mine` in the shared memory of block `rank`, counted by that block's `arrivals`.
// No fence: what the receiver may do after it must follow from the numbers themselves.
__device__ inline void give(float4* mine, int rank, float4 value, Arrivals* arrivals) {
  uint32_t theirs, counts;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(mine)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counts) : "r"(shared_address(arrivals)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          theirs),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(counts)
      : "memory");
}

// One thread. Multiples of 16 bytes, both ends aligned to 16 bytes; the bytes have been announced.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, Arrivals* arrivals) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(arrivals))
      : "memory");
}

// Until the phase of this parity is over: phases are 0, 1, 0, ..., one for each copy.
__device__ inline void wait_for(Arrivals* arrivals, uint32_t parity) {
  uint32_t over = 0;
  while (!over) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, "
        "0, p; }"
        : "=r"(over)
        : "r"(shared_address(arrivals)), "r"(parity)
        : "memory");
  }
}

#endif

inline cudaLaunchAttribute cluster_of(int size) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(size), attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  return attribute;
}

// How many clusters the device runs at once.
template <class... Parameters>
cudaError_t active_clusters(void (*kernel)(Parameters...), int size, int threads, int shared_bytes,
                            int* found) {
  cudaLaunchAttribute attribute = cluster_of(size);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(size)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes), config.attrs = &attribute, config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(found, kernel, &config);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int clusters, int size, int threads,
                            int shared_bytes, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute = cluster_of(size);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(clusters * size)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes), config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace fastloss::cuda

#endif
