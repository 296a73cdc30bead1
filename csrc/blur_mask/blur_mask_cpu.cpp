// gaussian_blur and blur_mask on the CPU: two banded matrix products per plane, both as passes down columns.
//
// The kernel is `fold_block`. It makes 2 x kFold rows of A X for a strip of columns, in registers. Row pairs that lie
// mirrored about the block's centre read pairs of input rows that lie mirrored about it too, so their sums (even part)
// and differences (odd part) need half of the multiplications: with a radius of 40, 46 multiplications and 8 additions
// per pixel and pass instead of 81 multiplications.
//
//   1. across: 32 rows at a time are turned on their side into a strip, blurred, and turned back into strips of
//   columns;
//   2. down:   each strip of columns is blurred, and the epilogue (the blend, the gradient's sum) runs on its rows.
//
// A plane's strips stay in L2 between the two. Where the radius passes half of the side, the blocks are folded about
// the centre of the image instead of their own: then the work no longer grows with the radius. The gradient runs
// through the same passes (blur_mask.h). No sum depends on the number of threads.

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "blur_mask/blur_mask.h"
#include "common/dispatch.h"

namespace casm_fast {
namespace {

// Rows on one side of a block, and registers across: 2 x kFold x kVectors sums live in registers, of 32 (or 16).
constexpr int kFold = 6;
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectors = 2;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kVectors = 1;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectors = 2;
#else
constexpr int kVectorBytes = 16, kVectors = 1;
#endif
constexpr int kStripBytes = 128;  // two cache lines

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <typename T>
constexpr int kStrip = kStripBytes / sizeof(T);

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

// Memory of one task, aligned to cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t{64}))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
};

// ---------------------------------------------------------------- one axis

// Where a block reads and writes: rows up from `hi` and down from `lo`, counted from row 0 of the image.
template <typename T>
struct Block {
  int64_t in_hi, in_lo, out_hi, out_lo;
  const T* weights;  // [depth][even, odd][kFold]
};

// How one axis of n pixels is cut into blocks.
template <typename T>
struct Axis {
  int64_t n, depth, blocks;
  int64_t margin;  // mirrored rows that the input needs on either side
  bool centred;    // blocks are folded about the centre of the image
  std::vector<T> weights;

  Axis(int64_t n, const std::vector<double>& taps) : n(n) {
    const int64_t radius = int64_t(taps.size()) - 1, half = (n + 1) / 2;
    centred = half <= radius + kFold;
    depth = centred ? half : radius + kFold;
    blocks = ceil_div(n, 2 * kFold);
    margin = centred ? 0 : radius;
    weights.assign((centred ? blocks : 1) * depth * 2 * kFold, T(0));
    if (centred) {
      const std::vector<double> wrapped = wrapped_taps(taps, n);
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t k = 0; k < depth; ++k)
          for (int64_t j = 0; j < kFold && b * kFold + j < half; ++j) {
            const int64_t i = n / 2 + b * kFold + j;
            const double near = blur_weight(wrapped, i, n / 2 + k), far = blur_weight(wrapped, i, (n - 1) / 2 - k);
            // The middle row of an odd number is its own partner: the sum counts it twice.
            const bool own = n % 2 == 1 && k == 0;
            set(b, k, j, own ? 0.5 * near : 0.5 * (near + far), own ? 0.0 : 0.5 * (near - far));
          }
    } else {
      const auto tap = [&](int64_t d) { return std::abs(d) <= radius ? taps[std::abs(d)] : 0.0; };
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < kFold; ++j)
          set(0, k, j, 0.5 * (tap(j - k) + tap(j + k + 1)), 0.5 * (tap(j - k) - tap(j + k + 1)));
    }
  }

  void set(int64_t b, int64_t k, int64_t j, double even, double odd) {
    T* pair = weights.data() + (b * depth + k) * 2 * kFold;
    pair[j] = T(even);
    pair[kFold + j] = T(odd);
  }

  Block<T> block(int64_t b) const {
    if (centred)
      return {n / 2, (n - 1) / 2, n / 2 + b * kFold, (n - 1) / 2 - b * kFold, weights.data() + b * depth * 2 * kFold};
    const int64_t hi = (2 * b + 1) * kFold;
    return {hi, hi - 1, hi, hi - 1, weights.data()};
  }

  // Rows of the input with its margins; the last block may reach past them.
  int64_t input_rows() const { return centred ? n : std::max(n, 2 * kFold * blocks) + 2 * margin; }
};

