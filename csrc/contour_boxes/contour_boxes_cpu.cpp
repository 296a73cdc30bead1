// contour_boxes and contour_overlap on the CPU: one task for each map. There is no CUDA kernel: a sweep adds one pixel
// after the other.

#include "common/tensors.h"
#include "contour_boxes/contour_boxes.h"

namespace casm_fast {
namespace {

using torch::stable::parallel_for;

Tensor contour_boxes(const Tensor& maps_in) {
  check_maps(maps_in);
  const Tensor maps = in_order(maps_in);
  const int64_t B = maps.size(0), H = maps.size(2), W = maps.size(3);
  Tensor boxes = empty_tensor(maps, {B, kLevels, 4}, ScalarType::Int);
  const uint8_t* const pixels = maps.const_data_ptr<uint8_t>();
  int32_t* const out = boxes.mutable_data_ptr<int32_t>();
  parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    LargestContour largest(H, W);
    for (int64_t b = begin; b < end; ++b) largest(pixels + b * H * W, out + b * kLevels * 4);
  });
  return boxes;
}

Tensor contour_overlap(const Tensor& maps_in, const Tensor& boxes_in, const Tensor& owners_in) {
  check_maps(maps_in);
  check_same_device(maps_in, boxes_in);
  check_same_device(maps_in, owners_in);
  STD_TORCH_CHECK(boxes_in.dim() == 2 && boxes_in.size(1) == 4, "boxes must be [N, 4]");
  STD_TORCH_CHECK(owners_in.dim() == 1 && owners_in.size(0) == boxes_in.size(0), "owners must be [N]");
  STD_TORCH_CHECK(boxes_in.scalar_type() == ScalarType::Int, "boxes must be int32");
  STD_TORCH_CHECK(owners_in.scalar_type() == ScalarType::Long, "owners must be int64");
  const Tensor maps = in_order(maps_in), boxes = in_order(boxes_in), owners = in_order(owners_in);
  const int64_t B = maps.size(0), H = maps.size(2), W = maps.size(3), N = boxes.size(0);
  std::vector<std::vector<Box>> truth(B);
  const int32_t* const corners = boxes.const_data_ptr<int32_t>();
  const int64_t* const owner = owners.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < N; ++i) {
    STD_TORCH_CHECK(owner[i] >= 0 && owner[i] < B, "owners must be numbers of maps");
    const int32_t* const box = corners + 4 * i;
    truth[owner[i]].push_back({box[0], box[1], box[2], box[3]});
  }
  Tensor overlap = empty_tensor(maps, {B, kLevels}, ScalarType::Double);
  const uint8_t* const pixels = maps.const_data_ptr<uint8_t>();
  double* const out = overlap.mutable_data_ptr<double>();
  parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
    BestOverlap best(H, W);
    for (int64_t b = begin; b < end; ++b) best(pixels + b * H * W, truth[b], out + b * kLevels);
  });
  return overlap;
}

}  // namespace
}  // namespace casm_fast

CASM_FAST_KERNELS(CPU, m) {
  m.impl("contour_boxes", TORCH_BOX(&casm_fast::contour_boxes));
  m.impl("contour_overlap", TORCH_BOX(&casm_fast::contour_overlap));
}
