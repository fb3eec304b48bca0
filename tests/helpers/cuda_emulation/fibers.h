// A block's CUDA threads as contexts of one thread of the operating system: one runs until it waits at a
// barrier, then the next one. Threads of the operating system would be woken at every barrier, which takes a
// hundred times as long, and far longer beside other processes. Included by cuda_emulation.h alone.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

namespace emulated {

inline thread_local int barriers;  // how many __syncthreads this CUDA thread has passed

struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  bool is_over;
};

// Of the thread that launches.
struct Fibers {
  std::vector<Fiber> all;
  unsigned count = 0, running = 0;
  unsigned turns = 0;  // since a barrier opened or a fiber ended
  ucontext_t launcher;
  std::function<void(unsigned)> body;
};
inline thread_local Fibers fibers;

// Goes on with the next fiber that is not over, and comes back when it is this one's turn again.
inline void take_turns() {
  Fibers& f = fibers;
  if (++f.turns > f.count) {
    std::fprintf(stderr, "emulated CUDA: a barrier that some threads of the block never reach\n");
    std::abort();
  }
  const unsigned mine = f.running;
  const dim3 thread = threadIdx, of_grid = blockIdx;
  const int passed = barriers;
  do f.running = (f.running + 1) % f.count;
  while (f.all[f.running].is_over);
  if (f.running != mine) swapcontext(&f.all[mine].context, &f.all[f.running].context);
  threadIdx = thread, blockIdx = of_grid, barriers = passed;
}

class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  void wait() {
    const unsigned generation = generation_;
    if (++arrived_ == n_) {
      arrived_ = 0, ++generation_, fibers.turns = 0;
    } else {
      while (generation_ == generation) take_turns();
    }
  }

 private:
  const int n_;
  int arrived_ = 0;
  unsigned generation_ = 0;
};

inline void run_fiber() {
  Fibers& f = fibers;
  barriers = 0;
  f.body(f.running);
  f.all[f.running].is_over = true, f.turns = 0;
  for (unsigned i = 0; i < f.count; ++i) {
    if (f.all[i].is_over) continue;
    f.running = i;
    setcontext(&f.all[i].context);
  }
  setcontext(&f.launcher);
}

// f(t) of n fibers.
template <class F>
void run_threads(unsigned n, const F& body) {
  Fibers& f = fibers;
  if (f.all.size() < n) f.all.resize(n);
  f.count = n, f.running = 0, f.turns = 0, f.body = std::cref(body);
  for (unsigned t = 0; t < n; ++t) {
    Fiber& fiber = f.all[t];
    fiber.is_over = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  swapcontext(&f.launcher, &f.all[0].context);
}

}  // namespace emulated
