// What CPU and CUDA share of blend, upsample_mask and jitter_mask: how images lie in memory, which cell a pixel belongs
// to, and what guards memory. casm_fast/ops/jitter_mask.py says what the ops compute.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "common/checks.h"
#include "common/math.h"
#include "common/tensors.h"

namespace casm_fast {

using OptionalTensor = std::optional<Tensor>;

// ---------------------------------------------------------------- nearest cells

// The cell of a small mask that pixel y of `pixels` belongs to: y * cells / pixels, rounded down.
CASM_FAST_HD inline int64_t cell_of(int64_t y, int64_t cells, int64_t pixels) { return y * cells / pixels; }

// The first pixel of cell u; the cell ends where the next one begins. Empty where cells outnumber pixels.
CASM_FAST_HD inline int64_t first_pixel(int64_t u, int64_t cells, int64_t pixels) {
  return ceil_div(u * pixels, cells);
}

// ---------------------------------------------------------------- Gaussian weights
//
// Pixel v of an axis lies at t = (v + 0.5) cells / pixels - 0.5, in cells. Its weights are exp(-(u - t)^2 / 2 sigma^2)
// over all cells u, divided by their sum. They are rounded to multiples of half an ulp of 1 (2^-24 for float), by
// rounding their running sums: then they add up to 1 exactly, in any order, each is off by about one such unit, and
// a mask of ones becomes ones. Weights that round to zero are not stored: this alone bounds the window.

// How far, in cells, a weight can be told from zero: where exp(-(d^2 - d0^2) / 2 sigma^2) < half a unit, with d0 <= 1/2
// the distance of the nearest cell.
template <typename A>
double gaussian_reach(double sigma) {
  const double half_unit = std::log(2.0) * (std::numeric_limits<A>::digits + 1);
  return std::sqrt(0.25 + 2 * sigma * sigma * half_unit) + 1e-6;  // a margin for the rounding of t
}

// The number of weights per pixel. sigma 0 takes the cell that the pixel belongs to.
template <typename A>
int64_t tap_count(double sigma, int64_t cells) {
  if (sigma == 0) return 1;
  const double taps = std::floor(2 * gaussian_reach<A>(sigma)) + 1;
  return taps < double(cells) ? int64_t(taps) : cells;
}

// The first cell that pixel v weighs, of `taps`.
CASM_FAST_HD inline int64_t first_cell(int64_t v, int64_t cells, int64_t pixels, int64_t taps, double sigma,
                                       double reach) {
  if (sigma == 0) return cell_of(v, cells, pixels);
  const double t = (double(v) + 0.5) * double(cells) / double(pixels) - 0.5;
  const double first = std::ceil(t - reach), last = double(cells - taps);
  return first < 0 ? 0 : int64_t(first < last ? first : last);
}

// Writes the weights of pixel v, `stride` apart, in the arithmetic of P. (No sigma is so small that it makes 0 / 0.)
template <typename A, typename P>
CASM_FAST_HD void gaussian_weights(int64_t v, int64_t cells, int64_t pixels, int64_t first, int64_t taps, double sigma,
                                   A* weight, int64_t stride) {
  if (sigma == 0) {
    weight[0] = 1;
    return;
  }
  const P inverse = P(1 / (2 * sigma * sigma + 1e-30));
  const int64_t nearest = (2 * v + 1) * cells / (2 * pixels), centre = nearest - first;
  // The distance of the nearest cell, from integers: exact before the one division.
  const P d = P((2 * nearest + 1) * pixels - (2 * v + 1) * cells) / P(2 * pixels);
  P sum = 0;
  for (int64_t k = 0; k < taps; ++k) {
    const P away = P(k - centre);  // (d + away)^2 - d^2 = away (away + 2 d)
    sum += weight[k * stride] = A(std::exp(-away * (away + 2 * d) * inverse));
  }

  const P units = P(int64_t(1) << std::numeric_limits<A>::digits), scale = units / sum;
  P running = 0, before = 0;
  for (int64_t k = 0; k < taps; ++k) {
    running += P(weight[k * stride]) * scale;
    P until = k + 1 == taps ? units : std::rint(running);
    if (until > units) until = units;
    weight[k * stride] = A((until - before) / units);
    before = until;
  }
}

// ---------------------------------------------------------------- images as rows of neighbouring values

// A batch [B, C, H, W] is walked as [B, planes, H, length], where the `length` values of a row are neighbours in memory
// and value i belongs to pixel i / repeat. Contiguous images have C planes of W values; channels_last images have one
// plane of W * C values, each pixel C times.
struct Frame {
  int64_t B, planes, H, length, repeat;
  CASM_FAST_HD int64_t W() const { return length / repeat; }
};

// Where one tensor keeps such rows; strides count values. Zero strides (expanded tensors) are fine for reading.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t batch = 0, plane = 0, row = 0;

