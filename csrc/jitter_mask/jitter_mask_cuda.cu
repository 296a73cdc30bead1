// blend, upsample_mask and jitter_mask on CUDA.
//
// A block owns a tile of one image: 32 rows by up to 128 pixels. It computes the weights of its rows and columns,
// widens the few mask rows that it needs (m A_x^T), evaluates M of its pixels, all in shared memory, and then streams
// every channel of the images through it: no mask of image size and no crop is ever stored. The gradient of the mask
// runs the same way back: slopes of a tile, folded along y, then along x, into the cells that the tile touches; a
// second kernel adds up what the tiles around a cell give, in order, so there are no atomics and the result is the same
// every time. blend needs no tile: a thread looks its cell up. Its gradient for a mask of image size is direct too, for
// a smaller mask it takes the road of jitter_mask with one weight per pixel.
//
// Bytes per pixel of three float channels: blend and jitter_mask 36 (24 without reference), plus 4 for a mask of image
// size; the gradient of the mask 36, of an image 24. At 28x28 to 224x224 a pixel takes about 12 multiplications, far
// below what the traffic leaves time for. Rows that begin on a pack (16 bytes, 8 of 16-bit storage) are read and
// written in packs; a random shift moves three images out of four off them, and those go value by value, neighbours by
// neighbouring threads, which moves the same lines. channels_last images are rows of W * C values here: the same
// kernels, not copied. Limits: shared memory holds the weights of a tile, so that sigma can reach over some thousand
// cells, not more.

#include "common/dispatch.h"
#include "common/launch.h"
#include "jitter_mask/jitter_mask.h"

namespace casm_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kPlanes = 3;  // channels under way at once: enough loads in flight, and all of an RGB image

// Values per access: 16 bytes, but 8 of 16-bit storage. Those keep as much under way with half the registers, and rows
// of 228 pixels, 224 and the usual jitter, begin on 8 bytes but not on 16.
template <typename T>
constexpr int kPackOf = sizeof(T) == 8 ? 2 : 4;

// Blocks per multiprocessor, at least, so that enough loads are under way: six per thread in the forward pass, nine in
// the gradient. (double is there for gradcheck.)
template <typename T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 4;
template <typename T>
constexpr int kFoldBlocks = sizeof(T) == 8 ? 2 : 3;

// Calls `f` with the dtypes of the image and of the mask.
template <typename F>
void for_dtypes(const Tensor& image, const Tensor& mask, const F& f) {
  for_cuda_dtype(image, [&]<typename T>() {
    if constexpr (sizeof(T) == 2) {
      if (mask.scalar_type() == ScalarType::Float) return f.template operator()<T, float>();
    }
    f.template operator()<T, T>();
  });
}

dim3 blocks_for(int64_t count) {
  constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
  STD_TORCH_CHECK(count <= kMostBlocks, "too many pixels for one launch");
  return dim3(static_cast<unsigned>(count));
}

// Whether images, planes and rows are a whole number of packs apart; that of an absent image is.
template <typename T>
bool steps_by_packs(const Rows<T>& rows) {
  return rows.batch % kPackOf<T> == 0 && rows.plane % kPackOf<T> == 0 && rows.row % kPackOf<T> == 0;
}

// Whether every row begins on a pack too.
template <typename T>
bool begins_on_packs(const Rows<T>& rows) {
  return steps_by_packs(rows) && reinterpret_cast<uintptr_t>(rows.data) % (kPackOf<T> * sizeof(T)) == 0;
}

// ---------------------------------------------------------------- pixels

// One place of an image, in all its planes; null where the image is not given.
template <typename T>
struct Place {
  T* data;
  int64_t plane;
  __device__ explicit operator bool() const { return data != nullptr; }
  __device__ T* operator[](int64_t p) const { return data + p * plane; }
};

template <typename T>
__device__ Place<T> place_of(const Rows<T>& rows, int64_t b, int64_t y, int64_t i) {
  return {rows ? rows.at(b, 0, y) + i : nullptr, rows.plane};
}

// Blends kCount neighbouring values of every plane under `keep`.
template <int kCount, typename T, typename A>
__device__ void blend_values(int64_t planes, const Place<const T>& image, const Place<const T>& reference,
                             const Place<T>& out, const A (&keep)[kCount]) {
  for (int64_t plane = 0; plane < planes; plane += kPlanes) {
    Pack<T, kCount> top[kPlanes] = {}, below[kPlanes] = {};
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (plane + p >= planes) break;
      if (image) top[p] = load_pack<kCount>(image[plane + p]);
      if (reference) below[p] = load_pack<kCount>(reference[plane + p]);
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (plane + p >= planes) break;
      Pack<T, kCount> result;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        // A zero that stands for an absent image must not meet an infinite mask.
        A value = image ? static_cast<A>(top[p][j]) * keep[j] : A(0);
        if (reference) value += static_cast<A>(below[p][j]) * (1 - keep[j]);
        result[j] = static_cast<T>(value);
      }
      store_pack(out[plane + p], result);
    }
  }
}

