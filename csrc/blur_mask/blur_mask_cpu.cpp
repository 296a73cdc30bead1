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
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

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

template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes), may_alias));
};
template <typename T, int kBytes = kVectorBytes>
using Vector = typename VectorOf<T, kBytes>::type;

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

// The taps wrapped to the period of a mirrored row of n pixels: see blur_weight.
std::vector<double> wrapped_taps(const std::vector<double>& taps, int64_t n) {
  std::vector<double> wrapped(n, n == 1 ? 0.5 : 0.0);
  if (n == 1) return wrapped;
  const int64_t radius = int64_t(taps.size()) - 1;
  for (int64_t k = -radius; k <= radius; ++k) {
    const int64_t at = mirror(k, n);
    // k and -k share a place, except at the two ends of the period, which are places of their own.
    wrapped[at] += (at == 0 || at == n - 1 ? 1.0 : 0.5) * taps[std::abs(k)];
  }
  return wrapped;
}

template <typename T>
struct Axis : FoldedAxis<kFold> {
  int64_t margin;  // mirrored rows that the input needs on either side
  std::vector<T> weights;

  Axis(int64_t n, const std::vector<double>& taps) : FoldedAxis<kFold>(n, int64_t(taps.size()) - 1) {
    margin = this->centred ? 0 : this->radius;
    weights.resize(FoldedAxis<kFold>::weights());
    const std::vector<double> wrapped = this->centred ? wrapped_taps(taps, n) : std::vector<double>();
    const auto tap_at = [&](int64_t d) { return std::abs(d) <= this->radius ? taps[std::abs(d)] : 0.0; };
    const auto wrapped_at = [&](int64_t d) { return wrapped[d]; };
    T* entry = weights.data();
    for (int64_t b = 0; b < this->tables(); ++b)
      for (int64_t k = 0; k < this->depth; ++k, entry += 2 * kFold)
        for (int64_t j = 0; j < kFold; ++j) {
          const FoldWeight weight = fold_weight(*this, b, k, j, tap_at, wrapped_at);
          entry[j] = T(weight.even);
          entry[kFold + j] = T(weight.odd);
        }
  }

  const T* weights_of(int64_t b) const { return weights.data() + this->table_of(b); }

  // Rows of the input with its margins; the last block may reach past them.
  int64_t input_rows() const {
    return this->centred ? this->n : std::max(this->n, 2 * kFold * this->blocks) + 2 * margin;
  }
};

// Fills the margins of a strip from its n rows, which start at row `margin`.
template <typename T>
void fill_margins(const Axis<T>& axis, T* strip) {  // strip [input_rows, kStrip]
  T* first = strip + axis.margin * kStrip<T>;
  const auto fill = [&](int64_t from, int64_t count, int64_t step) {  // rows from + step, from + 2 step, ...
    int64_t source = from, back = axis.n > 1 ? -step : 0;
    for (int64_t i = 1; i <= count; ++i) {
      source += back;
      if (source == 0 || source == axis.n - 1) back = -back;
      std::memcpy(first + (from + i * step) * kStrip<T>, first + source * kStrip<T>, kStripBytes);
    }
  };
  fill(0, axis.margin, -1);
  fill(axis.n - 1, axis.input_rows() - axis.margin - axis.n, 1);
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
inline auto pick(const V& a, const V& b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  typedef std::remove_cvref_t<decltype(a[0])> T;
  Vector<T, sizeof...(I) * sizeof(T)> out;
  constexpr int kIndices[] = {I...}, n = sizeof(V) / sizeof(T);
  for (int i = 0; i < int(sizeof...(I)); ++i) out[i] = kIndices[i] < n ? a[kIndices[i]] : b[kIndices[i] - n];
  return out;
#endif
}

// The two halves one after the other. GCC makes a shuffle of this, which competes with the arithmetic for a port.
template <typename V>
inline auto join(const V& a, const V& b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 32)
    return reinterpret_cast<Vector<std::remove_cvref_t<decltype(a[0])>, 64>>(
        _mm512_maskz_insertf64x4(0xff, _mm512_castpd256_pd512(__m256d(a)), __m256d(b), 1));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 16)
    return reinterpret_cast<Vector<std::remove_cvref_t<decltype(a[0])>, 32>>(
        _mm256_insertf128_pd(_mm256_castpd128_pd256(__m128d(a)), __m128d(b), 1));
