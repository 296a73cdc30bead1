"""True boxes as every protocol takes them: one array ``[m, 4]`` for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def check_truth(
    protocol: str, truth: Sequence[ArrayLike], images: int, sizes: ArrayLike | None = None
) -> tuple[list[NDArray[Any]], NDArray[np.int64] | None]:
    """True boxes and picture sizes as arrays.

    Args:
        protocol: First word of the message.
        truth: An array ``[m, 4]`` for each image.
        images: How many there are.
        sizes: ``[n, 2]`` (H, W) of the pictures, or None.

    Returns:
        n arrays ``[m, 4]``, and the sizes ``[n, 2]``.

    Raises:
        ValueError: No image, another number of images, an image without a box, or boxes or sizes of
            another shape.
    """
    if images == 0:
        raise ValueError(f"{protocol}: expected at least one image, got none")
    if len(truth) != images:
        raise ValueError(
            f"{protocol}: expected `truth` for {images} images, got {len(truth)} lists of boxes"
        )
    boxes = [np.asarray(one) for one in truth]
    for image, table in enumerate(boxes):
        if table.size == 0:
            raise ValueError(
                f"{protocol}: expected at least one true box for every image, got none for image "
                f"{image}; leave such images out"
            )
        if table.ndim != 2 or table.shape[1] != 4:
            raise ValueError(
                f"{protocol}: expected `truth` as arrays [m, 4], got {list(table.shape)} for image "
                f"{image}"
            )
    if sizes is None:
        return boxes, None
    pictures = np.asarray(sizes, np.int64)
    if pictures.shape != (images, 2) or (pictures < 1).any():
        raise ValueError(
            f"{protocol}: expected `sizes` as positive (H, W) of shape [{images}, 2], "
            f"got {list(pictures.shape)}"
        )
    return boxes, pictures


def best_of(scores: NDArray[np.float64], owners: NDArray[np.int64]) -> NDArray[np.float64]:
    """The highest score of each image over its true boxes.

    Args:
        scores: ``[N, K]``, a row for each true box.
        owners: ``[N]`` the image of each, from ``casm_fast.data.localization.pair``: rising, every
            image at least once.

    Returns:
        ``[n, K]``.
    """
    best: NDArray[np.float64] = np.maximum.reduceat(
        scores, np.flatnonzero(np.diff(owners, prepend=-1)), axis=0
    )
    return best
