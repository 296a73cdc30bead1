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
// size; the gradient of the mask 36, of an image 24. At 28x28 to 224x224 jitter_mask takes about 140 instructions a
// pixel (counted in the code for Hopper), which it issues in less than half of the time that the traffic needs: hence
// no division inside a loop, and one weight for four columns. Rows that begin on a pack (16 bytes, 8 of 16-bit storage)
// are read and written in packs. A random shift moves one side of three images out of four off them: that side goes
// value by value, four neighbours a thread, which moves the same lines. channels_last images are rows of W * C values
// here: the same kernels, not copied. Limits: shared memory holds the weights of a tile, so that sigma can reach over
// some thousand cells, not more.

#include "common/dispatch.h"
#include "common/launch.h"
#include "jitter_mask/jitter_mask.h"

namespace casm_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPlanes = 3;  // channels under way at once: enough loads in flight, and all of an RGB image

// Values per access: 16 bytes, but 8 of 16-bit storage. Those keep as much under way with half the registers, and rows
// of 228 pixels, 224 and the usual jitter, begin on 8 bytes but not on 16.
template <typename T>
constexpr int kPackOf = sizeof(T) == 8 ? 2 : 4;

// Blocks per multiprocessor, at least, so that enough loads are under way: six per thread in the forward pass, nine in
// the gradient. Values of 16 bits need more registers for as many. (double is there for gradcheck.)
template <typename T>
constexpr int kBlocks = 3;
template <>
constexpr int kBlocks<float> = 4;
template <>
constexpr int kBlocks<double> = 2;
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

// Whether every row of every plane begins on a pack; so do those of an absent image.
template <typename T>
CASM_FAST_HD bool begins_on_packs(const Rows<T>& rows) {
  return rows.batch % kPackOf<T> == 0 && rows.plane % kPackOf<T> == 0 && rows.row % kPackOf<T> == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % (kPackOf<T> * sizeof(T)) == 0;
}

// Calls `f(row, column)` for every place of a field, from the first on, kThreads of them at a time. Only the first
// place of a thread costs a division.
template <typename F>
__device__ void for_each_place(int rows, int columns, const F& f) {
  const int down = kThreads / columns, across = kThreads - down * columns;
  int row = static_cast<int>(threadIdx.x) / columns, column = static_cast<int>(threadIdx.x) - row * columns;
  while (row < rows) {
    f(row, column);
    row += down;
    column += across;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
}

// ---------------------------------------------------------------- pixels

// Neighbouring values of the first plane of an image, and how far the next plane is.
template <typename T>
struct Place {
  T* data;
  int64_t plane;
};

// kCount neighbouring values: kWide where they begin on a pack, else one by one.
template <int kCount, bool kWide, typename T>
__device__ Pack<T, kCount> load_values(const T* address) {
  Pack<T, kCount> values;
  if constexpr (kWide) {
    values = load_pack<kCount>(address);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] = address[j];
  }
  return values;
}

template <int kCount, bool kWide, typename T>
__device__ void store_values(T* address, const Pack<T, kCount>& values) {
  if constexpr (kWide) {
    store_pack(address, values);
  } else {
#pragma unroll
    for (int j = 0; j < kCount; ++j) address[j] = values[j];
  }
}

// What stands for an absent image, which is never read.
template <typename T>
Rows<const T> or_else(const Rows<const T>& rows, const Rows<const T>& other) {
  return rows ? rows : other;
}

// Which images a kernel reads. A blend of one image alone is that of the first; its keep may be turned around, which
// makes it the second's.
enum class Given { none, one, both };

// Calls `f` with whether both images are given, or one.
template <typename F>
void for_both_or_one(bool both, const F& f) {
  both ? f.template operator()<Given::both>() : f.template operator()<Given::one>();
}

// Blends kCount neighbouring values of every plane: image * keep, and reference * (1 - keep) where it is given.
template <int kCount, Given kGiven, bool kWideIn, bool kWideOut, typename T, typename A>
__device__ void blend_values(int planes, Place<const T> image, Place<const T> reference, Place<T> out,
                             const A (&keep)[kCount]) {
  for (int plane = 0; plane < planes; plane += kPlanes) {
    Pack<T, kCount> top[kPlanes], below[kPlanes];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (plane + p >= planes) break;
      top[p] = load_values<kCount, kWideIn>(image.data);
      image.data += image.plane;
      if constexpr (kGiven == Given::both) {
        below[p] = load_values<kCount, kWideIn>(reference.data);
        reference.data += reference.plane;
      }
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (plane + p >= planes) break;
      Pack<T, kCount> result;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        A value = static_cast<A>(top[p][j]) * keep[j];
        if constexpr (kGiven == Given::both) value += static_cast<A>(below[p][j]) * (1 - keep[j]);
        result[j] = static_cast<T>(value);
      }
      store_values<kCount, kWideOut>(out.data, result);
      out.data += out.plane;
    }
  }
}

