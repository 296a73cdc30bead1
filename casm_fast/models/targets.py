"""The classes that a method asks a classifier about: one or several for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The classes of each image.

    Attributes:
        classes: ``[B, n]`` int64; rows of fewer classes are filled up with -1.
    """

    classes: Tensor

    def select(self, places: Tensor | slice) -> Targets:
        """Those of some images."""
        return Targets(self.classes[places])

    def of(self, values: Tensor) -> Tensor:
        """The sum of each image's classes in ``[B, K]``: ``[B]``."""
        picked = values.gather(1, self.classes.clamp(min=0))
        return picked.masked_fill(self.classes < 0, 0).sum(dim=1)


def as_targets(targets: Any, count: int, classes: int, top_k: int = 1) -> Tensor | None:
    """What a caller gave as classes, checked.

    Args:
        targets: One class for all images, one per image (``[B]``), or several per image
            (``[B, n]``, or lists; -1 fills up); None: the best classes of each.
        count: Number of images.
        classes: Number of classes.
        top_k: How many of the best are asked for without targets.

    Returns:
        ``[B, n]`` int64 on the host, filled up with -1; None for the best classes of each.

    Raises:
        TypeError: Something else than integers.
        ValueError: A class that is none, another number of images, or more than one of the best
            beside targets.
    """
    if targets is None:
        if top_k > classes:
            raise ValueError(f"top_k: expected at most {classes}, the classes, got {top_k}")
        return None
    if top_k != 1:
        raise ValueError(
            f"targets: expected None beside top_k = {top_k}, which takes each image's best "
            "classes, got targets; give one of the two"
        )
    given = targets.tolist() if isinstance(targets, Tensor) else targets
    each = [given] * count if type(given) is int else given
    rows: list[list[int]] = []
    if isinstance(each, (list, tuple)):
        rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in each]
    if not rows or any(type(one) is not int for row in rows for one in row):
        raise TypeError(
            "targets: expected classes as integers, one or several for each image, "
            f"got {type(targets).__name__}"
        )
    if len(rows) != count:
        raise ValueError(f"targets: expected classes for {count} images, got {len(rows)}")
    for number, row in enumerate(rows):
        bad = [one for one in row if not -1 <= one < classes]
        if bad or not any(one >= 0 for one in row):
            got = bad[0] if bad else "none"
            raise ValueError(
                f"targets: expected classes in 0 ... {classes - 1}, got {got} for image {number}"
            )
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)
