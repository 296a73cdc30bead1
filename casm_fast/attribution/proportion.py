"""Lengths that a paper gives for images of 224x224, on images of another size."""

from __future__ import annotations

import math
from collections.abc import Sequence

SIDE = 224
"""The papers' images."""


def in_proportion(pixels: float, size: Sequence[int]) -> float:
    """A length on images of 224x224, in proportion to the diagonal on others.

    Args:
        pixels: The paper's length.
        size: (H, W) of the images.
    """
    return pixels * (math.hypot(*size) / math.hypot(SIDE, SIDE))