  CASM_FAST_HD T* at(int64_t b, int64_t p, int64_t y) const { return data + b * batch + p * plane + y * row; }
  CASM_FAST_HD explicit operator bool() const { return data != nullptr; }
};

// Whether the channels of a pixel are neighbours, and the pixels of a row too. The result of an op lies as its image.
inline bool is_interleaved(const Tensor& image) {
  return image.size(1) > 1 && image.stride(1) == 1 && image.stride(3) == image.size(1);
}

inline Frame frame_of(const Tensor& image, int64_t H, int64_t W, bool interleaved) {
  const int64_t B = image.size(0), C = image.size(1);
  return interleaved ? Frame{B, 1, H, W * C, C} : Frame{B, C, H, W, 1};
}

// The tensor itself where its rows already are runs of neighbours, also when it is a crop or expanded; else a copy.
inline Tensor with_rows(const Tensor& image, bool interleaved) {
  const int64_t C = image.size(1), W = image.size(3);
  const bool fits = interleaved ? (C == 1 || image.stride(1) == 1) && (W == 1 || image.stride(3) == C)
                                : W == 1 || image.stride(3) == 1;
  if (fits) return image;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(image, interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline OptionalTensor with_rows(const OptionalTensor& image, bool interleaved) {
  return image ? OptionalTensor(with_rows(*image, interleaved)) : std::nullopt;
}

// `image` must come from with_rows.
template <typename T>
Rows<const T> rows_of(const Tensor& image, bool interleaved) {
  return {image.const_data_ptr<T>(), image.stride(0), interleaved ? 0 : image.stride(1), image.stride(2)};
}

template <typename T>
Rows<const T> rows_of(const OptionalTensor& image, bool interleaved) {
  return image ? rows_of<T>(*image, interleaved) : Rows<const T>{};
}

template <typename T>
Rows<T> mutable_rows_of(const Tensor& image, bool interleaved) {
  return {image.mutable_data_ptr<T>(), image.stride(0), interleaved ? 0 : image.stride(1), image.stride(2)};
}

inline Tensor empty_image(const Tensor& like, int64_t H, int64_t W, bool interleaved) {
  const int64_t B = like.size(0), C = like.size(1);
  if (interleaved) return strided_tensor(like, {B, C, H, W}, {H * W * C, 1, W * C, C});
  return empty_tensor(like, {B, C, H, W});
}

// ---------------------------------------------------------------- what guards memory; the doors explain to users

inline void check_image(const Tensor& image) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(2) > 0 && image.size(3) > 0,
                  "images must be [B, C, H, W] with pixels");
}

// The second image must have the shape, dtype and device of the first.
inline void check_same_image(const Tensor& image, const OptionalTensor& other) {
  if (!other) return;
  check_same_device(image, *other);
  check_same_dtype(image, *other);
  STD_TORCH_CHECK(other->dim() == 4, "images must be [B, C, H, W]");
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(image.size(d) == other->size(d), "images must have one shape");
}

