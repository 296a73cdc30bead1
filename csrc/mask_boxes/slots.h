// Connected components of bits in CUDA, by segments.
//
// A segment is a maximal stretch of kept pixels within one word of 32; it has a slot: 16 for every word, taken from the
// left. Slots need no prefix sum, their order is raster order, and every slot holds its segment's place in a forest in
// which a root is always the smallest slot of its component. The work on one word is independent of every other's, so
// the functions below serve a block with its bits and slots in shared memory as well as a grid with both in global
// memory; between two of them all threads must have finished (a barrier, or the next launch):
//
//   1. plant     Each slot points at itself.
//   2. join      Unions with the segments to the left and above that touch: lock-free, a larger root is hung below a
//                smaller one by atomicMin, and repeated when another thread was quicker.
//   3. flatten   Slots that are no root hold ~root from here on, which is negative. A root still holds itself.
//   4. payload   A root may now collect a number: its area on top of itself, or the label of its component.
#pragma once

#include "common/launch.h"

namespace casm_fast {

constexpr int kSlotsPerWord = 16;  // 32 pixels hold no more segments
constexpr int kSlotBytes = kSlotsPerWord * sizeof(int32_t);

__device__ inline uint32_t starts_of(uint32_t word) { return word & ~(word << 1); }
__device__ inline uint32_t bits_upto(int x) { return (2u << x) - 1; }  // 0 to x, x = 31 included

// The components of one image. bits [H, words], slots [H, words, 16].
struct Forest {
  const uint32_t* bits;
  int32_t* slots;
  int H, words;

  __device__ int size() const { return H * words; }

  // The slot of the last segment of word k that starts at or before bit x.
  __device__ int slot_at(int k, int x) const {
    return kSlotsPerWord * k + __popc(starts_of(bits[k]) & bits_upto(x)) - 1;
  }

  // The compiler must not keep a slot in a register: other threads change it.
  __device__ int32_t read(int slot) const { return *static_cast<const volatile int32_t*>(slots + slot); }

  // Where `slot` hangs in the end. Halves the way for those who come later, by atomicMin as well: a plain store could
  // undo another thread's union.
  __device__ int find(int slot) const {
    for (int32_t parent = read(slot); parent != slot;) {
      const int32_t next = read(parent);
      if (next != parent) atomicMin(slots + slot, next);
      slot = parent;
      parent = next;
    }
    return slot;
  }

  __device__ void unite(int a, int b) const {
    for (;;) {
      a = find(a);
      b = find(b);
      if (a == b) return;
      if (a > b) {
        const int smaller = b;
        b = a;
        a = smaller;
      }
      const int32_t before = atomicMin(slots + b, a);
      if (before == b) return;
      b = before;  // b was no root any more: its parent is still to be united
    }
  }

  __device__ void plant(int k) const {
    const int segments = __popc(starts_of(bits[k]));
    for (int i = 0; i < segments; ++i) slots[kSlotsPerWord * k + i] = kSlotsPerWord * k + i;
  }

  __device__ void join(int k, bool eight) const {
    const uint32_t word = bits[k];
    const int j = k % words;
    const bool inner = j > 0, lower = k >= words;
    const uint32_t left = inner ? bits[k - 1] : 0;
    if (word & left >> 31) unite(slot_at(k, 0), slot_at(k - 1, 31));
    if (!lower || (!eight && !word)) return;

    // The first bit of every stretch that both rows share stands for a pair of segments. One that goes on from the word
    // to the left needs no union: both segments are joined to theirs.
    const int above = k - words;
    const uint32_t up = bits[above], up_left = inner ? bits[above - 1] : 0;
    const uint32_t both = word & up;
    for (uint32_t rest = both & ~(both << 1 | (left & up_left) >> 31); rest; rest &= rest - 1) {
      const int x = __ffs(rest) - 1;
      unite(slot_at(k, x), slot_at(above, x));
    }
    if (!eight) return;

    // Corners: where the segment of one row starts and the other's ends, so that they share no column.
    const uint32_t before = word << 1 | left >> 31, up_before = up << 1 | up_left >> 31;  // the pixels to the left
    for (uint32_t rest = (word & ~before & ~up & up_before) | (~word & before & up & ~up_before); rest;
         rest &= rest - 1) {
      const int x = __ffs(rest) - 1;
      const bool starts_here = word >> x & 1;  // else the upper one does
      const int here = starts_here || x > 0 ? slot_at(k, x) : slot_at(k - 1, 31);
      const int there = !starts_here || x > 0 ? slot_at(above, x) : slot_at(above - 1, 31);
      unite(here, there);
    }
  }

  __device__ void flatten(int k) const {
    const int segments = __popc(starts_of(bits[k]));
    for (int i = kSlotsPerWord * k; i < kSlotsPerWord * k + segments; ++i) {
      int32_t root = read(i);
      if (root == i) continue;
      for (int32_t parent = read(root); parent != root; parent = read(root)) {
        root = parent < 0 ? ~parent : parent;
        if (parent < 0) break;
      }
      slots[i] = ~root;
    }
  }

  // The root of a segment, after flatten().
  __device__ int root_of(int slot) const {
    const int32_t held = read(slot);
    return held < 0 ? ~held : slot;
  }
};

// A stretch of pixels [first, last) of a word.
struct Segment {
  int slot, first, last;
};

// Calls `f(segment)` for every segment of word k, from the left.
template <typename F>
__device__ inline void for_each_segment(uint32_t word, int k, const F& f) {
  int slot = kSlotsPerWord * k;
  while (word) {
    const int first = __ffs(word) - 1;
    const uint32_t gaps = ~word & ~bits_upto(first);  // the pixels behind `first` that are not kept
    const int last = gaps ? __ffs(gaps) - 1 : 32;
    f(Segment{slot++, first, last});
    word &= gaps ? ~bits_upto(last) : 0;
  }
}

}  // namespace casm_fast
