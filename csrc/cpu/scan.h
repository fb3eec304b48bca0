// gae and discounted_returns as the bindings see them.
// Reads and writes what docs/sequences.md says.
// One function: without values it is discounted_returns.
#pragma once

#include "common/scan_arguments.h"

namespace fastloss {

void scan(const Scan& a, int dtype, int64_t threads);

}  // namespace fastloss
