"""A classifier by name or from a file, and what its images must be like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from casm_fast.models import checkpoint
from casm_fast.models.borrowing import as_logits
from casm_fast.models.encoder import build_encoder
from casm_fast.models.saliency import IMAGENET_MEAN, IMAGENET_STD, ResizePolicy, SaliencyModel


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
        saliency: The CASM model that it belongs to, where it was opened from a checkpoint.
    """

    name: str
    network: nn.Module
    size: int
    policy: ResizePolicy
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    saliency: SaliencyModel | None = None

    def numbers(self, labels: Sequence[int], names: Sequence[str], images: str) -> list[int]:
        """Which logit each label of a set of images means.

        By name where the set's names are the classifier's. Other names for as many classes are in
        the same order, such as ImageNet's ids, which torchvision writes out as words.

        Args:
            labels: Of the images, by the set's numbering.
            names: The set's classes; () when unknown.
            images: What error messages call the set.

        Raises:
            ValueError: An image has no label, or the classes are others.
        """
        if min(labels) < 0:
            raise ValueError(
                f"target: expected labelled images for 'label', got {images} without; "
                "ask for 'predicted' or a class"
            )
        if names and set(names) <= set(self.classes):
            return [self.classes.index(names[label]) for label in labels]
        if self.classes and len(names) != len(self.classes):
            raise ValueError(
                f"target: expected the {len(self.classes)} classes of the classifier for "
                f"'label', got {len(names)} with other names; ask for 'predicted' or a class"
            )
        return list(labels)

    def predict(self, images: Tensor) -> list[int]:
        """The best class of each image.

        Args:
            images: ``[B, 3, H, W]``, normalised, on the device of the network.
        """
        with torch.inference_mode():
            answer = as_logits(self.network(images), len(images))
        best: list[int] = answer.argmax(dim=1).tolist()
        return best

    def words(self, targets: Sequence[int]) -> list[str]:
        """What classes are called; their numbers where no names are known."""
        return [self.classes[one] if self.classes else str(one) for one in targets]


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
            model,
        )
    network = build_encoder(str(name), classes=classes, weights=weights).backbone.eval()
    names: tuple[str, ...] = ()
    if weights is not None and str(name) in torchvision.models.list_models():
        known = torchvision.models.get_model_weights(str(name)).__members__.values()
        named = [tuple(one.meta["categories"]) for one in known if "categories" in one.meta]
        names = named[0] if named and len(named[0]) == classes else ()
    side, how = size or 224, policy or "crop"
    return Classifier(str(name), network, side, how, IMAGENET_MEAN, IMAGENET_STD, names)
