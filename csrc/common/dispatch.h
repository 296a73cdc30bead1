// From a dtype at run time to a type at compile time, without macros:
//
//   for_cpu_dtype(mask, [&]<typename scalar_t>() { ... mask.const_data_ptr<scalar_t>() ... });
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/library.h"

namespace casm_fast {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// float and double, the dtypes of every CPU kernel.
template <typename F>
void for_cpu_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::Double: return f.template operator()<double>();
    default: STD_TORCH_CHECK(false, "expected float32 or float64");
  }
}

// float, 16-bit storage with float sums, and double for gradcheck: the dtypes of every CUDA kernel.
template <typename F>
void for_cuda_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::Half: return f.template operator()<Half>();
    case ScalarType::BFloat16: return f.template operator()<BFloat16>();
    case ScalarType::Double: return f.template operator()<double>();
    default: STD_TORCH_CHECK(false, "expected float32, float16, bfloat16 or float64");
  }
}

}  // namespace casm_fast
