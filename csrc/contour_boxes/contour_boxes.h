// The contours of {map > level} for all 256 levels of an 8-bit map at once. casm_fast/ops/contour_boxes.py says what
// the ops compute.
//
// From one level to the next, pixels are only added to {map > level} (downwards) or to its complement (upwards). So one
// sweep over the pixels in the order of their values, with a union-find over the regions that they form, passes through
// every state in turn:
//
//   outer   A contour around a component is a region of the sweep downwards, 8-connected.
//   hole    A contour around a hole is a region of the sweep upwards, 4-connected, that does not touch the border of
//   the
//           map; the contour runs through the pixels around it, one further on every side.
//   area    A contour's polygon runs through the centres of pixels. Its area is that of the squares between four
//   centres:
//           all of a square with four pixels inside the contour, half of one with three, nothing of others. A pixel
//           that is added decides about its four squares only, and all pixels of a square with three belong to one
//           region.
//   holes   count as inside. So areas are those of the map with its holes filled: each pixel rises to the lowest value
//           that some path of neighbours (4) to the border stays at or below. The filled map's regions are the
//           outermost contours, and nothing inside one is as large.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "common/checks.h"

namespace casm_fast {

constexpr int kLevels = 256;

inline void check_maps(const Tensor& maps) {
  STD_TORCH_CHECK(maps.dim() == 4 && maps.size(1) == 1, "expected [B, 1, H, W]");
  STD_TORCH_CHECK(maps.scalar_type() == ScalarType::Byte, "expected uint8 maps");
  STD_TORCH_CHECK(maps.size(2) > 0 && maps.size(3) > 0, "expected pixels");
  STD_TORCH_CHECK((maps.size(2) + 2) * (maps.size(3) + 2) < (int64_t(1) << 30), "expected fewer than 2^30 pixels");
}

struct Extent {  // of pixels, the last ones included
  int32_t x0, y0, x1, y1;

  void add(const Extent& other) {
    x0 = std::min(x0, other.x0), y0 = std::min(y0, other.y0);
    x1 = std::max(x1, other.x1), y1 = std::max(y1, other.y1);
  }

  bool holds(const Extent& other) const { return x0 <= other.x0 && y0 <= other.y0 && x1 >= other.x1 && y1 >= other.y1; }
};

// What a pixel that is added can tell from the eight around it, those that are there already being set bits: bit i is
// neighbour i in the order of Frame::steps.
struct Surroundings {
  uint8_t area;                 // twice the area that it adds: half a square with its third pixel, half with its fourth
  uint8_t count;                // of the neighbours below
  std::array<uint8_t, 4> ways;  // one neighbour of each group that does not hang together around the pixel
};

template <int kConnectivity>
const std::array<Surroundings, 256>& surroundings() {
  static const auto all = [] {
    constexpr int kY[8] = {-1, -1, -1, 0, 0, 1, 1, 1}, kX[8] = {-1, 0, 1, -1, 1, -1, 0, 1};
    constexpr int kSquares[4] = {0b00001011, 0b00010110, 0b01101000, 0b11010000};
    const auto touch = [&](int i, int j) {
      const int y = std::abs(kY[i] - kY[j]), x = std::abs(kX[i] - kX[j]);
      return kConnectivity == 8 ? std::max(y, x) == 1 : y + x == 1;
    };
    std::array<Surroundings, 256> table{};
    for (int around = 0; around < 256; ++around) {
      Surroundings& entry = table[around];
      for (int square : kSquares) entry.area += std::popcount(unsigned(around & square)) >= 2;
      int seen = 0;
      for (int i = 0; i < 8; ++i) {
        const bool neighbour = kConnectivity == 8 || kY[i] == 0 || kX[i] == 0;
        if (!neighbour || !(around & ~seen & 1 << i)) continue;
        entry.ways[entry.count++] = uint8_t(i);
        int group = 1 << i;
        for (int round = 0; round < 8; ++round)
          for (int j = 0; j < 8; ++j)
            for (int k = 0; k < 8; ++k)
              if ((group & 1 << k) && (around & 1 << j) && touch(j, k)) group |= 1 << j;
        seen |= group;
      }
    }
    return table;
  }();
  return all;
}

// A map with a border of one pixel, so that every pixel has eight neighbours. A place is a pixel's number in it.
struct Frame {
  int64_t H, W, stride;
  std::array<int32_t, 8> steps;  // to the neighbours, in raster order
  uint64_t reciprocal;           // of the stride: place / stride without a division, exact below 2^32

