// tv_norm on CUDA.
//
// A thread owns kPack neighbouring columns (16 bytes) over kRows rows and walks down them, so that each row is loaded
// once and serves as "below" and then as "here"; the one column to the right (and to the left, for the gradient) comes
// again as a single pixel out of L1. The gradient is a gather: the flow from above is carried along in registers, the
// flow from the left is computed again. Every border is a replicated pixel, whose difference is zero. Bytes per float
// pixel: 4 for the value, 8 for the gradient, 8 for both together. Sums go thread, warp, block, image in an order that
// depends on (H, W) alone, so that a mask has the same value in every batch. Images of up to 32 threads (28x28) share a
// block, one warp each. Limits: rows that do not start on 16 bytes (W not a multiple of the pack, an odd address) take
// one pixel per load.

#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "common/reduce.h"
#include "tv_norm/tv_norm.h"

namespace casm_fast {
namespace {

constexpr int kRows = 8;       // rows of a thread: 9/8 of the loads, and a 28x28 mask fits one warp
constexpr int kThreads = 128;  // of a block
constexpr int kBlocks = 5;     // resident at least: registers for several rows under way at once

// How the pixels of a batch are laid over threads. A team adds up (part of) one image: a warp or a block.
struct Layout {
  int H, W, packs, units;  // packs per row; units (packs times strips of rows) per image
  int team, teams;         // threads of a team; teams per image
  int64_t images;

  Layout(const Tensor& mask, int pack)
      : H(static_cast<int>(mask.size(2))),
        W(static_cast<int>(mask.size(3))),
        packs(W / pack),
        units(static_cast<int>(packs * ceil_div(H, kRows))),
        team(units <= 32 ? 32 : kThreads),
        teams(static_cast<int>(ceil_div(units, team))),
        images(mask.size(0)) {
    STD_TORCH_CHECK(packs * ceil_div(H, kRows) <= INT32_MAX, "mask has too many pixels");
  }

  dim3 grid() const { return dim3(static_cast<unsigned>(ceil_div(images * teams, kThreads / team))); }
};

// What one thread owns.
struct Place {
  int64_t team, image;
  int x, y;
  bool inside;  // threads past the end of the image take part in sums only

  __device__ Place(const Layout& layout, int pack) {
    const int in_team = static_cast<int>(threadIdx.x) & (layout.team - 1);
    team = static_cast<int64_t>(blockIdx.x) * (kThreads / layout.team) + threadIdx.x / layout.team;
    image = team / layout.teams;
    const int unit = static_cast<int>(team - image * layout.teams) * layout.team + in_team;
    inside = image < layout.images && unit < layout.units;
    y = unit / layout.packs * kRows;
    x = unit % layout.packs * pack;
  }
};

// kPack pixels of a row from column x on, with one neighbour on either side, borders replicated.
template <typename T, int kPack>
struct Pixels {
  T values[kPack + 2];

