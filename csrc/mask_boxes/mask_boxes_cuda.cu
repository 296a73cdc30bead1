// mask_boxes and connected_components on CUDA.
//
// One block per image and one launch for the batch, as long as the bits of the image and a slot for each of its
// segments (slots.h) fit into shared memory: 68 bytes for 32 pixels, so 104 KB for 224x224, two images at once on a
// multiprocessor of Hopper, and up to 330x330. The mask is read twice, for the level and for the bits; the second time
// backwards, so that it begins with what the caches still hold, and only few images are under way at a time, so that
// they fit into L2. Bytes per float pixel: 4 from memory, 4 more from L2, and nothing back but the box. Phases of one
// image (reading, unions) overlap with those of its neighbour.
//
// Larger images take the same steps as one launch each over the whole batch, with bits and slots in global memory (2.1
// bytes per pixel); the images' boxes are then collected by integer atomics, whose order does not matter. Limits: rules
// "area" and "energy" read the mask four times more (eight in float64) to select the level, by one block per image.

#include "common/dispatch.h"
#include "common/reduce.h"
#include "mask_boxes/mask_boxes.h"
#include "mask_boxes/slots.h"

namespace casm_fast {
namespace {

constexpr int kThreads = kSumThreads;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kStaticBytes = 4096;  // more than the static shared memory of any kernel here

struct Job {
  int H, W, words;
  Rule rule;
  double alpha;
  bool eight, largest;

  CASM_FAST_HD int64_t pixels() const { return int64_t(H) * W; }
  CASM_FAST_HD int64_t size() const { return int64_t(H) * words; }  // words of an image
  CASM_FAST_HD int64_t shared_bytes() const { return size() * (sizeof(uint32_t) + kSlotBytes); }
};

// `combine` over the block, in every thread. Every thread calls.
template <typename T, typename F>
__device__ T block_reduce(T value, F combine) {
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kFullWarp, value, distance));
  CASM_FAST_SHARED T parts[kWarps];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[0];
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, parts[warp]);
  __syncthreads();  // the next reduction may write parts[]
  return value;
}

struct Lower {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Higher {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};

// ---------------------------------------------------------------- levels
// What one thread gathers about its pixels.
template <typename T>
struct Gathered {
  double sum[2] = {0, 0};
  int count = 0;
  T min = T(INFINITY), max = T(-INFINITY);

  __device__ void add(int lane, T pixel) {
    if (pixel != pixel) return;
    sum[lane] += double(pixel);
    ++count;
    min = Lower()(min, pixel);
    max = Higher()(max, pixel);
  }
};

// Statistics of one block of the sum, n <= kSumBlock, in every thread. kAligned: two pixels can be loaded at once.
template <bool kAligned, typename scalar_t>
__device__ Statistics sum_block(const scalar_t* __restrict__ pixels, int64_t n) {
  using T = acc_t<scalar_t>;
  Gathered<T> mine;
  const int chunks = int(n / kSumLanes), lane = 2 * threadIdx.x;
#pragma unroll 8
  for (int c = 0; c < chunks; ++c) {
    const scalar_t* pair = pixels + c * kSumLanes + lane;
    if constexpr (kAligned) {
      const Pack<scalar_t, 2> both = load_pack<2>(pair);
      mine.add(0, static_cast<T>(both[0]));
      mine.add(1, static_cast<T>(both[1]));
    } else {
      const T first = static_cast<T>(pair[0]), second = static_cast<T>(pair[1]);
      mine.add(0, first);
      mine.add(1, second);
    }
  }
  for (int l = 0; l < 2; ++l) {
    const int64_t i = int64_t(chunks) * kSumLanes + lane + l;
    if (i < n) mine.add(l, static_cast<T>(pixels[i]));
  }
  Statistics s;
  s.sum = block_sum<kThreads>(mine.sum[0] + mine.sum[1]);
  s.count = block_sum<kThreads>(mine.count);
  s.min = double(block_reduce(mine.min, Lower()));
  s.max = double(block_reduce(mine.max, Higher()));
  return s;
}

template <typename scalar_t>
__device__ Statistics block_statistics(const scalar_t* pixels, int64_t n) {
  const bool aligned = reinterpret_cast<uintptr_t>(pixels) % (2 * sizeof(scalar_t)) == 0;
  return aligned ? sum_block<true>(pixels, n) : sum_block<false>(pixels, n);
}

__device__ inline void add(Statistics& all, const Statistics& block) {
  all.sum += block.sum;
  all.count += block.count;
  all.min = Lower()(all.min, block.min);
  all.max = Higher()(all.max, block.max);
}

// What a pixel counts for in a selection: one, or its mass.
struct Weight {
  bool masses;
  Mass mass;
  __device__ int64_t operator()(double pixel) const { return masses ? mass(pixel) : 1; }
};

// Sums of whole numbers in shared memory. Its 64-bit atomics are loops, so a sum is two words of 32 bits, and a carry
// of the lower goes to the upper; numbers below 2^32 seldom touch the upper.
template <int kCount>
struct Sums {
  unsigned low[kCount], high[kCount];

