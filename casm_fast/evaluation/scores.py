"""Scores of a table of predicted boxes, with the convention that they were computed by.

Every mean is taken with :func:`math.fsum`, so that the order of the rows changes no digit.
"""

from __future__ import annotations

import dataclasses
import json as json_module
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from casm_fast.data import localization, predictions
from casm_fast.data.predictions import Convention, Description
from casm_fast.evaluation import baselines, published
from casm_fast.evaluation.intervals import HasIntervals, Interval, bootstrap_means
from casm_fast.evaluation.printing import convention_lines, render
from casm_fast.evaluation.published import Published

if TYPE_CHECKING:
    import pyarrow as pa


class HasTable(Protocol):
    """Anything that holds a table of predictions, such as the result of ``casm_fast.extract``."""

    @property
    def table(self) -> pa.Table:
        """The rows, with their description in the metadata."""


PerImage = Mapping[str, NDArray[np.float64]]
"""What every image gave, by the name of the score whose mean it enters."""


@dataclass(frozen=True)
class Localisation(HasIntervals):
    """How well one box per image finds the object; shares in [0, 1].

    Attributes:
        name: The method.
        le: Localisation error: share of images whose box has an IoU of at most 0.5 with every
            true box.
        om: Official metric with one guess: share of images whose box *or* predicted class is
            wrong; None without labels.
        f1: Continuous F1 of the saliency map, best over the true boxes, mean over the images.
        f1_mean: The same, mean over the true boxes.
        iou: Mean over the images of the best IoU.
        coverage: Mean share of the network's square that the box covers.
        per_image: ``[n]`` by the names above.
    """

    name: str
    le: float
    om: float | None
    f1: float
    f1_mean: float
    iou: float
    coverage: float
    per_image: PerImage = field(repr=False, compare=False)

    def bootstrap(self, **told: Any) -> dict[str, Interval]:
        """Every score with its interval, by the names above."""
        return bootstrap_means(self.per_image, **told)


@dataclass(frozen=True)
class Saliency:
    """Statistics of the saliency maps at the network's resolution, means over the images.

    Attributes:
        mean: Mean saliency, the masked volume.
        std: Standard deviation of the masked volume over the images (unbiased); None for fewer
            than two.
        tv: Total variation, the sum of squared differences per image (the scale of the CASM paper).
        tv_mean: The same as mean squared horizontal plus mean squared vertical difference (the
            scale of its code).
        entropy: Mean of ``-m log2 m``, in bits: one-sided, comparable with the paper's 0.05 and
            0.21.
        entropy_full: Mean of ``-m log2 m - (1 - m) log2(1 - m)``, in bits.
    """

    mean: float
    std: float | None
    tv: float
    tv_mean: float
    entropy: float
    entropy_full: float


@dataclass(frozen=True)
class Counts:
    """Which images were counted.

    Attributes:
        images: Rows of the table.
        localized: Images with at least one true box: LE, OM, F1 and the baselines are over these.
        labelled: Images with a known label: top-1 and top-5 are over these.
        unreadable: Images that could not be decoded, counted nowhere.
    """

    images: int
    localized: int
    labelled: int
    unreadable: int


