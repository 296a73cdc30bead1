"""Supplement, Figure 4: the default settings beside those for weak localisation.

By default a mask deletes one class. For localisation it deletes the five best classes at once
(eq. 2), with lambda_1 = 1e-3 and beta = 2, which covers more of the object with a sharper mask
(section 6.2).
"""

from __future__ import annotations

from casm_fast.experiments import learning, showing
from casm_fast.experiments.examining import explained
from casm_fast.experiments.findings import SUPPLEMENT, Findings, Gallery, Line, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.perturbation.config import Preset

IMAGES = {"full": 16, "quick": 12, "smoke": 2}
SETTINGS: dict[Preset, str] = {
    "default": "Default: one class",
    "localization": "Localisation: five best classes",
}
MOST = 5
"""Classes of the localisation setting."""


def run(study: Study) -> Findings:
    """Learn both masks of the same images."""
    classifier = explained(study)
    some = showing.load(study, classifier, showing.drawn(study, IMAGES[study.scale.name]))
    lines, rows = [showing.first_line(some, classifier)], []
    several = min(MOST, max(1, len(classifier.classes) // 2 or MOST))
    for preset, title in SETTINGS.items():
        study.progress(title)
        changes: dict[str, int] = {"top_k": several} if preset == "localization" else {}
        told = learning.config(study, preset, **changes)
        made = learning.learn(some, classifier, told, own_class=preset == "default")
        lines.append(
            Line(
                title,
                "",
                "what is hidden, red",
                showing.heat(some, classifier, made.saliency, stretch=False),
            )
        )
        rows.append(Row(title, learning.summary(some, made)))
    areas = [100 * (row.ours[learning.SALIENT.key] or 0) for row in rows]
    notes = ["The paper's images are not published.", *learning.remarks(study)]
    if several != MOST:
        notes.insert(0, f"Of {len(classifier.classes)} classes the {several} best are deleted.")
    return Findings(
        f"Deleting one class hides {areas[0]:.0f} % of the image, deleting the {several} best "
        f"{areas[1]:.0f} %.",
        [
            Table(
                "top5_setting",
                f"Masks of {len(some.indices)} random images",
                learning.COLUMNS,
                rows,
                note="The score is the sum of the classes that are deleted.",
            )
        ],
        galleries=[
            Gallery(
                "top5_setting",
                "Two settings",
                "Drawn at random.",
                [lines],
                [showing.ids(some)],
            )
        ],
        notes=notes,
    )


EXPERIMENT = Experiment(
    "top5_setting",
    "masks that delete one class and the five best (supplement, Figure 4)",
    run,
    paper=SUPPLEMENT,
)
