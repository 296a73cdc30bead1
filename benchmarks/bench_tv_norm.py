"""tv_norm: the value, value and gradient in one call, and through autograd.

Peers: the formula and its gradient written out and compiled, autograd over the specification (eager
and compiled), and kornia's total_variation where it computes the same thing (beta 1, anisotropic).
"""

from __future__ import annotations

from typing import Any

import kornia
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from casm_fast import ops

torch._dynamo.config.recompile_limit = 256

CASES = [
    pytest.param(32, 224, 3.0, id="32x224"),
    pytest.param(32, 28, 3.0, id="32x28"),
    pytest.param(32, 224, 2.0, id="32x224-beta2", marks=pytest.mark.long),
    pytest.param(32, 224, 1.0, id="32x224-beta1", marks=pytest.mark.long),
    pytest.param(1, 28, 3.0, id="1x28", marks=pytest.mark.long),
    pytest.param(256, 28, 3.0, id="256x28", marks=pytest.mark.long),
    pytest.param(1, 224, 3.0, id="1x224", marks=pytest.mark.long),
    pytest.param(256, 224, 3.0, id="256x224", marks=pytest.mark.long),
    pytest.param(1, 1024, 3.0, id="1x1024", marks=pytest.mark.long),
    pytest.param(32, 1024, 3.0, id="32x1024", marks=pytest.mark.long),
]


def analytic(mask: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Value and gradient of the isotropic norm, as an expert would write them for the compiler."""
    dx = pad(mask[..., :, 1:] - mask[..., :, :-1], (0, 1))
    dy = pad(mask[..., 1:, :] - mask[..., :-1, :], (0, 0, 0, 1))
    squares = dx * dx + dy * dy
    if beta == 2:
        term, slope = squares, torch.full_like(squares, 2)
    else:
        root = squares.sqrt()
        flat = torch.zeros_like(root)
        term = root if beta == 1 else squares * root
        slope = torch.where(squares > 0, 1 / root, flat) if beta == 1 else 3 * root
    right, down = slope * dx, slope * dy
    grad = pad(right[..., :, :-1], (1, 0)) + pad(down[..., :-1, :], (0, 0, 1, 0)) - right - down
    return term.sum((1, 2, 3)), grad


def through_autograd(value_of: Any, mask: Tensor) -> tuple[Tensor, Tensor]:
    leaf = mask.detach().requires_grad_()
    value = value_of(leaf)
    value.sum().backward()
    return value.detach(), leaf.grad


def compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def masks(batch: int, side: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((batch, 1, side, side), generator=generator).to(device)


# Sums of up to 1e6 terms in float32: the error grows with the value. Measured: 2e-7 of it.
def tolerance(value: Tensor, names: list[str]) -> dict[str, float]:
    return dict.fromkeys(names, 2e-6 * max(1.0, float(value.max())))


@pytest.mark.parametrize(("batch", "side", "beta"), CASES)
def test_value(batch, side, beta, race, device):
    mask = masks(batch, side, device)
    fast = compiled(lambda m: analytic(m, beta)[0])
    peers = {
        "torch": lambda: ops.tv_norm.reference(mask, beta),
        "torch.compile": lambda: fast(mask),
    }
    expected = ops.tv_norm.reference(mask.double(), beta)
    race(
        op="tv_norm",
        case=f"{batch}x1x{side}x{side} beta {beta:g}",
        ours=lambda: ops.tv_norm(mask, beta),
        peers=peers,
        expected=expected,
        tolerance=tolerance(expected, ["ours", *peers]),
        bytes=mask.nbytes,
        images=batch,
    )


@pytest.mark.parametrize(("batch", "side", "beta"), CASES)
def test_value_with_gradient(batch, side, beta, race, device):
    mask = masks(batch, side, device)
    fast = compiled(lambda m: analytic(m, beta))
    reference = compiled(lambda m: ops.tv_norm.reference(m, beta))
    peers = {
        "torch": lambda: through_autograd(lambda m: ops.tv_norm.reference(m, beta), mask),
        "torch.compile": lambda: fast(mask),
        "torch.compile + autograd": lambda: through_autograd(reference, mask),
    }
    expected = analytic(mask.double(), beta)
    race(
        op="tv_norm_with_gradient",
        case=f"{batch}x1x{side}x{side} beta {beta:g}",
        ours=lambda: ops.tv_norm_with_gradient(mask, beta=beta),
        peers=peers,
        expected=expected,
        tolerance=tolerance(expected[0], ["ours", *peers]),
        bytes=2 * mask.nbytes,
        images=batch,
    )


@pytest.mark.parametrize(("batch", "side", "beta"), CASES)
def test_through_autograd(batch, side, beta, race, device):
    mask = masks(batch, side, device)
    reference = compiled(lambda m: ops.tv_norm.reference(m, beta))
    peers = {
        "torch": lambda: through_autograd(lambda m: ops.tv_norm.reference(m, beta), mask),
        "torch.compile": lambda: through_autograd(reference, mask),
    }
    expected = analytic(mask.double(), beta)
    race(
        op="tv_norm forward + backward",
        case=f"{batch}x1x{side}x{side} beta {beta:g}",
        ours=lambda: through_autograd(lambda m: ops.tv_norm(m, beta), mask),
        peers=peers,
        expected=expected,
        tolerance=tolerance(expected[0], ["ours", *peers]),
        bytes=3 * mask.nbytes,
        images=batch,
    )


@pytest.mark.parametrize(("batch", "side"), [(32, 224), (32, 28)])
def test_anisotropic(batch, side, race, device):
    mask = masks(batch, side, device)

    def value(m: Tensor) -> Tensor:
        return ops.tv_norm(m, 1.0, isotropic=False)

    def of_kornia(m: Tensor) -> Tensor:
        return kornia.losses.total_variation(m[:, 0])

    fast = compiled(of_kornia)
    peers = {
        "kornia": lambda: through_autograd(of_kornia, mask),
        "kornia + torch.compile": lambda: through_autograd(fast, mask),
    }
    expected = through_autograd(
        lambda m: ops.tv_norm.reference(m, 1.0, isotropic=False), mask.double()
    )
    race(
        op="tv_norm forward + backward",
        case=f"{batch}x1x{side}x{side} beta 1 anisotropic",
        ours=lambda: through_autograd(value, mask),
        peers=peers,
        expected=expected,
        tolerance=tolerance(expected[0], ["ours", *peers]),
        bytes=3 * mask.nbytes,
        images=batch,
    )