// What the mask value of kCount neighbouring places receives: grad * (image - reference), summed over `count` planes,
// or grad where no image is given.
template <int kCount, typename T, typename A>
__device__ void slopes_of(int64_t count, const Place<const T>& grad, const Place<const T>& image,
                          const Place<const T>& reference, A (&slope)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) slope[j] = 0;
  for (int64_t plane = 0; plane < count; plane += kPlanes) {
    Pack<T, kCount> flow[kPlanes] = {}, top[kPlanes] = {}, below[kPlanes] = {};
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (plane + p >= count) break;
      flow[p] = load_pack<kCount>(grad[plane + p]);
      if (image) top[p] = load_pack<kCount>(image[plane + p]);
      if (reference) below[p] = load_pack<kCount>(reference[plane + p]);
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (plane + p >= count) break;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const A difference = image ? static_cast<A>(top[p][j]) - static_cast<A>(below[p][j]) : A(1);
        slope[j] += static_cast<A>(flow[p][j]) * difference;
      }
    }
  }
}

// The pixels of an image [B, H, W] with their channels `plane` apart, whichever way they lie.
template <typename T>
__device__ Place<T> pixel_of(const Rows<T>& rows, const Frame& frame, int64_t b, int64_t y, int64_t x) {
  Place<T> place = place_of(rows, b, y, x * frame.repeat);
  if (frame.repeat > 1) place.plane = 1;
  return place;
}

// ---------------------------------------------------------------- blend

// One thread per kCount values of a row. mask [B, h, w] is read at the cells of the values.
template <int kCount, typename T, typename M>
__global__ void __launch_bounds__(kThreads) blend_kernel(Frame frame, Rows<const T> image, Rows<const T> reference,
                                                         Rows<const M> mask, int64_t h, int64_t w, Rows<T> out) {
  using A = acc_t<T>;
  const int64_t packs = frame.length / kCount;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= frame.B * frame.H * packs) return;
  const int64_t row = thread / packs, i = (thread - row * packs) * kCount, b = row / frame.H, y = row - b * frame.H;
  const M* cells = mask.at(b, 0, cell_of(y, h, frame.H));
  const bool same = w == frame.length;  // then value i lies under mask value i
  A keep[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    keep[j] = static_cast<A>(cells[same ? i + j : cell_of((i + j) / frame.repeat, w, frame.W())]);
  blend_values(frame.planes, place_of(image, b, y, i), place_of(reference, b, y, i), place_of(out, b, y, i), keep);
}

// grad_mask [B, H, W] of a mask of image size, one thread per kCount pixels.
template <int kCount, typename T, typename M>
__global__ void __launch_bounds__(kThreads)
    slopes_kernel(Frame frame, Rows<const T> grad, Rows<const T> image, Rows<const T> reference, M* grad_mask) {
  const int64_t packs = frame.W() / kCount;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= frame.B * frame.H * packs) return;
  const int64_t row = thread / packs, x = (thread - row * packs) * kCount, b = row / frame.H, y = row - b * frame.H;
  acc_t<T> slope[kCount];
  slopes_of(frame.planes * frame.repeat, pixel_of(grad, frame, b, y, x), pixel_of(image, frame, b, y, x),
            pixel_of(reference, frame, b, y, x), slope);
#pragma unroll
  for (int j = 0; j < kCount; ++j) grad_mask[row * frame.W() + x + j] = static_cast<M>(slope[j]);
}

// ---------------------------------------------------------------- tiles

// One axis of an upsampling.
struct Axis {
  int64_t cells, pixels;
  int taps;
  double sigma, reach;

  __device__ int first(int64_t v) const { return static_cast<int>(first_cell(v, cells, pixels, taps, sigma, reach)); }
};

template <typename A>
Axis axis_of(int64_t cells, int64_t pixels, double sigma) {
  constexpr int64_t kLongest = int64_t(1) << 30;  // tiles count pixels in 32 bits
  STD_TORCH_CHECK(cells <= kLongest && pixels <= kLongest, "expected sides of up to 2^30");
  return {cells, pixels, static_cast<int>(tap_count<A>(sigma, cells)), sigma, gaussian_reach<A>(sigma)};
}

