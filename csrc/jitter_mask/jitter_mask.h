// What CPU and CUDA share of blend, upsample_mask and jitter_mask: how images lie in memory, which cell a pixel belongs
// to, and what guards memory. casm_fast/ops/jitter_mask.py says what the ops compute.
#pragma once

#include <optional>

#include "common/checks.h"
#include "common/math.h"

namespace casm_fast {

using OptionalTensor = std::optional<Tensor>;

// ---------------------------------------------------------------- nearest cells

// The cell of a small mask that pixel y of `pixels` belongs to: y * cells / pixels, rounded down.
CASM_FAST_HD inline int64_t cell_of(int64_t y, int64_t cells, int64_t pixels) { return y * cells / pixels; }

// The first pixel of cell u; the cell ends where the next one begins. Empty where cells outnumber pixels.
CASM_FAST_HD inline int64_t first_pixel(int64_t u, int64_t cells, int64_t pixels) {
  return ceil_div(u * pixels, cells);
}

// ---------------------------------------------------------------- images as rows of neighbouring values

// A batch [B, C, H, W] is walked as [B, planes, H, length], where the `length` values of a row are neighbours in memory
// and value i belongs to pixel i / repeat. Contiguous images have C planes of W values; channels_last images have one
// plane of W * C values, each pixel C times.
struct Frame {
  int64_t B, planes, H, length, repeat;
  int64_t W() const { return length / repeat; }
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
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty({like.size(0), like.size(1), H, W}, like.scalar_type(), std::nullopt, like.device(),
                              std::nullopt, interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
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

}  // namespace casm_fast
