// The kernel of exponentials.cu in fastloss._cuda, on the stream whose address is given.
// Reads and writes nothing itself.
// Apart from bindings.cpp: the CPU has no such function.
#include "common/row_bindings.h"

#include "exponentials.h"
#include "launch_from_python.h"

namespace fastloss::cuda {
namespace {

struct Cuda {
  using Value = float;
  using Number = float;

  static int dtype_of(int code) {
    if (code_of<Dtype>("dtype", code) != kBFloat16)
      throw std::invalid_argument("dtype: expected 1 (bfloat16), got " + std::to_string(code) + " (" +
                                  kDtypeNames[code] + ")");
    return code;
  }
};

void exponentials(Address logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride, Address target,
                  const pybind11::object& options, Address bias, Address row_scale, Address w, float factor,
                  Address factor_tensor, Address loss, Address lse_parts, Address multiplier, Address residue,
                  Address rough, int64_t context) {
  const Record record(options);
  required("target", target);
  const Logits in =
      RowBindings<Cuda>::logits_of(logits, dtype, rows, vocab, row_stride, target, bias, row_scale, record);
  if (record.number("label_smoothing") != 0)
    throw std::invalid_argument(
        "label_smoothing: expected 0: a probability is rounded before it is taken off");
  const Exponentials a = {at(logits),
                          at<float>(w),
                          loss_terms_of<float>(record, vocab),
                          factor,
                          at<float>(factor_tensor),
                          required<float>("loss", loss),
                          required<float>("lse_parts", lse_parts),
                          required<float>("multiplier", multiplier),
                          required<float>("residue", residue),
                          required<uint8_t>("rough", rough)};
  launch([&] { return row_exponentials(in, a, at(Address(context))); });
}

}  // namespace

void bind_exponentials(pybind11::module_& m) {
  define(m, "row_exponentials", &exponentials, "logits", "dtype", "rows", "vocab", "row_stride", "target",
         "options", "bias", "row_scale", "w", "factor", "factor_tensor", "loss", "lse_parts", "multiplier",
         "residue", "rough", "context");
}

}  // namespace fastloss::cuda
