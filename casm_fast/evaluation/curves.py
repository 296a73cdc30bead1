r"""Deletion and insertion curves: the score while a map's pixels go, or come, most salient first.

Petsiuk, Das and Saenko 2018 (RISE, section 4.1, Algorithm 1): pixels are removed from the image, or
inserted into a blurred one, in the order of the map, 224 at a time; after each step the classifier
gives the probability of the class, and the area under the curve is the mean over the n steps by the
trapezoidal rule,

.. math::
    \mathrm{AUC} = \frac{1}{n} \Big(\frac{s_0 + s_n}{2} + \sum_{i=1}^{n-1} s_i\Big)

Deletion is better when lower, insertion when higher. Conventions, those of the authors' code where
the paper leaves them open:

* pixels of equal saliency go in raster order (the authors' order is that of an unstable sort);
* removed pixels become 0 in the classifier's normalised input, which is the mean colour of its
  training images; or the mean colour of the image itself (``fill="mean"``);
* insertion begins with the image blurred by the authors' kernel: 11 x 11, a unit pulse filtered by
  a Gaussian of sigma 5 whose window reflects at its edges, zeros around the image;
* the class is the given one, or the classifier's first guess for the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from casm_fast.evaluation.asking import Score, ask, check_score, passes, read, targets_of
from casm_fast.evaluation.intervals import Interval, bootstrap
from casm_fast.evaluation.maps import Maps, as_maps
from casm_fast.evaluation.outcomes import PER_IMAGE, paragraph
from casm_fast.models.borrowing import Classifies, as_images, borrowed

Kind = Literal["deletion", "insertion"]
Fill = Literal["zero", "mean", "blur"]

STEP = 224
"""Pixels of a step: a row of the paper's images."""

KERNEL, SIGMA = 11, 5.0
"""Side and sigma of the blur, in pixels."""


@dataclass(frozen=True, eq=False)
class Curves:
    """Deletion or insertion curves of B images. ``str(curves)`` is the printed score.

    Attributes:
        scores: ``[B, n + 1]``, after 0, 1, ... n steps.
        shares: ``[n + 1]``, of the pixels that are gone, or there, by then.
        kind: "deletion" or "insertion".
        convention: How they were made.
    """

    scores: NDArray[np.float64] = field(metadata=PER_IMAGE)
    shares: NDArray[np.float64]
    kind: Kind
    convention: str

    @property
    def auc(self) -> NDArray[np.float64]:
        """``[B]``: the area under each image's curve, every step as wide as the others."""
        ends = (self.scores[:, 0] + self.scores[:, -1]) / 2
        return np.asarray((ends + self.scores[:, 1:-1].sum(axis=1)) / (len(self.shares) - 1))

    def interval(self, **told: Any) -> Interval:
        """The mean area with its bootstrap interval; options of `bootstrap`."""
        return bootstrap(self.auc, **told)

    def __str__(self) -> str:
        better = "lower" if self.kind == "deletion" else "higher"
        return (
            f"{self.kind.capitalize()}, area under the curve ({better} is better): "
            f"{self.interval().show('.3f')} over {len(self.scores):,} images\n\n"
            + paragraph(self.convention)
        )