// What the mask value of kCount neighbouring places receives, summed over the planes: grad * (image - reference), or
// grad * image, or grad where no image is given.
template <int kCount, Given kGiven, bool kWideGrad, bool kWide, typename T, typename A>
__device__ void slopes_of(int planes, Place<const T> grad, Place<const T> image, Place<const T> reference,
                          A (&slope)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) slope[j] = 0;
  for (int plane = 0; plane < planes; plane += kPlanes) {
    Pack<T, kCount> flow[kPlanes], top[kPlanes], below[kPlanes];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (plane + p >= planes) break;
      flow[p] = load_values<kCount, kWideGrad>(grad.data);
      grad.data += grad.plane;
      if constexpr (kGiven != Given::none) {
        top[p] = load_values<kCount, kWide>(image.data);
        image.data += image.plane;
      }
      if constexpr (kGiven == Given::both) {
        below[p] = load_values<kCount, kWide>(reference.data);
        reference.data += reference.plane;
      }
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      if (plane + p >= planes) break;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        A difference = 1;
        if constexpr (kGiven != Given::none) difference = static_cast<A>(top[p][j]);
        if constexpr (kGiven == Given::both) difference -= static_cast<A>(below[p][j]);
        slope[j] += static_cast<A>(flow[p][j]) * difference;
      }
    }
  }
}

// ---------------------------------------------------------------- blend

// How threads lie over a batch: row after row of an image, `packs` threads each. A block never spans two images, so
// that 32 bits count its pixels.
struct Grid {
  unsigned rows, packs, blocks;  // blocks of an image

  Grid(int64_t rows, int64_t packs)
      : rows(static_cast<unsigned>(rows)),
        packs(static_cast<unsigned>(packs)),
        blocks(static_cast<unsigned>(ceil_div(rows * packs, kThreads))) {
    STD_TORCH_CHECK(rows * packs < INT32_MAX, "images have too many pixels");
  }
};

struct Spot {
  unsigned b, y, pack;

  __device__ explicit Spot(const Grid& grid) {
    b = blockIdx.x / grid.blocks;
    const unsigned n = (blockIdx.x - b * grid.blocks) * kThreads + threadIdx.x;
    y = n / grid.packs;
    pack = n - y * grid.packs;
  }
};

// The cell that pixel `at` of an axis belongs to, cell_of() in 32 bits, and those of the pixels after it, of which none
// costs a division.
struct Cell {
  unsigned cells, pixels, cell, rest;

  __device__ Cell(unsigned at, unsigned cells, unsigned pixels) : cells(cells), pixels(pixels), cell(at), rest(0) {
    if (cells == pixels) return;
    cell = at * cells / pixels;
    rest = at * cells - cell * pixels;
  }
  __device__ void next() {
    rest += cells;
    if (rest >= pixels) {  // cells are at most as many as pixels
      rest -= pixels;
      ++cell;
    }
  }
};

void check_cells(int64_t cells, int64_t pixels) {
  STD_TORCH_CHECK(cells == pixels || cells * pixels < int64_t(1) << 32, "mask and image have too many pixels");
}

