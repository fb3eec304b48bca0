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
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace emulated {

inline thread_local int barriers;  // how many __syncthreads this CUDA thread has passed

struct Context {
  ucontext_t saved;
  void* known = nullptr;  // to the race detector, which takes every turn as synchronisation
};
struct Fiber : Context {
  static constexpr size_t kStack = 256 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool is_over;
};

// Of the thread that launches.
struct Fibers {
  std::vector<Fiber> all;
  unsigned count = 0, running = 0;
  unsigned turns = 0;  // since a barrier opened or a fiber ended
  Context launcher;
  std::function<void(unsigned)> body;
#ifdef __SANITIZE_THREAD__
  ~Fibers() {
    for (const Fiber& fiber : all) __tsan_destroy_fiber(fiber.known);
  }
#endif
};
inline thread_local Fibers fibers;

inline void announce([[maybe_unused]] const Context& next) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(next.known, 0);
#endif
}

// Goes on with the next fiber that is not over, and comes back when it is this one's turn again.
inline void take_turns() {
  Fibers& f = fibers;
  if (++f.turns > f.count) {
    std::fprintf(
        stderr,
        "emulated CUDA: a barrier that some threads of the block never reach, or no copy to wait for\n");
    std::abort();
  }
  const unsigned mine = f.running;
  const dim3 thread = threadIdx, of_grid = blockIdx;
  const int passed = barriers;
  do f.running = (f.running + 1) % f.count;
  while (f.all[f.running].is_over);
  if (f.running != mine) {
    announce(f.all[f.running]);
    swapcontext(&f.all[mine].saved, &f.all[f.running].saved);
  }
  threadIdx = thread, blockIdx = of_grid, barriers = passed;
}

inline void made_progress() { fibers.turns = 0; }

class Barrier {
 public:
  explicit Barrier(int n) : n_(n) {}
  void wait() {
    const unsigned generation = generation_;
    if (++arrived_ == n_) {
      arrived_ = 0, ++generation_, made_progress();
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
    announce(f.all[i]);
    setcontext(&f.all[i].saved);
  }
  announce(f.launcher);
  setcontext(&f.launcher.saved);
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
#ifdef __SANITIZE_THREAD__
    if (!fiber.known) fiber.known = __tsan_create_fiber(0);
#endif
    getcontext(&fiber.saved);
    fiber.saved.uc_stack.ss_sp = fiber.stack.get(), fiber.saved.uc_stack.ss_size = Fiber::kStack;
    fiber.saved.uc_link = nullptr;
    makecontext(&fiber.saved, run_fiber, 0);
  }
#ifdef __SANITIZE_THREAD__
  f.launcher.known = __tsan_get_current_fiber();
#endif
  announce(f.all[0]);
  swapcontext(&f.launcher.saved, &f.all[0].saved);
}

}  // namespace emulated
