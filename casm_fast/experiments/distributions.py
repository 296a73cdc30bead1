"""Supplement, Figures 1 and 2: how large COCO's objects are, and where.

Variable occlusion draws its discs from these distributions: areas log-normal, the centres' y
normal, their x uniform (section 4.1). They are fitted to the annotations of the training images, at
most 100 of each class. The embedded set is written in COCO's layout first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.coco import CocoSource
from casm_fast.data.synthetic import SyntheticSource, write_coco
from casm_fast.evaluation import Distributions, object_distributions
from casm_fast.experiments.findings import SUPPLEMENT, Chart, Column, Findings, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.report.charts import Draw, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_CLASS = {"full": 100, "quick": 100, "smoke": 5}
WRITTEN = {"full": 4000, "quick": 400, "smoke": 20}
"""Images of the embedded set that are written."""

COLUMNS = (
    Column("first", "mu, or from", ".4f"),
    Column("second", "sigma, or to", ".4f"),
    Column("distance", "distance of the fit", ".3f"),
    Column("published_distance", "of the published one", ".3f"),
    Column("count", "data", ",.0f"),
)
_BINS = 40


def run(study: Study) -> Findings:
    """Fit, and draw data and fits."""
    found = object_distributions(_coco(study), per_class=PER_CLASS[study.scale.name])
    rows = []
    for fit in found.fits.values():
        ours: dict[str, float | None] = {
            "first": fit.parameters[0],
            "second": fit.parameters[1],
            "distance": fit.distance,
            "published_distance": fit.published_distance if fit.published else None,
            "count": float(fit.count),
        }
        paper = dict(zip(("first", "second"), fit.published, strict=True)) if fit.published else {}
        rows.append(Row(f"{fit.name}: {fit.family}", ours, paper))
    area, y = found.fits["area"], found.fits["y"]
    return Findings(
        f"Areas are log-normal with mu {area.parameters[0]:.2f} and sigma {area.parameters[1]:.2f} "
        f"at a Kolmogorov-Smirnov distance of {area.distance:.3f}, the centres' y normal at "
        f"{y.distance:.3f}.",
        [
            Table(
                "distributions",
                "Fits",
                COLUMNS,
                rows,
                source="Figures 1 and 2",
                paper=SUPPLEMENT,
                note=f"{found.convention}. Distances are Kolmogorov-Smirnov's, 0 is a perfect fit.",
            )
        ],
        [
            Chart(
                "distributions-area",
                "Mean area of a class's objects in a picture",
                "Logarithm of square pixels. Bars: data; line: the fit; dashed: the published one.",
                _histogram(np.log(found.areas), _normals(found, "area"), "log area"),
            ),
            *(
                Chart(
                    f"distributions-{key}",
                    f"{key} of the centres of boxes",
                    "Pixels. Bars: data; line: the fit"
                    + ("; dashed: the published one." if key == "y" else ": uniform."),
                    _histogram(
                        found.centres[:, axis],
                        _normals(found, key) if key == "y" else [],
                        f"{key}, pixels",
                        uniform=key == "x",
                    ),
                )
                for axis, key in enumerate(("x", "y"))
            ),
        ],
        notes=["Which images the paper held out is not published.", *study.remarks],
    )


def _coco(study: Study) -> CocoSource:
    """The training images' annotations, of COCO or written in its layout.

    Raises:
        ValueError: The data set is neither COCO nor embedded.
    """
    source = study.training
    if isinstance(source, CocoSource):
        return source
    if not isinstance(source, SyntheticSource):
        raise ValueError(
            f"distributions: expected COCO's annotations, got {source.name}; give coco:DIR, or "
            "leave --data out"
        )
    folder = study.folder / "coco"
    if not folder.exists():
        images = WRITTEN[study.scale.name]
        from casm_fast.data.source import open_source

        some = open_source(f"{study.data},images={images}", "train")
        if not isinstance(some, SyntheticSource):
            raise TypeError(f"expected the embedded set, got {type(some).__name__}")
        unfinished = folder.with_name(".coco.unfinished")
        write_coco(unfinished, some, None)
        unfinished.rename(folder)
    return CocoSource(folder, "train")


Curve = tuple[float, float]


def _normals(found: Distributions, key: str) -> list[Curve]:
    """Mean and standard deviation of the fit and of the published one."""
    fit = found.fits[key]
    published: list[Curve] = [(fit.published[0], fit.published[1])] if fit.published else []
    return [fit.parameters, *published]


def _histogram(
    values: NDArray[Any], normals: list[Curve], label: str, uniform: bool = False
) -> Draw:
    """Bars of the data under the curves of normal distributions, or a uniform one."""

    def draw(axes: Axes, palette: Palette) -> None:
        axes.hist(values, _BINS, density=True, color=palette.line, edgecolor="none")
        x = np.linspace(float(values.min()), float(values.max()), 200)
        for number, (mean, spread) in enumerate(normals):
            y = np.exp(-(((x - mean) / spread) ** 2) / 2) / (spread * np.sqrt(2 * np.pi))
            colour = (palette.first, palette.second)[number]
            axes.plot(x, y, color=colour, linestyle="--" if number else "-", linewidth=1.6)
        if uniform:
            axes.plot([0, 224], [1 / 224] * 2, color=palette.first, linewidth=1.6)
        axes.set_xlabel(label)
        axes.set_yticks([])

    return draw


EXPERIMENT = Experiment(
    "distributions",
    "areas and places of objects, and their fits (supplement, Figures 1 and 2)",
    run,
    paper=SUPPLEMENT,
)
