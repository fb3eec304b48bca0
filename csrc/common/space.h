// Where the mathematics that CPU and CUDA share is compiled to: the namespace of one instruction set, or
// fastloss::cuda. Each translation unit has its own copy, so that no unit's instructions end up in another's.
#pragma once

#ifdef FASTLOSS_ISA
#include "cpu/math.h"
#define FASTLOSS_SPACE FASTLOSS_ISA
#define FASTLOSS_TERM FASTLOSS_INLINE
#else
#include "cuda/platform.h"
#define FASTLOSS_SPACE cuda
#define FASTLOSS_TERM inline __device__
#endif

namespace fastloss {
namespace FASTLOSS_SPACE {

// a b + c, rounded once where the machine can; nvcc fuses what is written as fused alone.
#ifdef FASTLOSS_ISA
FASTLOSS_TERM double multiply_add(double a, double b, double c) { return a * b + c; }
#else
FASTLOSS_TERM float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
#endif

}  // namespace FASTLOSS_SPACE
}  // namespace fastloss