// Fills the margins of a strip from its n rows, which start at row `margin`.
template <typename T>
void fill_margins(const Axis<T>& axis, T* strip) {  // strip [input_rows, kStrip]
  T* first = strip + axis.margin * kStrip<T>;
  const auto copy = [&](int64_t row) {
    std::memcpy(first + row * kStrip<T>, first + mirror(row, axis.n) * kStrip<T>, kStripBytes);
  };
  for (int64_t row = -axis.margin; row < 0; ++row) copy(row);
  for (int64_t row = axis.n; row < axis.input_rows() - axis.margin; ++row) copy(row);
}

// ---------------------------------------------------------------- the kernel

// Rows out_hi, out_hi + 1, ... go to hi_out and up, rows out_lo, out_lo - 1, ... to lo_out and down; all strides are
// kStrip. Reads `depth` rows up from hi and down from lo.
template <typename T>
void fold_block(const T* hi, const T* lo, int64_t depth, const T* weights, T* hi_out, T* lo_out) {
  using V = Vector<T>;
  constexpr int kAcross = kVectors * kLanes<T>;
  for (int at = 0; at < kStrip<T>; at += kAcross) {
    V even[kFold][kVectors] = {}, odd[kFold][kVectors] = {};
    const T *up = hi + at, *down = lo + at, *weight = weights;
    for (int64_t k = 0; k < depth; ++k, up += kStrip<T>, down -= kStrip<T>, weight += 2 * kFold) {
      V sum[kVectors], difference[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const V a = reinterpret_cast<const V*>(up)[v], b = reinterpret_cast<const V*>(down)[v];
        sum[v] = a + b;
        difference[v] = a - b;
      }
#pragma GCC unroll 8
      for (int j = 0; j < kFold; ++j) {
        const T e = weight[j], o = weight[kFold + j];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          even[j][v] += sum[v] * e;
          odd[j][v] += difference[v] * o;
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < kFold; ++j)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        reinterpret_cast<V*>(hi_out + at + j * kStrip<T>)[v] = even[j][v] + odd[j][v];
        reinterpret_cast<V*>(lo_out + at - j * kStrip<T>)[v] = even[j][v] - odd[j][v];
      }
  }
}

// ---------------------------------------------------------------- transposing

template <typename V, int... I>
inline V pick(const V& a, const V& b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  V out;
  constexpr int kIndices[] = {I...};
  constexpr int n = sizeof...(I);
  for (int i = 0; i < n; ++i) out[i] = kIndices[i] < n ? a[kIndices[i]] : b[kIndices[i] - n];
  return out;
#endif
}

// Lanes of a and b whose indices differ in bit S change places across the pair.
template <int S, typename V, int... I>
inline void exchange(V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  const V low = pick(a, b, std::integer_sequence<int, (I & S ? n + (I ^ S) : I)...>());
  b = pick(a, b, std::integer_sequence<int, (I & S ? n + I : I ^ S)...>());
  a = low;
}

template <int S, typename V, int kCount>
inline void exchange_all(V (&rows)[kCount]) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i)
      if (!(i & S)) exchange<S>(rows[i], rows[i | S], std::make_integer_sequence<int, kCount>());
    exchange_all<S / 2>(rows);
  }
}

// out[x][y] = in[y][x] of one square of kLanes x kLanes.
template <typename T>
inline void transpose_square(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  constexpr int n = kLanes<T>;
  Vector<T> rows[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) std::memcpy(&rows[i], in + i * in_stride, sizeof rows[i]);
  exchange_all<n / 2>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) std::memcpy(out + i * out_stride, &rows[i], sizeof rows[i]);
}

// ---------------------------------------------------------------- one plane

// The two passes of a plane [H, W]. Its strips of columns lie in `columns`, [strips][down.input_rows()][kStrip].
template <typename T>
struct Passes {
  Axis<T> across, down;
  int64_t strips, groups;  // of columns, and of rows in the first pass

  Passes(int64_t H, int64_t W, const std::vector<double>& taps)
      : across(W, taps), down(H, taps), strips(ceil_div(W, kStrip<T>)), groups(ceil_div(H, kStrip<T>)) {}