  Frame(int64_t H, int64_t W) : H(H), W(W), stride(W + 2), reciprocal(UINT64_MAX / uint64_t(stride) + 1) {
    const auto s = int32_t(stride);
    steps = {-s - 1, -s, -s + 1, -1, 1, s - 1, s, s + 1};
  }

  int64_t size() const { return (H + 2) * stride; }
  int32_t place(int64_t y, int64_t x) const { return int32_t((y + 1) * stride + x + 1); }
  Extent pixel(int32_t place) const {
    const auto row = int32_t((static_cast<unsigned __int128>(reciprocal) * uint32_t(place)) >> 64);
    const int32_t y = row - 1, x = place - row * int32_t(stride) - 1;
    return {x, y, x, y};
  }
};

// The places of a map in the order of their values, those of equal ones in raster order.
inline void sort_places(const Frame& frame, const uint8_t* values, int32_t* order) {  // values [H + 2, W + 2]
  std::array<int32_t, kLevels + 1> starts{};
  for (int64_t y = 0; y < frame.H; ++y)
    for (int32_t place = frame.place(y, 0); place < frame.place(y, frame.W); ++place) ++starts[values[place] + 1];
  for (int v = 0; v < kLevels; ++v) starts[v + 1] += starts[v];
  for (int64_t y = 0; y < frame.H; ++y)
    for (int32_t place = frame.place(y, 0); place < frame.place(y, frame.W); ++place)
      order[starts[values[place]]++] = place;
}

// Regions of pixels that are added one by one. Only a pixel without neighbours starts one, so that there are far fewer
// than pixels; only a pixel whose neighbours do not hang together around it may join two.
template <typename Region>
class Regions {
 public:
  explicit Regions(const Frame& frame) : frame_(frame), present_(frame.size()), label_(frame.size()) {}

  void clear() {
    std::fill(present_.begin(), present_.end(), 0);
    parents_.clear();
    regions_.clear();
  }

  // Adds a pixel: `start()` makes its region, or `merge(into, from)` joins what it touches. Gives the region's number;
  // the caller puts the pixel into the region.
  template <int kConnectivity, typename Start, typename Merge>
  int32_t add(int32_t place, const Surroundings& around, const Start& start, const Merge& merge) {
    int32_t mine;
    if (around.count == 0) {
      mine = int32_t(parents_.size());
      parents_.push_back(mine);
      regions_.push_back(start());
    } else {
      mine = find(label_[place + frame_.steps[around.ways[0]]]);
      for (int i = 1; i < around.count; ++i) {
        const int32_t other = find(label_[place + frame_.steps[around.ways[i]]]);
        if (other == mine) continue;
        const int32_t into = std::min(mine, other), from = std::max(mine, other);
        parents_[from] = into;
        merge(regions_[into], regions_[from]);
        mine = into;
      }
    }
    present_[place] = 1;
    label_[place] = mine;
    return mine;
  }

  const Surroundings& around(int32_t place, const std::array<Surroundings, 256>& table) const {
    const uint8_t *const here = present_.data() + place, *const up = here - frame_.stride,
                         *const down = here + frame_.stride;
    return table[up[-1] | up[0] << 1 | up[1] << 2 | here[-1] << 3 | here[1] << 4 | down[-1] << 5 | down[0] << 6 |
                 down[1] << 7];
  }