// One thread per kCount values of a row. mask [B, h, w] is read at the cells of the values.
template <int kCount, Given kGiven, typename T, typename M>
__global__ void __launch_bounds__(kThreads)
    blend_kernel(Grid grid, Frame frame, Rows<const T> image, Rows<const T> reference, bool turned, Rows<const M> mask,
                 unsigned h, unsigned w, Rows<T> out) {
  using A = acc_t<T>;
  const Spot spot(grid);
  if (spot.y >= grid.rows) return;
  const unsigned i = spot.pack * kCount, repeat = static_cast<unsigned>(frame.repeat);
  const M* cells = mask.at(spot.b, 0, Cell(spot.y, h, grid.rows).cell);
  A keep[kCount];
  if (w == frame.length) {  // value i lies under mask value i
#pragma unroll
    for (int j = 0; j < kCount; ++j) keep[j] = static_cast<A>(cells[i + j]);
  } else {
    const unsigned pixel = repeat == 1 ? i : i / repeat;
    unsigned channel = i - pixel * repeat;
    Cell cell(pixel, w, static_cast<unsigned>(frame.length) / repeat);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      keep[j] = static_cast<A>(cells[cell.cell]);
      if (++channel < repeat) continue;
      channel = 0;
      cell.next();
    }
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) keep[j] = turned ? 1 - keep[j] : keep[j];
  blend_values<kCount, kGiven, true, true>(static_cast<int>(frame.planes),
                                           Place<const T>{image.at(spot.b, 0, spot.y) + i, image.plane},
                                           Place<const T>{reference.at(spot.b, 0, spot.y) + i, reference.plane},
                                           Place<T>{out.at(spot.b, 0, spot.y) + i, out.plane}, keep);
}

// The pixels of an image [B, H, W] with their channels `plane` apart, whichever way they lie.
template <typename T>
__device__ Place<T> pixel_of(const Rows<T>& rows, const Frame& frame, const Spot& spot, unsigned x) {
  return {rows.at(spot.b, 0, spot.y) + x * frame.repeat, frame.repeat > 1 ? 1 : rows.plane};
}