  template <typename scalar_t>
  __device__ void load(const scalar_t* row, int x, int W) {
    const Pack<scalar_t, kPack> pack = load_pack<kPack>(row + x);
#pragma unroll
    for (int j = 0; j < kPack; ++j) values[j + 1] = static_cast<T>(pack[j]);
    values[0] = x > 0 ? static_cast<T>(row[x - 1]) : values[1];
    values[kPack + 1] = x + kPack < W ? static_cast<T>(row[x + kPack]) : values[kPack];
  }
};

// Adds up a team's terms into sums[team].
template <typename T>
__device__ void store_team_sum(T term, const Layout& layout, const Place& place, T* sums) {
  const T sum = layout.team == 32 ? warp_sum(term) : block_sum<kThreads>(term);
  if ((threadIdx.x & (layout.team - 1)) == 0 && place.image < layout.images) sums[place.team] = sum;
}

// sums [images * teams]
template <typename scalar_t, int kPack, Beta kBeta, bool kIsotropic>
__global__ void __launch_bounds__(kThreads, kBlocks)
    value_kernel(const scalar_t* __restrict__ mask, acc_t<scalar_t>* sums, Layout layout, acc_t<scalar_t> beta) {
  using T = acc_t<scalar_t>;
  const Place place(layout, kPack);
  T term = 0;
  if (place.inside) {
    const int64_t W = layout.W;
    const scalar_t* image = mask + place.image * layout.H * W;
    Pixels<T, kPack> here, below;
    here.load(image + place.y * W, place.x, layout.W);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // Rows past the last one are the last one again, so that all loads can be under way at once.
      const int y = place.y + r;
      below.load(image + min(y + 1, layout.H - 1) * W, place.x, layout.W);
      T row_term = 0;
#pragma unroll
      for (int j = 1; j <= kPack; ++j)
        row_term +=
            tv_value<kBeta, kIsotropic>(here.values[j + 1] - here.values[j], below.values[j] - here.values[j], beta);
      if (y < layout.H) term += row_term;
      here = below;
    }
  }
  store_team_sum(term, layout, place, sums);
}

// grad_mask = weight[image] * gradient; the terms go to sums [images * teams] too, unless that is null.
template <typename scalar_t, int kPack, Beta kBeta, bool kIsotropic>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_kernel(const scalar_t* __restrict__ mask, Weight<acc_t<scalar_t>> weight, scalar_t* __restrict__ grad_mask,
                    acc_t<scalar_t>* sums, Layout layout, acc_t<scalar_t> beta) {
  using T = acc_t<scalar_t>;
  const Place place(layout, kPack);
  T term = 0;
  if (place.inside) {
    const int64_t W = layout.W, plane = place.image * layout.H * W;
    const scalar_t* image = mask + plane;
    const T scale = weight[place.image];
    Pixels<T, kPack> here, below;
    T from_above[kPack];  // what flows down into the row that comes next

    // 1. The row above the strip gives its flow downwards; above the image there is a copy of row 0, and no flow.
    here.load(image + max(place.y - 1, 0) * W, place.x, layout.W);
    below.load(image + place.y * W, place.x, layout.W);
#pragma unroll
    for (int j = 1; j <= kPack; ++j)
      from_above[j - 1] =
          tv_flow<kBeta, kIsotropic>(here.values[j + 1] - here.values[j], below.values[j] - here.values[j], beta).down;
    here = below;

    // 2. Down the strip.
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int y = place.y + r;
      below.load(image + min(y + 1, layout.H - 1) * W, place.x, layout.W);
      T from_left =
          tv_flow<kBeta, kIsotropic>(here.values[1] - here.values[0], below.values[0] - here.values[0], beta).right;
      Pack<scalar_t, kPack> grad;
      T row_term = 0;
#pragma unroll
      for (int j = 1; j <= kPack; ++j) {
        const T dx = here.values[j + 1] - here.values[j], dy = below.values[j] - here.values[j];
        const Flow<T> out = tv_flow<kBeta, kIsotropic>(dx, dy, beta);
        grad[j - 1] = static_cast<scalar_t>(scale * (from_left + from_above[j - 1] - out.right - out.down));
        from_left = out.right;
        from_above[j - 1] = out.down;
        if (sums) row_term += tv_value<kBeta, kIsotropic>(dx, dy, beta);
      }
      if (y < layout.H) {
        store_pack(grad_mask + plane + y * W + place.x, grad);
        term += row_term;
      }
      here = below;
    }
  }
  if (sums) store_team_sum(term, layout, place, sums);
}

// value[b] = sum of sums[b, 0:teams], a warp per image.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const T* sums, T* value, int teams, int64_t images) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  T sum = 0;
  if (image < images)
    for (int i = threadIdx.x % 32; i < teams; i += 32) sum += sums[image * teams + i];
  sum = warp_sum(sum);
  if (image < images && threadIdx.x % 32 == 0) value[image] = sum;
}

