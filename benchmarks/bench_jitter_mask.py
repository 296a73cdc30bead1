"""blend, upsample_mask and jitter_mask beside compositions of torch's own ops.

The peer of `jitter_mask` has what it needs ready: the weights as matrices, and one shift for the
whole batch, so that its crop is a view. Its first matrix product is one plain GEMM over all masks,
the fastest of four ways tried; compiled, the crop and the blend are fused into one loop.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from casm_fast.ops import blend, jitter_mask, upsample_mask
from casm_fast.ops.jitter_mask import axis_weights

SIGMA = 0.625  # cells: 5 pixels at scale 8, the setting of Fong & Vedaldi (2017)
CELLS, ROOM, SHIFT = 28, 4, (2, 3)
long = pytest.mark.long


def rand(*shape, device):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def compiled(function):
    torch._dynamo.reset()  # every case is its own program: no recompilation limit is met
    return torch.compile(function)


def lerp(image, reference, mask):
    if mask.shape[2:] != image.shape[2:]:
        mask = F.interpolate(mask, size=image.shape[2:], mode="nearest")
    return torch.lerp(reference, image, mask)


@pytest.mark.parametrize(
    ("B", "side", "small"),
    [
        pytest.param(1, 28, 28, marks=long),
        (256, 28, 28),
        pytest.param(1, 224, 224, marks=long),
        (32, 224, 224),
        (32, 224, 56),
        pytest.param(256, 56, 56, marks=long),
        pytest.param(1, 1024, 1024, marks=long),
        pytest.param(4, 1024, 256, marks=long),
        pytest.param(256, 224, 56, marks=long),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_blend(race, device, B, side, small, gradient):
    image, reference, grad = (rand(B, 3, side, side, device=device) + s for s in (0, 1, 2))
    mask = rand(B, 1, small, small, device=device).requires_grad_(gradient)
    fused = compiled(lerp)

    def runner(function):
        if not gradient:
            return lambda: function(image, reference, mask)
        return lambda: torch.autograd.grad(function(image, reference, mask), mask, grad)[0]

    race(
        op="blend, forward and mask gradient" if gradient else "blend",
        case=f"{B}x3x{side}x{side}, mask {small}x{small}",
        ours=runner(blend),
        peers={"torch.lerp": runner(lerp), "torch.lerp compiled": runner(fused)},
        expected=runner(blend.reference),
        tolerance=1e-4 if gradient else 1e-5,
        bytes=(3 * image.nbytes + mask.nbytes) * (2 if gradient else 1),
        images=B,
    )


def upsample_by_matrices(mask, rows, columns):
    B, _, h, w = mask.shape
    wide = (mask.reshape(B * h, w) @ columns).view(B, h, -1)
    return torch.bmm(rows.expand(B, -1, -1), wide)[:, None]


@pytest.mark.parametrize("B", [1, 32, pytest.param(256, marks=long)])
@pytest.mark.parametrize("gradient", [False, True])
def test_upsample_mask(race, device, B, gradient):
    side = 8 * CELLS
    mask = rand(B, 1, CELLS, CELLS, device=device).requires_grad_(gradient)
    grad = rand(B, 1, side, side, device=device)
    rows = axis_weights(CELLS, side, SIGMA, mask.detach())
    columns = rows.T.contiguous()
    fused = compiled(upsample_by_matrices)

    def runner(function):
        if not gradient:
            return function
        return lambda: torch.autograd.grad(function(), mask, grad)[0]

    race(
        op="upsample_mask, forward and backward" if gradient else "upsample_mask",
        case=f"{B}x1x{CELLS}x{CELLS} to {side}x{side}, sigma {SIGMA}",
        ours=runner(lambda: upsample_mask(mask, (side, side), SIGMA)),
        peers={
            "matrices": runner(lambda: upsample_by_matrices(mask, rows, columns)),
            "matrices compiled": runner(lambda: fused(mask, rows, columns)),
        },
        expected=runner(lambda: upsample_mask.reference(mask, (side, side), SIGMA)),
        tolerance=1e-4,
        bytes=(grad.nbytes + mask.nbytes) * (2 if gradient else 1),
        images=B,
    )


def jitter_by_torch(image, reference, mask, rows, columns):
    (y, x), side = SHIFT, rows.shape[0]
    large = upsample_by_matrices(mask, rows, columns)
    crops = (t[:, :, y : y + side, x : x + side] for t in (reference, image))
    return torch.lerp(*crops, large)


@pytest.mark.parametrize(
    "B", [1, 8, 32, pytest.param(128, marks=long), pytest.param(256, marks=long)]
)
@pytest.mark.parametrize("gradient", [False, True])
def test_jitter_mask(race, device, B, gradient):
    side = 8 * CELLS
    image, reference = (rand(B, 3, side + ROOM, side + ROOM, device=device) + s for s in (0, 1))
    mask = rand(B, 1, CELLS, CELLS, device=device).requires_grad_(gradient)
    grad = rand(B, 3, side, side, device=device)
    offset = torch.tensor(SHIFT, dtype=torch.int32, device=device).repeat(B, 1)
    rows = axis_weights(CELLS, side, SIGMA, mask.detach())
    columns = rows.T.contiguous()
    fused = compiled(jitter_by_torch)

    def runner(function):
        if not gradient:
            return function
        return lambda: torch.autograd.grad(function(), mask, grad)[0]

    race(
        op="jitter_mask, forward and mask gradient" if gradient else "jitter_mask",
        case=f"{B}x3x{side}x{side}, mask {CELLS}x{CELLS}, sigma {SIGMA}",
        ours=runner(lambda: jitter_mask(image, reference, mask, offset, (side, side), SIGMA)),
        peers={
            "matrices": runner(lambda: jitter_by_torch(image, reference, mask, rows, columns)),
            "matrices compiled": runner(lambda: fused(image, reference, mask, rows, columns)),
        },
        expected=runner(
            lambda: jitter_mask.reference(image, reference, mask, offset, (side, side), SIGMA)
        ),
        tolerance=1e-3 if gradient else 1e-5,
        bytes=(3 * grad.nbytes + mask.nbytes) * (2 if gradient else 1),
        images=B,
    )
