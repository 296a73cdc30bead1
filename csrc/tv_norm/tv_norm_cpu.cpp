// tv_norm on the CPU.
//
// One loop serves the value, the gradient and both at once, and walks down the rows in vectors. The
// gradient is a gather: the flows of a vector to the right are handed on to the next one in a register, those downwards
// to the next row in a buffer. The last vector of a row runs over into the next row, and what it finds there is masked.
// Bytes per float pixel: 4 for the value, 8 for the gradient and for both. Planes are cut into blocks of rows, the same
// for any number of threads; sums go lane, block, plane, in order.

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "tv_norm/lanes.h"
#include "tv_norm/tv_norm.h"

namespace casm_fast {
namespace {

constexpr int64_t kPixelsPerBlock = 8192;  // of a block of rows: float sums stay short, and a thread has enough to do
constexpr int64_t kPixelsPerTask = 16384;  // below, waking a thread costs more than it brings

// Pixels that are fetched in advance, a page: the processor's own prefetchers stop at the end of one. 10 to 25 % less
// time on masks that lie outside the caches.
template <typename T>
constexpr int64_t kAhead = 4096 / sizeof(T);

// What kLanes pixels add to the value, and k times the flows out of them.
template <typename T>
struct Part {
  Lanes<T> term, right, down;
};

template <Beta kBeta, typename T>
inline std::pair<Lanes<T>, Lanes<T>> term_and_slope(const Lanes<T>& s, T k, T beta) {  // s: squared differences
  using L = Lanes<T>;
  if constexpr (kBeta == Beta::two) {
    return {s, L::all(2 * k)};
  } else if constexpr (kBeta == Beta::any) {
    return {L::each([&](int j) { return tv_term<kBeta>(s.v[j], beta); }),
            L::each([&](int j) { return k * tv_slope<kBeta>(s.v[j], beta); })};
  } else {
    const L inverse = inverse_square_root(s), root = s * inverse;
    if constexpr (kBeta == Beta::one) return {root, L::all(k) * inverse};
    return {s * root, L::all(3 * k) * root};
  }
}

template <Beta kBeta, bool kIsotropic, typename T>
inline Part<T> part_of(const Lanes<T>& dx, const Lanes<T>& dy, T k, T beta) {
  if constexpr (kIsotropic) {
    const auto [term, slope] = term_and_slope<kBeta>(dx * dx + dy * dy, k, beta);
    return {term, slope * dx, slope * dy};
  }
  const auto [term_x, slope_x] = term_and_slope<kBeta>(dx * dx, k, beta);
  const auto [term_y, slope_y] = term_and_slope<kBeta>(dy * dy, k, beta);
  return {term_x + term_y, slope_x * dx, slope_y * dy};
}

// A plane [H, W], and where the memory behind it ends.
template <typename T>
struct Plane {
  const T* pixels;
  int64_t H, W;
  const T* limit;