// How images are cut into tiles, and what a tile keeps in shared memory.
struct Tiling {
  Axis y, x;
  int rows, columns;     // of a tile, in pixels
  int cells_y, cells_x;  // the most cells that a tile touches
  int tiles_y, tiles_x;  // of an image
  int64_t bytes;         // of shared memory

  Tiling(const Axis& y, const Axis& x, int64_t value_bytes, int64_t most_bytes) : y(y), x(x) {
    constexpr int64_t kRows = 32, kColumns = 128, kStep = 16;  // columns in steps of the largest pack and its double
    rows = static_cast<int>(y.pixels < kRows ? y.pixels : kRows);
    columns = static_cast<int>(ceil_div(ceil_div(x.pixels, ceil_div(x.pixels, kColumns)), kStep) * kStep);
    measure(value_bytes);
    while (bytes > most_bytes && rows * columns > kStep) {
      rows > 1 ? rows = (rows + 1) / 2 : columns -= kStep;
      measure(value_bytes);
    }
    STD_TORCH_CHECK(bytes <= most_bytes, "sigma reaches over too many cells for the shared memory of this device");
    tiles_y = static_cast<int>(ceil_div(y.pixels, rows));
    tiles_x = static_cast<int>(ceil_div(x.pixels, columns));
  }

  int64_t tiles() const { return static_cast<int64_t>(tiles_y) * tiles_x; }
  CASM_FAST_HD int64_t cells() const { return static_cast<int64_t>(cells_y) * cells_x; }

 private:
  static int most_cells(const Axis& axis, int pixels) {
    const int64_t cells = ceil_div((pixels - 1) * axis.cells, axis.pixels) + 1 + axis.taps;
    return static_cast<int>(cells < axis.cells ? cells : axis.cells);
  }

  void measure(int64_t value_bytes) {
    cells_y = most_cells(y, rows);
    cells_x = most_cells(x, columns);
    const int64_t values = static_cast<int64_t>(y.taps) * rows + static_cast<int64_t>(x.taps) * columns +
                           static_cast<int64_t>(cells_y) * (columns + 1) + static_cast<int64_t>(rows) * columns;
    bytes = values * value_bytes + (rows + columns) * static_cast<int64_t>(sizeof(int));
  }
};

// The tile of a block, with its part of the two matrices A.
template <typename A>
struct Tile {
  int rows, columns;         // of this tile, cut at the border of the image
  int height, width, pitch;  // of the arrays in shared memory
  int b, y, x;               // image and first pixel
  int u, j;                  // first cell
  int cells_y, cells_x;      // cells
  A *weight_y, *weight_x;    // [taps_y, height], [taps_x, width]
  A *cells, *pixels;         // [cells_y, pitch], [height, width]
  int *first_y, *first_x;    // [height], [width], from (u, j) on

  __device__ explicit Tile(const Tiling& tiling) {
    const int index = static_cast<int>(blockIdx.x), row = index / tiling.tiles_x;
    b = row / tiling.tiles_y;
    y = (row - b * tiling.tiles_y) * tiling.rows;
    x = (index - row * tiling.tiles_x) * tiling.columns;
    height = tiling.rows;
    width = tiling.columns;
    pitch = width + 1;  // odd: the cells of a column lie in different banks
    rows = min(height, static_cast<int>(tiling.y.pixels) - y);
    columns = min(width, static_cast<int>(tiling.x.pixels) - x);
    u = tiling.y.first(y);
    j = tiling.x.first(x);
    cells_y = tiling.y.first(y + rows - 1) + tiling.y.taps - u;
    cells_x = tiling.x.first(x + columns - 1) + tiling.x.taps - j;
    weight_y = dynamic_shared<A>();
    weight_x = weight_y + tiling.y.taps * height;
    cells = weight_x + tiling.x.taps * width;
    pixels = cells + tiling.cells_y * pitch;
    first_y = reinterpret_cast<int*>(pixels + height * width);
    first_x = first_y + height;
  }

  // The weights of every row and column, one thread each. The caller waits.
  __device__ void weigh(const Tiling& tiling) {
    weigh_axis(tiling.y, y, rows, height, u, threadIdx.x, first_y, weight_y);
    // Columns begin with the thread after the last row's, so that both go on at once.
    const int turned = static_cast<int>(threadIdx.x + kThreads - rows % kThreads) % kThreads;
    weigh_axis(tiling.x, x, columns, width, j, turned, first_x, weight_x);
  }

  __device__ static void weigh_axis(const Axis& axis, int from, int count, int stride, int cell, int thread, int* first,
                                    A* weight) {
    for (int v = thread; v < count; v += kThreads) {
      const int first_of_v = axis.first(from + v);
      first[v] = first_of_v - cell;
      gaussian_weights<A, A>(from + v, axis.cells, axis.pixels, first_of_v, axis.taps, axis.sigma, weight + v, stride);
    }
  }

