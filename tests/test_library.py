"""What was built, and which of it was loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from casm_fast import _C, ops
from casm_fast.ops import library

OPS = [name for name in ops.__all__ if name != "library"]


def test_build_info_tells_compiler_flags_and_instruction_sets():
    info = _C.build_info()
    assert info["compiler"]
    assert "-O3" in info["flags"]
    assert "baseline" in info["instruction_sets"]
    assert info["instruction_set"] in info["instruction_sets"]


def test_status_names_a_reason_for_cuda():
    status = library.status()
    assert status.cuda_reason
    assert status.instruction_set == _C.build_info()["instruction_set"]


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_registered_and_has_a_reference(name):
    assert hasattr(torch.ops.casm_fast, name)
    assert callable(getattr(ops, name).reference)


@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_narrower_instruction_sets_give_the_same_results(limit):
    """ATEN_CPU_CAPABILITY lowers the set, as it does for torch itself."""
    program = """
import torch
from casm_fast import ops
from casm_fast.ops import library
torch.manual_seed(0)
image, mask = torch.rand(2, 3, 35, 37), torch.rand(2, 1, 7, 9)
offset = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
size = (31, 33)
full = ops.upsample_mask(mask, (35, 37), 0.6)
def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
close(ops.gaussian_blur(image, 3.0), ops.gaussian_blur.reference(image, 3.0))
close(ops.blur_mask(image, full, 3.0), ops.blur_mask.reference(image, full, 3.0))
close(ops.blend(image, None, mask), ops.blend.reference(image, None, mask))
close(full, ops.upsample_mask.reference(mask, (35, 37), 0.6))
arguments = image, image.flip(3), mask, offset, size, 0.6
close(ops.jitter_mask(*arguments), ops.jitter_mask.reference(*arguments))
close(ops.tv_norm(full), ops.tv_norm.reference(full))
boxes, area = ops.mask_boxes(full)
expected_boxes, expected_area = ops.mask_boxes.reference(full)
assert torch.equal(boxes, expected_boxes) and torch.equal(area, expected_area)
print(library.status().instruction_set)
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": limit}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    expected = "baseline" if limit == "default" else limit
    assert run.stdout.split()[-1] in {expected, "baseline"}
