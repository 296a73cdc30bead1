"""Localisation together with classification: GT-known, top-1 and top-5 LOC.

A localisation protocol says of each image whether its box is right (``found`` of
`casm_fast.evaluation.localise`, `weak_localisation` or `max_box_acc`). GT-known is the share of
these; top-k LOC is the share of images where the true class is among the first k guesses as well
(Russakovsky et al. 2015, section 4.2, with the protocol's own idea of a right box).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from casm_fast.evaluation.result import Result


@dataclass(frozen=True)
class ClassLocalisation(Result):
    """What `class_localisation` found; shares in [0, 1], the more the better.

    Attributes:
        gt_known: Images whose box is right.
        top1: Images whose box and first guess are right.
        top5: Images whose box is right and whose class is among the first five guesses.
    """

    gt_known: float
    top1: float
    top5: float


def gt_known(found: ArrayLike) -> float:
    """The share of images whose box is right, the class being known.

    Args:
        found: ``[n]``.

    Raises:
        ValueError: No image, or another shape.
    """
    right = np.asarray(found, bool)
    if right.ndim != 1 or not len(right):
        raise ValueError(
            f"gt_known: expected `found` of shape [n] with n >= 1, got {list(right.shape)}"
        )
    return np.count_nonzero(right) / len(right)


def top_loc(found: ArrayLike, guesses: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Top-k LOC: the share of images where one of k guesses has the right class and a right box.

    Args:
        found: ``[n]`` whether the image's box is right; or ``[n, K]``, whether the box that belongs
            to each guess is.
        guesses: ``[n, K]`` classes, the most likely first; ``[n]`` for one guess.
        labels: ``[n]`` true classes.
        k: Guesses that count, 1 to K.

    Raises:
        ValueError: Shapes that do not agree, no image, or a `k` out of range.
    """
    right, classes = _agreeing(found, guesses, labels)
    if not 1 <= k <= classes.shape[1]:
        raise ValueError(f"top_loc: expected `k` from 1 to {classes.shape[1]}, got {k}")
    return np.count_nonzero((right & classes)[:, :k].any(1)) / len(classes)


def class_localisation(
    found: ArrayLike, guesses: ArrayLike, labels: ArrayLike, *, box: str = "as the protocol says"
) -> ClassLocalisation:
    """GT-known, top-1 and top-5 LOC of one set of boxes.

    Args:
        found: ``[n]`` whether the image's box is right.
        guesses: ``[n, K]`` classes, the most likely first, K >= 5 (or all there are).
        labels: ``[n]`` true classes.
        box: What a right box is, for the printed convention.

    Returns:
        The three figures, and the convention.

    Raises:
        ValueError: Shapes that do not agree, or no image.
    """
    gt_known(found)
    right, classes = _agreeing(found, guesses, labels)
    terms = np.concatenate(
        [right, *((right & classes[:, :k]).any(1, keepdims=True) for k in (1, 5))], axis=1
    )
    figures = tuple(map(float, np.count_nonzero(terms, 0) / len(terms)))
    return ClassLocalisation(
        protocol="Localisation and classification",
        heads=("GT-known", "top-1 LOC", "top-5 LOC"),
        figures=figures,
        convention=(
            ("images", f"{len(np.asarray(labels)):,} counted"),
            ("box", box),
            (
                "correct",
                "the box is right; for top-k, the class is among the first k guesses too",
            ),
        ),
        terms=terms,
        gt_known=figures[0],
        top1=figures[1],
        top5=figures[2],
    )


def _agreeing(
    found: ArrayLike, guesses: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which boxes and which guesses are right, ``[n, 1]`` or ``[n, K]``, and ``[n, K]``."""
    right, classes, true = np.asarray(found, bool), np.asarray(guesses), np.asarray(labels)
    right = right[:, None] if right.ndim == 1 else right
    classes = classes[:, None] if classes.ndim == 1 else classes
    n = len(true) if true.ndim == 1 else 0
    if not n or len(right) != n or len(classes) != n or right.shape[1] not in (1, classes.shape[1]):
        raise ValueError(
            "top_loc: expected `found` [n] or [n, K], `guesses` [n, K] and `labels` [n] with "
            f"n >= 1, got {list(np.shape(found))}, {list(np.shape(guesses))} and "
            f"{list(np.shape(labels))}"
        )
    return right, classes == true[:, None]
