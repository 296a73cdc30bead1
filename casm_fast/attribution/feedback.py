"""Feedback: neurons that speak against the class are switched off, and the network looks again.

Cao et al. 2015 ("Look and Think Twice", section 3) see every ReLU and every max pool as a gate:
its response is multiplied by z in {0, 1}, one z for each neuron of each image, all 1 at first. The
gates are to maximise the class's score s(image, z), by ascent of the relaxed problem; a step is
here the whole way that the gradient's sign points,

    z <- 1 where ds/dz > 0,    z <- 0 where ds/dz < 0,    z as it was where ds/dz = 0,

for all gates at once after one backward pass (ds/dz = response * gradient of the gated response:
a neuron at rest keeps its gate). After ``iterations`` of these the map is the maximum over the
colours of the absolute gradient of the score, through the gates::

    casm_fast.attribute("feedback", classifier, images, targets, iterations=4)

Four iterations are what the authors' later code shows. ReLUs are found as in
`casm_fast.attribution.guided`, max pools likewise; other activations are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casm_fast.attribution.calls import Call, Interception, instead
from casm_fast.attribution.gradient import image_gradient, strongest
from casm_fast.attribution.guided import refuse_none, refuse_smooth
from casm_fast.attribution.problem import Method, Problem

_POOLS = frozenset(
    f"{kind}max_pool{n}d{indices}"
    for kind in ("", "adaptive_")
    for n in (1, 2, 3)
    for indices in ("", "_with_indices")
)


@dataclass(frozen=True)
class Options:
    """Of feedback.

    Attributes:
        iterations: How often the gates are set; 0 gives the gradient.
        pools: Whether max pools have gates too.
    """

    iterations: int = 4
    pools: bool = True

    def __post_init__(self) -> None:
        if type(self.iterations) is not int or self.iterations < 0:
            raise ValueError(
                f"iterations: expected an integer, 0 or above, got {self.iterations!r}"
            )


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]``, not negative."""
    gates: list[Tensor] = []
    for _ in range(options.iterations):
        with torch.enable_grad(), _Gating(gates, options.pools, learning=True) as gating:
            images = problem.images.detach().requires_grad_()
            score = problem.scores(images).sum()
        refuse_none(gating.found, "feedback")
        slopes = torch.autograd.grad(score, gating.gates, allow_unused=True)
        gates = [_set(gate, slope) for gate, slope in zip(gating.gates, slopes, strict=True)]
    with _Gating(gates, options.pools, learning=False) as gating:
        gradient = image_gradient(problem)
    refuse_none(gating.found, "feedback")
    return strongest(gradient)


def _set(gate: Tensor, slope: Tensor | None) -> Tensor:
    if slope is None:
        return gate.detach()
    return torch.where(slope == 0, gate.detach(), (slope > 0).to(gate.dtype))


class _Gating(Interception):
    """Multiplies the responses by gates, in the order in which the network computes them."""

    def __init__(self, given: list[Tensor], pools: bool, *, learning: bool) -> None:
        super().__init__()
        self.given = given
        self.pools = pools
        self.learning = learning
        self.gates: list[Tensor] = []
        self.found = 0

    def answer(self, call: Call) -> Any:
        rectifies = call.ceiling is not None
        pooled = self.pools and call.name in _POOLS and call.input.requires_grad
        if not rectifies and not pooled:
            refuse_smooth(call, "feedback")
            return call.run()
        self.found += rectifies

        def gated(value: Tensor) -> Tensor:
            response: Tensor = call.of_input()(value)
            return response * self._gate(response)

        answer = call.run() if pooled else None
        if isinstance(answer, tuple):  # max pool with its indices
            return (answer[0] * self._gate(answer[0]), *answer[1:])
        if answer is not None:
            return answer * self._gate(answer)
        return instead(call, gated)

    def _gate(self, response: Tensor) -> Tensor:
        place = len(self.gates)
        if place < len(self.given) and self.given[place].shape == response.shape:
            gate = self.given[place].detach()
        elif not self.given:
            gate = torch.ones_like(response)
        else:
            raise ValueError(
                "feedback: expected a network that computes the same layers in every pass, "
                f"got another response, {list(response.shape)}, at gate {place}"
            )
        self.gates.append(gate.requires_grad_(self.learning))
        return gate


METHODS = (Method("feedback", "Feedback", "Cao et al. 2015", maps, Options),)
