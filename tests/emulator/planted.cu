// Kernels that tests/test_emulator.py runs to see what the emulator gives and what it catches: one kernel per case,
// most of them with a planted bug. An int32 tensor [n] comes in and one goes out.

#include <map>
#include <string>

#include "common/reduce.h"

namespace casm_fast {
namespace {

constexpr int kThreads = 96;  // three warps

// out[i] = data[n - 1 - i] within each block, through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(const int* data, int* out) {
  CASM_FAST_SHARED int tile[kThreads];
  const int i = threadIdx.x, first = blockIdx.x * kThreads;
  tile[i] = data[first + i];
  if (kBarrier) __syncthreads();
  out[first + i] = tile[kThreads - 1 - i];
}

// Twice in a row, so that a fast thread may overwrite what a slow one still has to read.
template <bool kSecondBarrier>
__global__ void rotate_kernel(const int* data, int* out) {
  int* tile = dynamic_shared<int>();
  const int i = threadIdx.x, first = blockIdx.x * kThreads;
  int value = data[first + i];
  for (int step = 0; step < 3; ++step) {
    tile[i] = value;
    __syncthreads();
    value = tile[(i + 1) % kThreads];
    if (kSecondBarrier) __syncthreads();
  }
  out[first + i] = value;
}

// Neighbours of one warp talk through shared memory.
template <bool kBarrier>
__global__ void warp_exchange_kernel(const int* data, int* out) {
  CASM_FAST_SHARED int tile[kThreads];
  const int i = threadIdx.x, first = blockIdx.x * kThreads;
  tile[i] = data[first + i];
  if (kBarrier) __syncwarp();
  out[first + i] = tile[i ^ 1];
}

__global__ void shared_overrun_kernel(const int* data, int* out) {
  int* tile = dynamic_shared<int>();
  const int i = threadIdx.x;
  tile[i] = data[i];
  __syncthreads();
  out[i] = tile[i + 1];  // the last thread reads past the end
}

__global__ void static_overrun_kernel(const int* data, int* out) {
  CASM_FAST_SHARED int tile[kThreads];
  const int i = threadIdx.x;
  tile[i] = data[i];
  __syncthreads();
  out[i] = tile[i + 1];
}

__global__ void global_overrun_kernel(const int* data, int* out) { out[threadIdx.x] = data[threadIdx.x + 1]; }

__global__ void misaligned_kernel(const int* data, int* out) {
  const Pack<int, 4> pack = load_pack<4>(data + 1);
  out[threadIdx.x] = pack[0];
}

__global__ void poison_kernel(const int*, int* out) {
  CASM_FAST_SHARED int sums[2];
  const int* tile = dynamic_shared<int>();
  out[blockIdx.x * kThreads + threadIdx.x] = sums[1] == -1 && tile[threadIdx.x] == -1;
  __syncthreads();
  sums[1] = dynamic_shared<int>()[threadIdx.x] = 7;  // for the next block to find
}

__global__ void skipped_barrier_kernel(const int* data, int* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = data[threadIdx.x];
}

__global__ void late_barrier_kernel(const int* data, int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = data[threadIdx.x];
}

__global__ void two_barriers_kernel(const int* data, int* out) {
  if (threadIdx.x < 50)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = data[threadIdx.x];
}

__global__ void barrier_and_warp_kernel(const int* data, int* out) {
  if (threadIdx.x < 8)
    __syncwarp();
  else
    __syncthreads();
  out[threadIdx.x] = data[threadIdx.x];
}

__global__ void mask_without_caller_kernel(const int* data, int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, data[threadIdx.x], 1);
}

__global__ void masks_differ_kernel(const int* data, int* out) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 32 < 16 ? 0x0000ffffu : kFullWarp, data[threadIdx.x], 1);
}

__global__ void lane_outside_mask_kernel(const int* data, int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, data[threadIdx.x], 20);
}

__global__ void lane_has_left_kernel(const int* data, int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kFullWarp, data[threadIdx.x], 1);
}

__global__ void operations_differ_kernel(const int* data, int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(kFullWarp, data[threadIdx.x], 1)
                                     : static_cast<int>(__ballot_sync(kFullWarp, data[threadIdx.x]));
}

// Both halves of a warp on their own: different masks that do not overlap are right.
__global__ void half_warps_kernel(const int* data, int* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x % 32 < 16)
    out[i] = __shfl_xor_sync(0x0000ffffu, data[i], 1);
  else
    out[i] = __reduce_max_sync(0xffff0000u, data[i]);
}

