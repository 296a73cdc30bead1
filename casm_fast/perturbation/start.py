"""First masks: the centred disc of the supplement's section 2, random, or constant."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast import ops
from casm_fast.models.memory import slices
from casm_fast.models.targets import Targets
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.judging import Judge
from casm_fast.perturbation.showing import Pictures, random_mask

SIDE = 224
"""The paper's images; radii and softening of other sizes are in proportion to the diagonal."""
RADII = range(0, 176, 5)
"""Pixels of such an image; the last disc covers it."""
SOFTENING = 10.0
"""Gaussian over the disc's edge, in the same pixels."""
SETTLED = 0.01
"""Share of the normalised score that may be left (deletion) or lost (preservation)."""


def first_masks(
    judge: Judge,
    pictures: Pictures,
    targets: Targets,
    before: Tensor,
    mask_size: tuple[int, int],
    config: PerturbConfig,
    batch_size: int,
) -> Tensor:
    """The masks that the descent starts from.

    Args:
        judge: Gives the scores.
        pictures: B images, without room for shifts.
        targets: Their classes.
        before: Their scores, ``[B]``.
        mask_size: (h, w).
        config: Which kind.
        batch_size: Images per pass of the classifier.

    Returns:
        ``[B, 1, h, w]``, 1 keeps.
    """
    count, like = len(before), pictures.images
    if config.initial == "constant":
        return like.new_full((count, 1, *mask_size), config.initial_value)
    if config.initial == "random":
        return random_mask(mask_size, config).to(like).repeat(count, 1, 1, 1)
    return _smallest(judge, pictures, targets, before, mask_size, config, batch_size)


def discs(size: tuple[int, int], mask_size: tuple[int, int], like: Tensor) -> Tensor:
    """Softened centred discs of all radii: 1 inside, ``[R, 1, h, w]``.

    Drawn and softened at the size of the image, then averaged into the cells of the mask.

    Args:
        size: (H, W) of the image.
        mask_size: (h, w).
        like: Gives dtype and device.
    """
    scale = math.hypot(*size) / math.hypot(SIDE, SIDE)
    rows, columns = (
        torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in size
    )  # from the centre
    distance = torch.hypot(rows[:, None], columns[None, :])
    radii = torch.tensor(RADII, dtype=torch.float32) * scale
    # A radius of 0 is no disc at all: also where a pixel lies in the very centre.
    inside = (distance < radii[:, None, None]).float()[:, None]
    soft = ops.gaussian_blur(inside, SOFTENING * scale)
    return F.adaptive_avg_pool2d(soft, mask_size).clamp(0, 1).to(like)


def _smallest(
    judge: Judge,
    pictures: Pictures,
    targets: Targets,
    before: Tensor,
    mask_size: tuple[int, int],
    config: PerturbConfig,
    batch_size: int,
) -> Tensor:
    """The smallest disc that settles the game of each image, else everything hidden.

    All images try one group of radii after another, as many pairs at once as a pass holds; images
    that are settled drop out.
    """
    images = pictures.images
    count, device = len(before), images.device
    still = torch.zeros(2, dtype=torch.int32, device=device)
    candidates = discs(pictures.size, mask_size, images)
    if config.game != "preservation":
        candidates = 1 - candidates  # hides the disc; otherwise keeps it
    hidden = images.new_zeros(count, 1, *mask_size)
    floor = torch.cat(
        [
            judge.scores(pictures.select(part), hidden[part], still, targets.select(part))
            for part in slices(count, batch_size)
        ]
    )
    span = before - floor  # [B]; nothing to lower or keep where it is not above 0
    chosen = hidden
    waiting = torch.nonzero(span > 0)[:, 0]
    radius = 0
    while radius < len(candidates) and len(waiting) > 0:
        group = candidates[radius : radius + max(1, batch_size // len(waiting))]
        radius += len(group)
        scores = []  # [radii of the group, waiting]
        for part in slices(len(waiting) * len(group), batch_size):
            pair = torch.arange(part.start, part.stop, device=device)
            who = waiting[pair % len(waiting)]
            masks = group[pair // len(waiting)]
            scores.append(judge.scores(pictures.select(who), masks, still, targets.select(who)))
        share = (torch.cat(scores).view(len(group), -1) - floor[waiting]) / span[waiting]
        settled = share >= 1 - SETTLED if config.game == "preservation" else share <= SETTLED
        found = settled.any(dim=0)
        smallest = settled.to(torch.int32).argmax(dim=0)  # the first of equals
        chosen[waiting[found]] = group[smallest[found]]
        waiting = waiting[~found]
    return chosen
