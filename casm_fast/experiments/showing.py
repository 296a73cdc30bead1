"""Pictures of the supplement's experiments: images with their true boxes, and maps over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.attribution import shade
from casm_fast.attribution.figure import visible
from casm_fast.data.source import ImageSource
from casm_fast.experiments.examining import Examples, examples
from casm_fast.experiments.findings import Line
from casm_fast.experiments.study import Study
from casm_fast.models.classifier import Classifier
from casm_fast.perturbation import overlay
from casm_fast.report.pictures import enlarge

SEED = 2017
"""Of the images that are drawn at random, as the supplement's are; its own are not published."""

LEAST = 160
"""Pixels of a picture: those of small images are repeated."""

Picture = NDArray[np.uint8]


def drawn(study: Study, count: int, source: ImageSource | None = None) -> list[int]:
    """Places of random validation images, in order, always the same ones of a set."""
    images = source or study.validation
    limit = study.limit if source is None else len(images)
    chosen = np.random.default_rng(SEED).permutation(limit)[:count]
    return sorted(int(one) for one in chosen)


def load(
    study: Study, classifier: Classifier, indices: Sequence[int], source: ImageSource | None = None
) -> Examples:
    """A few images as one batch.

    Raises:
        ValueError: None of them can be read.
    """
    images = source or study.validation
    batches = list(examples(study, classifier, images, indices))
    if not batches:
        raise ValueError(
            f"{study.name}: expected readable images, got none of {len(indices)} in {images.name}"
        )
    if len(batches) > 1:
        raise ValueError(f"expected images for one batch, got {len(indices)}")
    return batches[0]


def originals(some: Examples, classifier: Classifier, boxes: bool = True) -> list[Picture]:
    """What the network saw, with the true boxes."""
    from PIL import Image, ImageDraw

    made = []
    for place, seen in enumerate(visible(some.images, classifier.mean, classifier.std)):
        large = _large((255 * seen).round().astype(np.uint8))
        if boxes:
            scale = len(large) / len(seen)
            picture = Image.fromarray(large)
            pen = ImageDraw.Draw(picture)
            for box in some.geometries[place].to_network(some.boxes(place)) * scale:
                x0, y0, x1, y1 = (float(side) for side in box)
                pen.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline="white", width=2)
            large = np.asarray(picture)
        made.append(large)
    return made


def heat(
    some: Examples, classifier: Classifier, maps: Tensor, stretch: bool = True
) -> list[Picture]:
    """Maps as colour over the images.

    Args:
        some: The images.
        classifier: Gives their normalisation.
        maps: ``[B, 1, S, S]``.
        stretch: Whether each map runs from its least to its highest value; else it is in [0, 1].
    """
    shown = overlay(some.images, shade(maps) if stretch else maps, classifier.mean, classifier.std)
    return [_large(one) for one in shown]


def seen(images: Tensor, classifier: Classifier) -> list[Picture]:
    """Normalised images, such as perturbed ones, as pictures."""
    values = visible(images, classifier.mean, classifier.std).clip(0, 1)
    return [_large((255 * one).round().astype(np.uint8)) for one in values]


def ids(some: Examples) -> list[str]:
    """Of the images."""
    return [some.source.image_id(index) for index in some.indices]


def inside(some: Examples, maps: Tensor) -> list[float]:
    """The share of each map's mass inside the true boxes: 1 is a map that marks nothing else.

    Args:
        some: The images.
        maps: ``[B, 1, S, S]``, not negative.

    Returns:
        NaN for an image without boxes or mass.
    """
    values = maps[:, 0].double().cpu().numpy()
    shares = []
    for place, plane in enumerate(values):
        held = np.zeros(plane.shape, bool)
        H, W = plane.shape
        for box in some.geometries[place].to_network(some.boxes(place)):
            x0, y0, x1, y1 = box.clip(0, [W, H, W, H])
            held[y0:y1, x0:x1] = True
        mass = float(plane.sum())
        shares.append(float(plane[held].sum()) / mass if mass > 0 and held.any() else float("nan"))
    return shares


def mean(values: Iterable[float]) -> float | None:
    """The mean of what is a number; None of nothing."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else None


def first_line(some: Examples, classifier: Classifier) -> Line:
    """The row of the images themselves."""
    say = "what the network sees, and the true boxes"
    return Line("Original", "", say, originals(some, classifier))


def _large(picture: Picture) -> Picture:
    return np.asarray(enlarge(picture, max(1, -(-LEAST // len(picture)))), np.uint8)
