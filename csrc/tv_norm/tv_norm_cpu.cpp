// tv_norm on the CPU: one pass over the mask for the value, one for the gradient.
//
// The gradient is a gather: a pixel takes its own forward differences and those of its left and upper neighbour, whose
// slopes are computed again instead of being stored. Sums are taken over fixed blocks of rows, in order, so that the
// value does not depend on the number of threads.

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "tv_norm/tv_norm.h"

namespace casm_fast {
namespace {

constexpr int64_t kRowsPerBlock = 16;  // enough work for a task, and enough tasks for one image

// Adds up the terms of rows [first, last) of one plane.
template <Beta kBeta, bool kIsotropic, typename T>
T sum_rows(const T* mask, int64_t H, int64_t W, int64_t first, int64_t last, T beta) {  // mask [H, W]
  T sum = 0;
  for (int64_t y = first; y < last; ++y) {
    const T* row = mask + y * W;
    const T* below = y + 1 < H ? row + W : row;  // the last row's difference is zero
    T row_sum = 0;
    for (int64_t x = 0; x < W; ++x) {
      const T dx = x + 1 < W ? row[x + 1] - row[x] : T(0);
      const T dy = below[x] - row[x];
      if constexpr (kIsotropic)
        row_sum += tv_term<kBeta>(dx * dx + dy * dy, beta);
      else
        row_sum += tv_term<kBeta>(dx * dx, beta) + tv_term<kBeta>(dy * dy, beta);
    }
    sum += row_sum;
  }
  return sum;
}

// The flow out of pixel (y, x) to its right and lower neighbour: slope times difference.
template <Beta kBeta, bool kIsotropic, typename T>
struct Flow {
  T right, down;
  Flow(T here, T right_pixel, T lower_pixel, T beta) {
    const T dx = right_pixel - here, dy = lower_pixel - here;
    if constexpr (kIsotropic) {
      const T slope = tv_slope<kBeta>(dx * dx + dy * dy, beta);
      right = slope * dx;
      down = slope * dy;
    } else {
      right = tv_slope<kBeta>(dx * dx, beta) * dx;
      down = tv_slope<kBeta>(dy * dy, beta) * dy;
    }
  }
};

// grad_mask of row y: what flows in from the left and from above, less what flows out.
template <Beta kBeta, bool kIsotropic, typename T>
void gradient_row(const T* mask, T* grad_mask, int64_t H, int64_t W, int64_t y, T scale, T beta) {
  const T* row = mask + y * W;
  const T* below = y + 1 < H ? row + W : row;
  const T* above = y > 0 ? row - W : row;  // at the top, a row equal to this one lets nothing flow
  for (int64_t x = 0; x < W; ++x) {
    const int64_t next = x + 1 < W ? x + 1 : x, previous = x > 0 ? x - 1 : x;
    const Flow<kBeta, kIsotropic, T> out(row[x], row[next], below[x], beta);
    const Flow<kBeta, kIsotropic, T> left(row[previous], row[x], below[previous], beta);
    const Flow<kBeta, kIsotropic, T> upper(above[x], above[next], row[x], beta);
    grad_mask[y * W + x] = scale * (left.right + upper.down - out.right - out.down);
  }
}

// Calls `f` with the compile-time case of (beta, isotropic).
template <typename F>
void for_case(double beta, bool isotropic, const F& f) {
  const auto with_beta = [&]<Beta kBeta>() {
    isotropic ? f.template operator()<kBeta, true>() : f.template operator()<kBeta, false>();
  };
  switch (beta_case(beta)) {
    case Beta::one: return with_beta.template operator()<Beta::one>();
    case Beta::two: return with_beta.template operator()<Beta::two>();
    case Beta::three: return with_beta.template operator()<Beta::three>();
    case Beta::any: return with_beta.template operator()<Beta::any>();
  }
}

Tensor tv_norm(const Tensor& mask_in, double beta, bool isotropic) {
  check_tv_norm(mask_in, beta);
  const Tensor mask = torch::stable::contiguous(mask_in);
  const int64_t B = mask.size(0), H = mask.size(2), W = mask.size(3);
  const int64_t blocks = ceil_div(H, kRowsPerBlock);
  Tensor value = torch::stable::new_zeros(mask, {B});
  for_cpu_dtype(mask, [&]<typename scalar_t>() {
    const scalar_t* pixels = mask.const_data_ptr<scalar_t>();
    std::vector<scalar_t> partial(B * blocks);
    for_case(beta, isotropic, [&]<Beta kBeta, bool kIsotropic>() {
      torch::stable::parallel_for(0, B * blocks, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / blocks, first = i % blocks * kRowsPerBlock;
          partial[i] = sum_rows<kBeta, kIsotropic, scalar_t>(pixels + b * H * W, H, W, first,
                                                             std::min(first + kRowsPerBlock, H), scalar_t(beta));
        }
      });
    });
    scalar_t* sums = value.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < B * blocks; ++i) sums[i / blocks] += partial[i];
  });
  return value;
}

Tensor tv_norm_backward(const Tensor& grad_value_in, const Tensor& mask_in, double beta, bool isotropic) {
  check_tv_norm(mask_in, beta);
  check_same_dtype(grad_value_in, mask_in);
  STD_TORCH_CHECK(grad_value_in.dim() == 1 && grad_value_in.size(0) == mask_in.size(0), "grad_value must be [B]");
  const Tensor mask = torch::stable::contiguous(mask_in);
  const Tensor grad_value = torch::stable::contiguous(grad_value_in);
  const int64_t B = mask.size(0), H = mask.size(2), W = mask.size(3);
  Tensor grad_mask = torch::stable::new_empty(mask, {B, 1, H, W});
  for_cpu_dtype(mask, [&]<typename scalar_t>() {
    const scalar_t* pixels = mask.const_data_ptr<scalar_t>();
    const scalar_t* scale = grad_value.const_data_ptr<scalar_t>();
    scalar_t* grad = grad_mask.mutable_data_ptr<scalar_t>();
    for_case(beta, isotropic, [&]<Beta kBeta, bool kIsotropic>() {
      torch::stable::parallel_for(0, B * H, 64, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / H, plane = b * H * W;
          gradient_row<kBeta, kIsotropic, scalar_t>(pixels + plane, grad + plane, H, W, i % H, scale[b],
                                                    scalar_t(beta));
        }
      });
    });
  });
  return grad_mask;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CPU, m) {
  m.impl("tv_norm", TORCH_BOX(&casm_fast::tv_norm));
  m.impl("tv_norm_backward", TORCH_BOX(&casm_fast::tv_norm_backward));
}