  // pixels = A_y m A_x^T.
  template <typename M>
  __device__ void evaluate(const Tiling& tiling, const Rows<const M>& mask) {
    // 1. The weights.
    weigh(tiling);
    __syncthreads();
    // 2. The mask rows that the tile needs, widened to its columns.
    for (int i = threadIdx.x; i < cells_y * columns; i += kThreads) {
      const int row = i / columns, column = i - row * columns;
      const M* values = mask.at(b, 0, u + row) + j + first_x[column];
      A sum = 0;
      for (int k = 0; k < tiling.x.taps; ++k) sum += static_cast<A>(values[k]) * weight_x[k * width + column];
      cells[row * pitch + column] = sum;
    }
    __syncthreads();
    // 3. The rows of the tile.
    for (int i = threadIdx.x; i < rows * columns; i += kThreads) {
      const int row = i / columns, column = i - row * columns;
      const A* values = cells + first_y[row] * pitch + column;
      A sum = 0;
      for (int k = 0; k < tiling.y.taps; ++k) sum += values[k * pitch] * weight_y[k * height + row];
      pixels[row * width + column] = sum;
    }
    __syncthreads();
  }
};

// Where the window of every image begins, (0, 0) without offsets. Wrong offsets are clamped: nothing is read outside.
struct Windows {
  const int32_t* offset = nullptr;  // [B, 2]
  int64_t room_y = 0, room_x = 0;

  __device__ int64_t y(int64_t b) const { return offset ? clamped(offset[2 * b], room_y) : 0; }
  __device__ int64_t x(int64_t b) const { return offset ? clamped(offset[2 * b + 1], room_x) : 0; }
};

// The pixels of a tile as they lie in an image, from its corner on.
template <typename T>
struct Corner {
  T* data = nullptr;
  int64_t plane = 0, row = 0;

  template <typename A>
  __device__ Corner(const Rows<T>& rows, const Tile<A>& tile, const Windows& windows, int64_t repeat)
      : plane(rows.plane), row(rows.row) {
    if (rows) data = rows.at(tile.b, 0, tile.y + windows.y(tile.b)) + (tile.x + windows.x(tile.b)) * repeat;
  }
  __device__ Place<T> at(int y, int i) const { return {data ? data + y * row + i : nullptr, plane}; }
  // Whether the corner, and with it every row, begins on a pack.
  __device__ bool on_packs() const { return reinterpret_cast<uintptr_t>(data) % (kPackOf<T> * sizeof(T)) == 0; }
};

// ---------------------------------------------------------------- upsample_mask

template <typename T>
__global__ void __launch_bounds__(kThreads) upsample_kernel(Tiling tiling, Rows<const T> mask, T* out) {  // [B, H, W]
  Tile<acc_t<T>> tile(tiling);
  tile.evaluate(tiling, mask);
  T* corner = out + (tile.b * tiling.y.pixels + tile.y) * tiling.x.pixels + tile.x;
  for (int i = threadIdx.x; i < tile.rows * tile.columns; i += kThreads) {
    const int row = i / tile.columns, column = i - row * tile.columns;
    corner[row * tiling.x.pixels + column] = static_cast<T>(tile.pixels[row * tile.width + column]);
  }
}

// ---------------------------------------------------------------- jitter_mask

// Blends the tile, kCount values per thread and step.
template <int kCount, typename T, typename A>
__device__ void blend_tile(const Tile<A>& tile, int64_t planes, int repeat, const Corner<const T>& image,
                           const Corner<const T>& reference, const Corner<T>& out) {
  const int packs = tile.columns * repeat / kCount;
  for (int n = threadIdx.x; n < tile.rows * packs; n += kThreads) {
    const int row = n / packs, i = (n - row * packs) * kCount;
    A keep[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) keep[k] = tile.pixels[row * tile.width + (repeat == 1 ? i + k : (i + k) / repeat)];
    blend_values(planes, image.at(row, i), reference.at(row, i), out.at(row, i), keep);
  }
}

