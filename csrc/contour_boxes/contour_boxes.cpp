// contour_boxes and contour_overlap: the schemas. What they mean: casm_fast/ops/contour_boxes.py. What guards memory
// and the trees of regions: contour_boxes.h.

#include "common/library.h"

CASM_FAST_SCHEMAS(m) {
  m.def("contour_boxes(Tensor maps) -> Tensor");
  m.def("contour_overlap(Tensor maps, Tensor boxes, Tensor owners) -> Tensor");
}
