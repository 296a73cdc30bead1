// The maths of the Gaussian blur, once for CPU and CUDA. casm_fast/ops/blur_mask.py says what it computes.
//
// Along an axis of N pixels the blur is y = A x, where row i of A holds the taps around i, and taps that fall outside
// are mirrored back in (d c b | a b c d | c b a, again and again for a large radius). Two facts shape both kernels:
//
//   * A and its blocks are the same read backwards (A[i, j] = A[N-1-i, N-1-j]), so x may be split into a part that is
//     even and a part that is odd about a centre, at half the multiplications;
//   * mirrored signals repeat after 2 (N - 1), which makes A = K C with K symmetric and C = diag(1/2, 1, ..., 1, 1/2).
//     So the gradient, A^T g = C A (C^-1 g), is the blur itself between two scalings of the border pixels.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "common/checks.h"
#include "common/math.h"

namespace casm_fast {

// The door in Python refuses larger ones: 2^20 taps take 8 MB and 20 ms.
constexpr int64_t kLargestRadius = 1 << 20;

inline int64_t blur_radius(double sigma, double truncate) {
  STD_TORCH_CHECK(sigma >= 0 && truncate >= 0 && sigma * truncate <= double(kLargestRadius),
                  "sigma and truncate must not be negative and give a radius of at most ", kLargestRadius);
  return int64_t(truncate * sigma + 0.5);
}

inline void check_blur_image(const Tensor& image) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(2) > 0 && image.size(3) > 0, "image must be [B, C, H, W] with pixels");
}

inline void check_blur_mask(const Tensor& image, const Tensor& mask) {
  check_blur_image(image);
  check_same_device(image, mask);
  check_same_dtype(image, mask);
  STD_TORCH_CHECK(mask.dim() == 4 && mask.size(0) == image.size(0) && mask.size(1) == 1 &&
                      mask.size(2) == image.size(2) && mask.size(3) == image.size(3),
                  "mask must be [B, 1, H, W] for an image [B, C, H, W]");
}

inline void check_blur_like(const Tensor& image, const Tensor& other) {
  check_blur_image(image);
  check_same_device(image, other);
  check_same_dtype(image, other);
  bool equal = other.dim() == 4;
  for (int d = 0; equal && d < 4; ++d) equal = other.size(d) == image.size(d);
  STD_TORCH_CHECK(equal, "the tensors must have one shape [B, C, H, W]");
}

// The pixel that lies at `i`, any integer, of a row of n pixels that is mirrored without end.
CASM_FAST_HD inline int64_t mirror(int64_t i, int64_t n) {
  if (n == 1) return 0;
  const int64_t period = 2 * (n - 1);
  i %= period;
  if (i < 0) i += period;
  return i < n ? i : period - i;
}

// C of the note above: what turns the blur into its own gradient, at pixel i of n.
CASM_FAST_HD inline bool is_border(int64_t i, int64_t n) { return n > 1 && (i == 0 || i == n - 1); }

// Taps 0 .. radius of one side, normalised so that both sides sum to 1.
inline std::vector<double> gaussian_taps(double sigma, int64_t radius) {
  std::vector<double> taps(radius + 1, 1.0);
  double sum = 1;
  for (int64_t k = 1; k <= radius; ++k) {
    taps[k] = std::exp(-0.5 * double(k) * double(k) / (sigma * sigma));
    sum += 2 * taps[k];
  }
  for (double& tap : taps) tap /= sum;
  return taps;
}

// The taps wrapped to the period of a mirrored row of n pixels: A[i, j] = wrapped[|i-j|] + wrapped[mirror(i+j)] inside,
// and half of that where j is a border pixel.
inline std::vector<double> wrapped_taps(const std::vector<double>& taps, int64_t n) {
  std::vector<double> wrapped(n, 0.0);
  if (n == 1) {
    wrapped[0] = 0.5;
    return wrapped;
  }
  const int64_t radius = int64_t(taps.size()) - 1;
  for (int64_t k = -radius; k <= radius; ++k) {
    const int64_t at = mirror(k, n);
    // k and -k share a place, except at the two ends of the period, which are places of their own.
    wrapped[at] += (at == 0 || at == n - 1 ? 1.0 : 0.5) * taps[k < 0 ? -k : k];
  }
  return wrapped;
}

// A[i, j] from the wrapped taps.
inline double blur_weight(const std::vector<double>& wrapped, int64_t i, int64_t j) {
  const int64_t n = int64_t(wrapped.size());
  const double weight = wrapped[i < j ? j - i : i - j] + wrapped[mirror(i + j, n)];
  return is_border(j, n) ? 0.5 * weight : weight;
}

}  // namespace casm_fast