  int32_t find(int32_t region) {
    int32_t* const parents = parents_.data();
    while (parents[region] != region) {
      parents[region] = parents[parents[region]];
      region = parents[region];
    }
    return region;
  }

  bool alive(int32_t region) const { return parents_[region] == region; }
  int32_t count() const { return int32_t(parents_.size()); }
  Region& operator[](int32_t region) { return regions_[region]; }

 private:
  const Frame& frame_;
  std::vector<uint8_t> present_;  // [H + 2, W + 2]
  std::vector<int32_t> label_;    // [H + 2, W + 2], the region that a pixel was added to
  std::vector<int32_t> parents_;
  std::vector<Region> regions_;
};

// The box of the contour with the largest area, for every level of one map.
class LargestContour {
 public:
  LargestContour(int64_t H, int64_t W)
      : frame_(H, W), map_(frame_.size()), filled_(frame_.size()), order_(H * W), regions_(frame_) {}

  void operator()(const uint8_t* map, int32_t* boxes) {  // map [H, W], boxes [256, 4], half-open
    fill_holes(map);
    sort_places(frame_, filled_.data(), order_.data());
    std::fill(boxes, boxes + 4 * kLevels, 0);
    regions_.clear();
    live_.clear();
    best_ = kNone;
    for (size_t i = order_.size(); i > 0;) {
      const uint8_t value = filled_[order_[i - 1]];
      if (value == 0) break;  // no level is below 0
      touched_.clear();
      for (; i > 0 && filled_[order_[i - 1]] == value; --i) add(order_[i - 1], value);
      settle();
      const Extent& box = regions_[best_].box;
      const uint8_t lower = i > 0 ? filled_[order_[i - 1]] : 0;
      for (int level = lower; level < value; ++level) {
        int32_t* const out = boxes + 4 * level;
        out[0] = box.x0, out[1] = box.y0, out[2] = box.x1 + 1, out[3] = box.y1 + 1;
      }
    }
  }

 private:
  static constexpr int32_t kNone = -1;

  struct Region {
    Extent box;
    int32_t area;   // twice
    int32_t first;  // place, in raster order
    int32_t value;  // at which it was last touched
    // OpenCV lists the contours that begin last first, and max() takes the first of equals.
    bool operator<(const Region& other) const { return area != other.area ? area < other.area : first < other.first; }
  };

  // Raises the pixels of holes: filled = max(map, min over the neighbours (4) of filled), outside of the map 0. Two
  // scans settle what a path straight to the border settles; a queue carries the rest.
  void fill_holes(const uint8_t* map) {
    const int64_t H = frame_.H, W = frame_.W, stride = frame_.stride;
    uint8_t *const copy = map_.data(), *const filled = filled_.data();  // bytes may alias members, locals they do not
    for (int64_t y = 0; y < H; ++y) {
      const int64_t begin = frame_.place(y, 0);
      std::copy_n(map + y * W, W, copy + begin);
      int left = 0;
      for (int64_t p = begin; p < begin + W; ++p) {
        left = std::max<int>(copy[p], std::min<int>(left, filled[p - stride]));
        filled[p] = uint8_t(left);
      }
    }
    queue_.clear();
    for (int64_t y = H - 1; y >= 0; --y) {
      const int64_t begin = frame_.place(y, 0);
      int right = 0;
      for (int64_t p = begin + W - 1; p >= begin; --p) {
        right = std::max<int>(copy[p], std::min<int>(right, std::min(filled[p], filled[p + stride])));
        filled[p] = uint8_t(right);
      }
      const auto lowers = [&](int64_t p, int64_t neighbour) {
        return filled[neighbour] > std::max(filled[p], copy[neighbour]);
      };
      uint8_t some = 0;
      for (int64_t p = begin; p < begin + W; ++p) some |= uint8_t(lowers(p, p + 1) | lowers(p, p + stride));
      for (int64_t p = begin; some && p < begin + W; ++p)
        if (lowers(p, p + 1) || lowers(p, p + stride)) queue_.push_back(int32_t(p));
    }
    for (size_t i = 0; i < queue_.size(); ++i) {
      const int32_t place = queue_[i];
      for (int n : {1, 3, 4, 6}) {
        const int32_t neighbour = place + frame_.steps[n];
        const uint8_t value = std::max(copy[neighbour], filled[place]);
        if (value >= filled[neighbour]) continue;
        filled[neighbour] = value;
        queue_.push_back(neighbour);
      }
    }
  }