// Images and out are seen through their windows: the forward pass shifts the images, their gradient shifts the result.
// `on_packs`: rows, planes and images are a whole number of packs apart, and so are the ends of a row.
template <typename T, typename M>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    jitter_kernel(Tiling tiling, Frame frame, Rows<const T> image, Rows<const T> reference, Rows<const M> mask,
                  Rows<T> out, Windows in_windows, Windows out_windows, bool on_packs) {
  Tile<acc_t<T>> tile(tiling);
  tile.evaluate(tiling, mask);
  const Corner<const T> top(image, tile, in_windows, frame.repeat), below(reference, tile, in_windows, frame.repeat);
  const Corner<T> result(out, tile, out_windows, frame.repeat);
  const int repeat = static_cast<int>(frame.repeat);
  if (on_packs && top.on_packs() && below.on_packs() && result.on_packs())
    blend_tile<kPackOf<T>>(tile, frame.planes, repeat, top, below, result);
  else
    blend_tile<1>(tile, frame.planes, repeat, top, below, result);
}

// ---------------------------------------------------------------- the gradient of a small mask

// The slopes of the tile, kCount pixels per thread and step, into tile.pixels. The channels of a pixel are `plane`
// apart in each corner.
template <int kCount, typename T, typename A>
__device__ void slope_tile(const Tile<A>& tile, int64_t channels, int repeat, const Corner<const T>& grad,
                           const Corner<const T>& image, const Corner<const T>& reference) {
  const int packs = tile.columns / kCount;
  for (int n = threadIdx.x; n < tile.rows * packs; n += kThreads) {
    const int row = n / packs, x = (n - row * packs) * kCount;
    A slope[kCount];
    slopes_of(channels, grad.at(row, x * repeat), image.at(row, x * repeat), reference.at(row, x * repeat), slope);
#pragma unroll
    for (int k = 0; k < kCount; ++k) tile.pixels[row * tile.width + x + k] = slope[k];
  }
}

// partial [tiles, cells_y, cells_x] = A_y^T slopes A_x over the pixels of each tile.
template <typename T>
__global__ void __launch_bounds__(kThreads, kFoldBlocks<T>)
    fold_kernel(Tiling tiling, Frame frame, Rows<const T> grad, Rows<const T> image, Rows<const T> reference,
                Windows windows, bool on_packs, acc_t<T>* partial) {
  using A = acc_t<T>;
  Tile<A> tile(tiling);
  // 1. Weights and slopes.
  tile.weigh(tiling);
  Corner<const T> flow(grad, tile, Windows{}, frame.repeat), top(image, tile, windows, frame.repeat);
  Corner<const T> below(reference, tile, windows, frame.repeat);
  const int repeat = static_cast<int>(frame.repeat);
  if (repeat > 1) flow.plane = top.plane = below.plane = 1;
  if (on_packs && flow.on_packs() && top.on_packs() && below.on_packs())
    slope_tile<kPackOf<T>>(tile, frame.planes, repeat, flow, top, below);
  else
    slope_tile<1>(tile, frame.planes * repeat, repeat, flow, top, below);
  __syncthreads();
  // 2. Rows into cells: neighbouring threads take neighbouring columns.
  for (int i = threadIdx.x; i < tile.cells_y * tile.columns; i += kThreads) {
    const int cell = i / tile.columns, column = i - cell * tile.columns;
    A sum = 0;
    for (int row = 0; row < tile.rows; ++row) {
      const int k = cell - tile.first_y[row];
      if (k >= 0 && k < tiling.y.taps)
        sum += tile.pixels[row * tile.width + column] * tile.weight_y[k * tile.height + row];
    }
    tile.cells[cell * tile.pitch + column] = sum;
  }
  __syncthreads();
  // 3. Columns into cells: neighbouring threads take neighbouring cells of one column, `pitch` apart.
  partial += blockIdx.x * tiling.cells();
  for (int i = threadIdx.x; i < tile.cells_y * tile.cells_x; i += kThreads) {
    const int cell_x = i / tile.cells_y, cell_y = i - cell_x * tile.cells_y;
    A sum = 0;
    for (int column = 0; column < tile.columns; ++column) {
      const int k = cell_x - tile.first_x[column];
      if (k >= 0 && k < tiling.x.taps)
        sum += tile.cells[cell_y * tile.pitch + column] * tile.weight_x[k * tile.width + column];
    }
    partial[cell_y * tiling.cells_x + cell_x] = sum;
  }
}

