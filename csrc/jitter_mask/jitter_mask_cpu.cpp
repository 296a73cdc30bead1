// blend, upsample_mask and jitter_mask on the CPU.
//
// Images are walked in strips of rows. The mask of a strip is expanded once into a buffer that stays in the first-level
// cache and serves every channel, so that images are read and written once and no mask of image size is stored.
// Gradients of masks are gathers in a fixed order: they do not depend on the number of threads.

#include <algorithm>
#include <bit>
#include <vector>

#include "common/dispatch.h"
#include "jitter_mask/jitter_mask.h"

namespace casm_fast {
namespace {

constexpr int64_t kStrip = 2048;      // mask values of a strip: 8 KiB of float leave room in a 32 KiB cache
constexpr int64_t kTaskWork = 32768;  // values per task below which threads cost more than they give (torch's own)

// ---------------------------------------------------------------- storage and arithmetic types

template <typename T>
inline T load(T value) {
  return value;
}
inline float load(BFloat16 value) { return std::bit_cast<float>(uint32_t(value.x) << 16); }

template <typename T>
inline void store(T& to, T value) {
  to = value;
}
// To the nearest, ties to even, without a branch, so that the loop around it is vectorised.
inline void store(BFloat16& to, float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to.x = uint16_t(value == value ? rounded : 0x7FC0);
}

// Calls `f` with the dtypes of the image and of the mask.
template <typename F>
void for_dtypes(const Tensor& image, const Tensor& mask, const F& f) {
  if (image.scalar_type() == ScalarType::BFloat16) {
    if (mask.scalar_type() == ScalarType::Float) return f.template operator()<BFloat16, float>();
    return f.template operator()<BFloat16, BFloat16>();
  }
  for_cpu_dtype(image, [&]<typename T>() { f.template operator()<T, T>(); });
}

// ---------------------------------------------------------------- rows

// out = image * keep + reference * (1 - keep); an absent image or reference is zero.
template <typename T, typename A>
void blend_row(const T* __restrict image, const T* __restrict reference, const A* __restrict keep, T* __restrict out,
               int64_t n) {
  if (image && reference) {
    for (int64_t i = 0; i < n; ++i) store(out[i], load(image[i]) * keep[i] + load(reference[i]) * (1 - keep[i]));
  } else if (image) {
    for (int64_t i = 0; i < n; ++i) store(out[i], load(image[i]) * keep[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store(out[i], load(reference[i]) * (1 - keep[i]));
  }
}

// sum += grad * (image - reference): what the mask value of each place receives.
template <typename T, typename A>
void add_slope_row(const T* __restrict grad, const T* __restrict image, const T* __restrict reference,
                   A* __restrict sum, int64_t n) {
  if (reference) {
    for (int64_t i = 0; i < n; ++i) sum[i] += load(grad[i]) * (load(image[i]) - load(reference[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) sum[i] += load(grad[i]) * load(image[i]);
  }
}

template <typename A>
A sum_of(const A* values, int64_t n) {
  A sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return sum;
}

// Rows [first, last) of every plane of image b under the mask `keep` [last - first, length], which is shared by them.
template <typename T, typename A>
void blend_strip(const Frame& frame, Rows<const T> image, Rows<const T> reference, const A* keep, Rows<T> out,
                 int64_t b, int64_t first, int64_t last) {
  const int64_t n = frame.length;
  const bool dense = out.row == n && (!image || image.row == n) && (!reference || reference.row == n);
  const int64_t rows = dense ? 1 : last - first, run = dense ? (last - first) * n : n;
  for (int64_t p = 0; p < frame.planes; ++p)
    for (int64_t y = 0; y < rows; ++y)
      blend_row(image ? image.at(b, p, first + y) : nullptr, reference ? reference.at(b, p, first + y) : nullptr,
                keep + y * n, out.at(b, p, first + y), run);
}

int64_t rows_per_strip(const Frame& frame) { return std::clamp<int64_t>(kStrip / frame.length, 1, frame.H); }

// Calls `f(b, first, last)` for every strip of rows of every image, in parallel.
template <typename F>
void for_strips(const Frame& frame, int64_t rows, const F& f) {
  const int64_t strips = ceil_div(frame.H, rows);
  const int64_t grain = std::max<int64_t>(1, kTaskWork / (rows * frame.length * frame.planes));
  torch::stable::parallel_for(0, frame.B * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % strips * rows;
      f(i / strips, first, std::min(first + rows, frame.H));
    }
  });
}

// ---------------------------------------------------------------- blend

// Expands rows [first, last) of a mask [h, w] to the places of the image rows. `column` [length] holds their cells.
template <typename M, typename A>
void expand_rows(Rows<const M> mask, int64_t h, const std::vector<int32_t>& column, const Frame& frame, int64_t b,
                 int64_t first, int64_t last, A* keep) {
  const int64_t n = frame.length;
  int64_t previous = -1;
  for (int64_t y = first; y < last; ++y, keep += n) {
    const int64_t cell = cell_of(y, h, frame.H);
    if (cell == previous) {
      std::copy(keep - n, keep, keep);
    } else {
      const M* row = mask.at(b, 0, cell);
      for (int64_t i = 0; i < n; ++i) keep[i] = load(row[column[i]]);
    }
    previous = cell;
  }
}

std::vector<int32_t> columns_of(const Frame& frame, int64_t w) {
  std::vector<int32_t> column(frame.length);
  for (int64_t i = 0; i < frame.length; ++i) column[i] = int32_t(cell_of(i / frame.repeat, w, frame.W()));
  return column;
}

// Blends where at least one image is given; the other one is zero.
template <typename T, typename M>
void blend_images(const Frame& frame, Rows<const T> image, Rows<const T> reference, Rows<const M> mask, int64_t h,
                  int64_t w, Rows<T> out) {
  using A = acc_t<T>;
  if constexpr (std::is_same_v<M, A>) {
    // A mask of image size in the arithmetic type is read where it lies.
    if (frame.repeat == 1 && h == frame.H && w == frame.W() && mask.row == w) {
      return for_strips(frame, rows_per_strip(frame), [&](int64_t b, int64_t first, int64_t last) {
        blend_strip(frame, image, reference, mask.at(b, 0, first), out, b, first, last);
      });
    }
  }
  const std::vector<int32_t> column = columns_of(frame, w);
  const int64_t rows = rows_per_strip(frame);
  for_strips(frame, rows, [&](int64_t b, int64_t first, int64_t last) {
    static thread_local std::vector<A> keep;
    keep.resize(rows * frame.length);
    expand_rows(mask, h, column, frame, b, first, last, keep.data());
    blend_strip<T, A>(frame, image, reference, keep.data(), out, b, first, last);
  });
}

Tensor blend(const Tensor& image_in, const OptionalTensor& reference_in, const Tensor& mask_in) {
  check_blend(image_in, reference_in, mask_in);
  const bool interleaved = is_interleaved(image_in);
  const Tensor image = with_rows(image_in, interleaved), mask = with_rows(mask_in, false);
  const OptionalTensor reference = with_rows(reference_in, interleaved);
  const Frame frame = frame_of(image, image.size(2), image.size(3), interleaved);
  const Tensor out = empty_image(image, frame.H, frame.W(), interleaved);
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    blend_images(frame, rows_of<T>(image, interleaved), rows_of<T>(reference, interleaved), rows_of<M>(mask, false),
                 mask.size(2), mask.size(3), mutable_rows_of<T>(out, interleaved));
  });
  return out;
}

// grad_out * mask, the gradient of the image, or grad_out * (1 - mask), the gradient of the reference.
Tensor blend_backward_image(const Tensor& grad_in, const Tensor& mask_in, bool complement) {
  check_blend(grad_in, std::nullopt, mask_in);
  const bool interleaved = is_interleaved(grad_in);
  const Tensor grad = with_rows(grad_in, interleaved), mask = with_rows(mask_in, false);
  const Frame frame = frame_of(grad, grad.size(2), grad.size(3), interleaved);
  const Tensor out = empty_image(grad, frame.H, frame.W(), interleaved);
  for_dtypes(grad, mask, [&]<typename T, typename M>() {
    const Rows<const T> rows = rows_of<T>(grad, interleaved);
    blend_images(frame, complement ? Rows<const T>{} : rows, complement ? rows : Rows<const T>{},
                 rows_of<M>(mask, false), mask.size(2), mask.size(3), mutable_rows_of<T>(out, interleaved));
  });
  return out;
}

// A mask cell receives the slopes of its block: summed over rows and planes first, then along the row.
template <typename T, typename M>
void blend_mask_gradient(const Frame& frame, Rows<const T> grad, Rows<const T> image, Rows<const T> reference,
                         int64_t h, int64_t w, M* grad_mask) {  // grad_mask [B, h, w]
  using A = acc_t<T>;
  const int64_t work = std::max<int64_t>(1, frame.length * frame.planes * frame.H / h);
  torch::stable::parallel_for(0, frame.B * h, std::max<int64_t>(1, kTaskWork / work), [&](int64_t begin, int64_t end) {
    std::vector<A> sum(frame.length);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / h, u = i % h;
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t y = first_pixel(u, h, frame.H); y < first_pixel(u + 1, h, frame.H); ++y)
        for (int64_t p = 0; p < frame.planes; ++p)
          add_slope_row(grad.at(b, p, y), image.at(b, p, y), reference ? reference.at(b, p, y) : nullptr, sum.data(),
                        frame.length);
      for (int64_t cell = 0; cell < w; ++cell) {
        const int64_t from = first_pixel(cell, w, frame.W()), to = first_pixel(cell + 1, w, frame.W());
        store(grad_mask[i * w + cell], sum_of(sum.data() + from * frame.repeat, (to - from) * frame.repeat));
      }
    }
  });
}

Tensor blend_backward_mask(const Tensor& grad_in, const Tensor& image_in, const OptionalTensor& reference_in,
                           const Tensor& mask) {
  check_blend(image_in, reference_in, mask);
  check_same_image(image_in, grad_in);
  const bool interleaved = is_interleaved(image_in);
  const Tensor image = with_rows(image_in, interleaved), grad = with_rows(grad_in, interleaved);
  const OptionalTensor reference = with_rows(reference_in, interleaved);
  const Frame frame = frame_of(image, image.size(2), image.size(3), interleaved);
  const int64_t h = mask.size(2), w = mask.size(3);
  Tensor grad_mask = torch::stable::new_empty(mask, {frame.B, 1, h, w});
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    blend_mask_gradient(frame, rows_of<T>(grad, interleaved), rows_of<T>(image, interleaved),
                        rows_of<T>(reference, interleaved), h, w, grad_mask.mutable_data_ptr<M>());
  });
  return grad_mask;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CPU, m) {
  m.impl("blend", TORCH_BOX(&casm_fast::blend));
  m.impl("blend_backward_mask", TORCH_BOX(&casm_fast::blend_backward_mask));
  m.impl("blend_backward_image", TORCH_BOX(&casm_fast::blend_backward_image));
}
