// From the pixels of a mask to the level that it is cut at, once for CPU and CUDA, and the checks that guard memory.
// casm_fast/ops/mask_boxes.py says what the ops compute.
//
// Both devices must cut at the same level, to the last bit. So every floating-point result here has one definition:
//
//   sum     The pixels of an image, in raster order, are cut into blocks of kSumBlock; NaN counts as zero. In a block,
//           pixel i is added to lane i % kSumLanes, in rising order of i. Lanes 2 t and 2 t + 1 are added to give
//           thread t; 32 threads are added by halves (t and t + 16, then + 8, ... + 1), their sums in rising order, and
//           the sums of the blocks in rising order too. All in double.
//   mass    Rule "energy" counts in whole numbers (Mass, below), whose sums do not depend on an order.
//   product() rounds before anything is added, because a compiler may fuse a multiplication and an addition on one
//           device and not on the other.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "common/checks.h"
#include "common/math.h"

namespace casm_fast {

constexpr int kSumThreads = 512;               // of a CUDA block
constexpr int kSumLanes = 2 * kSumThreads;     // 8 KB of doubles, which stay in the L1 cache of a CPU
constexpr int64_t kSumBlock = 64 * kSumLanes;  // 256x256: one block up to there, and tasks enough beyond

enum class Rule { level, mean, area, value, energy };

inline Rule rule_of(const std::string& name) {
  if (name == "mean") return Rule::mean;
  if (name == "area") return Rule::area;
  if (name == "value") return Rule::value;
  STD_TORCH_CHECK(name == "energy", "rule must be mean, area, value or energy");
  return Rule::energy;
}

inline bool is_largest(const std::string& component) {
  STD_TORCH_CHECK(component == "largest" || component == "all", "component must be largest or all");
  return component == "largest";
}

inline void check_binary(const Tensor& binary, int64_t connectivity) {
  STD_TORCH_CHECK(binary.dim() == 4 && binary.size(1) == 1, "expected [B, 1, H, W]");
  STD_TORCH_CHECK(binary.size(2) > 0 && binary.size(3) > 0, "expected pixels");
  // CUDA adds the number of a slot (16 for every 32 pixels of a row) and an area in one int32.
  const int64_t words = binary.size(2) * ceil_div(binary.size(3), 64);
  STD_TORCH_CHECK(binary.size(2) * binary.size(3) < (int64_t(1) << 30) && words < (int64_t(1) << 25),
                  "an image must have fewer than 2^30 pixels in fewer than 2^25 words of 64");
  STD_TORCH_CHECK(connectivity == 4 || connectivity == 8, "connectivity must be 4 or 8");
}

// What guards memory; the door in Python explains to users.
inline void check_mask_boxes(const Tensor& mask, const std::optional<Tensor>& level, int64_t connectivity) {
  check_binary(mask, connectivity);
  if (!level) return;
  check_same_device(mask, *level);
  STD_TORCH_CHECK(level->dim() == 1 && level->size(0) == mask.size(0), "level must be [B]");
  const bool wide = mask.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(level->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "level must be float32, or float64 for a float64 mask");
}

// a * b, rounded to double.
CASM_FAST_HD inline double product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  volatile double rounded = a * b;
  return rounded;
#endif
}

// What the rules need to know about the pixels that are not NaN.
struct Statistics {
  double sum;
  int64_t count;
  double min, max;  // +inf and -inf when count is 0
};

// level_t is float for masks of float32 and of 16 bits, double for float64. Pixels >= the level are kept, so a NaN
// keeps none.
template <typename level_t>
CASM_FAST_HD inline level_t mean_level(const Statistics& s, double alpha) {
  double mean = s.sum / double(s.count);
  // Rounding must not lift the mean of a constant float64 mask above the mask. In float the cast rounds it back.
  if (sizeof(level_t) == sizeof(double)) mean = mean < s.min ? s.min : mean > s.max ? s.max : mean;
  return level_t(product(alpha, mean));
}

template <typename level_t>
CASM_FAST_HD inline level_t value_level(const Statistics& s, double alpha) {
  const double level = s.min + product(alpha, s.max - s.min);
  return level_t(alpha <= 1 && level > s.max ? s.max : level);
}

// Rule "area": how many of the highest pixels reach down to the quantile, counting the quantile itself: n - k + 1,
// where k = 1 + int((n - 1) * (1 - alpha * mean) + 0.5), clamped to 1..n. A NaN for the mean counts as a mean of 1.
CASM_FAST_HD inline int64_t quantile_depth(const Statistics& s, double alpha) {
  const double last = double(s.count - 1);
  double below = product(last, 1 - product(alpha, s.sum / double(s.count))) + 0.5;
  below = below > 0 ? below : 0;
  below = below < last ? below : last;
  return s.count - int64_t(below);
}

// Rule "area" keeps what is strictly above the quantile, the quantile clamped to [1e-6, 1 - 1e-6]. That is everything
// at or above the next number.
CASM_FAST_HD inline float above_quantile(float quantile) {
  const float low = 1e-6f, high = float(1 - 1e-6);
  return ::nextafterf(quantile < low ? low : quantile > high ? high : quantile, 2.0f);
}
CASM_FAST_HD inline double above_quantile(double quantile) {
  const double low = 1e-6, high = 1 - 1e-6;
  return ::nextafter(quantile < low ? low : quantile > high ? high : quantile, 2.0);
}

// Rule "energy": the mass of a pixel in whole units of a power of two, so fine that the sum of all just fits into the
// 53 bits of a double. Negative pixels and NaN have none.
struct Mass {
  double scale, rest;  // the power of two as a product, because alone it can pass the range of a double

  CASM_FAST_HD Mass(double max, int64_t count) {
    int bits = 53;
    while (count > 0) {
      count >>= 1;
      --bits;
    }
    const int shift = bits - 1 - ::ilogb(max);  // max in [2^e, 2^(e+1)) becomes less than 2^bits
    scale = ::ldexp(1.0, shift / 2);
    rest = ::ldexp(1.0, shift - shift / 2);
  }
  CASM_FAST_HD int64_t operator()(double pixel) const { return pixel > 0 ? int64_t(pixel * scale * rest) : 0; }
};

// The mass to reach: alpha of the total, at least one unit.
CASM_FAST_HD inline int64_t mass_target(int64_t total, double alpha) {
  const int64_t target = int64_t(::ceil(product(alpha, double(total))));
  return target < 1 ? 1 : target;
}

// Unsigned integers in the order of the numbers that they stand for (not for NaN).
CASM_FAST_HD inline uint32_t ordered_key(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
CASM_FAST_HD inline uint64_t ordered_key(double value) {
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}
CASM_FAST_HD inline float value_of_key(uint32_t key) {
  return std::bit_cast<float>(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}
CASM_FAST_HD inline double value_of_key(uint64_t key) {
  return std::bit_cast<double>(key >> 63 ? key & 0x7FFFFFFFFFFFFFFFu : ~key);
}

}  // namespace casm_fast
