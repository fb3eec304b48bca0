// The one-read form of row_cross_entropy: the launcher is in cluster_rows.cu.
// Reads and writes nothing itself.
// Asked for by rows.cu; explain asks which kernel a call takes.
#pragma once

#include "args.h"

namespace fastloss::cuda {

// Why the other row kernel computes a call on the current device; null if this one does.
const char* why_no_clusters(const Logits& in, const CrossEntropy& ce, const Stats& out);

// Launches it, with *took = true, if FASTLOSS_CLUSTER_ROWS=1 and the device and the arguments allow.
const char* cluster_cross_entropy(const Logits& in, const CrossEntropy& ce, const Stats& out, void* stream,
                                  bool* took);

}  // namespace fastloss::cuda
