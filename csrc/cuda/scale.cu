// scale_in_place of docs/engine.md: x *= *scale, the product in float32.
// Reads and writes x once; touches none of it where the scale is 1, as the usual upstream gradient is.
// One wave of blocks, each walking over its share (gridDim.x over rows, gridDim.y along them): nothing to do
// must cost little.
#include <algorithm>

#include "device_limits.h"
#include "launch.h"

namespace fastloss::cuda {
namespace {

constexpr int kThreads = kMaxThreads < 256 ? kMaxThreads : 256;
constexpr int kInFlight = 4;
constexpr int64_t kBlocksPerMultiprocessor = 8;
constexpr int64_t kMaxBlocksAlongRow = 65535;  // what gridDim.y takes

// A row may be a whole tensor: its indices are 64-bit.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(Scaling a) {
  const float scale = *a.scale;
  if (scale == 1.0f) return;
  constexpr int N = Pack<T>::N;
  const int64_t first = int64_t(blockIdx.y) * blockDim.x + threadIdx.x,
                step = int64_t(gridDim.y) * blockDim.x;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    T* x = static_cast<T*>(a.x) + row * a.row_stride;
    const int past = misalignment(x);
    const int64_t to_boundary = past == 0 ? 0 : (16 - past) / int(sizeof(T));
    const int64_t head = to_boundary < a.width ? to_boundary : a.width, packs = (a.width - head) / N,
                  edges = a.width - packs * N;
    for (int64_t i = first; i < edges; i += step) {
      T* p = x + (i < head ? i : i + packs * N);
      *p = from_float<T>(to_float(*p) * scale);
    }
    for_each_pack<kInFlight>(
        first, packs, step, [&](int64_t i) { return load_pack(x + head + i * N, true); },
        [&](int64_t i, const Pack<T>& pack) {
          float product[N];
#pragma unroll
          for (int k = 0; k < N; ++k) product[k] = pack[k] * scale;
          store_pack(x + head + i * N, product);
        });
  }
}

cudaError_t blocks_of_a_wave(int64_t* blocks) {
  static OfDevice known;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = known.get(device, &multiprocessors, [](int of, int* found) {
      return cudaDeviceGetAttribute(found, cudaDevAttrMultiProcessorCount, of);
    });
  *blocks = std::clamp<int64_t>(multiprocessors * kBlocksPerMultiprocessor, 1, kMaxBlocks);
  return error;
}

}  // namespace

const char* scale_in_place(const Scaling& a, void* stream) {
  if (a.rows == 0 || a.width == 0) return nullptr;
  int64_t wave = 0;
  if (const char* error = text_of(blocks_of_a_wave(&wave))) return error;
  return with_dtype(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t per_block = int64_t(kThreads) * kInFlight * Pack<T>::N;
    const int64_t rows_at_once = std::min(a.rows, wave), needed = (a.width + per_block - 1) / per_block;
    const dim3 grid(
        unsigned(rows_at_once),
        unsigned(std::clamp<int64_t>(std::min(needed, wave / rows_at_once), 1, kMaxBlocksAlongRow)));
    FASTLOSS_LAUNCH(scale_kernel<T>, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(stream), a);
    return text_of(cudaGetLastError());
  });
}

}  // namespace fastloss::cuda
