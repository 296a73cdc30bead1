"""Layer-wise relevance propagation: the logit, handed back layer by layer to the pixels.

Bach et al. 2015. The relevance of the target is its logit, and every layer hands R_j on to its
inputs by their contributions z_ij = x_i w_ij to the sum z_j (which includes the bias b_j, whose
share is lost to the image):

* ``rule="epsilon"`` (eq. 58):  R_i = sum_j z_ij / (z_j + epsilon sign(z_j)) R_j, with sign(0) = 1;
* ``rule="alpha_beta"`` (eq. 60):  R_i = sum_j (alpha z+_ij / z+_j - beta z-_ij / z-_j) R_j,
  with the positive and the negative parts of the contributions and biases and beta = alpha - 1;
  alpha = 1 is the z+ rule;
* ``rule="composite"``, the default: what Kohlbrenner et al. 2020 ("Towards Best Practice in
  Explaining Neural Network Decisions with LRP") found best: epsilon in linear layers, alpha_beta in
  convolutional ones, and in the first layer the flat rule, which spreads R_j evenly over what the
  neuron sees, or with ``bounds`` the z^B rule (Montavon et al. 2017, eq. 10) for pixels between
  them. A linear layer that is applied at every place, as in a transformer, is a convolution here.
  In the composite batch norm that follows no convolution hands all on, and the mean pools
  and sums of residual networks take the convolutions' rule: by it no two summands that cancel can
  blow up.

The map is the sum over the colours, with its sign::

    casm_fast.attribute("lrp", classifier, images, targets, rule="epsilon", epsilon=1e-3)

How the layers are taken, and which, is told by `casm_fast.attribution.propagation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from casm_fast.attribution.problem import Method, Problem
from casm_fast.attribution.propagation import Map, Propagation, contributions

RuleName = Literal["composite", "epsilon", "alpha_beta"]


@dataclass(frozen=True)
class Options:
    """Of LRP.

    Attributes:
        rule: See the module.
        epsilon: Of the epsilon rule, 0 or above.
        alpha: Of the alpha_beta rule, 1 or above; beta is alpha - 1.
        bounds: The least and the greatest value that a pixel can have, each one number or one for
            each colour, for the z^B rule in the first layer of the composite.
    """

    rule: RuleName = "composite"
    epsilon: float = 1e-6
    alpha: float = 1.0
    bounds: tuple[float | Sequence[float], float | Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(RuleName):
            known = ", ".join(get_args(RuleName))
            raise ValueError(f"rule: expected one of {known}, got {self.rule!r}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon: expected a number, 0 or above, got {self.epsilon}")
        if not self.alpha >= 1:
            raise ValueError(f"alpha: expected a number, 1 or above, got {self.alpha}")
        if self.bounds is not None and self.rule != "composite":
            raise ValueError(
                f"bounds: expected none beside rule = {self.rule!r}, which has no rule for pixels, "
                f"got {self.bounds}"
            )


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]``."""

    def rule(layer: Map, value: Tensor, relevance: Tensor) -> Tensor:
        if options.rule == "epsilon" or layer.kind == "centre":
            return epsilon_rule(layer, value, relevance, options.epsilon)
        if options.rule == "alpha_beta":
            return alpha_beta_rule(layer, value, relevance, options.alpha)
        if layer.first and options.bounds is None:
            return flat_rule(layer, value, relevance)
        if layer.first and options.bounds is not None:
            return bounds_rule(layer, value, relevance, *options.bounds)
        if layer.kind == "each":
            return relevance
        if layer.kind == "dense":
            return epsilon_rule(layer, value, relevance, options.epsilon)
        return alpha_beta_rule(layer, value, relevance, options.alpha)

    images, logits = Propagation(rule, "lrp").logits(problem)
    if not logits.requires_grad:
        raise ValueError("lrp: expected logits that depend on the image by layers, got none")
    classes = problem.targets.classes
    chosen = torch.zeros_like(logits).scatter_add_(
        1, classes.clamp(min=0), (classes >= 0).to(logits.dtype)
    )
    (handed,) = torch.autograd.grad(logits, images, chosen * logits.detach())
    return handed.sum(dim=1, keepdim=True)


def epsilon_rule(layer: Map, value: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """By all contributions; see the module."""
    return contributions(layer, [(value, layer.weight)], layer.bias, relevance, epsilon)


def alpha_beta_rule(layer: Map, value: Tensor, relevance: Tensor, alpha: float) -> Tensor:
    """By positive and negative contributions apart; see the module."""
    above, below = value.clamp(min=0), value.clamp(max=0)
    more, less = _parts(layer.weight)
    bias_above, bias_below = _parts(layer.bias)
    exciting: list[tuple[Tensor, Tensor | None]] = [(above, more)]
    inhibiting: list[tuple[Tensor, Tensor | None]] = [(below, more)]
    if less is not None:
        exciting.append((below, less))
        inhibiting.append((above, less))
    handed = alpha * contributions(layer, exciting, bias_above, relevance)
    if alpha != 1:
        handed = handed - (alpha - 1) * contributions(layer, inhibiting, bias_below, relevance)
    return handed


def flat_rule(layer: Map, value: Tensor, relevance: Tensor) -> Tensor:
    """Evenly over everything that the neuron sees."""
    weight = None if layer.weight is None else torch.ones_like(layer.weight)
    return contributions(layer, [(torch.ones_like(value), weight)], None, relevance)


def bounds_rule(
    layer: Map,
    value: Tensor,
    relevance: Tensor,
    low: float | Sequence[float],
    high: float | Sequence[float],
) -> Tensor:
    """z^B: by x w - low w+ - high w-, which is positive for every pixel between the bounds."""
    more, less = _parts(layer.weight)
    parts = [
        (value, layer.weight),
        (-_filled(low, value), more),
        (-_filled(high, value), less),
    ]
    return contributions(layer, parts, None, relevance)


def _parts(weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if weight is None else (weight.clamp(min=0), weight.clamp(max=0))


def _filled(bound: float | Sequence[float], like: Tensor) -> Tensor:
    values = torch.as_tensor(bound, dtype=like.dtype, device=like.device)
    if values.dim() > 1 or values.numel() not in (1, like.shape[1]):
        raise ValueError(
            f"bounds: expected one number or {like.shape[1]}, one for each colour, got {bound}"
        )
    return values.view(1, -1, *[1] * (like.dim() - 2)).expand_as(like).contiguous()


METHODS = (Method("lrp", "Layer-wise relevance propagation", "Bach et al. 2015", maps, Options),)