// A mask is in the dtype of the image, or in float32 beside a 16-bit image.
inline void check_mask(const Tensor& image, const Tensor& mask) {
  check_same_device(image, mask);
  STD_TORCH_CHECK(
      mask.dim() == 4 && mask.size(1) == 1 && mask.size(0) == image.size(0) && mask.size(2) > 0 && mask.size(3) > 0,
      "mask must be [B, 1, h, w] with pixels");
  const ScalarType type = image.scalar_type();
  const bool sixteen_bit = type == ScalarType::Half || type == ScalarType::BFloat16;
  STD_TORCH_CHECK(mask.scalar_type() == type || (sixteen_bit && mask.scalar_type() == ScalarType::Float),
                  "mask must be in the dtype of the image, or float32 beside a 16-bit image");
}

inline void check_blend(const Tensor& image, const OptionalTensor& reference, const Tensor& mask) {
  check_image(image);
  check_same_image(image, reference);
  check_mask(image, mask);
  STD_TORCH_CHECK(mask.size(2) <= image.size(2) && mask.size(3) <= image.size(3), "mask must not exceed the image");
}

inline void check_sigma(double sigma) {
  STD_TORCH_CHECK(sigma >= 0 && sigma <= std::numeric_limits<double>::max(), "sigma must be finite, at least 0");
}

inline void check_size(int64_t H, int64_t W) { STD_TORCH_CHECK(H > 0 && W > 0, "a size must be positive"); }

inline void check_single(const Tensor& mask) {
  STD_TORCH_CHECK(mask.dim() == 4 && mask.size(1) == 1 && mask.size(2) > 0 && mask.size(3) > 0,
                  "masks must be [B, 1, h, w] with pixels");
}

inline void check_offset(const Tensor& image, const Tensor& offset) {
  check_same_device(image, offset);
  STD_TORCH_CHECK(offset.scalar_type() == ScalarType::Int && offset.dim() == 2 && offset.size(0) == image.size(0) &&
                      offset.size(1) == 2,
                  "offset must be [B, 2] int32");
}

// `image` is what moves, [B, C, Hi, Wi]; the window that is seen is [H, W].
inline void check_jitter(const Tensor& image, const OptionalTensor& reference, const Tensor& mask, const Tensor& offset,
                         int64_t H, int64_t W, double sigma) {
  check_image(image);
  check_same_image(image, reference);
  check_mask(image, mask);
  check_offset(image, offset);
  check_size(H, W);
  check_sigma(sigma);
  STD_TORCH_CHECK(image.size(2) >= H && image.size(3) >= W, "the window must not exceed the image");
}

inline void check_jitter_gradient(const Tensor& grad, const Tensor& image, const OptionalTensor& reference,
                                  const Tensor& mask, const Tensor& offset, double sigma) {
  check_image(grad);
  check_jitter(image, reference, mask, offset, grad.size(2), grad.size(3), sigma);
  check_same_dtype(image, grad);
  check_same_device(image, grad);
  STD_TORCH_CHECK(grad.size(0) == image.size(0) && grad.size(1) == image.size(1), "grad_out must be [B, C, H, W]");
}

inline void check_image_gradient(const Tensor& grad, const Tensor& mask, const Tensor& offset, int64_t Hi, int64_t Wi,
                                 double sigma) {
  check_image(grad);
  check_mask(grad, mask);
  check_offset(grad, offset);
  check_sigma(sigma);
  STD_TORCH_CHECK(Hi >= grad.size(2) && Wi >= grad.size(3), "the window must not exceed the image");
}

// Where the window of a batch begins along one axis; offsets that do not fit are clamped.
CASM_FAST_HD inline int64_t clamped(int64_t offset, int64_t room) {
  return offset < 0 ? 0 : offset < room ? offset : room;
}

}  // namespace casm_fast
