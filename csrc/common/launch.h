// How a .cu file starts its kernels. The same sources compile under nvcc and, for the tests, as plain C++ with
// CASM_FAST_EMULATED, where tests/emulator runs every thread of a block as a fiber. So the callers use these and
// nothing else of the CUDA run time:
//
//   const Device device(mask);                        // guard: allocations and launches go to the tensor's device
//   launch(kernel, dim3(blocks, B), dim3(256), bytes, device, pixels, H, W);   // current stream, launch check
//
//   template <typename scalar_t>
//   __global__ void __launch_bounds__(256) kernel(const scalar_t* pixels, int64_t H, int64_t W) {
//     CASM_FAST_SHARED float sums[32];                // static shared memory
//     float* tile = dynamic_shared<float>();          // the `bytes` of the launch, aligned to 16
//   }
//
// Kernels live in an anonymous namespace. Shared memory holds garbage (NaN under emulation) until a thread writes it.
#pragma once

#include "common/library.h"

#ifdef CASM_FAST_EMULATED
#include "emulated_cuda.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>
#endif

namespace casm_fast {

#ifdef CASM_FAST_EMULATED

// Stands for the device of a tensor; emulated tensors lie in host memory.
class Device {
 public:
  explicit Device(const Tensor&) {}
  operator int32_t() const { return 0; }
};

inline int64_t multiprocessors(int32_t) { return 4; }
inline int64_t max_shared_bytes(int32_t) { return emulated::kMaxSharedBytes; }
inline int64_t l2_bytes(int32_t) { return 32 << 10; }  // small, so that small tensors already pass it

using emulated::dynamic_shared;
using emulated::launch;

#else

#define CASM_FAST_SHARED __shared__

// Makes the device of a tensor the current one for as long as the guard lives, and tells its index.
class Device {
 public:
  explicit Device(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}
  operator int32_t() const { return index_; }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline int64_t device_attribute(cudaDeviceAttr attribute, int32_t device_index) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device_index));
  return value;
}

inline int64_t multiprocessors(int32_t device_index) {
  return device_attribute(cudaDevAttrMultiProcessorCount, device_index);
}

// The most dynamic shared memory that one block can ask for.
inline int64_t max_shared_bytes(int32_t device_index) {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index);
}

inline int64_t l2_bytes(int32_t device_index) { return device_attribute(cudaDevAttrL2CacheSize, device_index); }

template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char casm_fast_dynamic_shared[];
  return reinterpret_cast<T*>(casm_fast_dynamic_shared);
}

// What needs no permission on any architecture: 48 KiB, less what a kernel keeps in static shared memory beside it.
constexpr int64_t kSharedWithoutPermission = 44 << 10;

// Lets a kernel ask for all shared memory that its static part leaves. The permission belongs to the process: always
// the same number, so that threads that launch the kernel with other sizes cannot take it from one another.
inline void permit_shared_bytes(const void* kernel, int32_t device_index) {
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  const int64_t most = max_shared_bytes(device_index) - static_cast<int64_t>(attributes.sharedSizeBytes);
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)));
}

// Starts `kernel` on torch's current stream of the device. An empty grid is no launch. Capturable in a CUDA graph.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, int64_t shared_bytes, int32_t device_index,
            const Args&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "as many arguments as the kernel has parameters");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  if (shared_bytes > kSharedWithoutPermission) permit_shared_bytes(reinterpret_cast<const void*>(kernel), device_index);
  // clang-format off: it takes the brackets of a launch for those of templates
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Params>(args)...);
  // clang-format on
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

#endif

// kCount neighbouring values, loaded or stored by one instruction: 16 bytes are the widest that every architecture has.
// Only for addresses that are multiples of the pack's size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
  __host__ __device__ T& operator[](int i) { return values[i]; }
  __host__ __device__ const T& operator[](int i) const { return values[i]; }
};

template <int kCount, typename T>
__device__ inline Pack<T, kCount> load_pack(const T* address) {
  return *reinterpret_cast<const Pack<T, kCount>*>(address);
}

template <int kCount, typename T>
__device__ inline void store_pack(T* address, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(address) = pack;
}

}  // namespace casm_fast
