// Connected components of bits on the CPU, by runs.
//
// A run is a maximal stretch of kept pixels of a row. Runs are numbered in raster order; a union-find forest over these
// numbers, in which a root is always the smallest number, collects them into components: the root of a component is the
// run with its first pixel. The work follows the number of runs:
//
//   edges     Bits that differ from their left neighbour are the starts and ends of the runs, in turn; they are decoded
//             into one stream of pixel numbers.
//   contacts  Between two rows, every maximal stretch of `upper & lower` is one pair of touching runs, so its first bit
//             stands for it. With 8-connectivity a run that starts where one of the other row ends is a pair as well.
//   numbers   The run that holds (or last began before) a bit is found by counting the starts up to it in its word.
//
// No step asks pixel by pixel, and but for the loops over bits none branches on the data.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "common/math.h"
#include "mask_boxes/packing.h"

namespace casm_fast {

// Which runs a row has: [begin, end).
struct RunRange {
  int32_t begin, end;
};

// A row as bits, and where its runs are.
struct RowBits {
  uint64_t* bits;
  uint64_t* edges;  // set where a bit differs from the one before it
  int32_t* first;   // the number of the first run that starts in this word or later
};

// A slot for each run that a mask can have; memory that no run needs is never touched. The rows are cut into bands,
// which may be scanned at the same time.
class Runs {
 public:
  Runs(int64_t height, int64_t width, int64_t band_rows)
      : height_(height),
        width_(width),
        band_rows_(band_rows),
        words_(ceil_div(width, 64)),
        per_row_((width + 1) / 2),
        slots_(per_row_ * height + kSlack * ceil_div(height, band_rows)),
        edges_(new int32_t[2 * slots_]),
        parent_(new int32_t[slots_]),
        area_(new int32_t[kWays * slots_]),
        rows_(new RunRange[height]) {}

  int64_t bands() const { return ceil_div(height_, band_rows_); }

  // Finds the runs of a band and joins them. kConnectivity 0 leaves them apart, for measure_all().
  template <int kConnectivity, typename T, typename Keep>
  void scan(const T* pixels, int64_t band, Keep keep);  // pixels [H, W]

  // Once all bands are scanned: joins each band to the one above.
  template <int kConnectivity, typename T, typename Keep>
  void join_bands(const T* pixels, Keep keep);

  // Once all is joined: points every run at its root.
  void flatten();

  // The same, and sums the lengths of the runs of every component on its root. Returns the root of the largest (the
  // first in raster order among equals), or -1 when there are no runs.
  int32_t find_largest();

  // Box (x0, y0, x1, y1) and area of the component of `root`, or of all runs.
  void measure(int32_t root, int32_t* box, int32_t* area) const;
  void measure_all(int32_t* box, int32_t* area) const;

  // The rows of a band of labels [H, W]: the number of the component's first pixel, plus one; 0 in the background.
  void paint(int64_t band, int32_t* labels) const;

 private:
  static constexpr int kSlack = 16;  // behind each band, because decoding writes whole vectors
  // Areas are summed in as many places, in turn: one sum would make every run of a large component wait for the last.
  static constexpr int kWays = 2;

  int64_t band_end(int64_t band) const { return std::min((band + 1) * band_rows_, height_); }
  int32_t first_slot(int64_t band) const { return int32_t(band * (band_rows_ * per_row_ + kSlack)); }
  int32_t area_of(int32_t run) const {
    int32_t sum = 0;
    for (int way = 0; way < kWays; ++way) sum += area_[int64_t(run) * kWays + way];
    return sum;
  }
  RunRange runs_of(int64_t band) const { return {first_slot(band), rows_[band_end(band) - 1].end}; }