// grad_mask [B, h, w]: a cell adds up what the tiles that touch it give, in order; one thread each.
template <typename A, typename M>
__global__ void __launch_bounds__(kThreads) gather_kernel(Tiling tiling, int64_t B, const A* partial, M* grad_mask) {
  const int64_t h = tiling.y.cells, w = tiling.x.cells;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= B * h * w) return;
  const int64_t row = thread / w, j = thread - row * w, b = row / h, u = row - b * h;
  // The cell's place among those of tile t of an axis, or -1.
  const auto place = [](const Axis& axis, int64_t t, int pixels, int64_t cell) {
    const int64_t first = axis.first(t * pixels), last = min((t + 1) * pixels, axis.pixels) - 1;
    return cell < first || cell >= axis.first(last) + axis.taps ? int64_t(-1) : cell - first;
  };
  A sum = 0;
  for (int64_t ty = 0; ty < tiling.tiles_y; ++ty) {
    const int64_t cell_y = place(tiling.y, ty, tiling.rows, u);
    if (cell_y < 0) continue;
    for (int64_t tx = 0; tx < tiling.tiles_x; ++tx) {
      const int64_t cell_x = place(tiling.x, tx, tiling.columns, j);
      if (cell_x < 0) continue;
      const int64_t tile = (b * tiling.tiles_y + ty) * tiling.tiles_x + tx;
      sum += partial[(tile * tiling.cells_y + cell_y) * tiling.cells_x + cell_x];
    }
  }
  grad_mask[thread] = static_cast<M>(sum);
}

// ---------------------------------------------------------------- the operators

template <typename T>
Tiling tiling_of(int64_t h, int64_t w, int64_t H, int64_t W, double sigma, const Device& device) {
  using A = acc_t<T>;
  return Tiling(axis_of<A>(h, H, sigma), axis_of<A>(w, W, sigma), sizeof(A), max_shared_bytes(device));
}

// The gradient of a mask smaller than the image (or of any mask that is upsampled): two launches.
template <typename T, typename M>
void gather_slopes(const Tiling& tiling, const Frame& frame, Rows<const T> grad, Rows<const T> image,
                   Rows<const T> reference, Windows windows, Tensor& grad_mask, const Device& device) {
  using A = acc_t<T>;
  const bool on_packs = frame.repeat == 1 && frame.length % kPackOf<T> == 0 && steps_by_packs(grad) &&
                        steps_by_packs(image) && steps_by_packs(reference);
  const ScalarType sums = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  Tensor partial = empty_tensor(grad_mask, {frame.B * tiling.tiles(), tiling.cells()}, sums);
  launch(fold_kernel<T>, blocks_for(frame.B * tiling.tiles()), dim3(kThreads), tiling.bytes, device, tiling, frame,
         grad, image, reference, windows, on_packs, partial.mutable_data_ptr<A>());
  launch(gather_kernel<A, M>, blocks_for(ceil_div(grad_mask.numel(), kThreads)), dim3(kThreads), 0, device, tiling,
         frame.B, partial.const_data_ptr<A>(), grad_mask.mutable_data_ptr<M>());
}

template <typename T, typename M>
void blend_images(const Frame& frame, Rows<const T> image, Rows<const T> reference, Rows<const M> mask, int64_t h,
                  int64_t w, Rows<T> out, const Device& device) {
  const bool on_packs =
      frame.length % kPackOf<T> == 0 && begins_on_packs(image) && begins_on_packs(reference) && begins_on_packs(out);
  const auto start = [&]<int kCount>() {
    launch(blend_kernel<kCount, T, M>, blocks_for(ceil_div(frame.B * frame.H * (frame.length / kCount), kThreads)),
           dim3(kThreads), 0, device, frame, image, reference, mask, h, w, out);
  };
  on_packs ? start.template operator()<kPackOf<T>>() : start.template operator()<1>();
}

Tensor blend(const Tensor& image_in, const OptionalTensor& reference_in, const Tensor& mask_in) {
  check_blend(image_in, reference_in, mask_in);
  const Device device(image_in);
  const bool interleaved = is_interleaved(image_in);
  const Tensor image = with_rows(image_in, interleaved), mask = with_rows(mask_in, false);
  const OptionalTensor reference = with_rows(reference_in, interleaved);
  const Frame frame = frame_of(image, image.size(2), image.size(3), interleaved);
  const Tensor out = empty_image(image, frame.H, frame.W(), interleaved);
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    blend_images(frame, rows_of<T>(image, interleaved), rows_of<T>(reference, interleaved), rows_of<M>(mask, false),
                 mask.size(2), mask.size(3), mutable_rows_of<T>(out, interleaved), device);
  });
  return out;
}

// grad_out * mask, the gradient of the image, or grad_out * (1 - mask), the gradient of the reference.
Tensor blend_backward_image(const Tensor& grad_in, const Tensor& mask_in, bool complement) {
  check_blend(grad_in, std::nullopt, mask_in);
  const Device device(grad_in);
  const bool interleaved = is_interleaved(grad_in);
  const Tensor grad = with_rows(grad_in, interleaved), mask = with_rows(mask_in, false);
  const Frame frame = frame_of(grad, grad.size(2), grad.size(3), interleaved);
  const Tensor out = empty_image(grad, frame.H, frame.W(), interleaved);
  for_dtypes(grad, mask, [&]<typename T, typename M>() {
    const Rows<const T> rows = rows_of<T>(grad, interleaved), none{};
    blend_images(frame, complement ? none : rows, complement ? rows : none, rows_of<M>(mask, false), mask.size(2),
                 mask.size(3), mutable_rows_of<T>(out, interleaved), device);
  });
  return out;
}