  int64_t strip_size() const { return down.input_rows() * kStrip<T>; }
  int64_t columns_size() const { return strips * strip_size(); }

  // What one task needs besides `columns`: staged rows, a strip with margins, and a strip of results that blocks may
  // overhang by kFold rows on either side.
  int64_t staged_size() const { return kLanes<T> * strips * kStrip<T>; }
  int64_t input_size() const { return (std::max(across.input_rows(), strips * kStrip<T>) + across.margin) * kStrip<T>; }
  int64_t result_size() const {
    return (std::max(strips * kStrip<T>, 2 * kFold * across.blocks) + 2 * kFold) * kStrip<T>;
  }
  int64_t task_size() const { return staged_size() + input_size() + result_size(); }

  // 1. Rows [group * kStrip, ...) from stage(y, row) into the strips of columns, blurred across.
  template <typename Stage>
  void blur_across(int64_t group, const Stage& stage, T* columns, T* task) const {
    const int64_t H = down.n, W = across.n, width = strips * kStrip<T>, first = group * kStrip<T>;
    T *staged = task, *input = staged + staged_size(), *result = input + input_size() + kFold * kStrip<T>;
    for (int64_t part = 0; part < kStrip<T>; part += kLanes<T>) {
      for (int64_t i = 0; i < kLanes<T>; ++i) {
        T* row = staged + i * width;
        stage(std::min(first + part + i, H - 1), row);  // rows below the image repeat the last one and are dropped
        for (int64_t x = W; x < width; ++x) row[x] = T(0);
      }
      for (int64_t x = 0; x < width; x += kLanes<T>)
        transpose_square(staged + x, width, input + (across.margin + x) * kStrip<T> + part, kStrip<T>);
    }
    fill_margins(across, input);
    const T* origin = input + across.margin * kStrip<T>;
    for (int64_t b = 0; b < across.blocks; ++b) {
      const Block<T> at = across.block(b);
      fold_block(origin + at.in_hi * kStrip<T>, origin + at.in_lo * kStrip<T>, across.depth, at.weights,
                 result + at.out_hi * kStrip<T>, result + at.out_lo * kStrip<T>);
    }
    const int64_t rows = std::min<int64_t>(kStrip<T>, H - first);
    for (int64_t s = 0; s < strips; ++s) {
      T* strip = columns + s * strip_size() + (down.margin + first) * kStrip<T>;
      for (int64_t part = 0; part < rows; part += kLanes<T>)
        for (int64_t x = 0; x < kStrip<T>; x += kLanes<T>)
          if (part + kLanes<T> <= rows) {
            transpose_square(result + (s * kStrip<T> + x) * kStrip<T> + part, kStrip<T>, strip + part * kStrip<T> + x,
                             kStrip<T>);
          } else {
            for (int64_t y = part; y < rows; ++y)
              for (int64_t i = x; i < x + kLanes<T>; ++i)
                strip[y * kStrip<T> + i] = result[(s * kStrip<T> + i) * kStrip<T> + y];
          }
    }
  }

  // 2. Strip s of the columns, blurred down, into finish(y, x, count, pixels).
  template <typename Finish>
  void blur_down(int64_t s, T* columns, const Finish& finish) const {
    T* strip = columns + s * strip_size();
    fill_margins(down, strip);
    const T* origin = strip + down.margin * kStrip<T>;
    const int64_t x = s * kStrip<T>, count = std::min<int64_t>(kStrip<T>, across.n - x);
    alignas(64) T tile[2 * kFold * kStrip<T>];
    T *upper = tile + kFold * kStrip<T>, *lower = upper - kStrip<T>;
    for (int64_t b = 0; b < down.blocks; ++b) {
      const Block<T> at = down.block(b);
      fold_block(origin + at.in_hi * kStrip<T>, origin + at.in_lo * kStrip<T>, down.depth, at.weights, upper, lower);
      for (int64_t j = 0; j < kFold; ++j) {
        if (at.out_hi + j < down.n) finish(at.out_hi + j, x, count, upper + j * kStrip<T>);
        if (at.out_lo - j >= 0 && at.out_lo - j < down.n) finish(at.out_lo - j, x, count, lower - j * kStrip<T>);
      }
    }
  }
};