#endif
  return pick(a, b, std::make_integer_sequence<int, 2 * sizeof(V) / sizeof(a[0])>());
}

// 16 bytes from column x of each of kBytes / 16 rows: rows[0], rows[u], rows[2 u], ... for u lanes in 16 bytes.
template <typename T, int kBytes>
inline Vector<T, kBytes> stack_units(const T* const* rows, int64_t x) {
  Vector<T, kBytes> stack;
  if constexpr (kBytes == 16)
    std::memcpy(&stack, rows[0] + x, 16);
  else
    stack = join(stack_units<T, kBytes / 2>(rows, x), stack_units<T, kBytes / 2>(rows + kBytes / 2 / sizeof(T), x));
  return stack;
}

// Lanes of a and b in turn, from the lower or the upper half of each 16 bytes.
template <bool kUpper, typename V, int... I>
inline V riffle(const V& a, const V& b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I), unit = n * 16 / sizeof(V);
  return pick(a, b, std::integer_sequence<int, (I / unit * unit + I % unit / 2 + kUpper * unit / 2 + I % 2 * n)...>());
}

// out[x][y] = rows[y][x0 + x] of one square of kLanes x kLanes. Squares of one 16-byte unit are turned inside registers
// that hold a unit of each of several rows.
template <typename T>
inline void transpose_square(const T* const* rows, int64_t x0, T* out, int64_t out_stride) {
  constexpr int n = kLanes<T>, unit = 16 / sizeof(T);
  constexpr auto kOrder = std::make_integer_sequence<int, n>();
#pragma GCC unroll 1
  for (int x = 0; x < n; x += unit) {
    Vector<T> square[unit];
#pragma GCC unroll 4
    for (int i = 0; i < unit; ++i) square[i] = stack_units<T, kVectorBytes>(rows + i, x0 + x);
    for (int step = 1; step < unit; step *= 2) {
      Vector<T> next[unit];
#pragma GCC unroll 4
      for (int i = 0; i < unit / 2; ++i) {
        next[2 * i] = riffle<false>(square[i], square[i + unit / 2], kOrder);
        next[2 * i + 1] = riffle<true>(square[i], square[i + unit / 2], kOrder);
      }
      std::copy_n(next, unit, square);
    }
#pragma GCC unroll 4
    for (int i = 0; i < unit; ++i) std::memcpy(out + (x + i) * out_stride, &square[i], sizeof square[i]);
  }
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
  int64_t input_size() const { return std::max(across.input_rows(), strips * kStrip<T>) * kStrip<T>; }
  int64_t result_size() const {
    return (std::max(strips * kStrip<T>, 2 * kFold * across.blocks) + 2 * kFold) * kStrip<T>;
  }
  int64_t task_size() const { return staged_size() + input_size() + result_size(); }

  // f(start) of squares that cover `size` rows, where there are that many; the last one may overlap the one before.
  template <typename F>
  static void for_squares(int64_t size, const F& f) {
    constexpr int64_t n = kLanes<T>;
    for (int64_t start = 0; start + n <= size; start += n) f(start);
    if (size > n && size % n != 0) f(size - n);
  }

  // 1. Rows [group * kStrip, ...) of the plane into the strips of columns, blurred across.
  template <typename Plane>
  void blur_across(int64_t group, const Plane& plane, T* columns, T* task) const {
    constexpr int64_t n = kLanes<T>;
    const int64_t H = down.n, W = across.n, first = group * kStrip<T>;
    T *staged = task, *input = staged + staged_size(), *result = input + input_size() + kFold * kStrip<T>;
    T* origin = input + across.margin * kStrip<T>;
    const T* rows[kStrip<T>];
    for (int64_t part = 0; part < kStrip<T>; part += n) {
      for (int64_t i = 0; i < n; ++i)  // rows below the image repeat the last one, and their results are dropped
        rows[i] = plane.stage(std::min(first + part + i, H - 1), staged + i * strips * kStrip<T>);
      for_squares(W, [&](int64_t x) { transpose_square(rows, x, origin + x * kStrip<T> + part, kStrip<T>); });
      if (W < n)
        for (int64_t x = 0; x < W; ++x)
          for (int64_t i = 0; i < n; ++i) origin[x * kStrip<T> + part + i] = rows[i][x];
    }
    fill_margins(across, input);
    for (int64_t b = 0; b < across.blocks; ++b) {
      fold_block(origin + across.in_hi(b) * kStrip<T>, origin + across.in_lo(b) * kStrip<T>, across.depth,
                 across.weights_of(b), result + across.out_hi(b) * kStrip<T>, result + across.out_lo(b) * kStrip<T>);
    }
    const int64_t height = std::min<int64_t>(kStrip<T>, H - first);
    for (int64_t s = 0; s < strips; ++s) {
      T* strip = columns + s * strip_size() + (down.margin + first) * kStrip<T>;
      for (int64_t i = 0; i < kStrip<T>; ++i) rows[i] = result + (s * kStrip<T> + i) * kStrip<T>;
      for (int64_t x = 0; x < kStrip<T>; x += n)
        for_squares(height, [&](int64_t y) { transpose_square(rows + x, y, strip + y * kStrip<T> + x, kStrip<T>); });
      if (height < n)
        for (int64_t y = 0; y < height; ++y)
          for (int64_t x = 0; x < kStrip<T>; ++x) strip[y * kStrip<T> + x] = rows[x][y];
    }
  }

  // 2. Strip s of the columns, blurred down, into the plane.
  template <typename Plane>
  void blur_down(int64_t s, T* columns, const Plane& plane) const {
    T* strip = columns + s * strip_size();
    fill_margins(down, strip);
    const T* origin = strip + down.margin * kStrip<T>;
    const int64_t x = s * kStrip<T>, count = std::min<int64_t>(kStrip<T>, across.n - x);
    alignas(64) T tile[2 * kFold * kStrip<T>];
    T *upper = tile + kFold * kStrip<T>, *lower = upper - kStrip<T>;
    const auto finish = [&](int64_t y, const T* pixels) {
      if (y < 0 || y >= down.n) return;
      if (count == kStrip<T>)
        plane.finish(y, x, std::integral_constant<int64_t, kStrip<T>>(), pixels);
      else
        plane.finish(y, x, count, pixels);
    };
    for (int64_t b = 0; b < down.blocks; ++b) {
      fold_block(origin + down.in_hi(b) * kStrip<T>, origin + down.in_lo(b) * kStrip<T>, down.depth, down.weights_of(b),
                 upper, lower);
      for (int64_t j = 0; j < kFold; ++j) {
        finish(down.out_hi(b) + j, upper + j * kStrip<T>);
        finish(down.out_lo(b) - j, lower - j * kStrip<T>);
      }
    }
  }
};

