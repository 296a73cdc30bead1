r"""PxAP: the average precision of a map's pixels as a classifier of object pixels.

Choe et al., "Evaluating weakly supervised object localization methods right", CVPR 2020 and its
evaluation code: the scores of all pixels of all images are pooled, those of object and of
background pixels in histograms with the edges 0, 0.001, ... 0.999, 1, 2, 3; ignored pixels count in
neither. With precision and recall at the lower edge of each bin, from the highest to the lowest,

.. math::
    \mathrm{PxAP} = \sum_l P(\tau_l) \, (R(\tau_l) - R(\tau_{l-1}))

For the intervals every image's own histograms are kept, in 16 bits where a map has fewer than
65,536 pixels: 4 kB an image with these edges. A draw without object pixels has no PxAP and is
passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from casm_fast.evaluation import published
from casm_fast.evaluation.intervals import Floats
from casm_fast.evaluation.maps import Maps, check_maps, parts, scores
from casm_fast.evaluation.result import Result

IGNORED = 255
"""Value of a mask's pixels that count neither as object nor as background."""

THRESHOLDS = np.arange(0, 1, 0.001)
"""The thresholds of the public code's main program."""


_AT_ONCE = 1 << 17  # pixels: a megabyte in float64, which stays in the cache


@dataclass(frozen=True)
class PixelAP(Result):
    """What `pixel_ap` found.

    Attributes:
        score: PxAP, in [0, 1].
        thresholds: ``[T + 2]`` lower edges of the bins, the highest first.
        precision: ``[T + 2]`` of the pixels at or above each; NaN where there are none.
        recall: ``[T + 2]``.
    """

    score: float
    thresholds: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    def sums_to_figures(self, sums: Floats, images: int) -> Floats:
        """PxAP ``[R, 1]`` of summed histograms, NaN without object pixels."""
        precision, recall = _curve(sums)
        gained = np.nansum(precision[:, 1:] * np.diff(recall, axis=1), axis=1)
        return np.where(np.isnan(recall[:, -1]), np.nan, gained)[:, None]


def pixel_ap(
    maps: Maps,
    masks: Sequence[ArrayLike] | NDArray[np.integer[Any]] | Tensor,
    *,
    thresholds: ArrayLike | None = None,
    normalise: bool = False,
    source: str = "",
) -> PixelAP:
    """PxAP of saliency maps.

    Args:
        maps: ``[n, 1, h, w]`` or ``[n, h, w]`` in [0, 1], of pictures squashed to h x w.
        masks: n masks ``[h, w]``: 1 object, 0 background, 255 ignored (`object_mask` makes them).
        thresholds: ``[T]`` in [0, 1), rising; 0, 0.001, ... 0.999 when omitted. Scores below the
            first count nowhere.
        normalise: Stretch each map from 0 to 1 first, as the public code does with its own maps.
        source: Name of the images, such as "openimages-test"; decides whether published figures
            stand beside these.

    Returns:
        The score, its curve, and the convention.

    Raises:
        TypeError: Maps of a wrong type.
        ValueError: Shapes that do not agree, maps out of range, masks with other values, or no
            object pixel at all.
    """
    n, height, width = check_maps("pixel_ap", maps)
    shares = np.asarray(THRESHOLDS if thresholds is None else thresholds, np.float64).reshape(-1)
    if not len(shares) or not ((shares >= 0) & (shares < 1)).all() or (np.diff(shares) <= 0).any():
        raise ValueError("pixel_ap: expected `thresholds` in [0, 1), rising, at least one")
    if len(masks) != n:
        raise ValueError(f"pixel_ap: expected `masks` for {n} maps, got {len(masks)}")
    bins = len(shares) + 2  # and [1, 2) and [2, 3)
    narrow = np.uint16 if height * width < 1 << 16 else np.int64
    terms = np.empty((n, 2 * bins), narrow)
    for here, part in parts(maps, _AT_ONCE):
        kinds = _kinds(masks[here], here.start, (height, width))
        values = scores("pixel_ap", part, normalise).cpu().flatten()
        image = torch.arange(len(part)).repeat_interleave(height * width)
        # Background, object, ignored; each with the pixels below the first edge first.
        place = _bins(values, shares) + (3 * image + kinds) * (bins + 1)
        counts = torch.bincount(place, minlength=3 * len(part) * (bins + 1))
        kept = counts.numpy().reshape(len(part), 3, bins + 1)[:, :2, :0:-1]
        terms[here] = kept.reshape(len(part), 2 * bins)
    sums = terms.sum(0, dtype=np.int64)
    precision, recall = (each[0] for each in _curve(sums[None]))
    if np.isnan(recall[-1]):
        raise ValueError("pixel_ap: expected some object pixels in `masks`, got none")
    steps = precision[1:] * np.diff(recall)
    score = float(steps[~np.isnan(steps)].sum())
    return PixelAP(
        protocol="PxAP" + (f" on {source}" if source else ""),
        heads=("PxAP",),
        figures=(score,),
        convention=(
            ("images", f"{n:,} counted, none left out"),
            ("geometry", f"squashed to {width} x {height}"),
            ("pixels", f"{sums.sum():,} of all images pooled, ignored regions left out"),
            (
                "threshold",
                ("each map stretched from 0 to 1, then " if normalise else "")
                + f"m >= t, {len(shares):,} values of t",
            ),
            ("score", "sum of precision x gain of recall, no interpolation"),
            ("class", "known"),
        ),
        score=score,
        thresholds=np.append(shares, [1.0, 2.0])[::-1],
        precision=precision,
        recall=recall,
        terms=terms,
        published=published.choe(source, n, (height, width), "PxAP", thresholds is None),
    )


