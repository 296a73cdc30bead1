"""Table 1: localisation by CASM, by the Baseline, and by other methods.

Baseline is CASM's architecture with strategy F: the mask of one fixed classifier. CASM is strategy
L100. The other methods explain the classifier f(0), see `attributed`; of those that have no public
description, the published figures alone are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from casm_fast.evaluation import published
from casm_fast.experiments import attributed, columns, drawing
from casm_fast.experiments.examining import entry
from casm_fast.experiments.findings import Chart, Column, Findings, Row, Table
from casm_fast.experiments.study import Experiment, Study

BASELINE, CASM = "F", "L100"
"""The strategies of the two models of the paper."""

ALPHA = Column("alpha", "alpha", "g")

Scorer = Callable[[Study], dict[str, float | None]]
"""Gives LE, OM, F1 and, where there is a map, the mean saliency."""


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: As the paper calls it.
        group: The head that it stands under.
        scorer: Measures it; None where only the published figure is shown.
        published: Key of the published figures, if there are any.
        strategy: Thinning strategy, where it is one that may be replaced at small scales.
    """

    name: str
    group: str
    scorer: Scorer | None = None
    published: str | None = None
    strategy: str | None = None


def strategy(name: str) -> Scorer:
    """A model trained with a thinning strategy."""
    return lambda study: columns.localisation(study.scores(study.train(strategy=name)))


def simple_box(name: str) -> Scorer:
    """A box that looks at no image, with the classes that CASM's classifier predicts."""

    def score(study: Study) -> dict[str, float | None]:
        entries: list[dict[str, Any]] = study.scores(study.train(strategy=CASM))["baselines"]
        entry = next(entry for entry in entries if entry["name"] == name)
        return {key: entry[key] for key in ("le", "om", "f1")}

    return score


def explanation(method: str, **options: Any) -> Scorer:
    """Maps of the classifier f(0) by a method of `casm_fast.attribute`."""
    return partial(attributed.scores, method=entry(method, **options))


IMPLEMENTED: dict[str, Scorer] = {
    "Bach": explanation("lrp"),
    "Zeiler": explanation("occlusion"),
    "Zhou": explanation("cam"),
    "Selvaraju": explanation("grad_cam"),
    "Fong": explanation("meaningful_perturbation"),
    "Mahendran": explanation("salient_deconvolution"),
    "Simonyan": explanation("gradient"),
    "Cao": explanation("feedback"),
    "Zhang": explanation("excitation_backprop"),
    "Du": explanation("guided_inversion"),
    "Dabkowski": explanation("real_time"),
}
"""Methods of the paper's table by the key of their published figures."""

OURS, OTHER, BOXES = (
    "CASM and its Baseline",
    "Other thinning strategies",
    "Boxes that look at nothing",
)
WEAK, STRONG = "Told the class, of one classifier", "Supervised, published"
METHODS = (
    Method("Baseline (F)", OURS, strategy(BASELINE), "Baseline"),
    Method("CASM (L100)", OURS, strategy(CASM), "CASM", CASM),
    Method("CASM with L", OTHER, strategy("L")),
    Method("CASM with FL", OTHER, strategy("FL")),
    Method("CASM with L1000", OTHER, strategy("L1000"), None, "L1000"),
    Method("Centred box", BOXES, simple_box("centred box")),
    Method("Whole image", BOXES, simple_box("whole image")),
    Method("Random box", BOXES, simple_box("random box")),
    *(
        Method(published.TABLE_1[key].name, WEAK, IMPLEMENTED.get(key), key)
        for key in published.TABLE_1
        if key not in ("Baseline", "CASM", "VGG")
    ),
    Method(published.TABLE_1["VGG"].name, STRONG, None, "VGG"),
)


def run(study: Study) -> Findings:
    """Score every method that is here, beside every published figure."""
    rows: list[Row] = []
    group = ""
    for method in METHODS:
        if method.group != group:
            group = method.group
            rows.append(Row(group, kind="head"))
        ours: dict[str, float | None] = {}
        if method.scorer is not None:
            study.progress(method.name)
            ours = method.scorer(study)
        paper = published.TABLE_1[method.published] if method.published else None
        rows.append(
            Row(
                method.name + (study.instead(method.strategy) if method.strategy else ""),
                ours,
                {} if paper is None else columns.published(paper),
                kind="ours" if method.published == "CASM" else "",
            )
        )
    table = Table(
        "table1",
        "Localisation by method",
        (columns.LE, columns.OM, columns.F1, columns.VOLUME, ALPHA),
        rows,
        source="Table 1",
        note="No method of the upper groups is told the class of the object. The others are; "
        "alpha, of the threshold alpha * mean, is tuned for them on held-out training images, and "
        "their maps are stretched to [0, 1].",
    )
    shown = [row for row in rows if row.kind != "head"]
    le = {method.name: row.ours.get("le") for method, row in zip(METHODS, shown, strict=True)}
    return Findings(
        f"CASM misses the object in {100 * (le['CASM (L100)'] or 0):.1f} % of the images, the "
        f"classifier-dependent Baseline in {100 * (le['Baseline (F)'] or 0):.1f} %, "
        f"a box in the middle of the picture in {100 * (le['Centred box'] or 0):.1f} %.",
        [table],
        [
            Chart(
                "table1",
                "Localisation error by method",
                f"{drawing.RINGS} Less is better.",
                drawing.dots(shown, columns.LE),
                (7.0, drawing.height(shown)),
            )
        ],
        notes=[
            "The published methods use different classifiers and thresholds, and most are told the "
            "class; the paper takes the better of each method's own figure and that of Fong and "
            "Vedaldi (2017).",
            *study.remarks,
        ],
    )


EXPERIMENT = Experiment("table1", "localisation (LE, OM) of CASM, Baseline and other methods", run)
