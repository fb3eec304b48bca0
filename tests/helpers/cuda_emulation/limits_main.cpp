// Launches from several threads on several devices under ThreadSanitizer: exits 0 if a device is asked about
// itself once per question, a kernel allowed its shared memory once per device, and both again only on a
// device beyond those that are kept. The emulation runs one launch at a time (its blocks share one memory),
// so a lock surrounds each; the race to ask first is run on the table of answers alone.
#include <cstdio>
#include <thread>
#include <vector>

#include "args.h"
#include "cuda_emulation.h"
#include "device_limits.h"

using namespace fastloss::cuda;
using fastloss::kFloat32;

namespace {

const char* one_step(int vocab) {
  std::vector<uint4> x(vocab / 4 + 1, uint4{0, 0, 0, 0}), grad = x;
  int64_t target = 1;
  float out[4], one = 0.5f;
  const Logits in = {x.data(), kFloat32, 1, vocab, vocab, &target, -100, nullptr, 1.0f, 0.0f};
  const Stats stats = {&out[0], &out[1]};
  const CrossEntropy ce = {nullptr, 0, {1.0f, 0.0f, 0.0f}, 1.0f, nullptr, grad.data(), vocab};
  if (const char* error = row_cross_entropy(in, ce, stats, nullptr)) return error;
  return scale_in_place({grad.data(), kFloat32, 1, vocab, vocab, &one}, nullptr);
}

int complain(const char* what, int device, int found) {
  return std::printf("device %d: %s: %d\n", device, what, found), 1;
}

int answers() {
  OfDevice known;
  std::atomic<int> asked{0}, wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) {
        int value = -1;
        const int device = i % 70;  // some beyond the table
        known.get(device, &value, [&](int of, int* found) { return ++asked, *found = 3 * of, cudaSuccess; });
        wrong += value != 3 * device;
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (wrong) return complain("wrong answers", -1, wrong);
  const int beyond = 8 * (1000 / 70 * 6);  // devices 64 to 69, asked about each time
  if (asked < 64 + beyond || asked > 8 * 64 + beyond) return complain("questions", -1, asked);
  int value = 0, failures = 0;
  const auto fail = [&](int, int*) { return ++failures, 1; };
  OfDevice empty;
  empty.get(0, &value, fail), empty.get(0, &value, fail);
  return failures == 2 ? 0 : complain("an error was kept", 0, failures);
}

}  // namespace

int main() {
  if (answers()) return 1;
  for (int repeat = 0; repeat < 3; ++repeat)
    for (const int device : {0, 1, 2, 100}) {
      std::thread([&] {
        emulated::device = device;
        for (const int vocab : {12, 640, 48, 640})
          if (const char* error = one_step(vocab)) std::printf("%s\n", error);
      }).join();
    }
  // Two questions for the rows' shared memory and one for the scale's wave.
  for (const int device : {0, 1, 2}) {
    if (emulated::asked[device] != 3) return complain("questions", device, emulated::asked[device]);
    if (emulated::allowed[device] != 1) return complain("permissions", device, emulated::allowed[device]);
  }
  if (emulated::asked[100] != 3 * 4 * 3) return complain("questions", 100, emulated::asked[100]);
  if (emulated::allowed[100] != 3 * 2) return complain("permissions", 100, emulated::allowed[100]);
  return 0;
}
