// The CPU backend as the bindings see it.
// Reads and writes what docs/engine.md says.
// Apart from bindings.cpp, so that the kernels know nothing of Python.
#pragma once

#include <string>
#include <vector>

#include "args.h"
#include "divergences.h"
#include "gather.h"
#include "gemm.h"
#include "head.h"
#include "policy.h"
#include "tokens.h"

namespace fastloss {

// What is compiled once per instruction set.
struct Isa {
  const char* name;
  const Kernels& rows;
  const PolicyKernels& policies;
  const TokenKernels& tokens;
  const HeadKernels& head;
  const GemmKernel& gemm_bf16;
  const DivergenceKernels& divergences;
  const GatherKernels& gather;
};

// The one that is used: the first of supported_isas, or the one that set_isa named.
const Isa& isa();
inline const Isa& kernels() { return isa(); }  // head_dispatch.cpp's name of it
std::vector<std::string> supported_isas();
void set_isa(const std::string& name);

void row_stats(const Logits&, const Stats&, int64_t threads);
void row_grad(const Logits&, const Coefficients&, int64_t threads);
void row_cross_entropy(const Logits&, const CrossEntropy&, const Stats&, int64_t threads);
void convert(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t n, int64_t threads);

struct TargetCount {
  int64_t valid, first_bad;  // first_bad = -1 if none
};
TargetCount count_targets(const int64_t* target, int64_t n, int64_t vocab, int64_t ignore_index);
void sum_rows(const void* values, int dtype, int64_t n, double factor, void* out);

}  // namespace fastloss
