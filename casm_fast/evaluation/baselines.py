"""Boxes that look at no image: what a localisation score is worth is what it has beyond theirs.

The centred box is ``casm_fast.data.localization.centred_box``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def whole(images: int, size: int) -> NDArray[np.int64]:
    """The whole square as the box of every image.

    Args:
        images: Number of images.
        size: Side of the network's square.

    Returns:
        ``[images, 4]``.
    """
    return np.tile(np.array([0, 0, size, size], np.int64), (images, 1))


def random(image_ids: Sequence[str], size: int) -> NDArray[np.int64]:
    """A box with random corners for every image, always the same one for the same image id.

    The two columns (and the two rows) are drawn uniformly among all pairs of different pixel
    borders, from a hash of the id: neither the order nor the number of the images changes a box.

    Args:
        image_ids: Ids of the images.
        size: Side of the network's square.

    Returns:
        ``[len(image_ids), 4]``.
    """
    boxes = np.empty((len(image_ids), 4), np.int64)
    for row, image_id in enumerate(image_ids):
        digest = hashlib.blake2b(image_id.encode(), digest_size=16).digest()
        seeded = np.random.PCG64(int.from_bytes(digest, "little"))
        draw = np.random.Generator(seeded).integers
        (x0, x1), (y0, y1) = _borders(draw, size), _borders(draw, size)
        boxes[row] = x0, y0, x1, y1
    return boxes


def _borders(draw: Callable[[int], Any], size: int) -> tuple[int, int]:
    """Two different whole numbers from 0 to `size`, the smaller first, by Floyd's algorithm.

    They are those of ``Generator.choice(size + 1, 2, replace=False)``, which takes longer and draws
    their order last.
    """
    first, second = int(draw(size)), int(draw(size + 1))
    draw(2)
    if second == first:
        second = size
    return min(first, second), max(first, second)
