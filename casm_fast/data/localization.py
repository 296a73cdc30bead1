r"""How well a box or a saliency map lies on the true boxes, by the conventions of CASM.

Boxes are ``(x0, y0, x1, y1)``, half-open, in the pixels of the network's square. A true box may
reach beyond the square (a centre crop cuts objects): its *whole* area counts, so what the crop
cut off is held against the prediction. With the saliency :math:`m` and a true box :math:`B`,

.. math::
    \mathrm{IoU} = \frac{|P \cap B|}{|P| + |B| - |P \cap B|}, \quad
    P = \frac{\sum_B m}{\sum m + 10^{-6}}, \quad
    R = \frac{\sum_B m}{|B|}, \quad
    F_1 = \frac{2 P R}{P + R + 10^{-6}}

(Zolna et al., Classifier-agnostic saliency map extraction, section 6.3 and eq. 10; the constants
are their code's).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.5
"""A localization is correct when its IoU is strictly greater than this."""

EPSILON = 1e-6
"""Keeps precision and F1 defined for an empty saliency map; the value of the CASM authors' code,
hence of the published F1.
"""


def areas(boxes: ArrayLike) -> NDArray[np.int64]:
    """Pixels in each box, 0 where a side is not positive.

    Args:
        boxes: ``[n, 4]``.

    Returns:
        ``[n]``.
    """
    corners = _boxes(boxes)
    sides = np.maximum(corners[:, 2:] - corners[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


def intersections(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.int64]:
    """Pixels that each box shares with its partner.

    Args:
        boxes: ``[n, 4]``.
        others: ``[n, 4]``.

    Returns:
        ``[n]``.
    """
    first, second = _boxes(boxes), _boxes(others)
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, 2:], second[:, 2:])
    return areas(np.concatenate([low, high], axis=1))


def iou(boxes: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of each predicted box with its true box; 0 where both are empty.

    Args:
        boxes: ``[n, 4]`` predictions, inside the image.
        truth: ``[n, 4]`` true boxes, not clipped to the image.

    Returns:
        ``[n]`` in [0, 1].
    """
    shared = intersections(boxes, truth)
    union = areas(boxes) + areas(truth) - shared
    return shared / np.maximum(union, 1)


def f1(inside: ArrayLike, total: ArrayLike, truth_area: ArrayLike) -> NDArray[np.float64]:
    """Continuous F1 of saliency maps against true boxes; 0 where the box holds no saliency.

    Args:
        inside: ``[n]`` sum of the saliency over the pixels of the true box.
        total: ``[n]`` sum of the saliency over the image.
        truth_area: ``[n]`` area of the true box, the part beyond the image included.

    Returns:
        ``[n]`` in [0, 1].
    """
    held = np.asarray(inside, np.float64)
    area = np.asarray(truth_area, np.float64)
    precision = held / (np.asarray(total, np.float64) + EPSILON)
    recall = np.divide(held, area, out=np.zeros_like(held), where=area > 0)
    return 2 * precision * recall / (precision + recall + EPSILON)


def f1_of_boxes(boxes: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """Continuous F1 of a saliency map that is 1 inside a box and 0 elsewhere.

    Args:
        boxes: ``[n, 4]`` predictions, inside the image.
        truth: ``[n, 4]`` true boxes, not clipped to the image.

    Returns:
        ``[n]`` in [0, 1].
    """
    return f1(intersections(boxes, truth), areas(boxes), areas(truth))


def pair(truth: Sequence[ArrayLike]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Flatten lists of true boxes, so that one vectorised call can compare all of them.

    Args:
        truth: One ``[k_i, 4]`` list per image; an image may have none.

    Returns:
        The boxes ``[N, 4]`` and the image ``[N]`` that each belongs to, in order.
    """
    lists = [_boxes(boxes) for boxes in truth]
    owners = np.repeat(np.arange(len(lists)), [len(boxes) for boxes in lists])
    flat = np.concatenate(lists) if lists else np.zeros((0, 4), np.int64)
    return flat, owners


def best(scores: ArrayLike, owners: NDArray[np.int64], images: int) -> NDArray[np.float64]:
    """Highest score of each image over its true boxes; NaN for an image without any.

    Args:
        scores: ``[N]`` one score per true box.
        owners: ``[N]`` from :func:`pair`.
        images: Number of images.

    Returns:
        ``[images]``.
    """
    highest = np.full(images, np.nan)
    np.fmax.at(highest, owners, np.asarray(scores, np.float64))
    return highest


def mean(scores: ArrayLike, owners: NDArray[np.int64], images: int) -> NDArray[np.float64]:
    """Mean score of each image over its true boxes; NaN for an image without any.

    Args:
        scores: ``[N]`` one score per true box.
        owners: ``[N]`` from :func:`pair`.
        images: Number of images.

    Returns:
        ``[images]``.
    """
    sums = np.bincount(owners, np.asarray(scores, np.float64), minlength=images)
    counts = np.bincount(owners, minlength=images)
    return np.divide(sums, counts, out=np.full(images, np.nan), where=counts > 0)


def best_iou(boxes: ArrayLike, truth: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Highest IoU of each image's box over that image's true boxes; NaN for an image without any.

    Args:
        boxes: ``[n, 4]`` one prediction per image, inside the image.
        truth: ``n`` lists ``[k_i, 4]`` of true boxes, not clipped to the image.

    Returns:
        ``[n]`` in [0, 1], or NaN.
    """
    predictions = _boxes(boxes)
    flat, owners = pair(truth)
    return best(iou(predictions[owners], flat), owners, len(predictions))


def _boxes(boxes: ArrayLike) -> NDArray[np.int64]:
    """``boxes`` as ``[n, 4]`` int64; an empty list is ``[0, 4]``."""
    corners = np.asarray(boxes, np.int64)
    if corners.size == 0:
        return corners.reshape(0, 4)
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(
            "expected boxes [n, 4] as (x0, y0, x1, y1), "
            f"got an array of shape {list(corners.shape)}"
        )
    return corners