// ---------------------------------------------------------------- all planes

// Blurs `planes` planes of [H, W]. What plane_of(p) returns has
//   const T* stage(y, row)              row y of what is to be blurred: written to `row`, or where it lies;
//   void finish(y, x, count, pixels)    takes a piece of the blurred row y, which starts at x.
template <typename T, typename PlaneOf>
void blur_planes(int64_t planes, int64_t H, int64_t W, double sigma, double truncate, const PlaneOf& plane_of) {
  const int64_t radius = blur_radius(sigma, truncate);
  if (planes == 0) return;
  if (radius == 0) {  // the identity, exactly
    torch::stable::parallel_for(0, planes * H, ceil_div(1 << 14, W), [&](int64_t begin, int64_t end) {
      std::vector<T> row(W);
      for (int64_t i = begin; i < end; ++i) {
        const auto plane = plane_of(i / H);
        plane.finish(i % H, 0, W, plane.stage(i % H, row.data()));
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
        const auto plane = plane_of(p);
        for (int64_t g = 0; g < passes.groups; ++g) passes.blur_across(g, plane, columns.get(), task.get());
        for (int64_t s = 0; s < passes.strips; ++s) passes.blur_down(s, columns.get(), plane);
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
      passes.blur_across(i % passes.groups, plane_of(p), columns.get() + p * passes.columns_size(), task.get());
    }
  });
  torch::stable::parallel_for(0, planes * passes.strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / passes.strips;
      passes.blur_down(i % passes.strips, columns.get() + p * passes.columns_size(), plane_of(p));
    }
  });
}

// ---------------------------------------------------------------- what goes in and out

// One plane [H, W] of a tensor of any strides.
template <typename T>
struct View {
  const T* data;
  int64_t over_rows, over_columns;
  const T* row(int64_t y, int64_t x = 0) const { return data + y * over_rows + x * over_columns; }
};

