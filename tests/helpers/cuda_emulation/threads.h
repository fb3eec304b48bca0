// A block's CUDA threads as threads of the operating system, so that ThreadSanitizer sees their races.
// Included by cuda_emulation.h alone.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

namespace emulated {

inline thread_local int barriers;  // how many __syncthreads this thread has passed

// What a CUDA thread does while it waits for another, and says when others need not wait any more.
inline void take_turns() { std::this_thread::yield(); }
inline void made_progress() {}

class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  void wait() {
    const int generation = generation_.load();
    if (arrived_.fetch_add(1) + 1 == n_) {
      arrived_.store(0);
      generation_.fetch_add(1);
      generation_.notify_all();
    } else {
      while (generation_.load() == generation) generation_.wait(generation);
    }
  }

 private:
  const int n_;
  std::atomic<int> arrived_{0}, generation_{0};
};

// f(t) of n threads at once.
template <class F>
void run_threads(unsigned n, const F& f) {
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < n; ++t) threads.emplace_back([&f, t] { f(t); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace emulated