// ---------------------------------------------------------------- all planes

// Blurs `planes` planes of [H, W]: stage(plane, y, row) gives row y, finish(plane, y, x, count, pixels) takes pieces of
// the blurred rows, each pixel once.
template <typename T, typename Stage, typename Finish>
void blur_planes(int64_t planes, int64_t H, int64_t W, double sigma, double truncate, const Stage& stage,
                 const Finish& finish) {
  const int64_t radius = blur_radius(sigma, truncate);
  if (planes == 0) return;
  if (radius == 0) {  // the identity, exactly
    torch::stable::parallel_for(0, planes * H, ceil_div(1 << 14, W), [&](int64_t begin, int64_t end) {
      std::vector<T> row(W);
      for (int64_t i = begin; i < end; ++i) {
        stage(i / H, i % H, row.data());
        finish(i / H, i % H, 0, W, row.data());
      }
    });
    return;
  }
  const Passes<T> passes(H, W, gaussian_taps(sigma, radius));
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || planes >= 4 * threads || (passes.groups == 1 && passes.strips == 1)) {
    // A plane is one task, and its columns stay in that processor's L2.
    torch::stable::parallel_for(0, planes, ceil_div(1 << 12, H * W), [&](int64_t begin, int64_t end) {
      const Scratch<T> columns(passes.columns_size()), task(passes.task_size());
      for (int64_t p = begin; p < end; ++p) {
        const auto stage_row = [&](int64_t y, T* row) { stage(p, y, row); };
        const auto finish_row = [&](int64_t y, int64_t x, int64_t n, const T* pixels) { finish(p, y, x, n, pixels); };
        for (int64_t g = 0; g < passes.groups; ++g) passes.blur_across(g, stage_row, columns.get(), task.get());
        for (int64_t s = 0; s < passes.strips; ++s) passes.blur_down(s, columns.get(), finish_row);
      }
    });
    return;
  }
  // Few planes: all processors work on each pass.
  const Scratch<T> columns(planes * passes.columns_size());
  torch::stable::parallel_for(0, planes * passes.groups, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> task(passes.task_size());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / passes.groups;
      const auto stage_row = [&](int64_t y, T* row) { stage(p, y, row); };
      passes.blur_across(i % passes.groups, stage_row, columns.get() + p * passes.columns_size(), task.get());
    }
  });
  torch::stable::parallel_for(0, planes * passes.strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / passes.strips;
      const auto finish_row = [&](int64_t y, int64_t x, int64_t n, const T* pixels) { finish(p, y, x, n, pixels); };
      passes.blur_down(i % passes.strips, columns.get() + p * passes.columns_size(), finish_row);
    }
  });
}

// ---------------------------------------------------------------- what goes in and out

// A tensor [B, C, H, W] of any strides, by plane and row. A mask [B, 1, H, W] serves the C planes of its image.
template <typename T>
struct Rows {
  const T* data;
  int64_t channels, over_batch, over_channels, over_rows, over_columns;

  Rows(const Tensor& tensor, int64_t channels)
      : data(tensor.const_data_ptr<T>()),
        channels(channels),
        over_batch(tensor.stride(0)),
        over_channels(tensor.size(1) == 1 ? 0 : tensor.stride(1)),
        over_rows(tensor.stride(2)),
        over_columns(tensor.stride(3)) {}

  const T* at(int64_t plane, int64_t y, int64_t x) const {
    return data + plane / channels * over_batch + plane % channels * over_channels + y * over_rows + x * over_columns;
  }
};

// f(i, a[i], b[i]) for i < n. Contiguous rows get a loop of their own, which the compiler turns into vectors.
template <typename T, typename F>
inline void for_row(int64_t n, const T* a, int64_t a_stride, const T* b, int64_t b_stride, const F& f) {
  if (a_stride == 1 && b_stride == 1)
    for (int64_t i = 0; i < n; ++i) f(i, a[i], b[i]);
  else
    for (int64_t i = 0; i < n; ++i) f(i, a[i * a_stride], b[i * b_stride]);
}