// grad_mask [B, H, W] of a mask of image size, one thread per kCount pixels.
template <int kCount, Given kGiven, typename T, typename M>
__global__ void __launch_bounds__(kThreads) slopes_kernel(Grid grid, Frame frame, Rows<const T> grad,
                                                          Rows<const T> image, Rows<const T> reference, M* grad_mask) {
  const Spot spot(grid);
  if (spot.y >= grid.rows) return;
  const unsigned x = spot.pack * kCount;
  acc_t<T> slope[kCount];
  slopes_of<kCount, kGiven, true, true>(static_cast<int>(frame.planes * frame.repeat), pixel_of(grad, frame, spot, x),
                                        pixel_of(image, frame, spot, x), pixel_of(reference, frame, spot, x), slope);
  M* const out = grad_mask + (int64_t(spot.b) * grid.rows + spot.y) * (grid.packs * kCount) + x;
#pragma unroll
  for (int j = 0; j < kCount; ++j) out[j] = static_cast<M>(slope[j]);
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

constexpr int kStrips = 4;  // of 32 columns, the most that a tile has

// How images are cut into tiles, and what a tile keeps in shared memory.
struct Tiling {
  Axis y, x;
  int rows, columns;     // of a tile, in pixels
  int cells_y, cells_x;  // the most cells that a tile touches
  int tiles_y, tiles_x;  // of an image
  int64_t bytes;         // of shared memory

  Tiling(const Axis& y, const Axis& x, int64_t value_bytes, int64_t most_bytes) : y(y), x(x) {
    constexpr int64_t kRows = 32, kColumns = 32 * kStrips, kStep = 16;  // columns in steps of whole packs
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

// The columns of a tile for the lanes of a warp: every 32nd each. Rows go round the warps.
struct Lanes {
  int warp, lane, columns;

  __device__ explicit Lanes(int columns) : warp(threadIdx.x / 32), lane(threadIdx.x % 32), columns(columns) {}
  // Calls `f(strip, column)`.
  template <typename F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip)
      if (lane + 32 * strip < columns) f(strip, lane + 32 * strip);
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
    const Lanes lanes(columns);
    for (int row = lanes.warp; row < cells_y; row += kWarps) {
      const M* values = mask.at(b, 0, u + row) + j;
      lanes.for_each([&](int, int column) {
        const M* value = values + first_x[column];
        const A* weight = weight_x + column;
        A sum = 0;
        for (int k = 0; k < tiling.x.taps; ++k, weight += width) sum += static_cast<A>(value[k]) * *weight;
        cells[row * pitch + column] = sum;
      });
    }
    __syncthreads();
    // 3. The rows of the tile: one weight serves all columns.
    for (int row = lanes.warp; row < rows; row += kWarps) {
      const A* values = cells + first_y[row] * pitch + lanes.lane;
      A sums[kStrips] = {};
      for (int k = 0; k < tiling.y.taps; ++k, values += pitch) {
        const A weight = weight_y[k * height + row];
        lanes.for_each([&](int strip, int) { sums[strip] += values[32 * strip] * weight; });
      }
      lanes.for_each([&](int strip, int column) { pixels[row * width + column] = sums[strip]; });
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
  __device__ Place<T> at(int y, int i) const { return {data + y * row + i, plane}; }
  // Whether the corner, and with it every row of every plane, begins on a pack.
  __device__ bool on_packs() const { return begins_on_packs(Rows<T>{data, 0, plane, row}); }
};

// ---------------------------------------------------------------- upsample_mask

template <typename T>
__global__ void __launch_bounds__(kThreads) upsample_kernel(Tiling tiling, Rows<const T> mask, T* out) {  // [B, H, W]
  Tile<acc_t<T>> tile(tiling);
  tile.evaluate(tiling, mask);
  T* corner = out + (tile.b * tiling.y.pixels + tile.y) * tiling.x.pixels + tile.x;
  const Lanes lanes(tile.columns);
  for (int row = lanes.warp; row < tile.rows; row += kWarps)
    lanes.for_each([&](int, int column) {
      corner[row * tiling.x.pixels + column] = static_cast<T>(tile.pixels[row * tile.width + column]);
    });
}

// ---------------------------------------------------------------- jitter_mask

// Blends the tile, kCount values per thread and step. `turned`: the image is kept where the mask is low.
template <int kCount, Given kGiven, bool kWideIn, bool kWideOut, typename T, typename A>
__device__ void blend_tile(const Tile<A>& tile, const Frame& frame, bool turned, const Corner<const T>& image,
                           const Corner<const T>& reference, const Corner<T>& out) {
  const int repeat = static_cast<int>(frame.repeat), planes = static_cast<int>(frame.planes);
  for_each_place(tile.rows, tile.columns * repeat / kCount, [&](int row, int pack) {
    const int i = pack * kCount, pixel = repeat == 1 ? i : i / repeat;
    const A* kept = tile.pixels + row * tile.width + pixel;
    int channel = i - pixel * repeat;
    A keep[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      keep[j] = turned ? 1 - *kept : *kept;
      if (++channel < repeat) continue;
      channel = 0;
      ++kept;
    }
    blend_values<kCount, kGiven, kWideIn, kWideOut>(planes, image.at(row, i), reference.at(row, i), out.at(row, i),
                                                    keep);
  });
}

// Images and out are seen through their windows: the forward pass shifts the images, their gradient shifts the result.
// Three shifts of four move one side off the packs: that side goes value by value, the other does not. `in_packs`: rows
// are whole packs long.
template <Given kGiven, typename T, typename M>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    jitter_kernel(Tiling tiling, Frame frame, Rows<const T> image, Rows<const T> reference, bool turned,
                  Rows<const M> mask, Rows<T> out, Windows in_windows, Windows out_windows, bool in_packs) {
  Tile<acc_t<T>> tile(tiling);
  tile.evaluate(tiling, mask);
  const Corner<const T> top(image, tile, in_windows, frame.repeat), below(reference, tile, in_windows, frame.repeat);
  const Corner<T> result(out, tile, out_windows, frame.repeat);
  const bool wide_in = top.on_packs() && below.on_packs(), wide_out = result.on_packs();
  constexpr int kPack = kPackOf<T>;
  if (in_packs && wide_in && wide_out)
    blend_tile<kPack, kGiven, true, true>(tile, frame, turned, top, below, result);
  else if (in_packs && wide_out)
    blend_tile<kPack, kGiven, false, true>(tile, frame, turned, top, below, result);
  else if (in_packs && wide_in)
    blend_tile<kPack, kGiven, true, false>(tile, frame, turned, top, below, result);
  else
    blend_tile<1, kGiven, true, true>(tile, frame, turned, top, below, result);
}

// ---------------------------------------------------------------- the gradient of a small mask

// The slopes of the tile, kCount pixels per thread and step, into tile.pixels. The channels of a pixel are `plane`
// apart in each corner.
template <int kCount, Given kGiven, bool kWide, typename T, typename A>
__device__ void slope_tile(const Tile<A>& tile, const Frame& frame, const Corner<const T>& grad,
                           const Corner<const T>& image, const Corner<const T>& reference) {
  const int repeat = static_cast<int>(frame.repeat), channels = static_cast<int>(frame.planes) * repeat;
  for_each_place(tile.rows, tile.columns / kCount, [&](int row, int pack) {
    const int x = pack * kCount, i = x * repeat;
    A slope[kCount];
    slopes_of<kCount, kGiven, true, kWide>(channels, grad.at(row, i), image.at(row, i), reference.at(row, i), slope);
#pragma unroll
    for (int j = 0; j < kCount; ++j) tile.pixels[row * tile.width + x + j] = slope[j];
  });
}

// The first of `count` rising numbers that is at least `least`.
__device__ inline int first_at_least(const int* rising, int count, int least) {
  int low = 0;
  for (int high = count; low < high;) {
    const int middle = (low + high) / 2;
    rising[middle] < least ? low = middle + 1 : high = middle;
  }
  return low;
}

// partial [tiles, cells_y, cells_x] = A_y^T slopes A_x over the pixels of each tile.
template <Given kGiven, typename T>
__global__ void __launch_bounds__(kThreads, kFoldBlocks<T>)
    fold_kernel(Tiling tiling, Frame frame, Rows<const T> grad, Rows<const T> image, Rows<const T> reference,
                Windows windows, bool in_packs, acc_t<T>* partial) {
  using A = acc_t<T>;
  Tile<A> tile(tiling);
  // 1. Weights and slopes.
  tile.weigh(tiling);
  Corner<const T> flow(grad, tile, Windows{}, frame.repeat), top(image, tile, windows, frame.repeat);
  Corner<const T> below(reference, tile, windows, frame.repeat);
  if (frame.repeat > 1) flow.plane = top.plane = below.plane = 1;
  const bool wide = top.on_packs() && below.on_packs();
  if (in_packs && wide && flow.on_packs())
    slope_tile<kPackOf<T>, kGiven, true>(tile, frame, flow, top, below);
  else if (in_packs && flow.on_packs())
    slope_tile<kPackOf<T>, kGiven, false>(tile, frame, flow, top, below);
  else
    slope_tile<1, kGiven, true>(tile, frame, flow, top, below);
  __syncthreads();
  // 2. Rows into cells: one weight serves all columns, and all lanes leave the same rows out.
  const Lanes lanes(tile.columns);
  for (int cell = lanes.warp; cell < tile.cells_y; cell += kWarps) {
    const A* slopes = tile.pixels + lanes.lane;
    A sums[kStrips] = {};
    for (int row = 0; row < tile.rows; ++row, slopes += tile.width) {
      const int k = cell - tile.first_y[row];
      if (k < 0 || k >= tiling.y.taps) continue;
      const A weight = tile.weight_y[k * tile.height + row];
      lanes.for_each([&](int strip, int) { sums[strip] += slopes[32 * strip] * weight; });
    }
    lanes.for_each([&](int strip, int column) { tile.cells[cell * tile.pitch + column] = sums[strip]; });
  }
  __syncthreads();
  // 3. Columns into cells: neighbouring threads take neighbouring cells of one column, `pitch` apart.
  partial += blockIdx.x * tiling.cells();
  for_each_place(tile.cells_x, tile.cells_y, [&](int cell_x, int cell_y) {
    const int begin = first_at_least(tile.first_x, tile.columns, cell_x - tiling.x.taps + 1);
    const int end = first_at_least(tile.first_x, tile.columns, cell_x + 1);
    A sum = 0;
    for (int column = begin; column < end; ++column)
      sum += tile.cells[cell_y * tile.pitch + column] *
             tile.weight_x[(cell_x - tile.first_x[column]) * tile.width + column];
    partial[cell_y * tiling.cells_x + cell_x] = sum;
  });
}

// The tiles of an axis that can touch a cell: [begin, end). place() is exact.
struct Reach {
  int begin, end;

  __device__ Reach(const Axis& axis, int64_t cell, int tiles, int pixels) {
    const double scale = double(axis.pixels) / double(axis.cells), span = (axis.taps + 1) * scale;
    const double centre = (double(cell) + 0.5) * scale;
    begin = max(0, static_cast<int>((centre - span) / pixels));
    end = min(tiles, static_cast<int>((centre + span) / pixels) + 1);
  }
};

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
  const Reach over_y(tiling.y, u, tiling.tiles_y, tiling.rows), over_x(tiling.x, j, tiling.tiles_x, tiling.columns);
  A sum = 0;
  for (int ty = over_y.begin; ty < over_y.end; ++ty) {
    const int64_t cell_y = place(tiling.y, ty, tiling.rows, u);
    if (cell_y < 0) continue;
    for (int tx = over_x.begin; tx < over_x.end; ++tx) {
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
template <Given kGiven, typename T, typename M>
void gather_slopes(const Tiling& tiling, const Frame& frame, Rows<const T> grad, Rows<const T> image,
                   Rows<const T> reference, Windows windows, Tensor& grad_mask, const Device& device) {
  using A = acc_t<T>;
  const bool in_packs = frame.repeat == 1 && frame.length % kPackOf<T> == 0;
  const ScalarType sums = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
  Tensor partial = empty_tensor(grad_mask, {frame.B * tiling.tiles(), tiling.cells()}, sums);
  launch(fold_kernel<kGiven, T>, blocks_for(frame.B * tiling.tiles()), dim3(kThreads), tiling.bytes, device, tiling,
         frame, grad, or_else(image, grad), or_else(reference, or_else(image, grad)), windows, in_packs,
         partial.mutable_data_ptr<A>());
  launch(gather_kernel<A, M>, blocks_for(ceil_div(grad_mask.numel(), kThreads)), dim3(kThreads), 0, device, tiling,
         frame.B, partial.const_data_ptr<A>(), grad_mask.mutable_data_ptr<M>());
}

template <typename T, typename M>
void blend_images(const Frame& frame, Rows<const T> image, Rows<const T> reference, Rows<const M> mask, int64_t h,
                  int64_t w, Rows<T> out, const Device& device) {
  check_cells(h, frame.H);
  check_cells(w, frame.W());
  const bool wide =
      frame.length % kPackOf<T> == 0 && begins_on_packs(image) && begins_on_packs(reference) && begins_on_packs(out);
  for_both_or_one(image && reference, [&]<Given kGiven>() {
    const auto start = [&]<int kCount>() {
      const Grid grid(frame.H, frame.length / kCount);
      launch(blend_kernel<kCount, kGiven, T, M>, blocks_for(frame.B * grid.blocks), dim3(kThreads), 0, device, grid,
             frame, or_else(image, reference), or_else(reference, image), !image, mask, unsigned(h), unsigned(w), out);
    };
    wide ? start.template operator()<kPackOf<T>>() : start.template operator()<1>();
  });
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
    const bool wide = !interleaved && w % kPackOf<T> == 0 && begins_on_packs(grads) && begins_on_packs(images) &&
                      begins_on_packs(references);
    for_both_or_one(bool(references), [&]<Given kGiven>() {
      if (h < frame.H || w < frame.W())
        return gather_slopes<kGiven, T, M>(tiling_of<T>(h, w, frame.H, frame.W(), 0, device), frame, grads, images,
                                           references, Windows{}, grad_mask, device);
      const auto start = [&]<int kCount>() {
        const Grid grid(h, w / kCount);
        launch(slopes_kernel<kCount, kGiven, T, M>, blocks_for(frame.B * grid.blocks), dim3(kThreads), 0, device, grid,
               frame, grads, images, or_else(references, images), grad_mask.mutable_data_ptr<M>());
      };
      wide ? start.template operator()<kPackOf<T>>() : start.template operator()<1>();
    });
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
    gather_slopes<Given::none, T, T>(tiling_of<T>(h, w, frame.H, frame.W(), sigma, device), frame,
                                     rows_of<T>(grad, false), none, none, Windows{}, grad_mask, device);
  });
  return grad_mask;
}

// The tiles of frame: M over the images of `in_windows`, into the `out_windows` of out.
template <typename T, typename M>
void jitter_images(const Tiling& tiling, const Frame& frame, Rows<const T> image, Rows<const T> reference,
                   Rows<const M> mask, Rows<T> out, Windows in_windows, Windows out_windows, const Device& device) {
  for_both_or_one(image && reference, [&]<Given kGiven>() {
    launch(jitter_kernel<kGiven, T, M>, blocks_for(frame.B * tiling.tiles()), dim3(kThreads), tiling.bytes, device,
           tiling, frame, or_else(image, reference), or_else(reference, image), !image, mask, out, in_windows,
           out_windows, frame.length % kPackOf<T> == 0);
  });
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
    for_both_or_one(reference.has_value(), [&]<Given kGiven>() {
      gather_slopes<kGiven, T, M>(tiling_of<T>(h, w, H, W, sigma, device), frame, rows_of<T>(grad, interleaved),
                                  rows_of<T>(image, interleaved), rows_of<T>(reference, interleaved),
                                  windows_of(offset, image.size(2), image.size(3), H, W), grad_mask, device);
    });
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
