// Where the operators live in torch's registry.
//
// Every room registers through these two macros, so that the same sources serve three libraries: the CPU kernels, the
// CUDA kernels, and the CUDA kernels emulated on the CPU for the tests, which live in a namespace of their own.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifndef CASM_FAST_NAMESPACE
#define CASM_FAST_NAMESPACE casm_fast
#endif

// The dispatch key that the .cu files register for.
#ifdef CASM_FAST_EMULATED
#define CASM_FAST_CUDA_KEY CPU
#else
#define CASM_FAST_CUDA_KEY CUDA
#endif

#define CASM_FAST_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(CASM_FAST_NAMESPACE, m)
#define CASM_FAST_KERNELS(key, m) STABLE_TORCH_LIBRARY_IMPL(CASM_FAST_NAMESPACE, key, m)

namespace casm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace casm_fast
