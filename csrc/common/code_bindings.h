// What the bindings of both modules do with codes: tables() for Python, and an exception for a code that does
// not exist. Reads and writes nothing.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/codes.h"

namespace fastloss {

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
  return all;
}

}  // namespace fastloss