  __device__ void clear(int i) { low[i] = high[i] = 0; }
  __device__ void add(int i, int64_t number) {
    const unsigned lower = static_cast<unsigned>(number);
    const unsigned carry = atomicAdd(&low[i], lower) > ~lower;
    const unsigned upper = static_cast<unsigned>(number >> 32) + carry;
    if (upper) atomicAdd(&high[i], upper);
  }
  __device__ int64_t operator[](int i) const { return static_cast<int64_t>(high[i]) << 32 | low[i]; }
};

// The highest pixel such that the weights of it and of all above it add up to `target` or more: radix descent by eight
// bits, whole numbers in the histogram. Every thread calls, and gets the result.
template <typename scalar_t>
__device__ acc_t<scalar_t> select_from_top(const scalar_t* pixels, int64_t n, int64_t target, const Weight& weight) {
  using T = acc_t<scalar_t>;
  using Key = decltype(ordered_key(T()));
  constexpr int kBits = 8 * sizeof(Key), kBuckets = 256;
  CASM_FAST_SHARED Sums<kBuckets> histogram;
  CASM_FAST_SHARED int64_t found[2];  // the bucket, and what is left of the target in it
  Key prefix = 0;
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kBuckets; i += kThreads) histogram.clear(i);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const T pixel = static_cast<T>(pixels[i]);
      const Key key = ordered_key(pixel);
      const bool candidate = shift == kBits - 8 || key >> (shift + 8) == prefix >> (shift + 8);
      if (candidate && pixel == pixel) histogram.add(int(key >> shift & (kBuckets - 1)), weight(double(pixel)));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bucket = kBuckets - 1;
      int64_t left = target;
      for (; bucket > 0 && histogram[bucket] < left; --bucket) left -= histogram[bucket];
      found[0] = bucket;
      found[1] = left;
    }
    __syncthreads();
    prefix |= static_cast<Key>(found[0]) << shift;
    target = found[1];
  }
  __syncthreads();  // found[] is read
  return value_of_key(prefix);
}

// The level of one mask from its statistics: pixels >= it are kept. Every thread calls, and gets the result.
template <typename scalar_t>
__device__ acc_t<scalar_t> level_of(const scalar_t* pixels, int64_t n, const Statistics& s, Rule rule, double alpha) {
  using T = acc_t<scalar_t>;
  if (s.count == 0) return T(NAN);
  if (rule == Rule::mean) return mean_level<T>(s, alpha);
  if (rule == Rule::value) return value_level<T>(s, alpha);
  const bool masses = rule == Rule::energy;
  if (masses && (!(s.max > 0) || s.max == double(INFINITY))) return T(s.max);  // no mass, or an infinite one
  const Weight weight{masses, Mass(masses ? s.max : 1, s.count)};
  int64_t target;
  if (masses) {
    long long part = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) part += weight(double(static_cast<T>(pixels[i])));
    target = mass_target(block_sum<kThreads>(part), alpha);
  } else {
    target = quantile_depth(s, alpha);
  }
  const T found = select_from_top(pixels, n, target, weight);
  return masses ? found : above_quantile(found);
}

