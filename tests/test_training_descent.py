"""Loss scaling against `torch.amp.GradScaler`, and the sums of micro-batches' gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from casm_fast.training import descent as descent_module
from casm_fast.training.descent import Descent, GradientSum

INF, NAN = float("inf"), float("nan")


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]


def optimizer(kind: str, weights: list[torch.nn.Parameter], fused: bool) -> Any:
    if kind == "sgd":
        return torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused)
    return torch.optim.Adam(weights, lr=0.1, weight_decay=0.01, fused=fused)


def gradients(poison: float | None, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,))]
    if poison is not None:
        found[1][2] = poison
    return found


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 1, 3, 3), (6, 4, 1, 1)])
@pytest.mark.parametrize("weight_last", [True, False])
@pytest.mark.parametrize("gradient_last", [True, False])
def test_a_gradient_may_lie_in_another_memory_order_than_its_weight(
    kind: str, shape: tuple[int, ...], weight_last: bool, gradient_last: bool
) -> None:
    """The oracle is the plain optimiser, which looks at strides; the fused ones do not."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)

    def laid_out(tensor: Tensor, last: bool) -> Tensor:
        order = torch.channels_last if last else torch.contiguous_format
        return tensor.clone(memory_format=order)

    ours = [torch.nn.Parameter(laid_out(start, weight_last))]
    theirs = [torch.nn.Parameter(start.clone())]
    descent = Descent(optimizer(kind, ours, True), scaled=False, clip=1.0)
    reference = optimizer(kind, theirs, False)
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        descent.step([laid_out(gradient, gradient_last)])
        theirs[0].grad = gradient
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
    # Worst measured: 1.2e-7. Mixed-up weights differ by 0.1 and more.
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_loss_scaling_is_that_of_grad_scaler(
    kind: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite and other gradients in turn, the very first one among the others."""
    monkeypatch.setattr(descent_module, "GROWTH_INTERVAL", 3)
    ours, theirs = parameters(), parameters()
    descent = Descent(optimizer(kind, ours, True), scaled=True, clip=clip)
    reference = optimizer(kind, theirs, False)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=3)
    scaler.scale(torch.zeros(()))
    scales = []
    for step, poison in enumerate([INF, None, NAN, None, None, None, None, -INF, None]):
        factor = float(descent.factor)
        assert factor == scaler.get_scale()
        scales.append(factor)
        before = [weight.clone() for weight in ours]
        descent.step([g * factor for g in gradients(poison, step)])
        for weight, gradient in zip(theirs, gradients(poison, step), strict=True):
            weight.grad = gradient * factor
        scaler.unscale_(reference)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
        scaler.step(reference)
        scaler.update()
        stayed = all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))
        assert stayed == (poison is not None)
    assert scales[:7] == [65536, 32768, 32768, 16384, 16384, 16384, 32768]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_a_descent_without_scale_is_the_plain_optimiser() -> None:
    ours, theirs = parameters(), parameters()
    descent, reference = (
        Descent(optimizer("sgd", ours, True), scaled=False),
        optimizer("sgd", theirs, False),
    )
    assert descent.factor is None
    for step in range(3):
        descent.rate = 0.1 / (1 + step)
        reference.param_groups[0]["lr"] = 0.1 / (1 + step)
        descent.step(gradients(None, step))
        for weight, gradient in zip(theirs, gradients(None, step), strict=True):
            weight.grad = gradient
        reference.step()
    assert all(weight.grad is None for weight in ours)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_parameter_that_no_loss_reaches_stays() -> None:
    weights = parameters()
    before = weights[1].clone()
    descent = Descent(optimizer("sgd", weights, True), scaled=True)
    descent.step([torch.ones(4, 3), None])
    assert torch.equal(weights[1], before)


def test_sums_of_gradients_leave_their_terms_alone() -> None:
    """Two parameters may be given one tensor, and one term may reach more than another."""
    same, more = torch.full((2,), 3.0), torch.ones(1)
    total = GradientSum()
    total.add([same, same, None, None])
    total.add([torch.full((2,), 2.0), torch.zeros(2), more, None])
    total.add([torch.ones(2), None, more, None])
    found = total.take()
    assert [None if g is None else g.tolist() for g in found] == [[6, 6], [3, 3], [2], None]
    assert (same.tolist(), more.tolist()) == ([3.0, 3.0], [1.0])
    total.add([same])
    assert total.take()[0] is same
    with pytest.raises(RuntimeError, match=r"^GradientSum\.take: expected a gradient to have been"):
        total.take()
