// CUDA as the kernels of this project use it, for a C++ compiler: the language (qualifiers, threadIdx, vector types),
// the intrinsics, and launch(). csrc/common/launch.h includes it where CASM_FAST_EMULATED is defined; nothing else
// does.
//
// Every thread of a block is a fiber. Fibers give way only where the machine could tell (barriers, warp operations, and
// now and then atomics), and whose turn it is next is drawn from CASM_FAST_EMULATOR_SEED: a result that depends on the
// draw is a race. What the emulator reports instead of running on:
//   - a thread that leaves the kernel while others wait at a barrier, or comes to one after another has left;
//   - threads of one block that wait at different barriers; a block in which nobody can go on;
//   - a warp operation whose mask leaves out the caller, names a lane that has left or never was, or differs between
//     lanes; a shuffle that reads a lane outside its mask;
//   - blocks, grids and shared memory larger than a GPU has.
// Shared memory is poisoned (0xFF: NaN, -1) before every block, and dynamic shared memory is a heap block of exactly
// the asked size, so that AddressSanitizer sees an access beside it. Static shared memory is thread_local, which is
// only a way to get it into a segment of its own that can be found and poisoned; UndefinedBehaviorSanitizer checks its
// indices. It does not show: interleaving of plain loads and stores between two places where fibers give way,
// reordering by the memory model, bank conflicts, register and shared memory budgets together, speed.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------- language
#define __host__
#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define CASM_FAST_SHARED static thread_local

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CASM_FAST_VECTORS(T, name, align2, align4)                   \
  struct alignas(align2) name##2 { T x, y; };                        \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(align4) name##4 { T x, y, z, w; };                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CASM_FAST_VECTORS(signed char, char, 2, 4)
CASM_FAST_VECTORS(unsigned char, uchar, 2, 4)
CASM_FAST_VECTORS(short, short, 4, 8)
CASM_FAST_VECTORS(unsigned short, ushort, 4, 8)
CASM_FAST_VECTORS(int, int, 8, 16)
CASM_FAST_VECTORS(unsigned, uint, 8, 16)
CASM_FAST_VECTORS(float, float, 8, 16)
CASM_FAST_VECTORS(double, double, 16, 16)
CASM_FAST_VECTORS(long long, longlong, 16, 16)
CASM_FAST_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef CASM_FAST_VECTORS

// ---------------------------------------------------------------- the run time behind it (emulated_cuda.cpp)
namespace casm_fast::emulated {

constexpr int kWarp = 32;
constexpr int64_t kMaxSharedBytes = 227 << 10;  // of Hopper; an A100 has 163 KB, consumer cards 99

// A place in a kernel, for the reports.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// What a fiber sees of itself and of the grid.
struct Identity {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned lane;
};
extern const Identity* identity;  // of the fiber that runs

// Warp operations that meet: lanes that call with the same mask must call the same one.
enum class Meeting { sync, shuffle, ballot, any, all, match, reduce };

// What every lane of a mask brought to a warp operation.
struct Brought {
  uint64_t value[kWarp];
};

// Waits until every lane of `mask` has come to the same operation, then returns what each of them brought. The
// reference stays valid until the caller's next warp operation.
const Brought& meet(Meeting meeting, unsigned mask, uint64_t value, Where where);

// Waits until every thread of the block is here; returns how many brought `predicate`.
int block_barrier(bool predicate, Where where);

// Lets others run first, now and then: the hardware may interleave here.
void perhaps_give_way();

// Stops the launch; the caller of launch() sees the message as an exception.
[[noreturn]] void fail(const char* what, Where where);

void* dynamic_shared_memory();

// Runs every thread of every block: `run(arguments)` is one thread's work.
void run_grid(dim3 grid, dim3 block, int64_t shared_bytes, void (*run)(void*), void* arguments);

template <typename T>
inline T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory());
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, int64_t shared_bytes, int32_t /*device_index*/,
            const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "as many arguments as the kernel has parameters");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  } call{kernel, {static_cast<Params>(args)...}};
  run_grid(
      grid, block, shared_bytes,
      [](void* opaque) {
        const Call& call = *static_cast<Call*>(opaque);
        std::apply(call.kernel, call.arguments);
      },
      &call);
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a value of at most 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Where where) {
  const Brought& brought = meet(Meeting::shuffle, mask, to_bits(value), where);
  if (!(mask >> source & 1)) fail("a shuffle reads a lane outside its mask", where);
  return from_bits<T>(brought.value[source]);
}

// The lanes [first, last] that a shuffle of `width` stays in.
inline int segment_first(int width) { return static_cast<int>(identity->lane) & ~(width - 1); }

template <typename T, typename F>
T reduce(unsigned mask, T value, Where where, F combine) {
  const Brought& brought = meet(Meeting::reduce, mask, to_bits(value), where);
  bool started = false;
  T result{};
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T other = from_bits<T>(brought.value[lane]);
    result = started ? combine(result, other) : other;
    started = true;
  }
  return result;
}

template <typename T, typename... Allowed>
concept OneOf = (std::same_as<T, Allowed> || ...);

template <typename T>
using Same = std::type_identity_t<T>;  // converts an argument to the type of the address before it

template <typename T, typename F>
T exchange(T* address, F next) {
  perhaps_give_way();
  const T old = *address;
  *address = next(old);
  return old;
}

}  // namespace casm_fast::emulated

#define threadIdx (::casm_fast::emulated::identity->thread)
#define blockIdx (::casm_fast::emulated::identity->block)
#define blockDim (::casm_fast::emulated::identity->block_size)
#define gridDim (::casm_fast::emulated::identity->grid_size)
constexpr int warpSize = casm_fast::emulated::kWarp;