template <typename scalar_t>
__device__ acc_t<scalar_t> find_level(const scalar_t* pixels, const Job& job) {
  const int64_t n = job.pixels();
  Statistics all = block_statistics(pixels, n < kSumBlock ? n : kSumBlock);
  for (int64_t start = kSumBlock; start < n; start += kSumBlock)
    add(all, block_statistics(pixels + start, n - start < kSumBlock ? n - start : kSumBlock));
  return level_of(pixels, n, all, job.rule, job.alpha);
}

// ---------------------------------------------------------------- bits
// The bits of words [first, last) of an image, by one block, from the last word to the first. A warp takes every
// kWarps-th word; how far that is in rows and words is known before, so that no pixel costs a division.
template <typename scalar_t, typename Keep>
__device__ void pack_words(const scalar_t* __restrict__ pixels, const Job& job, int first, int last, Keep keep,
                           uint32_t* bits) {
  constexpr int kBatch = 8;  // loads under way at once
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int k = last - 1 - warp;  // the word, whose first pixel is (y, 32 * word)
  if (k < first) return;
  int y = k / job.words, word = k - y * job.words;
  const int step_y = kWarps / job.words, step_word = kWarps - step_y * job.words;
  const scalar_t* pixel = pixels + int64_t(y) * job.W + 32 * word + lane;
  const int64_t back = int64_t(step_y) * job.W + 32 * step_word, turn = 32 * job.words - job.W;
  while (k >= first) {
    bool kept[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      kept[i] = k - i * kWarps >= first && 32 * word + lane < job.W && keep(*pixel);
      pixel -= back;
      word -= step_word;
      if (word < 0) {  // in the row above
        word += job.words;
        pixel += turn;
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t packed = __ballot_sync(kFullWarp, kept[i]);
      if (lane == 0 && k - i * kWarps >= first) bits[k - i * kWarps] = packed;
    }
    k -= kBatch * kWarps;
  }
}

// Pixels >= a level in the precision of the level.
template <typename scalar_t>
struct Reaches {
  acc_t<scalar_t> level;
  __device__ bool operator()(scalar_t pixel) const { return static_cast<acc_t<scalar_t>>(pixel) >= level; }
};
template <typename scalar_t>
struct Differs {
  __device__ bool operator()(scalar_t pixel) const {
    const auto value = static_cast<acc_t<scalar_t>>(pixel);
    return value != 0 && value == value;
  }
};

// ---------------------------------------------------------------- areas and boxes
// Adds the areas of the words of a warp (k differs between lanes; words past the end are empty) to their roots.
// Neighbours most often share a root: sums go on in a register, and once per warp, before they meet in memory.
__device__ inline void add_areas(const Forest& forest, int k) {
  int root = -1, area = 0;
  for_each_segment(k < forest.size() ? forest.bits[k] : 0, k, [&](const Segment& segment) {
    const int other = forest.root_of(segment.slot);
    if (other != root) {
      if (root >= 0) atomicAdd(forest.slots + root, area);
      root = other;
      area = 0;
    }
    area += segment.last - segment.first;
  });
  const unsigned pending = __ballot_sync(kFullWarp, root >= 0);
  if (!pending) return;
  const int leader = __ffs(pending) - 1, shared_root = __shfl_sync(kFullWarp, root, leader);
  const int sum = __reduce_add_sync(kFullWarp, root == shared_root ? area : 0);
  if (int(threadIdx.x % 32) == leader)
    atomicAdd(forest.slots + root, sum);
  else if (root >= 0 && root != shared_root)
    atomicAdd(forest.slots + root, area);
}

// Components in the order of "largest": by area, among equals the first. 0 stands for none.
__device__ inline unsigned long long rank_of(int32_t area, int root) {
  return static_cast<unsigned long long>(area) << 32 | static_cast<uint32_t>(~root);
}
__device__ inline int root_of_rank(unsigned long long rank) { return static_cast<int>(~static_cast<uint32_t>(rank)); }

// The highest rank among the roots of word k, after add_areas().
__device__ inline unsigned long long best_of(const Forest& forest, int k) {
  unsigned long long best = 0;
  const int segments = __popc(starts_of(forest.bits[k]));
  for (int slot = kSlotsPerWord * k; slot < kSlotsPerWord * k + segments; ++slot) {
    const int32_t held = forest.read(slot);
    if (held >= 0) best = Higher()(best, rank_of(held - slot, slot));
  }
  return best;
}

// A box that grows.
struct Extent {
  int x0, y0, x1, y1, area;

  __device__ explicit Extent(const Job& job) : x0(job.W), y0(job.H), x1(0), y1(0), area(0) {}

  __device__ void add(int y, int first, int last) {
    x0 = Lower()(x0, first);
    y0 = Lower()(y0, y);
    x1 = Higher()(x1, last);
    y1 = Higher()(y1, y + 1);
    area += last - first;
  }
  // The segments of word k of the component of `root`, or all when root < 0.
  __device__ void add_word(const Forest& forest, int k, int root) {
    const int y = k / forest.words, x = 32 * (k - y * forest.words);
    for_each_segment(forest.bits[k], k, [&](const Segment& segment) {
      if (root < 0 || forest.root_of(segment.slot) == root) add(y, x + segment.first, x + segment.last);
    });
  }
  // Over the block, in every thread.
  __device__ void reduce() {
    x0 = block_reduce(x0, Lower());
    y0 = block_reduce(y0, Lower());
    x1 = block_reduce(x1, Higher());
    y1 = block_reduce(y1, Higher());
    area = block_sum<kThreads>(area);
  }
};

__device__ inline void store_box(const Extent& extent, int32_t* box, int32_t* area) {
  const bool some = extent.area > 0;
  box[0] = some ? extent.x0 : 0;
  box[1] = some ? extent.y0 : 0;
  box[2] = some ? extent.x1 : 0;
  box[3] = some ? extent.y1 : 0;
  *area = extent.area;
}

// ---------------------------------------------------------------- one block per image
// Steps 1 to 3 of slots.h.
__device__ void build_forest(const Forest& forest, bool eight) {
  for (int k = threadIdx.x; k < forest.size(); k += kThreads) forest.plant(k);
  __syncthreads();
  for (int k = threadIdx.x; k < forest.size(); k += kThreads) forest.join(k, eight);
  __syncthreads();
  for (int k = threadIdx.x; k < forest.size(); k += kThreads) forest.flatten(k);
  __syncthreads();
}

// mask [B, H, W], levels [B] or none, boxes [B, 4], area [B]
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2)
    boxes_kernel(const scalar_t* mask, const acc_t<scalar_t>* levels, int32_t* boxes, int32_t* area, Job job) {
  uint32_t* bits = dynamic_shared<uint32_t>();
  const Forest forest{bits, reinterpret_cast<int32_t*>(bits + job.size()), job.H, job.words};
  const int64_t b = blockIdx.x;
  const scalar_t* image = mask + b * job.pixels();

  // 1. The level, then the bits.
  const Reaches<scalar_t> keep{levels ? levels[b] : find_level(image, job)};
  pack_words(image, job, 0, forest.size(), keep, bits);
  __syncthreads();

  // 2. Components, their areas, the largest.
  int root = -1;
  if (job.largest) {
    build_forest(forest, job.eight);
    for (int k = threadIdx.x; k - int(threadIdx.x) < forest.size(); k += kThreads) add_areas(forest, k);
    __syncthreads();
    unsigned long long best = 0;
    for (int k = threadIdx.x; k < forest.size(); k += kThreads) best = Higher()(best, best_of(forest, k));
    best = block_reduce(best, Higher());
    root = best ? root_of_rank(best) : -1;  // with no component there is no segment either
  }

  // 3. Its box.
  Extent extent(job);
  for (int k = threadIdx.x; k < forest.size(); k += kThreads) extent.add_word(forest, k, root);
  extent.reduce();
  if (threadIdx.x == 0) store_box(extent, boxes + 4 * b, area + b);
}

