// Arithmetic that two rooms or more share, once for the host and the device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CASM_FAST_HD __host__ __device__
#else
#define CASM_FAST_HD
#endif

namespace casm_fast {

// Sums of 16-bit and 32-bit storage are kept in float, of 64-bit storage in double.
template <typename scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename scalar_t>
using acc_t = typename Accumulate<scalar_t>::type;

CASM_FAST_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace casm_fast
