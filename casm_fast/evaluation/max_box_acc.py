r"""MaxBoxAcc: the share of images whose object some threshold of the map finds.

Choe et al., "Evaluating weakly supervised object localization methods right", CVPR 2020 and its
evaluation code. A map in [0, 1] becomes 8 bits, ``trunc(255 m)``; for each threshold t its pixels
above ``trunc(t * max)`` are kept, and contours are found in them (`casm_fast.ops.contour_boxes`).

V1 takes the box of the contour with the largest area and asks for an IoU of at least 0.5 with some
true box. V2 takes the boxes of all contours, asks for an IoU of at least delta of any of them with
any true box, and averages over delta = 0.3, 0.5 and 0.7. Either takes the threshold that is best
for the whole set (V2: one for each delta), so it asks for the right one by looking at the answers:

.. math::
    \mathrm{BoxAcc}(\tau, \delta) = \frac{1}{N} \sum_n 1[\mathrm{IoU}_n(\tau) \ge \delta], \quad
    \mathrm{MaxBoxAcc}(\delta) = \max_\tau \mathrm{BoxAcc}(\tau, \delta)

A map has at most 256 levels, all of which are scored in one sweep, where the public code searches
contours once for each of 1,000 thresholds.

Intervals take the best threshold of every draw anew. Thresholds that hardly ever could be it are
not looked at: in n images, one that finds d images less than the best of the whole set is the
better one in a draw with a chance of at most ``exp(-d**2 / (2 n))`` (Hoeffding 1963), and where
that is below 1e-20 it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from casm_fast import ops
from casm_fast.data import localization
from casm_fast.evaluation import published
from casm_fast.evaluation.intervals import Floats
from casm_fast.evaluation.maps import Maps, check_maps, parts, scores
from casm_fast.evaluation.result import Result
from casm_fast.evaluation.truth import best_of, check_truth
from casm_fast.ops.contour_boxes import LEVELS

Version = Literal[1, 2]

DELTAS: dict[int, tuple[float, ...]] = {1: (0.5,), 2: (0.3, 0.5, 0.7)}
"""IoU that counts as found, by version."""

THRESHOLDS = np.arange(0, 1, 0.001)
"""The thresholds of the public code's main program."""


_NEVER = 46  # exp(-46) is 1e-20
_IMAGES = 256  # whose overlaps are looked up at once: 2 MB for 1,000 thresholds


@dataclass(frozen=True)
class MaxBoxAcc(Result):
    """What `max_box_acc` found.

    Attributes:
        score: MaxBoxAcc, in [0, 1].
        deltas: IoU that counts as found.
        thresholds: ``[T]``, shares of a map's maximum.
        curve: ``[len(deltas), T]``: share of images found, for every threshold.
        best: The threshold with the highest share, for each delta; the first among equals.
        overlap: ``[n]`` IoU at the threshold that is best for delta = 0.5.
        found: ``[n]`` whether it is at least 0.5: the object of a known class (GT-known) is found.
        rivals: Thresholds that may be the best in a draw, for each delta: the columns of `terms`.
    """

    score: float
    deltas: tuple[float, ...]
    thresholds: NDArray[np.float64]
    curve: NDArray[np.float64]
    best: tuple[float, ...]
    overlap: NDArray[np.float64]
    found: NDArray[np.bool_]
    rivals: tuple[int, ...]

    def sums_to_figures(self, sums: Floats, images: int) -> Floats:
        """The best share for each delta, and their mean first where there are several."""
        deltas = np.split(sums, np.cumsum(self.rivals)[:-1], axis=1)
        best = np.stack([each.max(axis=1) for each in deltas], axis=1) / max(images, 1)
        if len(self.rivals) == 1:
            return best
        return np.concatenate([best.mean(axis=1, keepdims=True), best], axis=1)