// The label of every pixel of word k, by one warp. The payload of a root is its label.
__device__ inline void write_labels(const Forest& forest, int k, int W, int32_t* labels) {
  const int lane = threadIdx.x % 32, y = k / forest.words, x = 32 * (k - y * forest.words) + lane;
  if (x >= W) return;
  const bool kept = forest.bits[k] >> lane & 1;
  labels[int64_t(y) * W + x] = kept ? forest.read(forest.root_of(forest.slot_at(k, lane))) : 0;
}

// Gives the roots of word k their payload: the number of the first pixel, plus one.
__device__ inline void name_roots(const Forest& forest, int k, int W) {
  const int y = k / forest.words, x = 32 * (k - y * forest.words);
  for_each_segment(forest.bits[k], k, [&](const Segment& segment) {
    if (forest.read(segment.slot) >= 0) forest.slots[segment.slot] = y * W + x + segment.first + 1;
  });
}

// binary, labels [B, H, W]
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2) labels_kernel(const scalar_t* binary, int32_t* labels, Job job) {
  uint32_t* bits = dynamic_shared<uint32_t>();
  const Forest forest{bits, reinterpret_cast<int32_t*>(bits + job.size()), job.H, job.words};
  const int64_t plane = blockIdx.x * job.pixels();
  pack_words(binary + plane, job, 0, forest.size(), Differs<scalar_t>(), bits);
  __syncthreads();
  build_forest(forest, job.eight);
  for (int k = threadIdx.x; k < forest.size(); k += kThreads) name_roots(forest, k, job.W);
  __syncthreads();
  for (int k = threadIdx.x / 32; k < forest.size(); k += kWarps) write_labels(forest, k, job.W, labels + plane);
}

