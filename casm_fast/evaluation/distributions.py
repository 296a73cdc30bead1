r"""How large objects are and where: the distributions that variable occlusion draws from.

Supplement of Fong and Vedaldi 2017, section 4.1, figures 1 and 2, on COCO's annotations: the mean
area of the objects of a class in a picture is fitted by a log-normal distribution, and of the
centres of all boxes y by a normal and x by a uniform one (x peaks at the centre and is flat
elsewhere). Conventions:

* everything is in the frame of the network, 224 x 224 pixels, into which pictures are squashed;
* a picture and class give one area, the mean over its objects; every object gives one centre;
* areas are those of the segmentations, as COCO lists them; crowds are no objects;
* the paper takes 100 pictures for each class (8,000); which ones it does not say: ``per_class``
  takes the first in the order of their ids;
* fits are maximum likelihood: mean and biased standard deviation of log areas and of y. The uniform
  one is the frame;
* Kolmogorov-Smirnov distances are between data and fit. Their p-values are those of a distribution
  that was not fitted to the data, and so too large.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.coco import CocoSource
from casm_fast.evaluation.outcomes import paragraph

SIZE = 224
"""Side of the frame."""


@dataclass(frozen=True)
class Fit:
    """A distribution that was fitted.

    Attributes:
        name: Of the quantity.
        family: "log-normal", "normal" or "uniform".
        parameters: mu and sigma (of the log for log-normal), or the two ends.
        published: The same of the paper; () where it gives none.
        distance: Kolmogorov-Smirnov distance between the data and the fit, in [0, 1]; NaN where all
            data are equal.
        p_value: Of that distance.
        published_distance: Distance between the data and the published distribution; NaN without.
        count: Data.
    """

    name: str
    family: str
    parameters: tuple[float, float]
    published: tuple[float, float] | tuple[()]
    distance: float
    p_value: float
    published_distance: float
    count: int


PUBLISHED: dict[str, tuple[float, float]] = {
    "area": (7.5060, 1.2848),
    "y": (116.0759, 47.5054),
}
"""mu and sigma of the paper: of the log of areas in square pixels, and of y in pixels."""


@dataclass(frozen=True, eq=False)
class Distributions:
    """The data and their fits. ``str(distributions)`` is the printed table.

    Attributes:
        areas: ``[pairs]``, square pixels of the frame.
        centres: ``[objects, 2]`` (x, y), pixels of the frame.
        fits: By quantity: "area", "y", "x".
        convention: How they were made.
    """

    areas: NDArray[np.float64]
    centres: NDArray[np.float64]
    fits: Mapping[str, Fit]
    convention: str

    def __str__(self) -> str:
        heads = ("", "fit", "parameters", "published", "KS", "KS, published", "data")
        rows = [heads]
        for fit in self.fits.values():
            paper = ", ".join(f"{x:.4f}" for x in fit.published) or "-"
            rows.append(
                (
                    fit.name,
                    fit.family,
                    ", ".join(f"{x:.4f}" for x in fit.parameters),
                    paper,
                    f"{fit.distance:.3f}",
                    "-" if math.isnan(fit.published_distance) else f"{fit.published_distance:.3f}",
                    f"{fit.count:,}",
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
        lines = ["Distributions of objects", ""]
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join([*lines, "", paragraph(self.convention)])


def object_distributions(
    source: CocoSource | str | Path, *, per_class: int | None = None, size: int = SIZE
) -> Distributions:
    """Fit the distributions of object areas and box centres to COCO's annotations.

    Args:
        source: The set, or its annotation file.
        per_class: Pictures of each class at most, the first by id; None: all.
        size: Side of the frame in pixels.

    Returns:
        The data, the fits and how well they fit, beside the published ones.

    Raises:
        ImportError: SciPy is missing.
        ValueError: The file is not COCO's, or holds fewer than two objects.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(
            "object_distributions: expected SciPy, which fits distributions, but it is not "
            "installed: pip install 'casm_fast[eval]'"
        ) from error
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class: expected at least 1, got {per_class}")
    path = source.annotations if isinstance(source, CocoSource) else Path(source)
    areas, centres = _objects(path, per_class, size)
    logs = np.log(areas)
    fitted = {
        "area": ("area of a class's objects, px²", "log-normal", logs, stats.norm),
        "y": ("y of box centres, px", "normal", centres[:, 1], stats.norm),
        "x": ("x of box centres, px", "uniform", centres[:, 0], stats.uniform),
    }
    fits = {}
    for key, (name, family, data, distribution) in fitted.items():
        parameters = (0.0, float(size))
        if family != "uniform":
            parameters = tuple(map(float, distribution.fit(data)))  # type: ignore[assignment]
        published = PUBLISHED.get(key, ())
        # A log-normal's distance to areas is that of its normal to their logarithms.
        distance = p_value = math.nan
        if parameters[1] > 0:
            distance, p_value = stats.kstest(data, distribution(*parameters).cdf)
        other = (
            stats.kstest(data, distribution(*published).cdf).statistic if published else math.nan
        )
        fits[key] = Fit(
            name,
            family,
            parameters,
            published,
            float(distance),
            float(p_value),
            float(other),
            len(data),
        )
    taken = "all pictures" if per_class is None else f"the first {per_class} pictures"
    return Distributions(
        areas,
        centres,
        fits,
        f"COCO, {taken} of each class, squashed to {size} x {size}; an area is the mean over the "
        "objects of a class in a picture; maximum likelihood; mu and sigma of log areas",
    )


def _objects(
    path: Path, per_class: int | None, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean area of each pair of picture and class, and the centre of each object, in the frame."""
    try:
        content: Any = json.loads(path.read_bytes())
        scales = {
            int(one["id"]): (size / float(one["width"]), size / float(one["height"]))
            for one in content["images"]
        }
        rows = [
            (int(one["category_id"]), int(one["image_id"]), float(one["area"]), *one["bbox"])
            for one in content["annotations"]
            if not one.get("iscrowd")
        ]
        factors = np.array([scales[row[1]] for row in rows]).reshape(-1, 2)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"coco: cannot read {path}: {reason}") from error
    table = np.array(rows, np.float64).reshape(-1, 7)
    has_area = np.flatnonzero(table[:, 2] > 0)
    # Pairs in the order of classes, then of pictures.
    pairs, owner = np.unique(table[has_area, :2], axis=0, return_inverse=True)
    number = np.arange(len(pairs)) - np.searchsorted(pairs[:, 0], pairs[:, 0])
    wanted = np.flatnonzero(number[owner] < (per_class or len(pairs)))
    kept, owner = has_area[wanted], owner[wanted]
    table, factors = table[kept], factors[kept]
    if len(table) < 2:
        raise ValueError(f"coco: expected at least two objects in {path}, got {len(table)}")
    count = np.bincount(owner)
    sums = np.bincount(owner, table[:, 2] * factors.prod(axis=1))
    areas = sums[count > 0] / count[count > 0]
    centres = (table[:, 3:5] + table[:, 5:7] / 2) * factors
    return areas, centres
