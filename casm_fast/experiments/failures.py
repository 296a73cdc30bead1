"""Supplement, section 6.6: masks that fail, found and shown.

Three kinds, each told per image by what the descent recorded:

* it did not converge: a score or gradient was not finite, or the objective ended above its start;
* the score stayed: what the mask hides leaves more than half of the normalised score;
* it covers next to nothing of the object: less than a twentieth of the true boxes, though the
  score fell.

The paper sees instability in preservation masks and for difficult images. A learning rate a hundred
times as large, which nobody should use, shows what non-convergence looks like.
"""

from __future__ import annotations

from typing import Any

import torch

from casm_fast.experiments import learning, showing
from casm_fast.experiments.examining import Examples, examples, explained
from casm_fast.experiments.findings import (
    SUPPLEMENT,
    Column,
    Findings,
    Gallery,
    Line,
    Row,
    Table,
)
from casm_fast.experiments.study import Experiment, Study
from casm_fast.models.classifier import Classifier
from casm_fast.perturbation import Perturbation

IMAGES = {"full": 500, "quick": 32, "smoke": 3}
SHOWN = 7

SETTINGS: dict[str, dict[str, Any]] = {
    "Deletion": {},
    "Preservation": {"game": "preservation"},
    "Deletion, learning rate 10": {"learning_rate": 10.0},
}
LEFT = 0.5
"""Share of the normalised score above which it counts as not suppressed (or not kept)."""
COVERED = 0.05
"""Share of the true boxes' area below which a mask counts as missing the object."""

KINDS = {
    "diverged": "did not converge",
    "stayed": "the score stayed",
    "missed": "the object is hardly covered",
}
COLUMNS = (
    *(Column(kind, f"{title} %") for kind, title in KINDS.items()),
    Column("fine", "none of these %"),
)


def run(study: Study) -> Findings:
    """Learn masks with each setting, and look for those that failed."""
    classifier = explained(study)
    indices = showing.drawn(study, IMAGES[study.scale.name])
    rows: list[Row] = []
    galleries: list[Gallery] = []
    for title, changes in SETTINGS.items():
        study.progress(title)
        told = learning.config(study, **changes)
        counts = dict.fromkeys(KINDS, 0)
        fine = images = 0
        worst: dict[str, list[tuple[float, showing.Picture, str]]] = {kind: [] for kind in KINDS}
        for some in examples(study, classifier, study.validation, indices):
            made = learning.learn(some, classifier, told)
            found = failures(some, made)
            bad = torch.stack([flags for flags, _ in found.values()]).any(dim=0)
            fine += int((~bad).sum())
            images += len(bad)
            pictures = _pictures(some, classifier, made)
            names = showing.ids(some)
            for kind, (flags, severity) in found.items():
                counts[kind] += int(flags.sum())
                for place in torch.nonzero(flags)[:, 0].tolist():
                    worst[kind].append((float(severity[place]), pictures[place], names[place]))
        ours = {kind: count / images for kind, count in counts.items()}
        rows.append(Row(title, {**ours, "fine": fine / images}))
        galleries += _galleries(title, worst)
    first, last = rows[0].ours, rows[-1].ours
    return Findings(
        f"Of {len(indices)} random images {100 * (first['diverged'] or 0):.0f} % did not converge "
        f"with the default settings and {100 * (last['diverged'] or 0):.0f} % at a hundred "
        f"times the learning rate; {100 * (first['fine'] or 0):.0f} % of the default masks show no "
        "failure.",
        [
            Table(
                "failures",
                f"Failures among {len(indices)} random images",
                COLUMNS,
                rows,
                note=f"Stayed: more than {LEFT:.0%} of the normalised score is left (preservation: "
                f"lost). Hardly covered: less than {COVERED:.0%} of the area of the true boxes is "
                "salient.",
            )
        ],
        galleries=galleries,
        notes=["The paper's images are not published.", *learning.remarks(study)],
    )


def failures(some: Examples, made: Perturbation) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Which masks failed in which way.

    Args:
        some: The images.
        made: Their masks.

    Returns:
        By kind: flags ``[B]`` bool, and how bad each is ``[B]``, higher is worse.
    """
    left = made.normalised.nan_to_num(1.0, 1.0, 1.0).double().cpu()
    if made.config.game == "preservation":
        left = 1 - left
    covered = torch.tensor(_covered(some, made.saliency), dtype=torch.float64)
    objective = made.curves.objective.double().cpu().nan_to_num(0.0)
    rise = objective[:, -1] - objective[:, 0]
    diverged = made.diverged.cpu()
    stayed = left > LEFT
    return {
        "diverged": (diverged, rise),
        "stayed": (stayed, left),
        "missed": ((covered < COVERED) & ~stayed & ~diverged, 1 - covered),
    }


def _covered(some: Examples, maps: torch.Tensor) -> list[float]:
    """The mean saliency inside the true boxes; 1 for an image without any in the frame."""
    values = maps[:, 0].double().cpu()
    made = []
    for place, plane in enumerate(values):
        held = torch.zeros(plane.shape, dtype=torch.bool)
        H, W = plane.shape
        for box in some.geometries[place].to_network(some.boxes(place)):
            x0, y0, x1, y1 = box.clip(0, [W, H, W, H]).tolist()
            held[y0:y1, x0:x1] = True
        made.append(float(plane[held].mean()) if held.any() else 1.0)
    return made


def _pictures(some: Examples, classifier: Classifier, made: Perturbation) -> list[showing.Picture]:
    return showing.heat(some, classifier, made.saliency, stretch=False)


def _galleries(
    title: str, worst: dict[str, list[tuple[float, showing.Picture, str]]]
) -> list[Gallery]:
    """The worst masks of a setting, a row for each kind that occurred."""
    made = []
    for kind, found in worst.items():
        chosen = sorted(found, key=lambda one: -one[0])[:SHOWN]
        if chosen:
            line = Line(title, KINDS[kind], "salient, red", [picture for _, picture, _ in chosen])
            slug = title.lower().replace(",", "").replace(" ", "-")
            made.append(
                Gallery(
                    f"failures-{slug}-{kind}",
                    f"{title}: {KINDS[kind]}",
                    "The worst ones first.",
                    [[line]],
                    [[name for _, _, name in chosen]],
                )
            )
    return made


EXPERIMENT = Experiment(
    "failures",
    "masks that did not converge, left the score or missed the object (supplement, 6.6)",
    run,
    paper=SUPPLEMENT,
)