// ---------------------------------------------------------------- a grid for the batch
// The memory of images that one block cannot hold.
struct Large {
  uint32_t* bits;            // [B, H, words]
  int32_t* slots;            // [B, H, words, 16]
  unsigned long long* best;  // [B], the rank of the largest component
  Job job;

  __device__ Forest forest(int64_t b) const {
    return {bits + b * job.size(), slots + b * job.size() * kSlotsPerWord, job.H, job.words};
  }
};

constexpr int kWordsPerBlock = 8 * kThreads;  // enough work to pay for a block's start

// Blocks of words x images. Images past what a grid can have in y go round.
dim3 grid_of(const Job& job, int64_t B) {
  return dim3(static_cast<unsigned>(ceil_div(job.size(), kWordsPerBlock)),
              static_cast<unsigned>(B < 65535 ? B : 65535));
}

// Calls `f(forest, k)` for the words of this block's part of image b, one word per thread; k passes the end in the last
// warps when kWhole.
template <bool kWhole, typename F>
__device__ void for_each_word(const Large& large, int64_t b, const F& f) {
  const Forest forest = large.forest(b);
  const int first = blockIdx.x * kWordsPerBlock;
  for (int k = first + threadIdx.x; k - int(threadIdx.x % 32) < first + kWordsPerBlock; k += kThreads)
    if (kWhole || k < forest.size()) f(forest, k);
}

// parts [B, blocks]
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const scalar_t* mask, Statistics* parts, int64_t B, int64_t n) {
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    const int64_t start = blockIdx.x * kSumBlock;
    const Statistics s = block_statistics(mask + b * n + start, n - start < kSumBlock ? n - start : kSumBlock);
    if (threadIdx.x == 0) parts[b * gridDim.x + blockIdx.x] = s;
  }
}