ScalarType sum_dtype(const Tensor& mask) {
  return mask.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls `f` with the storage type and the number of pixels per load that the mask's width and addresses allow.
template <typename F>
void for_storage(const Tensor& mask, const F& f) {
  for_cuda_dtype(mask, [&]<typename scalar_t>() {
    constexpr int kPack = sizeof(scalar_t) == 8 ? 1 : 16 / sizeof(scalar_t);  // float64 is for checks
    const bool aligned = mask.size(3) % kPack == 0 && reinterpret_cast<uintptr_t>(mask.const_data_ptr()) % 16 == 0;
    aligned ? f.template operator()<scalar_t, kPack>() : f.template operator()<scalar_t, 1>();
  });
}

// Where the teams' sums go: straight to the value where one team is a whole image.
Tensor sums_of(const Tensor& value, const Layout& layout) {
  return layout.teams == 1 ? value : empty_tensor(value, {layout.images * layout.teams});
}

template <typename T>
void finish(const Tensor& sums, Tensor& value, const Layout& layout, const Device& device) {
  if (layout.teams == 1) return;
  launch(finish_kernel<T>, dim3(static_cast<unsigned>(ceil_div(layout.images, kThreads / 32))), dim3(kThreads), 0,
         device, sums.const_data_ptr<T>(), value.mutable_data_ptr<T>(), layout.teams, layout.images);
}

Tensor tv_norm(const Tensor& mask_in, double beta, bool isotropic) {
  check_tv_norm(mask_in, beta);
  const Device device(mask_in);
  const Tensor mask = in_order(mask_in);
  Tensor value = empty_tensor(mask, {mask.size(0)}, sum_dtype(mask));
  for_storage(mask, [&]<typename scalar_t, int kPack>() {
    using T = acc_t<scalar_t>;
    const Layout layout(mask, kPack);
    Tensor sums = sums_of(value, layout);
    for_tv_case(beta, isotropic, [&]<Beta kBeta, bool kIsotropic>() {
      launch(value_kernel<scalar_t, kPack, kBeta, kIsotropic>, layout.grid(), dim3(kThreads), 0, device,
             mask.const_data_ptr<scalar_t>(), sums.mutable_data_ptr<T>(), layout, T(beta));
    });
    finish<T>(sums, value, layout, device);
  });
  return value;
}

// grad_mask [B, 1, H, W] = weight times the gradient, the weight being grad_value [B] where there is one; with it the
// value [B], where one is given.
void run_gradient(const Tensor& mask, const Tensor* grad_value, double weight, double beta, bool isotropic,
                  Tensor& grad_mask, Tensor* value, const Device& device) {
  for_storage(mask, [&]<typename scalar_t, int kPack>() {
    using T = acc_t<scalar_t>;
    const Layout layout(mask, kPack);
    std::optional<Tensor> sums;
    if (value) sums = sums_of(*value, layout);
    for_tv_case(beta, isotropic, [&]<Beta kBeta, bool kIsotropic>() {
      launch(gradient_kernel<scalar_t, kPack, kBeta, kIsotropic>, layout.grid(), dim3(kThreads), 0, device,
             mask.const_data_ptr<scalar_t>(), grad_value ? weight_of<T>(*grad_value) : Weight<T>{nullptr, 0, T(weight)},
             grad_mask.mutable_data_ptr<scalar_t>(), sums ? sums->mutable_data_ptr<T>() : nullptr, layout, T(beta));
    });
    if (value) finish<T>(*sums, *value, layout, device);
  });
}

Tensor tv_norm_backward(const Tensor& grad_value, const Tensor& mask_in, double beta, bool isotropic) {
  check_tv_norm(mask_in, beta);
  check_grad_value(grad_value, mask_in);
  const Device device(mask_in);
  const Tensor mask = in_order(mask_in);
  Tensor grad_mask = empty_tensor(mask, {mask.size(0), 1, mask.size(2), mask.size(3)});
  run_gradient(mask, &grad_value, 1, beta, isotropic, grad_mask, nullptr, device);
  return grad_mask;
}

std::tuple<Tensor, Tensor> tv_norm_with_gradient(const Tensor& mask_in, double weight, double beta, bool isotropic) {
  check_tv_norm(mask_in, beta);
  const Device device(mask_in);
  const Tensor mask = in_order(mask_in);
  Tensor value = empty_tensor(mask, {mask.size(0)}, sum_dtype(mask));
  Tensor grad_mask = empty_tensor(mask, {mask.size(0), 1, mask.size(2), mask.size(3)});
  run_gradient(mask, nullptr, weight, beta, isotropic, grad_mask, &value, device);
  return {value, grad_mask};
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CASM_FAST_CUDA_KEY, m) {
  m.impl("tv_norm", TORCH_BOX(&casm_fast::tv_norm));
  m.impl("tv_norm_backward", TORCH_BOX(&casm_fast::tv_norm_backward));
  m.impl("tv_norm_with_gradient", TORCH_BOX(&casm_fast::tv_norm_with_gradient));
}
