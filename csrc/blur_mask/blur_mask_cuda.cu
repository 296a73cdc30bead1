// gaussian_blur and blur_mask on CUDA: the folded products of blur_mask.h, down the columns and then along the rows.
//
// One kernel serves both passes. A thread keeps 16 rows of 4 neighbouring columns in registers; every step loads 16
// bytes of one row above and of one row below the centre of its 16 rows (straight from the image: neighbouring warps
// read the same rows, out of L1), adds and subtracts them, and does 64 multiplications. The block then turns its tile
// in shared memory, so that the half-blurred image is stored on its side and the second pass runs down columns again;
// turning back, that pass blends in its epilogue. A radius of 40 costs 54 additions and multiplications per pixel and
// pass instead of
// 81. No side and no radius is too large: nothing but the tile has to fit in shared memory, borders are mirrored while
// walking, and where the radius passes half of the side the fold about the image's centre bounds the work at side / 2.
// Planes are handled in groups whose half-blurred copy stays in L2.
//
// Compulsory bytes per float pixel: 8 for the blur, 8 + 4 + 4 / C for the blend; L2 moves 8 for the half-blurred image
// and reads each pass's input about 2.2 times at radius 40 (144 rows for 64). Floor on an H100 (33.5 T multiply-adds a
// second) for 1,024 x 3 x 224 x 224, radius 40: 0.50 ms of arithmetic, 0.37 ms (blend: 0.62 ms) of memory. Limits: rows
// whose pixels do not lie side by side on 16 bytes (channels_last, odd widths) are loaded one pixel at a time.
// Gradients are gathers, sums have a fixed order: no atomics, bitwise reproducible.

#include <algorithm>

#include "blur_mask/blur_mask.h"
#include "common/dispatch.h"
#include "common/launch.h"

namespace casm_fast {
namespace {

constexpr int kFold = 8;    // rows on one side of the 16 that a thread keeps
constexpr int kFolds = 4;   // warps of a block, one above the other: 64 rows share what they load through L1
constexpr int kQuads = 32;  // groups of neighbouring columns of a block, one for each lane
constexpr int kRows = 2 * kFold * kFolds;
constexpr int kPitch = kRows + 1;  // odd: the lanes of a warp meet different banks
// Neighbouring columns of a thread: 64 sums in float or 32 in double fill its registers.
template <typename T>
constexpr int kAcross = 16 / sizeof(T);

// Blocks that share a multiprocessor and so bound a thread's registers: 128 where a source needs few of them, 168 where
// it loads two tensors, and as many as it likes in double.
template <typename T>
constexpr int resident_blocks(int in_float) {
  return sizeof(T) == 4 ? in_float : 1;
}

using Axis = FoldedAxis<kFold>;

// ---------------------------------------------------------------- the weights

// weights [tables][depth][even, odd][kFold]; scale normalises the taps.
template <typename T>
__global__ void __launch_bounds__(256) weights_kernel(Axis axis, double sigma, double scale, T* weights) {
  const int64_t index = blockIdx.x * int64_t(256) + threadIdx.x, j = index % kFold, pair = index / kFold;
  if (pair >= axis.tables() * axis.depth) return;
  const auto tap = [&](int64_t d) { return d >= -axis.radius && d <= axis.radius ? scale * gaussian(d, sigma) : 0.0; };
  const auto wrapped = [&](int64_t d) {
    if (axis.n == 1) return 0.5;
    const int64_t period = 2 * (axis.n - 1);
    double sum = 0;
    for (int64_t at = d - (d + axis.radius) / period * period; at <= axis.radius; at += period) sum += tap(at);
    return sum;
  };
  const FoldWeight weight = fold_weight(axis, pair / axis.depth, pair % axis.depth, j, tap, wrapped);
  weights[pair * 2 * kFold + j] = T(weight.even);
  weights[pair * 2 * kFold + kFold + j] = T(weight.odd);
}

// ---------------------------------------------------------------- where the passes read

// Pixels of a tensor [B, C, H, W], or of the mask [B, 1, H, W] of its planes; any strides.
template <typename scalar_t>
struct View {
  const scalar_t* data;
  int channels;
  int64_t over_batch, over_channels, over_rows, over_columns;