@dataclass(frozen=True)
class Scores(HasIntervals):
    """What :func:`evaluate` found. ``str(scores)`` is the printed table.

    Attributes:
        source: Canonical name of the images.
        localisation: Scores of the model; None when no image has a true box.
        baselines: Scores of the centred box, the whole image and a random box on the same images.
        top1: Share of images whose predicted class is right; None without labels.
        top5: Share of images whose label is among the five most likely classes; None without
            labels.
        saliency: Statistics of the saliency maps.
        counts: Which images were counted.
        convention: Geometry and box rule.
        published: Published results by the same convention on the same images; mostly empty.
        per_image: Besides those of the localisation: ``[n]`` by the names of the scores.
    """

    source: str
    localisation: Localisation | None
    baselines: tuple[Localisation, ...]
    top1: float | None
    top5: float | None
    saliency: Saliency
    counts: Counts
    convention: Convention
    published: tuple[Published, ...]
    per_image: PerImage = field(repr=False, compare=False)

    def __str__(self) -> str:
        return render(self)

    def bootstrap(self, **told: Any) -> dict[str, Interval]:
        """Every score with its interval, by the names of the fields.

        Those of `localisation` (le, om, f1, f1_mean, iou, coverage), top1, top5, and those of
        `saliency` (mean, tv, tv_mean, entropy, entropy_full, std), as far as they are known. The
        order of the rows changes none.
        """
        found = {} if self.localisation is None else dict(self.localisation.per_image)
        spread = {} if self.saliency.std is None else {"std": self.per_image["mean"]}
        return bootstrap_means({**found, **self.per_image}, spread, **told)

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain dictionaries, lists and numbers, the convention in words included."""
        return {
            **dataclasses.asdict(self, dict_factory=_without_images),
            "explained": convention_lines(self),
            "intervals": {name: dataclasses.asdict(each) for name, each in self.intervals.items()},
        }

    def save(self, path: str | Path) -> Path:
        """Write the scores as JSON, whole or not at all.

        Args:
            path: The file; folders are made.

        Returns:
            ``path``.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json_module.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return path


def evaluate(source: str | Path | pa.Table | HasTable, *, json: str | Path | None = None) -> Scores:
    """Score predicted boxes and saliency maps against the true boxes and labels in their table.

    A box is correct when its IoU with some true box of the image is strictly greater than 0.5;
    the area of a true box counts in full where the crop cut it; all images with a true box are
    counted, none is blacklisted.

    Args:
        source: A Parquet file from ``casm_fast.extract``, its table, or the extraction itself.
        json: File to write the scores to, as well.

    Returns:
        The scores, the baselines on the same images, and the convention.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a table of predictions, or holds no readable image.
    """
    if isinstance(source, (str, Path)):
        table, description = predictions.read(source)
    else:
        table = source.table if hasattr(source, "table") else source
        description = predictions.description_of(table)
    scores = score(table, description)
    if json is not None:
        scores.save(json)
    return scores


def score(table: pa.Table, description: Description) -> Scores:
    """Score a table whose description is already at hand; see :func:`evaluate`."""
    import pyarrow.compute as pc

    size = description.convention.size
    readable = table.filter(pc.is_null(table["error"])).sort_by("image_id")
    if len(readable) == 0:
        raise ValueError(
            "nothing to score: expected at least one readable image, "
            f"got {len(table)} rows, all of them errors"
        )

    label = _integers(readable, "label")
    top5 = readable["top5"].to_pylist()
    right = label == _integers(readable, "predicted")
    among5 = np.array([y in guesses for y, guesses in zip(label, top5, strict=True)], bool)
    labelled = label >= 0

    truth = [boxes or [] for boxes in readable["gt_net_boxes"].to_pylist()]
    localized = np.array([len(boxes) > 0 for boxes in truth], bool)
    truth = [np.array(boxes) for boxes in truth if boxes]
    ids = [
        name
        for name, counts in zip(readable["image_id"].to_pylist(), localized, strict=True)
        if counts
    ]
    right_where_known = right[localized] if bool(np.all(labelled[localized])) else None

    model = None
    if truth:
        model = score_boxes(
            "this model",
            _corners(readable)[localized],
            truth,
            size,
            right_where_known,
            f1=(_floats(readable, "f1")[localized], _floats(readable, "f1_mean")[localized]),
        )
    right, among5 = right[labelled], among5[labelled]
    saliency, measured = _saliency(readable, size)
    known = {"top1": right.astype(float), "top5": among5.astype(float)} if labelled.any() else {}
    return Scores(
        source=description.source,
        localisation=model,
        baselines=score_baselines(ids, truth, size, right_where_known) if truth else (),
        top1=_mean(right) if labelled.any() else None,
        top5=_mean(among5) if labelled.any() else None,
        saliency=saliency,
        counts=Counts(
            images=len(table),
            localized=len(truth),
            labelled=int(labelled.sum()),
            unreadable=len(table) - len(readable),
        ),
        convention=description.convention,
        published=published.comparable(description.source, len(truth), description.convention),
        per_image={**known, **measured},
    )


