"""Table 3: localisation of classes that were seen in training, and of classes that were not.

The classes are divided at random into A to F with 5, 5, 10, 30, 30 and 20 % of them: 50, 50, 100,
300, 300 and 200 of ImageNet's 1,000; at least one each, and two in F. Six models learn from the
images of F, of E and F, ... and of all classes, "in all stages": the classifier that each starts
from has seen the same classes alone. Every model is scored on each part. Strategy L, as in the
paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data import localization, predictions
from casm_fast.data.classes import ClassSubset, labels_of, of_classes
from casm_fast.evaluation import published
from casm_fast.experiments.findings import Chart, Column, Findings, Row, Table
from casm_fast.experiments.study import QUICK, Experiment, Run, Study
from casm_fast.report.charts import Draw, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = {"A": 50, "B": 50, "C": 100, "D": 300, "E": 300, "F": 200}
"""Classes of each part among ImageNet's 1,000."""
TRAININGS = ("F", "EF", "DEF", "CDEF", "BCDEF", "ABCDEF")
STRATEGY = "L"
SEED = 2020
"""The division into parts is drawn from it; the paper's is not published."""
LEAST = {"A": 1, "B": 1, "C": 1, "D": 1, "E": 1, "F": 2}
"""A part needs a class to be scored on, F two to be learned from."""


def run(study: Study) -> Findings:
    """Train on six unions of parts, score on every part."""
    parts = divide(len(study.training.classes))
    columns = [Column(name, f"{name} %") for name in (*parts, "all")]
    rows = []
    for training in TRAININGS:
        study.progress(f"learning from the classes of {', '.join(training)}")
        seen = [label for part in training for label in parts[part]]
        images = of_classes(study.training, seen) if len(training) < len(parts) else None
        trained = train(study, images)
        rows.append(
            Row(
                "All" if images is None else ", ".join(training),
                errors_by_part(study, study.boxes(trained), parts),
                published.TABLE_3[training],
                unseen(training),
            )
        )
    table = Table(
        "table3",
        "Localisation error by part of the classes",
        columns,
        rows,
        source="Table 3",
        note="Rows: the parts that a model learned from. Columns: the parts that it is scored on. "
        f"The parts hold {', '.join(f'{len(v)}' for v in parts.values())} classes.",
        mark="classes that the model has never seen",
    )
    gaps = {row.name: gap(row) for row in rows if row.marked}
    first, last = next(iter(gaps)), list(gaps)[-1]
    return Findings(
        "Error on unseen classes minus error on seen ones: "
        f"{100 * gaps[first]:+.1f} points for the model that learned from {first}, "
        f"{100 * gaps[last]:+.1f} for that of {last}.",
        [table],
        [
            Chart(
                "table3",
                "Seen and unseen classes",
                "Localisation error on the classes that a model has seen (line) and on those that "
                "it has not (dashed), parts weighted by their classes; the thin lines are those of "
                "the paper.",
                _draw(rows),
                (7.0, 3.2),
            )
        ],
        notes=[
            "The division into parts is random; the paper's own is not published.",
            "The parts are so small that every model gets as many steps as that of all classes "
            "(the paper: as many epochs), and the errors on a part of one class are coarse."
            if study.embedded
            else "Each model's classifier is trained from scratch on the classes that it may see, "
            "by the recipe of the model zoo (90 epochs); the paper gives no recipe for it.",
            *study.remarks,
        ],
    )


def train(study: Study, images: ClassSubset | None) -> Run:
    """The model of some classes, or of all.

    A part of the embedded set is so small that its epochs would be over before anything is
    learned: there a part is seen as often as it takes to have the steps of the whole set.
    """
    if not study.embedded:
        return study.train(training=images, strategy=STRATEGY)
    # The quick form has fewer images than those of the other experiments.
    settings: dict[str, Any] = (
        {"epoch_fraction": 0.4, "pretrain_epochs": 5} if study.scale == QUICK else {}
    )
    if images is None:
        return study.train(strategy=STRATEGY, **settings)
    share = len(images) / len(study.training)
    whole = study.config(strategy=STRATEGY, **settings).recipe()
    classifier = study.classifier(
        training=images, pretrain_epochs=round(whole.pretrain_epochs / share)
    )
    passes = whole.epochs * whole.epoch_fraction / share
    epochs = max(whole.epochs, math.ceil(passes))
    return study.train(
        training=images,
        strategy=STRATEGY,
        weights=str(classifier.checkpoint.resolve()),
        pretrain_epochs=0,
        epochs=epochs,
        epoch_fraction=passes / epochs,
        schedule_epochs=round(whole.schedule_epochs * epochs / whole.epochs),
    )


