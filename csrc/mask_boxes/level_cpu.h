// The level that a mask is cut at, on the CPU: sums in the order of mask_boxes.h, extremes, and selection by radix.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "mask_boxes/mask_boxes.h"

namespace casm_fast {

// The sum of one block, in the order that mask_boxes.h fixes.
template <bool kSkipNaN, typename T>
double sum_block(const T* pixels, int64_t n) {  // n <= kSumBlock
  alignas(64) double lanes[kSumLanes];
  const auto value = [](T pixel) { return kSkipNaN && pixel != pixel ? 0.0 : double(pixel); };
  // Lanes that no pixel reaches are zero and change no sum: only warps with pixels take part.
  const int64_t warps = std::min<int64_t>(ceil_div(n, 64), kSumThreads / 32), width = 64 * warps;
  const int64_t filled = std::min(n, width);
  for (int64_t l = 0; l < filled; ++l) lanes[l] = value(pixels[l]);
  for (int64_t l = filled; l < width; ++l) lanes[l] = 0;

  int64_t i = width;
  for (; i + 4 * kSumLanes <= n; i += 4 * kSumLanes) {
    const T* p = pixels + i;
    for (int l = 0; l < kSumLanes; ++l)
      lanes[l] = (((lanes[l] + value(p[l])) + value(p[l + kSumLanes])) + value(p[l + 2 * kSumLanes])) +
                 value(p[l + 3 * kSumLanes]);
  }
  for (; i < n; i += kSumLanes) {
    const int64_t rest = std::min<int64_t>(kSumLanes, n - i);
    for (int64_t l = 0; l < rest; ++l) lanes[l] += value(pixels[i + l]);
  }
  double sum = 0;
  for (int64_t w = 0; w < warps; ++w) {
    double threads[32];
    for (int t = 0; t < 32; ++t) threads[t] = lanes[64 * w + 2 * t] + lanes[64 * w + 2 * t + 1];
    for (int distance = 16; distance > 0; distance /= 2)
      for (int t = 0; t < distance; ++t) threads[t] += threads[t + distance];
    sum += threads[0];
  }
  return sum;
}

template <typename T>
int64_t count_numbers(const T* pixels, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += pixels[i] == pixels[i];
  return count;
}

// The smallest and the largest pixel; NaN never wins a comparison.
template <typename T>
void find_extremes(const T* pixels, int64_t n, Statistics& s) {
  constexpr int kLanes = 64;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T low[kLanes], high[kLanes];
  std::fill(low, low + kLanes, kInfinity);
  std::fill(high, high + kLanes, -kInfinity);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const T pixel = pixels[i + l];
      low[l] = pixel < low[l] ? pixel : low[l];
      high[l] = pixel > high[l] ? pixel : high[l];
    }
  }
  for (int l = 0; i < n; ++i, ++l) {
    low[l] = pixels[i] < low[l] ? pixels[i] : low[l];
    high[l] = pixels[i] > high[l] ? pixels[i] : high[l];
  }
  s.min = std::min(s.min, double(*std::min_element(low, low + kLanes)));
  s.max = std::max(s.max, double(*std::max_element(high, high + kLanes)));
}

inline void add(Statistics& all, const Statistics& block) {
  all.sum += block.sum;
  all.count += block.count;
  all.min = std::min(all.min, block.min);
  all.max = std::max(all.max, block.max);
}

// What `rule` needs to know about the pixels of one block.
template <typename T>
Statistics block_statistics(const T* pixels, int64_t n, Rule rule) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Statistics s{0, n, kInfinity, -kInfinity};
  if (rule == Rule::mean || rule == Rule::area) {
    s.sum = sum_block<false>(pixels, n);
    if (s.sum != s.sum) {
      s.sum = sum_block<true>(pixels, n);
      s.count = count_numbers(pixels, n);
    }
  } else {
    s.count = count_numbers(pixels, n);
  }
  if (rule == Rule::value || rule == Rule::energy || std::is_same_v<T, double>) find_extremes(pixels, n, s);
  return s;
}

// The highest pixel such that the weights of it and of all above it add up to `target` or more: radix descent from the
// highest digit, with a histogram of weights for each digit.
template <typename T, typename Weight>
T select_from_top(const T* pixels, int64_t n, int64_t target, Weight weight) {
  using Key = decltype(ordered_key(T()));
  constexpr int kDigit = 11, kBits = 8 * sizeof(Key);
  std::vector<int64_t> histogram(1 << kDigit);
  Key prefix = 0;
  for (int shift = kBits; shift > 0;) {
    const int above = shift, digit = std::min(kDigit, shift);
    shift -= digit;
    const Key mask = (Key(1) << digit) - 1;
    std::fill(histogram.begin(), histogram.end(), 0);
    for (int64_t i = 0; i < n; ++i) {
      const Key key = ordered_key(pixels[i]);
      const bool candidate = above == kBits || key >> above == prefix >> above;
      if (candidate && pixels[i] == pixels[i]) histogram[key >> shift & mask] += weight(pixels[i]);
    }
    Key bucket = mask;
    for (; bucket > 0 && histogram[bucket] < target; --bucket) target -= histogram[bucket];
    prefix |= bucket << shift;
  }
  return value_of_key(prefix);
}

// The level of one mask from its statistics: pixels >= it are kept.
template <typename T>
T level_of(const T* pixels, int64_t n, const Statistics& s, Rule rule, double alpha) {
  if (s.count == 0) return std::numeric_limits<T>::quiet_NaN();
  if (rule == Rule::mean) return mean_level<T>(s, alpha);
  if (rule == Rule::value) return value_level<T>(s, alpha);
  if (rule == Rule::area)
    return above_quantile(select_from_top(pixels, n, quantile_depth(s, alpha), [](T) { return int64_t(1); }));
  if (!(s.max > 0) || s.max > std::numeric_limits<T>::max()) return T(s.max);  // no mass, or an infinite one
  const Mass mass(s.max, s.count);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += mass(pixels[i]);
  return select_from_top(pixels, n, mass_target(total, alpha), mass);
}

}  // namespace casm_fast