// Scales what goes into (by 2) or comes out of (by 1/2) the border pixels: C^-1 and C of blur_mask.h. `row` holds
// pixels x, x + 1, ... of row y.
template <typename T>
void scale_border(T* row, int64_t y, int64_t H, int64_t x, int64_t count, int64_t W, T factor) {
  if (is_border(y, H))
    for (int64_t i = 0; i < count; ++i) row[i] *= factor;
  if (x == 0 && W > 1) row[0] *= factor;
  if (x + count == W && W > 1) row[count - 1] *= factor;
}

struct Shape {
  int64_t B, C, H, W, planes;
  explicit Shape(const Tensor& t) : B(t.size(0)), C(t.size(1)), H(t.size(2)), W(t.size(3)), planes(B * C) {}
};

Tensor new_image(const Tensor& like, const Shape& s) { return torch::stable::new_empty(like, {s.B, s.C, s.H, s.W}); }

Tensor gaussian_blur(const Tensor& image, double sigma, double truncate) {
  check_blur_image(image);
  const Shape s(image);
  Tensor output = new_image(image, s);
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    const Rows<scalar_t> in(image, s.C);
    scalar_t* out = output.mutable_data_ptr<scalar_t>();
    blur_planes<scalar_t>(
        s.planes, s.H, s.W, sigma, truncate,
        [&](int64_t p, int64_t y, scalar_t* __restrict row) {
          for_row(s.W, in.at(p, y, 0), in.over_columns, in.at(p, y, 0), in.over_columns,
                  [&](int64_t i, scalar_t value, scalar_t) { row[i] = value; });
        },
        [&](int64_t p, int64_t y, int64_t x, int64_t n, const scalar_t* pixels) {
          std::copy_n(pixels, n, out + (p * s.H + y) * s.W + x);
        });
  });
  return output;
}

Tensor gaussian_blur_backward(const Tensor& grad_output, double sigma, double truncate) {
  check_blur_image(grad_output);
  const Shape s(grad_output);
  const bool identity = blur_radius(sigma, truncate) == 0;
  Tensor grad_image = new_image(grad_output, s);
  for_cpu_dtype(grad_output, [&]<typename scalar_t>() {
    const Rows<scalar_t> in(grad_output, s.C);
    scalar_t* out = grad_image.mutable_data_ptr<scalar_t>();
    blur_planes<scalar_t>(
        s.planes, s.H, s.W, sigma, truncate,
        [&](int64_t p, int64_t y, scalar_t* __restrict row) {
          for_row(s.W, in.at(p, y, 0), in.over_columns, in.at(p, y, 0), in.over_columns,
                  [&](int64_t i, scalar_t value, scalar_t) { row[i] = value; });
          if (!identity) scale_border(row, y, s.H, 0, s.W, s.W, scalar_t(2));
        },
        [&](int64_t p, int64_t y, int64_t x, int64_t n, const scalar_t* pixels) {
          scalar_t* to = out + (p * s.H + y) * s.W + x;
          std::copy_n(pixels, n, to);
          if (!identity) scale_border(to, y, s.H, x, n, s.W, scalar_t(0.5));
        });
  });
  return grad_image;
}

// The forward of blur_mask; `blurred` is written where it is wanted.
template <typename T>
void blend_with_blur(const Tensor& image, const Tensor& mask, double sigma, double truncate, T* output, T* blurred) {
  const Shape s(image);
  const Rows<T> in(image, s.C), keep(mask, s.C);
  blur_planes<T>(
      s.planes, s.H, s.W, sigma, truncate,
      [&](int64_t p, int64_t y, T* __restrict row) {
        for_row(s.W, in.at(p, y, 0), in.over_columns, in.at(p, y, 0), in.over_columns,
                [&](int64_t i, T value, T) { row[i] = value; });
      },
      [&](int64_t p, int64_t y, int64_t x, int64_t n, const T* pixels) {
        const int64_t at = (p * s.H + y) * s.W + x;
        T* __restrict to = output + at;
        for_row(n, in.at(p, y, x), in.over_columns, keep.at(p, y, x), keep.over_columns,
                [&](int64_t i, T value, T m) { to[i] = value * m + pixels[i] * (1 - m); });
        if (blurred) std::copy_n(pixels, n, blurred + at);
      });
}

Tensor blur_mask(const Tensor& image, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(image, mask);
  Tensor output = new_image(image, Shape(image));
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    blend_with_blur<scalar_t>(image, mask, sigma, truncate, output.mutable_data_ptr<scalar_t>(), nullptr);
  });
  return output;
}

