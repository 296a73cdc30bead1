// blend, upsample_mask, jitter_mask: the schemas. What they mean: casm_fast/ops/jitter_mask.py. What guards memory:
// jitter_mask.h.

#include "common/library.h"

CASM_FAST_SCHEMAS(m) {
  m.def("blend(Tensor image, Tensor? reference, Tensor mask) -> Tensor");
  m.def("blend_backward_mask(Tensor grad_out, Tensor image, Tensor? reference, Tensor mask) -> Tensor");
  m.def("blend_backward_image(Tensor grad_out, Tensor mask, bool complement) -> Tensor");
}