def max_box_acc(
    maps: Maps,
    truth: Sequence[ArrayLike],
    sizes: ArrayLike | None = None,
    *,
    version: Version = 2,
    thresholds: ArrayLike | None = None,
    normalise: bool = False,
    source: str = "",
) -> MaxBoxAcc:
    """MaxBoxAcc of saliency maps.

    Args:
        maps: ``[n, 1, h, w]`` or ``[n, h, w]`` in [0, 1], of pictures squashed to h x w; uint8 is
            taken as the 8 bits themselves.
        truth: n arrays ``[m, 4]`` of true boxes (x0, y0, x1, y1), both ends included: in pixels of
            the original pictures when `sizes` is given, else in those of the maps.
        sizes: ``[n, 2]`` (H, W) of the original pictures. Boxes are squashed with them, each
            coordinate truncated to a whole number.
        version: 1 or 2.
        thresholds: ``[T]`` in [0, 1); 0, 0.001, ... 0.999 when omitted. A single one, such as 0.2,
            gives the accuracy at a fixed threshold.
        normalise: Stretch each map from 0 to 1 first, as the public code does with its own maps.
        source: Name of the images, such as "imagenet-val"; decides whether published figures stand
            beside these.

    Returns:
        The score, its curve, and the convention.

    Raises:
        TypeError: Maps of a wrong type.
        ValueError: Shapes that do not agree, maps or thresholds out of range, or an image without a
            true box.
    """
    if version not in DELTAS:
        raise ValueError(f"max_box_acc: expected `version` to be 1 or 2, got {version!r}")
    shares = np.asarray(THRESHOLDS if thresholds is None else thresholds, np.float64).reshape(-1)
    if not len(shares) or not ((shares >= 0) & (shares < 1)).all():
        raise ValueError("max_box_acc: expected `thresholds` in [0, 1), at least one")
    n, height, width = check_maps("max_box_acc", maps)
    boxes = _map_boxes(truth, n, sizes, height, width)
    overlap, highest = np.empty((n, LEVELS)), np.empty(n, np.int64)
    for here, part in parts(maps):
        levels = eight_bits(part, normalise)
        highest[here] = levels.amax((1, 2, 3)).numpy()
        overlap[here] = (_best_of_largest if version == 1 else _best_of_all)(levels, boxes[here])
    deltas = DELTAS[version]
    correct = np.zeros((len(deltas), len(shares)), np.int64)
    other = np.ones(correct.shape, bool)  # than the threshold before
    other[:, 1:] = False
    for hits, _ in _hits(overlap, highest, [shares] * len(deltas), deltas):
        correct += np.stack([np.count_nonzero(each, 0) for each in hits])
        other[:, 1:] |= np.stack([(each[:, 1:] != each[:, :-1]).any(0) for each in hits])
    curve = correct / n
    best = curve.argmax(1)
    score = float(np.average(curve.max(1)))
    middle = shares[best[deltas.index(0.5)], None]
    chosen = np.take_along_axis(overlap, _levels(middle, highest), 1)[:, 0]
    near = correct > correct.max(1, keepdims=True) - math.sqrt(2 * _NEVER * n)
    rivals = [shares[each] for each in near & other]
    terms = np.empty((n, sum(map(len, rivals))), bool)
    for hits, some in _hits(overlap, highest, rivals, deltas):
        np.concatenate(hits, axis=1, out=terms[some])
    figures = (score, *(float(high) for high in curve.max(1))) if version == 2 else (score,)
    heads = (f"MaxBoxAcc V{version}", *(f"IoU >= {d:g}" for d in deltas if version == 2))
    return MaxBoxAcc(
        protocol=f"MaxBoxAcc V{version}" + (f" on {source}" if source else ""),
        heads=heads,
        figures=figures,
        convention=_convention(version, n, (height, width), shares, normalise, shares[best]),
        score=score,
        deltas=deltas,
        thresholds=shares,
        curve=curve,
        best=tuple(float(value) for value in shares[best]),
        overlap=chosen,
        found=chosen >= 0.5,
        rivals=tuple(map(len, rivals)),
        terms=terms,
        published=published.choe(
            source, n, (height, width), f"MaxBoxAcc V{version}", thresholds is None
        ),
    )


def eight_bits(maps: Tensor, normalise: bool = False) -> Tensor:
    """Maps as the levels that contours are searched at: ``trunc(255 m)``, uint8, on the CPU.

    Args:
        maps: ``[n, 1, h, w]`` in [0, 1]; uint8 stays as it is, unless it is to be stretched.
        normalise: Stretch each map from 0 to 1 first.

    Returns:
        ``[n, 1, h, w]`` uint8.

    Raises:
        ValueError: A number that is not in [0, 1].
    """
    if maps.dtype == torch.uint8 and not normalise:
        return maps.cpu()
    return (scores("max_box_acc", maps, normalise) * 255).to(torch.uint8).cpu()


