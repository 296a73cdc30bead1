// mask_boxes and connected_components: the schemas. What they mean: casm_fast/ops/mask_boxes.py. What guards memory and
// the maths of the levels: mask_boxes.h.

#include "common/library.h"

CASM_FAST_SCHEMAS(m) {
  m.def(
      "mask_boxes(Tensor mask, Tensor? level, str rule, float alpha, int connectivity, str component)"
      " -> (Tensor boxes, Tensor area)");
  m.def("connected_components(Tensor binary, int connectivity) -> Tensor");
}
