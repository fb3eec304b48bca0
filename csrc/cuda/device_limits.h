// What a launcher asks the driver about a device, once per device (and per kernel) instead of at each launch.
// Reads and writes a few numbers of the host's.
// Threads of the host may launch on several devices at once: two that ask first write the same answer.
#pragma once

#include <atomic>

#include "platform.h"

namespace fastloss::cuda {

constexpr int kKnownDevices = 64;  // the answers of a device beyond are asked for each time

// A number of each device. `ask` is called with the device and where to put the number.
class OfDevice {
 public:
  template <class Ask>
  cudaError_t get(int device, int* value, Ask ask) {
    const bool known = device >= 0 && device < kKnownDevices;
    if (known) {
      const int kept = kept_[device].load(std::memory_order_acquire);
      if (kept != 0) return *value = kept - 1, cudaSuccess;
    }
    const cudaError_t error = ask(device, value);
    if (error == cudaSuccess && known) kept_[device].store(*value + 1, std::memory_order_release);
    return error;
  }

 private:
  std::atomic<int> kept_[kKnownDevices] = {};  // one more than the number; 0: not asked yet
};

}  // namespace fastloss::cuda
