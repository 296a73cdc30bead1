"""How much of a region a saliency map covers, and masks of equal area.

Two saliency maps can be compared fairly only where they mark the same area: a map that marks more
covers more. `most_salient` therefore keeps a given share of each map, its most salient cells, and
`coverage` says how much of a region, such as an object or one of its parts, they cover.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def most_salient(
    saliency: NDArray[np.floating[Any]], share: float | NDArray[np.float64]
) -> NDArray[np.bool_]:
    """The most salient cells of each map, as many as asked for.

    Args:
        saliency: ``[n, h, w]``.
        share: Of the cells, in [0, 1]: one for all maps, or ``[n]``. The number of cells is rounded
            to the nearest whole one, half to even.

    Returns:
        ``[n, h, w]``. Among equal cells the first in raster order are kept.

    Raises:
        ValueError: A share is outside [0, 1].
    """
    shares = np.broadcast_to(np.asarray(share, np.float64), len(saliency))
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"most_salient: expected `share` in [0, 1], got {share}")
    flat = saliency.reshape(len(saliency), -1)
    rank = np.empty(flat.shape, np.int64)
    order = np.argsort(-flat, axis=1, kind="stable")
    np.put_along_axis(rank, order, np.arange(flat.shape[1])[None], axis=1)
    kept: NDArray[np.bool_] = rank < np.rint(shares * flat.shape[1])[:, None]
    return kept.reshape(saliency.shape)


def coverage(saliency: NDArray[Any], region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean of each map over the pixels of its region: the covered share, for a map of 0 and 1.

    Args:
        saliency: ``[n, h, w]``, numbers in [0, 1] or bool; pixel (y, x) of an H x W image reads
            cell (y * h // H, x * w // W).
        region: ``[n, H, W]``.

    Returns:
        ``[n]`` in [0, 1]; NaN where a region is empty.
    """
    rows, columns = (
        np.arange(pixels) * cells // pixels
        for pixels, cells in zip(region.shape[1:], saliency.shape[1:], strict=True)
    )
    values = saliency[:, rows[:, None], columns]
    pixels = region.sum(axis=(1, 2))
    held = np.where(region, values, 0).sum(axis=(1, 2), dtype=np.float64)
    share = np.full(len(region), np.nan)
    np.divide(held, pixels, out=share, where=pixels > 0)
    return share