def score_boxes(
    name: str,
    boxes: NDArray[np.integer[Any]],
    truth: Sequence[ArrayLike],
    size: int,
    right: NDArray[np.bool_] | None,
    f1: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> Localisation:
    """Score one box per image.

    Args:
        name: The method.
        boxes: ``[n, 4]`` in network pixels, n >= 1.
        truth: n arrays ``[m, 4]`` of true boxes in network pixels, not clipped, m >= 1.
        size: Side of the network's square.
        right: ``[n]`` whether the class is right, None when unknown.
        f1: ``[n]`` best and mean continuous F1; those of the boxes when omitted.
    """
    flat, owners = localization.pair(truth)
    best_iou = localization.best(localization.box_iou(boxes[owners], flat), owners, len(boxes))
    if f1 is None:
        of_box = localization.f1_of_boxes(boxes[owners], flat)
        f1 = (
            localization.best(of_box, owners, len(boxes)),
            localization.mean(of_box, owners, len(boxes)),
        )
    found = best_iou > localization.THRESHOLD
    each: dict[str, NDArray[np.float64]] = {
        "le": np.asarray(~found, np.float64),
        **({} if right is None else {"om": np.asarray(~(found & right), np.float64)}),
        "f1": f1[0],
        "f1_mean": f1[1],
        "iou": best_iou,
        "coverage": np.asarray(localization.area(boxes) / size**2, np.float64),
    }
    mean = {key: _mean(values) for key, values in each.items()}
    om = mean.pop("om", None)
    return Localisation(name=name, om=om, **mean, per_image=each)


def score_baselines(
    image_ids: Sequence[str],
    truth: Sequence[ArrayLike],
    size: int,
    right: NDArray[np.bool_] | None,
) -> tuple[Localisation, ...]:
    """Score the boxes that look at no image; arguments as in :func:`score_boxes`."""
    simple: dict[str, NDArray[np.integer[Any]]] = {
        "centred box": np.tile(localization.centred_box(size), (len(truth), 1)),
        "whole image": baselines.whole(len(truth), size),
        "random box": baselines.random(image_ids, size),
    }
    return tuple(score_boxes(name, boxes, truth, size, right) for name, boxes in simple.items())


def _saliency(table: pa.Table, size: int) -> tuple[Saliency, PerImage]:
    """Statistics of the saliency maps from the columns that extraction measured."""
    each = {
        "mean": _floats(table, "mean_saliency"),
        "tv": _floats(table, "tv"),
        "tv_mean": _floats(table, "tv") / max(size * (size - 1), 1),
        "entropy": _floats(table, "entropy"),
        "entropy_full": _floats(table, "entropy_full"),
    }
    found = {name: _mean(values) for name, values in each.items()}
    spread = math.fsum((each["mean"] - found["mean"]) ** 2)
    std = math.sqrt(spread / (len(table) - 1)) if len(table) > 1 else None
    return Saliency(**found, std=std), each


def _mean(values: NDArray[Any]) -> float:
    """Mean that does not depend on the order of the values."""
    return math.fsum(values.tolist()) / len(values)


def _without_images(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if name != "per_image"}


def _integers(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(table[name].to_numpy(), np.int64)


def _floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    return np.asarray(table[name].to_numpy(), np.float64)


def _corners(table: pa.Table) -> NDArray[np.int64]:
    """Predicted boxes ``[n, 4]`` in network pixels."""
    return np.stack([_integers(table, f"net_{name}") for name in ("x0", "y0", "x1", "y1")], axis=1)