// Plane p of [B, C, H, W], or the mask [B, 1, H, W] of that plane.
template <typename T>
View<T> view(const Tensor& tensor, int64_t channels, int64_t p) {
  const int64_t c = tensor.size(1) == 1 ? 0 : p % channels;
  return {tensor.const_data_ptr<T>() + p / channels * tensor.stride(0) + c * tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

// f(i, a[i], b[i]) for i < n. Contiguous rows get a loop of their own, which the compiler turns into vectors.
template <typename Count, typename T, typename F>
inline void for_row(Count n, const T* a, int64_t a_stride, const T* b, int64_t b_stride, const F& f) {
  if (a_stride == 1 && b_stride == 1)
    for (int64_t i = 0; i < n; ++i) f(i, a[i], b[i]);
  else if (a_stride == 0 && b_stride == 1)  // the gradient of a sum
    for (int64_t i = 0; i < n; ++i) f(i, *a, b[i]);
  else
    for (int64_t i = 0; i < n; ++i) f(i, a[i * a_stride], b[i * b_stride]);
}

// The image itself, for the blur and for the blend.
template <typename T>
struct ImagePlane {
  View<T> image;
  int64_t W;

  const T* stage(int64_t y, T* row) const {
    const T* pixels = image.row(y);
    if (image.over_columns == 1) return pixels;
    for (int64_t x = 0; x < W; ++x) row[x] = pixels[x * image.over_columns];
    return row;
  }
};

template <typename T>
struct BlurPlane : ImagePlane<T> {
  T* output;

  template <typename Count>
  void finish(int64_t y, int64_t x, Count count, const T* pixels) const {
    std::memcpy(output + y * this->W + x, pixels, count * sizeof(T));
  }
};

// image * mask + blur * (1 - mask), and the blur itself where it is wanted.
template <typename T>
struct BlendPlane : ImagePlane<T> {
  View<T> mask;
  T *output, *blurred;

  template <typename Count>
  void finish(int64_t y, int64_t x, Count count, const T* __restrict pixels) const {
    T* __restrict to = output + y * this->W + x;
    // Written before the image and the mask are read, so that the lines come from memory together: a sixth faster.
    std::memcpy(to, pixels, count * sizeof(T));
    for_row(count, this->image.row(y, x), this->image.over_columns, mask.row(y, x), mask.over_columns,
            [&](int64_t i, T value, T m) { to[i] = value * m + to[i] * (1 - m); });
    if (blurred) std::memcpy(blurred + y * this->W + x, pixels, count * sizeof(T));
  }
};

// A^T grad, or grad * mask + A^T (grad * (1 - mask)): the blur between two scalings of the border, C^-1 and C of
// blur_mask.h.
template <typename T, bool kMasked>
struct GradientPlane {
  View<T> grad, mask;
  T* output;
  int64_t H, W;
  bool identity;

  // Pixels x, x + 1, ... of row y.
  void scale_border(T* row, int64_t y, int64_t x, int64_t count, T factor) const {
    if (identity) return;
    if (is_border(y, H))
      for (int64_t i = 0; i < count; ++i) row[i] *= factor;
    if (is_border(x, W)) row[0] *= factor;
    if (count > 1 && is_border(x + count - 1, W)) row[count - 1] *= factor;
  }

  const T* stage(int64_t y, T* __restrict row) const {
    const View<T>& other = kMasked ? mask : grad;
    for_row(W, grad.row(y), grad.over_columns, other.row(y), other.over_columns,
            [&](int64_t x, T g, T m) { row[x] = kMasked ? g * (1 - m) : g; });
    scale_border(row, y, 0, W, T(2));
    return row;
  }

  template <typename Count>
  void finish(int64_t y, int64_t x, Count count, const T* pixels) const {
    T* __restrict to = output + y * W + x;
    std::memcpy(to, pixels, count * sizeof(T));
    scale_border(to, y, x, count, T(0.5));
    if constexpr (kMasked)
      for_row(count, grad.row(y, x), grad.over_columns, mask.row(y, x), mask.over_columns,
              [&](int64_t i, T g, T m) { to[i] += g * m; });
  }
};

struct Shape {
  int64_t B, C, H, W, planes;
  explicit Shape(const Tensor& t) : B(t.size(0)), C(t.size(1)), H(t.size(2)), W(t.size(3)), planes(B * C) {}
};

Tensor new_image(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

Tensor gaussian_blur(const Tensor& image, double sigma, double truncate) {
  check_blur_image(image);
  const Shape s(image);
  Tensor output = new_image(image);
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    scalar_t* out = output.mutable_data_ptr<scalar_t>();
    blur_planes<scalar_t>(s.planes, s.H, s.W, sigma, truncate, [&](int64_t p) {
      return BlurPlane<scalar_t>{{view<scalar_t>(image, s.C, p), s.W}, out + p * s.H * s.W};
    });
  });
  return output;
}

// The forward of blur_mask; `blurred` is written where it is wanted.
template <typename T>
void blend_with_blur(const Tensor& image, const Tensor& mask, double sigma, double truncate, T* output, T* blurred) {
  const Shape s(image);
  blur_planes<T>(s.planes, s.H, s.W, sigma, truncate, [&](int64_t p) {
    const int64_t at = p * s.H * s.W;
    return BlendPlane<T>{
        {view<T>(image, s.C, p), s.W}, view<T>(mask, s.C, p), output + at, blurred ? blurred + at : blurred};
  });
}

Tensor blur_mask(const Tensor& image, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(image, mask);
  Tensor output = new_image(image);
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    blend_with_blur<scalar_t>(image, mask, sigma, truncate, output.mutable_data_ptr<scalar_t>(), nullptr);
  });
  return output;
}

