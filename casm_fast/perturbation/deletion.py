"""The deletion game: how small a box suffices, when its blur must take the score away.

Fong & Vedaldi 2017, section 5.4: a saliency map is stretched to [0, 1] and thresholded at 0, 0.01,
... 1; the pixels at or above a threshold span a box; the box that is hidden leaves a share of the
normalised score; and the smallest box that leaves at most 1 % measures the map, smaller is better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casm_fast import ops
from casm_fast.models.borrowing import Classifies, as_images
from casm_fast.models.memory import slices
from casm_fast.models.targets import Targets, as_targets
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.judging import Judge, judging
from casm_fast.perturbation.showing import Pictures, pictures

THRESHOLDS = 101

BATCH = 64
"""Boxes that are shown at once, where the configuration names no number."""


@dataclass(frozen=True)
class DeletionCurve:
    """What hiding boxes does to B images, on their device.

    Attributes:
        thresholds: ``[T]``, of maps stretched to [0, 1].
        boxes: ``[B, T, 4]`` int32, (x0, y0, x1, y1) half-open.
        areas: ``[B, T]``, share of the image inside.
        left: ``[B, T]``, normalised score with the box hidden: 1 as shown, 0 as hidden entirely;
            NaN where an image's score does not fall when everything is hidden.
    """

    thresholds: Tensor
    boxes: Tensor
    areas: Tensor
    left: Tensor

    def smallest(self, left: float = 0.01) -> Tensor:
        """The share of the image inside the smallest box that leaves at most so much, ``[B]``.

        1, the whole image, where no box does.
        """
        found = self.areas.masked_fill(~(self.left <= left), 1.0).amin(dim=1)
        return torch.as_tensor(found)


def deletion_curve(
    classifier: Classifies,
    images: Tensor,
    saliency: Tensor,
    targets: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    config: PerturbConfig | None = None,
    **overrides: Any,
) -> DeletionCurve:
    """Play the deletion game with saliency maps of any origin.

    Args:
        classifier: As for `perturb`; it is given back as it was.
        images: ``[B, C, H, W]``.
        saliency: ``[B, 1, H, W]``, 1 = salient, any range; a constant map spans the whole image at
            each threshold.
        targets: As for `perturb`.
        config: Score, replacement and precision; deletion of blurs when not given.
        **overrides: Fields of `PerturbConfig` by name.

    Returns:
        Boxes and the scores that they leave. Equal boxes of an image are judged once.

    Raises:
        TypeError: As `perturb`.
        ValueError: As `perturb`; a map is not finite or of another shape; the configuration names a
            layer.
    """
    config = dataclasses.replace(config or PerturbConfig(), **overrides)
    if config.layer is not None:
        raise ValueError(f"layer: expected None for boxes in images, got {config.layer!r}")
    config = dataclasses.replace(config, mask_sigma=0.0)  # boxes have edges
    with torch.inference_mode(False), torch.no_grad(), judging(classifier, config) as judge:
        batch = as_images(classifier, images)
        size = (len(batch), 1, *batch.shape[2:])
        if not isinstance(saliency, Tensor) or saliency.shape != size:
            got = list(saliency.shape) if isinstance(saliency, Tensor) else type(saliency).__name__
            raise ValueError(f"saliency: expected a tensor {list(size)}, got {got}")
        maps = saliency.detach().to(batch)
        if not bool(maps.isfinite().all()):
            raise ValueError("saliency: expected finite values, got NaN or infinity")
        still = pictures(batch, config)
        shift = torch.zeros(2, dtype=torch.int32, device=batch.device)
        count = config.batch_size or BATCH
        logits = torch.cat(
            [judge.logits(still.select(part), None, shift) for part in slices(len(batch), count)]
        )
        chosen = as_targets(targets, len(batch), logits.shape[1], config.top_k)
        classes = logits.topk(config.top_k).indices if chosen is None else chosen.to(logits.device)
        return _play(judge, still, Targets(classes), maps, shift, count)


def _play(
    judge: Judge, still: Pictures, targets: Targets, maps: Tensor, shift: Tensor, count: int
) -> DeletionCurve:
    B, (H, W) = len(maps), still.size
    thresholds = torch.linspace(0, 1, THRESHOLDS, dtype=maps.dtype, device=maps.device)
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    stretched = torch.where(flat, 1, (maps - low) / torch.where(flat, 1, high - low))
    boxes = torch.stack(
        [
            ops.mask_boxes(stretched, level=level.expand(B).contiguous(), component="all")[0]
            for level in thresholds
        ],
        dim=1,
    )  # [B, T, 4]

    # Boxes shrink from threshold to threshold and mostly stay: each is shown once.
    places = torch.arange(B, dtype=torch.int32, device=maps.device)[:, None, None]
    keyed = torch.cat([places.expand(B, THRESHOLDS, 1), boxes], dim=2).flatten(0, 1)
    different, back = torch.unique(keyed, dim=0, return_inverse=True)
    whole = torch.tensor([0, 0, W, H], dtype=torch.int32, device=maps.device).expand(B, 4)
    nothing = torch.zeros_like(whole)
    ends = torch.cat([torch.cat([places[:, 0], box], dim=1) for box in (nothing, whole)])
    scores = []
    asked = torch.cat([different, ends])
    for part in slices(len(asked), count):
        who, x0, y0, x1, y1 = asked[part].long().unbind(dim=1)
        keep = 1 - _inside(y0, y1, H)[:, :, None] * _inside(x0, x1, W)[:, None, :]
        mask = keep[:, None].to(maps)
        scores.append(judge.scores(still.select(who), mask, shift, targets.select(who)))
    score = torch.cat(scores)
    shown, hidden = score[len(different) :].view(2, B)
    span = torch.where(shown > hidden, shown - hidden, torch.nan)
    left = (score[back].view(B, THRESHOLDS) - hidden[:, None]) / span[:, None]
    x0, y0, x1, y1 = boxes.to(maps.dtype).unbind(dim=2)
    return DeletionCurve(thresholds, boxes, (x1 - x0) * (y1 - y0) / (H * W), left)


def _inside(first: Tensor, stop: Tensor, side: int) -> Tensor:
    """``[n, side]`` int64: 1 from `first` to before `stop`."""
    place = torch.arange(side, device=first.device)
    return ((place >= first[:, None]) & (place < stop[:, None])).long()
