"""Figure 2: seven consecutive images as CASM and Baseline see them.

From top to bottom: the original, the masked-in image b x, the masked-out image (1 - b) x, and the
latter inpainted by Telea's method. b is the saliency map at its mean (eq. 9), every kept pixel.
The paper draws its groups at random; so do we, from a fixed seed.
"""

from __future__ import annotations

import importlib.util

from casm_fast.data import predictions
from casm_fast.data.predictions import Description
from casm_fast.experiments.findings import Column, Findings, Gallery, Line, Row, Table
from casm_fast.experiments.study import Experiment, Run, Study
from casm_fast.experiments.table1 import BASELINE, CASM
from casm_fast.report.page import choose_group
from casm_fast.report.pictures import Pictures, draw

COLUMNS = 7
GROUPS = {"full": 4, "quick": 2, "smoke": 1}
"""The paper's figure shows four groups."""

FORMS = {
    "masked_in": ("masked-in", "what the map keeps"),
    "masked_out": ("masked-out", "what is left without it"),
    "inpainted": ("inpainted", "the hole, filled from its surroundings"),
}


def need_opencv(name: str) -> None:
    """Refuse to start what cannot be finished.

    Raises:
        ModuleNotFoundError: OpenCV is not installed.
    """
    if importlib.util.find_spec("cv2") is None:
        raise ModuleNotFoundError(
            f"{name}: expected OpenCV, which inpaints by Telea's method, got an environment "
            "without it: pip install 'casm_fast[inpaint]'"
        )


def run(study: Study) -> Findings:
    """Draw the same images with both models."""
    need_opencv("figure2")
    models = {"CASM": study.train(strategy=CASM), "Baseline": study.train(strategy=BASELINE)}
    tables = {name: predictions.read(study.boxes(trained)) for name, trained in models.items()}
    records = {name: table.to_pylist() for name, (table, _) in tables.items()}
    groups = choose_group(records["CASM"], COLUMNS, GROUPS[study.scale.name])
    drawn, rows = [], []
    for number, indices in enumerate(groups, start=1):
        study.progress(f"group {number} of {len(groups)}")
        drawn.append(
            {
                name: _pictures(study, trained, indices, tables[name][1])
                for name, trained in models.items()
            }
        )
        for index in indices:
            ours = {name: records[name][index]["mean_saliency"] for name in models}
            rows.append(Row(str(records["CASM"][index]["image_id"]), ours))
    ids = [[str(records["CASM"][index]["image_id"]) for index in indices] for indices in groups]
    casm, baseline = (_mean(rows, name) for name in models)
    return Findings(
        f"Of the {len(rows)} images shown, CASM marks {100 * casm:.0f} % and Baseline "
        f"{100 * baseline:.0f} % of the picture on average.",
        [
            Table(
                "figure2",
                "The images shown",
                [Column(name, f"mean saliency, {name}", ".2f") for name in models],
                rows,
                note="Consecutive images of the validation set, not chosen ones.",
            )
        ],
        galleries=[
            Gallery(
                "figure2",
                "What the maps mark",
                "Where a map holds everything that makes the object recognisable, the inpainted "
                "picture shows only background.",
                [_lines(group) for group in drawn],
                ids,
            )
        ],
        notes=[
            "The groups are drawn at random; the paper's own are not published.",
            *study.remarks,
        ],
    )


def _pictures(
    study: Study, trained: Run, indices: list[int], description: Description
) -> list[Pictures]:
    return draw(trained.model(), study.validation, indices, description.convention)


def _lines(group: dict[str, list[Pictures]]) -> list[Line]:
    """The rows of a group, from top to bottom."""
    first = next(iter(group.values()))
    lines = [Line("Original", "", "what the network sees", [p.original for p in first])]
    for name, pictures in group.items():
        for form, (label, say) in FORMS.items():
            made = [getattr(p, form) for p in pictures]
            lines.append(Line(name, label, say, made))
    return lines


def _mean(rows: list[Row], name: str) -> float:
    return sum(row.ours[name] or 0.0 for row in rows) / len(rows)


EXPERIMENT = Experiment(
    "figure2",
    "seven consecutive images: masked-in, masked-out, inpainted; CASM and Baseline",
    run,
    needs_boxes=False,
)
