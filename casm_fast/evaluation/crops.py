r"""The saliency metric: is the smallest crop that holds the salient region still recognised?

Dabkowski and Gal 2017 (Real time image saliency for black box classifiers, section 5): the tightest
box around the salient region is cut out, resized to the classifier's input and classified. With the
share a of the image that the box covers and the probability p of the class,

.. math::
    s = \log \max(a, 0.05) - \log p

in nats, lower is better. The paper leaves open how a map becomes a region; here it is a rule and
factor of `casm_fast.ops.mask_boxes`, the mean (eq. 9 of CASM) when not told otherwise, and every
kept pixel counts. Phang et al. 2020 take the largest component (``component="largest"``) and resize
by bicubic interpolation, as is done here; the crop knows nothing of the pixels around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from casm_fast import ops
from casm_fast.evaluation.asking import ask, passes, targets_of
from casm_fast.evaluation.intervals import Interval, bootstrap
from casm_fast.evaluation.maps import Maps, as_maps, check_cells
from casm_fast.evaluation.outcomes import PER_IMAGE, mean_of, paragraph
from casm_fast.models.borrowing import Classifies, as_images, borrowed

Interpolation = Literal["bicubic", "bilinear"]

LEAST_AREA = 0.05
"""Share of the image below which a smaller crop is no better."""

_CUBIC = -0.75  # the constant of OpenCV's and torch's cubic convolution


@dataclass(frozen=True, eq=False)
class SaliencyMetric:
    """The saliency metric of B images. ``str(metric)`` is the printed score.

    Attributes:
        boxes: ``[B, 4]`` crops, (x0, y0, x1, y1) half-open in pixels of the image.
        area: ``[B]``, share of the image that the crop covers.
        log_probability: ``[B]``, of the class on the crop, in nats.
        right: ``[B]``, whether the class is the classifier's first guess on the crop.
        least_area: Below it a smaller crop is no better.
        convention: How the crops were made.
    """

    boxes: NDArray[np.int64] = field(metadata=PER_IMAGE)
    area: NDArray[np.float64] = field(metadata=PER_IMAGE)
    log_probability: NDArray[np.float64] = field(metadata=PER_IMAGE)
    right: NDArray[np.bool_] = field(metadata=PER_IMAGE)
    least_area: float
    convention: str

    @property
    def scores(self) -> NDArray[np.float64]:
        """``[B]``: the metric of each image."""
        return np.log(np.maximum(self.area, self.least_area)) - self.log_probability

    def interval(self, **told: Any) -> Interval:
        """The mean metric with its bootstrap interval; options of `bootstrap`."""
        return bootstrap(self.scores, **told)

    def __str__(self) -> str:
        areas = np.log(np.maximum(self.area, self.least_area))
        return (
            f"Saliency metric (lower is better): {self.interval().show('.3f')} over "
            f"{len(self.area):,} images\n"
            f"  log area {mean_of(areas):.3f}, log probability "
            f"{mean_of(self.log_probability):.3f}; crops cover "
            f"{100 * mean_of(self.area):.1f} %, recognised {100 * mean_of(self.right):.1f} %\n\n"
            + paragraph(self.convention)
        )


def saliency_metric(
    classifier: Classifies,
    images: Tensor | Sequence[Tensor],
    maps: Maps,
    targets: int | Sequence[int] | Tensor | None = None,
    *,
    rule: str = "mean",
    alpha: float = 1.0,
    component: str = "all",
    connectivity: int = 4,
    **told: Any,
) -> SaliencyMetric:
    """The saliency metric of maps of any origin.

    Args:
        classifier: As for `crop_metric`.
        images: ``[B, C, H, W]``, normalised for the classifier.
        maps: ``[B, 1, h, w]`` or ``[B, h, w]``, higher is more salient; H and W are multiples of h
            and w.
        targets: As for `crop_metric`.
        rule: Of the threshold: "mean", "area", "value" or "energy", see `casm_fast.ops.mask_boxes`.
        alpha: Factor of the rule; tune it on other images than those that are scored.
        component: "all" kept pixels, or the "largest" component of them.
        connectivity: Of components, 4 or 8.
        **told: Options of `crop_metric`.

    Returns:
        The metric of each image. A map of which nothing is kept gives the whole image.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: As `crop_metric`; maps whose cells are no whole numbers of pixels; an unknown
            rule.
    """
    values = as_maps("saliency_metric", maps)
    h, w = values.shape[1:]
    H, W = (images if isinstance(images, Tensor) else images[0]).shape[-2:]
    check_cells(values, (H, W))
    found, _ = ops.mask_boxes(
        values[:, None].contiguous(),
        rule=rule,
        alpha=alpha,
        component=component,
        connectivity=connectivity,
    )
    boxes = found.long() * torch.tensor([W // w, H // h] * 2, device=found.device)
    region = "every kept pixel" if component == "all" else f"the largest {connectivity}-component"
    return crop_metric(
        classifier,
        images,
        boxes.cpu().numpy(),
        targets,
        origin=f"tight box of {region}, threshold by rule {rule}, alpha {alpha:g}",
        **told,
    )


def crop_metric(
    classifier: Classifies,
    images: Tensor | Sequence[Tensor],
    boxes: ArrayLike,
    targets: int | Sequence[int] | Tensor | None = None,
    *,
    interpolation: Interpolation = "bicubic",
    least_area: float = LEAST_AREA,
    origin: str = "given boxes",
    batch_size: int | None = None,
    memory_budget: float | None = None,
) -> SaliencyMetric:
    """The saliency metric of boxes, such as the true ones, the whole image or the centre.

    Args:
        classifier: Any module or function from images to logits ``[B, K]``; it is given back
            exactly as it was.
        images: ``[B, C, H, W]``, normalised for the classifier.
        boxes: ``[B, 4]`` (x0, y0, x1, y1) half-open integers in pixels of the images; clipped to
            them, and the whole image where nothing is left.
        targets: One class for all, or one per image; None: each image's best class.
        interpolation: Of the crops: "bicubic" or "bilinear".
        least_area: Share of the image below which a smaller crop is no better.
        origin: Where the boxes are from, for the convention.
        batch_size: Images in one pass; None: as many as memory_budget holds.
        memory_budget: GiB for one pass; None: half of what is free, on the CPU at most 4.

    Returns:
        The metric of each image, for `join` over the batches of a data set.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: Boxes that are not one for each image, another interpolation, a share outside
            (0, 1], several classes for an image, or a classifier that gives no logits.
    """
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"interpolation: expected bicubic or bilinear, got {interpolation!r}")
    if not 0 < least_area <= 1:
        raise ValueError(f"least_area: expected a share in (0, 1], got {least_area}")
    with torch.inference_mode(False), torch.no_grad(), borrowed(classifier) as lent:
        batch = as_images(classifier, images)
        B, _, H, W = batch.shape
        table = np.asarray(boxes)
        if table.shape != (B, 4):
            raise ValueError(f"boxes: expected {[B, 4]}, got {list(table.shape)}")
        table = np.clip(table.astype(np.int64), 0, [W, H, W, H])
        empty = (table[:, 2:] <= table[:, :2]).any(axis=1)
        table[empty] = 0, 0, W, H
        size = passes(lent, batch, batch_size, memory_budget)
        classes = targets_of(lent, batch, targets, size)
        if classes.classes.shape[1] != 1:
            raise ValueError(
                "targets: expected one class for each image, "
                f"got {classes.classes.shape[1]} for some"
            )
        where = torch.from_numpy(table).to(batch.device)

        def show(part: slice) -> Tensor:
            return crop(batch[part], where[part], interpolation)

        def answer(values: Tensor, part: slice) -> Tensor:
            one = classes.select(part)
            first = values.argmax(dim=1) == one.classes[:, 0]
            return torch.stack([one.of(values.log_softmax(dim=1)).double(), first.double()], dim=1)

        found = ask(lent, B, show, answer, size, batch.device).cpu().numpy()
    sides = table[:, 2:] - table[:, :2]
    return SaliencyMetric(
        boxes=table,
        area=sides.prod(axis=1) / (H * W),
        log_probability=found[:, 0],
        right=found[:, 1] > 0,
        least_area=least_area,
        convention=(
            f"log(max(area, {least_area:g})) - log(p) in nats; crop: {origin}; the whole image "
            f"where a box is empty; resized by {interpolation} interpolation of the crop alone; p: "
            f"softmax of the {'given' if targets is not None else 'predicted'} class; mean over "
            "the images"
        ),
    )


def crop(images: Tensor, boxes: Tensor, interpolation: Interpolation = "bicubic") -> Tensor:
    """Cut a box out of each image and resize it to the size of the image, all at once.

    The same as resizing each crop on its own without antialiasing, pixel centres aligned
    (``align_corners=False``): taps beyond the crop read its border.

    Args:
        images: ``[B, C, H, W]``.
        boxes: ``[B, 4]`` int64 (x0, y0, x1, y1), not empty, inside the images.
        interpolation: "bicubic" (cubic convolution with -0.75) or "bilinear".

    Returns:
        ``[B, C, H, W]``.
    """
    B, C, H, W = images.shape
    rows, down = _taps(boxes[:, 1], boxes[:, 3], H, interpolation)
    columns, across = _taps(boxes[:, 0], boxes[:, 2], W, interpolation)
    tall = sum(
        images.gather(2, row[:, None, :, None].expand(B, C, H, W))
        * weight[:, None, :, None].to(images)
        for row, weight in zip(rows, down, strict=True)
    )
    wide = sum(
        torch.as_tensor(tall).gather(3, column[:, None, None, :].expand(B, C, H, W))
        * weight[:, None, None, :].to(images)
        for column, weight in zip(columns, across, strict=True)
    )
    return torch.as_tensor(wide)


def _taps(
    start: Tensor, stop: Tensor, side: int, interpolation: Interpolation
) -> tuple[Tensor, Tensor]:
    """Where each output pixel of an axis reads, and how much: ``[taps, B, side]`` both."""
    length = (stop - start).double()[:, None]
    place = (torch.arange(side, device=start.device).double() + 0.5) * length / side - 0.5
    if interpolation == "bilinear":
        place = place.clamp(min=0)
        low = place.floor()
        t = place - low
        reach, weights = [0, 1], [1 - t, t]
    else:
        low = place.floor()
        t = place - low
        reach = [-1, 0, 1, 2]
        weights = [_cubic_far(1 + t), _cubic_near(t), _cubic_near(1 - t), _cubic_far(2 - t)]
    taps = [(low + step).clamp(min=0).minimum(length - 1).long() + start[:, None] for step in reach]
    return torch.stack(taps), torch.stack(weights)


def _cubic_near(x: Tensor) -> Tensor:
    """The cubic convolution at a distance in [0, 1]."""
    return ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1


def _cubic_far(x: Tensor) -> Tensor:
    """The cubic convolution at a distance in [1, 2]."""
    return ((x - 5) * x + 8) * x * _CUBIC - 4 * _CUBIC