std::tuple<Tensor, Tensor> blur_mask_and_blur(const Tensor& image, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(image, mask);
  Tensor output = new_image(image), blurred = new_image(image);
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    blend_with_blur<scalar_t>(image, mask, sigma, truncate, output.mutable_data_ptr<scalar_t>(),
                              blurred.mutable_data_ptr<scalar_t>());
  });
  return {output, blurred};
}

// The gradient of the image; without a mask (grad_output stands in for it), that of the plain blur.
template <bool kMasked>
Tensor gradient_of_image(const Tensor& grad_output, const Tensor& mask, double sigma, double truncate) {
  const Shape s(grad_output);
  const bool identity = blur_radius(sigma, truncate) == 0;
  Tensor grad_image = new_image(grad_output);
  for_cpu_dtype(grad_output, [&]<typename scalar_t>() {
    scalar_t* out = grad_image.mutable_data_ptr<scalar_t>();
    blur_planes<scalar_t>(s.planes, s.H, s.W, sigma, truncate, [&](int64_t p) {
      return GradientPlane<scalar_t, kMasked>{
          view<scalar_t>(grad_output, s.C, p), view<scalar_t>(mask, s.C, p), out + p * s.H * s.W, s.H, s.W, identity};
    });
  });
  return grad_image;
}

Tensor gaussian_blur_backward(const Tensor& grad_output, double sigma, double truncate) {
  check_blur_image(grad_output);
  return gradient_of_image<false>(grad_output, grad_output, sigma, truncate);
}

Tensor blur_mask_backward_image(const Tensor& grad_output, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(grad_output, mask);
  return gradient_of_image<true>(grad_output, mask, sigma, truncate);
}

// sum over the channels of grad * (image - blurred), in the order of the channels.
Tensor blur_mask_backward_mask(const Tensor& grad_output, const Tensor& image, const Tensor& blurred) {
  check_blur_like(image, grad_output);
  check_blur_like(image, blurred);
  const Shape s(image);
  Tensor grad_mask = torch::stable::new_empty(image, {s.B, 1, s.H, s.W});
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    scalar_t* out = grad_mask.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(0, s.B * s.H, ceil_div(1 << 13, s.W), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> difference(s.W);
      for (int64_t i = begin; i < end; ++i) {
        scalar_t* __restrict to = out + i * s.W, * __restrict d = difference.data();
        std::fill_n(to, s.W, scalar_t(0));
        for (int64_t c = 0; c < s.C; ++c) {
          const int64_t p = i / s.H * s.C + c, y = i % s.H;
          const View<scalar_t> g = view<scalar_t>(grad_output, s.C, p), in = view<scalar_t>(image, s.C, p),
                               blur = view<scalar_t>(blurred, s.C, p);
          for_row(s.W, in.row(y), in.over_columns, blur.row(y), blur.over_columns,
                  [&](int64_t x, scalar_t a, scalar_t b) { d[x] = a - b; });
          for_row(s.W, g.row(y), g.over_columns, d, int64_t(1),
                  [&](int64_t x, scalar_t grad, scalar_t e) { to[x] += grad * e; });
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