def object_mask(
    instances: ArrayLike, ignore: ArrayLike | None = None, size: int | None = None
) -> NDArray[np.uint8]:
    """One mask of an image from the masks of its objects and the region to ignore.

    Args:
        instances: ``[k, H, W]``, larger than 0.5 inside an object; objects are joined.
        ignore: ``[H, W]``, larger than 0.5 where pixels are to be ignored unless an object is
            there.
        size: Side of the square that each mask is squashed to, nearest: pixel y takes row ``y * H
            // size``. As it is when omitted.

    Returns:
        ``[size, size]`` (or ``[H, W]``) uint8: 1 object, 0 background, 255 ignored.

    Raises:
        ValueError: Masks of other shapes.
    """
    masks: NDArray[np.bool_] = np.asarray(np.asarray(instances) > 0.5)
    if masks.ndim != 3 or 0 in masks.shape:
        raise ValueError(
            f"object_mask: expected `instances` of shape [k, H, W], got {list(masks.shape)}"
        )
    joined = _squashed(np.asarray(masks.any(0)), size)
    result = joined.astype(np.uint8)
    if ignore is not None:
        ignored: NDArray[np.bool_] = np.asarray(np.asarray(ignore) > 0.5)
        if ignored.ndim != 2:
            raise ValueError(
                f"object_mask: expected `ignore` of shape [H, W], got {list(ignored.shape)}"
            )
        result[_squashed(ignored, size) & ~joined] = IGNORED
    return result


def _curve(sums: NDArray[Any]) -> tuple[Floats, Floats]:
    """Precision and recall of summed histograms ``[R, 2 * bins]``, the highest bin first.

    Returns:
        ``[R, bins]`` both; NaN where there are no pixels, or no object pixels.
    """
    false, true = np.moveaxis(sums.reshape(len(sums), 2, -1).cumsum(2), 1, 0)
    both, objects = true + false, np.broadcast_to(true[:, -1:], true.shape)
    precision, recall = (
        np.divide(true, all_of, out=np.full(true.shape, np.nan), where=all_of > 0)
        for all_of in (both, objects)
    )
    return precision, recall


def _squashed(mask: NDArray[np.bool_], size: int | None) -> NDArray[np.bool_]:
    if size is None:
        return mask
    rows, columns = (np.arange(size) * side // size for side in mask.shape)
    squashed: NDArray[np.bool_] = mask[rows[:, None], columns]
    return squashed


def _bins(values: Tensor, shares: NDArray[np.float64]) -> Tensor:
    """The bin of each value, counted from 1; 0 below the first edge.

    Edges at equal distances need no search: the bin is a quotient, off by one at most for rounding.
    """
    T = len(shares)
    step = float(shares[1]) if T > 1 else 1.0
    if not np.array_equal(shares, np.arange(T) * step):
        edges = np.append(shares, [1.0, 2.0, 3.0])
        return torch.bucketize(values, torch.from_numpy(edges), right=True)
    bins = (values / step).floor_()
    edge = bins * step
    bins -= (values < edge).double()
    bins += 1
    edge = bins * step
    bins += (values >= edge).double()
    return bins.clamp_(max=T).masked_fill_(values >= 1, T + 1).long()


def _kinds(
    masks: Sequence[ArrayLike] | NDArray[np.integer[Any]] | Tensor,
    first: int,
    shape: tuple[int, int],
) -> Tensor:
    """Masks as int64 ``[b * h * w]``: 0 background, 1 object, 2 ignored."""
    tables = [np.asarray(mask) for mask in masks]
    for image, table in enumerate(tables, first):
        if table.shape != shape:
            raise ValueError(
                f"pixel_ap: expected a mask of {list(shape)} for every map, got "
                f"{list(table.shape)} for image {image}"
            )
    kinds = torch.from_numpy(np.stack(tables))
    wrong = (kinds != 0) & (kinds != 1) & (kinds != IGNORED)
    if bool(wrong.any()):
        raise ValueError(
            "pixel_ap: expected masks with 1 for object, 0 for background and 255 for ignored "
            f"pixels, got {kinds[wrong][0].item()} in image {first + int(wrong.nonzero()[0, 0])}"
        )
    return kinds.flatten().long().clamp_(max=2)