  template <typename T, typename Keep>
  void pack_row(const T* row, Keep keep, uint64_t* bits) const;
  // Where the runs of a row are whose bits are known, the first of them numbered `run`; returns the number behind the
  // last.
  int32_t number_row(RowBits row, int32_t run) const;
  // Writes the ends of the runs of row y, which are joined to nothing yet.
  void decode_row(const RowBits& row, int64_t y, RunRange runs);
  // The same for a row of the same pixels as the one above: each run is joined to the one that it lies under.
  void repeat_row(RowBits row, RunRange above, RunRange runs);
  // kFresh: the runs of the lower row are joined to nothing yet.
  template <int kConnectivity, bool kFresh>
  void join_rows(const RowBits& upper, const RowBits& lower);
  int32_t find(int32_t run);
  void unite(int32_t a, int32_t b);

  int64_t height_, width_, band_rows_, words_, per_row_, slots_;
  std::unique_ptr<int32_t[]> edges_, parent_, area_;  // [runs, 2], [runs], [runs, kWays]
  std::unique_ptr<RunRange[]> rows_;                  // [H]
};

// The memory of the two rows that a scan looks at.
class RowPair {
 public:
  explicit RowPair(int64_t words) : bits_(new uint64_t[4 * words]()), first_(new int32_t[2 * words]()) {
    upper = {bits_.get(), bits_.get() + words, first_.get()};
    lower = {bits_.get() + 2 * words, bits_.get() + 3 * words, first_.get() + words};
  }
  RowBits upper, lower;

 private:
  std::unique_ptr<uint64_t[]> bits_;
  std::unique_ptr<int32_t[]> first_;
};

// Writes origin + i for every set bit i, and some values more that the next call overwrites.
inline int32_t* decode(uint64_t word, int32_t origin, int32_t* out) {
#ifdef __AVX512F__
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i numbers = _mm512_add_epi32(steps, _mm512_set1_epi32(origin));
  for (int i = 0; i < 4; ++i, word >>= 16) {
    const __mmask16 chosen = static_cast<__mmask16>(word);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(chosen, numbers));
    out += std::popcount(static_cast<uint16_t>(word));
    numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(16));
  }
#else
  for (; word; word &= word - 1) *out++ = origin + std::countr_zero(word);
#endif
  return out;
}

template <typename T, typename Keep>
void Runs::pack_row(const T* row, Keep keep, uint64_t* bits) const {
  for (int64_t j = 0; j < words_; ++j) bits[j] = pack(row + 64 * j, int(std::min<int64_t>(64, width_ - 64 * j)), keep);
}

inline int32_t Runs::number_row(RowBits row, int32_t run) const {
  uint64_t carry = 0;
  for (int64_t j = 0; j < words_; ++j) {
    const uint64_t bits = row.bits[j];
    row.edges[j] = bits ^ (bits << 1 | carry);
    row.first[j] = run;
    run += std::popcount(row.edges[j] & bits);
    carry = bits >> 63;
  }
  return run;
}

inline void Runs::decode_row(const RowBits& row, int64_t y, RunRange runs) {
  int32_t* edge = edges_.get() + 2 * int64_t(runs.begin);
  for (int64_t j = 0; j < words_; ++j)
    if (row.edges[j]) edge = decode(row.edges[j], int32_t(y * width_ + 64 * j), edge);
  if (row.bits[words_ - 1] >> 63)
    *edge = int32_t((y + 1) * width_);  // a run that ends with the row, the row with a word
  for (int32_t i = runs.begin; i < runs.end; ++i) parent_[i] = i;
}

inline void Runs::repeat_row(RowBits row, RunRange above, RunRange runs) {
  const int32_t count = runs.end - runs.begin;
  int32_t* const edges = edges_.get();
  const int32_t* const edges_above = edges + 2 * int64_t(above.begin);
  for (int32_t i = 0; i < 2 * count; ++i) edges[2 * int64_t(runs.begin) + i] = edges_above[i] + int32_t(width_);
  for (int32_t i = 0; i < count; ++i) parent_[runs.begin + i] = parent_[above.begin + i];
  for (int64_t j = 0; j < words_; ++j) row.first[j] += count;
}

