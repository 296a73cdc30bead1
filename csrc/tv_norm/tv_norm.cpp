// tv_norm: the schemas. What they mean: casm_fast/ops/tv_norm.py. What guards memory: tv_norm.h.

#include "common/library.h"

CASM_FAST_SCHEMAS(m) {
  m.def("tv_norm(Tensor mask, float beta, bool isotropic) -> Tensor");
  m.def("tv_norm_backward(Tensor grad_value, Tensor mask, float beta, bool isotropic) -> Tensor");
  m.def("tv_norm_with_gradient(Tensor mask, float weight, float beta, bool isotropic) -> (Tensor, Tensor)");
}