def perturbation_curves(
    classifier: Classifies,
    images: Tensor | Sequence[Tensor],
    maps: Maps,
    targets: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    *,
    kind: Kind = "deletion",
    step: int | None = None,
    steps: int | None = None,
    fill: Fill | Tensor | None = None,
    score: Score = "softmax",
    batch_size: int | None = None,
    memory_budget: float | None = None,
) -> Curves:
    """Delete, or insert, the pixels of images in the order of their maps.

    Steps of several images share a pass of the classifier, so that no pass is emptier than need be.

    Args:
        classifier: Any module or function from images to logits ``[B, K]``; it is given back
            exactly as it was.
        images: ``[B, C, H, W]``, normalised for the classifier.
        maps: ``[B, 1, H, W]`` or ``[B, H, W]``, higher is more salient.
        targets: As for `casm_fast.attribute`; None: each image's best class.
        kind: "deletion" or "insertion".
        step: Pixels of a step; 224 when neither is given. The last step may be smaller.
        steps: Number of steps, instead.
        fill: What removed pixels become, or insertion begins with: "zero", "mean" (colour of the
            image), "blur", or images ``[B, C, H, W]``. None: zero for deletion, blur for insertion.
        score: What of the class is measured.
        batch_size: Images in one pass; None: as many as memory_budget holds. Halved when memory
            runs out.
        memory_budget: GiB for one pass; None: half of what is free, on the CPU at most 4.

    Returns:
        The curves, for `join` over the batches of a data set.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: Maps of another size than the images, an unknown kind, fill, score or class,
            both or wrong numbers of steps, or a classifier that gives no logits.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected deletion or insertion, got {kind!r}")
    check_score(score)
    with torch.inference_mode(False), torch.no_grad(), borrowed(classifier) as lent:
        batch = as_images(classifier, images)
        B, _, H, W = batch.shape
        values = as_maps("perturbation_curves", maps).to(batch.device)
        if values.shape != (B, H, W):
            raise ValueError(f"maps: expected {[B, 1, H, W]}, got {list(values.shape)}")
        pixels = _pixels(step, steps, H * W)
        count = -(-H * W // pixels)
        if fill is None:
            fill = "zero" if kind == "deletion" else "blur"
        other = _filled(batch, fill)
        size = passes(lent, batch, batch_size, memory_budget)
        classes = targets_of(lent, batch, targets, size)

        order = values.flatten(1).argsort(dim=1, descending=True, stable=True)
        places = torch.arange(H * W, device=batch.device).expand(B, -1)
        rank = torch.empty_like(order).scatter_(1, order, places).view(B, 1, H, W)
        before, after = (batch, other) if kind == "deletion" else (other, batch)

        def pairs(part: slice) -> tuple[Tensor, Tensor]:
            number = torch.arange(part.start, part.stop, device=batch.device)
            return number // (count + 1), number % (count + 1)

        def show(part: slice) -> Tensor:
            who, which = pairs(part)
            changed = rank[who] < (which * pixels).view(-1, 1, 1, 1)
            return torch.where(changed, after[who], before[who])

        def answer(values: Tensor, part: slice) -> Tensor:
            return read(values, classes.select(pairs(part)[0]), score)

        found = ask(lent, B * (count + 1), show, answer, size, batch.device)
    name = "given images" if isinstance(fill, Tensor) else _FILLS[fill]
    return Curves(
        scores=found.view(B, count + 1).double().cpu().numpy(),
        shares=np.minimum(np.arange(count + 1) * pixels, H * W) / (H * W),
        kind=kind,
        convention=(
            f"{count} steps of {pixels} pixels, most salient first, equal ones in raster order; "
            f"{'deleted to' if kind == 'deletion' else 'inserted into'} {name}; "
            f"{score} of the {'given' if targets is not None else 'predicted'} class; trapezoidal "
            "rule, mean over the images"
        ),
    )


_FILLS: dict[str, str] = {
    "zero": "0 in the normalised input, the mean colour of training",
    "mean": "the mean colour of the image",
    "blur": f"the image blurred by RISE's kernel ({KERNEL} x {KERNEL}, sigma {SIGMA:g})",
}


def rise_kernel(side: int = KERNEL, sigma: float = SIGMA) -> Tensor:
    """The taps of RISE's blur along one axis: the outer product of them is its kernel.

    A unit pulse in a window of `side` pixels, filtered by a Gaussian that is cut at 4 sigma and
    reflected at the edges of the window (d c b a | a b c d | d c b a), as often as need be.

    Args:
        side: Odd, in pixels.
        sigma: In pixels.

    Returns:
        ``[side]`` float64, of sum 1.
    """
    reach = int(4 * sigma + 0.5)
    away = torch.arange(-reach, reach + 1)
    taps = torch.exp(-0.5 * (away.double() / sigma) ** 2)
    place = (side // 2 + away) % (2 * side)
    folded = torch.where(place < side, place, 2 * side - 1 - place)
    return torch.zeros(side, dtype=torch.float64).index_add_(0, folded, taps / taps.sum())


def _filled(images: Tensor, fill: Fill | Tensor) -> Tensor:
    """What removed pixels become, ``[B, C, H, W]``."""
    if isinstance(fill, Tensor):
        if fill.shape != images.shape:
            raise ValueError(f"fill: expected {list(images.shape)}, got {list(fill.shape)}")
        return fill.detach().to(images)
    if fill == "zero":
        return torch.zeros_like(images)
    if fill == "mean":
        return images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    if fill != "blur":
        raise ValueError(f"fill: expected zero, mean, blur or images [B, C, H, W], got {fill!r}")
    taps, channels = rise_kernel().to(images), images.shape[1]
    rows, columns = (
        taps.view(shape).expand(channels, -1, -1, -1) for shape in ((1, 1, -1, 1), (1, 1, 1, -1))
    )
    half = KERNEL // 2
    down = F.conv2d(images, rows, padding=(half, 0), groups=channels)
    return F.conv2d(down, columns, padding=(0, half), groups=channels)


def _pixels(step: int | None, steps: int | None, pixels: int) -> int:
    """Pixels of a step."""
    if step is not None and steps is not None:
        raise ValueError(f"steps: expected one of `step` and `steps`, got {step} and {steps}")
    for name, value in (("step", step), ("steps", steps)):
        if value is not None and not 1 <= value <= pixels:
            raise ValueError(f"{name}: expected from 1 to the {pixels} pixels, got {value}")
    if steps is not None:
        return -(-pixels // steps)
    return min(STEP, pixels) if step is None else step