// parts [B, blocks], levels [B]
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    level_kernel(const scalar_t* mask, const Statistics* parts, int64_t blocks, acc_t<scalar_t>* levels, Job job) {
  const int64_t b = blockIdx.x;
  Statistics all = parts[b * blocks];
  for (int64_t i = 1; i < blocks; ++i) add(all, parts[b * blocks + i]);
  const acc_t<scalar_t> level = level_of(mask + b * job.pixels(), job.pixels(), all, job.rule, job.alpha);
  if (threadIdx.x == 0) levels[b] = level;
}

// Bits, planted slots, and empty results: boxes hold {W - x0, H - y0, x1, y1} until finish_kernel, so that all grow.
template <typename scalar_t, typename Keep>
__global__ void __launch_bounds__(kThreads) pack_kernel(const scalar_t* pixels, const acc_t<scalar_t>* levels,
                                                        int32_t* boxes, int32_t* area, Large large, int64_t B) {
  const Job& job = large.job;
  const int64_t first = int64_t(blockIdx.x) * kWordsPerBlock;
  const int last = int(first + kWordsPerBlock < job.size() ? first + kWordsPerBlock : job.size());
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    Keep keep;
    if constexpr (std::is_same_v<Keep, Reaches<scalar_t>>) keep.level = levels[b];
    pack_words(pixels + b * job.pixels(), job, int(first), last, keep, large.bits + b * job.size());
    __syncthreads();
    for_each_word<false>(large, b, [&](const Forest& forest, int k) { forest.plant(k); });
    if (boxes && blockIdx.x == 0 && threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) boxes[4 * b + i] = 0;
      area[b] = 0;
      large.best[b] = 0;
    }
  }
}

enum class Step { join, flatten, add_areas, find_best, name_roots };

// One step of the components, for every word of the batch.
template <Step kStep>
__global__ void __launch_bounds__(kThreads) step_kernel(Large large, int64_t B) {
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    unsigned long long best = 0;
    for_each_word<kStep == Step::add_areas>(large, b, [&](const Forest& forest, int k) {
      if constexpr (kStep == Step::join) forest.join(k, large.job.eight);
      if constexpr (kStep == Step::flatten) forest.flatten(k);
      if constexpr (kStep == Step::add_areas) add_areas(forest, k);
      if constexpr (kStep == Step::find_best) best = Higher()(best, best_of(forest, k));
      if constexpr (kStep == Step::name_roots) name_roots(forest, k, large.job.W);
    });
    if constexpr (kStep == Step::find_best) {
      best = block_reduce(best, Higher());
      if (threadIdx.x == 0 && best) atomicMax(large.best + b, best);
    }
  }
}

__global__ void __launch_bounds__(kThreads) extent_kernel(int32_t* boxes, int32_t* area, Large large, int64_t B) {
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    const int root = large.job.largest && large.best[b] ? root_of_rank(large.best[b]) : -1;
    Extent extent(large.job);
    for_each_word<false>(large, b, [&](const Forest& forest, int k) { extent.add_word(forest, k, root); });
    extent.reduce();
    if (threadIdx.x != 0 || extent.area == 0) continue;
    atomicMax(boxes + 4 * b, large.job.W - extent.x0);
    atomicMax(boxes + 4 * b + 1, large.job.H - extent.y0);
    atomicMax(boxes + 4 * b + 2, extent.x1);
    atomicMax(boxes + 4 * b + 3, extent.y1);
    atomicAdd(area + b, extent.area);
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(int32_t* boxes, const int32_t* area, Job job, int64_t B) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= B || area[b] == 0) return;
  boxes[4 * b] = job.W - boxes[4 * b];
  boxes[4 * b + 1] = job.H - boxes[4 * b + 1];
}

