"""Saliency maps beside the rows: an array per part, or a picture per image; or masks in the rows.

Maps are those of the network, in their own cells (56 x 56 for an image of 224 x 224). They are on
the disk before the part of their rows gets its name, so that a part always has its maps. A mask is
the set of pixels of the original picture that the box is drawn around.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast import ops
from casm_fast.data import parts
from casm_fast.data.geometry import Geometry, cells_of
from casm_fast.data.predictions import Convention
from casm_fast.extraction.config import Masks

PER_ROW = ("npy", "png")
"""Kinds that are written beside the rows, in a folder."""

PICTURES = "masks"
"""Folder of the pictures."""

PER_FOLDER = 1000
"""Pictures of a folder."""


def stored(saliency: Tensor, kind: Masks, convention: Convention) -> Tensor:
    """Saliency maps as they are kept.

    Args:
        saliency: ``[B, 1, h, w]`` float32 in [0, 1].
        kind: "npy", "png" or "rle".
        convention: Box rule.

    Returns:
        ``[B, h, w]``, float16 for "npy", uint8 of round(255 m) for "png", uint8 of 1 behind the box
        for "rle".
    """
    maps = saliency[:, 0]
    if kind == "npy":
        return maps.half()
    if kind == "png":
        return (maps * 255).round().to(torch.uint8)
    return boxed(saliency, convention)[:, 0].to(torch.uint8)


def boxed(saliency: Tensor, convention: Convention) -> Tensor:
    """The cells that a box is drawn around: what the rule keeps, or its largest component.

    Args:
        saliency: ``[B, 1, h, w]`` floating.
        convention: Box rule.

    Returns:
        ``[B, 1, h, w]`` bool; their extent and number are what `casm_fast.ops.mask_boxes` gives.
    """
    flat = saliency.flatten(1)
    count = ops.mask_boxes(saliency, rule=convention.rule, alpha=convention.alpha, component="all")[
        1
    ].long()[:, None]
    # Whatever the rule, it keeps the highest cells; their number says down to which one.
    levels = flat.nan_to_num(-math.inf, math.inf, -math.inf).sort(1, descending=True).values
    kept = (flat >= levels.gather(1, (count - 1).clamp(min=0))) & (count > 0)
    kept = kept.view_as(saliency)
    if convention.component == "all":
        return kept
    labels = ops.connected_components(kept, convention.connectivity)
    cells = flat.shape[1]
    sizes = flat.new_zeros(len(flat), cells + 1, dtype=torch.int64)
    sizes.scatter_add_(1, labels.flatten(1).long(), torch.ones_like(flat, dtype=torch.int64))
    sizes[:, 0] = 0
    # Among equals the smallest label, which is that of the first pixel.
    order = sizes * (cells + 1) - torch.arange(cells + 1, device=sizes.device)
    return kept & (labels == order.argmax(1)[:, None, None, None])


def run_lengths(maps: NDArray[np.uint8], geometries: Sequence[Geometry], size: int) -> list[str]:
    """Cells as COCO's compressed run lengths of the original pictures' pixels.

    A pixel belongs to the cell that its centre lies in; beyond the network's square nothing is set.

    Args:
        maps: ``[B, h, w]``, 0 or 1.
        geometries: Of the B pictures.
        size: Side of the network's square.
    """
    from pycocotools import mask as codec

    # COCO runs down the columns. The last row and column of zeros are those of the number -1.
    columns = np.pad(maps, ((0, 0), (0, 1), (0, 1))).transpose(0, 2, 1)
    height, width = maps.shape[1:]
    encoded = []
    for cells, where in zip(columns, geometries, strict=True):
        across = cells_of(where.width, where.scale_x, where.offset_x, size, width)
        down = cells_of(where.height, where.scale_y, where.offset_y, size, height)
        mask = cells.take(down, axis=1).take(across, axis=0).T  # whole columns are copied
        encoded.append(codec.encode(mask)["counts"].decode("ascii"))
    return encoded


def spread(maps: NDArray[Any] | None, places: Sequence[int], count: int) -> NDArray[Any]:
    """Maps at the places of their rows, and NaN (0 in uint8) at those of images without one.

    Args:
        maps: ``[B, h, w]``; None when no image of the batch could be read.
        places: B rows.
        count: Rows.

    Returns:
        ``[count, h, w]``.
    """
    if maps is None:
        return np.zeros((count, 0, 0), np.float16)
    if len(maps) == count:
        return maps
    whole = _without(count, maps)
    whole[list(places)] = maps
    return whole


def write(
    folder: Path, start: int, maps: list[NDArray[Any]], errors: Sequence[str | None], kind: Masks
) -> None:
    """Write the maps of a part.

    Args:
        folder: Of the parts.
        start: Place of the first row.
        maps: ``[n, h, w]`` each, from `spread`.
        errors: One per row; an image with an error gets no picture.
        kind: "npy": ``masks-START-STOP.npy``, float16 ``[rows, h, w]``, to be read by
            ``numpy.load(..., mmap_mode="r")``. "png": ``masks/000012/000012345.png``, 8-bit grey,
            by the place of the row.
    """
    largest = max(maps, key=lambda piece: piece.shape[1:])
    pieces = [
        piece if piece.shape[1:] == largest.shape[1:] else _without(len(piece), largest)
        for piece in maps
    ]
    whole = np.concatenate(pieces)
    if kind == "npy":
        with parts.unfinished(parts.masks_file(folder, start, start + len(whole))) as stream:
            np.save(stream, whole)
        return
    from PIL import Image

    for place, (picture, error) in enumerate(zip(whole, errors, strict=True), start):
        if error is None:
            path = picture_file(folder, place)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    os.sync()


def _without(count: int, like: NDArray[Any]) -> NDArray[Any]:
    """Maps of images that have none."""
    none = np.nan if like.dtype == np.float16 else 0
    return np.full((count, *like.shape[1:]), none, like.dtype)


def picture_file(folder: Path, place: int) -> Path:
    """The picture of the map of a row."""
    return folder / PICTURES / f"{place // PER_FOLDER:06d}" / f"{place:09d}.png"
