"""tv_norm: reference, outside oracle, gradients, registration, layouts, errors, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.library import opcheck

from casm_fast.ops import tv_norm, tv_norm_with_gradient

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (28, 28), (17, 136)])
def test_sixteen_bits_sum_in_float32(shape, beta, isotropic, dtype, gpu_device):
    mask = masks(shape, dtype=torch.float32, device=gpu_device).to(dtype).requires_grad_()
    wide = mask.detach().float().requires_grad_()
    value, expected = tv_norm(mask, beta, isotropic), tv_norm.reference(wide, beta, isotropic)
    (grad,) = torch.autograd.grad(value.sum(), mask)
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-6)
    # A sum of flows is rounded once: half a unit in the last place of the storage.
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(grad.float(), expected_grad, rtol=1.01 * unit, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_with_gradient_equals_value_and_gradient(shape, beta, isotropic, dtype, device):
    mask = masks(shape, dtype=dtype, device=device).requires_grad_()
    value, grad = tv_norm_with_gradient(mask, 0.25, beta, isotropic)
    expected = tv_norm(mask, beta, isotropic)
    (expected_grad,) = torch.autograd.grad(0.25 * expected.sum(), mask)
    assert not value.requires_grad
    assert not grad.requires_grad
    specified = tv_norm_with_gradient.reference(mask, 0.25, beta, isotropic)
    tolerance = TOLERANCE[dtype]
    for other in ((expected.detach(), expected_grad), specified):
        torch.testing.assert_close((value, grad), other, rtol=tolerance, atol=10 * tolerance)


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
    opcheck(torch.ops.casm_fast.tv_norm_with_gradient.default, (mask.detach(), 0.5, 3.0, True))


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


def test_errors_of_value_with_gradient():
    with pytest.raises(
        ValueError, match=r"^tv_norm_with_gradient: expected `mask` of shape"
    ) as caught:
        tv_norm_with_gradient(torch.rand(3, 4))
    assert str(caught.value).endswith("[B, 1, H, W], got [3, 4]")
    with pytest.raises(TypeError) as caught:
        tv_norm_with_gradient(torch.rand(1, 1, 4, 4), torch.ones(1))
    expected = "tv_norm_with_gradient: expected `weight` to be a number, got Tensor"
    assert str(caught.value) == expected


def test_double_backward_is_refused(device):
    mask = masks((4, 4), device=device).requires_grad_()
    (grad,) = torch.autograd.grad(tv_norm(mask).sum(), mask, create_graph=True)
    with pytest.raises(RuntimeError, match="tv_norm: expected a first derivative"):
        grad.sum().backward()


def test_deterministic_for_any_number_of_threads(device):
    side = 70 if device.type == "cpu" else 224
    mask = masks((3 * side, side), batch=3, dtype=torch.float32, device=device)
    threads = torch.get_num_threads()
    values = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            values.append(tv_norm_with_gradient(mask))
    finally:
        torch.set_num_threads(threads)
    for value, grad in values[1:]:
        assert torch.equal(values[0][0], value)
        assert torch.equal(values[0][1], grad)


@pytest.mark.parametrize("shape", [(28, 28), (33, 65), (112, 96)])
def test_a_mask_has_the_same_value_in_every_batch(shape, device):
    mask = masks(shape, batch=9, dtype=torch.float32, device=device)
    together = tv_norm_with_gradient(mask)
    alone = [tv_norm_with_gradient(mask[i : i + 1]) for i in range(9)]
    assert torch.equal(together[0], torch.cat([value for value, _ in alone]))
    assert torch.equal(together[1], torch.cat([grad for _, grad in alone]))


@pytest.mark.parametrize("beta", [1.0, 1.5, 3.0])
def test_tiny_differences_are_not_lost(beta, device):
    """Differences of 1e-18, whose squares are near the least normal float32 number."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randint(0, 9, (3, 1, 9, 20), generator=generator, dtype=torch.float32)
    mask = (1e-18 * steps).to(device)
    value, grad = tv_norm_with_gradient(mask, 1.0, beta)
    expected, expected_grad = tv_norm_with_gradient(mask.double(), 1.0, beta)
    scale = float(expected_grad.abs().max())
    assert scale > 0
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-6 * scale)
    # The terms of beta 3 are 1e-54: float32 has no such numbers.
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-44)


def test_not_a_number_stays_one(device):
    mask = masks((8, 20), dtype=torch.float32, device=device)
    mask[1, 0, 3, 4] = torch.nan
    value, grad = tv_norm_with_gradient(mask)
    assert value.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().any()
    assert not grad[0].isnan().any()


def test_compiles_to_one_graph(device):
    mask = masks((8, 8), dtype=torch.float32, device=device).requires_grad_()
    compiled = torch.compile(
        lambda m: tv_norm(2 * m, 2.0).sum(), fullgraph=True, backend="aot_eager"
    )
    (grad,) = torch.autograd.grad(compiled(mask), mask)
    (expected,) = torch.autograd.grad(tv_norm(2 * mask, 2.0).sum(), mask)
    torch.testing.assert_close(grad, expected)
