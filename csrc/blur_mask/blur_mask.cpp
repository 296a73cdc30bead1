// gaussian_blur and blur_mask: the schemas. What they mean: casm_fast/ops/blur_mask.py. What guards memory:
// blur_mask.h.

#include "common/library.h"

CASM_FAST_SCHEMAS(m) {
  m.def("gaussian_blur(Tensor image, float sigma, float truncate) -> Tensor");
  m.def("gaussian_blur_backward(Tensor grad_output, float sigma, float truncate) -> Tensor");
  m.def("blur_mask(Tensor image, Tensor mask, float sigma, float truncate) -> Tensor");
  // blur_mask that also hands out gaussian_blur(image), for the gradient of the mask.
  m.def("blur_mask_and_blur(Tensor image, Tensor mask, float sigma, float truncate) -> (Tensor, Tensor)");
  m.def("blur_mask_backward_image(Tensor grad_output, Tensor mask, float sigma, float truncate) -> Tensor");
  m.def("blur_mask_backward_mask(Tensor grad_output, Tensor image, Tensor blurred) -> Tensor");
}