__global__ void __launch_bounds__(kThreads) write_labels_kernel(int32_t* labels, Large large, int64_t B) {
  const int first = blockIdx.x * kWordsPerBlock;
  for (int64_t b = blockIdx.y; b < B; b += gridDim.y) {
    const Forest forest = large.forest(b);
    const int last = first + kWordsPerBlock < forest.size() ? first + kWordsPerBlock : forest.size();
    for (int k = first + int(threadIdx.x) / 32; k < last; k += kWarps)
      write_labels(forest, k, large.job.W, labels + b * large.job.pixels());
  }
}

// ---------------------------------------------------------------- callers
// The tensors behind a Large; they must outlive the launches' submission only, as memory is reused in stream order.
struct Scratch {
  Tensor bits, slots, best;
  Scratch(const Tensor& like, int64_t B, const Job& job)
      : bits(torch::stable::new_empty(like, {B, job.size()}, ScalarType::Int)),
        slots(torch::stable::new_empty(like, {B, job.size(), kSlotsPerWord}, ScalarType::Int)),
        best(torch::stable::new_empty(like, {B}, ScalarType::Long)) {}
  Large large(const Job& job) {
    return {reinterpret_cast<uint32_t*>(bits.mutable_data_ptr<int32_t>()), slots.mutable_data_ptr<int32_t>(),
            reinterpret_cast<unsigned long long*>(best.mutable_data_ptr<int64_t>()), job};
  }
};

bool fits_one_block(const Job& job, int32_t device) {
  return job.shared_bytes() <= max_shared_bytes(device) - kStaticBytes;
}

template <Step kStep>
void step(const Large& large, int64_t B, int32_t device) {
  launch(step_kernel<kStep>, grid_of(large.job, B), dim3(kThreads), 0, device, large, B);
}

