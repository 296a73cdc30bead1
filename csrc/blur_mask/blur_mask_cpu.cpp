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
// the centre of the image instead of their own: then the work no longer grows with the radius. A plane no wider than a
// strip goes down first, and then its rows are multiplied by the whole matrix of the other axis: nothing is turned. The
// gradient runs through the same passes (blur_mask.h). No sum depends on the number of threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "blur_mask/blur_mask.h"
#include "common/dispatch.h"
#include "common/tensors.h"

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
constexpr int kRows = 14;         // rows that `multiply_rows` makes at once, for the same registers

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

// Calls work(each) on as many threads as there are chunks; each(f) calls f(i) for what this thread gets of 0 ..
// count-1. That is an equal share, which it finds in its cache at the next call, and then chunks of others' shares: a
// thread that has to share its processor would hold up the rest.
template <typename Work>
void share_out(int64_t count, int64_t chunk, const Work& work) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(ceil_div(count, chunk), torch::stable::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    shares[t].next = count * t / threads;
    shares[t].end = count * (t + 1) / threads;
  }
  const auto run = [&](int64_t thread, int64_t) {
    work([&](const auto& f) {
      for (int64_t s = 0; s < threads; ++s) {
        Share& share = shares[(thread + s) % threads];
        for (int64_t i; (i = share.next.fetch_add(chunk, std::memory_order_relaxed)) < share.end;)
          for (const int64_t end = std::min(i + chunk, share.end); i < end; ++i) f(i);
      }
    });
  };
  threads == 1 ? run(0, 1) : torch::stable::parallel_for(0, threads, 1, run);
}

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
#pragma GCC unroll 2
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

// out = rows [kRows, n] matrix [n, kStrip]; all strides are kStrip.
template <typename T>
void multiply_rows(const T* rows, int64_t n, const T* matrix, T* out) {
  using V = Vector<T>;
  constexpr int kAcross = kVectors * kLanes<T>;
  for (int at = 0; at < kStrip<T>; at += kAcross) {
    V sums[kRows][kVectors] = {};
    const T *row = rows, *column = matrix + at;
#pragma GCC unroll 2
    for (int64_t k = 0; k < n; ++k, ++row, column += kStrip<T>)
#pragma GCC unroll 14
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] += reinterpret_cast<const V*>(column)[v] * row[r * kStrip<T>];
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) reinterpret_cast<V*>(out + r * kStrip<T> + at)[v] = sums[r][v];
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

// f(start) for vectors that cover `size` numbers, where there are that many; the last may overlap the one before.
template <typename T, typename F>
void for_vectors(int64_t size, const F& f) {
  constexpr int64_t n = kLanes<T>;
  for (int64_t start = 0; start + n <= size; start += n) f(start);
  if (size > n && size % n != 0) f(size - n);
}

// The two passes of a plane [H, W]. Its strips of columns lie in `columns`, [strips][down.input_rows()][kStrip].
template <typename T>
struct Passes {
  const int64_t H, W, radius;
  const double sigma;
  const int64_t strips, groups;  // of columns, and of rows in the first pass
  Axis<T> down;
  std::optional<Axis<T>> own_across;  // where the sides differ and the plane is not narrow
  std::optional<Scratch<T>> matrix;   // of a narrow plane: [W, kStrip], the transposed A of its rows

  Passes(int64_t H, int64_t W, double sigma, int64_t radius, const std::vector<double>& taps)
      : H(H),
        W(W),
        radius(radius),
        sigma(sigma),
        strips(ceil_div(W, kStrip<T>)),
        groups(ceil_div(H, kStrip<T>)),
        down(H, taps) {
    if (narrow())
      fill_matrix(wrapped_taps(taps, W));
    else if (H != W)
      own_across.emplace(W, taps);
  }

  bool narrow() const { return strips == 1; }
  const Axis<T>& across() const { return own_across ? *own_across : down; }

  void fill_matrix(const std::vector<double>& wrapped) {
    T* entry = matrix.emplace(W * kStrip<T>).get();
    for (int64_t k = 0; k < W; ++k)
      for (int64_t x = 0; x < kStrip<T>; ++x, ++entry)
        *entry = x < W ? T(blur_weight([&](int64_t d) { return wrapped[d]; }, W, x, k)) : T(0);
  }

