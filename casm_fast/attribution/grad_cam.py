"""Class activation maps: which places of a late activation speak for the class.

Grad-CAM (Selvaraju et al. 2017, section 3): with the activation A ``[C, h, w]`` of a layer and the
gradient of the score for it,

    map(y, x) = sum_c a_c A_c(y, x),    a_c = mean over y, x of d score / d A_c(y, x),

brought to the size of the image bilinearly. The paper keeps the positive part (``relu=True``); by
default the sum stays as it is, as the supplement of Fong & Vedaldi 2017 (section 3) says. The layer
is the last activation that has places: inception5b of a GoogLeNet, their choice; the end of layer4
of a ResNet; the last convolution's ReLU in VGG and AlexNet; of a vision transformer the grid of
tokens that the last block reads. Any other is taken by name::

    casm_fast.attribute("grad_cam", classifier, images, targets, layer="inception4e")

CAM (Zhou et al. 2016) asks for a network that pools its last activation globally and reads that by
one linear layer, and takes the layer's weights w for a:

    map(y, x) = sum_c w_c A_c(y, x).

Whether a network is such a one is tried: the pooled activation times the weights must be the
logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast.attribution.calls import Call, Interception
from casm_fast.attribution.layers import as_grid, enlarged, find_layer, recorded
from casm_fast.attribution.problem import Method, Problem

_POOLS = ("adaptive_avg_pool2d", "avg_pool2d", "mean")


@dataclass(frozen=True)
class GradCamOptions:
    """Of Grad-CAM.

    Attributes:
        layer: The name of a module; None: the last activation that has places.
        relu: Whether the map is its positive part, as in Selvaraju et al. 2017.
    """

    layer: str | None = None
    relu: bool = False


@dataclass(frozen=True)
class CamOptions:
    """CAM has none."""


def grad_cam(problem: Problem, options: GradCamOptions) -> Tensor:
    """See the module; ``[B, 1, H, W]``."""
    size = problem.images.shape[2:]
    layer = find_layer(problem, "grad_cam") if options.layer is None else options.layer
    with torch.enable_grad(), recorded(problem.classifier, layer) as record:
        score = problem.scores(problem.images.detach().requires_grad_()).sum()
        activation = record.activation(layer)
        grid = as_grid(activation, layer, size)
        slope: Tensor | None = None
        if activation.requires_grad:
            (slope,) = torch.autograd.grad(score, activation, allow_unused=True)
    if slope is None:
        raise ValueError(f"layer: expected a layer that the score depends on, got {layer!r}")
    weights = as_grid(slope, layer, size).mean(dim=(2, 3), keepdim=True)
    weighted = (weights * grid.detach()).sum(dim=1, keepdim=True)
    if options.relu:
        weighted = weighted.clamp(min=0)
    return enlarged(weighted.to(problem.images.dtype), size)


def cam(problem: Problem, options: CamOptions) -> Tensor:
    """See the module; ``[B, 1, H, W]``."""
    del options
    if problem.score != "logit":
        raise ValueError(f"cam: expected the logit score, which it splits, got {problem.score}")
    with _Heads() as heads:
        logits = problem.logits(problem.images)
    features, weight = heads.global_average(logits)
    classes = problem.targets.classes
    rows = weight[classes.clamp(min=0)].masked_fill((classes < 0)[..., None], 0).sum(dim=1)
    weighted = (rows[:, :, None, None] * features).sum(dim=1, keepdim=True)
    return enlarged(weighted.to(problem.images.dtype), problem.images.shape[2:])


class _Heads(Interception):
    """Notes what is pooled, and which linear layer comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.pooled: Tensor | None = None
        self.head: tuple[Tensor, Tensor | None] | None = None

    def answer(self, call: Call) -> Any:
        if call.name in _POOLS and isinstance(call.input, Tensor) and call.input.dim() == 4:
            self.pooled = call.input
        elif call.name == "linear":
            self.head = call.argument(1, "weight"), call.argument(2, "bias")
        return call.run()

    def global_average(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The features ``[B, C, h, w]`` and the weights ``[K, C]`` that give the logits.

        Raises:
            ValueError: They do not.
        """
        if self.pooled is not None and self.head is not None:
            features, (weight, bias) = self.pooled, self.head
            if features.shape[1] == weight.shape[1] and len(weight) == logits.shape[1]:
                again = F.linear(features.mean(dim=(2, 3)), weight, bias).to(logits.dtype)
                if (again - logits).abs().max() <= 1e-3 * logits.abs().max():
                    return features, weight
        raise ValueError(
            "cam: expected a network that pools its last activation globally by the mean and gives "
            'logits by one linear layer, got another head; use "grad_cam"'
        )


METHODS = (
    Method("grad_cam", "Grad-CAM", "Selvaraju et al. 2017", grad_cam, GradCamOptions),
    Method("cam", "CAM", "Zhou et al. 2016", cam, CamOptions, uses="scores"),
)
