"""Saliency maps beside the rows: an array per part, or a picture per image.

Maps are those of the network, in their own cells (56 x 56 for an image of 224 x 224). They are on
the disk before the part of their rows gets its name, so that a part always has its maps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.data import parts
from casm_fast.data.predictions import Convention
from casm_fast.extraction.config import Masks
from casm_fast.extraction.masks import boxed

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
