"""Supplement, Figure 7: what different networks need of the same images.

AlexNet, VGG-16 and GoogLeNet with the default settings, which were chosen for GoogLeNet; AlexNet's
227-pixel images take a mask scale of 7.56 (section 6.3). On the embedded set networks of several
kinds are trained on it first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from casm_fast.experiments import learning, showing
from casm_fast.experiments.examining import explained
from casm_fast.experiments.findings import SUPPLEMENT, Findings, Gallery, Line, Row, Table
from casm_fast.experiments.study import Experiment, Study

IMAGES = {"full": 10, "quick": 8, "smoke": 2}

PAPER = {"alexnet": "AlexNet", "vgg16": "VGG-16", "googlenet": "GoogLeNet"}
ALEXNET_SIDE, ALEXNET_SCALE = 227, 7.56

EMBEDDED = {
    "full": {"compact": "Compact ResNet", "resnet18": "ResNet-18", "squeezenet1_1": "SqueezeNet"},
    "quick": {"compact": "Compact ResNet", "shufflenet_v2_x0_5": "ShuffleNet"},
    "smoke": {"compact": "Compact ResNet"},
}
"""Networks that are trained on the embedded set, by scale."""


def run(study: Study) -> Findings:
    """Learn the masks of the same images for each network."""
    networks = EMBEDDED[study.scale.name] if study.embedded else PAPER
    indices = showing.drawn(study, IMAGES[study.scale.name])
    lines: list[Line] = []
    rows, names = [], []
    for backbone, title in networks.items():
        study.progress(title)
        classifier = explained(study, backbone)
        changes: dict[str, Any] = {}
        if backbone == "alexnet":
            classifier = replace(classifier, size=ALEXNET_SIDE)
            changes = {"mask_scale": ALEXNET_SCALE}
        some = showing.load(study, classifier, indices)
        if not lines:
            lines.append(showing.first_line(some, classifier))
            names = showing.ids(some)
        made = learning.learn(some, classifier, learning.config(study, **changes))
        maps = showing.heat(some, classifier, made.saliency, stretch=False)
        lines.append(Line(title, "", "what is hidden, red", maps))
        rows.append(Row(title, learning.summary(some, made)))
    told = ", ".join(f"{row.name} {100 * (row.ours['salient'] or 0):.0f} %" for row in rows)
    notes = ["The paper's images are not published.", *learning.remarks(study)]
    if study.embedded:
        notes.insert(0, "The paper's three networks have weights for ImageNet alone.")
    return Findings(
        f"What has to be hidden of the same images: {told}.",
        [
            Table(
                "architectures",
                f"Masks of {len(indices)} random images",
                learning.COLUMNS,
                rows,
            )
        ],
        galleries=[
            Gallery(
                "architectures",
                "The same images for different networks",
                "Drawn at random.",
                [lines],
                [names],
            )
        ],
        notes=notes,
    )


EXPERIMENT = Experiment(
    "architectures",
    "masks for AlexNet, VGG-16 and GoogLeNet (supplement, Figure 7)",
    run,
    paper=SUPPLEMENT,
)
