// blend, upsample_mask, jitter_mask: the schemas. What they mean: casm_fast/ops/jitter_mask.py. What guards memory:
// jitter_mask.h.

#include "common/library.h"

CASM_FAST_SCHEMAS(m) {
  m.def("blend(Tensor image, Tensor? reference, Tensor mask) -> Tensor");
  m.def("blend_backward_mask(Tensor grad_out, Tensor image, Tensor? reference, Tensor mask) -> Tensor");
  m.def("blend_backward_image(Tensor grad_out, Tensor mask, bool complement) -> Tensor");

  m.def("upsample_mask(Tensor mask, SymInt H, SymInt W, float sigma) -> Tensor");
  m.def("upsample_mask_backward(Tensor grad_large, SymInt h, SymInt w, float sigma) -> Tensor");

  m.def(
      "jitter_mask(Tensor image, Tensor? reference, Tensor mask, Tensor offset, SymInt H, SymInt W, float sigma) "
      "-> Tensor");
  m.def(
      "jitter_mask_backward_mask(Tensor grad_out, Tensor image, Tensor? reference, Tensor mask, Tensor offset, "
      "float sigma) -> Tensor");
  m.def(
      "jitter_mask_backward_image(Tensor grad_out, Tensor mask, Tensor offset, SymInt Hi, SymInt Wi, float sigma, "
      "bool complement) -> Tensor");
}
