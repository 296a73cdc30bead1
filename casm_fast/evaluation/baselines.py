"""Boxes that look at no image: what a localisation score is worth is what it has beyond theirs.

The centred box is ``casm_fast.data.localization.centred_box``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
        borders = np.random.default_rng(int.from_bytes(digest, "little"))
        x0, x1 = np.sort(borders.choice(size + 1, 2, replace=False))
        y0, y1 = np.sort(borders.choice(size + 1, 2, replace=False))
        boxes[row] = x0, y0, x1, y1
    return boxes
