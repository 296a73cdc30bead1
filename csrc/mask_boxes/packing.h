// From pixels to bits on the CPU: 64 comparisons become one word, whose bit i is pixel i.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace casm_fast {

// Which pixels are kept.
template <typename T>
struct AtLeast {
  T level;
  bool operator()(T pixel) const { return pixel >= level; }
};
template <typename T>
struct NonZero {
  bool operator()(T pixel) const { return pixel != 0 && pixel == pixel; }  // NaN is not kept
};

// Bytes of 0 or 1 to bits: the product gathers the lowest bits of eight bytes in the top byte. Little endian, as every
// processor that torch runs on.
inline uint64_t bits_of_bytes(const uint8_t* bytes) {  // bytes [64]
  uint64_t word = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * i, 8);
    word |= (eight * 0x0102040810204080u >> 56) << (8 * i);
  }
  return word;
}

// The word of the first `count` (1 to 64) pixels; its other bits are 0.
template <typename T, typename Keep>
inline uint64_t pack(const T* pixels, int count, Keep keep) {
  uint8_t bytes[64];
  if (count == 64) {
    for (int i = 0; i < 64; ++i) bytes[i] = keep(pixels[i]);  // a fixed length, which compilers vectorise
  } else {
    std::memset(bytes, 0, sizeof bytes);
    for (int i = 0; i < count; ++i) bytes[i] = keep(pixels[i]);
  }
  return bits_of_bytes(bytes);
}

#ifdef __AVX512F__
inline uint64_t pack(const float* pixels, int count, AtLeast<float> keep) {
  const __m512 level = _mm512_set1_ps(keep.level);
  uint64_t word = 0;
  if (count == 64) {
    for (int i = 0; i < 64; i += 16)
      word |= uint64_t(_mm512_cmp_ps_mask(_mm512_loadu_ps(pixels + i), level, _CMP_GE_OQ)) << i;
    return word;
  }
  for (int i = 0; i < count; i += 16) {
    const __mmask16 inside = count - i >= 16 ? 0xFFFF : (1u << (count - i)) - 1;
    const __m512 sixteen = _mm512_maskz_loadu_ps(inside, pixels + i);
    word |= uint64_t(_mm512_mask_cmp_ps_mask(inside, sixteen, level, _CMP_GE_OQ)) << i;
  }
  return word;
}
#endif

}  // namespace casm_fast
