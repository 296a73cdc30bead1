// blend, upsample_mask and jitter_mask on the CPU.
//
// Images are walked in strips of rows. The mask of a strip is evaluated into a buffer that stays in the first-level
// cache and serves every channel, so that images are read and written once and no mask of image size is stored.
// Gradients of masks are gathers in a fixed order: they do not depend on the number of threads.
//
// Gaussian upsampling is M = A_y m A_x^T with banded A. A task, some rows of one image, first makes m A_x^T for the
// mask rows that it needs (25 KiB for 28x28 to 224x224), from which a row of M takes one multiplication per tap and
// pixel. The gradient goes the same way back: strips of slopes are folded into A_y^T (slopes), then into cells.

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "common/dispatch.h"
#include "jitter_mask/jitter_mask.h"

namespace casm_fast {
namespace {

constexpr int64_t kStrip = 2048;  // mask values of a strip: 8 KiB of float leave room in a 32 KiB cache
constexpr int64_t kSharedMask =
    65536;                            // mask values that stay in the second-level cache while every channel is blended
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

int64_t rows_per_strip(const Frame& frame, int64_t values = kStrip) {
  return std::clamp<int64_t>(values / frame.length, 1, frame.H);
}

// Calls `f(b, first, last, scratch)` for strips of at most `rows` rows that cover every image, in parallel: each thread
// walks one run of rows, so that its strips follow one another in memory. `scratch` has room for `values`.
template <typename A, typename F>
void for_strips(const Frame& frame, int64_t rows, int64_t values, const F& f) {
  const int64_t H = frame.H, work = std::max<int64_t>(1, frame.length * frame.planes);
  torch::stable::parallel_for(0, frame.B * H, ceil_div(kTaskWork, work), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> scratch(new A[values]);
    while (begin < end) {
      const int64_t first = begin % H, last = std::min({first + rows, H, first + end - begin});
      f(begin / H, first, last, scratch.get());
      begin += last - first;
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
      return for_strips<A>(frame, rows_per_strip(frame, kSharedMask), 0,
                           [&](int64_t b, int64_t first, int64_t last, A*) {
                             blend_strip(frame, image, reference, mask.at(b, 0, first), out, b, first, last);
                           });
    }
  }
  const std::vector<int32_t> column = columns_of(frame, w);
  const int64_t rows = rows_per_strip(frame);
  for_strips<A>(frame, rows, rows * frame.length, [&](int64_t b, int64_t first, int64_t last, A* keep) {
    expand_rows(mask, h, column, frame, b, first, last, keep);
    blend_strip<T, A>(frame, image, reference, keep, out, b, first, last);
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

// Adds the slopes of rows [first, last) of every plane to sum [last - first, length].
template <typename T, typename A>
void add_slopes(const Frame& frame, Rows<const T> grad, Rows<const T> image, Rows<const T> reference, int64_t b,
                int64_t first, int64_t last, A* sum) {
  const int64_t n = frame.length;
  const bool dense = grad.row == n && image.row == n && (!reference || reference.row == n);
  const int64_t rows = dense ? 1 : last - first, run = dense ? (last - first) * n : n;
  for (int64_t p = 0; p < frame.planes; ++p)
    for (int64_t y = 0; y < rows; ++y)
      add_slope_row(grad.at(b, p, first + y), image.at(b, p, first + y),
                    reference ? reference.at(b, p, first + y) : nullptr, sum + y * n, run);
}

// A mask cell receives the slopes of its block: summed over rows and planes first, then along the row.
template <typename T, typename M>
void blend_mask_gradient(const Frame& frame, Rows<const T> grad, Rows<const T> image, Rows<const T> reference,
                         int64_t h, int64_t w, M* grad_mask) {  // grad_mask [B, h, w]
  using A = acc_t<T>;
  const int64_t n = frame.length, W = frame.W(), repeat = frame.repeat;
  if (h == frame.H && w == W) {  // every pixel is a cell
    const int64_t rows = rows_per_strip(frame);
    return for_strips<A>(frame, rows, rows * n, [&](int64_t b, int64_t first, int64_t last, A* sum) {
      std::fill_n(sum, (last - first) * n, A(0));
      add_slopes(frame, grad, image, reference, b, first, last, sum);
      M* cells = grad_mask + (b * h + first) * w;
      if (repeat == 1) {
        for (int64_t i = 0; i < (last - first) * n; ++i) store(cells[i], sum[i]);
      } else {
        for (int64_t i = 0; i < (last - first) * W; ++i) store(cells[i], sum_of(sum + i * repeat, repeat));
      }
    });
  }
  std::vector<int64_t> bounds(w + 1);  // where the values of a cell begin in a row
  for (int64_t cell = 0; cell <= w; ++cell) bounds[cell] = first_pixel(cell, w, W) * repeat;
  const int64_t work = std::max<int64_t>(1, n * frame.planes * frame.H / h);
  torch::stable::parallel_for(0, frame.B * h, ceil_div(kTaskWork, work), [&](int64_t begin, int64_t end) {
    std::vector<A> sum(n);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / h, u = i % h;
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t y = first_pixel(u, h, frame.H); y < first_pixel(u + 1, h, frame.H); ++y)
        add_slopes(frame, grad, image, reference, b, y, y + 1, sum.data());
      for (int64_t cell = 0; cell < w; ++cell)
        store(grad_mask[i * w + cell], sum_of(&sum[bounds[cell]], bounds[cell + 1] - bounds[cell]));
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
  Tensor grad_mask = empty_tensor(mask, {frame.B, 1, h, w});
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    blend_mask_gradient(frame, rows_of<T>(grad, interleaved), rows_of<T>(image, interleaved),
                        rows_of<T>(reference, interleaved), h, w, grad_mask.mutable_data_ptr<M>());
  });
  return grad_mask;
}

// ---------------------------------------------------------------- Gaussian upsampling

// One vector register of the instruction set that this library is compiled for.
#if defined(__AVX512F__)
constexpr int64_t kRegister = 64;
#elif defined(__AVX2__)
constexpr int64_t kRegister = 32;
#else
constexpr int64_t kRegister = 16;  // SSE2, NEON
#endif
constexpr int64_t kCacheLine = 64;

template <typename A>
struct Vector {
  typedef A Type __attribute__((vector_size(kRegister)));
  static constexpr int64_t kWidth = kRegister / sizeof(A);
};

inline int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// Values that begin at a cache line, so that no vector of them straddles two.
struct FreeAligned {
  void operator()(void* values) const { ::operator delete(values, std::align_val_t(kCacheLine)); }
};
template <typename A>
using Buffer = std::unique_ptr<A[], FreeAligned>;

template <typename A>
Buffer<A> make_buffer(int64_t count) {
  return Buffer<A>(static_cast<A*>(::operator new(count * sizeof(A), std::align_val_t(kCacheLine))));
}

// The banded matrix A [pixels, cells] of one axis.
template <typename A>
struct Band {
  int64_t cells, pixels, taps;
  int64_t stride;                   // pixels, rounded up to cache lines
  std::vector<int64_t> first;       // [pixels] the first cell that a pixel weighs
  std::vector<A> weight;            // [pixels, taps]
  std::vector<int64_t> begin, end;  // [cells] the pixels that weigh a cell
  Buffer<A> transposed;             // [cells, stride], zero where a pixel does not weigh a cell

  Band(int64_t cells, int64_t pixels, double sigma)
      : cells(cells),
        pixels(pixels),
        taps(tap_count<A>(sigma, cells)),
        stride(round_up(pixels, kCacheLine / sizeof(A))),
        first(pixels),
        weight(pixels * taps),
        begin(cells, pixels),
        end(cells, 0),
        transposed(make_buffer<A>(cells * stride)) {
    const double reach = gaussian_reach<A>(sigma);
    // Away from the border the weights repeat after `period` pixels, `shift` cells further on.
    const int64_t divisor = std::gcd(cells, pixels), period = pixels / divisor, shift = cells / divisor;
    std::fill_n(transposed.get(), cells * stride, A(0));
    for (int64_t v = 0; v < pixels; ++v) {
      first[v] = first_cell(v, cells, pixels, taps, sigma, reach);
      A* row = &weight[v * taps];
      if (v >= period && first[v] == first[v - period] + shift && first[v - period] > 0 && first[v] + taps < cells)
        std::copy_n(row - period * taps, taps, row);
      else
        gaussian_weights<A, double>(v, cells, pixels, first[v], taps, sigma, row, 1);
      for (int64_t k = 0; k < taps; ++k) {
        const int64_t u = first[v] + k;
        transposed[u * stride + v] = row[k];
        begin[u] = std::min(begin[u], v);
        end[u] = v + 1;
      }
    }
  }
};

// Both axes of an upsampling; one matrix where they are alike.
template <typename A>
struct Upsampling {
  const Band<A> y;
  const std::optional<Band<A>> other;
  const Band<A>& x;
  const int64_t stride;  // of rows of W pixels

  Upsampling(int64_t h, int64_t w, int64_t H, int64_t W, double sigma)
      : y(h, H, sigma), other(make_other(h, w, H, W, sigma)), x(other ? *other : y), stride(x.stride) {}

  static std::optional<Band<A>> make_other(int64_t h, int64_t w, int64_t H, int64_t W, double sigma) {
    if (h == w && H == W) return std::nullopt;
    return std::optional<Band<A>>(std::in_place, w, W, sigma);
  }

  // The cells that rows [first, last) weigh.
  int64_t first_row(int64_t first) const { return y.first[first]; }
  int64_t last_row(int64_t last) const { return y.first[last - 1] + y.taps; }
};

// sum [kVectors] += the rows [count, stride] of vectors, each times its weight.
template <int kVectors, typename A>
inline void add_weighted(typename Vector<A>::Type* sum, const A* rows, int64_t stride, const A* weight, int64_t count) {
  typename Vector<A>::Type total[kVectors];
  std::memcpy(total, sum, sizeof(total));
  for (int64_t k = 0; k < count; ++k, rows += stride) {
    const A factor = weight[k];
    for (int i = 0; i < kVectors; ++i) {
      typename Vector<A>::Type value;
      std::memcpy(&value, rows + i * Vector<A>::kWidth, sizeof(value));
      total[i] += value * factor;
    }
  }
  std::memcpy(sum, total, sizeof(total));
}

// out [n] (+)= the weighted sum of rows [count, stride]; n is a multiple of the vector width. Four vectors share one
// load of the weight.
template <bool kAdd, typename A>
void weighted_rows(const A* rows, int64_t stride, const A* weight, int64_t count, A* out, int64_t n) {
  constexpr int64_t kWidth = Vector<A>::kWidth;
  const auto add = [&]<int kVectors>(int64_t x) {
    typename Vector<A>::Type sum[kVectors] = {};
    if constexpr (kAdd) std::memcpy(sum, out + x, sizeof(sum));
    add_weighted<kVectors>(sum, rows + x, stride, weight, count);
    std::memcpy(out + x, sum, sizeof(sum));
  };
  int64_t x = 0;
  for (; x + 4 * kWidth <= n; x += 4 * kWidth) add.template operator()<4>(x);
  for (; x < n; x += kWidth) add.template operator()<1>(x);
}

// Rows [from, to) of m A_x^T, into wide [h, stride].
template <typename M, typename A>
void widen(const Upsampling<A>& up, Rows<const M> mask, int64_t b, int64_t from, int64_t to, A* wide) {
  constexpr int64_t kWidth = Vector<A>::kWidth;
  std::vector<A> row(up.x.cells);
  for (int64_t u = from; u < to; ++u) {
    const M* cells = mask.at(b, 0, u);
    for (int64_t cell = 0; cell < up.x.cells; ++cell) row[cell] = load(cells[cell]);
    for (int64_t x = 0; x < up.stride; x += kWidth) {
      const int64_t left = std::min(x, up.x.pixels - 1), right = std::min(x + kWidth, up.x.pixels) - 1;
      const int64_t cell = up.x.first[left], count = up.x.first[right] + up.x.taps - cell;
      weighted_rows<false>(&up.x.transposed[cell * up.stride + x], up.stride, &row[cell], count,
                           wide + u * up.stride + x, kWidth);
    }
  }
}

// Rows [first, last) of M from `wide` [h, stride], where the rows that they weigh are set: keep [last - first,
// W * repeat]. `line` has room for a row of the stride.
template <typename A>
void evaluate_rows(const Upsampling<A>& up, const A* wide, int64_t first, int64_t last, int64_t repeat, A* line,
                   A* keep) {
  const int64_t W = up.x.pixels, taps = up.y.taps;
  const bool direct = repeat == 1 && W % Vector<A>::kWidth == 0;
  for (int64_t y = first; y < last; ++y, keep += W * repeat) {
    weighted_rows<false>(wide + up.y.first[y] * up.stride, up.stride, &up.y.weight[y * taps], taps,
                         direct ? keep : line, round_up(W, Vector<A>::kWidth));
    if (direct) continue;
    if (repeat == 1) {
      std::copy_n(line, W, keep);
    } else {
      for (int64_t x = 0; x < W; ++x) std::fill_n(keep + x * repeat, repeat, line[x]);
    }
  }
}

// How an image is cut into tasks: enough of them for every thread when the batch is small, none when it is large. The
// cut must not depend on the number of threads, because sums over tasks would.
struct Cut {
  int64_t tasks, rows;
  Cut(int64_t B, int64_t H) {
    constexpr int64_t kTasks = 16, kFewestRows = 8;
    const int64_t wanted = std::clamp<int64_t>(ceil_div(kTasks, std::max<int64_t>(B, 1)), 1, ceil_div(H, kFewestRows));
    rows = ceil_div(H, wanted);
    tasks = ceil_div(H, rows);
  }
};

// Calls `f(b, first, last, keep)` for strips of rows of the window under the mask `keep` [last - first, length].
template <typename M, typename A, typename F>
void for_upsampled_strips(const Frame& frame, const Upsampling<A>& up, Rows<const M> mask, const F& f) {
  const Cut cut(frame.B, frame.H);
  const int64_t rows = std::min(rows_per_strip(frame), cut.rows);
  const int64_t work = std::max<int64_t>(1, cut.rows * frame.length * frame.planes);
  torch::stable::parallel_for(0, frame.B * cut.tasks, ceil_div(kTaskWork, work), [&](int64_t begin, int64_t end) {
    const Buffer<A> wide = make_buffer<A>(up.y.cells * up.stride), line = make_buffer<A>(up.stride);
    const Buffer<A> keep = make_buffer<A>(rows * frame.length);
    int64_t widened = 0;  // rows of the image at hand, counted from its top: tasks share most of what they weigh
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / cut.tasks, top = i % cut.tasks * cut.rows, bottom = std::min(top + cut.rows, frame.H);
      if (top == 0) widened = 0;
      widen(up, mask, b, std::max(widened, up.first_row(top)), up.last_row(bottom), wide.get());
      widened = up.last_row(bottom);
      for (int64_t first = top; first < bottom; first += rows) {
        const int64_t last = std::min(first + rows, bottom);
        evaluate_rows(up, wide.get(), first, last, frame.repeat, line.get(), keep.get());
        f(b, first, last, keep.get());
      }
    }
  });
}

// folded [to - from, stride] += A_y^T slope, where slope [last - first, stride] holds rows [first, last).
template <typename A>
void fold_rows(const Upsampling<A>& up, const A* slope, int64_t first, int64_t last, int64_t from, A* folded) {
  for (int64_t u = up.first_row(first); u < up.last_row(last); ++u) {
    const int64_t begin = std::max(first, up.y.begin[u]), end = std::min(last, up.y.end[u]);
    if (begin >= end) continue;  // where cells outnumber pixels, some are not weighed
    weighted_rows<true>(slope + (begin - first) * up.stride, up.stride, &up.y.transposed[u * up.y.stride + begin],
                        end - begin, folded + (u - from) * up.stride, up.stride);
  }
}

// cells [w] = folded A_x, for one row of `folded`.
template <typename A>
void fold_columns(const Upsampling<A>& up, const A* folded, A* cells) {
  using V = typename Vector<A>::Type;
  constexpr int64_t kWidth = Vector<A>::kWidth;
  for (int64_t cell = 0; cell < up.x.cells; ++cell) {
    const A* weight = &up.x.transposed[cell * up.stride];
    V sum = {};
    for (int64_t x = up.x.begin[cell] / kWidth * kWidth; x < up.x.end[cell]; x += kWidth) {
      V factor, value;
      std::memcpy(&factor, weight + x, sizeof(V));
      std::memcpy(&value, folded + x, sizeof(V));
      sum += factor * value;
    }
    for (int64_t half = kWidth / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    cells[cell] = sum[0];
  }
}

// The gradient of a mask: `slopes(b, p, y, sum)` adds the slopes of row y of plane p to sum [length].
template <typename A, typename M, typename F>
void gather_slopes(const Frame& frame, const Upsampling<A>& up, M* grad_mask, const F& slopes) {  // [B, h, w]
  const Cut cut(frame.B, frame.H);
  const int64_t h = up.y.cells, w = up.x.cells, W = frame.W(), repeat = frame.repeat;
  const int64_t rows = std::min(rows_per_strip(frame), cut.rows);
  const int64_t work = std::max<int64_t>(1, cut.rows * frame.length * frame.planes);
  const std::unique_ptr<A[]> partial(new A[frame.B * cut.tasks * h * w]);
  torch::stable::parallel_for(0, frame.B * cut.tasks, ceil_div(kTaskWork, work), [&](int64_t begin, int64_t end) {
    const Buffer<A> folded = make_buffer<A>(h * up.stride), slope = make_buffer<A>(rows * up.stride);
    std::vector<A> line(repeat > 1 ? frame.length : 0);
    std::fill_n(slope.get(), rows * up.stride, A(0));  // beyond W it stays zero
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / cut.tasks, top = i % cut.tasks * cut.rows, bottom = std::min(top + cut.rows, frame.H);
      const int64_t from = up.first_row(top), to = up.last_row(bottom);
      std::fill_n(folded.get(), (to - from) * up.stride, A(0));
      for (int64_t first = top; first < bottom; first += rows) {
        const int64_t last = std::min(first + rows, bottom);
        for (int64_t y = first; y < last; ++y) {
          A* row = &slope[(y - first) * up.stride];
          A* sum = repeat > 1 ? line.data() : row;
          std::fill_n(sum, frame.length, A(0));
          for (int64_t p = 0; p < frame.planes; ++p) slopes(b, p, y, sum);
          for (int64_t x = 0; repeat > 1 && x < W; ++x) row[x] = sum_of(sum + x * repeat, repeat);
        }
        fold_rows(up, slope.get(), first, last, from, folded.get());
      }
      for (int64_t u = from; u < to; ++u) fold_columns(up, &folded[(u - from) * up.stride], &partial[(i * h + u) * w]);
    }
  });
  torch::stable::parallel_for(0, frame.B * h, ceil_div(kTaskWork, w * cut.tasks), [&](int64_t begin, int64_t end) {
    std::vector<A> sum(w);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / h, u = i % h;
      std::fill(sum.begin(), sum.end(), A(0));
      for (int64_t task = 0; task < cut.tasks; ++task) {
        const int64_t top = task * cut.rows, bottom = std::min(top + cut.rows, frame.H);
        if (u < up.first_row(top) || u >= up.last_row(bottom)) continue;
        const A* cells = &partial[((b * cut.tasks + task) * h + u) * w];
        for (int64_t cell = 0; cell < w; ++cell) sum[cell] += cells[cell];
      }
      for (int64_t cell = 0; cell < w; ++cell) store(grad_mask[i * w + cell], sum[cell]);
    }
  });
}

Tensor upsample_mask(const Tensor& mask_in, int64_t H, int64_t W, double sigma) {
  check_single(mask_in);
  check_size(H, W);
  check_sigma(sigma);
  const Tensor mask = with_rows(mask_in, false);
  const Frame frame{mask.size(0), 1, H, W, 1};
  const Tensor out = empty_image(mask, H, W, false);
  for_dtypes(mask, mask, [&]<typename T, typename M>() {
    const Upsampling<acc_t<T>> up(mask.size(2), mask.size(3), H, W, sigma);
    T* large = out.mutable_data_ptr<T>();
    for_upsampled_strips(frame, up, rows_of<T>(mask, false),
                         [&](int64_t b, int64_t first, int64_t last, const acc_t<T>* keep) {
                           T* rows = large + (b * H + first) * W;
                           for (int64_t i = 0; i < (last - first) * W; ++i) store(rows[i], keep[i]);
                         });
  });
  return out;
}

Tensor upsample_mask_backward(const Tensor& grad_in, int64_t h, int64_t w, double sigma) {
  check_single(grad_in);
  check_size(h, w);
  check_sigma(sigma);
  const Tensor grad = with_rows(grad_in, false);
  const Frame frame = frame_of(grad, grad.size(2), grad.size(3), false);
  Tensor grad_mask = empty_tensor(grad, {frame.B, 1, h, w});
  for_dtypes(grad, grad, [&]<typename T, typename M>() {
    const Upsampling<acc_t<T>> up(h, w, frame.H, frame.W(), sigma);
    const Rows<const T> rows = rows_of<T>(grad, false);
    gather_slopes(frame, up, grad_mask.mutable_data_ptr<T>(), [&](int64_t b, int64_t p, int64_t y, acc_t<T>* sum) {
      const T* row = rows.at(b, p, y);
      for (int64_t x = 0; x < frame.length; ++x) sum[x] += load(row[x]);
    });
  });
  return grad_mask;
}

// ---------------------------------------------------------------- jitter_mask

// The windows of a batch: images [B, C, Hi, Wi] are seen from (y, x) on, which is clamped so that the window fits.
struct Windows {
  const int32_t* offset;  // [B, 2]
  int64_t room_y, room_x, repeat;

