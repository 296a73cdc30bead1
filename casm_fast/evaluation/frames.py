"""Saliency maps as protocols take them, and where their points lie in the original picture.

A pixel's place is that of its centre, counted from 0: the first pixel of a row lies at x = 0, and a
row of w pixels reaches from -0.5 to w - 0.5. Boxes keep the half-open corners of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.data.geometry import Geometry

Maps = Tensor | NDArray[Any]
"""``[B, 1, h, w]`` or ``[B, h, w]``, real numbers."""


def as_maps(maps: Maps) -> Tensor:
    """Maps ``[B, h, w]`` in float32 or float64, where they are.

    Raises:
        TypeError: Something else than a tensor or an array.
        ValueError: Another shape, or a number that is not finite.
    """
    if isinstance(maps, np.ndarray):
        # An array in a file that is open for reading may not be lent to torch: it is read.
        own = np.require(maps, requirements=["C", "W"])
        maps = torch.from_numpy(own)
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps: expected a tensor or an array, got {type(maps).__name__}")
    found = maps.detach()
    if found.dim() == 4 and found.shape[1] == 1:
        found = found[:, 0]
    if found.dim() != 3 or 0 in found.shape[1:]:
        raise ValueError(f"maps: expected shape [B, 1, h, w] or [B, h, w], got {list(maps.shape)}")
    if found.dtype != torch.float64:
        found = found.float()
    flat = found.flatten(1)
    # NaN and infinity show in the extremes, which take no memory of their own.
    extremes = torch.stack([flat.amin(dim=1), flat.amax(dim=1)])
    bad = torch.nonzero(~extremes.isfinite().all(dim=0))[:, 0].tolist()
    if bad:
        raise ValueError(f"maps: expected finite values, got NaN or infinity in map {bad[0]}")
    return found


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