// The levels of large masks by the rule of the job, [B].
template <typename scalar_t>
Tensor find_levels(const Tensor& mask, const Job& job, int32_t device) {
  const int64_t B = mask.size(0), blocks = ceil_div(job.pixels(), kSumBlock);
  const bool wide = sizeof(acc_t<scalar_t>) == sizeof(double);
  Tensor levels = torch::stable::new_empty(mask, {B}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor parts = torch::stable::new_empty(mask, {B, blocks, int64_t(sizeof(Statistics) / 8)}, ScalarType::Double);
  Statistics* const statistics = reinterpret_cast<Statistics*>(parts.mutable_data_ptr<double>());
  const scalar_t* const pixels = mask.const_data_ptr<scalar_t>();
  launch(statistics_kernel<scalar_t>, dim3(unsigned(blocks), unsigned(B < 65535 ? B : 65535)), dim3(kThreads), 0,
         device, pixels, statistics, B, job.pixels());
  launch(level_kernel<scalar_t>, dim3(unsigned(B)), dim3(kThreads), 0, device, pixels, statistics, blocks,
         levels.mutable_data_ptr<acc_t<scalar_t>>(), job);
  return levels;
}

template <typename scalar_t>
void large_boxes(const Tensor& mask, const Tensor& levels, int32_t* boxes, int32_t* area, const Job& job,
                 int32_t device) {
  const int64_t B = mask.size(0);
  Scratch scratch(mask, B, job);
  const Large large = scratch.large(job);
  const dim3 grid = grid_of(job, B);
  launch(pack_kernel<scalar_t, Reaches<scalar_t>>, grid, dim3(kThreads), 0, device, mask.const_data_ptr<scalar_t>(),
         levels.const_data_ptr<acc_t<scalar_t>>(), boxes, area, large, B);
  if (job.largest) {
    step<Step::join>(large, B, device);
    step<Step::flatten>(large, B, device);
    step<Step::add_areas>(large, B, device);
    step<Step::find_best>(large, B, device);
  }
  launch(extent_kernel, grid, dim3(kThreads), 0, device, boxes, area, large, B);
  launch(finish_kernel, dim3(unsigned(ceil_div(B, kThreads))), dim3(kThreads), 0, device, boxes, area, job, B);
}

Job job_of(const Tensor& mask, Rule rule, double alpha, int64_t connectivity, bool largest) {
  const int64_t H = mask.size(2), W = mask.size(3);
  return {int(H), int(W), int(ceil_div(W, 32)), rule, alpha, connectivity == 8, largest};
}

std::tuple<Tensor, Tensor> mask_boxes(const Tensor& mask_in, std::optional<Tensor> level_in, std::string rule,
                                      double alpha, int64_t connectivity, std::string component) {
  check_mask_boxes(mask_in, level_in, connectivity);
  const Device device(mask_in);
  const Tensor mask = torch::stable::contiguous(mask_in);
  const int64_t B = mask.size(0);
  const Job job = job_of(mask, level_in ? Rule::level : rule_of(rule), alpha, connectivity, is_largest(component));
  Tensor boxes = torch::stable::new_empty(mask, {B, 4}, ScalarType::Int);
  Tensor area = torch::stable::new_empty(mask, {B}, ScalarType::Int);
  int32_t* const box = boxes.mutable_data_ptr<int32_t>();
  int32_t* const areas = area.mutable_data_ptr<int32_t>();
  for_cuda_dtype(mask, [&]<typename scalar_t>() {
    std::optional<Tensor> levels;
    if (level_in) levels = torch::stable::contiguous(*level_in);
    if (fits_one_block(job, device)) {
      launch(boxes_kernel<scalar_t>, dim3(unsigned(B)), dim3(kThreads), job.shared_bytes(), device,
             mask.const_data_ptr<scalar_t>(), levels ? levels->const_data_ptr<acc_t<scalar_t>>() : nullptr, box, areas,
             job);
    } else {
      if (!levels) levels = find_levels<scalar_t>(mask, job, device);
      large_boxes<scalar_t>(mask, *levels, box, areas, job, device);
    }
  });
  return {boxes, area};
}

template <typename scalar_t>
void label(const Tensor& binary, const Job& job, int32_t* labels, int32_t device) {
  const int64_t B = binary.size(0);
  const scalar_t* const pixels = static_cast<const scalar_t*>(binary.const_data_ptr());
  if (fits_one_block(job, device)) {
    launch(labels_kernel<scalar_t>, dim3(unsigned(B)), dim3(kThreads), job.shared_bytes(), device, pixels, labels, job);
    return;
  }
  Scratch scratch(binary, B, job);
  const Large large = scratch.large(job);
  launch(pack_kernel<scalar_t, Differs<scalar_t>>, grid_of(job, B), dim3(kThreads), 0, device, pixels, nullptr, nullptr,
         nullptr, large, B);
  step<Step::join>(large, B, device);
  step<Step::flatten>(large, B, device);
  step<Step::name_roots>(large, B, device);
  launch(write_labels_kernel, grid_of(job, B), dim3(kThreads), 0, device, labels, large, B);
}

Tensor connected_components(const Tensor& binary_in, int64_t connectivity) {
  check_binary(binary_in, connectivity);
  const Device device(binary_in);
  const Tensor binary = torch::stable::contiguous(binary_in);
  const Job job = job_of(binary, Rule::level, 0, connectivity, true);
  Tensor labels = torch::stable::new_empty(binary, binary.sizes(), ScalarType::Int);
  int32_t* const out = labels.mutable_data_ptr<int32_t>();
  const ScalarType dtype = binary.scalar_type();
  if (dtype == ScalarType::Bool || dtype == ScalarType::Byte)
    label<uint8_t>(binary, job, out, device);
  else
    for_cuda_dtype(binary, [&]<typename scalar_t>() { label<scalar_t>(binary, job, out, device); });
  return labels;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CASM_FAST_CUDA_KEY, m) {
  m.impl("mask_boxes", TORCH_BOX(&casm_fast::mask_boxes));
  m.impl("connected_components", TORCH_BOX(&casm_fast::connected_components));
}
