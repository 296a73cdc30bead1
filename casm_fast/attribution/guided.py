"""Guided backpropagation, deconvolution and salient deconvolution: other ways back through a ReLU.

All three send the gradient of the score back to the image and differ in what a ReLU y = max(x, 0)
makes of the gradient g of y, in the taxonomy of Mahendran & Vedaldi (2016, section 2):

=====================================  ==========================  =================
SaliNet: the gradient                  1[x > 0] g                  "gradient"
DeconvNet (Zeiler & Fergus 2014)       max(g, 0)                   "deconvolution"
DeSaliNet (Mahendran & Vedaldi 2016)   1[x > 0] max(g, 0)          "salient_deconvolution"
guided backpropagation (Springenberg   1[x > 0] max(g, 0)          "guided_backprop"
et al. 2015)
=====================================  ==========================  =================

Convolutions go back through their transpose and max pools to the place of their maximum (the
unpooling by switches, which is their gradient), in all of them: DeSaliNet is guided
backpropagation, and the two methods give the same maps. ::

    casm_fast.attribute("guided_backprop", classifier, images, targets)

The map is the maximum over the colours of the absolute value (supplement of Fong & Vedaldi 2017,
section 3), or with ``signed`` that very value with its sign.

A ReLU is found wherever it is called: as module (in place, or shared), as function or as method;
``clamp(min=0)`` is one, and a ReLU6 is one whose 1[x > 0] is 1[0 < x < 6]. Sigmoids and softmax,
which gate and attend, keep their gradient. Other activations such as GELU, for which no such rule
is defined, are refused, and so is a network without any ReLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casm_fast.attribution.calls import SMOOTH, Call, Interception, instead
from casm_fast.attribution.gradient import image_gradient, strongest
from casm_fast.attribution.problem import Method, Problem


@dataclass(frozen=True)
class Options:
    """Of the three methods.

    Attributes:
        signed: The value of the colour that is strongest, with its sign, not its absolute value.
    """

    signed: bool = False


def guided_backprop(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]``."""
    return _maps(problem, options, "guided_backprop", masked=True)


def deconvolution(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]``."""
    return _maps(problem, options, "deconvolution", masked=False)


def salient_deconvolution(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]``."""
    return _maps(problem, options, "salient_deconvolution", masked=True)


def refuse_smooth(call: Call, method: str) -> None:
    """Refuses an activation function that is no ReLU.

    Raises:
        ValueError: The call is one.
    """
    if call.name in SMOOTH and isinstance(call.input, Tensor) and call.input.requires_grad:
        raise ValueError(
            f"{method}: expected ReLU as the activation function, for which alone it is defined, "
            f'got {call.name}; explain this network by "gradient"'
        )


def refuse_none(found: int, method: str) -> None:
    """Refuses a network in which nothing would differ from the gradient.

    Raises:
        ValueError: No ReLU was found.
    """
    if not found:
        raise ValueError(
            f"{method}: expected a network that calls ReLU, got none in its forward pass; "
            'explain this network by "gradient"'
        )


def _maps(problem: Problem, options: Options, method: str, *, masked: bool) -> Tensor:
    with _Rectifiers(method, masked) as rectifiers:
        gradient = image_gradient(problem)
    refuse_none(rectifiers.found, method)
    if not options.signed:
        return strongest(gradient)
    return gradient.gather(1, gradient.abs().argmax(dim=1, keepdim=True))


class _Rectifiers(Interception):
    """Gives every ReLU the backward rule."""

    def __init__(self, method: str, masked: bool) -> None:
        super().__init__()
        self.method = method
        self.masked = masked
        self.found = 0

    def answer(self, call: Call) -> Any:
        ceiling = call.ceiling
        if ceiling is None:
            refuse_smooth(call, self.method)
            return call.run()
        self.found += 1
        bound = ceiling

        def rectified(value: Tensor) -> Tensor:
            return _Rectified.apply(value, bound, self.masked)  # type: ignore[no-any-return]

        return instead(call, rectified)


class _Rectified(torch.autograd.Function):
    """min(max(x, 0), ceiling), with the gradient's positive part going back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ceiling: float, masked: bool) -> Tensor:
        if masked:
            ctx.save_for_backward((value > 0) & (value < ceiling))
        return value.clamp(min=0, max=ceiling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        positive = gradients[0].clamp(min=0)
        for passing in ctx.saved_tensors:
            positive = positive * passing
        return positive, None, None


METHODS = (
    Method(
        "guided_backprop",
        "Guided backpropagation",
        "Springenberg et al. 2015",
        guided_backprop,
        Options,
    ),
    Method("deconvolution", "Deconvolution", "Zeiler & Fergus 2014", deconvolution, Options),
    Method(
        "salient_deconvolution",
        "Salient deconvolution",
        "Mahendran & Vedaldi 2016",
        salient_deconvolution,
        Options,
    ),
)