inline int32_t Runs::find(int32_t run) {
  int32_t* const parent = parent_.get();
  int32_t root = parent[parent[run]];  // two steps are most often enough, and cost no branch
  while (root != parent[root]) {
    parent[root] = parent[parent[root]];
    root = parent[root];
  }
  parent[run] = root;
  return root;
}

inline void Runs::unite(int32_t a, int32_t b) {
  const int32_t root_a = find(a), root_b = find(b);
  parent_[std::max(root_a, root_b)] = std::min(root_a, root_b);
}

template <int kConnectivity, bool kFresh>
void Runs::join_rows(const RowBits& upper, const RowBits& lower) {
  int32_t* const parent = parent_.get();
  uint64_t carry = 0;
  for (int64_t j = 0; j < words_; ++j) {
    const uint64_t up = upper.bits[j], low = lower.bits[j], both = up & low;
    uint64_t contacts = both & ~(both << 1 | carry);
    carry = both >> 63;
    if constexpr (kConnectivity == 8) contacts |= upper.edges[j] & lower.edges[j] & (up ^ low);
    if (!contacts) continue;
    const uint64_t up_starts = upper.edges[j] & up, low_starts = lower.edges[j] & low;
    const int32_t up_first = upper.first[j] - 1, low_first = lower.first[j] - 1;

    // A fresh run's first contact needs no union: the run takes its neighbour's parent. Adding 1
    // at the starts carries through each run up to its first contact (or through a run without one to the gap behind
    // it).
    const uint64_t inside = contacts & low, open = low & ~inside;
    const uint64_t fresh = !kFresh ? 0 : inside & ((open + (low_starts & ~inside)) | low_starts);
    for (uint64_t rest = fresh; rest; rest &= rest - 1) {
      const uint64_t upto = rest ^ (rest - 1);  // the bits up to the lowest, included
      parent[low_first + std::popcount(low_starts & upto)] = parent[up_first + std::popcount(up_starts & upto)];
    }
    for (uint64_t rest = contacts & ~fresh; rest; rest &= rest - 1) {
      const uint64_t upto = rest ^ (rest - 1);
      unite(up_first + std::popcount(up_starts & upto), low_first + std::popcount(low_starts & upto));
    }
  }
}

template <int kConnectivity, typename T, typename Keep>
void Runs::scan(const T* pixels, int64_t band, Keep keep) {
  RowPair rows(words_);
  RunRange above = {0, 0};
  int32_t run = first_slot(band);
  for (int64_t y = band * band_rows_; y < band_end(band); ++y) {
    pack_row(pixels + y * width_, keep, rows.lower.bits);
    const bool joins = kConnectivity != 0 && above.begin != above.end;
    RunRange runs = {run, run + above.end - above.begin};
    if (joins && std::equal(rows.lower.bits, rows.lower.bits + words_, rows.upper.bits)) {
      repeat_row(rows.upper, above, runs);
    } else {
      runs.end = number_row(rows.lower, run);
      decode_row(rows.lower, y, runs);
      if constexpr (kConnectivity != 0) {
        if (joins && runs.begin != runs.end) join_rows<kConnectivity, true>(rows.upper, rows.lower);
      }
      std::swap(rows.upper, rows.lower);
    }
    rows_[y] = above = runs;
    run = runs.end;
  }
}

template <int kConnectivity, typename T, typename Keep>
void Runs::join_bands(const T* pixels, Keep keep) {
  RowPair rows(words_);
  const auto read_again = [&](int64_t y, RowBits out) {
    pack_row(pixels + y * width_, keep, out.bits);
    number_row(out, rows_[y].begin);
  };
  for (int64_t y = band_rows_; y < height_; y += band_rows_) {
    read_again(y - 1, rows.upper);
    read_again(y, rows.lower);
    join_rows<kConnectivity, false>(rows.upper, rows.lower);
  }
}

