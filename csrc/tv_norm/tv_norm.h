// The maths of the total-variation norm, once for CPU and CUDA. casm_fast/ops/tv_norm.py says what it computes.
#pragma once

#include <cmath>

#include "common/checks.h"
#include "common/math.h"

namespace casm_fast {

// What guards memory; the door in Python explains to users.
inline void check_tv_norm(const Tensor& mask, double beta) {
  STD_TORCH_CHECK(mask.dim() == 4 && mask.size(1) == 1, "mask must be [B, 1, H, W]");
  STD_TORCH_CHECK(beta >= 1, "beta must be at least 1");
}

// The exponents that the methods use (1: total variation, 2: quadratic, 3: meaningful perturbation) cost a square root
// or nothing; every other exponent goes through pow.
enum class Beta { one, two, three, any };

inline Beta beta_case(double beta) {
  return beta == 1 ? Beta::one : beta == 2 ? Beta::two : beta == 3 ? Beta::three : Beta::any;
}

// s^(beta/2), where s is a squared difference (anisotropic) or the sum of two (isotropic).
template <Beta kBeta, typename T>
CASM_FAST_HD inline T tv_term(T s, T beta) {
  if constexpr (kBeta == Beta::one) return std::sqrt(s);
  if constexpr (kBeta == Beta::two) return s;
  if constexpr (kBeta == Beta::three) return s * std::sqrt(s);
  return std::pow(s, beta / 2);
}

// beta s^(beta/2 - 1): the factor that turns a difference into its gradient. 0 where the difference is 0, for any beta.
template <Beta kBeta, typename T>
CASM_FAST_HD inline T tv_slope(T s, T beta) {
  if constexpr (kBeta == Beta::one) return s > 0 ? 1 / std::sqrt(s) : T(0);
  if constexpr (kBeta == Beta::two) return s > 0 ? T(2) : T(0);
  if constexpr (kBeta == Beta::three) return 3 * std::sqrt(s);
  return s > 0 ? beta * std::pow(s, beta / 2 - 1) : T(0);
}

}  // namespace casm_fast
