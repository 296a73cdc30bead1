"""Supplement, Figure 9: the smallest region that keeps a class beside the one that removes it.

The preservation game (eq. 1) raises the score of an image of which little is shown; the deletion
game (main paper, eq. 6) lowers the score of an image of which little is hidden. The paper finds
deletion masks the better heat maps, and some preservation masks unstable.
"""

from __future__ import annotations

from casm_fast.experiments import learning, showing
from casm_fast.experiments.examining import explained
from casm_fast.experiments.findings import SUPPLEMENT, Findings, Gallery, Line, Row, Table
from casm_fast.experiments.study import Experiment, Study

IMAGES = {"full": 16, "quick": 12, "smoke": 2}
GAMES = {"preservation": "Preservation", "deletion": "Deletion"}


def run(study: Study) -> Findings:
    """Play both games with the same images."""
    classifier = explained(study)
    some = showing.load(study, classifier, showing.drawn(study, IMAGES[study.scale.name]))
    lines, rows = [showing.first_line(some, classifier)], []
    for game, title in GAMES.items():
        study.progress(title)
        made = learning.learn(some, classifier, learning.config(study, game=game))
        maps = showing.heat(some, classifier, made.saliency, stretch=False)
        lines.append(Line(title, "", "salient, red", maps))
        if made.perturbed is not None:
            left = showing.seen(made.perturbed, classifier)
            lines.append(Line(title, "(perturbed)", "what the network is shown in the end", left))
        rows.append(Row(title, learning.summary(some, made)))
    kept, deleted = (row.ours for row in rows)
    return Findings(
        f"Preservation shows {100 * (kept['salient'] or 0):.0f} % of the image for a score of "
        f"{kept['after'] or 0:.2f}; deletion hides {100 * (deleted['salient'] or 0):.0f} % for "
        f"{deleted['after'] or 0:.2f}.",
        [
            Table(
                "preservation_vs_deletion",
                f"Masks of {len(some.indices)} random images",
                learning.COLUMNS,
                rows,
                note="Salient is what preservation keeps, and what deletion hides.",
            )
        ],
        galleries=[
            Gallery(
                "preservation_vs_deletion",
                "Two games",
                "Deletion masks are subtracted from 1, so that both mark what matters.",
                [lines],
                [showing.ids(some)],
            )
        ],
        notes=["The paper's images are not published.", *learning.remarks(study)],
    )


EXPERIMENT = Experiment(
    "preservation_vs_deletion",
    "masks of the preservation and the deletion game (supplement, Figure 9)",
    run,
    paper=SUPPLEMENT,
)