  View(const Tensor& tensor, int64_t channels)
      : data(tensor.const_data_ptr<scalar_t>()),
        channels(static_cast<int>(channels)),
        over_batch(tensor.stride(0)),
        over_channels(tensor.size(1) == 1 ? 0 : tensor.stride(1)),
        over_rows(tensor.stride(2)),
        over_columns(tensor.stride(3)) {}

  __device__ int64_t offset(int plane, int64_t y, int64_t x) const {
    const int b = plane / channels, c = plane - b * channels;
    return b * over_batch + c * over_channels + y * over_rows + x * over_columns;
  }
  __device__ const scalar_t* at(int plane, int64_t y, int64_t x) const { return data + offset(plane, y, x); }

  // Whether kCount neighbouring columns can be loaded at once, wherever they start at a multiple of kCount.
  bool packed(int kCount, int64_t W) const {
    const int64_t bytes = kCount * int64_t(sizeof(scalar_t));
    return over_columns == 1 && W % kCount == 0 && over_batch % kCount == 0 && over_channels % kCount == 0 &&
           over_rows % kCount == 0 && reinterpret_cast<uintptr_t>(data) % bytes == 0;
  }
};

// kCount neighbouring pixels in the type of the sums; those past `count` are 0.
template <int kCount, bool kPacked, typename scalar_t>
__device__ inline Pack<acc_t<scalar_t>, kCount> load_pixels(const scalar_t* pixels, int64_t over_columns, int count) {
  Pack<acc_t<scalar_t>, kCount> values;
  if constexpr (kPacked) {
    const Pack<scalar_t, kCount> pack = load_pack<kCount>(pixels);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<acc_t<scalar_t>>(pack[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      values[i] = i < count ? static_cast<acc_t<scalar_t>>(pixels[i * over_columns]) : acc_t<scalar_t>(0);
  }
  return values;
}

// Keeps the compiler from multiplying the step of an inner loop again in every turn, to save two registers.
__device__ inline int64_t computed_once(int64_t step) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(step));
#endif
  return step;
}

// A source gives kAcross columns of row after row. Its Cursor is what a thread finds out once about its columns, its
// Walk a row and the way to the next.
template <typename scalar_t, bool kPacked>
struct ImageSource {
  using T = acc_t<scalar_t>;
  static constexpr int kResident = resident_blocks<T>(4);
  View<scalar_t> image;

  struct Cursor {
    const scalar_t* first;
    int count;
  };
  struct Walk {
    const scalar_t* pixels;
    int64_t step;
  };
  __device__ Cursor cursor(int plane, int x, int count) const { return {image.at(plane, 0, x), count}; }
  __device__ Walk walk(const Cursor& at, int y, int step) const {
    return {at.first + y * image.over_rows, computed_once(step * image.over_rows)};
  }
  __device__ Pack<T, kAcross<T>> next(const Cursor& at, Walk& walk) const {
    const auto row = load_pixels<kAcross<T>, kPacked>(walk.pixels, image.over_columns, at.count);
    walk.pixels += walk.step;
    return row;
  }
};

// What the transposed blur takes in: grad, or grad * (1 - mask), with the border pixels doubled (C^-1 of blur_mask.h).
template <typename scalar_t, bool kMasked, bool kPacked>
struct GradientSource {
  using T = acc_t<scalar_t>;
  static constexpr int kResident = resident_blocks<T>(3);
  View<scalar_t> grad, mask;
  int H, W;
  bool scaled;  // not where the blur is the identity

