// Vectors of 64 bytes for the CPU kernels: one AVX-512 register, or two or four smaller ones. The compiler does the
// rest.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace casm_fast {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <typename T>
struct Lanes {
  using Vector __attribute__((vector_size(kVectorBytes))) = T;
  Vector v;

  static Lanes load(const T* from) {
    Lanes lanes;
    std::memcpy(&lanes.v, from, sizeof(Vector));
    return lanes;
  }
  static Lanes all(T value) { return {Vector{} + value}; }
  void store(T* to) const { std::memcpy(to, &v, sizeof(Vector)); }

  // The sum of the lanes, first to last.
  T sum() const {
    T total = v[0];
    for (int j = 1; j < kLanes<T>; ++j) total += v[j];
    return total;
  }

  template <typename F>
  static Lanes each(const F& f) {
    Lanes lanes;
    for (int j = 0; j < kLanes<T>; ++j) lanes.v[j] = f(j);
    return lanes;
  }

  friend Lanes operator+(const Lanes& a, const Lanes& b) { return {a.v + b.v}; }
  friend Lanes operator-(const Lanes& a, const Lanes& b) { return {a.v - b.v}; }
  friend Lanes operator*(const Lanes& a, const Lanes& b) { return {a.v * b.v}; }
};

// 0, 1, 2, ... in integers as wide as T, which is what comparisons of lanes give too.
template <typename T>
inline auto lane_numbers() {
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return Lanes<Integer>::each([](int j) { return j; });
}

template <typename T, typename Condition>
inline Lanes<T> select(const Condition& condition, const Lanes<T>& yes, const Lanes<T>& no) {
  return {condition ? yes.v : no.v};
}

// The lanes of `now`, one place later; the last lane of `before` comes first.
template <typename T>
inline Lanes<T> one_later(const Lanes<T>& before, const Lanes<T>& now) {
#if defined(__clang__)
  return [&]<int... j>(std::integer_sequence<int, j...>) {
    return Lanes<T>{__builtin_shufflevector(before.v, now.v, (j + kLanes<T> - 1)...)};
  }(std::make_integer_sequence<int, kLanes<T>>());
#else
  return {__builtin_shuffle(before.v, now.v, lane_numbers<T>().v + (kLanes<T> - 1))};
#endif
}

// 1 / sqrt(s), a large number where s is 0: its product with s, or with a difference whose square is s, is 0 there.
inline Lanes<double> inverse_square_root(const Lanes<double>& s) {
  return Lanes<double>::each([&](int j) { return 1 / std::sqrt(s.v[j] > DBL_MIN ? s.v[j] : DBL_MIN); });
}

// For float from the processor's estimate (12 or 14 bits) and one Newton step, which gives all but the last bit or two
// in a quarter of the time of the exact root. Squares below the normal numbers (differences under 1.1e-19) come out too
// small.
inline Lanes<float> inverse_square_root(const Lanes<float>& s) {
#if defined(__SSE2__)
  using Vector = Lanes<float>::Vector;
#if defined(__AVX512F__)
  const __m512 normal = _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(s.v), _mm512_set1_ps(FLT_MIN));
  const Vector guess = reinterpret_cast<Vector>(_mm512_maskz_rsqrt14_ps(0xffff, normal));
#elif defined(__AVX2__)
  const __m256 normal = _mm256_max_ps(reinterpret_cast<__m256>(s.v), _mm256_set1_ps(FLT_MIN));
  const Vector guess = reinterpret_cast<Vector>(_mm256_rsqrt_ps(normal));
#else
  const __m128 normal = _mm_max_ps(reinterpret_cast<__m128>(s.v), _mm_set1_ps(FLT_MIN));
  const Vector guess = reinterpret_cast<Vector>(_mm_rsqrt_ps(normal));
#endif
  return {guess * (1.5f - 0.5f * s.v * guess * guess)};
#else
  return Lanes<float>::each([&](int j) { return 1 / std::sqrt(s.v[j] > FLT_MIN ? s.v[j] : FLT_MIN); });
#endif
}

}  // namespace casm_fast