  int64_t bytes() const {
    const size_t across = narrow() ? W * kStrip<T> : own_across ? own_across->weights.size() : 0;
    return int64_t((down.weights.size() + across) * sizeof(T));
  }

  // About what a plane takes: a multiplication of a pixel 1/64, and turning it as much as 32 of them.
  int64_t nanoseconds() const {
    const int64_t multiplications = narrow() ? down.depth + W : down.depth + across().depth + 32;
    return H * W * multiplications * int64_t(sizeof(T)) / 256 + 1;
  }

  // What one task needs. A narrow plane: a strip with margins, a strip of results, which blocks may overhang by kFold
  // rows on either side, and a tile. Others: staged rows, a strip with margins, a strip of results, and `columns`.
  int64_t task_size() const {
    return narrow() ? (down.input_rows() + result_rows(down) + kRows) * kStrip<T>
                    : (kLanes<T> * strips + input_rows() + result_rows(across())) * kStrip<T>;
  }
  int64_t input_rows() const { return std::max(across().input_rows(), strips * kStrip<T>); }
  static int64_t result_rows(const Axis<T>& axis) {
    return std::max(axis.n + kStrip<T>, 2 * kFold * axis.blocks) + 2 * kFold;
  }
  int64_t strip_size() const { return down.input_rows() * kStrip<T>; }
  int64_t columns_size() const { return narrow() ? 0 : strips * strip_size(); }

  // A whole plane.
  template <typename Plane>
  void blur(const Plane& plane, T* columns, T* task) const {
    if (narrow()) return blur_narrow(plane, task);
    for (int64_t g = 0; g < groups; ++g) blur_across(g, plane, columns, task);
    for (int64_t s = 0; s < strips; ++s) blur_down(s, columns, plane);
  }

  template <typename Plane>
  void blur_narrow(const Plane& plane, T* task) const {
    T *input = task, *result = input + strip_size() + kFold * kStrip<T>;
    T* tile = input + strip_size() + result_rows(down) * kStrip<T>;
    T* origin = input + down.margin * kStrip<T>;
    for (int64_t y = 0; y < H; ++y) {
      T* to = origin + y * kStrip<T>;
      const T* row = plane.stage(y, to);
      if (row != to) copy_row(row, to);
    }
    fill_margins(down, input);
    for (int64_t b = 0; b < down.blocks; ++b) blur_block(down, b, origin, result);
    for (int64_t y = 0; y < H; y += kRows) {
      multiply_rows(result + y * kStrip<T>, W, matrix->get(), tile);
      for (int64_t r = y; r < std::min(H, y + kRows); ++r) {
        // As wide as the strip where the plane has room: the next rows go over what is too much.
        const bool room = (H - r) * W >= kStrip<T>;
        std::memcpy(plane.output + r * W, tile + (r - y) * kStrip<T>, room ? kStripBytes : W * sizeof(T));
        if (!plane.dense) plane.settle(r, 0, W);
      }
    }
    if (plane.dense) plane.settle(0, 0, H * W);
  }

  void copy_row(const T* row, T* to) const {
    if (W < kLanes<T>)
      std::copy_n(row, W, to);
    else
      for_vectors<T>(W, [&](int64_t x) { std::memcpy(to + x, row + x, kVectorBytes); });
  }

  // Block b of a strip whose rows start at `origin`, into the one that starts at `result`.
  static void blur_block(const Axis<T>& axis, int64_t b, const T* origin, T* result) {
    fold_block(origin + axis.in_hi(b) * kStrip<T>, origin + axis.in_lo(b) * kStrip<T>, axis.depth, axis.weights_of(b),
               result + axis.out_hi(b) * kStrip<T>, result + axis.out_lo(b) * kStrip<T>);
  }