  struct Cursor {
    const scalar_t *grad, *mask;
    int count, x;
  };
  struct Walk {
    const scalar_t *grad, *mask;
    int64_t grad_step, mask_step;
    int y, step;
  };
  __device__ Cursor cursor(int plane, int x, int count) const {
    return {grad.at(plane, 0, x), kMasked ? mask.at(plane, 0, x) : nullptr, count, x};
  }
  __device__ Walk walk(const Cursor& at, int y, int step) const {
    return {at.grad + y * grad.over_rows,
            kMasked ? at.mask + y * mask.over_rows : nullptr,
            computed_once(step * grad.over_rows),
            computed_once(step * mask.over_rows),
            y,
            step};
  }
  __device__ Pack<T, kAcross<T>> next(const Cursor& at, Walk& walk) const {
    auto row = load_pixels<kAcross<T>, kPacked>(walk.grad, grad.over_columns, at.count);
    walk.grad += walk.grad_step;
    if constexpr (kMasked) {
      const auto keep = load_pixels<kAcross<T>, kPacked>(walk.mask, mask.over_columns, at.count);
      walk.mask += walk.mask_step;
#pragma unroll
      for (int i = 0; i < kAcross<T>; ++i) row[i] *= 1 - keep[i];
    }
    const T scale = scaled && is_border(walk.y, H) ? T(2) : T(1);
    walk.y += walk.step;
#pragma unroll
    for (int i = 0; i < kAcross<T>; ++i) row[i] *= scaled && is_border(at.x + i, W) ? 2 * scale : scale;
    return row;
  }
};

// The half-blurred planes on their side, [planes][W][pitch]: rows are columns of the image. pitch is a multiple of
// kAcross; what lies between H and pitch is never stored anywhere.
template <typename T>
struct TurnedSource {
  static constexpr int kResident = resident_blocks<T>(4);
  const T* turned;
  int W;
  int64_t pitch;

  using Cursor = const T*;
  struct Walk {
    const T* pixels;
    int64_t step;
  };
  __device__ Cursor cursor(int plane, int y, int) const { return turned + int64_t(plane) * W * pitch + y; }
  __device__ Walk walk(const Cursor& at, int x, int step) const {
    return {at + x * pitch, computed_once(step * pitch)};
  }
  __device__ Pack<T, kAcross<T>> next(const Cursor&, Walk& walk) const {
    const auto row = load_pack<kAcross<T>>(walk.pixels);
    walk.pixels += walk.step;
    return row;
  }
};

// ---------------------------------------------------------------- where the passes write

// A sink takes values of a plane by column and row of the pass. Its Columns is what there is to know about kAcross
// neighbouring columns, its Row about a row; store() takes the columns in order. Columns lie in shared memory: they are
// offsets, because the compiler would not know that a pointer from there leads to global memory.
template <typename T>
struct TurnedSink {
  T* turned;  // [planes][W][pitch]
  int W;
  int64_t pitch;

  using Columns = int64_t;
  using Row = int;
  __device__ Columns columns(int plane, int x) const { return (int64_t(plane) * W + x) * pitch; }
  __device__ Row row(int y) const { return y; }
  __device__ void store(Columns& at, Row y, T value) const {
    turned[at + y] = value;
    at += pitch;
  }
};

template <typename scalar_t>
struct BlurSink {
  using T = acc_t<scalar_t>;
  scalar_t* output;  // [planes][H][W]
  int H, W;

  using Columns = int64_t;
  using Row = int;
  __device__ Columns columns(int plane, int y) const { return (int64_t(plane) * H + y) * W; }
  __device__ Row row(int x) const { return x; }
  __device__ void store(Columns& at, Row x, T value) const {
    output[at + x] = static_cast<scalar_t>(value);
    at += W;
  }
};

// image * mask + blur * (1 - mask), and the blur itself where it is wanted.
template <typename scalar_t, bool kBlurred>
struct BlendSink {
  using T = acc_t<scalar_t>;
  View<scalar_t> image, mask;
  scalar_t *output, *blurred;  // [planes][H][W]
  int H, W;

  struct Columns {
    int64_t image, mask, to;
  };
  struct Row {
    int64_t image, mask, to;
  };
  __device__ Columns columns(int plane, int y) const {
    return {image.offset(plane, y, 0), mask.offset(plane, y, 0), (int64_t(plane) * H + y) * W};
  }
  __device__ Row row(int x) const { return {x * image.over_columns, x * mask.over_columns, x}; }
  __device__ void store(Columns& at, const Row& row, T value) const {
    const T keep = static_cast<T>(mask.data[at.mask + row.mask]);
    const T pixel = static_cast<T>(image.data[at.image + row.image]);
    output[at.to + row.to] = static_cast<scalar_t>(pixel * keep + value * (1 - keep));
    if constexpr (kBlurred) blurred[at.to + row.to] = static_cast<scalar_t>(value);
    at.image += image.over_rows;
    at.mask += mask.over_rows;
    at.to += W;
  }
};

// The other end of GradientSource: halves the border pixels (C of blur_mask.h) and adds grad * mask.
template <typename scalar_t, bool kMasked>
struct GradientSink {
  using T = acc_t<scalar_t>;
  View<scalar_t> grad, mask;
  scalar_t* output;  // [planes][H][W]
  int H, W;
  bool scaled;

