"""Where original pixels land in the network's square, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Policy = Literal["crop", "squash"]
"""How a picture becomes a square: "crop" resizes the shorter side and takes the centre; "squash"
resizes both sides on their own."""

# Far above the error of a float64 round trip, far below what a pixel of either grid matters.
_SLACK = 1e-6


def check_policy(policy: str) -> None:
    """Raises ValueError unless ``policy`` is "crop" or "squash"."""
    if policy not in ("crop", "squash"):
        raise ValueError(f'expected resize policy "crop" or "squash", got {policy!r}')


@dataclass(frozen=True)
class Geometry:
    """The map from a picture to the network's square: network = original * scale - offset.

    Attributes:
        scale_y: Network pixels per original pixel, along y.
        scale_x: The same along x.
        offset_y: Network pixels cut off above the square.
        offset_x: Network pixels cut off left of it.
        height: Of the original, in pixels.
        width: Of the original, in pixels.
    """

    scale_y: float
    scale_x: float
    offset_y: float
    offset_x: float
    height: int
    width: int

    def to_network(self, boxes: NDArray[Any]) -> NDArray[np.int32]:
        """Boxes of the original in network pixels, by the rule of the CASM authors' scoring.

        Each coordinate is scaled, shifted and truncated towards zero. Nothing is clipped: a box
        that leaves the crop keeps its area, and so costs a prediction that cannot reach it.

        Args:
            boxes: ``[n, 4]`` (x0, y0, x1, y1) in original pixels.

        Returns:
            ``[n, 4]`` int32 in network pixels, possibly negative or beyond the square.
        """
        return to_network([self], boxes)

    def to_original(self, boxes: NDArray[Any]) -> NDArray[np.int32]:
        """Boxes of the network's square in original pixels.

        Rounded outwards, so that the result covers every original pixel the box touches, then
        clipped to the picture. An empty box becomes (0, 0, 0, 0).

        Args:
            boxes: ``[n, 4]`` (x0, y0, x1, y1), half-open, in network pixels.

        Returns:
            ``[n, 4]`` int32 half-open, in original pixels.
        """
        return to_original([self], boxes)


def to_network(geometries: Sequence[Geometry], boxes: NDArray[Any]) -> NDArray[np.int32]:
    """`Geometry.to_network` of boxes of many pictures.

    Args:
        geometries: One for each box, or a single one for all.
        boxes: ``[n, 4]``.

    Returns:
        ``[n, 4]`` int32.
    """
    scales, offsets, _ = _numbers(geometries)
    table = np.asarray(boxes, np.float64).reshape(-1, 4)
    result: NDArray[np.int32] = np.trunc(table * scales - offsets).astype(np.int32)
    return result


def to_original(geometries: Sequence[Geometry], boxes: NDArray[Any]) -> NDArray[np.int32]:
    """`Geometry.to_original` of boxes of many pictures.

    Args:
        geometries: One for each box, or a single one for all.
        boxes: ``[n, 4]``.

    Returns:
        ``[n, 4]`` int32.
    """
    scales, offsets, sides = _numbers(geometries)
    table = np.asarray(boxes, np.float64).reshape(-1, 4)
    exact = (table + offsets) / scales
    low = np.floor(exact[:, :2] + _SLACK)
    high = np.ceil(exact[:, 2:] - _SLACK)
    result: NDArray[np.int32] = np.clip(np.concatenate([low, high], axis=1), 0, sides).astype(
        np.int32
    )
    result[np.any(table[:, 2:] <= table[:, :2], axis=1)] = 0
    return result


def cells_of(pixels: int, scale: float, offset: float, size: int, cells: int) -> NDArray[np.int64]:
    """Where the pixels of a picture lie in a map of the network's square, along one axis.

    Args:
        pixels: Of the picture.
        scale: Network pixels per pixel, see `Geometry`.
        offset: Network pixels cut off in front.
        size: Side of the square, in network pixels.
        cells: Of the map.

    Returns:
        ``[pixels]``, the cell at the centre of each pixel; -1 beyond the square.
    """
    network = np.floor((np.arange(pixels) + 0.5) * scale - offset).astype(np.int64)
    return np.where((network >= 0) & (network < size), network * cells // size, -1)


def _numbers(geometries: Sequence[Geometry]) -> NDArray[np.float64]:
    """``[3, n, 4]`` scale, offset and side along x and y, for the corners (x, y, x, y)."""
    rows = [(g.scale_x, g.scale_y, g.offset_x, g.offset_y, g.width, g.height) for g in geometries]
    pairs = np.array(rows, np.float64).reshape(-1, 3, 2).transpose(1, 0, 2)
    return np.concatenate([pairs, pairs], axis=2)


def geometry(height: int, width: int, size: int, policy: Policy = "crop") -> Geometry:
    """How a picture of this size lands in a square.

    "crop": the shorter side becomes ``size`` and half of the longer side's excess is cut from each
    end. The excess is not rounded, as in the CASM authors' scoring; the pixels themselves are cut
    at the nearest whole pixel (see `casm_fast.data.transforms.resize`).

    Args:
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        size: Side of the square.
        policy: "crop" or "squash".

    Raises:
        ValueError: A side below 1, or another policy.
    """
    check_policy(policy)
    if min(height, width, size) < 1:
        raise ValueError(
            "geometry: expected `height`, `width` and `size` of at least 1, "
            f"got {height}, {width} and {size}"
        )
    if policy == "squash":
        return Geometry(size / height, size / width, 0.0, 0.0, height, width)
    scale = size / min(height, width)
    offset_y = 0.0 if height <= width else (height * scale - size) / 2
    offset_x = 0.0 if width <= height else (width * scale - size) / 2
    return Geometry(scale, scale, offset_y, offset_x, height, width)
