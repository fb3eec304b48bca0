// What every binding of both modules is made of: addresses, codes, the GIL, tables() and the table of names
// that one call passes. Reads and writes nothing.
// One idiom: an argument has a name and is passed by it; a pointer is an integer address, 0 where there is
// none; an option record is the Python dataclass itself, read here by the names of its fields.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/codes.h"

namespace fastloss {

using Address = uintptr_t;

// Null where the address is 0.
template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Of memory that the call cannot do without.
template <class T = void>
T* required(const char* argument, Address address) {
  if (!address) throw std::invalid_argument(std::string(argument) + ": expected an address, got 0");
  return at<T>(address);
}

// Releases the GIL for as long as it lives, where that pays: it costs about as much as a tiny call.
class ReleaseGil {
  PyThreadState* saved_;

 public:
  explicit ReleaseGil(bool pays) : saved_(pays ? PyEval_SaveThread() : nullptr) {}
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;
  ~ReleaseGil() {
    if (saved_) PyEval_RestoreThread(saved_);
  }
};

// The code `value` of an argument.
template <class Code>
Code code_of(const char* argument, int value) {
  const auto& names = names_of(Code());
  constexpr int n = count_of(names_of(Code()));
  if (value < 0 || value >= n) {
    std::string known;
    for (const char* name : names) known += (known.empty() ? "" : ", ") + std::string(name);
    throw std::invalid_argument(std::string(argument) + ": expected a code from 0 to " +
                                std::to_string(n - 1) + " (" + known + "), got " + std::to_string(value));
  }
  return Code(value);
}

// The dtypes that are computed in: those of everything but logits.
inline Dtype expect_accumulation_dtype(int code) {
  const Dtype dtype = code_of<Dtype>("dtype", code);
  if (dtype != kFloat32 && dtype != kFloat64)
    throw std::invalid_argument("dtype: expected 0 (float32) or 3 (float64), got " + std::to_string(code) +
                                " (" + kDtypeNames[code] + ")");
  return dtype;
}

// The fields of an option record of fastloss/tables.py.
class Record {
  pybind11::handle record_;

 public:
  explicit Record(const pybind11::object& record) : record_(record) {}

  pybind11::object field(const char* name) const { return record_.attr(name); }
  double number(const char* name) const { return field(name).cast<double>(); }
  bool flag(const char* name) const { return field(name).cast<bool>(); }
  int64_t integer(const char* name) const { return field(name).cast<int64_t>(); }
  template <class Code>
  Code code(const char* name) const {
    return code_of<Code>(name, field(name).cast<int>());
  }
};

inline pybind11::dict tables() {
  pybind11::dict all;
  const auto put = [&](const char* table, const auto& names) {
    pybind11::list list;
    for (const char* name : names) list.append(name);
    all[table] = list;
  };
  put("dtypes", kDtypeNames), put("stats", kStatNames);
  put("pair_terms", kPairTermNames), put("divergences", kDivergenceNames);
  put("pair_sums", kPairSumNames);
  put("unpaired_terms", kUnpairedTermNames), put("unpaired_sums", kUnpairedSumNames);
  put("surrogates", policy::kSurrogateNames), put("levels", policy::kLevelNames);
  put("aggregations", policy::kAggregationNames), put("kl_kinds", policy::kKlKindNames);
  put("corrections", policy::kCorrectionNames);
  put("policy_out", policy::kSumNames), put("policy_metrics", policy::kMetricNames);
  put("value_out", value::kOutNames);
  put("distillation_divergences", distillation::kDivergenceNames);
  put("distillation_sums", distillation::kSumNames);
  return all;
}

// m.def of a function whose arguments all have names, and are passed by them.
template <class Function, class... Names>
void define(pybind11::module_& m, const char* name, Function function, Names... names) {
  m.def(name, function, pybind11::kw_only(), pybind11::arg(names)...);
}

}  // namespace fastloss
