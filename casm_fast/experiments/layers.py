"""Supplement, Figure 8: masks that drop out the activations of inner layers.

AlexNet and VGG-16 with the weights of section 6.4, one pair per layer: the smaller the activation,
which is the mask's size, the stronger the L1 term and the weaker the TV term. On the embedded set
its own network is looked into, with the weights of the VGG-16 layer whose size is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from casm_fast.experiments import learning, showing
from casm_fast.experiments.architectures import ALEXNET_SIDE, PAPER
from casm_fast.experiments.examining import explained
from casm_fast.experiments.findings import SUPPLEMENT, Findings, Gallery, Line, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.models.borrowing import borrowed, find_module
from casm_fast.models.classifier import Classifier
from casm_fast.perturbation import LAYERS, Layer

IMAGES = {"full": 8, "quick": 8, "smoke": 2}

NETWORKS = ("alexnet", "vgg16")
"""The paper's."""

SIZES = {"pool1": 112, "pool2": 56, "pool3": 28, "pool4": 14, "pool5": 7}
"""Sides of VGG-16's activations."""

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Layers of a ResNet, such as the embedded set's network."""


def run(study: Study) -> Findings:
    """Learn a mask for every layer of every network, of the same images."""
    indices = showing.drawn(study, IMAGES[study.scale.name])
    groups, names, rows = [], [], []
    for network in ("compact",) if study.embedded else NETWORKS:
        classifier = explained(study, network)
        if network == "alexnet":
            classifier = replace(classifier, size=ALEXNET_SIDE)
        some = showing.load(study, classifier, indices)
        lines = [showing.first_line(some, classifier)]
        title = PAPER.get(network, "Compact ResNet")
        rows.append(Row(title, kind="head"))
        for name, layer in _layers(network, classifier, some.images[:1]).items():
            study.progress(f"{title}, {name}")
            told = learning.config(
                study,
                "layers",
                lambda_l1=layer.lambda_l1,
                lambda_tv=layer.lambda_tv,
                layer=layer.module,
            )
            made = learning.learn(some, classifier, told)
            maps = showing.heat(some, classifier, made.saliency, stretch=False)
            side = made.masks.shape[-1]
            lines.append(Line(f"{title}, {name}", f"{side}x{side}", "what is dropped, red", maps))
            rows.append(Row(f"{name} ({side} x {side})", learning.summary(some, made)))
        groups.append(lines)
        names.append(showing.ids(some))
    layers = [row for row in rows if row.kind != "head"]
    return Findings(
        f"Dropping out {100 * (layers[0].ours['salient'] or 0):.0f} % of {layers[0].name} to "
        f"{100 * (layers[-1].ours['salient'] or 0):.0f} % of {layers[-1].name} takes the score "
        f"from {layers[0].ours['before'] or 0:.2f} to {layers[0].ours['after'] or 0:.2f} and "
        f"{layers[-1].ours['after'] or 0:.2f}.",
        [
            Table(
                "layers",
                f"Masks of {len(indices)} random images",
                learning.COLUMNS,
                rows,
                note="Salient is the share of places whose activations are dropped out.",
            )
        ],
        galleries=[
            Gallery(
                "layers",
                "Masks of inner layers",
                "Subtracted from 1, so that red marks what is dropped out.",
                groups,
                names,
            )
        ],
        notes=[
            "The exponent of lambda_1 of VGG-16's pool3 is illegible in our copy; 1e-3 lies "
            "between its neighbours.",
            *learning.remarks(study),
        ],
    )


def _layers(network: str, classifier: Classifier, image: Tensor) -> dict[str, Layer]:
    """The layers of a network by the paper's names, with their weights."""
    known = {name: layer for (of, name), layer in LAYERS.items() if of == network}
    if known:
        return known
    sides = _sides(classifier, STAGES, image)
    return {name: _nearest(side)._replace(module=name) for name, side in sides.items()}


def _nearest(side: int) -> Layer:
    """The layer of VGG-16 whose activation is nearest in size."""
    name = min(SIZES, key=lambda one: abs(math.log(SIZES[one] / side)))
    return LAYERS["vgg16", name]


def _sides(classifier: Classifier, modules: Sequence[str], image: Tensor) -> dict[str, int]:
    """Sides of the activations of modules."""
    found: dict[str, int] = {}
    with torch.no_grad(), borrowed(classifier.network) as network:
        for name in modules:

            def note(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
                found[name] = output.shape[-1]

            find_module(network, name).register_forward_hook(note)
        network(image)
    return found


EXPERIMENT = Experiment(
    "layers",
    "masks on the activations of inner layers (supplement, Figure 8)",
    run,
    paper=SUPPLEMENT,
)
