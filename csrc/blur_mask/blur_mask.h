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

// The tap at distance d, before it is normalised.
CASM_FAST_HD inline double gaussian(int64_t d, double sigma) {
  const double t = double(d) / sigma;
  return exp(-0.5 * t * t);
}

// Taps 0 .. radius of one side, normalised so that both sides sum to 1.
inline std::vector<double> gaussian_taps(double sigma, int64_t radius) {
  std::vector<double> taps(radius + 1, 1.0);
  double sum = 1;
  for (int64_t k = 1; k <= radius; ++k) {
    taps[k] = gaussian(k, sigma);
    sum += 2 * taps[k];
  }
  for (double& tap : taps) tap /= sum;
  return taps;
}

// A[i, j] of a row of n pixels. wrapped(d), 0 <= d < n, is the sum of the taps at d + m 2 (n - 1) over all integers m,
// and 1/2 where n is 1.
template <typename Wrapped>
CASM_FAST_HD double blur_weight(const Wrapped& wrapped, int64_t n, int64_t i, int64_t j) {
  const double weight = wrapped(i < j ? j - i : i - j) + wrapped(i + j < n ? i + j : 2 * (n - 1) - i - j);
  return is_border(j, n) ? 0.5 * weight : weight;
}

// How the rows of an axis are cut into blocks of 2 kFold. Block b makes rows out_hi, out_hi + 1, ... and out_lo,
// out_lo - 1, ... (kFold of each; those outside 0 .. n-1 are dropped) from the sums and the differences of rows
// in_hi + k and in_lo - k, k < depth, which may lie outside and are then mirrored:
//
//   even = sum_k weight[k].even (x[in_hi + k] + x[in_lo - k]),   out[out_hi + j] = even + odd
//   odd  = sum_k weight[k].odd  (x[in_hi + k] - x[in_lo - k]),   out[out_lo - j] = even - odd
//
// Blocks are folded about their own centre, with the same weights for all; or, where the radius passes half of the
// side, about the centre of the axis ("centred"), so that the work stops growing with the radius.
template <int kFold>
struct FoldedAxis {
  int64_t n, radius, depth, blocks;
  bool centred;

  FoldedAxis(int64_t n, int64_t radius)
      : n(n),
        radius(radius),
        depth((n + 1) / 2 <= radius + kFold ? (n + 1) / 2 : radius + kFold),
        blocks(ceil_div(n, 2 * kFold)),
        centred((n + 1) / 2 <= radius + kFold) {}

  CASM_FAST_HD int64_t out_hi(int64_t b) const { return centred ? n / 2 + b * kFold : (2 * b + 1) * kFold; }
  CASM_FAST_HD int64_t out_lo(int64_t b) const { return centred ? (n - 1) / 2 - b * kFold : (2 * b + 1) * kFold - 1; }
  CASM_FAST_HD int64_t in_hi(int64_t b) const { return centred ? n / 2 : out_hi(b); }
  CASM_FAST_HD int64_t in_lo(int64_t b) const { return centred ? (n - 1) / 2 : out_lo(b); }

  // Weights are stored as [table][depth][even, odd][kFold].
  CASM_FAST_HD int64_t tables() const { return centred ? blocks : 1; }
  CASM_FAST_HD int64_t weights() const { return tables() * depth * 2 * kFold; }
  CASM_FAST_HD int64_t table_of(int64_t b) const { return centred ? b * depth * 2 * kFold : 0; }
};

struct FoldWeight {
  double even, odd;
};

// The weight of input pair k in output pair j of block b. tap(d) is the tap at any integer d, 0 past the radius.
template <int kFold, typename Tap, typename Wrapped>
CASM_FAST_HD FoldWeight fold_weight(const FoldedAxis<kFold>& axis, int64_t b, int64_t k, int64_t j, const Tap& tap,
                                    const Wrapped& wrapped) {
  double near, far;
  if (axis.centred) {
    const int64_t i = axis.out_hi(b) + j, hi = axis.in_hi(b) + k, lo = axis.in_lo(b) - k;
    if (i >= axis.n) return {0, 0};
    near = blur_weight(wrapped, axis.n, i, hi);
    // The middle row of an odd number is its own partner: the sum counts it twice.
    if (hi == lo) return {0.5 * near, 0};
    far = blur_weight(wrapped, axis.n, i, lo);
  } else {
    near = tap(j - k);
    far = tap(j + k + 1);
  }
  return {0.5 * (near + far), 0.5 * (near - far)};
}

}  // namespace casm_fast