  Windows(const Tensor& offset, int64_t Hi, int64_t Wi, const Frame& frame)
      : offset(offset.const_data_ptr<int32_t>()), room_y(Hi - frame.H), room_x(Wi - frame.W()), repeat(frame.repeat) {}
  int64_t y(int64_t b) const { return clamped(offset[2 * b], room_y); }
  int64_t x(int64_t b) const { return clamped(offset[2 * b + 1], room_x) * repeat; }

  // Image b as seen from its window; null stays null.
  template <typename T>
  Rows<T> see(Rows<T> image, int64_t b) const {
    if (image) image.data += y(b) * image.row + x(b);
    return image;
  }
};

Tensor jitter_mask(const Tensor& image_in, const OptionalTensor& reference_in, const Tensor& mask_in,
                   const Tensor& offset_in, int64_t H, int64_t W, double sigma) {
  check_jitter(image_in, reference_in, mask_in, offset_in, H, W, sigma);
  const bool interleaved = is_interleaved(image_in);
  const Tensor image = with_rows(image_in, interleaved), mask = with_rows(mask_in, false);
  const OptionalTensor reference = with_rows(reference_in, interleaved);
  const Tensor offset = in_order(offset_in);
  const Frame frame = frame_of(image, H, W, interleaved);
  const Windows windows(offset, image.size(2), image.size(3), frame);
  const Tensor out = empty_image(image, H, W, interleaved);
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    using A = acc_t<T>;
    const Upsampling<A> up(mask.size(2), mask.size(3), H, W, sigma);
    const Rows<const T> images = rows_of<T>(image, interleaved), references = rows_of<T>(reference, interleaved);
    const Rows<T> outs = mutable_rows_of<T>(out, interleaved);
    for_upsampled_strips(
        frame, up, rows_of<M>(mask, false), [&](int64_t b, int64_t first, int64_t last, const A* keep) {
          blend_strip(frame, windows.see(images, b), windows.see(references, b), keep, outs, b, first, last);
        });
  });
  return out;
}

