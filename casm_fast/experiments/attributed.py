"""Other methods in CASM's Table 1: their maps of the classifier f(0), as boxes by CASM's geometry.

Shorter side to the network's size and centre crop, the largest 4-connected component of the pixels
at alpha times the mean or above, IoU above 0.5 with the best true box. Alpha is tuned for each
method on held-out training images over the grid 0, 0.5, ... 10 of Fong & Vedaldi, since maps that
are no masks have no natural threshold. Each map is stretched to [0, 1] first. The methods are told
the class, as in the published figures.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from casm_fast.attribution import shade, train_real_time
from casm_fast.data import localization
from casm_fast.evaluation.weak_localisation import GRIDS
from casm_fast.experiments.examining import Entry, Examples, explained, pretrained, records, spread
from casm_fast.experiments.study import Study
from casm_fast.models import Encoder, build_encoder
from casm_fast.models.classifier import Classifier
from casm_fast.ops import mask_boxes

HELD_OUT = {"full": 2000, "quick": 40, "smoke": 8}
"""Training images that alpha is tuned on."""

SCORED = {"full": None, "quick": 80, "smoke": 8}
"""Validation images; all when None."""

NETWORK = "resnet50"
"""The classifier of the paper."""

GRID = GRIDS["mean"]

REAL_TIME: dict[str, dict[str, Any]] = {
    "full": {},
    "quick": {"selector_steps": 60, "mask_steps": 60, "selector_batch": 32, "mask_batch": 32},
    "smoke": {"selector_steps": 2, "mask_steps": 2, "selector_batch": 4, "mask_batch": 4},
}
"""The training of real-time saliency, by scale."""


def scores(study: Study, method: Entry) -> dict[str, float | None]:
    """LE, OM, F1 and the mean of the stretched map of one method.

    Args:
        study: Whose images.
        method: Of `casm_fast.attribute`.
    """
    classifier = explained(study, None if study.embedded else NETWORK, policy="crop")
    method = method.at(study.scale.name)
    if method.method == "real_time":
        method = _trained(study, method)
    held_out = spread(len(study.training), HELD_OUT[study.scale.name])
    images = min(study.limit, SCORED[study.scale.name] or study.limit)
    found = {}
    for part, source, indices in (
        ("held-out", study.training, held_out),
        ("scored", study.validation, list(range(images))),
    ):
        found[part] = records(
            study,
            f"{method.name}-{part}",
            classifier,
            source,
            indices,
            partial(_measured, method, classifier),
            options={name: str(value) for name, value in method.options.items() if name != "model"},
        )
    right = {
        part: np.array([[bit == "1" for bit in row["found"]] for row in rows])
        for part, rows in found.items()
    }
    best = int(right["held-out"].mean(axis=0).argmax())
    known = np.array([row["recognised"] for row in found["scored"]])
    good = right["scored"][:, best]
    return {
        "le": float(1 - good.mean()),
        "om": float(1 - (good & known).mean()),
        "f1": float(np.mean([row["f1"] for row in found["scored"]])),
        "mean_saliency": float(np.mean([row["mean"] for row in found["scored"]])),
        "alpha": GRID[best],
    }


def _measured(method: Entry, classifier: Classifier, some: Examples) -> list[dict[str, Any]]:
    """For each image with a true box: whether each alpha's box is right, and more."""
    maps = shade(some.maps(method, classifier)).float()
    guesses = classifier.predict(some.images)
    truth = [
        geometry.to_network(some.boxes(place)) for place, geometry in enumerate(some.geometries)
    ]
    bits = []
    for alpha in GRID:
        boxes, _ = mask_boxes(maps, rule="mean", alpha=alpha)
        overlap = localization.iou(boxes.cpu().numpy(), truth)
        bits.append(overlap > localization.THRESHOLD)
    made = []
    planes = maps[:, 0].double().cpu().numpy()
    for place, (plane, true) in enumerate(zip(planes, truth, strict=True)):
        if not len(true):
            continue
        H, W = plane.shape
        held = [
            float(plane[y0:y1, x0:x1].sum())
            for x0, y0, x1, y1 in true.clip(0, [W, H, W, H]).tolist()
        ]
        total = np.full(len(true), plane.sum())
        f1 = localization.f1(np.array(held), total, localization.area(true))
        made.append(
            {
                "found": "".join("1" if bit[place] else "0" for bit in bits),
                "recognised": guesses[place] == some.targets[place],
                "f1": float(f1.max()),
                "mean": float(plane.mean()),
            }
        )
    return made


def _trained(study: Study, method: Entry) -> Entry:
    """Real-time saliency with the masking network of this study, trained once."""
    folder = study.output / "runs" / "real_time"
    classifier: Encoder | Path
    if pretrained(study):
        weights = study.settings.get("weights") or "imagenet"
        classifier = build_encoder(NETWORK, classes=len(study.training.classes), weights=weights)
    else:
        run = study.classifier()
        classifier = run.checkpoint
        folder = folder.with_name(f"real_time-{run.folder.name.rpartition('-')[2]}")
    made = train_real_time(
        classifier,
        study.training,
        output=folder,
        resume=folder.exists(),
        device=study.device,
        **REAL_TIME[study.scale.name],
    )
    return replace(method, options={**method.options, "model": str(made.checkpoint)})
