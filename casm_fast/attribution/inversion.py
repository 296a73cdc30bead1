"""Guided feature inversion: channels of a layer, weighed so that they show the class's evidence.

Du, Liu, Song & Hu, "Towards explanation of DNN-based prediction with guided feature inversion" (KDD
2018). The mask is a sum of a layer's channel maps A_c with weights w >= 0, enlarged bilinearly
(corners aligned) and normalised to [0, 1]; it shows the image where it is 1 and its blur where it
is 0, and the other way round::

    m = normalised(enlarged(sum_c w_c A_c))
    in = m x + (1 - m) blur(x),   out = (1 - m) x + m blur(x)
    steps 1 ... 11:  |A(in) - A(x)|^2 / |A(x)|^2 + 5 |w|^2
    then:            -p(in) + p(out) + 2 |w|^2

with p the class's probability, as their code has it: 80 steps of Adam at 0.01, halved every 10; w
begins at 0.1 and is clamped after each step. The mask of the last weights is the map. The images of
a batch are so many independent problems. Their layer is the last pooling of VGG19 (features.36);
that is also what the default gives there, see `casm_fast.attribution.layers.find_layer`::

    casm_fast.attribute("guided_inversion", vgg19, images, targets)
    casm_fast.attribute("guided_inversion", resnet, images, targets, layer="layer3")
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast import ops
from casm_fast.attribution.layers import Recorded, as_grid, find_layer, recorded
from casm_fast.attribution.problem import Method, Problem
from casm_fast.attribution.proportion import in_proportion

BLUR = 11.0
"""Pixels on images of 224; the authors blur by Pillow's GaussianBlur of that radius."""
HALVED_EVERY = 10
"""Steps."""


@dataclass(frozen=True)
class Options:
    """Of guided feature inversion; the defaults are those of the authors' code."""

    layer: str | None = None
    """Name of a module that gives ``[B, C, h, w]``, or tokens ``[B, N, D]`` of a square grid; None:
    the last spatial activation."""

    steps: int = 80
    """Of Adam, in all."""

    inversion_steps: int = 11
    """The first of them, which reconstruct the layer's activation."""

    learning_rate: float = 1e-2
    """Of Adam; halved every 10 steps."""

    initial: float = 0.1
    """Every weight at first, above 0."""

    inversion_weight: float = 5.0
    """Of |w|^2 in the first steps."""

    weight: float = 2.0
    """Of |w|^2 afterwards."""

    blur_sigma: float | None = None
    """Standard deviation of the blur in pixels; None: 11 on images of 224, in proportion to the
    diagonal on others."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        least = {"steps": 1, "inversion_steps": 0, "inversion_weight": 0, "weight": 0}
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(
                    f"guided_inversion: expected {name} of at least {value}, "
                    f"got {getattr(self, name)}"
                )
        for name in ("learning_rate", "initial"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"guided_inversion: expected {name} above 0, got {getattr(self, name)}"
                )
        if self.blur_sigma is not None and not self.blur_sigma >= 0:
            raise ValueError(
                f"guided_inversion: expected blur_sigma of at least 0, got {self.blur_sigma}"
            )


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]`` in [0, 1]."""
    layer = options.layer
    if layer is None:
        layer = find_layer(problem, "guided_inversion", max_pools=True)
    with recorded(problem.classifier, layer) as record:
        return _Inversion(problem, options, layer, record).solve()


class _Inversion:
    """The images on their way through the steps."""

    def __init__(self, problem: Problem, options: Options, layer: str, record: Recorded) -> None:
        self.problem, self.options = problem, options
        self.layer, self.record = layer, record
        images = problem.images
        sigma = options.blur_sigma
        self.blurred = ops.gaussian_blur(
            images, in_proportion(BLUR, images.shape[2:]) if sigma is None else sigma
        )
        problem.logits(images)
        self.activation = self._recorded().detach().to(images.dtype)  # [B, C, h, w]
        self.scale = self.activation.square().sum(dim=(1, 2, 3))  # [B]

    def solve(self) -> Tensor:
        options = self.options
        shape = self.activation.shape[:2]
        weights = self.activation.new_full(shape, options.initial).requires_grad_()
        adam = torch.optim.Adam([weights], lr=options.learning_rate)
        for step in range(options.steps):
            adam.param_groups[0]["lr"] = options.learning_rate * 0.5 ** (step // HALVED_EVERY)
            inverts = step < options.inversion_steps
            terms = [self._difference] if inverts else [self._hidden, self._shown]
            weight = options.inversion_weight if inverts else options.weight
            gradient = 2 * weight * weights.detach()
            for term in terms:  # one pass of the classifier at a time in memory
                with torch.enable_grad():
                    loss = term(self.mask(weights)).sum()
                gradient = gradient + torch.autograd.grad(loss, weights)[0]
            weights.grad = gradient
            adam.step()
            weights.clamp_(min=0)
        return self.mask(weights.detach())

    def mask(self, weights: Tensor) -> Tensor:
        """The mask of weights ``[B, C]``, ``[B, 1, H, W]`` in [0, 1]; a constant sum gives 0."""
        summed = torch.einsum("bc,bchw->bhw", weights, self.activation)[:, None]
        size = self.problem.images.shape[2:]
        large = F.interpolate(summed, size, mode="bilinear", align_corners=True)
        low, high = large.amin(dim=(1, 2, 3), keepdim=True), large.amax(dim=(1, 2, 3), keepdim=True)
        span = high - low
        return (large - low) / torch.where(span > 0, span, 1.0)

    def _recorded(self) -> Tensor:
        """The layer's activation in the last pass, ``[B, C, h, w]``."""
        return as_grid(
            self.record.activation(self.layer), self.layer, self.problem.images.shape[2:]
        )

    def _difference(self, mask: Tensor) -> Tensor:
        self.problem.logits(ops.blend(self.problem.images, self.blurred, mask))
        square = (self._recorded().to(mask.dtype) - self.activation).square().sum(dim=(1, 2, 3))
        return square / torch.where(self.scale > 0, self.scale, 1.0)

    def _shown(self, mask: Tensor) -> Tensor:
        return -self.problem.scores(ops.blend(self.problem.images, self.blurred, mask))

    def _hidden(self, mask: Tensor) -> Tensor:
        return self.problem.scores(ops.blend(self.problem.images, self.blurred, 1 - mask))


METHODS = (
    Method(
        "guided_inversion",
        "Guided feature inversion",
        "Du et al. 2018",
        maps,
        Options,
        score="softmax",
    ),
)
