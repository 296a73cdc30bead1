"""tv_norm: reference, outside oracle, gradients, registration, layouts, errors, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.library import opcheck

from casm_fast.ops import tv_norm

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 2), (28, 28), (33, 65), (17, 131)]
BETAS = [1.0, 1.5, 2.0, 3.0, 4.5]
# Worst relative error measured over these shapes and betas: 4e-7 (float32), 5e-16 (float64).
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def masks(shape, batch=3, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((batch, 1, *shape), generator=generator, dtype=dtype)
    return mask.to(device)


def scalar_loop(mask: np.ndarray, beta: float, isotropic: bool) -> float:
    """The formula, pixel by pixel."""
    H, W = mask.shape
    total = 0.0
    for y in range(H):
        for x in range(W):
            dx = mask[y, x + 1] - mask[y, x] if x + 1 < W else 0.0
            dy = mask[y + 1, x] - mask[y, x] if y + 1 < H else 0.0
            if isotropic:
                total += (dx * dx + dy * dy) ** (beta / 2)
            else:
                total += abs(dx) ** beta + abs(dy) ** beta
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, beta, isotropic, dtype, device):
    mask = masks(shape, dtype=dtype, device=device).requires_grad_()
    weight = torch.linspace(0.5, 2, 3, dtype=dtype, device=device)
    value, expected = (f(mask, beta, isotropic) for f in (tv_norm, tv_norm.reference))
    (grad,) = torch.autograd.grad((value * weight).sum(), mask)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), mask)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_equals_scalar_loop(beta, isotropic, device):
    mask = masks((9, 6), device=device)
    expected = [scalar_loop(m[0].cpu().numpy(), beta, isotropic) for m in mask]
    np.testing.assert_allclose(tv_norm(mask, beta, isotropic).cpu(), expected, rtol=1e-13)


def test_empty_batch(device):
    mask = torch.zeros(0, 1, 5, 4, device=device, requires_grad=True)
    value = tv_norm(mask)
    value.sum().backward()
    assert value.shape == (0,)
    assert mask.grad.shape == mask.shape


@pytest.mark.parametrize("beta", [1.0, 1.5, 3.0])
def test_flat_regions_have_zero_gradient(beta, device):
    mask = torch.full((1, 1, 6, 6), 0.25, device=device, requires_grad=True)
    tv_norm(mask, beta).sum().backward()
    assert torch.count_nonzero(mask.grad) == 0


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("beta", [1.0, 2.0, 2.5, 3.0])
def test_gradcheck(beta, isotropic, device):
    mask = masks((5, 4), batch=2, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: tv_norm(m, beta, isotropic), mask)


def test_opcheck(device):
    mask = masks((6, 5), device=device)
    grad = torch.ones(3, dtype=mask.dtype, device=device)
    opcheck(torch.ops.casm_fast.tv_norm.default, (mask.requires_grad_(), 3.0, True))
    opcheck(torch.ops.casm_fast.tv_norm_backward.default, (grad, mask.detach(), 3.0, True))


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "expanded", "sliced"])
def test_layouts(layout, device):
    base = masks((12, 10), batch=4, device=device)
    mask = {
        "transposed": base.transpose(2, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "expanded": base[:1].expand(4, -1, -1, -1),
        "sliced": base[1::2, :, 1::3, ::2],
    }[layout]
    strided, packed = (
        mask.detach().requires_grad_(),
        mask.detach().clone(memory_format=torch.contiguous_format).requires_grad_(),
    )
    assert torch.equal(tv_norm(strided), tv_norm(packed))
    (grad,) = torch.autograd.grad(tv_norm(strided).sum(), strided)
    (expected,) = torch.autograd.grad(tv_norm(packed).sum(), packed)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "tv_norm: expected `mask` to be a tensor, got list"),
        (
            (torch.rand(3, 4),),
            ValueError,
            "tv_norm: expected `mask` of shape [B, 1, H, W], got [3, 4]",
        ),
        (
            (torch.rand(1, 3, 4, 4),),
            ValueError,
            "tv_norm: expected `mask` of shape [B, 1, H, W], got [1, 3, 4, 4]",
        ),
        (
            (torch.rand(1, 1, 0, 4),),
            ValueError,
            "tv_norm: expected `mask` to have pixels, got [1, 1, 0, 4]",
        ),
        (
            (torch.zeros(1, 1, 4, 4, dtype=torch.int32),),
            TypeError,
            "tv_norm: expected `mask` in one of float32, float64 on cpu, got int32",
        ),
        (
            (torch.rand(1, 1, 4, 4), 0.5),
            ValueError,
            "tv_norm: expected `beta` to be finite and at least 1, got 0.5",
        ),
        (
            (torch.rand(1, 1, 4, 4), float("nan")),
            ValueError,
            "tv_norm: expected `beta` to be finite and at least 1, got nan",
        ),
        (
            (torch.rand(1, 1, 4, 4), "3"),
            TypeError,
            "tv_norm: expected `beta` to be a number, got str",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error) as caught:
        tv_norm(*arguments)
    assert str(caught.value) == message


def test_double_backward_is_refused(device):
    mask = masks((4, 4), device=device).requires_grad_()
    (grad,) = torch.autograd.grad(tv_norm(mask).sum(), mask, create_graph=True)
    with pytest.raises(RuntimeError, match="tv_norm: expected a first derivative"):
        grad.sum().backward()


def test_deterministic_for_any_number_of_threads(device):
    mask = masks((224, 224), batch=2, dtype=torch.float32, device=device)
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            values.append(tv_norm(mask))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(values[0], value) for value in values[1:])


def test_compiles_to_one_graph(device):
    mask = masks((8, 8), dtype=torch.float32, device=device).requires_grad_()
    compiled = torch.compile(
        lambda m: tv_norm(2 * m, 2.0).sum(), fullgraph=True, backend="aot_eager"
    )
    (grad,) = torch.autograd.grad(compiled(mask), mask)
    (expected,) = torch.autograd.grad(tv_norm(2 * mask, 2.0).sum(), mask)
    torch.testing.assert_close(grad, expected)
