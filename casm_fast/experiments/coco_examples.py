"""Supplement, Figure 10: masks on pictures of COCO, over what the objects cover.

A picture shows several categories; the mask deletes one of them, and the true outline of its
objects is drawn over it. The paper finds masks better where a picture is simple. Beside the
pictures stands how much of the mask lies on the objects, next to the share of the picture that they
cover, which is what a mask that ignores the picture would reach.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from casm_fast.experiments import learning, showing
from casm_fast.experiments.examining import Examples, explained
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

IMAGES = {"full": 16, "quick": 12, "smoke": 2}

ON = Column("on", "of the mask on the objects ↑ %")
COVERED = Column("covered", "of the image covered by them %")
COLUMNS = (ON, COVERED, learning.BEFORE, learning.AFTER, learning.SALIENT, learning.DIVERGED)
_OUTLINE = np.array([255, 255, 255], np.uint8)


def run(study: Study) -> Findings:
    """Learn masks, and see what they lie on."""
    source = study.validation
    if not hasattr(source, "mask"):
        raise ValueError(
            f"coco_examples: expected a set whose objects have outlines, got {source.name}; "
            "give coco:DIR, or leave --data out"
        )
    classifier = explained(study)
    some = showing.load(study, classifier, showing.drawn(study, IMAGES[study.scale.name]))
    made = learning.learn(some, classifier, learning.config(study))
    maps = made.saliency[:, 0].double().cpu().numpy()
    regions = objects(some)
    rows = []
    for place, (name, plane, region) in enumerate(
        zip(showing.ids(some), maps, regions, strict=True)
    ):
        one = made.select(torch.tensor([place], device=made.masks.device))
        mass = float(plane.sum())
        label = source.classes[source.label(some.indices[place])]
        rows.append(
            Row(
                f"{name}, {label}",
                {
                    **{c.key: None for c in COLUMNS},
                    learning.BEFORE.key: float(one.score_before),
                    learning.AFTER.key: float(one.score_after),
                    learning.SALIENT.key: float(one.saliency.mean()),
                    learning.DIVERGED.key: float(one.diverged),
                    ON.key: float(plane[region].sum()) / mass if mass else None,
                    COVERED.key: float(region.mean()),
                },
            )
        )
    means = {
        column.key: showing.mean(
            value for row in rows if (value := row.ours[column.key]) is not None
        )
        for column in COLUMNS
    }
    shown = showing.heat(some, classifier, made.saliency, stretch=False)
    outlined = [_outlined(p, region) for p, region in zip(shown, regions, strict=True)]
    return Findings(
        f"{100 * (means[ON.key] or 0):.0f} % of what the masks hide lies on the objects, which "
        f"cover {100 * (means[COVERED.key] or 0):.0f} % of the pictures.",
        [
            Table(
                "coco_examples",
                f"Masks of {len(rows)} random pictures",
                COLUMNS,
                [Row("mean", means, kind="ours"), *rows],
            )
        ],
        galleries=[
            Gallery(
                "coco_examples",
                "Masks over the outlines of the objects",
                "Drawn at random.",
                [
                    [
                        showing.first_line(some, classifier),
                        Line("Mask", "", "what is hidden, red; outlines, white", outlined),
                    ]
                ],
                [showing.ids(some)],
            )
        ],
        notes=["The paper's pictures are not published.", *learning.remarks(study)],
    )


def objects(some: Examples) -> list[NDArray[np.bool_]]:
    """What the objects of each image cover in the network's frame, ``[S, S]`` each."""
    side = some.images.shape[2]
    made = []
    for index, place in zip(some.indices, some.geometries, strict=True):
        region = torch.from_numpy(np.ascontiguousarray(some.source.mask(index)))  # type: ignore[attr-defined]
        H, W = region.shape
        # Each network pixel reads the original pixel under its centre.
        rows = ((torch.arange(side) + 0.5 + place.offset_y) / place.scale_y).long().clamp(0, H - 1)
        columns = (
            ((torch.arange(side) + 0.5 + place.offset_x) / place.scale_x).long().clamp(0, W - 1)
        )
        made.append(region[rows[:, None], columns].numpy())
    return made


def _outlined(picture: showing.Picture, region: NDArray[np.bool_]) -> showing.Picture:
    """The picture with the border of the region in white."""
    scale = len(picture) // len(region)
    large = torch.from_numpy(np.kron(region, np.ones((scale, scale)))).float()[None, None]
    border = F.max_pool2d(large, 3, 1, 1) - large
    return np.where(border[0, 0].numpy()[..., None] > 0, _OUTLINE, picture)


EXPERIMENT = Experiment(
    "coco_examples",
    "masks on COCO over the outlines of the objects (supplement, Figure 10)",
    run,
    paper=SUPPLEMENT,
)