Tensor jitter_mask_backward_mask(const Tensor& grad_in, const Tensor& image_in, const OptionalTensor& reference_in,
                                 const Tensor& mask, const Tensor& offset_in, double sigma) {
  check_jitter_gradient(grad_in, image_in, reference_in, mask, offset_in, sigma);
  const int64_t H = grad_in.size(2), W = grad_in.size(3), h = mask.size(2), w = mask.size(3);
  const bool interleaved = is_interleaved(image_in);
  const Tensor image = with_rows(image_in, interleaved), grad = with_rows(grad_in, interleaved);
  const OptionalTensor reference = with_rows(reference_in, interleaved);
  const Tensor offset = in_order(offset_in);
  const Frame frame = frame_of(image, H, W, interleaved);
  const Windows windows(offset, image.size(2), image.size(3), frame);
  Tensor grad_mask = empty_tensor(mask, {frame.B, 1, h, w});
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    using A = acc_t<T>;
    const Upsampling<A> up(h, w, H, W, sigma);
    const Rows<const T> grads = rows_of<T>(grad, interleaved), images = rows_of<T>(image, interleaved);
    const Rows<const T> references = rows_of<T>(reference, interleaved);
    gather_slopes(frame, up, grad_mask.mutable_data_ptr<M>(), [&](int64_t b, int64_t p, int64_t y, A* sum) {
      add_slope_row(grads.at(b, p, y), windows.see(images, b).at(b, p, y),
                    references ? windows.see(references, b).at(b, p, y) : nullptr, sum, frame.length);
    });
  });
  return grad_mask;
}