// Where the caller stands; the default argument of every operation that can wait or fail.
#define CASM_FAST_WHERE \
  ::casm_fast::emulated::Where where = ::casm_fast::emulated::Where::here(__builtin_FILE(), __builtin_LINE())

// ---------------------------------------------------------------- barriers
inline void __syncthreads(CASM_FAST_WHERE) { casm_fast::emulated::block_barrier(false, where); }
inline int __syncthreads_count(int predicate, CASM_FAST_WHERE) {
  return casm_fast::emulated::block_barrier(predicate != 0, where);
}
inline int __syncthreads_or(int predicate, CASM_FAST_WHERE) {
  return casm_fast::emulated::block_barrier(predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, CASM_FAST_WHERE) {
  return casm_fast::emulated::block_barrier(predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CASM_FAST_WHERE) {
  casm_fast::emulated::meet(casm_fast::emulated::Meeting::sync, mask, 0, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap(CASM_FAST_WHERE) { casm_fast::emulated::fail("__trap()", where); }

// ---------------------------------------------------------------- warp operations
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CASM_FAST_WHERE) {
  using namespace casm_fast::emulated;
  return shuffle(mask, value, segment_first(width) + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, CASM_FAST_WHERE) {
  using namespace casm_fast::emulated;
  const int lane = static_cast<int>(identity->lane), source = lane ^ lanes;
  return shuffle(mask, value, source < segment_first(width) + width ? source : lane, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = warpSize, CASM_FAST_WHERE) {
  using namespace casm_fast::emulated;
  const int lane = static_cast<int>(identity->lane), source = lane - static_cast<int>(lanes);
  return shuffle(mask, value, source >= segment_first(width) ? source : lane, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = warpSize, CASM_FAST_WHERE) {
  using namespace casm_fast::emulated;
  const int lane = static_cast<int>(identity->lane), source = lane + static_cast<int>(lanes);
  return shuffle(mask, value, source < segment_first(width) + width ? source : lane, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CASM_FAST_WHERE) {
  using namespace casm_fast::emulated;
  const Brought& brought = meet(Meeting::ballot, mask, predicate != 0, where);
  unsigned votes = 0;
  for (int lane = 0; lane < warpSize; ++lane)
    if (mask >> lane & 1 && brought.value[lane]) votes |= 1u << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, CASM_FAST_WHERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CASM_FAST_WHERE) {
  return __ballot_sync(mask, predicate, where) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, CASM_FAST_WHERE) {
  using namespace casm_fast::emulated;
  const Brought& brought = meet(Meeting::match, mask, to_bits(value), where);
  unsigned equal = 0;
  for (int lane = 0; lane < warpSize; ++lane)
    if (mask >> lane & 1 && brought.value[lane] == to_bits(value)) equal |= 1u << lane;
  return equal;
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned>
T __reduce_add_sync(unsigned mask, T value, CASM_FAST_WHERE) {
  return casm_fast::emulated::reduce(mask, value, where, [](T a, T b) { return T(unsigned(a) + unsigned(b)); });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned>
T __reduce_min_sync(unsigned mask, T value, CASM_FAST_WHERE) {
  return casm_fast::emulated::reduce(mask, value, where, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned>
T __reduce_max_sync(unsigned mask, T value, CASM_FAST_WHERE) {
  return casm_fast::emulated::reduce(mask, value, where, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, CASM_FAST_WHERE) {
  return casm_fast::emulated::reduce(mask, value, where, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, CASM_FAST_WHERE) {
  return casm_fast::emulated::reduce(mask, value, where, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, CASM_FAST_WHERE) {
  return casm_fast::emulated::reduce(mask, value, where, [](unsigned a, unsigned b) { return a ^ b; });
}
#undef CASM_FAST_WHERE

// ---------------------------------------------------------------- atomics, for the types that CUDA has
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned, unsigned long long, float, double>
T atomicAdd(T* address, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T old) {
    if constexpr (std::is_same_v<T, int>)
      return int(unsigned(old) + unsigned(value));  // wraps
    else
      return T(old + value);
  });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned>
T atomicSub(T* address, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T old) { return T(unsigned(old) - unsigned(value)); });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned, long long, unsigned long long>
T atomicMin(T* address, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T old) { return std::min(old, value); });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned, long long, unsigned long long>
T atomicMax(T* address, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T old) { return std::max(old, value); });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned, unsigned long long>
T atomicOr(T* address, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T old) { return T(old | value); });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned, unsigned long long>
T atomicAnd(T* address, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T old) { return T(old & value); });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned, unsigned long long>
T atomicXor(T* address, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T old) { return T(old ^ value); });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned, unsigned long long, float>
T atomicExch(T* address, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T) { return value; });
}
template <typename T>
  requires casm_fast::emulated::OneOf<T, int, unsigned, unsigned long long, unsigned short>
T atomicCAS(T* address, casm_fast::emulated::Same<T> expected, casm_fast::emulated::Same<T> value) {
  return casm_fast::emulated::exchange(address, [&](T old) { return old == expected ? value : old; });
}

// ---------------------------------------------------------------- bits
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
         __brev(static_cast<unsigned>(x >> 32));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// ---------------------------------------------------------------- memory and arithmetic
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, casm_fast::emulated::Same<T> value) {
  *address = value;
}
template <typename T>
void __stcg(T* address, casm_fast::emulated::Same<T> value) {
  *address = value;
}

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __saturatef(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }  // NaN becomes 0
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