Tensor blend_backward_mask(const Tensor& grad_in, const Tensor& image_in, const OptionalTensor& reference_in,
                           const Tensor& mask) {
  check_blend(image_in, reference_in, mask);
  check_same_image(image_in, grad_in);
  const Device device(image_in);
  const bool interleaved = is_interleaved(image_in);
  const Tensor image = with_rows(image_in, interleaved), grad = with_rows(grad_in, interleaved);
  const OptionalTensor reference = with_rows(reference_in, interleaved);
  const Frame frame = frame_of(image, image.size(2), image.size(3), interleaved);
  const int64_t h = mask.size(2), w = mask.size(3);
  Tensor grad_mask = empty_tensor(mask, {frame.B, 1, h, w});
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    const Rows<const T> grads = rows_of<T>(grad, interleaved), images = rows_of<T>(image, interleaved);
    const Rows<const T> references = rows_of<T>(reference, interleaved);
    if (h < frame.H || w < frame.W())
      return gather_slopes<T, M>(tiling_of<T>(h, w, frame.H, frame.W(), 0, device), frame, grads, images, references,
                                 Windows{}, grad_mask, device);
    const bool on_packs = !interleaved && w % kPackOf<T> == 0 && begins_on_packs(grads) && begins_on_packs(images) &&
                          begins_on_packs(references);
    const auto start = [&]<int kCount>() {
      launch(slopes_kernel<kCount, T, M>, blocks_for(ceil_div(grad_mask.numel() / kCount, kThreads)), dim3(kThreads), 0,
             device, frame, grads, images, references, grad_mask.mutable_data_ptr<M>());
    };
    on_packs ? start.template operator()<kPackOf<T>>() : start.template operator()<1>();
  });
  return grad_mask;
}

Tensor upsample_mask(const Tensor& mask_in, int64_t H, int64_t W, double sigma) {
  check_single(mask_in);
  check_size(H, W);
  check_sigma(sigma);
  const Device device(mask_in);
  const Tensor mask = with_rows(mask_in, false);
  const Tensor out = empty_image(mask, H, W, false);
  for_cuda_dtype(mask, [&]<typename T>() {
    const Tiling tiling = tiling_of<T>(mask.size(2), mask.size(3), H, W, sigma, device);
    launch(upsample_kernel<T>, blocks_for(mask.size(0) * tiling.tiles()), dim3(kThreads), tiling.bytes, device, tiling,
           rows_of<T>(mask, false), out.mutable_data_ptr<T>());
  });
  return out;
}

Tensor upsample_mask_backward(const Tensor& grad_in, int64_t h, int64_t w, double sigma) {
  check_single(grad_in);
  check_size(h, w);
  check_sigma(sigma);
  const Device device(grad_in);
  const Tensor grad = with_rows(grad_in, false);
  const Frame frame = frame_of(grad, grad.size(2), grad.size(3), false);
  Tensor grad_mask = empty_tensor(grad, {frame.B, 1, h, w});
  for_cuda_dtype(grad, [&]<typename T>() {
    const Rows<const T> none{};
    gather_slopes<T, T>(tiling_of<T>(h, w, frame.H, frame.W(), sigma, device), frame, rows_of<T>(grad, false), none,
                        none, Windows{}, grad_mask, device);
  });
  return grad_mask;
}

// The tiles of frame: M over the images of `in_windows`, into the `out_windows` of out.
template <typename T, typename M>
void jitter_images(const Tiling& tiling, const Frame& frame, Rows<const T> image, Rows<const T> reference,
                   Rows<const M> mask, Rows<T> out, Windows in_windows, Windows out_windows, const Device& device) {
  const bool on_packs =
      frame.length % kPackOf<T> == 0 && begins_on_packs(image) && begins_on_packs(reference) && begins_on_packs(out);
  launch(jitter_kernel<T, M>, blocks_for(frame.B * tiling.tiles()), dim3(kThreads), tiling.bytes, device, tiling, frame,
         image, reference, mask, out, in_windows, out_windows, on_packs);
}

Windows windows_of(const Tensor& offset, int64_t Hi, int64_t Wi, int64_t H, int64_t W) {
  return {offset.const_data_ptr<int32_t>(), Hi - H, Wi - W};
}

