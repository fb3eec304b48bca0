// The linear head over threads, and the Python names of it and of the GEMM. Reads and writes what
// docs/engine.md says. Compiled once, without AVX flags; the instruction set is the one that dispatch.cpp
// chose.

#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "common/row_bindings.h"
#include "dispatch.h"
#include "gemm.h"
#include "head.h"
#include "parallel.h"

namespace fastloss {

namespace {

namespace py = pybind11;
// The kernels for AVX-512 and for NEON's bf16 multiply pairs with an instruction, the others in two steps.
bool supports_gemm_bf16() {
#if defined(__x86_64__)
  return !std::strcmp(kernels().name, "avx512") && __builtin_cpu_supports("avx512bf16");
#else
  return !std::strcmp(kernels().name, "neon_bf16");
#endif
}

bool can_multiply_pairs() { return supports_gemm_bf16() || std::strcmp(kernels().name, "avx512"); }

#if defined(__x86_64__)
// Whether the processor has AMX tiles of bfloat16, the system keeps them over a change of threads, and lets
// this process use them (Linux wants to be asked).
bool ask_for_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!(d & amx_bf16) || !(d & amx_tile)) return false;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned tile_state = 3u << 17;
  if ((low & tile_state) != tile_state) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// Whether bfloat16 is multiplied in the processor's AMX tiles: with the AVX-512 kernels, which pack for them.
bool supports_tiles() {
#if defined(__x86_64__)
  static const bool has_tiles = ask_for_tiles();  // once in a process
  return !std::strcmp(kernels().name, "avx512") && has_tiles;
#else
  return false;
#endif
}

void run_gemm(Gemm g, int64_t threads) {
  if (g.m <= 0 || g.n <= 0) return;
  py::gil_scoped_release release;
  if (threads < 1) threads = 1;
  const GemmKernel& kernel = kernels().gemm_bf16;
  kernel.run(g, threads, thread_buffer().at_least(kernel.scratch_bytes(g, threads)));
}

void gemm(Address a, int64_t a_row, Address b, int64_t b_row, Address c, int64_t c_row, int64_t m, int64_t n,
          int64_t k, bool accumulate, int64_t threads) {
  const bool tiles = supports_tiles();
  if (!tiles && !can_multiply_pairs()) {
    throw std::invalid_argument("gemm_bf16: this processor has no AVX512_BF16");
  }
  run_gemm({at<uint16_t>(a), a_row, at<uint16_t>(b), b_row, at<float>(c), c_row, m, n, k, accumulate, tiles,
            false},
           threads);
}

// The same in tiles on any processor: where it has none, in memory.
void gemm_in_tiles(Address a, int64_t a_row, Address b, int64_t b_row, Address c, int64_t c_row, int64_t m,
                   int64_t n, int64_t k, bool accumulate, int64_t threads) {
  run_gemm({at<uint16_t>(a), a_row, at<uint16_t>(b), b_row, at<float>(c), c_row, m, n, k, accumulate, true,
            !supports_tiles()},
           threads);
}

void run(const HeadCall& c, char* scratch, int64_t threads) {
  const HeadKernels& k = kernels().head;
  std::memset(scratch, 0, k.counter_bytes(threads));
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    FlushDenormals flush;
    k.run(c, scratch, omp_get_thread_num(), omp_get_num_threads());
  }
#else
  FlushDenormals flush;
  k.run(c, scratch, 0, 1);
#endif
}

// Of all threads together.
int64_t scratch_bytes(const HeadCall& c, int64_t threads) {
  return kernels().head.scratch_bytes(c, threads < 1 ? 1 : threads);
}

