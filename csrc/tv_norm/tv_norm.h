// The maths of the total-variation norm, once for CPU and CUDA. casm_fast/ops/tv_norm.py says what it computes.
#pragma once

#include <cmath>

#include "common/checks.h"
#include "common/math.h"
#include "common/tensors.h"

namespace casm_fast {

// What guards memory; the door in Python explains to users.
inline void check_tv_norm(const Tensor& mask, double beta) {
  STD_TORCH_CHECK(mask.dim() == 4 && mask.size(1) == 1, "mask must be [B, 1, H, W]");
  STD_TORCH_CHECK(mask.size(2) > 0 && mask.size(3) > 0, "mask must have pixels");
  STD_TORCH_CHECK(mask.size(2) < INT32_MAX && mask.size(3) < INT32_MAX, "the sides of mask must fit 32 bits");
  STD_TORCH_CHECK(beta >= 1, "beta must be at least 1");
}

// The gradient of the value: one factor per mask, of the type that sums have.
inline void check_grad_value(const Tensor& grad_value, const Tensor& mask) {
  check_same_device(grad_value, mask);
  const bool sixteen_bit = mask.scalar_type() == ScalarType::Half || mask.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(grad_value.scalar_type() == (sixteen_bit ? ScalarType::Float : mask.scalar_type()),
                  "grad_value must have the dtype of the value");
  STD_TORCH_CHECK(grad_value.dim() == 1 && grad_value.size(0) == mask.size(0), "grad_value must be [B]");
}

// What a gradient is multiplied by: a factor for each mask, or one for all.
template <typename T>
struct Weight {
  const T* each;  // [B] with a stride; null where there is one for all
  int64_t stride;
  T all;

  CASM_FAST_HD T operator[](int64_t b) const { return each ? each[b * stride] : all; }
};

template <typename T>
Weight<T> weight_of(const Tensor& grad_value) {
  return {grad_value.const_data_ptr<T>(), grad_value.stride(0), T(0)};
}

// The exponents that the methods use (1: total variation, 2: quadratic, 3: meaningful perturbation) cost a square root
// or nothing; every other exponent goes through pow.
enum class Beta { one, two, three, any };

inline Beta beta_case(double beta) {
  return beta == 1 ? Beta::one : beta == 2 ? Beta::two : beta == 3 ? Beta::three : Beta::any;
}

// Calls `f` with (beta, isotropic) at compile time.
template <typename F>
void for_tv_case(double beta, bool isotropic, const F& f) {
  const auto with_beta = [&]<Beta kBeta>() {
    isotropic ? f.template operator()<kBeta, true>() : f.template operator()<kBeta, false>();
  };
  switch (beta_case(beta)) {
    case Beta::one: return with_beta.template operator()<Beta::one>();
    case Beta::two: return with_beta.template operator()<Beta::two>();
    case Beta::three: return with_beta.template operator()<Beta::three>();
    case Beta::any: return with_beta.template operator()<Beta::any>();
  }
}

template <typename T>
CASM_FAST_HD inline T square_root(T s) {
#ifdef __CUDA_ARCH__
  // Two units in the last place instead of a dozen instructions for the correctly rounded root.
  if constexpr (sizeof(T) == 4) return s > 0 && s < T(INFINITY) ? s * rsqrtf(s) : s;
#endif
  return std::sqrt(s);
}

template <typename T>
CASM_FAST_HD inline T inverse_square_root(T s) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) return rsqrtf(s);
#endif
  return 1 / std::sqrt(s);
}

// s^(beta/2), where s is a squared difference (anisotropic) or the sum of two (isotropic).
template <Beta kBeta, typename T>
CASM_FAST_HD inline T tv_term(T s, T beta) {
  if constexpr (kBeta == Beta::one) return square_root(s);
  if constexpr (kBeta == Beta::two) return s;
  if constexpr (kBeta == Beta::three) return s * square_root(s);
  return std::pow(s, beta / 2);
}

// beta s^(beta/2 - 1): the factor that turns a difference into its gradient. 0 where the difference is 0, for any beta.
template <Beta kBeta, typename T>
CASM_FAST_HD inline T tv_slope(T s, T beta) {
  if constexpr (kBeta == Beta::one) return s > 0 ? inverse_square_root(s) : T(0);
  if constexpr (kBeta == Beta::two) return T(2);
  if constexpr (kBeta == Beta::three) return 3 * square_root(s);
  return s > 0 ? beta * std::pow(s, beta / 2 - 1) : T(0);
}

// What pixel (y, x) adds to the value, given its differences to the right and downwards.
template <Beta kBeta, bool kIsotropic, typename T>
CASM_FAST_HD inline T tv_value(T dx, T dy, T beta) {
  if constexpr (kIsotropic) return tv_term<kBeta>(dx * dx + dy * dy, beta);
  return tv_term<kBeta>(dx * dx, beta) + tv_term<kBeta>(dy * dy, beta);
}

// The flow out of a pixel to its right and lower neighbour: slope times difference. The gradient of the value is what
// flows in from the left and from above, less what flows out.
template <typename T>
struct Flow {
  T right, down;
};

template <Beta kBeta, bool kIsotropic, typename T>
CASM_FAST_HD inline Flow<T> tv_flow(T dx, T dy, T beta) {
  if constexpr (kIsotropic) {
    const T slope = tv_slope<kBeta>(dx * dx + dy * dy, beta);
    return {slope * dx, slope * dy};
  }
  return {tv_slope<kBeta>(dx * dx, beta) * dx, tv_slope<kBeta>(dy * dy, beta) * dy};
}

}  // namespace casm_fast
