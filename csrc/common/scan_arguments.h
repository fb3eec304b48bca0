// The arguments of gae and discounted_returns (docs/sequences.md) as a plain struct.
// Reads and writes nothing: every pointer is the caller's memory.
// One struct for both: discounted returns are the recurrence without values.
#pragma once

#include <cstdint>

namespace fastloss {

struct Scan {
  const void *rewards, *values;  // acc [n]; values null: discounted returns
  const uint8_t* mask;           // [n]
  const int64_t* offsets;        // [count + 1] or null
  int64_t n, length, count;
  double gamma, lam;
  void *advantages, *returns;  // acc [n]; advantages null without values
};

}  // namespace fastloss