void check(const HeadCall& c) {
  const auto expect = [](bool is_so, const char* what) {
    if (!is_so) throw std::invalid_argument(what);
  };
  expect(c.logits.rows > 0 && c.dim > 0 && c.logits.vocab > 0, "expected rows, dim and vocab of at least 1");
  expect(c.width > 0 && c.width <= kBlock && c.width % kKept == 0,
         "width: expected a multiple of HEAD_PANEL, at most 2048");
  expect(c.stored >= 0 && c.stored <= c.dim && c.stored <= c.logits.rows,
         "stored: expected at most dim rows");
  expect(!c.stored || c.d_weight, "stored: expected with d_weight");
  expect(!c.d_weight_sum || (c.d_weight && c.weight_dtype == kBFloat16),
         "d_weight_sum: expected with d_weight in bfloat16");
  expect(c.more >= 0 && c.stored + c.more <= c.logits.rows, "more: expected at most the other rows");
  expect(!c.more || c.more_logits, "more: expected with more_logits");
  expect(!(c.stored + c.more) || c.weight_dtype == kFloat32 || c.origins,
         "origins: expected with kept bfloat16 logits");
  expect(!c.stats_only || !c.given.lse_parts, "stats_only: expected without given_lse_parts");
  expect(!c.d_bias || c.d_weight || c.given.lse_parts, "d_bias: expected with d_weight or a backward alone");
  expect(!is_d_hidden_alone(c) || (c.logits.target && c.ce.terms.smooth == 0),
         "d_hidden without d_weight: expected index targets without label smoothing");
  expect(!c.selected || (c.selected_count > 0 && !is_d_hidden_alone(c)),
         "selected: expected selected_count of at least 1, and no d_hidden with the statistics");
  expect(c.selected || !(c.selected_logits || c.selected_logprobs || c.selected_gradient),
         "selected: expected with what is told of it");
  expect(!c.selected_logprobs || c.selected_logits, "selected_logprobs: expected with selected_logits");
  expect(!c.selected_gradient || is_backward(c), "selected_gradient: expected with given_lse_parts");
  expect(!c.mass || (c.skip > 0 && c.skip < 1 && c.width == kSegment),
         "mass: expected with a skip between 0 and 1 and blocks of one segment");
  expect(!c.mass || (c.logits.target && !c.selected && c.ce.terms.smooth == 0 && !c.stats_only &&
                     !is_backward(c) && c.d_weight),
         "mass: expected with index targets, no label smoothing, and d_weight made with the statistics");
  expect(!c.order || c.mass, "order: expected with mass");
  for (const int dtype : {c.hidden_dtype, c.weight_dtype}) {
    expect(dtype == kFloat32 || dtype == kBFloat16, "dtype: expected float32 or bfloat16");
  }
  expect(!c.pairs || c.tiles || can_multiply_pairs(), "pairs: this processor has no AVX512_BF16");
  expect(!c.pairs || (c.hidden_dtype == kBFloat16 && c.weight_dtype == kBFloat16 && c.dim % 2 == 0),
         "pairs: expected bfloat16 operands of an even dim");
  expect(!c.tiles || c.pairs, "tiles: expected with pairs");
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
  type.def(py::init([] {
    HeadCall c{};
    c.ce.terms.keep = 1;
    return c;
  }));
  FASTLOSS_FIELD("rows", logits.rows);
  FASTLOSS_FIELD("vocab", logits.vocab);
  FASTLOSS_FIELD("target", logits.target);
  FASTLOSS_FIELD("ignore_index", logits.ignore_index);
  FASTLOSS_FIELD("bias", logits.bias);
  FASTLOSS_FIELD("scale", logits.scale);
  FASTLOSS_FIELD("softcap", logits.softcap);
  FASTLOSS_FIELD("w", ce.w);
  FASTLOSS_FIELD("w_row_stride", ce.w_row_stride);
  type.def("set_loss", [](HeadCall& c, const py::object& options) {  // after vocab
    c.ce.terms = loss_terms_of<double>(Record(options), c.logits.vocab);
  });
  FASTLOSS_FIELD("grad_scale", ce.grad_scale);
  FASTLOSS_FIELD("loss", stats.loss);
  FASTLOSS_FIELD("logsumexp", stats.logsumexp);
  FASTLOSS_FIELD("logprobs", stats.logprobs);
  FASTLOSS_FIELD("entropy", stats.entropy);
  FASTLOSS_FIELD("log_sum_sq_probs", stats.log_sum_sq_probs);
  FASTLOSS_FIELD("mean_logits", stats.mean_logits);
  FASTLOSS_FIELD("is_top1", stats.is_top1);
  FASTLOSS_FIELD("lse_parts", stats.lse_parts);
  FASTLOSS_FIELD("given_lse_parts", given.lse_parts);
  FASTLOSS_FIELD("a", given.a);
  FASTLOSS_FIELD("b", given.b);
  FASTLOSS_FIELD("c", given.c);
  FASTLOSS_FIELD("d", given.d);
  FASTLOSS_FIELD("selected", selected);
  FASTLOSS_FIELD("selected_count", selected_count);
  FASTLOSS_FIELD("selected_logits", selected_logits);
  FASTLOSS_FIELD("selected_logprobs", selected_logprobs);
  FASTLOSS_FIELD("selected_gradient", selected_gradient);
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
  FASTLOSS_FIELD("d_weight_sum", d_weight_sum);
  FASTLOSS_FIELD("adds_to_sum", adds_to_sum);
  FASTLOSS_FIELD("stored", stored);
  FASTLOSS_FIELD("d_hidden", d_hidden);
  FASTLOSS_FIELD("d_hidden_rest", d_hidden_rest);
  FASTLOSS_FIELD("split", split);
  FASTLOSS_FIELD("spread", spread);
  FASTLOSS_FIELD("d_bias", d_bias);
  FASTLOSS_FIELD("width", width);
  FASTLOSS_FIELD("finished", finished);
  FASTLOSS_FIELD("pairs", pairs);
  FASTLOSS_FIELD("tiles", tiles);
  FASTLOSS_FIELD("argmax", argmax);
  FASTLOSS_FIELD("token_weight", token_weight);
  FASTLOSS_FIELD("row_scale", logits.row_scale);
  FASTLOSS_FIELD("origins", origins);
  FASTLOSS_FIELD("more_logits", more_logits);
  FASTLOSS_FIELD("more", more);
  FASTLOSS_FIELD("stats_only", stats_only);
  FASTLOSS_FIELD("skip", skip);
  FASTLOSS_FIELD("mass", mass);
  FASTLOSS_FIELD("order", order);
  FASTLOSS_FIELD("keeps_order", keeps_order);
  type.def("workspace_bytes", [](HeadCall& c, int64_t threads) {  // of a run on that many threads
    check(c);
    c.emulate = !supports_tiles();
    return scratch_bytes(c, threads);
  });
  type.def("scratch_bytes", [](HeadCall& c) {  // enough for each of any number of threads
    check(c);
    c.emulate = !supports_tiles();
    int64_t most = 0;
    for (int64_t threads = 1; threads <= 64; ++threads) {
      most = std::max(most, (scratch_bytes(c, threads) + threads - 1) / threads);
    }
    return most;
  });
  // Scratch is what workspace_bytes says, 64-byte aligned.
  type.def("run", [](HeadCall& c, Address scratch, int64_t threads) {
    check(c);
    c.emulate = !supports_tiles(), c.rounds_natively = supports_gemm_bf16();
    c.logits.dtype = c.weight_dtype;
    py::gil_scoped_release release;
    run(c, at<char>(scratch), threads < 1 ? 1 : threads);
  });
  m.def("can_multiply_pairs", &can_multiply_pairs);
  m.attr("ROW_STATE_DOUBLES") = int(sizeof(RowState) / sizeof(double));
  m.attr("HEAD_STRIPE") = kStripe;
  m.attr("HEAD_SEGMENT") = kSegment;
  m.attr("HEAD_LEFT_OUT") = kLeftOut;
  m.attr("HEAD_ONE_IN") = kOneIn;
  m.def("head_panel", [] { return kKept; });
  m.def("supports_tiles", &supports_tiles);
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("supports_gemm_bf16", &supports_gemm_bf16);
  m.def("gemm_bf16", &gemm);
  m.def("gemm_bf16_in_tiles", &gemm_in_tiles);
}

#undef FASTLOSS_FIELD

}  // namespace fastloss
