"""Supplement, Figure 3: what meaningful perturbation and other methods say about the same images.

Images are drawn at random. Each map runs from its least to its highest value, red is salient; of
the learned mask 1 - m is shown. A number stands beside the pictures: the share of the mass of each
stretched map that lies inside the true boxes.
"""

from __future__ import annotations

from casm_fast.attribution import shade
from casm_fast.experiments import showing
from casm_fast.experiments.examining import Entry, entry, explained
from casm_fast.experiments.findings import SUPPLEMENT, Column, Findings, Gallery, Line, Row, Table
from casm_fast.experiments.study import Experiment, Study

IMAGES = {"full": 10, "quick": 8, "smoke": 2}

METHODS: tuple[Entry, ...] = (
    entry(
        "meaningful_perturbation",
        "Mask",
    ),
    entry("gradient"),
    entry("guided_backprop"),
    entry("contrastive_excitation_backprop"),
    entry("grad_cam"),
    entry("occlusion"),
)
"""The columns of the paper's figure, from left to right."""

INSIDE = Column("inside", "mass inside the true boxes ↑ %")


def run(study: Study) -> Findings:
    """Draw every method's maps of the same images."""
    classifier = explained(study)
    some = showing.load(study, classifier, showing.drawn(study, IMAGES[study.scale.name]))
    lines, rows = [showing.first_line(some, classifier)], []
    for method in METHODS:
        study.progress(method.title)
        maps = some.maps(method.at(study.scale.name), classifier)
        lines.append(Line(method.title, "", "red is salient", showing.heat(some, classifier, maps)))
        share = showing.mean(showing.inside(some, shade(maps)))
        rows.append(Row(method.title, {INSIDE.key: share}))
    best = max(rows, key=lambda row: row.ours[INSIDE.key] or 0)
    return Findings(
        f"Of {len(some.indices)} random images, {best.name} has most of its mass inside the true "
        f"boxes: {100 * (best.ours[INSIDE.key] or 0):.0f} %.",
        [
            Table(
                "comparison_grid",
                "Mass inside the true boxes, of the images shown",
                [INSIDE],
                rows,
                note="Each map is stretched to [0, 1] first. A few images decide nothing: the "
                "experiments pointing_game and supplement_table1 count.",
            )
        ],
        galleries=[
            Gallery(
                "comparison_grid",
                "The same images by every method",
                "Drawn at random.",
                [lines],
                [showing.ids(some)],
            )
        ],
        notes=["The paper's images are not published.", *study.remarks],
    )


EXPERIMENT = Experiment(
    "comparison_grid",
    "random images by every comparison method (supplement, Figure 3)",
    run,
    paper=SUPPLEMENT,
)