// Row k of out [20, 96] is one operation on data.
__global__ void operations_kernel(const int* data, int* out) {
  const int i = threadIdx.x, x = data[i];
  int row = 0;
  const auto put = [&](auto value) { out[row++ * kThreads + i] = static_cast<int>(value); };
  put(__shfl_sync(kFullWarp, x, 33));
  put(__shfl_sync(kFullWarp, x, 3, 8));
  put(__shfl_up_sync(kFullWarp, x, 5));
  put(__shfl_up_sync(kFullWarp, x, 3, 16));
  put(__shfl_down_sync(kFullWarp, x, 7));
  put(__shfl_down_sync(kFullWarp, x, 2, 4));
  put(__shfl_xor_sync(kFullWarp, x, 9));
  put(__ballot_sync(kFullWarp, x % 3 == 0));
  put(__any_sync(kFullWarp, x == data[40]));
  put(__all_sync(kFullWarp, x != data[40]));
  put(__match_any_sync(kFullWarp, x % 5));
  put(__reduce_add_sync(kFullWarp, x));
  put(__syncthreads_count(x % 2));
  put(__syncthreads_or(x == data[95]));
  put(__syncthreads_and(x > 0));
  put(__popc(x));
  put(__clz(x));
  put(__ffs(x));
  put(__brev(x));
  put(block_sum<kThreads>(x % 100));
}

// From -1 on: out[0] counts, out[1] is the least, out[2] the greatest, out[3] the common bits, out[4] one of the
// values.
__global__ void atomics_kernel(const int* data, int* out) {
  const int x = data[blockIdx.x * kThreads + threadIdx.x];
  atomicAdd(&out[0], 1);
  atomicMin(&out[1], x);
  atomicMax(&out[2], x);
  atomicAnd(&out[3], x);
  atomicCAS(&out[4], -1, x);
}

// A double-precision shuffle, so that eight bytes travel whole, in a block of two dimensions.
__global__ void wide_kernel(const int* data, int* out) {
  const int i = threadIdx.x + blockDim.x * threadIdx.y;
  const double value = 1.0 / data[i];
  out[i] = __shfl_down_sync(kFullWarp, value, 1) == 1.0 / data[i % 32 == 31 ? i : i + 1];
}

struct Case {
  void (*kernel)(const int*, int*);
  dim3 block = dim3(kThreads);
};

const std::map<std::string, Case> kCases = {
    {"reverse", {reverse_kernel<true>}},
    {"reverse without barrier", {reverse_kernel<false>}},
    {"rotate", {rotate_kernel<true>}},
    {"rotate without barrier", {rotate_kernel<false>}},
    {"warp exchange", {warp_exchange_kernel<true>}},
    {"warp exchange without barrier", {warp_exchange_kernel<false>}},
    {"shared overrun", {shared_overrun_kernel}},
    {"static overrun", {static_overrun_kernel}},
    {"global overrun", {global_overrun_kernel}},
    {"misaligned", {misaligned_kernel}},
    {"poison", {poison_kernel}},
    {"skipped barrier", {skipped_barrier_kernel}},
    {"late barrier", {late_barrier_kernel}},
    {"two barriers", {two_barriers_kernel}},
    {"barrier and warp", {barrier_and_warp_kernel}},
    {"mask without caller", {mask_without_caller_kernel}},
    {"masks differ", {masks_differ_kernel}},
    {"lane outside mask", {lane_outside_mask_kernel}},
    {"lane has left", {lane_has_left_kernel}},
    {"operations differ", {operations_differ_kernel}},
    {"partial warp", {warp_exchange_kernel<true>, dim3(kThreads - 4)}},
    {"half warps", {half_warps_kernel}},
    {"operations", {operations_kernel}},
    {"atomics", {atomics_kernel}},
    {"wide", {wide_kernel, dim3(8, 12)}},
    {"large block", {reverse_kernel<true>, dim3(33, 32)}},
};

Tensor planted(const Tensor& data, std::string name, int64_t size) {
  const Case& the_case = kCases.at(name);
  const Device device(data);
  Tensor out = torch::stable::new_empty(data, {size});
  torch::stable::fill_(out, -1);
  launch(the_case.kernel, dim3(static_cast<unsigned>(data.size(0) / kThreads)), the_case.block, kThreads * sizeof(int),
         device, data.const_data_ptr<int>(), out.mutable_data_ptr<int>());
  return out;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_SCHEMAS(m) { m.def("planted(Tensor data, str name, int size) -> Tensor"); }
CASM_FAST_KERNELS(CASM_FAST_CUDA_KEY, m) { m.impl("planted", TORCH_BOX(&casm_fast::planted)); }
