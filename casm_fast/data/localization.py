r"""How well a box or a saliency map lies on the true boxes, by the conventions of CASM.

Boxes are (x0, y0, x1, y1), half-open. A ground-truth box keeps the whole of its area even where it
lies outside the picture that the network saw, so what the crop cut off counts against the
prediction. With the saliency m and a true box B,

.. math::
    \mathrm{IoU} = \frac{|P \cap B|}{|P| + |B| - |P \cap B|}, \quad
    P = \frac{\sum_B m}{\sum m + 10^{-6}}, \quad
    R = \frac{\sum_B m}{|B|}, \quad
    F_1 = \frac{2 P R}{P + R + 10^{-6}}

(Zolna, Geras and Cho, "Classifier-agnostic saliency map extraction", section 6.3 and eq. 10; the
constants are their code's).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Boxes = NDArray[Any]
"""``[..., 4]``, any real type."""

THRESHOLD = 0.5
"""A box is right when its IoU is strictly greater than this."""

EPSILON = 1e-6
"""Keeps precision and F1 defined for an empty saliency map; the value of the CASM authors' code,
hence of the published F1.
"""


def area(boxes: Boxes) -> NDArray[np.float64]:
    """Pixels of each box, ``[..., 4]`` -> ``[...]``; 0 for an empty or inverted one."""
    table = np.asarray(boxes, np.float64)
    sides = np.clip(table[..., 2:] - table[..., :2], 0, None)
    return np.asarray(sides[..., 0] * sides[..., 1])


def shared_area(first: Boxes, second: Boxes) -> NDArray[np.float64]:
    """Pixels that boxes have in common in pairs; the shapes broadcast.

    Args:
        first: ``[..., 4]``.
        second: ``[..., 4]``.

    Returns:
        ``[...]``.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    return area(np.concatenate([low, high], axis=-1))


def box_iou(first: Boxes, second: Boxes) -> NDArray[np.float64]:
    """Intersection over union of boxes in pairs; the shapes broadcast.

    Args:
        first: ``[..., 4]``.
        second: ``[..., 4]``.

    Returns:
        ``[...]`` in [0, 1]; 0 where both boxes are empty.
    """
    shared = shared_area(first, second)
    union = area(first) + area(second) - shared
    return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)


def iou(predicted: Boxes, truth: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """The best overlap of each image's predicted box with one of its ground-truth boxes.

    Args:
        predicted: ``[n, 4]``, one box an image, in the coordinates of ``truth``.
        truth: n arrays ``[m, 4]``; an image without boxes gets NaN.

    Returns:
        ``[n]`` in [0, 1] or NaN.

    Raises:
        ValueError: The two do not describe the same number of images.
    """
    table = np.asarray(predicted).reshape(-1, 4)
    if len(table) != len(truth):
        raise ValueError(
            f"iou: expected `truth` for {len(table)} predicted boxes, got {len(truth)} lists"
        )
    flat, owners = pair(truth)
    return best(box_iou(table[owners], flat), owners, len(table))


def pair(truth: Sequence[ArrayLike]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Lists of boxes as one, so that one call compares all of them.

    Args:
        truth: n arrays ``[m, 4]``; any may be empty.

    Returns:
        The boxes ``[N, 4]`` in order, and the image ``[N]`` that each belongs to.
    """
    tables = [np.asarray(boxes).reshape(-1, 4) for boxes in truth]
    owners = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    return np.concatenate(tables) if tables else np.zeros((0, 4)), owners


def best(scores: NDArray[Any], owners: NDArray[np.int64], images: int) -> NDArray[np.float64]:
    """The highest score of each image over its true boxes; NaN for an image without any.

    Args:
        scores: ``[N]``, one per true box.
        owners: ``[N]`` from `pair`.
        images: Number of images.

    Returns:
        ``[images]``.
    """
    highest = np.full(images, np.nan)
    np.fmax.at(highest, owners, scores)
    return highest


def mean(scores: NDArray[Any], owners: NDArray[np.int64], images: int) -> NDArray[np.float64]:
    """The mean score of each image over its true boxes; NaN for an image without any.

    Args:
        scores: ``[N]``, one per true box.
        owners: ``[N]`` from `pair`.
        images: Number of images.

    Returns:
        ``[images]``.
    """
    counts = np.bincount(owners, minlength=images)
    means = np.full(images, np.nan)
    np.divide(np.bincount(owners, scores, minlength=images), counts, out=means, where=counts > 0)
    return means


def f1(inside: NDArray[Any], total: NDArray[Any], truth_area: NDArray[Any]) -> NDArray[np.float64]:
    """Continuous F1 of saliency maps against true boxes; 0 where the box holds no saliency.

    Args:
        inside: ``[n]`` sum of the saliency over the pixels of the true box.
        total: ``[n]`` sum of the saliency over the image.
        truth_area: ``[n]`` area of the true box, the part beyond the image included.

    Returns:
        ``[n]`` in [0, 1].
    """
    held, whole = np.asarray(inside, np.float64), np.asarray(truth_area, np.float64)
    precision = held / (np.asarray(total, np.float64) + EPSILON)
    recall = np.divide(held, whole, out=np.zeros_like(held), where=whole > 0)
    return np.asarray(2 * precision * recall / (precision + recall + EPSILON))


def f1_of_boxes(boxes: Boxes, truth: Boxes) -> NDArray[np.float64]:
    """Continuous F1 of a saliency map that is 1 inside a box and 0 elsewhere.

    Args:
        boxes: ``[n, 4]`` predictions, inside the image.
        truth: ``[n, 4]`` true boxes, not clipped to the image.

    Returns:
        ``[n]`` in [0, 1].
    """
    return f1(shared_area(boxes, truth), area(boxes), area(truth))


def localisation_error(overlap: NDArray[Any], threshold: float = THRESHOLD) -> float:
    """LE: the share of images whose best overlap does not exceed the threshold.

    Args:
        overlap: ``[n]`` from `iou`, at least one image; NaN counts as not found.
        threshold: An image counts as found when its overlap is strictly greater.

    Raises:
        ValueError: No image.
    """
    if not len(overlap):
        raise ValueError("localisation_error: expected at least one image, got none")
    return float(np.mean(~(np.asarray(overlap) > threshold)))


def centred_box(size: int) -> NDArray[np.int32]:
    """The baseline that knows nothing: the middle of the square.

    A margin of 33 pixels of 224 on every side leaves half of the area (the CASM authors' "center").

    Args:
        size: Side of the square in pixels.

    Returns:
        ``[4]`` int32.
    """
    margin = round(size * 33 / 224)
    return np.array([margin, margin, size - margin, size - margin], np.int32)