inline void Runs::flatten() {
  int32_t* const parent = parent_.get();
  for (int64_t band = 0; band < bands(); ++band) {
    const RunRange runs = runs_of(band);
    for (int32_t i = runs.begin; i < runs.end; ++i) parent[i] = parent[parent[i]];
  }
}

inline int32_t Runs::find_largest() {
  int32_t* const parent = parent_.get();
  int32_t* const area = area_.get();
  const int32_t* const edges = edges_.get();
  int32_t largest = -1, most = 0;
  for (int64_t band = 0; band < bands(); ++band) {
    const RunRange runs = runs_of(band);
    for (int32_t i = runs.begin; i < runs.end; ++i) {
      const int32_t root = parent[parent[i]];
      parent[i] = root;
      std::fill_n(area + int64_t(i) * kWays, kWays, 0);  // a root comes before every other run of its component
      area[int64_t(root) * kWays + i % kWays] += edges[2 * int64_t(i) + 1] - edges[2 * int64_t(i)];
    }
  }
  for (int64_t band = 0; band < bands(); ++band) {
    const RunRange runs = runs_of(band);
    int32_t highest = 0;
    for (int32_t i = runs.begin; i < runs.end; ++i) highest = std::max(highest, area_of(i));
    if (highest <= most) continue;
    most = highest;
    for (largest = runs.begin; area_of(largest) != highest;) ++largest;
  }
  return largest;
}

inline void Runs::measure(int32_t root, int32_t* box, int32_t* area) const {
  if (root < 0) {
    std::fill(box, box + 4, 0);
    *area = 0;
    return;
  }
  int64_t y = edges_[2 * int64_t(root)] / width_;
  int32_t x0 = int32_t(width_), x1 = 0;
  box[1] = int32_t(y);
  for (; y < height_; ++y) {
    const int32_t origin = int32_t(y * width_);
    int32_t first = rows_[y].begin, last = rows_[y].end - 1;
    while (first <= last && parent_[first] != root) ++first;
    if (first > last) break;  // a component skips no row
    while (parent_[last] != root) --last;
    x0 = std::min(x0, edges_[2 * int64_t(first)] - origin);
    x1 = std::max(x1, edges_[2 * int64_t(last) + 1] - origin);
  }
  box[0] = x0;
  box[2] = x1;
  box[3] = int32_t(y);
  *area = area_of(root);
}

inline void Runs::measure_all(int32_t* box, int32_t* area) const {
  int32_t x0 = int32_t(width_), x1 = 0, y0 = int32_t(height_), y1 = 0, sum = 0;
  for (int64_t y = 0; y < height_; ++y) {
    const RunRange runs = rows_[y];
    if (runs.begin == runs.end) continue;
    const int32_t origin = int32_t(y * width_);
    x0 = std::min(x0, edges_[2 * int64_t(runs.begin)] - origin);
    x1 = std::max(x1, edges_[2 * int64_t(runs.end) - 1] - origin);
    y0 = std::min(y0, int32_t(y));
    y1 = int32_t(y) + 1;
    for (int32_t i = runs.begin; i < runs.end; ++i) sum += edges_[2 * int64_t(i) + 1] - edges_[2 * int64_t(i)];
  }
  const int32_t found[4] = {x0, y0, x1, y1};
  for (int i = 0; i < 4; ++i) box[i] = sum ? found[i] : 0;
  *area = sum;
}

inline void Runs::paint(int64_t band, int32_t* labels) const {
  std::fill(labels + band * band_rows_ * width_, labels + band_end(band) * width_, 0);
  for (int64_t y = band * band_rows_; y < band_end(band); ++y) {
    for (int64_t i = rows_[y].begin; i < rows_[y].end; ++i)
      std::fill(labels + edges_[2 * i], labels + edges_[2 * i + 1], edges_[2 * int64_t(parent_[i])] + 1);
  }
}

}  // namespace casm_fast