  struct Columns {
    int64_t grad, mask, to;
    int y;
  };
  struct Row {
    int64_t grad, mask, to;
    T scale;
  };
  __device__ Columns columns(int plane, int y) const {
    return {kMasked ? grad.offset(plane, y, 0) : 0, kMasked ? mask.offset(plane, y, 0) : 0,
            (int64_t(plane) * H + y) * W, y};
  }
  __device__ Row row(int x) const {
    return {x * grad.over_columns, x * mask.over_columns, x, scaled && is_border(x, W) ? T(0.5) : T(1)};
  }
  __device__ void store(Columns& at, const Row& row, T value) const {
    value *= scaled && is_border(at.y, H) ? row.scale * T(0.5) : row.scale;
    if constexpr (kMasked) {
      value += static_cast<T>(grad.data[at.grad + row.grad]) * static_cast<T>(mask.data[at.mask + row.mask]);
      at.grad += grad.over_rows;
      at.mask += mask.over_rows;
    }
    output[at.to + row.to] = static_cast<scalar_t>(value);
    at.to += W;
    ++at.y;
  }
};

// ---------------------------------------------------------------- the pass

// A row that walks away from its start and turns round at either end of 0 .. n-1.
struct Walker {
  int row, step, last;

  __device__ Walker(int64_t start, int direction, int64_t n)
      : row(static_cast<int>(start)), step(direction), last(static_cast<int>(n) - 1) {
    if (row > last) {  // the last block may start past the end
      row = max(2 * last - row, 0);
      step = -step;
    }
    turn();
  }
  __device__ void turn() {
    if (row <= 0) step = 1;
    if (row >= last) step = -1;
  }
  // Steps that it can make before it turns, and at least one.
  __device__ int ahead() const { return max(step > 0 ? last - row : row, 1); }
  __device__ void advance(int steps) {
    row += steps * step;
    turn();
  }
};

// The 16 rows of one thread: rows[j] is out_hi + j, rows[kFold + j] is out_lo - j.
template <typename T>
struct Sums {
  Pack<T, kAcross<T>> rows[2 * kFold];
};

template <typename T, typename Source>
__device__ inline Sums<T> fold(const Source& source, const typename Source::Cursor& cursor, const Axis& axis,
                               int64_t block, const T* __restrict__ weights) {
  constexpr int kWide = 16 / sizeof(T);  // weights in 16 bytes
  T even[kFold][kAcross<T>] = {}, odd[kFold][kAcross<T>] = {};
  Walker hi(axis.in_hi(block), 1, axis.n), lo(axis.in_lo(block), -1, axis.n);
  const T* weight = weights + axis.table_of(block);
  for (int left = static_cast<int>(axis.depth); left > 0;) {
    const int steps = min(left, min(hi.ahead(), lo.ahead()));
    auto up = source.walk(cursor, hi.row, hi.step), down = source.walk(cursor, lo.row, lo.step);
#pragma unroll 1  // twice would not fit in the registers
    for (int s = 0; s < steps; ++s, weight += 2 * kFold) {
      const Pack<T, kAcross<T>> a = source.next(cursor, up), b = source.next(cursor, down);
      T sum[kAcross<T>], difference[kAcross<T>];
#pragma unroll
      for (int i = 0; i < kAcross<T>; ++i) {
        sum[i] = a[i] + b[i];
        difference[i] = a[i] - b[i];
      }
#pragma unroll
      for (int j = 0; j < kFold; j += kWide) {
        const Pack<T, kWide> e = load_pack<kWide>(weight + j), o = load_pack<kWide>(weight + kFold + j);
#pragma unroll
        for (int w = 0; w < kWide; ++w)
#pragma unroll
          for (int i = 0; i < kAcross<T>; ++i) {
            even[j + w][i] += sum[i] * e[w];
            odd[j + w][i] += difference[i] * o[w];
          }
      }
    }
    left -= steps;
    hi.advance(steps);
    lo.advance(steps);
  }
  Sums<T> sums;
#pragma unroll
  for (int j = 0; j < kFold; ++j)
#pragma unroll
    for (int i = 0; i < kAcross<T>; ++i) {
      sums.rows[j][i] = even[j][i] + odd[j][i];
      sums.rows[kFold + j][i] = even[j][i] - odd[j][i];
    }
  return sums;
}

// Where row r of the tile of a fold lies on the axis.
__device__ inline int row_of(const Axis& axis, int64_t block, int r) {
  return static_cast<int>(r < kFold ? axis.out_lo(block) - (kFold - 1 - r) : axis.out_hi(block) + (r - kFold));
}

// Blurs the columns of `planes` planes along `axis`. Quads of columns are counted through all planes, so that small
// images fill the lanes too. Grid: groups of kQuads quads, times groups of kFolds folds.
template <typename T, typename Source, typename Sink>
__global__ void __launch_bounds__(32 * kFolds, Source::kResident)
    pass_kernel(Source source, Sink sink, Axis axis, const T* weights, int planes, int columns, int fold_groups) {
  CASM_FAST_SHARED T tile[kQuads * kAcross<T> * kPitch];
  CASM_FAST_SHARED typename Sink::Columns columns_of[kQuads];
  CASM_FAST_SHARED int counts[kQuads];  // columns that exist, 0 past the last plane
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int warps = static_cast<int>(blockDim.y);

  // 1. This thread's columns and rows.
  const int quads = (columns + kAcross<T> - 1) / kAcross<T>, group = static_cast<int>(blockIdx.x) / fold_groups;
  const int first_fold = (static_cast<int>(blockIdx.x) - group * fold_groups) * kFolds;
  const int64_t quad = int64_t(group) * kQuads + lane;
  const int plane = static_cast<int>(quad / quads);
  const int column = static_cast<int>(quad - int64_t(plane) * quads) * kAcross<T>;
  const int count = plane < planes ? min(columns - column, kAcross<T>) : 0;
  if (warp == 0) {
    counts[lane] = count;
    if (count > 0) columns_of[lane] = sink.columns(plane, column);
  }

  // 2. Its 16 rows, in registers.
  if (count > 0 && first_fold + warp < axis.blocks) {
    const Sums<T> sums = fold<T>(source, source.cursor(plane, column, count), axis, first_fold + warp, weights);

    // 3. Into the tile, column by column. The rows of a column are swapped by its lane / 8, so that lanes whose columns
    //    would meet in a bank do not.
#pragma unroll
    for (int j = 0; j < kFold; ++j)
#pragma unroll
      for (int i = 0; i < kAcross<T>; ++i) {
        T* cell = tile + (lane * kAcross<T> + i) * kPitch;
        cell[(warp * 2 * kFold + kFold + j) ^ (lane / 8)] = sums.rows[j][i];
        cell[(warp * 2 * kFold + kFold - 1 - j) ^ (lane / 8)] = sums.rows[kFold + j][i];
      }
  }
  __syncthreads();

  // 4. Out of the tile: lanes take rows of the pass, which are neighbours in memory; warps take the columns in turn.
  for (int r = lane; r < 2 * kFold * warps; r += 32) {
    const int row = row_of(axis, first_fold + r / (2 * kFold), r % (2 * kFold));
    if (first_fold + r / (2 * kFold) >= axis.blocks || row < 0 || row >= axis.n) continue;
    const typename Sink::Row at = sink.row(row);
    for (int q = warp; q < kQuads; q += warps) {
      typename Sink::Columns to = columns_of[q];
#pragma unroll
      for (int i = 0; i < kAcross<T>; ++i)
        if (i < counts[q]) sink.store(to, at, tile[(q * kAcross<T> + i) * kPitch + (r ^ (q / 8))]);
    }
  }
}

// The identity: radius 0. A thread for kAcross pixels of a row.
template <typename T, typename Source, typename Sink>
__global__ void __launch_bounds__(256) identity_kernel(Source source, Sink sink, int planes, int H, int W) {
  const int quads = (W + kAcross<T> - 1) / kAcross<T>;
  const int64_t index = blockIdx.x * int64_t(256) + threadIdx.x, line = index / quads;
  const int x = static_cast<int>(index - line * quads) * kAcross<T>;
  const int plane = static_cast<int>(line / H), y = static_cast<int>(line - int64_t(plane) * H);
  if (plane >= planes) return;
  const int count = min(W - x, kAcross<T>);
  const typename Source::Cursor from = source.cursor(plane, x, count);
  typename Source::Walk walk = source.walk(from, y, 1);
  const Pack<T, kAcross<T>> pixels = source.next(from, walk);
#pragma unroll
  for (int i = 0; i < kAcross<T>; ++i)
    if (i < count) {
      typename Sink::Columns to = sink.columns(plane, y);
      sink.store(to, sink.row(x + i), pixels[i]);
    }
}

// ---------------------------------------------------------------- the two passes

struct Shape {
  int64_t B, C;
  int H, W, planes;  // planes of [H, W]: B * C