// grad_out * M at the window, zero around it: the gradient of the image; with 1 - M that of the reference.
Tensor jitter_mask_backward_image(const Tensor& grad_in, const Tensor& mask_in, const Tensor& offset_in, int64_t Hi,
                                  int64_t Wi, double sigma, bool complement) {
  check_image_gradient(grad_in, mask_in, offset_in, Hi, Wi, sigma);
  const bool interleaved = is_interleaved(grad_in);
  const Tensor grad = with_rows(grad_in, interleaved), mask = with_rows(mask_in, false);
  const Tensor offset = in_order(offset_in);
  const int64_t H = grad.size(2), W = grad.size(3);
  const Frame frame = frame_of(grad, H, W, interleaved);
  const Windows windows(offset, Hi, Wi, frame);
  const Tensor out = empty_image(grad, Hi, Wi, interleaved);
  for_dtypes(grad, mask, [&]<typename T, typename M>() {
    using A = acc_t<T>;
    const Upsampling<A> up(mask.size(2), mask.size(3), H, W, sigma);
    const Rows<const T> grads = rows_of<T>(grad, interleaved), none{};
    const Rows<T> whole = mutable_rows_of<T>(out, interleaved);
    const int64_t length = Wi * frame.repeat;
    for_upsampled_strips(frame, up, rows_of<M>(mask, false),
                         [&](int64_t b, int64_t first, int64_t last, const A* keep) {
                           const int64_t y = windows.y(b), left = windows.x(b), right = left + frame.length;
                           for (int64_t p = 0; p < frame.planes; ++p) {
                             // The first strip also clears what lies above the window, the last one what lies below.
                             for (int64_t row = first == 0 ? 0 : y + first; row < (last == H ? Hi : y + last); ++row) {
                               T* values = whole.at(b, p, row);
                               const bool inside = row >= y + first && row < y + last;
                               std::fill(values, values + (inside ? left : length), T(0));
                               if (inside) std::fill(values + right, values + length, T(0));
                             }
                           }
                           blend_strip(frame, complement ? none : grads, complement ? grads : none, keep,
                                       windows.see(whole, b), b, first, last);
                         });
  });
  return out;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CPU, m) {
  m.impl("blend", TORCH_BOX(&casm_fast::blend));
  m.impl("blend_backward_mask", TORCH_BOX(&casm_fast::blend_backward_mask));
  m.impl("blend_backward_image", TORCH_BOX(&casm_fast::blend_backward_image));
  m.impl("upsample_mask", TORCH_BOX(&casm_fast::upsample_mask));
  m.impl("upsample_mask_backward", TORCH_BOX(&casm_fast::upsample_mask_backward));
  m.impl("jitter_mask", TORCH_BOX(&casm_fast::jitter_mask));
  m.impl("jitter_mask_backward_mask", TORCH_BOX(&casm_fast::jitter_mask_backward_mask));
  m.impl("jitter_mask_backward_image", TORCH_BOX(&casm_fast::jitter_mask_backward_image));
}