def _levels(shares: NDArray[np.float64], highest: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[n, T]`` the level of each threshold: ``trunc(t * max)``."""
    return (shares * highest[:, None]).astype(np.int64)


def _hits(
    overlap: NDArray[np.float64],
    highest: NDArray[np.int64],
    shares: Sequence[NDArray[np.float64]],
    deltas: Sequence[float],
) -> Iterator[tuple[list[NDArray[np.bool_]], slice]]:
    """Which images each threshold finds, ``[b, T]`` for each delta, a few images at a time."""
    for start in range(0, len(overlap), _IMAGES):
        some = slice(start, start + _IMAGES)
        yield (
            [
                np.take_along_axis(overlap[some], _levels(each, highest[some]), 1) >= delta
                for each, delta in zip(shares, deltas, strict=True)
            ],
            some,
        )


def _map_boxes(
    truth: Sequence[ArrayLike], images: int, sizes: ArrayLike | None, height: int, width: int
) -> list[NDArray[np.int64]]:
    """True boxes in pixels of the maps, both ends included."""
    boxes, pictures = check_truth("max_box_acc", truth, images, sizes)
    if pictures is not None:
        side = np.array([width, height] * 2, np.float64)
        boxes = [
            np.trunc(table * side / np.array([w, h] * 2))
            for table, (h, w) in zip(boxes, pictures, strict=True)
        ]
    whole = [table.astype(np.int64) for table in boxes]
    flat, owners = localization.pair(whole)
    wrong = np.flatnonzero((flat[:, 2:] < flat[:, :2]).any(1))
    if len(wrong):
        raise ValueError(
            f"max_box_acc: expected true boxes with x0 <= x1 and y0 <= y1, got "
            f"{tuple(flat[wrong[0]].tolist())} for image {owners[wrong[0]]}"
        )
    return whole


def _best_of_largest(levels: Tensor, truth: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """``[b, 256]`` best IoU of the largest contour's box, for every level."""
    height, width = levels.shape[2:]
    flat, owners = localization.pair(truth)
    boxes = ops.contour_boxes(levels).numpy().astype(np.int64)
    # Both ends included: the last pixel is x + w, or the last of the map.
    boxes[..., 2:] = np.minimum(boxes[..., 2:], [width - 1, height - 1]) + 1
    true = flat + np.array([0, 0, 1, 1])
    return best_of(localization.box_iou(boxes[owners], true[:, None]), owners)


def _best_of_all(levels: Tensor, truth: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """``[b, 256]`` best IoU of any contour's box, for every level."""
    flat, owners = localization.pair(truth)
    found: NDArray[np.float64] = ops.contour_overlap(
        levels, torch.from_numpy(flat.astype(np.int32)), torch.from_numpy(owners)
    ).numpy()
    return found


def _convention(
    version: int,
    images: int,
    shape: tuple[int, int],
    shares: NDArray[Any],
    normalise: bool,
    best: NDArray[Any],
) -> tuple[tuple[str, str], ...]:
    stretched = "each map stretched from 0 to 1, then " if normalise else ""
    largest, every = "the 8-connected contour with the largest area", "all contours, holes' too"
    wanted = ">= 0.5" if version == 1 else ">= 0.3, 0.5 and 0.7, the mean of the three"
    return (
        ("images", f"{images:,} counted, none left out"),
        ("geometry", f"squashed to {shape[1]} x {shape[0]}, true boxes truncated to whole pixels"),
        ("threshold", f"{stretched}8 bits, m > trunc(t * max), {len(shares):,} values of t"),
        (
            "chosen",
            f"t = {', '.join(f'{share:g}' for share in best)}, the best for the whole set: "
            "found by looking at the true boxes",
        ),
        ("box", f"(x, y, x + w, y + h) of {largest if version == 1 else every}, last pixel inside"),
        ("correct", f"IoU {wanted}, sides counted as x1 - x0 + 1, with any true box"),
        ("class", "known (GT-known)"),
    )