std::tuple<Tensor, Tensor> blur_mask_and_blur(const Tensor& image, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(image, mask);
  Tensor output = new_image(image, Shape(image)), blurred = new_image(image, Shape(image));
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    blend_with_blur<scalar_t>(image, mask, sigma, truncate, output.mutable_data_ptr<scalar_t>(),
                              blurred.mutable_data_ptr<scalar_t>());
  });
  return {output, blurred};
}

// grad * mask + A^T (grad * (1 - mask)).
Tensor blur_mask_backward_image(const Tensor& grad_output, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(grad_output, mask);
  const Shape s(grad_output);
  const bool identity = blur_radius(sigma, truncate) == 0;
  Tensor grad_image = new_image(grad_output, s);
  for_cpu_dtype(grad_output, [&]<typename scalar_t>() {
    const Rows<scalar_t> grad(grad_output, s.C), keep(mask, s.C);
    scalar_t* out = grad_image.mutable_data_ptr<scalar_t>();
    blur_planes<scalar_t>(
        s.planes, s.H, s.W, sigma, truncate,
        [&](int64_t p, int64_t y, scalar_t* __restrict row) {
          for_row(s.W, grad.at(p, y, 0), grad.over_columns, keep.at(p, y, 0), keep.over_columns,
                  [&](int64_t i, scalar_t g, scalar_t m) { row[i] = g * (1 - m); });
          if (!identity) scale_border(row, y, s.H, 0, s.W, s.W, scalar_t(2));
        },
        [&](int64_t p, int64_t y, int64_t x, int64_t n, const scalar_t* pixels) {
          scalar_t* __restrict to = out + (p * s.H + y) * s.W + x;
          std::copy_n(pixels, n, to);
          if (!identity) scale_border<scalar_t>(to, y, s.H, x, n, s.W, scalar_t(0.5));
          for_row(n, grad.at(p, y, x), grad.over_columns, keep.at(p, y, x), keep.over_columns,
                  [&](int64_t i, scalar_t g, scalar_t m) { to[i] += g * m; });
        });
  });
  return grad_image;
}

// sum over the channels of grad * (image - blurred), in the order of the channels.
Tensor blur_mask_backward_mask(const Tensor& grad_output, const Tensor& image, const Tensor& blurred) {
  check_blur_like(image, grad_output);
  check_blur_like(image, blurred);
  const Shape s(image);
  Tensor grad_mask = torch::stable::new_empty(image, {s.B, 1, s.H, s.W});
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    const Rows<scalar_t> grad(grad_output, s.C), in(image, s.C), blur(blurred, s.C);
    scalar_t* out = grad_mask.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, s.B * s.H, ceil_div(1 << 13, s.W), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> difference(s.W);
      for (int64_t i = begin; i < end; ++i) {
        scalar_t* __restrict to = out + i * s.W, * __restrict d = difference.data();
        std::fill_n(to, s.W, scalar_t(0));
        for (int64_t c = 0; c < s.C; ++c) {
          const int64_t p = i / s.H * s.C + c, y = i % s.H;
          for_row(s.W, in.at(p, y, 0), in.over_columns, blur.at(p, y, 0), blur.over_columns,
                  [&](int64_t x, scalar_t a, scalar_t b) { d[x] = a - b; });
          for_row(s.W, grad.at(p, y, 0), grad.over_columns, d, int64_t(1),
                  [&](int64_t x, scalar_t g, scalar_t e) { to[x] += g * e; });
        }
      }
    });
  });
  return grad_mask;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CPU, m) {
  m.impl("gaussian_blur", TORCH_BOX(&casm_fast::gaussian_blur));
  m.impl("gaussian_blur_backward", TORCH_BOX(&casm_fast::gaussian_blur_backward));
  m.impl("blur_mask", TORCH_BOX(&casm_fast::blur_mask));
  m.impl("blur_mask_and_blur", TORCH_BOX(&casm_fast::blur_mask_and_blur));
  m.impl("blur_mask_backward_image", TORCH_BOX(&casm_fast::blur_mask_backward_image));
  m.impl("blur_mask_backward_mask", TORCH_BOX(&casm_fast::blur_mask_backward_mask));
}
