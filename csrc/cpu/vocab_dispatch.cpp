// The kernels over blocks of the vocabulary: rows spread over threads, and the Python names of them and of
// the GEMM. Reads and writes what docs/engine.md says. Compiled once, without AVX flags; the instruction set
// is the one that dispatch.cpp chose.

#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <stdexcept>

#include "dispatch.h"
#include "gemm.h"
#include "parallel.h"
#include "vocab_blocks.h"

namespace fastloss {

#if defined(__x86_64__)
namespace avx512 {
extern const VocabKernels vocab_kernels;
}
namespace avx2 {
extern const VocabKernels vocab_kernels;
}
#endif
namespace generic {
extern const VocabKernels vocab_kernels;
}
#if defined(FASTLOSS_W16_TEST)
namespace wide16 {
extern const VocabKernels vocab_kernels;
}
#endif

namespace {

const VocabKernels& chosen() {
  const char* isa = kernels().name;
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512")) return avx512::vocab_kernels;
  if (!std::strcmp(isa, "avx2")) return avx2::vocab_kernels;
#endif
#if defined(FASTLOSS_W16_TEST)
  if (!std::strcmp(isa, "wide16")) return wide16::vocab_kernels;
#endif
  return generic::vocab_kernels;
}

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Cross-entropy of all rows, from blocks of the vocabulary. Keeps addresses: the caller keeps the tensors
// alive.
struct VocabCall {
  Logits logits;
  CrossEntropy ce;
  Stats stats;
  RowState* state;
  int64_t threads;

  // x is where the first of the rows [row_begin, row_end) has the block's first logit.
  VocabBlock point_to(Address x, int64_t row_begin, int64_t row_end, int64_t row_stride, int64_t start,
                      int64_t width) {
    if (start < 0 || width < 1 || width > kBlock || start + width > logits.vocab) {
      throw std::invalid_argument("block: expected 1 to 2048 columns within the vocabulary");
    }
    if (row_begin < 0 || row_end > logits.rows) throw std::invalid_argument("rows: outside of the call's");
    logits.x = at<void>(x - row_begin * row_stride * dtype_bytes(logits.dtype)),
    logits.row_stride = row_stride;
    return {start, width};
  }
  void forward(Address x, int64_t row_begin, int64_t row_end, int64_t row_stride, int64_t start,
               int64_t width) {
    const VocabBlock block = point_to(x, row_begin, row_end, row_stride, start, width);
    py::gil_scoped_release release;
    const VocabKernels& k = chosen();
    for_rows(row_end - row_begin, width, threads, k.scratch_bytes,
             [&](int64_t begin, int64_t end, void* scratch) {
               k.forward(logits, block, ce, stats, state, row_begin + begin, row_begin + end, scratch);
             });
  }
  void finish() { chosen().finish(logits, ce, stats, state); }
  // out: as x, and of the same row stride; it may be x.
  void backward(Address x, Address out, int64_t row_begin, int64_t row_end, int64_t row_stride, int64_t start,
                int64_t width) {
    const VocabBlock block = point_to(x, row_begin, row_end, row_stride, start, width);
    ce.grad = at<void>(out - row_begin * row_stride * dtype_bytes(logits.dtype)),
    ce.grad_row_stride = row_stride;
    py::gil_scoped_release release;
    const VocabKernels& k = chosen();
    for_rows(row_end - row_begin, width, threads, k.scratch_bytes,
             [&](int64_t begin, int64_t end, void* scratch) {
               k.backward(logits, block, ce, state, row_begin + begin, row_begin + end, scratch);
             });
  }
};

VocabCall vocab_call(int dtype, int64_t rows, int64_t vocab, Address target, int64_t ignore_index,
                     Address bias, double scale, double softcap, Address w, int64_t w_row_stride,
                     double label_smoothing, double z_loss, double grad_scale, Address loss,
                     Address logsumexp, Address logprob, Address entropy, Address log_sum_sq_probs,
                     Address mean_logit, Address is_top1, Address state, int64_t threads) {
  if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype: expected a code from 0 to 3");
  return {{nullptr, dtype, rows, vocab, 0, at<int64_t>(target), ignore_index, at<void>(bias), scale, softcap},
          {at<void>(w), w_row_stride, label_smoothing, z_loss, grad_scale, nullptr, 0},
          {at<void>(loss), at<void>(logsumexp), at<void>(logprob), at<void>(entropy),
           at<void>(log_sum_sq_probs), at<void>(mean_logit), at<uint8_t>(is_top1)},
          at<RowState>(state),
          threads};
}

bool supports_gemm_bf16() {
#if defined(__x86_64__)
  return !std::strcmp(kernels().name, "avx512") && gemm_bf16_supported();
#else
  return false;
#endif
}

void gemm(Address a, int64_t a_row, int64_t a_k, Address b, int64_t b_row, Address c, int64_t c_row,
          int64_t m, int64_t n, int64_t k, bool accumulate, int64_t threads) {
#if defined(__x86_64__)
  if (a_k != 1 && a_row != 1) throw std::invalid_argument("gemm_bf16: expected a stride of 1 in a");
  if (!gemm_bf16_supported()) throw std::invalid_argument("gemm_bf16: this processor has no AVX512_BF16");
  if (m <= 0 || n <= 0) return;
  py::gil_scoped_release release;
  if (threads < 1) threads = 1;
  const Gemm g{at<uint16_t>(a), a_row, a_k, at<uint16_t>(b), b_row, at<float>(c), c_row, m, n, k, accumulate};
  gemm_bf16(g, threads, thread_buffer().at_least(gemm_bf16_scratch_bytes(g, threads)));
#else
  throw std::invalid_argument("gemm_bf16: this processor has no AVX512_BF16");
#endif
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

void bind_vocab_blocks(py::module_& m) {
  py::class_<VocabCall>(m, "VocabCall")
      .def("forward", &VocabCall::forward)
      .def("finish", &VocabCall::finish)
      .def("backward", &VocabCall::backward);
  m.def("vocab_call", &vocab_call);
  m.attr("ROW_STATE_DOUBLES") = int(sizeof(RowState) / sizeof(double));
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("supports_gemm_bf16", &supports_gemm_bf16);
  m.def("gemm_bf16", &gemm);
}

}  // namespace fastloss