  const T* row(int64_t y) const { return pixels + std::min(y, H - 1) * W; }  // below the image: no difference
};

// Rows [first, last) of one plane: returns their part of the value where kValue, writes `scale` times their gradient
// where kGradient. `down` is scratch, a row of vectors: what flows down into the row at hand.
template <Beta kBeta, bool kIsotropic, bool kValue, bool kGradient, typename T>
T block(const Plane<T>& plane, T* grad_mask, int64_t first, int64_t last, T scale, T beta, Lanes<T>* down) {
  using L = Lanes<T>;
  constexpr int64_t n = kLanes<T>;
  const int64_t W = plane.W, end = (W - 1) / n * n;  // where the last vector of a row starts
  const int rest = static_cast<int>(W - end);        // 1 to n
  const auto in_row = lane_numbers<T>().v < rest, has_right = lane_numbers<T>().v < rest - 1;
  T here_copy[n + 1] = {}, below_copy[n] = {};
  L sum = L::all(0);
  if constexpr (kGradient) std::fill(down, down + end / n + 1, L::all(0));  // above the image nothing flows

  // The row above the block is walked too, for its flows downwards alone.
  for (int64_t y = kGradient && first > 0 ? first - 1 : first; y < last; ++y) {
    const bool inside = y >= first;
    T* grad = kGradient ? grad_mask + y * W : nullptr;
    L from_left = L::all(0);
    const auto gradient = [&](const Part<T>& part, int64_t x) {
      const L result = one_later(from_left, part.right) + down[x / n] - part.right - part.down;
      from_left = part.right;
      down[x / n] = part.down;
      return result;
    };

    const T *here = plane.row(y), *below = plane.row(y + 1);
    for (int64_t x = 0; x < end; x += n) {
      __builtin_prefetch(below + x + kAhead<T>);
      if constexpr (kGradient) __builtin_prefetch(grad + x + kAhead<T>, 1);
      const L pixel = L::load(here + x), dx = L::load(here + x + 1) - pixel, dy = L::load(below + x) - pixel;
      const Part<T> part = part_of<kBeta, kIsotropic>(dx, dy, scale, beta);
      if (kValue && inside) sum = sum + part.term;
      if constexpr (kGradient) {
        const L result = gradient(part, x);
        if (inside) result.store(grad + x);
      }
    }

    here += end, below += end;
    if (std::max(here, below) + n + 1 > plane.limit) {
      here = std::copy(here, here + rest, here_copy) - rest;
      below = std::copy(below, below + rest, below_copy) - rest;
    }
    const L pixel = L::load(here), zero = L::all(0), dy = L::load(below) - pixel;
    const L dx = select<T>(has_right, L::load(here + 1) - pixel, zero);
    const Part<T> part = part_of<kBeta, kIsotropic>(dx, dy, scale, beta);
    if (kValue && inside) sum = sum + select<T>(in_row, part.term, zero);
    if constexpr (kGradient) {
      const L result = gradient(part, end);
      if (inside && y * W + end + n <= last * W)
        result.store(grad + end);  // the rows of the block that follow overwrite the surplus
      else if (inside)
        std::memcpy(grad + end, &result.v, rest * sizeof(T));
    }
  }
  return sum.sum();
}

// Every plane of `mask` [B, 1, H, W]: value [B] where kValue, weight times the gradient [B, 1, H, W] where kGradient.
template <bool kValue, bool kGradient, typename T>
void run(const Tensor& mask, double beta, bool isotropic, T* value, const Weight<T>& weight, T* grad_mask) {
  const int64_t B = mask.size(0), H = mask.size(2), W = mask.size(3);
  const int64_t rows_per_block = std::clamp<int64_t>(kPixelsPerBlock / W, 1, H), blocks = ceil_div(H, rows_per_block);
  const int64_t grain = std::max<int64_t>(1, kPixelsPerTask / (rows_per_block * W));
  const T* pixels = mask.const_data_ptr<T>();
  std::vector<T> partial(kValue ? B * blocks : 0);
  for_tv_case(beta, isotropic, [&]<Beta kBeta, bool kIsotropic>() {
    torch::stable::parallel_for(0, B * blocks, grain, [&](int64_t begin, int64_t end) {
      std::vector<Lanes<T>> down(kGradient ? ceil_div(W, kLanes<T>) : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, first = i % blocks * rows_per_block;
        const Plane<T> plane{pixels + b * H * W, H, W, pixels + B * H * W};
        const T sum = block<kBeta, kIsotropic, kValue, kGradient, T>(plane, kGradient ? grad_mask + b * H * W : nullptr,
                                                                     first, std::min(first + rows_per_block, H),
                                                                     weight[b], T(beta), down.data());
        if constexpr (kValue) partial[i] = sum;
      }
    });
  });
  if constexpr (kValue)
    for (int64_t b = 0; b < B; ++b) {
      double total = 0;
      for (int64_t i = 0; i < blocks; ++i) total += partial[b * blocks + i];
      value[b] = static_cast<T>(total);
    }
}

Tensor tv_norm(const Tensor& mask_in, double beta, bool isotropic) {
  check_tv_norm(mask_in, beta);
  const Tensor mask = in_order(mask_in);
  Tensor value = empty_tensor(mask, {mask.size(0)});
  for_cpu_dtype(mask, [&]<typename T>() {
    run<true, false, T>(mask, beta, isotropic, value.mutable_data_ptr<T>(), Weight<T>{}, nullptr);
  });
  return value;
}

Tensor tv_norm_backward(const Tensor& grad_value, const Tensor& mask_in, double beta, bool isotropic) {
  check_tv_norm(mask_in, beta);
  check_grad_value(grad_value, mask_in);
  const Tensor mask = in_order(mask_in);
  Tensor grad_mask = empty_tensor(mask, {mask.size(0), 1, mask.size(2), mask.size(3)});
  for_cpu_dtype(mask, [&]<typename T>() {
    run<false, true, T>(mask, beta, isotropic, nullptr, weight_of<T>(grad_value), grad_mask.mutable_data_ptr<T>());
  });
  return grad_mask;
}

std::tuple<Tensor, Tensor> tv_norm_with_gradient(const Tensor& mask_in, double weight, double beta, bool isotropic) {
  check_tv_norm(mask_in, beta);
  const Tensor mask = in_order(mask_in);
  Tensor value = empty_tensor(mask, {mask.size(0)});
  Tensor grad_mask = empty_tensor(mask, {mask.size(0), 1, mask.size(2), mask.size(3)});
  for_cpu_dtype(mask, [&]<typename T>() {
    run<true, true, T>(mask, beta, isotropic, value.mutable_data_ptr<T>(), Weight<T>{nullptr, 0, T(weight)},
                       grad_mask.mutable_data_ptr<T>());
  });
  return {value, grad_mask};
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CPU, m) {
  m.impl("tv_norm", TORCH_BOX(&casm_fast::tv_norm));
  m.impl("tv_norm_backward", TORCH_BOX(&casm_fast::tv_norm_backward));
  m.impl("tv_norm_with_gradient", TORCH_BOX(&casm_fast::tv_norm_with_gradient));
}