def divide(classes: int) -> dict[str, list[int]]:
    """Labels of the parts A to F.

    Args:
        classes: How many there are.

    Raises:
        ValueError: A part would be empty.
    """
    if classes < sum(LEAST.values()):
        raise ValueError(
            f"table3: expected a data set of at least {sum(LEAST.values())} classes, one for each "
            f"of the parts A to E and two for F, got {classes}"
        )
    sizes = dict(LEAST)
    for _ in range(classes - sum(sizes.values())):
        # The part that lacks most of its share gets the next class.
        lack = {name: SIZES[name] * classes / sum(SIZES.values()) - sizes[name] for name in SIZES}
        sizes[max(lack, key=lambda name: lack[name])] += 1
    order = np.random.default_rng(SEED).permutation(classes).tolist()
    ends = np.cumsum(list(sizes.values())).tolist()
    return {
        name: sorted(order[end - size : end])
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


def unseen(training: str) -> frozenset[str]:
    """The parts that a model does not learn from."""
    return frozenset(SIZES) - frozenset(training)


def errors_by_part(
    study: Study, boxes: Path, parts: dict[str, list[int]]
) -> dict[str, float | None]:
    """LE over the images of each part, and over all of them.

    Args:
        study: Knows the images' classes.
        boxes: Parquet file of the validation images.
        parts: Labels by part.

    Returns:
        LE by part and as ``"all"``; None for a part without an image that has a true box.
    """
    table, _ = predictions.read(boxes)
    rows = table.to_pylist()
    labels = labels_of(study.validation)[: len(rows)]
    kept = [i for i, row in enumerate(rows) if row["error"] is None and row["gt_net_boxes"]]
    corners = [[rows[i][f"net_{c}"] for c in ("x0", "y0", "x1", "y1")] for i in kept]
    best = localization.iou(np.array(corners), [rows[i]["gt_net_boxes"] for i in kept])
    of = labels[kept]

    def error(chosen: NDArray[np.bool_]) -> float | None:
        return localization.localisation_error(best[chosen]) if chosen.any() else None

    found = {name: error(np.isin(of, part)) for name, part in parts.items()}
    return {**found, "all": error(np.ones(len(of), bool))}


def gap(row: Row) -> float:
    """How much larger the error is on unseen parts than on seen ones."""
    return mean(row.ours, row.marked) - mean(row.ours, frozenset(SIZES) - row.marked)


def mean(errors: Mapping[str, float | None], names: frozenset[str]) -> float:
    """Mean error over some parts, each weighted by its number of classes; NaN over none."""
    known = [(SIZES[name], error) for name in names if (error := errors.get(name)) is not None]
    total = sum(weight for weight, _ in known)
    return math.fsum(weight * error for weight, error in known) / total if total else math.nan


def _draw(rows: Sequence[Row]) -> Draw:
    """Error on seen and on unseen parts over the rows, ours and the paper's."""

    def draw(axes: Axes, palette: Palette) -> None:
        places = range(len(rows))
        for width, colour, errors in (
            (1.0, palette.second, [row.published for row in rows]),
            (1.8, palette.first, [row.ours for row in rows]),
        ):
            seen, hidden = (
                [100 * mean(e, names) for e, names in zip(errors, chosen, strict=True)]
                for chosen in (
                    [frozenset(SIZES) - row.marked for row in rows],
                    [row.marked for row in rows],
                )
            )
            axes.plot(places, seen, "o-", color=colour, linewidth=width, markersize=3.5)
            axes.plot(places, hidden, "o", color=colour, markersize=3.5)
            axes.plot(places, hidden, color=colour, linewidth=width, linestyle=(0, (4, 2)))
        axes.set_xticks(places, [row.name for row in rows])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("LE ↓ %")
        axes.set_xlabel("parts that the model learned from")

    return draw


EXPERIMENT = Experiment(
    "table3",
    "localisation of classes that were not seen in training",
    run,
    embedded="classes=8",
    quick="images=2500",
)
