// Checks that more than one room makes before it touches memory.
#pragma once

#include "common/library.h"

namespace casm_fast {

inline void check_same_device(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.device() == b.device(), "all tensors must be on one device");
}

inline void check_same_dtype(const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "all tensors must have one dtype");
}

}  // namespace casm_fast
