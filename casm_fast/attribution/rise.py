"""RISE: the mean of random masks, weighed by the scores of what they show.

Petsiuk, Das & Saenko, "RISE: Randomized input sampling for explanation of black-box models" (BMVC
2018), eq. 6, with N masks M_n in [0, 1] that multiply the image, so that 0 shows the mean colour::

    map = 1 / (p N) sum_n s(image * M_n) M_n

A mask begins as a grid of cells x cells, each 1 with probability p. It is enlarged bilinearly to
(cells + 1) C_H x (cells + 1) C_W, where C = ceil(side / cells), and a window of the image's size is
cut out at a place drawn uniformly from 0 ... C_H - 1 and 0 ... C_W - 1 (the paper's section 3.2;
its floor would not cover sides that are no multiple, and the authors' code takes the ceiling too).
The masks are the same for all images, follow from the seed, and exist only while a batch is shown.

The paper's score is the probability; as in all methods here it is the logit unless asked for::

    casm_fast.attribute("rise", classifier, images, targets, score="softmax")
    casm_fast.attribute("rise", classifier, images, targets, masks=4000, cells=10)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from casm_fast import ops
from casm_fast.attribution.problem import Method, Problem
from casm_fast.models.memory import slices


@dataclass(frozen=True)
class Options:
    """Of RISE; the defaults are those of the paper for ResNet-50."""

    masks: int = 8000
    """N."""

    cells: int = 7
    """Of a mask's side."""

    probability: float = 0.5
    """p, with which a cell is shown, above 0 and at most 1."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("masks", "cells"):
            if getattr(self, name) < 1:
                raise ValueError(f"rise: expected {name} of at least 1, got {getattr(self, name)}")
        if not 0 < self.probability <= 1:
            raise ValueError(
                f"rise: expected probability above 0 and at most 1, got {self.probability}"
            )


@dataclass(frozen=True)
class Masks:
    """Masks before they are enlarged.

    Attributes:
        grids: ``[N, cells, cells]``, 0 or 1, in the dtype of the images.
        shifts: (y, x) of the windows, ``[N, 2]`` int64.
        size: (H, W) of the images.
    """

    grids: Tensor
    shifts: Tensor
    size: tuple[int, int]

    @staticmethod
    def draw(seed: int, images: Tensor, options: Options) -> Masks:
        """The masks of a seed for images ``[B, C, H, W]``."""
        H, W = images.shape[2:]
        stream = torch.Generator().manual_seed(seed)
        count, cells = options.masks, options.cells
        chance = torch.rand(count, cells, cells, generator=stream, dtype=torch.float64)
        shifts = torch.stack(
            [torch.randint(-(-side // cells), (count,), generator=stream) for side in (H, W)], dim=1
        )
        return Masks((chance < options.probability).to(images), shifts.to(images.device), (H, W))

    def enlarged(self, which: Tensor) -> Tensor:
        """Some of them, ``[n, 1, H, W]``.

        Args:
            which: ``[n]`` int64.
        """
        grids, shifts = self.grids[which], self.shifts[which]
        rows, columns = (
            bilinear(side, grids.shape[1], grids)[
                shifts[:, axis, None] + torch.arange(side, device=grids.device)
            ]
            for axis, side in enumerate(self.size)
        )  # [n, H, cells] and [n, W, cells]
        return (rows @ grids @ columns.mT)[:, None]


def bilinear(side: int, cells: int, like: Tensor) -> Tensor:
    """Weights that enlarge `cells` to (cells + 1) * ceil(side / cells) pixels, ``[pixels, cells]``.

    Those of `torch.nn.functional.interpolate` with ``align_corners=False``.
    """
    pixels = (cells + 1) * -(-side // cells)
    place = (torch.arange(pixels, device=like.device, dtype=torch.float64) + 0.5) * cells / pixels
    place = (place - 0.5).clamp(0, cells - 1)
    away = (place[:, None] - torch.arange(cells, device=like.device)).abs()
    return (1 - away).clamp(min=0).to(like.dtype)


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]`` in units of the score."""
    images = problem.images
    masks = Masks.draw(problem.seed, images, options)

    def shown(who: Tensor, which: Tensor) -> Tensor:
        return ops.blend(images[who], None, masks.enlarged(which))

    scores = problem.scores_of_variants(options.masks, shown).double()
    total = torch.zeros(len(images), *masks.size, dtype=torch.float64, device=images.device)
    for part in slices(options.masks, problem.batch_size):
        which = torch.arange(part.start, part.stop, device=images.device)
        total += torch.tensordot(scores[:, part], masks.enlarged(which)[:, 0].double(), dims=1)
    return (total / (options.probability * options.masks))[:, None].to(images.dtype)


METHODS = (Method("rise", "RISE", "Petsiuk et al. 2018", maps, Options, uses="scores"),)
