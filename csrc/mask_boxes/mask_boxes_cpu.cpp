// mask_boxes and connected_components on the CPU: one pass over a mask gives its level (level_cpu.h), a second turns
// pixels into bits (packing.h), bits into runs and runs into components (runs.h).
//
// Many images: one task each, so that the second pass finds the mask in the cache. Few large ones: their rows are cut
// into bands, which are scanned in parallel and then joined. Neither changes a result: a component is named by its
// first pixel, whatever the order of the unions, and the sum for the level has one order.

#include "common/dispatch.h"
#include "common/tensors.h"
#include "mask_boxes/level_cpu.h"
#include "mask_boxes/mask_boxes.h"
#include "mask_boxes/runs.h"

namespace casm_fast {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kTaskPixels = 16384;  // fewer cost less than waking a thread for them

int64_t images_per_task(int64_t pixels) { return std::max<int64_t>(1, kTaskPixels / pixels); }

// How many bands the rows of one image are cut into: one when there are images enough for all threads.
int64_t bands_per_image(int64_t B, int64_t H, int64_t W) {
  const int64_t idle = torch::stable::get_num_threads() / B;
  return std::clamp<int64_t>(std::min(idle, H * W / kTaskPixels), 1, H);
}

template <typename T>
T find_level(const T* pixels, int64_t n, Rule rule, double alpha, bool parallel) {  // pixels [n]
  std::vector<Statistics> parts(ceil_div(n, kSumBlock));
  const auto look = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[i] = block_statistics(pixels + i * kSumBlock, std::min(kSumBlock, n - i * kSumBlock), rule);
  };
  const int64_t blocks = int64_t(parts.size());
  parallel ? parallel_for(0, blocks, 1, look) : look(0, blocks);
  for (int64_t i = 1; i < blocks; ++i) add(parts[0], parts[i]);
  return level_of(pixels, n, parts[0], rule, alpha);
}

// Finds and joins all runs of an image. kConnectivity 0 leaves them apart.
template <int kConnectivity, typename T, typename Keep>
void collect(Runs& runs, const T* pixels, Keep keep, bool parallel) {
  const auto scan = [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) runs.scan<kConnectivity>(pixels, band, keep);
  };
  parallel ? parallel_for(0, runs.bands(), 1, scan) : scan(0, runs.bands());
  if constexpr (kConnectivity != 0) runs.join_bands<kConnectivity>(pixels, keep);
}

// Calls `image(runs, b, parallel)` for every image of a batch: images in parallel, or the bands of each.
template <typename F>
void for_each_image(int64_t B, int64_t H, int64_t W, const F& image) {
  if (B == 0) return;
  const int64_t bands = bands_per_image(B, H, W);
  const auto several = [&](int64_t begin, int64_t end) {
    Runs runs(H, W, ceil_div(H, bands));
    for (int64_t b = begin; b < end; ++b) image(runs, b, bands > 1);
  };
  bands > 1 ? several(0, B) : parallel_for(0, B, images_per_task(H * W), several);
}

// Calls `f` with 4 or 8 as a constant.
template <typename F>
void for_connectivity(int64_t connectivity, const F& f) {
  connectivity == 4 ? f.template operator()<4>() : f.template operator()<8>();
}

std::tuple<Tensor, Tensor> mask_boxes(const Tensor& mask_in, std::optional<Tensor> level_in, std::string rule_name,
                                      double alpha, int64_t connectivity, std::string component) {
  check_mask_boxes(mask_in, level_in, connectivity);
  const Rule rule = level_in ? Rule::level : rule_of(rule_name);
  const bool largest = is_largest(component);
  const Tensor mask = in_order(mask_in);
  const int64_t B = mask.size(0), H = mask.size(2), W = mask.size(3), n = H * W;
  Tensor boxes = empty_tensor(mask, {B, 4}, ScalarType::Int);
  Tensor area = empty_tensor(mask, {B}, ScalarType::Int);
  int32_t* const box = boxes.mutable_data_ptr<int32_t>();
  int32_t* const areas = area.mutable_data_ptr<int32_t>();
  for_cpu_dtype(mask, [&]<typename T>() {
    const T* const pixels = mask.const_data_ptr<T>();
    const std::optional<Tensor> level = level_in ? std::optional(in_order(*level_in)) : std::nullopt;
    const T* const levels = level ? level->const_data_ptr<T>() : nullptr;
    for_each_image(B, H, W, [&](Runs& runs, int64_t b, bool parallel) {
      const T* const image = pixels + b * n;
      const AtLeast<T> keep{levels ? levels[b] : find_level(image, n, rule, alpha, parallel)};
      if (largest) {
        for_connectivity(connectivity,
                         [&]<int kConnectivity>() { collect<kConnectivity>(runs, image, keep, parallel); });
        runs.measure(runs.find_largest(), box + 4 * b, areas + b);
      } else {
        collect<0>(runs, image, keep, parallel);
        runs.measure_all(box + 4 * b, areas + b);
      }
    });
  });
  return {boxes, area};
}

template <typename T>
void label(const Tensor& binary, int64_t connectivity, int32_t* labels) {  // binary, labels [B, 1, H, W]
  const T* const pixels = static_cast<const T*>(binary.const_data_ptr());
  const int64_t B = binary.size(0), H = binary.size(2), W = binary.size(3), n = H * W;
  for_each_image(B, H, W, [&](Runs& runs, int64_t b, bool parallel) {
    for_connectivity(connectivity, [&]<int kConnectivity>() {
      collect<kConnectivity>(runs, pixels + b * n, NonZero<T>{}, parallel);
    });
    runs.flatten();
    const auto paint = [&](int64_t begin, int64_t end) {
      for (int64_t band = begin; band < end; ++band) runs.paint(band, labels + b * n);
    };
    parallel ? parallel_for(0, runs.bands(), 1, paint) : paint(0, runs.bands());
  });
}

Tensor connected_components(const Tensor& binary_in, int64_t connectivity) {
  check_binary(binary_in, connectivity);
  const Tensor binary = in_order(binary_in);
  Tensor labels = empty_tensor(binary, binary.sizes(), ScalarType::Int);
  int32_t* const out = labels.mutable_data_ptr<int32_t>();
  switch (binary.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte: label<uint8_t>(binary, connectivity, out); break;
    case ScalarType::Float: label<float>(binary, connectivity, out); break;
    case ScalarType::Double: label<double>(binary, connectivity, out); break;
    default: STD_TORCH_CHECK(false, "expected bool, uint8, float32 or float64");
  }
  return labels;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CPU, m) {
  m.impl("mask_boxes", TORCH_BOX(&casm_fast::mask_boxes));
  m.impl("connected_components", TORCH_BOX(&casm_fast::connected_components));
}
