// The linear head over threads, and the Python names of it and of the GEMM. Reads and writes what
// docs/engine.md says. Compiled once, without AVX flags; the instruction set is the one that dispatch.cpp
// chose.

#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "dispatch.h"
#include "gemm.h"
#include "head.h"
#include "parallel.h"

namespace fastloss {

#if defined(__x86_64__)
namespace avx512 {
extern const HeadKernels head_kernels;
extern const GemmKernel gemm_bf16;
}  // namespace avx512
namespace avx2 {
extern const HeadKernels head_kernels;
extern const GemmKernel gemm_bf16;
}  // namespace avx2
#endif
namespace generic {
extern const HeadKernels head_kernels;
extern const GemmKernel gemm_bf16;
}  // namespace generic
#if defined(FASTLOSS_W16_TEST)
namespace wide16 {
extern const HeadKernels head_kernels;
extern const GemmKernel gemm_bf16;
}  // namespace wide16
#endif

namespace {

struct Chosen {
  const HeadKernels& head;
  const GemmKernel& gemm;
};

Chosen chosen() {
  const char* isa = kernels().name;
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512")) return {avx512::head_kernels, avx512::gemm_bf16};
  if (!std::strcmp(isa, "avx2")) return {avx2::head_kernels, avx2::gemm_bf16};
#endif
#if defined(FASTLOSS_W16_TEST)
  if (!std::strcmp(isa, "wide16")) return {wide16::head_kernels, wide16::gemm_bf16};
#endif
  return {generic::head_kernels, generic::gemm_bf16};
}

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The AVX-512 kernels multiply pairs with an instruction of their own, the others in two steps.
bool supports_gemm_bf16() {
#if defined(__x86_64__)
  return !std::strcmp(kernels().name, "avx512") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool can_multiply_pairs() { return supports_gemm_bf16() || std::strcmp(kernels().name, "avx512"); }

void gemm(Address a, int64_t a_row, Address b, int64_t b_row, Address c, int64_t c_row, int64_t m, int64_t n,
          int64_t k, bool accumulate, int64_t threads) {
  if (!can_multiply_pairs()) throw std::invalid_argument("gemm_bf16: this processor has no AVX512_BF16");
  if (m <= 0 || n <= 0) return;
  py::gil_scoped_release release;
  if (threads < 1) threads = 1;
  const Gemm g{at<uint16_t>(a), a_row, at<uint16_t>(b), b_row, at<float>(c), c_row, m, n, k, accumulate};
  const GemmKernel& kernel = chosen().gemm;
  kernel.run(g, threads, thread_buffer().at_least(kernel.scratch_bytes(g, threads)));
}

// d hidden alone: every thread has rows of its own, and all of the vocabulary.
void run_rows(const HeadCall& c, const HeadKernels& k, int64_t shares, char* scratch) {
  const int64_t rows = c.logits.rows, stride = k.scratch_bytes(c);
#pragma omp parallel for num_threads(static_cast<int>(shares)) schedule(static, 1)
  for (int64_t share = 0; share < shares; ++share) {
    FlushDenormals flush;
    k.d_hidden_alone(c, rows * share / shares, rows * (share + 1) / shares, scratch + stride * share);
  }
}

// The forward gives every thread one run of blocks, with sums of its own; the backward hands out block by
// block.
void run(const HeadCall& c, const HeadKernels& k, int64_t shares, char* scratch) {
  const int64_t blocks = (c.logits.vocab + c.width - 1) / c.width, stride = k.scratch_bytes(c);
  std::atomic<int64_t> next{0}, slot{0};
#pragma omp parallel num_threads(static_cast<int>(shares))
  {
    FlushDenormals flush;
    char* const mine = scratch + stride * slot.fetch_add(1, std::memory_order_relaxed);
    if (c.given.lse) {
#pragma omp single
      k.set_coefficients(c);
    } else {
#pragma omp for schedule(static, 1)
      for (int64_t share = 0; share < shares; ++share) {
        k.forward(c, c.state + share * c.logits.rows, blocks * share / shares, blocks * (share + 1) / shares,
                  mine);
      }
#pragma omp single
      k.finish(c, shares);
    }
    if (c.d_weight || c.given.lse) {
      for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
        k.backward(c, block, mine);
      }
    }
  }
}

void check(const HeadCall& c, const HeadKernels& k) {
  const auto expect = [](bool is_so, const char* what) {
    if (!is_so) throw std::invalid_argument(what);
  };
  expect(c.logits.rows > 0 && c.dim > 0 && c.logits.vocab > 0, "expected rows, dim and vocab of at least 1");
  expect(c.width > 0 && c.width <= kBlock && c.width % k.panel == 0,
         "width: expected a multiple of HEAD_PANEL, at most 2048");
  expect(c.stored >= 0 && c.stored <= c.dim && c.stored <= c.logits.rows,
         "stored: expected at most dim rows");
  expect(!c.stored || (c.d_weight && !c.given.lse), "stored: expected with d_weight, and a forward");
  expect(!c.d_bias || c.d_weight || c.given.lse, "d_bias: expected with d_weight or a backward alone");
  expect(!is_d_hidden_alone(c) || (c.logits.target && c.ce.label_smoothing == 0),
         "d_hidden without d_weight: expected index targets without label smoothing");
  for (const int dtype : {c.hidden_dtype, c.weight_dtype}) {
    expect(dtype == kFloat32 || dtype == kBFloat16, "dtype: expected float32 or bfloat16");
  }
  expect(!c.pairs || can_multiply_pairs(), "pairs: this processor has no AVX512_BF16");
  expect(!c.pairs || (c.hidden_dtype == kBFloat16 && c.weight_dtype == kBFloat16 && c.dim % 2 == 0),
         "pairs: expected bfloat16 operands of an even dim");
}

// A field of the call that Python reads and writes: a number, or an address as one.
template <class Field>
void field(py::class_<HeadCall>& type, const char* name, Field at) {
  using Value = std::decay_t<decltype(at(std::declval<HeadCall&>()))>;
  if constexpr (std::is_pointer_v<Value>) {
    type.def_property(
        name, [at](HeadCall& c) { return reinterpret_cast<Address>(at(c)); },
        [at](HeadCall& c, Address address) { at(c) = reinterpret_cast<Value>(address); });
  } else {
    type.def_property(
        name, [at](HeadCall& c) { return at(c); }, [at](HeadCall& c, Value value) { at(c) = value; });
  }
}

// Asks for large pages behind memory that is about to be written for the first time: 512 times fewer page
// faults.
void advise_huge_pages(Address address, int64_t bytes) {
#if defined(__linux__)
  constexpr Address page = 2 << 20;
  const Address begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (end > begin) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

#define FASTLOSS_FIELD(name, member) field(type, name, [](HeadCall& c) -> auto& { return c.member; })

void bind_head(py::module_& m) {
  py::class_<HeadCall> type(m, "HeadCall", py::module_local());  // another build may be loaded too
  type.def(py::init([] { return HeadCall{}; }));
  FASTLOSS_FIELD("rows", logits.rows);
  FASTLOSS_FIELD("vocab", logits.vocab);
  FASTLOSS_FIELD("target", logits.target);
  FASTLOSS_FIELD("ignore_index", logits.ignore_index);
  FASTLOSS_FIELD("bias", logits.bias);
  FASTLOSS_FIELD("scale", logits.scale);
  FASTLOSS_FIELD("softcap", logits.softcap);
  FASTLOSS_FIELD("w", ce.w);
  FASTLOSS_FIELD("w_row_stride", ce.w_row_stride);
  FASTLOSS_FIELD("label_smoothing", ce.label_smoothing);
  FASTLOSS_FIELD("z_loss", ce.z_loss);
  FASTLOSS_FIELD("grad_scale", ce.grad_scale);
  FASTLOSS_FIELD("loss", stats.loss);
  FASTLOSS_FIELD("logsumexp", stats.logsumexp);
  FASTLOSS_FIELD("logprobs", stats.logprobs);
  FASTLOSS_FIELD("entropy", stats.entropy);
  FASTLOSS_FIELD("log_sum_sq_probs", stats.log_sum_sq_probs);
  FASTLOSS_FIELD("mean_logits", stats.mean_logits);
  FASTLOSS_FIELD("is_top1", stats.is_top1);
  FASTLOSS_FIELD("lse", given.lse);
  FASTLOSS_FIELD("a", given.a);
  FASTLOSS_FIELD("b", given.b);
  FASTLOSS_FIELD("c", given.c);
  FASTLOSS_FIELD("d", given.d);
  FASTLOSS_FIELD("state", state);
  FASTLOSS_FIELD("keep", keep);
  FASTLOSS_FIELD("dim", dim);
  FASTLOSS_FIELD("hidden", hidden);
  FASTLOSS_FIELD("hidden_dtype", hidden_dtype);
  FASTLOSS_FIELD("hidden_stride", hidden_stride);
  FASTLOSS_FIELD("weight", weight);
  FASTLOSS_FIELD("weight_dtype", weight_dtype);
  FASTLOSS_FIELD("weight_stride", weight_stride);
  FASTLOSS_FIELD("d_weight", d_weight);
  FASTLOSS_FIELD("stored", stored);
  FASTLOSS_FIELD("d_hidden", d_hidden);
  FASTLOSS_FIELD("d_hidden_rest", d_hidden_rest);
  FASTLOSS_FIELD("split", split);
  FASTLOSS_FIELD("spread", spread);
  FASTLOSS_FIELD("d_bias", d_bias);
  FASTLOSS_FIELD("width", width);
  FASTLOSS_FIELD("finished", finished);
  FASTLOSS_FIELD("pairs", pairs);
  type.def("scratch_bytes", [](const HeadCall& c) {  // of a thread
    const HeadKernels& k = chosen().head;
    check(c, k);
    return k.scratch_bytes(c);
  });
  // threads: at most one for each block, or for each row where d_hidden alone is wanted; scratch holds
  // theirs, and state where it is not.
  type.def("run", [](HeadCall& c, Address scratch, int64_t threads) {
    const HeadKernels& k = chosen().head;
    check(c, k);
    c.logits.dtype = c.weight_dtype;
    py::gil_scoped_release release;
    (is_d_hidden_alone(c) ? run_rows : run)(c, k, threads, at<char>(scratch));
  });
  m.def("can_multiply_pairs", &can_multiply_pairs);
  m.attr("ROW_STATE_DOUBLES") = int(sizeof(RowState) / sizeof(double));
  m.attr("HEAD_STRIPE") = kStripe;
  m.def("head_panel", [] { return chosen().head.panel; });
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("supports_gemm_bf16", &supports_gemm_bf16);
  m.def("gemm_bf16", &gemm);
}

#undef FASTLOSS_FIELD

}  // namespace fastloss
