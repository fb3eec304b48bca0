// csrc/cuda/cluster.h on the CPU. A cluster's blocks run at once, each in a thread of its own whose fibers
// are the block's CUDA threads; clusters run one after another. A bulk copy spoils its destination (all bits
// set: NaN) when it is issued and copies only when somebody waits for the phase that it belongs to: who reads
// without the wait, or waits for the wrong phase, reads NaN. What is given to another block is there at once,
// so that the race detector sees who reads it without having waited, or before the last reader is done.
// Included by cluster.h alone.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

namespace emulated {

struct Cluster {
  explicit Cluster(int size) : size(size), shared(size) {}
  const int size;
  std::vector<unsigned char*> shared;  // of each block
  std::mutex mutex;
  std::condition_variable changed;
  int arrived = 0;
  unsigned generation = 0;
  std::map<const void*, int> given;  // bytes, by the Arrivals that count them

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = generation;
    if (++arrived == size) {
      arrived = 0, ++generation;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return generation != mine; });
    }
  }
};

inline thread_local Cluster* cluster;
inline thread_local int cluster_rank;
// Left out, so that a test sees that the emulation notices.
inline bool no_cluster_barriers = false, no_arrivals = false, no_gifts = false;
inline std::atomic<int> cluster_launches;

[[noreturn]] inline void refuse(const char* what) {
  std::fprintf(stderr, "emulated CUDA: %s\n", what);
  std::abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
  const void* arrivals;
};
inline thread_local std::vector<Copy> copies;  // of a block, issued and not there yet

}  // namespace emulated

namespace fastloss::cuda {

struct Arrivals {
  static constexpr uint32_t kStarted = 0x57a27ed;
  uint32_t started;
  uint32_t phases;  // that are over
  int32_t expected;
};

inline int cluster_rank() { return emulated::cluster_rank; }
inline int cluster_size() { return emulated::cluster->size; }

inline void cluster_barrier() {
  emulated::block->wait();
  if (threadIdx.x == 0 && !emulated::no_cluster_barriers) emulated::cluster->wait();
  emulated::block->wait();
}

inline void start_counting(Arrivals* arrivals) { *arrivals = {Arrivals::kStarted, 0, 0}; }

inline void expect(Arrivals* arrivals, int bytes) {
  if (arrivals->expected) emulated::refuse("two announcements in a phase that one thread's arrival ends");
  arrivals->expected = bytes;
}

inline void give(float4* mine, int rank, float4 value, Arrivals* arrivals) {
  emulated::Cluster& cluster = *emulated::cluster;
  const auto in_block = [&](auto* p) {
    const auto at = reinterpret_cast<unsigned char*>(p) - cluster.shared[emulated::cluster_rank];
    return cluster.shared[rank] + at;
  };
  const auto theirs = reinterpret_cast<Arrivals*>(in_block(arrivals));
  if (theirs->started != Arrivals::kStarted) emulated::refuse("given to a block that has not begun to count");
  memcpy(in_block(mine), &value, sizeof value);
  const std::lock_guard<std::mutex> lock(cluster.mutex);
  cluster.given[theirs] += sizeof value;
}

inline void copy_bulk(void* to, const void* from, int bytes, Arrivals* arrivals) {
  if (uintptr_t(to) % 16 || uintptr_t(from) % 16 || bytes % 16 || bytes <= 0)
    emulated::refuse("a bulk copy that is not of 16-byte pieces");
  if (arrivals->expected != bytes) emulated::refuse("a bulk copy that was not announced");
  memset(to, 0xff, bytes);
  emulated::copies.push_back({to, from, bytes, arrivals});
}

// Whether the copy, or all gifts, that a phase waits for are there, which ends it.
inline bool ends(Arrivals* arrivals) {
  if (arrivals->expected == 0) return false;
  for (size_t i = 0; i < emulated::copies.size(); ++i) {
    const emulated::Copy copy = emulated::copies[i];
    if (copy.arrivals != arrivals) continue;
    memcpy(copy.to, copy.from, copy.bytes);
    emulated::copies.erase(emulated::copies.begin() + i);
    arrivals->expected = 0, ++arrivals->phases;
    return true;
  }
  const std::lock_guard<std::mutex> lock(emulated::cluster->mutex);
  int& given = emulated::cluster->given[arrivals];
  if (given < arrivals->expected) return false;
  given -= arrivals->expected;
  arrivals->expected = 0, ++arrivals->phases;
  return true;
}

inline void wait_for(Arrivals* arrivals, uint32_t parity) {
  if (emulated::no_arrivals) return;
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while ((arrivals->phases & 1) == parity) {  // that phase is not over
    if (ends(arrivals)) {
      emulated::made_progress();
      return;
    }
    if (arrivals->expected) {  // and other blocks have still to give it
      if (emulated::no_gifts) return;
      if (std::chrono::steady_clock::now() > until) emulated::refuse("gifts that nobody gives");
      std::this_thread::yield();
      emulated::made_progress();
    }
    emulated::take_turns();  // the thread that announces it may come later
  }
}

template <class Kernel>
int active_clusters(Kernel, int, int, int, int* found) {
  return *found = 2, cudaSuccess;  // of three rows, one cluster has two
}

template <class... Parameters, class... Arguments>
int launch_clusters(void (*kernel)(Parameters...), int clusters, int size, int threads, int shared_bytes,
                    cudaStream_t, Arguments... arguments) {
  ++emulated::cluster_launches;
  for (int c = 0; c < clusters; ++c) {
    emulated::Cluster cluster(size);
    std::vector<std::thread> blocks;
    for (int rank = 0; rank < size; ++rank) {
      blocks.emplace_back([&, rank] {
        emulated::cluster = &cluster, emulated::cluster_rank = rank;
        emulated::copies.clear();
        emulated::prepare_block(threads, shared_bytes);
        cluster.shared[rank] = reinterpret_cast<unsigned char*>(emulated::shared.data());
        cluster.wait();
        emulated::run_threads(threads, [&](unsigned t) {
          threadIdx = dim3(t, 0, 0), blockDim = dim3(threads), gridDim = dim3(clusters * size),
          blockIdx = dim3(c * size + rank, 0, 0);
          kernel(Parameters(arguments)...);
        });
        if (!emulated::copies.empty() && !emulated::no_arrivals)
          emulated::refuse("a bulk copy that nobody waited for");
        cluster.wait();
      });
    }
    for (std::thread& block : blocks) block.join();
  }
  return cudaSuccess;
}

}  // namespace fastloss::cuda