  void add(int32_t place, int32_t value) {
    const Surroundings& around = regions_.around(place, table_);
    const Extent pixel = frame_.pixel(place);
    if (around.count == 0) live_.push_back(regions_.count());
    const int32_t mine = regions_.add<8>(
        place, around, [&] { return Region{pixel, 0, place, kNone}; },
        [](Region& into, const Region& from) {
          into.box.add(from.box);
          into.area += from.area;
          into.first = std::min(into.first, from.first);
        });
    Region& region = regions_[mine];
    region.box.add(pixel);
    region.area += around.area;
    region.first = std::min(region.first, place);
    if (region.value != value) {
      region.value = value;
      touched_.push_back(mine);
    }
  }

  // The largest region now. Regions that were not touched are no larger than the best before; the rest are asked.
  void settle() {
    if (best_ != kNone) {
      best_ = regions_.find(best_);
      // It may have lost to an equal one, by a pixel that comes earlier and adds no area.
      const Region& now = regions_[best_];
      if (now.area == before_.area && now.first != before_.first) {
        live_.erase(std::remove_if(live_.begin(), live_.end(), [&](int32_t r) { return !regions_.alive(r); }),
                    live_.end());
        for (int32_t region : live_)
          if (regions_[best_] < regions_[region]) best_ = region;
      }
    }
    for (int32_t region : touched_)
      if (regions_.alive(region) && (best_ == kNone || regions_[best_] < regions_[region])) best_ = region;
    before_ = regions_[best_];
  }

  Frame frame_;
  std::vector<uint8_t> map_, filled_;  // [H + 2, W + 2]
  std::vector<int32_t> order_;         // [H * W], the lowest first
  std::vector<int32_t> queue_;         // places whose neighbours are still to be lowered
  Regions<Region> regions_;
  std::vector<int32_t> live_, touched_;
  int32_t best_ = kNone;
  Region before_{};  // the best after the level before
  const std::array<Surroundings, 256>& table_ = surroundings<8>();
};

// The largest value that was ever put on an interval of levels, for every level.
class IntervalMaximum {
 public:
  void clear() { table_.fill(0.0); }

  void put(int first, int last, double value) {  // last included
    if (first > last) return;
    const int k = 31 - std::countl_zero(unsigned(last - first + 1));  // two runs of 2^k levels cover it
    double* const row = table_.data() + kLevels * k;
    row[first] = std::max(row[first], value);
    row[last + 1 - (1 << k)] = std::max(row[last + 1 - (1 << k)], value);
  }

  void read(double* out) {  // [256]
    for (int k = kRows - 1; k > 0; --k) {
      double *const row = table_.data() + kLevels * k, *const finer = row - kLevels;
      for (int i = 0; i + (1 << k) <= kLevels; ++i) {
        finer[i] = std::max(finer[i], row[i]);
        finer[i + (1 << (k - 1))] = std::max(finer[i + (1 << (k - 1))], row[i]);
      }
    }
    std::copy_n(table_.begin(), kLevels, out);
  }

 private:
  static constexpr int kRows = 9;  // 2^8 levels are all
  std::array<double, kRows * kLevels> table_;
};

struct Box {  // the last pixel included
  int64_t x0, y0, x1, y1;