Tensor jitter_mask(const Tensor& image_in, const OptionalTensor& reference_in, const Tensor& mask_in,
                   const Tensor& offset_in, int64_t H, int64_t W, double sigma) {
  check_jitter(image_in, reference_in, mask_in, offset_in, H, W, sigma);
  const Device device(image_in);
  const bool interleaved = is_interleaved(image_in);
  const Tensor image = with_rows(image_in, interleaved), mask = with_rows(mask_in, false);
  const OptionalTensor reference = with_rows(reference_in, interleaved);
  const Tensor offset = in_order(offset_in);
  const Frame frame = frame_of(image, H, W, interleaved);
  const Tensor out = empty_image(image, H, W, interleaved);
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    jitter_images(tiling_of<T>(mask.size(2), mask.size(3), H, W, sigma, device), frame, rows_of<T>(image, interleaved),
                  rows_of<T>(reference, interleaved), rows_of<M>(mask, false), mutable_rows_of<T>(out, interleaved),
                  windows_of(offset, image.size(2), image.size(3), H, W), Windows{}, device);
  });
  return out;
}

Tensor jitter_mask_backward_mask(const Tensor& grad_in, const Tensor& image_in, const OptionalTensor& reference_in,
                                 const Tensor& mask, const Tensor& offset_in, double sigma) {
  check_jitter_gradient(grad_in, image_in, reference_in, mask, offset_in, sigma);
  const Device device(image_in);
  const bool interleaved = is_interleaved(image_in);
  const Tensor image = with_rows(image_in, interleaved), grad = with_rows(grad_in, interleaved);
  const OptionalTensor reference = with_rows(reference_in, interleaved);
  const Tensor offset = in_order(offset_in);
  const int64_t H = grad.size(2), W = grad.size(3), h = mask.size(2), w = mask.size(3);
  const Frame frame = frame_of(image, H, W, interleaved);
  Tensor grad_mask = empty_tensor(mask, {frame.B, 1, h, w});
  for_dtypes(image, mask, [&]<typename T, typename M>() {
    gather_slopes<T, M>(tiling_of<T>(h, w, H, W, sigma, device), frame, rows_of<T>(grad, interleaved),
                        rows_of<T>(image, interleaved), rows_of<T>(reference, interleaved),
                        windows_of(offset, image.size(2), image.size(3), H, W), grad_mask, device);
  });
  return grad_mask;
}

// grad_out * M at the window, zero around it: the gradient of the image; with 1 - M that of the reference.
Tensor jitter_mask_backward_image(const Tensor& grad_in, const Tensor& mask_in, const Tensor& offset_in, int64_t Hi,
                                  int64_t Wi, double sigma, bool complement) {
  check_image_gradient(grad_in, mask_in, offset_in, Hi, Wi, sigma);
  const Device device(grad_in);
  const bool interleaved = is_interleaved(grad_in);
  const Tensor grad = with_rows(grad_in, interleaved), mask = with_rows(mask_in, false);
  const Tensor offset = in_order(offset_in);
  const int64_t H = grad.size(2), W = grad.size(3);
  const Frame frame = frame_of(grad, H, W, interleaved);
  Tensor out = empty_image(grad, Hi, Wi, interleaved);
  torch::stable::zero_(out);
  for_dtypes(grad, mask, [&]<typename T, typename M>() {
    const Rows<const T> grads = rows_of<T>(grad, interleaved), none{};
    jitter_images(tiling_of<T>(mask.size(2), mask.size(3), H, W, sigma, device), frame, complement ? none : grads,
                  complement ? grads : none, rows_of<M>(mask, false), mutable_rows_of<T>(out, interleaved), Windows{},
                  windows_of(offset, Hi, Wi, H, W), device);
  });
  return out;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CASM_FAST_CUDA_KEY, m) {
  m.impl("blend", TORCH_BOX(&casm_fast::blend));
  m.impl("blend_backward_mask", TORCH_BOX(&casm_fast::blend_backward_mask));
  m.impl("blend_backward_image", TORCH_BOX(&casm_fast::blend_backward_image));
  m.impl("upsample_mask", TORCH_BOX(&casm_fast::upsample_mask));
  m.impl("upsample_mask_backward", TORCH_BOX(&casm_fast::upsample_mask_backward));
  m.impl("jitter_mask", TORCH_BOX(&casm_fast::jitter_mask));
  m.impl("jitter_mask_backward_mask", TORCH_BOX(&casm_fast::jitter_mask_backward_mask));
  m.impl("jitter_mask_backward_image", TORCH_BOX(&casm_fast::jitter_mask_backward_image));
}