  explicit Shape(const Tensor& t)
      : B(t.size(0)), C(t.size(1)), H(as_int(t.size(2))), W(as_int(t.size(3))), planes(as_int(B * C)) {}

 private:
  static int as_int(int64_t size) {
    STD_TORCH_CHECK(size < (int64_t(1) << 30), "a side, or B * C, passes 2^30");
    return static_cast<int>(size);
  }
};

// A source and a sink that count planes from `first`, for groups of planes.
template <typename Source>
struct ShiftedSource {
  Source source;
  int first;
  static constexpr int kResident = Source::kResident;
  using Cursor = typename Source::Cursor;
  using Walk = typename Source::Walk;
  __device__ Cursor cursor(int plane, int x, int count) const { return source.cursor(first + plane, x, count); }
  __device__ Walk walk(const Cursor& at, int y, int step) const { return source.walk(at, y, step); }
  __device__ auto next(const Cursor& at, Walk& walk) const { return source.next(at, walk); }
};
template <typename Sink>
struct ShiftedSink {
  Sink sink;
  int first;
  using Columns = typename Sink::Columns;
  using Row = typename Sink::Row;
  __device__ Columns columns(int plane, int y) const { return sink.columns(first + plane, y); }
  __device__ Row row(int x) const { return sink.row(x); }
  template <typename T>
  __device__ void store(Columns& at, const Row& row, T value) const {
    sink.store(at, row, value);
  }
};

template <typename T>
Tensor new_weights(const Tensor& like, const Axis& axis, double sigma, double scale, const Device& device) {
  Tensor weights =
      torch::stable::new_empty(like, {axis.weights()}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  const int64_t entries = axis.weights() / 2;
  launch(weights_kernel<T>, dim3(static_cast<unsigned>(ceil_div(entries, 256))), dim3(256), 0, device, axis, sigma,
         scale, weights.mutable_data_ptr<T>());
  return weights;
}

template <typename T, typename Source, typename Sink>
void launch_pass(const Source& source, const Sink& sink, const Axis& axis, const Tensor& weights, int planes,
                 int columns, const Device& device) {
  const int64_t folds = std::min<int64_t>(kFolds, axis.blocks), fold_groups = ceil_div(axis.blocks, kFolds);
  const int64_t blocks = ceil_div(int64_t(planes) * ceil_div(columns, kAcross<T>), kQuads) * fold_groups;
  launch(pass_kernel<T, Source, Sink>, dim3(static_cast<unsigned>(blocks)), dim3(32, static_cast<unsigned>(folds)), 0,
         device, source, sink, axis, weights.const_data_ptr<T>(), planes, columns, fold_groups);
}

// Blurs what `source` gives into `sink`, for all planes of `like`.
template <typename T, typename Source, typename Sink>
void blur_planes(const Tensor& like, double sigma, double truncate, const Source& source, const Sink& sink) {
  const Shape s(like);
  const int64_t radius = blur_radius(sigma, truncate);
  if (s.planes == 0) return;
  const Device device(like);
  if (radius == 0) {
    const int64_t threads = int64_t(s.planes) * s.H * ceil_div(s.W, kAcross<T>);
    launch(identity_kernel<T, Source, Sink>, dim3(static_cast<unsigned>(ceil_div(threads, 256))), dim3(256), 0, device,
           source, sink, s.planes, s.H, s.W);
    return;
  }
  double sum = 1;
  for (int64_t k = 1; k <= radius; ++k) sum += 2 * gaussian(k, sigma);
  const Axis down(s.H, radius), across(s.W, radius);
  const Tensor down_weights = new_weights<T>(like, down, sigma, 1 / sum, device);
  const Tensor across_weights = s.H == s.W ? down_weights : new_weights<T>(like, across, sigma, 1 / sum, device);

  const int64_t pitch = ceil_div(s.H, kAcross<T>) * kAcross<T>;
  // Two thirds of L2 for the half-blurred planes of a group: the more, the less often the machine runs empty.
  const int64_t plane_bytes = s.W * pitch * int64_t(sizeof(T));
  const int group = static_cast<int>(std::clamp<int64_t>(l2_bytes(device) * 2 / 3 / plane_bytes, 1, s.planes));
  Tensor turned =
      torch::stable::new_empty(like, {group, s.W, pitch}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  for (int first = 0; first < s.planes; first += group) {
    const int planes = std::min(group, s.planes - first);
    launch_pass<T>(ShiftedSource<Source>{source, first}, TurnedSink<T>{turned.mutable_data_ptr<T>(), s.W, pitch}, down,
                   down_weights, planes, s.W, device);
    launch_pass<T>(TurnedSource<T>{turned.const_data_ptr<T>(), s.W, pitch}, ShiftedSink<Sink>{sink, first}, across,
                   across_weights, planes, s.H, device);
  }
}

// Calls f with a compile-time bool.
template <typename F>
void for_bool(bool value, const F& f) {
  value ? f.template operator()<true>() : f.template operator()<false>();
}

Tensor new_image(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

// Blurs the image into a sink of the forward.
template <typename scalar_t, typename Sink>
void blur_image(const Tensor& image, double sigma, double truncate, const Sink& sink) {
  using T = acc_t<scalar_t>;
  const View<scalar_t> view(image, image.size(1));
  for_bool(view.packed(kAcross<T>, image.size(3)),
           [&]<bool kPacked>() { blur_planes<T>(image, sigma, truncate, ImageSource<scalar_t, kPacked>{view}, sink); });
}

Tensor gaussian_blur(const Tensor& image, double sigma, double truncate) {
  check_blur_image(image);
  const Device device(image);
  const Shape s(image);
  Tensor output = new_image(image);
  for_cuda_dtype(image, [&]<typename scalar_t>() {
    blur_image<scalar_t>(image, sigma, truncate, BlurSink<scalar_t>{output.mutable_data_ptr<scalar_t>(), s.H, s.W});
  });
  return output;
}

template <typename scalar_t>
void blend_with_blur(const Tensor& image, const Tensor& mask, double sigma, double truncate, scalar_t* output,
                     scalar_t* blurred) {
  const Shape s(image);
  for_bool(blurred != nullptr, [&]<bool kBlurred>() {
    blur_image<scalar_t>(image, sigma, truncate,
                         BlendSink<scalar_t, kBlurred>{View<scalar_t>(image, s.C), View<scalar_t>(mask, s.C), output,
                                                       blurred, s.H, s.W});
  });
}

Tensor blur_mask(const Tensor& image, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(image, mask);
  const Device device(image);
  Tensor output = new_image(image);
  for_cuda_dtype(image, [&]<typename scalar_t>() {
    blend_with_blur<scalar_t>(image, mask, sigma, truncate, output.mutable_data_ptr<scalar_t>(), nullptr);
  });
  return output;
}

std::tuple<Tensor, Tensor> blur_mask_and_blur(const Tensor& image, const Tensor& mask, double sigma, double truncate) {
  check_blur_mask(image, mask);
  const Device device(image);
  Tensor output = new_image(image), blurred = new_image(image);
  for_cuda_dtype(image, [&]<typename scalar_t>() {
    blend_with_blur<scalar_t>(image, mask, sigma, truncate, output.mutable_data_ptr<scalar_t>(),
                              blurred.mutable_data_ptr<scalar_t>());
  });
  return {output, blurred};
}

// The gradient of the image; without a mask (grad_output stands in for it), that of the plain blur.
template <bool kMasked>
Tensor gradient_of_image(const Tensor& grad_output, const Tensor& mask, double sigma, double truncate) {
  const Device device(grad_output);
  const Shape s(grad_output);
  const bool scaled = blur_radius(sigma, truncate) > 0;
  Tensor grad_image = new_image(grad_output);
  for_cuda_dtype(grad_output, [&]<typename scalar_t>() {
    using T = acc_t<scalar_t>;
    const View<scalar_t> grad(grad_output, s.C), keep(mask, s.C);
    const GradientSink<scalar_t, kMasked> sink{grad, keep, grad_image.mutable_data_ptr<scalar_t>(), s.H, s.W, scaled};
    for_bool(grad.packed(kAcross<T>, s.W) && keep.packed(kAcross<T>, s.W), [&]<bool kPacked>() {
      blur_planes<T>(grad_output, sigma, truncate,
                     GradientSource<scalar_t, kMasked, kPacked>{grad, keep, s.H, s.W, scaled}, sink);
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

// ---------------------------------------------------------------- the gradient of the mask

// grad_mask = sum over the channels of grad * (image - blurred), in their order; a thread per pixel, `blocks` an image.
template <typename scalar_t>
__global__ void __launch_bounds__(256)
    mask_gradient_kernel(View<scalar_t> grad, View<scalar_t> image, View<scalar_t> blurred, scalar_t* grad_mask, int C,
                         int H, int W, unsigned blocks) {
  using T = acc_t<scalar_t>;
  const int b = static_cast<int>(blockIdx.x / blocks);
  const unsigned pixel = (blockIdx.x - b * blocks) * 256 + threadIdx.x, y = pixel / W, x = pixel - y * W;
  if (y >= static_cast<unsigned>(H)) return;
  const scalar_t *flow = grad.at(b * C, y, x), *top = image.at(b * C, y, x), *below = blurred.at(b * C, y, x);
  T sum = 0;
  for (int c = 0; c < C; ++c) {
    sum += static_cast<T>(*flow) * (static_cast<T>(*top) - static_cast<T>(*below));
    flow += grad.over_channels;
    top += image.over_channels;
    below += blurred.over_channels;
  }
  grad_mask[int64_t(b) * H * W + pixel] = static_cast<scalar_t>(sum);
}

Tensor blur_mask_backward_mask(const Tensor& grad_output, const Tensor& image, const Tensor& blurred) {
  check_blur_like(image, grad_output);
  check_blur_like(image, blurred);
  const Device device(image);
  const Shape s(image);
  Tensor grad_mask = torch::stable::new_empty(image, {s.B, 1, s.H, s.W});
  for_cuda_dtype(image, [&]<typename scalar_t>() {
    const int64_t blocks = ceil_div(int64_t(s.H) * s.W, 256);
    STD_TORCH_CHECK(blocks * 256 <= INT32_MAX && blocks * s.B <= INT32_MAX, "image has too many pixels");
    launch(mask_gradient_kernel<scalar_t>, dim3(static_cast<unsigned>(blocks * s.B)), dim3(256), 0, device,
           View<scalar_t>(grad_output, s.C), View<scalar_t>(image, s.C), View<scalar_t>(blurred, s.C),
           grad_mask.mutable_data_ptr<scalar_t>(), s.C, s.H, s.W, static_cast<unsigned>(blocks));
  });
  return grad_mask;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CASM_FAST_CUDA_KEY, m) {
  m.impl("gaussian_blur", TORCH_BOX(&casm_fast::gaussian_blur));
  m.impl("gaussian_blur_backward", TORCH_BOX(&casm_fast::gaussian_blur_backward));
  m.impl("blur_mask", TORCH_BOX(&casm_fast::blur_mask));
  m.impl("blur_mask_and_blur", TORCH_BOX(&casm_fast::blur_mask_and_blur));
  m.impl("blur_mask_backward_image", TORCH_BOX(&casm_fast::blur_mask_backward_image));
  m.impl("blur_mask_backward_mask", TORCH_BOX(&casm_fast::blur_mask_backward_mask));
}