  int64_t area() const { return (x1 - x0 + 1) * (y1 - y0 + 1); }
};

inline double box_overlap(const Box& a, const Box& b) {
  const int64_t width = std::min(a.x1, b.x1) - std::max(a.x0, b.x0) + 1;
  const int64_t height = std::min(a.y1, b.y1) - std::max(a.y0, b.y0) + 1;
  const int64_t shared = std::max<int64_t>(0, width) * std::max<int64_t>(0, height);
  const int64_t together = a.area() + b.area() - shared;
  return together > 0 ? double(shared) / double(together) : 0.0;
}

// The best overlap of the box of any contour with any true box, for every level of one map.
class BestOverlap {
 public:
  BestOverlap(int64_t H, int64_t W) : frame_(H, W), map_(frame_.size()), order_(H * W), regions_(frame_) {}

  void operator()(const uint8_t* map, const std::vector<Box>& truth, double* out) {  // map [H, W], out [256]
    truth_ = &truth;
    for (int64_t y = 0; y < frame_.H; ++y) std::copy_n(map + y * frame_.W, frame_.W, map_.data() + frame_.place(y, 0));
    sort_places(frame_, map_.data(), order_.data());
    best_.clear();
    sweep<8, true>();
    sweep<4, false>();
    best_.read(out);
    // A map without contours counts as one box, its first pixel.
    std::fill(out + map_[order_.back()], out + kLevels, overlap({0, 0, 0, 0}));
  }

 private:
  struct Region {
    Extent box;
    int32_t since;  // the step at which it got this box
  };

  // Step s of the sweep downwards adds the pixels of value 255 - s, which gives the state of level 254 - s; step s of
  // the sweep upwards adds those of value s to the complement, for level s.
  template <int kConnectivity, bool kDown>
  void sweep() {
    regions_.clear();
    const auto& table = surroundings<kConnectivity>();
    for (size_t i = 0; i < order_.size(); ++i) {
      const int32_t place = kDown ? order_[order_.size() - 1 - i] : order_[i];
      const int32_t step = kDown ? kLevels - 1 - map_[place] : map_[place];
      const Extent pixel = frame_.pixel(place);
      const int32_t mine = regions_.template add<kConnectivity>(
          place, regions_.around(place, table), [&] { return Region{pixel, step}; },
          [&](Region& into, const Region& from) {
            close<kDown>(from, step);
            grow<kDown>(into, from.box, step);
          });
      grow<kDown>(regions_[mine], pixel, step);
    }
    for (int32_t region = 0; region < regions_.count(); ++region)
      if (regions_.alive(region)) close<kDown>(regions_[region], kDown ? kLevels - 1 : kLevels);
  }

  template <bool kDown>
  void grow(Region& region, const Extent& more, int32_t step) {
    if (region.box.holds(more)) return;
    close<kDown>(region, step);
    region.box.add(more);
    region.since = step;
  }

  // Counts a box that a region had up to the step before this one.
  template <bool kDown>
  void close(const Region& region, int32_t step) {
    if (region.since >= step) return;
    Extent box = region.box;
    if constexpr (!kDown) {
      if (box.x0 == 0 || box.y0 == 0 || box.x1 == frame_.W - 1 || box.y1 == frame_.H - 1) return;  // no hole
      box = {box.x0 - 1, box.y0 - 1, box.x1 + 1, box.y1 + 1};
    }
    const double value = overlap(
        {box.x0, box.y0, std::min<int64_t>(box.x1 + 1, frame_.W - 1), std::min<int64_t>(box.y1 + 1, frame_.H - 1)});
    kDown ? best_.put(kLevels - 1 - step, kLevels - 2 - region.since, value) : best_.put(region.since, step - 1, value);
  }

  double overlap(const Box& box) const {
    double most = 0;
    for (const Box& other : *truth_) most = std::max(most, box_overlap(box, other));
    return most;
  }

  Frame frame_;
  std::vector<uint8_t> map_;    // [H + 2, W + 2]
  std::vector<int32_t> order_;  // [H * W], the lowest first
  Regions<Region> regions_;
  IntervalMaximum best_;
  const std::vector<Box>* truth_ = nullptr;
};

}  // namespace casm_fast
