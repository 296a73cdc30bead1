"""A picture under its saliency."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.geometry import Geometry, cells_of

COLOURS = "inferno"
BOX_COLOUR = (255, 157, 46)
UNSEEN = 0.35
"""Brightness of what the network's square does not show."""


def full_saliency(saliency: NDArray[np.float32], where: Geometry, size: int) -> NDArray[np.float32]:
    """The saliency of every pixel of a picture, that of the cell that its centre lies in.

    Args:
        saliency: ``[h, w]`` of the network's square.
        where: From the picture to that square.
        size: Side of the square.

    Returns:
        ``[H, W]``; NaN where the network saw nothing.
    """
    down = cells_of(where.height, where.scale_y, where.offset_y, size, saliency.shape[0])
    across = cells_of(where.width, where.scale_x, where.offset_x, size, saliency.shape[1])
    whole: NDArray[np.float32] = saliency[np.ix_(down.clip(0), across.clip(0))]
    whole[(down < 0)[:, None] | (across < 0)] = np.nan
    return whole


def overlay(
    image: NDArray[np.uint8], saliency: NDArray[np.float32], box: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """A picture under its saliency in colours, with its box.

    Args:
        image: ``[H, W, 3]`` RGB.
        saliency: ``[H, W]`` in [0, 1], from :func:`full_saliency`.
        box: (x0, y0, x1, y1) half-open; an empty one is not drawn.

    Returns:
        ``[H, W, 3]``.
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    unseen = np.isnan(saliency)
    shade = np.nan_to_num(saliency)[..., None]
    colours = colormaps[COLOURS](shade[..., 0])[..., :3] * 255
    share = 0.25 + 0.5 * shade  # of the colour: the picture stays visible everywhere
    mixed = np.where(unseen[..., None], UNSEEN * image, image * (1 - share) + colours * share)
    picture = Image.fromarray(np.rint(mixed).astype(np.uint8))
    x0, y0, x1, y1 = box
    if x1 > x0:
        width = max(1, round(min(picture.size) / 120))
        corners = (x0, y0, x1 - 1, y1 - 1)
        ImageDraw.Draw(picture).rectangle(corners, outline=BOX_COLOUR, width=width)
    return np.asarray(picture)
