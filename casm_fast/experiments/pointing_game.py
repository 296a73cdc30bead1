"""The pointing game (supplement, section 4): does a map's maximum lie on the object?

Images are squashed to the network's square, distances are measured there, and maxima that tie share
the image, or count as their mean place. At most 400 images of a class are played. All images, and
the difficult ones: the class covers less than a quarter of the picture, and others are in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.source import ImageSource
from casm_fast.data.synthetic import DISTRACTORS, SyntheticSource
from casm_fast.data.voc import VocSource
from casm_fast.evaluation import (
    Pointing,
    PointingConfig,
    first_per_class,
    pointing_game,
    shares_picture,
)
from casm_fast.experiments import drawing
from casm_fast.experiments.examining import Entry, Examples, entry, explained, records
from casm_fast.experiments.findings import SUPPLEMENT, Chart, Column, Findings, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.models.classifier import Classifier

PER_CLASS = {"full": 400, "quick": 12, "smoke": 3}
"""Images of a class; the paper's 400 leave 20,721 of COCO's validation pairs."""

TOLERANCE, SIDE = 15, 224
"""Pixels, of the paper's images; other sides in proportion."""

ALL, DIFFICULT = Column("all", "all ↑ %"), Column("difficult", "difficult ↑ %")
COLUMNS = (
    ALL,
    Column("low", "95 % from"),
    Column("high", "to"),
    DIFFICULT,
    Column("overall", "all images alike ↑ %"),
)

METHODS: tuple[Entry, ...] = (
    entry("centre"),
    entry("random"),
    entry("gradient"),
    entry("guided_backprop"),
    entry("excitation_backprop"),
    entry("contrastive_excitation_backprop"),
    entry("grad_cam"),
    entry("occlusion"),
    entry("rise"),
    entry("meaningful_perturbation", "Mask, default settings"),
)

PUBLISHED = {"meaningful_perturbation": {"all": 0.3640, "difficult": 0.2821}}
"""Supplement, section 5: GoogLeNet, COCO, default settings for one class."""


@dataclass(frozen=True)
class Played:
    """Methods that played.

    Attributes:
        rows: Of the table.
        games: What came out, in the order of the rows.
        convention: How it was played.
    """

    rows: list[Row]
    games: list[Pointing] = field(repr=False)

    @property
    def convention(self) -> str:
        """How it was played."""
        return self.games[0].convention


def run(study: Study) -> Findings:
    """Play with every method."""
    played = play(study, METHODS)
    centre, *others = played.rows
    best = max(others, key=lambda row: row.ours["all"] or 0)
    return Findings(
        f"{best.name} points at the object in {100 * (best.ours['all'] or 0):.1f} % of the images, "
        f"the best of {len(others)} methods; the centre lies on it in "
        f"{100 * (centre.ours['all'] or 0):.1f} %.",
        [table("pointing_game", "Accuracy of pointing", played)],
        [
            Chart(
                "pointing_game",
                "Accuracy of pointing, all images",
                f"{drawing.RINGS} More is better.",
                drawing.dots(played.rows, ALL),
                (7.0, drawing.height(played.rows)),
            )
        ],
        notes=notes(study),
    )


def table(name: str, title: str, played: Played) -> Table:
    """The accuracies, with the convention below."""
    return Table(
        name,
        title,
        COLUMNS,
        played.rows,
        source="Section 5",
        paper=SUPPLEMENT,
        note=f"{played.convention[0].upper()}{played.convention[1:]}. The interval is a bootstrap "
        "of the images.",
    )


def notes(study: Study) -> list[str]:
    """What differs from the paper."""
    told = [
        "The paper plays on COCO with a GoogLeNet that was trained for COCO's categories; its "
        "weights are not published."
    ]
    if study.embedded:
        told.append(
            "A picture of the embedded set is difficult when its objects cover less than a quarter "
            "of it and shapes of no class are in it."
        )
    return [*told, *study.remarks]


def play(study: Study, methods: Sequence[Entry]) -> Played:
    """Play the game with methods.

    Args:
        study: Whose validation images and classifier.
        methods: Who plays.
    """
    classifier = explained(study)
    source = study.validation
    labels = np.array([source.label(index) for index in range(study.limit)])
    played = first_per_class(labels, PER_CLASS[study.scale.name]).tolist()
    # TorchRay passes over classes of which a picture of VOC shows difficult objects alone.
    hard = source.difficult if isinstance(source, VocSource) else None
    indices = [one for one in played if hard is None or not hard(one).all()]
    others = distractors(source)
    config = PointingConfig(tolerance=TOLERANCE * classifier.size / SIDE, frame="network")
    rows, games = [], []
    for one in methods:
        method = one.at(study.scale.name)
        found = records(
            study,
            method.name,
            classifier,
            source,
            indices,
            partial(_pointed, method, classifier, others, config),
            options={name: str(value) for name, value in method.options.items()},
        )
        game = Pointing(
            hits=np.array([one["hit"] for one in found]),
            labels=np.array([one["label"] for one in found]),
            difficult=np.array([one["difficult"] for one in found]),
            classes=tuple(source.classes),
            convention=found[0]["convention"],
        )
        interval = game.interval()
        ours = {
            "all": game.accuracy(),
            "low": interval.low,
            "high": interval.high,
            "difficult": game.accuracy("difficult") if game.difficult.any() else None,
            "overall": game.overall(),
        }
        rows.append(Row(method.title, ours, PUBLISHED.get(method.name, {})))
        games.append(game)
    return Played(rows, games)


def distractors(source: ImageSource) -> NDArray[np.bool_]:
    """Whether each image shows something of another class."""
    if isinstance(source, SyntheticSource):
        return np.asarray(source.items.present[:, :DISTRACTORS].any(axis=1))
    return shares_picture([source.image_id(index) for index in range(len(source))])


def _pointed(
    method: Entry,
    classifier: Classifier,
    others: NDArray[np.bool_],
    config: PointingConfig,
    some: Examples,
) -> list[dict[str, Any]]:
    """Whether each map of a batch hits."""
    labels = [some.source.label(index) for index in some.indices]
    game = pointing_game(
        some.maps(method, classifier).cpu(),
        labels,
        boxes=[some.boxes(place) for place in range(len(some.indices))],
        distractors=others[list(some.indices)],
        geometries=some.geometries,
        config=config,
    )
    return [
        {"hit": float(hit), "label": label, "difficult": bool(hard), "convention": game.convention}
        for hit, label, hard in zip(game.hits, labels, game.difficult, strict=True)
    ]


EXPERIMENT = Experiment(
    "pointing_game",
    "does the maximum lie on the object: methods, all and difficult images (supplement, 4 and 5)",
    run,
    paper=SUPPLEMENT,
)
