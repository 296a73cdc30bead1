"""Saliency maps as every protocol takes them: tensors, arrays, and the files of other programs.

A protocol takes ``[n, 1, h, w]`` or ``[n, h, w]``, as a tensor on any device or as an array. Those
that stream over a data set read them a few at a time (`parts`): an array that lies in a file
(`read_maps` returns one for .npy) is never in memory as a whole. Those that are told one batch at a
time take it as it is (`as_maps`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Maps: TypeAlias = Tensor | NDArray[Any]
"""``[n, 1, h, w]`` or ``[n, h, w]``."""

_PIXELS = 1 << 22  # of a part: 84 maps of 224 x 224, 34 MB in float64
_SUFFIXES = (".npy", ".pt", ".pth")


def check_maps(protocol: str, maps: Maps) -> tuple[int, int, int]:
    """The number of maps and their size.

    Args:
        protocol: First word of the message.
        maps: What the user passed.

    Returns:
        ``(n, h, w)``.

    Raises:
        TypeError: Neither a tensor nor an array of floating or 8-bit numbers.
        ValueError: Another shape, or maps without pixels.
    """
    shape = _shape(protocol, maps)
    name = str(maps.dtype).removeprefix("torch.")
    if not (name.startswith(("float", "bfloat")) or name == "uint8"):
        raise TypeError(f"{protocol}: expected `maps` in a floating dtype or uint8, got {name}")
    return shape


def as_maps(protocol: str, maps: Maps) -> Tensor:
    """A batch of maps, where they are.

    Args:
        protocol: First word of the message.
        maps: What the user passed, in any dtype.

    Returns:
        ``[n, h, w]`` in float32 or float64, detached.

    Raises:
        TypeError: Neither a tensor nor an array.
        ValueError: Another shape, or a number that is not finite.
    """
    n, height, width = _shape(protocol, maps)
    found = _tensor(maps).reshape(n, height, width)
    if found.dtype != torch.float64:
        found = found.float()
    flat = found.flatten(1)
    # NaN and infinity show in the extremes, which take no memory of their own.
    extremes = torch.stack([flat.amin(dim=1), flat.amax(dim=1)])
    bad = torch.nonzero(~extremes.isfinite().all(dim=0))[:, 0].tolist()
    if bad:
        raise ValueError(f"{protocol}: expected finite `maps`, got NaN or infinity in map {bad[0]}")
    return found


def check_unit(maps: Tensor) -> None:
    """Raises ValueError unless all numbers are in [0, 1]."""
    if len(maps) and (maps.amin() < 0 or maps.amax() > 1):
        raise ValueError(
            f"maps: expected numbers in [0, 1], got {maps.amin():g} to {maps.amax():g}"
        )


def check_cells(maps: Tensor, size: tuple[int, int]) -> None:
    """Raises ValueError unless every cell of the maps covers whole pixels of images ``(H, W)``."""
    (H, W), (h, w) = size, maps.shape[-2:]
    if H % h or W % w:
        raise ValueError(f"maps: expected sides that divide {H} x {W}, got {h} x {w}")


def parts(maps: Maps, pixels: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """A few maps at a time.

    Args:
        maps: ``[n, 1, h, w]`` or ``[n, h, w]``, checked.
        pixels: Of a part, at most, but at least one map.

    Yields:
        Which they are, and the maps ``[b, 1, h, w]``, contiguous, where they were.
    """
    n, height, width = maps.shape[0], maps.shape[-2], maps.shape[-1]
    step = max(1, (pixels or _PIXELS) // (height * width))
    for start in range(0, n, step):
        here = slice(start, min(start + step, n))
        yield here, _tensor(maps[here]).reshape(-1, 1, height, width).contiguous()


def normalised(maps: Tensor) -> Tensor:
    """Each map from 0 to 1, by its minimum and maximum; a constant map becomes 0.

    Args:
        maps: ``[n, 1, h, w]``, floating.

    Returns:
        ``[n, 1, h, w]``, in the same dtype: ``m - min``, then divided by its maximum.
    """
    raised = maps - maps.amin((2, 3), keepdim=True)
    highest = raised.amax((2, 3), keepdim=True)
    return torch.where(highest > 0, raised / highest, 0)


def scores(protocol: str, maps: Tensor, normalise: bool) -> Tensor:
    """Maps as scores in [0, 1], in float64.

    Args:
        protocol: First word of the message.
        maps: ``[n, 1, h, w]``; uint8 counts from 0 to 255.
        normalise: Stretch each map to [0, 1] first.

    Returns:
        ``[n, 1, h, w]`` float64.

    Raises:
        ValueError: A number that is not in [0, 1]; NaN is not.
    """
    if maps.dtype == torch.uint8:
        maps = maps.double() / 255
    if normalise:
        maps = normalised(maps)
    if not bool(((maps >= 0) & (maps <= 1)).all()):
        raise ValueError(
            f"{protocol}: expected `maps` in [0, 1], got values from {float(maps.min()):.4g} to "
            f"{float(maps.max()):.4g}; pass normalise=True to stretch each map"
        )
    return maps.double()


def read_maps(path: str | Path, image_ids: Sequence[str] | None = None) -> Maps:
    """Reads saved maps.

    Args:
        path: A .npy file with an array ``[n, h, w]`` or ``[n, 1, h, w]``; a .pt file with such a
            tensor, or with a dictionary from image ids to maps; or a folder with a .npy or .pt file
            ``[h, w]`` or ``[1, h, w]`` for each image, ``<image id>.npy`` (the id with its own
            suffix or without: "val/1.JPEG" reads val/1.JPEG.npy, else val/1.npy).
        image_ids: The images in order; needed for a dictionary or a folder, whose maps are put in
            this order.

    Returns:
        The maps; those of a .npy file stay in the file until they are read.

    Raises:
        FileNotFoundError: There is no such file, or none for an image.
        ValueError: A file of another kind, maps of different sizes, or no `image_ids` where they
            are needed.
    """
    path = Path(path)
    if path.is_dir():
        ids = _needed(image_ids, path)
        return _stacked([_load(_file_of(path, name)) for name in ids], ids, path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected saved maps (.npy, .pt or a folder), got {path}: no such file"
        )
    content: Maps | Mapping[str, Any] = _load(path)
    if isinstance(content, Mapping):
        ids = _needed(image_ids, path)
        missing = [name for name in ids if name not in content]
        if missing:
            raise ValueError(
                f"{path}: expected a map for each of {len(ids)} images, got none for {missing[0]} "
                f"({len(missing)} missing)"
            )
        return _stacked([content[name] for name in ids], ids, path)
    return content


def _shape(protocol: str, maps: Maps) -> tuple[int, int, int]:
    if not isinstance(maps, (Tensor, np.ndarray)):
        raise TypeError(
            f"{protocol}: expected `maps` to be a tensor or an array, got {type(maps).__name__}"
        )
    shape = tuple(maps.shape)
    if not (len(shape) == 3 or (len(shape) == 4 and shape[1] == 1)) or 0 in shape[1:]:
        raise ValueError(
            f"{protocol}: expected `maps` of shape [n, 1, h, w] or [n, h, w], got {list(shape)}"
        )
    return shape[0], shape[-2], shape[-1]


def _tensor(maps: Maps) -> Tensor:
    """Maps as a tensor without a graph; an array is shared where it may be."""
    if isinstance(maps, Tensor):
        return maps.detach()
    # An array in a file that is open for reading may not be lent to torch: it is read.
    return torch.from_numpy(np.require(maps, requirements=["C", "W"]))


def _needed(image_ids: Sequence[str] | None, path: Path) -> Sequence[str]:
    if image_ids is None:
        raise ValueError(f"{path}: expected `image_ids` for maps that are saved by image, got None")
    return image_ids


def _file_of(folder: Path, image_id: str) -> Path:
    for stem in (folder / image_id, (folder / image_id).with_suffix("")):
        for suffix in _SUFFIXES:
            file = stem.with_name(stem.name + suffix)
            if file.is_file():
                return file
    raise FileNotFoundError(
        f"{folder}: expected a map for every image, got no {image_id}.npy or .pt"
    )


def _load(path: Path) -> Any:
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    if path.suffix in (".pt", ".pth"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, (Tensor, Mapping)):
            return content
        raise ValueError(
            f"{path}: expected a tensor or a dictionary from image ids to maps, "
            f"got {type(content).__name__}"
        )
    raise ValueError(f"{path}: expected a .npy or .pt file, or a folder of them")


def _stacked(maps: Sequence[Any], ids: Sequence[str], path: Path) -> NDArray[Any]:
    arrays = [np.asarray(one) for one in maps]
    arrays = [one[0] if one.ndim == 3 and len(one) == 1 else one for one in arrays]
    for array, name in zip(arrays, ids, strict=True):
        if array.ndim != 2 or array.shape != arrays[0].shape:
            raise ValueError(
                f"{path}: expected maps of one size [h, w], got {list(array.shape)} for {name} "
                f"and {list(arrays[0].shape)} for {ids[0]}"
            )
    return np.stack(arrays) if arrays else np.zeros((0, 1, 1))