  // 1. Rows [group * kStrip, ...) of the plane into the strips of columns, blurred across.
  template <typename Plane>
  void blur_across(int64_t group, const Plane& plane, T* columns, T* task) const {
    constexpr int64_t n = kLanes<T>;
    const Axis<T>& across = this->across();
    const int64_t first = group * kStrip<T>;
    T *staged = task, *input = staged + n * strips * kStrip<T>;
    T *result = input + (input_rows() + kFold) * kStrip<T>, *origin = input + across.margin * kStrip<T>;
    const T* rows[kStrip<T>];
    for (int64_t part = 0; part < kStrip<T>; part += n) {
      for (int64_t i = 0; i < n; ++i)  // rows below the image repeat the last one, and their results are dropped
        rows[i] = plane.stage(std::min(first + part + i, H - 1), staged + i * strips * kStrip<T>);
      for_vectors<T>(W, [&](int64_t x) { transpose_square(rows, x, origin + x * kStrip<T> + part, kStrip<T>); });
    }
    fill_margins(across, input);
    int64_t next = first + kStrip<T>;  // the rows of the next group come from memory while this one is blurred
    for (int64_t b = 0; b < across.blocks; ++b) {
      for (; next < std::min(H, first + kStrip<T> + kStrip<T> * (b + 1) / across.blocks); ++next) plane.fetch(next);
      blur_block(across, b, origin, result);
    }
    const int64_t height = std::min<int64_t>(kStrip<T>, H - first);
    for (int64_t s = 0; s < strips; ++s) {
      T* strip = columns + s * strip_size() + (down.margin + first) * kStrip<T>;
      for (int64_t i = 0; i < kStrip<T>; ++i) rows[i] = result + (s * kStrip<T> + i) * kStrip<T>;
      for (int64_t x = 0; x < kStrip<T>; x += n)
        for_vectors<T>(height, [&](int64_t y) { transpose_square(rows + x, y, strip + y * kStrip<T> + x, kStrip<T>); });
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
    const int64_t x = s * kStrip<T>, count = std::min<int64_t>(kStrip<T>, W - x);
    alignas(64) T tile[2 * kFold * kStrip<T>];
    T *upper = tile + kFold * kStrip<T>, *lower = upper - kStrip<T>;
    const auto put = [&](int64_t y, auto count, const T* pixels) {
      // Written before the image and the mask are read, so that the lines come from memory together: a sixth faster.
      std::memcpy(plane.output + y * W + x, pixels, count * sizeof(T));
      plane.settle(y, x, count);
    };
    const auto finish = [&](int64_t y, const T* pixels) {
      if (y < 0 || y >= H) return;
      if (count == kStrip<T>)
        put(y, std::integral_constant<int64_t, kStrip<T>>(), pixels);
      else
        put(y, count, pixels);
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

// The passes of this thread's last call are kept: to make them takes longer than a small plane does.
template <typename T>
std::shared_ptr<const Passes<T>> passes_of(int64_t H, int64_t W, double sigma, int64_t radius) {
  constexpr int64_t kKeptBytes = 1 << 20;
  thread_local std::shared_ptr<const Passes<T>> last;
  if (last && last->H == H && last->W == W && last->sigma == sigma && last->radius == radius) return last;
  const auto passes = std::make_shared<const Passes<T>>(H, W, sigma, radius, gaussian_taps(sigma, radius));
  last = passes->bytes() <= kKeptBytes ? passes : nullptr;
  return passes;
}

// ---------------------------------------------------------------- all planes

// Blurs `planes` planes of [H, W]. What plane_of(p) returns has
//   const T* stage(y, row)              row y of what is to be blurred: written to `row`, or where it lies;
//   void fetch(y)                       asks for the memory of row y;
//   T* output                           the plane that is made, contiguous;
//   void settle(y, x, count)            makes the result of what is blurred: pixels x, x + 1, ... of row y of `output`;
//   bool dense                          whether settle(0, 0, H W) does so for all rows at once.
template <typename T, typename PlaneOf>
void blur_planes(int64_t planes, int64_t H, int64_t W, double sigma, double truncate, const PlaneOf& plane_of) {
  constexpr int64_t kChunk = 2000, kParts = 20000;  // nanoseconds that pay for another thread, for two more passes
  const int64_t radius = blur_radius(sigma, truncate);
  if (planes == 0) return;
  if (radius == 0) {  // the identity, exactly
    torch::stable::parallel_for(0, planes * H, ceil_div(1 << 14, W), [&](int64_t begin, int64_t end) {
      std::vector<T> row(W);
      for (int64_t i = begin; i < end; ++i) {
        const auto plane = plane_of(i / H);
        std::copy_n(plane.stage(i % H, row.data()), W, plane.output + i % H * W);
        plane.settle(i % H, 0, W);
      }
    });
    return;
  }
  const auto shared = passes_of<T>(H, W, sigma, radius);
  const Passes<T>& passes = *shared;
  const int64_t threads = torch::stable::get_num_threads(), time = passes.nanoseconds();
  if (threads == 1 || planes >= 4 * threads || passes.narrow() || planes * time < kParts) {
    // A plane is one task, and its columns stay in that processor's L2.
    share_out(planes, ceil_div(kChunk, time), [&](const auto& each) {
      const Scratch<T> columns(passes.columns_size()), task(passes.task_size());
      if (passes.narrow())
        std::fill_n(task.get(), passes.task_size(), T(0));  // columns that stay empty must be numbers
      each([&](int64_t p) { passes.blur(plane_of(p), columns.get(), task.get()); });
    });
    return;
  }
  // Few planes: all processors work on each pass.
  const Scratch<T> columns(planes * passes.columns_size());
  share_out(planes * passes.groups, 1, [&](const auto& each) {
    const Scratch<T> task(passes.task_size());
    each([&](int64_t i) {
      const int64_t p = i / passes.groups;
      passes.blur_across(i % passes.groups, plane_of(p), columns.get() + p * passes.columns_size(), task.get());
    });
  });
  share_out(planes * passes.strips, 1, [&](const auto& each) {
    each([&](int64_t i) {
      const int64_t p = i / passes.strips;
      passes.blur_down(i % passes.strips, columns.get() + p * passes.columns_size(), plane_of(p));
    });
  });
}

// ---------------------------------------------------------------- what goes in and out

// One plane [H, W] of a tensor of any strides.
template <typename T>
struct View {
  const T* data;
  int64_t over_rows, over_columns;

  const T* row(int64_t y, int64_t x = 0) const { return data + y * over_rows + x * over_columns; }
  void fetch(int64_t y, int64_t W) const {
    if (over_columns != 1) return;
    for (int64_t x = 0; x < W; x += 64 / sizeof(T)) __builtin_prefetch(row(y, x), 0, 2);
    asm volatile("");  // or GCC drops the calls of a function that only prefetches
  }
};

// The planes of [B, C, H, W] in their order; of a mask [B, 1, H, W], as many for each image.
template <typename T>
struct Planes {
  const T* data;
  int64_t channels, over_batch, over_channels, over_rows, over_columns;

  Planes(const Tensor& tensor, int64_t channels)
      : data(tensor.const_data_ptr<T>()),
        channels(channels),
        over_batch(tensor.stride(0)),
        over_channels(tensor.size(1) == 1 ? 0 : tensor.stride(1)),
        over_rows(tensor.stride(2)),
        over_columns(tensor.stride(3)) {}

  bool dense(int64_t W) const { return over_rows == W * over_columns; }

  View<T> operator[](int64_t p) const {
    return {data + p / channels * over_batch + p % channels * over_channels, over_rows, over_columns};
  }
};

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

  void fetch(int64_t y) const { image.fetch(y, W); }
};

template <typename T>
struct BlurPlane : ImagePlane<T> {
  T* output;

  static constexpr bool dense = true;

  template <typename Count>
  void settle(int64_t, int64_t, Count) const {}
};

// image * mask + blur * (1 - mask), and the blur itself where it is wanted.
template <typename T>
struct BlendPlane : ImagePlane<T> {
  View<T> mask;
  T *output, *blurred;
  bool dense;

  void fetch(int64_t y) const {
    ImagePlane<T>::fetch(y);
    mask.fetch(y, this->W);
  }

  template <typename Count>
  void settle(int64_t y, int64_t x, Count count) const {
    T* __restrict to = output + y * this->W + x;
    if (blurred) std::memcpy(blurred + y * this->W + x, to, count * sizeof(T));
    for_row(count, this->image.row(y, x), this->image.over_columns, mask.row(y, x), mask.over_columns,
            [&](int64_t i, T value, T m) { to[i] = value * m + to[i] * (1 - m); });
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

  static constexpr bool dense = false;  // the border of each row is scaled

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

  void fetch(int64_t y) const {
    grad.fetch(y, W);
    if (kMasked) mask.fetch(y, W);
  }

  template <typename Count>
  void settle(int64_t y, int64_t x, Count count) const {
    T* __restrict to = output + y * W + x;
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

Tensor gaussian_blur(const Tensor& image, double sigma, double truncate) {
  check_blur_image(image);
  const Shape s(image);
  Tensor output = empty_tensor(image, image.sizes());
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    const Planes<scalar_t> images(image, s.C);
    scalar_t* out = output.mutable_data_ptr<scalar_t>();
    blur_planes<scalar_t>(s.planes, s.H, s.W, sigma, truncate,
                          [&](int64_t p) { return BlurPlane<scalar_t>{{images[p], s.W}, out + p * s.H * s.W}; });
  });
  return output;
}

// The forward of blur_mask; `blurred` is written where it is wanted.
template <typename T>
void blend_with_blur(const Tensor& image, const Tensor& mask, double sigma, double truncate, T* output, T* blurred) {
  const Shape s(image);
  const Planes<T> images(image, s.C), masks(mask, s.C);
  const bool dense = images.dense(s.W) && masks.dense(s.W);
  blur_planes<T>(s.planes, s.H, s.W, sigma, truncate, [&](int64_t p) {
    const int64_t at = p * s.H * s.W;
    return BlendPlane<T>{{images[p], s.W}, masks[p], output + at, blurred ? blurred + at : blurred, dense};
  });
}

Tensor blur_mask(const Tensor& image, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(image, mask);
  Tensor output = empty_tensor(image, image.sizes());
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    blend_with_blur<scalar_t>(image, mask, sigma, truncate, output.mutable_data_ptr<scalar_t>(), nullptr);
  });
  return output;
}

std::tuple<Tensor, Tensor> blur_mask_and_blur(const Tensor& image, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(image, mask);
  Tensor output = empty_tensor(image, image.sizes()), blurred = empty_tensor(image, image.sizes());
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
  Tensor grad_image = empty_tensor(grad_output, grad_output.sizes());
  for_cpu_dtype(grad_output, [&]<typename scalar_t>() {
    const Planes<scalar_t> grads(grad_output, s.C), masks(mask, s.C);
    scalar_t* out = grad_image.mutable_data_ptr<scalar_t>();
    blur_planes<scalar_t>(s.planes, s.H, s.W, sigma, truncate, [&](int64_t p) {
      return GradientPlane<scalar_t, kMasked>{grads[p], masks[p], out + p * s.H * s.W, s.H, s.W, identity};
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
  Tensor grad_mask = empty_tensor(image, {s.B, 1, s.H, s.W});
  for_cpu_dtype(image, [&]<typename scalar_t>() {
    const Planes<scalar_t> grads(grad_output, s.C), images(image, s.C), blurs(blurred, s.C);
    scalar_t* out = grad_mask.mutable_data_ptr<scalar_t>();
    // Rows that go on in the next one are taken several at a time.
    const bool dense = grads.dense(s.W) && images.dense(s.W) && blurs.dense(s.W);
    const int64_t rows = dense ? std::clamp<int64_t>(2048 / s.W, 1, s.H) : 1, pieces = ceil_div(s.H, rows);
    torch::stable::parallel_for(0, s.B * pieces, ceil_div(1 << 13, rows * s.W), [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> difference(rows * s.W);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / pieces, y = i % pieces * rows, count = std::min(rows, s.H - y) * s.W;
        scalar_t* __restrict to = out + (b * s.H + y) * s.W, * __restrict d = difference.data();
        std::fill_n(to, count, scalar_t(0));
        for (int64_t c = 0; c < s.C; ++c) {
          const View<scalar_t> grad = grads[b * s.C + c], in = images[b * s.C + c], blur = blurs[b * s.C + c];
          for_row(count, in.row(y), in.over_columns, blur.row(y), blur.over_columns,
                  [&](int64_t x, scalar_t a, scalar_t e) { d[x] = a - e; });
          for_row(count, grad.row(y), grad.over_columns, d, int64_t(1),
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
