// Sums over the threads of a warp and of a block, always in the same order: the result depends on the inputs alone.
#pragma once

#include "common/launch.h"

namespace casm_fast {

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over the 32 lanes, in every lane.
template <typename T>
__device__ inline T warp_sum(T value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullWarp, value, distance);
  return value;
}

// The sum over the block, in every thread. kThreads is the size of the block, a multiple of 32; every thread calls.
template <int kThreads, typename T>
__device__ inline T block_sum(T value) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  constexpr int kWarps = kThreads / 32;
  value = warp_sum(value);
  if constexpr (kWarps > 1) {
    CASM_FAST_SHARED T sums[kWarps];
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    if (thread % 32 == 0) sums[thread / 32] = value;
    __syncthreads();
    value = sums[0];
    for (int warp = 1; warp < kWarps; ++warp) value += sums[warp];
    __syncthreads();  // the next sum may write sums[]
  }
  return value;
}

}  // namespace casm_fast
