// Chooses the instruction set at run time and spreads rows over threads; the small functions beside the
// kernels. Reads and writes what docs/engine.md says. Compiled once, without AVX flags: it runs before anyone
// knows what the processor can do.

#include "dispatch.h"

#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "parallel.h"

namespace fastloss {

#define FASTLOSS_DECLARE_ISA(isa)                    \
  namespace isa {                                    \
  extern const Kernels kernels;                      \
  extern const PolicyKernels policy_kernels;         \
  extern const TokenKernels token_kernels;           \
  extern const HeadKernels head_kernels;             \
  extern const GemmKernel gemm_bf16;                 \
  extern const DivergenceKernels divergence_kernels; \
  extern const GatherKernels gather_kernels;         \
  }
#define FASTLOSS_ISA_TABLE(isa) \
  {#isa,                        \
   isa::kernels,                \
   isa::policy_kernels,         \
   isa::token_kernels,          \
   isa::head_kernels,           \
   isa::gemm_bf16,              \
   isa::divergence_kernels,     \
   isa::gather_kernels}

#if defined(__x86_64__)
FASTLOSS_DECLARE_ISA(avx512)
FASTLOSS_DECLARE_ISA(avx2)
#endif
#if defined(__aarch64__)  // NEON is part of it: there is no plain C++ beside
FASTLOSS_DECLARE_ISA(neon_bf16)
FASTLOSS_DECLARE_ISA(neon)
#else
FASTLOSS_DECLARE_ISA(generic)
#endif
#if defined(FASTLOSS_W16_TEST)  // the 16-lane source compiled for AVX2: tests the AVX-512 path's logic
                                // anywhere
FASTLOSS_DECLARE_ISA(wide16)
#endif

namespace {

#if defined(__aarch64__)
// FEAT_BF16: the system says it.
bool has_bf16() {
#if defined(__linux__)
  constexpr unsigned long hwcap2_bf16 = 1ul << 14;  // older headers have no name for it
  return (getauxval(AT_HWCAP2) & hwcap2_bf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}
#endif

std::vector<Isa> available() {
  std::vector<Isa> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2_too =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2_too && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    all.push_back(FASTLOSS_ISA_TABLE(avx512));
  }
  if (avx2_too) all.push_back(FASTLOSS_ISA_TABLE(avx2));
#endif
#if defined(__aarch64__)
  if (has_bf16()) all.push_back(FASTLOSS_ISA_TABLE(neon_bf16));
  all.push_back(FASTLOSS_ISA_TABLE(neon));
#else
  all.push_back(FASTLOSS_ISA_TABLE(generic));
#endif
#if defined(FASTLOSS_W16_TEST)
  if (avx2_too) all.push_back(FASTLOSS_ISA_TABLE(wide16));
#endif
  return all;
}

const std::vector<Isa> all_isas = available();
std::atomic<const Isa*> current{&all_isas.front()};

}  // namespace

const Isa& isa() { return *current.load(std::memory_order_relaxed); }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& one : all_isas) names.emplace_back(one.name);
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (const Isa& one : all_isas) {
    if (name == one.name) {
      current.store(&one, std::memory_order_relaxed);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(one.name);
  }
  throw std::invalid_argument("isa: expected one of " + known + ", got " + name);
}

void row_stats(const Logits& l, const Stats& s, int64_t threads) {
  const Kernels& k = isa().rows;
  for_rows(l.rows, l.vocab, threads, k.scratch_bytes(l, false),
           [&](int64_t begin, int64_t end, void* scratch) { k.row_stats(l, s, begin, end, scratch); });
}

void row_grad(const Logits& l, const Coefficients& c, int64_t threads) {
  const Kernels& k = isa().rows;
  for_rows(l.rows, l.vocab, threads, k.scratch_bytes(l, false),
           [&](int64_t begin, int64_t end, void* scratch) { k.row_grad(l, c, begin, end, scratch); });
}

void row_cross_entropy(const Logits& l, const CrossEntropy& c, const Stats& s, int64_t threads) {
  const Kernels& k = isa().rows;
  for_rows(
      l.rows, l.vocab, threads, k.scratch_bytes(l, c.grad != nullptr),
      [&](int64_t begin, int64_t end, void* scratch) { k.row_cross_entropy(l, c, s, begin, end, scratch); });
}

void row_divergence(const RowDivergence& a, int64_t threads) {
  const DivergenceKernels& k = isa().divergences;
  for_rows(a.rows, a.vocab, threads, k.scratch_bytes(),
           [&](int64_t begin, int64_t end, void* scratch) { k.row_divergence(a, begin, end, scratch); });
}

void gathered_dots(const GatheredDots& a, int64_t entries, int64_t threads) {
  const GatherKernels& k = isa().gather;
  for_rows(a.segments, (entries / a.segments + 1) * a.dim, threads, 0,
           [&](int64_t begin, int64_t end, void*) { k.dots(a, begin, end); });
}

void gathered_sums(const GatheredSums& a, int64_t entries, int64_t threads) {
  const GatherKernels& k = isa().gather;
  for_rows(a.segments, (entries / a.segments + 1) * a.dim, threads, k.scratch_bytes(a.dim),
           [&](int64_t begin, int64_t end, void* scratch) { k.sums(a, begin, end, scratch); });
}

void convert(const void* src, int src_dtype, void* dst, int dst_dtype, int64_t n, int64_t threads) {
  const auto half = [](int dtype) { return dtype == kBFloat16 || dtype == kFloat16; };
  if (!((src_dtype == kFloat32 && half(dst_dtype)) || (half(src_dtype) && dst_dtype == kFloat32))) {
    throw std::invalid_argument("convert: one dtype is float32, the other bfloat16 or float16");
  }
  const Kernels& k = isa().rows;
  constexpr int64_t piece = 16384;
  for_rows((n + piece - 1) / piece, piece, threads, 0, [&](int64_t begin, int64_t end, void*) {
    k.convert(src, src_dtype, dst, dst_dtype, begin * piece, end * piece < n ? end * piece : n);
  });
}

TargetCount count_targets(const int64_t* target, int64_t n, int64_t vocab, int64_t ignore_index) {
  int64_t ignored = 0, bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool skip = target[i] == ignore_index;
    ignored += skip;
    bad += !skip & (static_cast<uint64_t>(target[i]) >= static_cast<uint64_t>(vocab));
  }
  if (!bad) return {n - ignored, -1};
  for (int64_t i = 0;; ++i) {
    if (target[i] != ignore_index && (target[i] < 0 || target[i] >= vocab)) return {n - ignored - bad, i};
  }
}

namespace {
template <class S>
void sum_as(const void* values, int64_t n, double factor, void* out) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<const S*>(values)[i];
  *static_cast<S*>(out) = S(factor * sum);
}
}  // namespace

void sum_rows(const void* values, int dtype, int64_t n, double factor, void* out) {
  if (dtype == kFloat64) return sum_as<double>(values, n, factor, out);
  if (dtype == kFloat32) return sum_as<float>(values, n, factor, out);
  throw std::invalid_argument("sum_rows: expected float32 or float64");
}

}  // namespace fastloss
