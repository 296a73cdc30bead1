// The tensors that ops make. The functions of torch::stable for this look their operator up by name at every
// call, which takes half a microsecond each, a good part of an op on a small mask.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <optional>

#include "common/library.h"

namespace casm_fast {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// The tensor itself where its values already lie in order; else a copy.
inline Tensor in_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline int32_t dtype_code(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    default: STD_TORCH_CHECK(false, "expected int32, int64, float32 or float64");
  }
}

// A tensor on the device of `like`, and in its dtype unless one is given; its values are not set.
inline Tensor strided_tensor(const Tensor& like, Sizes sizes, Sizes strides,
                             std::optional<ScalarType> dtype = std::nullopt) {
  int32_t code, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &code));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                  dtype ? dtype_code(*dtype) : code, device, index, &made));
  return Tensor(made);
}

inline Tensor empty_tensor(const Tensor& like, Sizes sizes, std::optional<ScalarType> dtype = std::nullopt) {
  std::array<int64_t, 4> strides;
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "expected at most four dimensions");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  return strided_tensor(like, sizes, {strides.data(), sizes.size()}, dtype);
}

}  // namespace casm_fast
