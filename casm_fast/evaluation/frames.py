"""Where the points of saliency maps lie in the original picture.

A pixel's place is that of its centre, counted from 0: the first pixel of a row lies at x = 0, and a
row of w pixels reaches from -0.5 to w - 0.5. Boxes keep the half-open corners of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.geometry import Geometry


def check_count(name: str, given: Sequence[Any] | NDArray[Any], count: int) -> None:
    """Raises ValueError unless there is one for each of `count` maps."""
    if len(given) != count:
        raise ValueError(f"{name}: expected one for each of {count} maps, got {len(given)}")


def scale_points(
    points: NDArray[np.float64], cells: tuple[int, int], size: tuple[int, int]
) -> NDArray[np.float64]:
    """Points of a map's cells in the pixels that the map stands for.

    Args:
        points: ``[n, 2]`` (x, y) in cells.
        cells: ``(h, w)`` of the map.
        size: ``(H, W)`` that it covers.

    Returns:
        ``[n, 2]`` (x, y) in pixels; the centre of a cell goes to the centre of what it covers.
    """
    factors = np.array([size[1] / cells[1], size[0] / cells[0]])
    return np.asarray((points + 0.5) * factors - 0.5)


def to_original(
    points: NDArray[np.float64], geometries: Sequence[Geometry], owners: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Points of the network's square in the original pictures, not rounded.

    Args:
        points: ``[n, 2]`` (x, y) in network pixels.
        geometries: Of every picture.
        owners: ``[n]``, the picture of each point.

    Returns:
        ``[n, 2]`` (x, y) in original pixels.
    """
    scales, offsets = _tables(geometries)
    return (points + 0.5 + offsets[owners]) / scales[owners] - 0.5


def to_network(
    points: NDArray[np.float64], geometries: Sequence[Geometry], owners: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The inverse of `to_original`."""
    scales, offsets = _tables(geometries)
    return (points + 0.5) * scales[owners] - offsets[owners] - 0.5


def side_of(geometry: Geometry) -> int:
    """The side of the network's square, in pixels."""
    return round(min(geometry.height * geometry.scale_y, geometry.width * geometry.scale_x))


def _tables(geometries: Sequence[Geometry]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    scales = np.array([(g.scale_x, g.scale_y) for g in geometries]).reshape(-1, 2)
    offsets = np.array([(g.offset_x, g.offset_y) for g in geometries]).reshape(-1, 2)
    return scales, offsets
