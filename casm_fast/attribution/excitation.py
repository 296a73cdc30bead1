"""Excitation backprop: with which probability a neuron wins on the way down from the class.

Zhang, Lin, Brandt, Shen & Sclaroff 2016 ("Top-down Neural Attention by Excitation Backprop",
section 3.2). A neuron that won hands its probability to its inputs a_i in proportion to what
excites it,

    P(a_i) = sum_j P(a_i | a_j) P(a_j),    P(a_i | a_j) = a_i w+_ij / sum_i' a_i' w+_i'j,

with w+ = max(w, 0): inhibition and biases have no part, and a neuron that nothing excites hands on
nothing. The map is the sum of P over the channels of a layer. P is 1 at the target; of several
targets each has the same share of it.

The contrastive map takes P once from the target and once from its dual, a unit with the negated
weights; the difference at ``contrast_layer`` goes on down, and its positive part at ``layer`` is
summed over the channels (supplement of Fong & Vedaldi 2017, section 3)::

    casm_fast.attribute("excitation_backprop", classifier, images, targets)
    casm_fast.attribute("contrastive_excitation_backprop", vgg, images, layer="features.22")

Layers: of a GoogLeNet, ``maxpool2`` (pool2/3x3_s2 of the Caffe network); of any other network the
last activation whose sides are about an eighth of the image's, as pool2's are, or more, found as by
Grad-CAM. The contrast is cut at the input of the last linear layer (or convolution), which in
GoogLeNet is pool5/7x7_s1.

Beyond the paper: activations below 0, of layers without ReLU, count as 0. For the other layers,
such as batch norm, which is folded, and the sums of residual networks, see
`casm_fast.attribution.propagation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from casm_fast.attribution.layers import Recorded, as_grid, enlarged, find_layer, recorded
from casm_fast.attribution.problem import Method, Problem
from casm_fast.attribution.propagation import Map, Propagation, contributions

COARSEST = 1 / 9
"""Side of an activation as a share of the image's: pool2 of GoogLeNet has 28 of 224, an eighth;
layers without padding, as in AlexNet, have a little less."""


@dataclass(frozen=True)
class Options:
    """Of excitation backprop.

    Attributes:
        layer: The name of the module at whose output the probability is read; None: see the module.
    """

    layer: str | None = None


@dataclass(frozen=True)
class ContrastiveOptions:
    """Of contrastive excitation backprop.

    Attributes:
        layer: The name of the module at whose output the probability is read; None: see the module.
        contrast_layer: The name of the module, above it, at whose output the dual's probability is
            subtracted; None: the input of the last linear layer.
    """

    layer: str | None = None
    contrast_layer: str | None = None


class Excitation:
    """The rule, with the weights of one map negated on demand: the dual."""

    def __init__(self) -> None:
        self.negated: Map | None = None

    def __call__(self, layer: Map, value: Tensor, probability: Tensor) -> Tensor:
        """P of the input, from P of the output."""
        exciting = value.clamp(min=0)
        if layer.kind == "centre":  # a mean that is subtracted inhibits
            return probability * (exciting > 0)
        weight = layer.weight
        if weight is not None:
            weight = (-weight if layer is self.negated else weight).clamp(min=0)
        return contributions(layer, [(exciting, weight)], None, probability)


def excitation_backprop(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]``, not negative."""
    name = "excitation_backprop"
    layer = options.layer or _default_layer(problem, name)
    pass_ = Propagation(Excitation(), name)
    with recorded(problem.classifier, layer) as record:
        _, logits = pass_.logits(problem)
    probability = _between(logits, record.activation(layer), _prior(problem, logits), layer)
    return _map(problem, probability, layer)


def contrastive_excitation_backprop(problem: Problem, options: ContrastiveOptions) -> Tensor:
    """See the module; ``[B, 1, H, W]``, not negative."""
    name = "contrastive_excitation_backprop"
    layer = options.layer or _default_layer(problem, name)
    rule = Excitation()
    pass_ = Propagation(rule, name)
    contrast = Recorded()
    if options.contrast_layer is None:
        with recorded(problem.classifier, layer) as record:
            _, logits = pass_.logits(problem)
    else:
        with (
            recorded(problem.classifier, layer) as record,
            recorded(problem.classifier, options.contrast_layer) as contrast,
        ):
            _, logits = pass_.logits(problem)
    if pass_.last is None:
        raise ValueError(f"{name}: expected a network with a linear layer, got none")
    top, reads = pass_.last
    cut = reads if options.contrast_layer is None else contrast.activation(options.contrast_layer)
    cut_name = options.contrast_layer or "the input of the last linear layer"

    prior = _prior(problem, logits)
    difference = _between(logits, cut, prior, cut_name)
    rule.negated = top
    difference = difference - _between(logits, cut, prior, cut_name)
    rule.negated = None
    handed = _between(cut, record.activation(layer), difference, layer)
    return _map(problem, handed.clamp(min=0), layer)


def _default_layer(problem: Problem, method: str) -> str:
    classifier = problem.classifier
    if isinstance(classifier, nn.Module):
        names: list[str] = [name for name, _ in classifier.named_modules()]
        for name in names:
            within = name.removesuffix("maxpool2")
            if name != within and {f"{within}inception3a", f"{within}inception5b"} <= set(names):
                return name
    return find_layer(problem, method, COARSEST)


def _prior(problem: Problem, logits: Tensor) -> Tensor:
    """P of the logits, ``[B, K]``."""
    classes = problem.targets.classes
    counts = (classes >= 0).to(logits.dtype)
    shares = counts / counts.sum(dim=1, keepdim=True)
    return torch.zeros_like(logits).scatter_add_(1, classes.clamp(min=0), shares)


def _between(upper: Tensor, lower: Tensor, probability: Tensor, layer: str) -> Tensor:
    """P of a lower activation, from P of an upper one."""
    handed: Tensor | None = None
    if lower is upper:
        handed = probability
    elif upper.requires_grad and lower.requires_grad:
        (handed,) = torch.autograd.grad(
            upper, lower, probability, retain_graph=True, allow_unused=True
        )
    if handed is None:
        raise ValueError(
            "layer: expected a layer between the image and the logits, below the contrast layer "
            f"if there is one, got {layer!r}"
        )
    return handed


def _map(problem: Problem, probability: Tensor, layer: str) -> Tensor:
    size = problem.images.shape[2:]
    summed = as_grid(probability, layer, size).sum(dim=1, keepdim=True)
    return enlarged(summed.to(problem.images.dtype), size)


METHODS = (
    Method(
        "excitation_backprop",
        "Excitation backprop",
        "Zhang et al. 2016",
        excitation_backprop,
        Options,
    ),
    Method(
        "contrastive_excitation_backprop",
        "Contrastive excitation backprop",
        "Zhang et al. 2016",
        contrastive_excitation_backprop,
        ContrastiveOptions,
    ),
)
