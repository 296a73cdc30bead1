r"""Weak localisation by the protocol of Fong and Vedaldi, ICCV 2017, section 5.3, and its code.

A heatmap ``[h, w]`` of a picture that was squashed to the network's square becomes a box in the
original picture ``[H, W]``:

1. Threshold. With the heatmap m and its mean, minimum and maximum, a pixel is kept where

   ``value``   m - min >= alpha * (max - min)
   ``mean``    m >= alpha * mean
   ``energy``  it is one of the highest pixels, as many as together have less than alpha * sum(m)

   and where it is larger than 0: the authors set the others to 0 and look for what is not.
2. Resize to the original size, nearest: pixel (y, x) shows cell (y * h // H, x * w // W).
3. The box is tight around *all* that survives, in no component in particular. Where nothing does,
   it is the whole picture.

Boxes count from 1 and include their last pixel, like those in the annotation files, so that a side
is ``x1 - x0 + 1``. A box is right when its IoU with some true box is at least 0.5. Images of the
ILSVRC list of bad annotations are left out (`read_blacklist`); alpha is chosen on held-out images
(`tune`).

Where the authors' code differs: of pixels that are equal to the last one that ``energy`` keeps it
keeps some by the whims of a sort, here all of them are kept. It resizes by ``scipy.misc.imresize``
(8 bits, bilinear): on 60 generated heatmaps of 224 x 224 its boxes were up to 1.7 cells wider on a
side, and IoUs differed by 0.002 to 0.02 on average. For a picture where nothing survives it takes
``[1, 1, H, W]``, with the sides exchanged.

The box of a thresholded map needs its rows' and columns' maxima alone: row y is in the box for the
levels up to the largest pixel of row y. So one pass over the pixels, and a sort for ``energy``,
serves every alpha at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from casm_fast.data import localization
from casm_fast.evaluation import published
from casm_fast.evaluation.maps import Maps, check_maps, parts
from casm_fast.evaluation.result import Result
from casm_fast.evaluation.truth import best_of, check_truth

Rule = Literal["value", "energy", "mean"]

GRIDS: dict[str, tuple[float, ...]] = {
    "value": tuple(k / 20 for k in range(20)),
    "energy": tuple(k / 20 for k in range(20)),
    "mean": tuple(k / 2 for k in range(21)),
}
"""The published grids of alpha: 0, 0.05, ... 0.95; for ``mean`` 0, 0.5, ... 10."""

RIGHT = 0.5
"""A box is right when its IoU is at least this."""

_THRESHOLDS = {
    "value": "m - min >= {} * (max - min)",
    "energy": "the highest m that have less than {} of the sum",
    "mean": "m >= {} * mean",
}
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class WeakLocalisation(Result):
    """What `weak_localisation` found.

    Attributes:
        error: Share of the counted images whose box is wrong, in [0, 1].
        boxes: ``[n, 4]`` int64 (x0, y0, x1, y1) in pixels of the original pictures, counted from 1,
            last pixel included.
        overlap: ``[n]`` best IoU with a true box.
        found: ``[n]`` whether it is at least 0.5.
        counted: ``[n]`` whether the image was counted.
    """

    error: float
    boxes: NDArray[np.int64]
    overlap: NDArray[np.float64]
    found: NDArray[np.bool_]
    counted: NDArray[np.bool_]


@dataclass(frozen=True)
class Tuning:
    """The alpha with the smallest error on held-out images.

    Attributes:
        rule: Threshold rule.
        alpha: The first with the smallest error.
        error: Its error, in [0, 1].
        alphas: ``[K]`` the grid.
        errors: ``[K]``.
        images: How many there were.
    """

    rule: str
    alpha: float
    error: float
    alphas: NDArray[np.float64]
    errors: NDArray[np.float64]
    images: int

    def __str__(self) -> str:
        return (
            f"rule {self.rule}: alpha {self.alpha:g} of {len(self.alphas)}, "
            f"error {100 * self.error:.1f} % on {self.images:,} held-out images"
        )


def weak_localisation(
    maps: Maps,
    truth: Sequence[ArrayLike],
    sizes: ArrayLike,
    *,
    rule: Rule = "mean",
    alpha: float = 1.0,
    excluded: ArrayLike | None = None,
    source: str = "",
) -> WeakLocalisation:
    """Localisation error of heatmaps by the protocol of Fong and Vedaldi.

    Args:
        maps: Heatmaps ``[n, 1, h, w]`` or ``[n, h, w]`` of squashed pictures, larger where the
            object is (1 - mask, for a mask that deletes by 0), usually 224 x 224.
        truth: n arrays ``[m, 4]`` of true boxes (x0, y0, x1, y1) in pixels of the original
            pictures, counted from 1, last pixel included: as they stand in the XML files.
        sizes: ``[n, 2]`` (H, W) of the original pictures.
        rule: ``value``, ``energy`` or ``mean``.
        alpha: Parameter of the rule.
        excluded: ``[n]`` images that are not counted, such as `read_blacklist` gives.
        source: Name of the images, such as "imagenet-val"; decides whether published figures stand
            beside these.

    Returns:
        The error, the boxes, and the convention.

    Raises:
        TypeError: Maps of a wrong type.
        ValueError: Shapes that do not agree, a wrong option, an image without a true box, or no
            image left.
    """
    counted = _counted("weak_localisation", len(maps), excluded)
    boxes = threshold_boxes(maps, sizes, rule=rule, alphas=(alpha,))[:, 0]
    true, _ = check_truth("weak_localisation", truth, len(boxes), sizes)
    overlap = overlaps(boxes[:, None], true)[:, 0]
    found = overlap >= RIGHT
    error = 1 - np.count_nonzero(found & counted) / np.count_nonzero(counted)
    n = int(counted.sum())
    out = f" ({len(counted) - n:,} on the list left out)" if n < len(counted) else ", none left out"
    _, height, width = check_maps("weak_localisation", maps)
    return WeakLocalisation(
        protocol="Weak localisation (Fong & Vedaldi 2017)" + (f" on {source}" if source else ""),
        heads=("error (less)",),
        figures=(error,),
        convention=(
            ("images", f"{n:,} of {len(counted):,} counted{out}"),
            ("geometry", f"squashed to {width} x {height}; boxes in the original pictures"),
            (
                "threshold",
                f"{_THRESHOLDS[rule].format(f'{alpha:g}')} (rule {rule}), m > 0; first, then "
                "resize (nearest; the authors: 8-bit bilinear)",
            ),
            ("box", "extent of all surviving pixels; whole picture where there are none"),
            ("correct", "IoU >= 0.5 with any true box, sides counted as x1 - x0 + 1"),
            ("class", "known: the heatmap is of the true class, or of no class"),
        ),
        error=error,
        boxes=boxes,
        overlap=overlap,
        found=found,
        counted=counted,
        published=published.weak_localisation(source, n, rule),
        terms=~found[counted, None],
    )


def tune(
    maps: Maps,
    truth: Sequence[ArrayLike],
    sizes: ArrayLike,
    *,
    rule: Rule = "mean",
    alphas: ArrayLike | None = None,
    excluded: ArrayLike | None = None,
) -> Tuning:
    """The alpha with the smallest error on held-out images, by the grid of the paper.

    Args:
        maps: As in `weak_localisation`, of images that are not tested on: 5,000 training images in
            the paper.
        truth: As in `weak_localisation`.
        sizes: As in `weak_localisation`.
        rule: ``value``, ``energy`` or ``mean``.
        alphas: ``[K]``; the published grid of the rule when omitted (`GRIDS`).
        excluded: As in `weak_localisation`.

    Returns:
        The alpha and the error curve.

    Raises:
        TypeError: Maps of a wrong type.
        ValueError: As in `weak_localisation`.
    """
    _check_rule("tune", rule)
    counted = _counted("tune", len(maps), excluded)
    grid = np.asarray(GRIDS[rule] if alphas is None else alphas, np.float64).reshape(-1)
    boxes = threshold_boxes(maps, sizes, rule=rule, alphas=grid)
    true, _ = check_truth("tune", truth, len(boxes), sizes)
    wrong = overlaps(boxes, true)[counted] < RIGHT
    errors = np.count_nonzero(wrong, 0) / len(wrong)
    best = int(errors.argmin())
    return Tuning(rule, float(grid[best]), float(errors[best]), grid, errors, len(wrong))


def threshold_boxes(
    maps: Maps, sizes: ArrayLike, *, rule: Rule, alphas: ArrayLike
) -> NDArray[np.int64]:
    """The boxes of heatmaps for several alphas at once.

    Args:
        maps: ``[n, 1, h, w]`` or ``[n, h, w]``.
        sizes: ``[n, 2]`` (H, W) of the original pictures.
        rule: ``value``, ``energy`` or ``mean``.
        alphas: ``[K]``, at least 0.

    Returns:
        ``[n, K, 4]`` int64 (x0, y0, x1, y1) in pixels of the original pictures, counted from 1,
        last pixel included.

    Raises:
        TypeError: Maps of a wrong type.
        ValueError: Shapes that do not agree, a wrong option, or NaN in a map.
    """
    _check_rule("threshold_boxes", rule)
    n, height, width = check_maps("threshold_boxes", maps)
    pictures = np.asarray(sizes, np.int64)
    if pictures.shape != (n, 2) or (pictures < 1).any():
        raise ValueError(
            f"threshold_boxes: expected `sizes` as positive (H, W) of shape [{n}, 2], "
            f"got {list(pictures.shape)}"
        )
    grid = np.asarray(alphas, np.float64).reshape(-1)
    if not (np.isfinite(grid) & (grid >= 0)).all():
        raise ValueError("threshold_boxes: expected `alphas` to be finite and at least 0")
    boxes = np.empty((n, len(grid), 4), np.int64)
    for here, part in parts(maps):
        heat = part[:, 0].double()
        if bool(heat.isnan().any()):
            raise ValueError("threshold_boxes: expected `maps` without NaN")
        zero, levels = _levels(heat.flatten(1), rule, torch.from_numpy(grid).to(heat.device))
        H, W = pictures[here].T
        seen_rows, seen_columns = _seen(H, height), _seen(W, width)
        shown = _shown(heat, seen_rows, seen_columns)
        y0, y1 = _extent(shown.amax(2), zero, levels)
        x0, x1 = _extent(shown.amax(1), zero, levels)
        # Cell c shows in the pixels from ceil(c * H / h) on, up to where the next one begins.
        found = np.stack(
            [
                -(-x0 * W[:, None] // width) + 1,
                -(-y0 * H[:, None] // height) + 1,
                -(-x1 * W[:, None] // width),
                -(-y1 * H[:, None] // height),
            ],
            axis=-1,
        )
        whole = np.stack([np.ones_like(W), np.ones_like(H), W, H], axis=-1)
        boxes[here] = np.where((x1 > x0)[..., None], found, whole[:, None])
    return boxes


def read_blacklist(path: str | Path, image_ids: Sequence[str]) -> NDArray[np.bool_]:
    """Which images are on a list, such as ILSVRC2014_clsloc_validation_blacklist.txt.

    Args:
        path: A text file with one entry a line, either an image id (with folder and suffix or
            without) or a number counted from 1. A number k means ``ILSVRC2012_val_<k in 8 digits>``
            where the ids have that form (the 1,762 numbers of ILSVRC 2014), else the k-th of the
            sorted ids. Empty lines and lines that begin with # are passed over.
        image_ids: n ids, with folder and suffix or without.

    Returns:
        ``[n]``, true for images on the list. An entry that is none of the images excludes nothing.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A number below 1, or above the number of images where ids have no numbers.
    """
    entries = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    entries = [entry for entry in entries if entry and not entry.startswith("#")]
    stems = [PurePath(name).stem for name in image_ids]
    matches = [_VALIDATION_NUMBER.fullmatch(stem) for stem in stems]
    numbers = {int(entry) for entry in entries if entry.isdecimal()}
    places = [int(match[1]) if match else 0 for match in matches]
    if not all(matches):
        order = np.argsort(np.asarray(image_ids))
        places = (np.argsort(order) + 1).tolist()
        beyond = sorted(number for number in numbers if number > len(places))
        if beyond:
            raise ValueError(
                f"{path}: expected numbers from 1 to {len(places)}, the images in order of their "
                f"ids, got {beyond[0]}"
            )
    if 0 in numbers:
        raise ValueError(f"{path}: expected numbers that count from 1, got 0")
    named = {PurePath(entry).stem for entry in entries if not entry.isdecimal()}
    return np.array(
        [place in numbers or stem in named for place, stem in zip(places, stems, strict=True)], bool
    )


def _check_rule(name: str, rule: str) -> None:
    if rule not in GRIDS:
        raise ValueError(f'{name}: expected `rule` to be "value", "energy" or "mean", got {rule!r}')


def _counted(name: str, images: int, excluded: ArrayLike | None) -> NDArray[np.bool_]:
    if excluded is None:
        return np.ones(images, bool)
    out = np.asarray(excluded, bool)
    if out.shape != (images,):
        raise ValueError(f"{name}: expected `excluded` of shape [{images}], got {list(out.shape)}")
    if images and out.all():
        raise ValueError(f"{name}: expected some images to be counted, got all of them excluded")
    return ~out


def _levels(heat: Tensor, rule: str, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """What each alpha keeps of heatmaps ``[n, h * w]``, float64: ``m - zero >= level``.

    Sums run along a map one by one, so that they do not depend on the batch.

    Returns:
        ``[n, 1]`` and ``[n, K]``; a level of infinity keeps nothing.
    """
    low, high = heat.amin(1, keepdim=True), heat.amax(1, keepdim=True)
    nothing = torch.zeros_like(low)
    if rule == "value":
        return low, alphas * (high - low)
    if rule == "mean":
        mean = heat.cumsum(1)[:, -1:] / heat.shape[1]
        # Rounding must not lift the mean of a constant map above the map.
        return nothing, alphas * mean.clamp(low, high)
    # NumPy's sort is several times as fast as torch's, which sorts indices too.
    rising = torch.from_numpy(np.sort(heat.cpu().numpy(), axis=1)).to(heat.device)
    ordered = rising.flip(1)
    held = ordered.cumsum(1)
    kept = torch.searchsorted(held, alphas * held[:, -1:])  # pixels whose sum stays below
    level = ordered.gather(1, (kept - 1).clamp(0, heat.shape[1] - 1))
    return nothing, torch.where(kept > 0, level, torch.inf)


def _seen(pixels: NDArray[np.int64], cells: int) -> NDArray[np.bool_] | None:
    """Which cells some pixel shows, ``[n, cells]``; None where all do: no axis shrinks."""
    if (pixels >= cells).all():
        return None
    edges = -(-np.arange(cells + 1) * pixels[:, None] // cells)
    seen: NDArray[np.bool_] = np.diff(edges, axis=1) > 0
    return seen


def _shown(
    heat: Tensor, rows: NDArray[np.bool_] | None, columns: NDArray[np.bool_] | None
) -> Tensor:
    """Heatmaps ``[n, h, w]`` with nothing in cells that resizing drops."""
    if rows is not None:
        heat = heat.where(torch.from_numpy(rows).to(heat.device)[:, :, None], 0)
    if columns is not None:
        heat = heat.where(torch.from_numpy(columns).to(heat.device)[:, None], 0)
    return heat


def _extent(
    highest: Tensor, zero: Tensor, levels: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First kept cell and the one behind the last, ``[n, K]`` each; equal where there is none.

    Args:
        highest: ``[n, h]`` largest pixel of each row or column.
        zero: ``[n, 1]``.
        levels: ``[n, K]``.
    """
    kept = ((highest - zero)[:, None] >= levels[..., None]) & (highest > 0)[:, None]
    cells = torch.arange(highest.shape[1], device=kept.device)
    first = torch.where(kept, cells, highest.shape[1]).amin(2)
    behind = torch.where(kept, cells + 1, 0).amax(2)
    some = behind > 0
    return (
        torch.where(some, first, 0).cpu().numpy(),
        torch.where(some, behind, 0).cpu().numpy(),
    )


def overlaps(boxes: NDArray[np.int64], truth: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """The best IoU of each box with a true box of its image.

    Args:
        boxes: ``[n, K, 4]`` of `threshold_boxes`.
        truth: n arrays ``[m, 4]``, counted from 1, last pixel included, none empty.

    Returns:
        ``[n, K]``.
    """
    flat, owners = localization.pair(truth)
    last = np.array([0, 0, 1, 1])
    return best_of(localization.box_iou(boxes[owners] + last, (flat + last)[:, None]), owners)
