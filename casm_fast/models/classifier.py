"""A classifier by name or from a file, and what its images must be like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torchvision
from torch import nn

from casm_fast.models import checkpoint
from casm_fast.models.encoder import build_encoder
from casm_fast.models.saliency import IMAGENET_MEAN, IMAGENET_STD, ResizePolicy


@dataclass(frozen=True)
class Classifier:
    """A classifier and what its images must be like.

    Attributes:
        name: As it was asked for.
        network: In eval mode.
        size: Side of its images in pixels.
        policy: How pictures become squares.
        mean: Of the normalisation.
        std: Of the normalisation.
        classes: Names by label; () when unknown.
    """

    name: str
    network: nn.Module
    size: int
    policy: ResizePolicy
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


def open_classifier(
    name: str | Path,
    weights: str | Path | None = "imagenet",
    classes: int = 1000,
    size: int | None = None,
    policy: ResizePolicy | None = None,
) -> Classifier:
    """A classifier by name or from a file.

    Args:
        name: An architecture (see `casm_fast.models.build_encoder`), or a checkpoint or run folder
            of casm_fast, whose classifier it is.
        weights: Of an architecture: "imagenet", another name of torchvision's, a file, or None.
        classes: Of an architecture.
        size: Side of the images; None: 224, or as the checkpoint was trained.
        policy: None: "crop", or as the checkpoint was trained.

    Raises:
        FileNotFoundError: Weights that are neither a known name nor a file.
        ValueError: There is no such architecture, or the weights are another's.
    """
    if Path(name).exists():
        model = checkpoint.load(Path(name))
        return Classifier(
            str(name),
            model.classifier.backbone.eval(),
            size or model.input_size,
            policy or model.resize_policy,
            model.mean,
            model.std,
            model.classes,
        )
    network = build_encoder(str(name), classes=classes, weights=weights).backbone.eval()
    names: tuple[str, ...] = ()
    if weights is not None and str(name) in torchvision.models.list_models():
        known = torchvision.models.get_model_weights(str(name)).__members__.values()
        named = [tuple(one.meta["categories"]) for one in known if "categories" in one.meta]
        names = named[0] if named and len(named[0]) == classes else ()
    side, how = size or 224, policy or "crop"
    return Classifier(str(name), network, side, how, IMAGENET_MEAN, IMAGENET_STD, names)
