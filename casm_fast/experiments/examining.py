"""What the experiments on the supplement share: a classifier, images, and methods to explain it.

The supplement explains torchvision's GoogLeNet on ImageNet, whose images are squashed to 224x224.
On another data set nobody has weights for it: there the data set's own network is explained, which
is trained once for all experiments of a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.attribution import METHODS, attribute
from casm_fast.data.geometry import Geometry
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.source import ImageSource
from casm_fast.data.subset import Subset
from casm_fast.data.transforms import normalize
from casm_fast.experiments.study import IMAGENET_CLASSES, Study
from casm_fast.models.classifier import Classifier, open_classifier
from casm_fast.models.placement import choose_device
from casm_fast.models.saliency import ResizePolicy

NETWORK = "googlenet"
"""The network that the supplement explains."""

CHUNK = 200
"""Images of a cell: so many are done again at most when the work was stopped."""

BATCH = 32
"""Images at once; what a method makes of them is cut to the memory by `attribute`."""

CHEAPER: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "meaningful_perturbation": {"steps": 60},
        "extremal_perturbation": {"steps": 120},
        "guided_inversion": {"steps": 30},
        "occlusion": {"stride": 4},
        "blur_occlusion": {"stride": 4},
        "variable_occlusion": {"count": 256},
        "rise": {"masks": 400},
    },
    "smoke": {
        "meaningful_perturbation": {"steps": 2},
        "extremal_perturbation": {"steps": 2},
        "guided_inversion": {"steps": 2},
        "occlusion": {"stride": 8},
        "blur_occlusion": {"stride": 8},
        "variable_occlusion": {"count": 10},
        "rise": {"masks": 4},
    },
}
"""Options that make methods cheaper, by scale."""


@dataclass(frozen=True)
class Entry:
    """A method as an experiment uses it.

    Attributes:
        name: Unique among an experiment's; names its cells.
        title: For people.
        method: Of `attribute`.
        options: Of the method.
        own_class: Whether each image's own class is explained; else what the method takes by
            itself.
    """

    name: str
    title: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    own_class: bool = True

    def at(self, scale: str) -> Entry:
        """The same with the options of a scale, where the experiment names none."""
        cheaper = CHEAPER.get(scale, {}).get(self.method, {})
        return replace(self, options={**cheaper, **self.options})


def entry(method: str, title: str = "", **options: Any) -> Entry:
    """A method by its own name."""
    return Entry(method, title or METHODS[method].title, method, options)


@dataclass(frozen=True)
class Examples:
    """A batch of images as the classifier sees them.

    Attributes:
        source: Where they are from.
        indices: Their places in it.
        images: ``[B, 3, S, S]``, normalised, on the device.
        targets: The logit of each image's own label.
        geometries: Where each image's pixels went.
    """

    source: ImageSource
    indices: Sequence[int]
    images: Tensor
    targets: Sequence[int]
    geometries: Sequence[Geometry]

    def boxes(self, place: int) -> NDArray[np.int32]:
        """The true boxes of an image, ``[n, 4]``, in its own pixels."""
        return self.source.boxes(self.indices[place])

    def maps(self, entry: Entry, classifier: Classifier) -> Tensor:
        """A method's maps, ``[B, 1, S, S]``."""
        return attribute(
            entry.method,
            classifier.network,
            self.images,
            list(self.targets) if entry.own_class else None,
            **entry.options,
        )


def explained(
    study: Study, backbone: str | None = None, policy: ResizePolicy = "squash"
) -> Classifier:
    """The classifier that is explained, on the device of the study.

    Args:
        study: Whose data and settings.
        backbone: Another architecture than the experiments' own.
        policy: How pictures become squares.
    """
    wanted = backbone or study.settings.get("backbone")
    weights = study.settings.get("weights")
    if pretrained(study):
        opened = open_classifier(
            wanted or NETWORK,
            weights or "imagenet",
            classes=len(study.validation.classes),
            policy=policy,
        )
    else:
        settings: dict[str, Any] = {"backbone": wanted} if wanted else {}
        run = study.classifier(**settings)
        opened = open_classifier(run.checkpoint, policy=policy)
    opened.network.to(choose_device(study.device))
    return opened


def pretrained(study: Study) -> bool:
    """Whether there are weights for the data set: ImageNet's, or those that the caller names."""
    known = len(study.validation.classes) == IMAGENET_CLASSES
    return not study.embedded and (known or bool(study.settings.get("weights")))


def examples(
    study: Study, classifier: Classifier, source: ImageSource, indices: Sequence[int]
) -> Iterator[Examples]:
    """Images of a source in batches, in order; those that cannot be read are left out."""
    chosen = Subset(source, indices)
    device = choose_device(study.device)
    for batch in evaluation_batches(
        chosen,
        size=classifier.size,
        batch_size=BATCH,
        policy=classifier.policy,
        workers=study.workers,
    ):
        if not batch.indices:
            continue
        places = [indices[index] for index in batch.indices]
        labels = [source.label(place) for place in places]
        yield Examples(
            source,
            places,
            normalize(batch.images.to(device), classifier.mean, classifier.std),
            classifier.numbers(labels, source.classes, source.name),
            batch.geometries,
        )


def spread(images: int, count: int) -> list[int]:
    """Places that are spread evenly over a set, and so over its classes."""
    count = min(count, images)
    return [place * images // count for place in range(count)]


def records(
    study: Study,
    name: str,
    classifier: Classifier,
    source: ImageSource,
    indices: Sequence[int],
    measure: Callable[[Examples], list[dict[str, Any]]],
    **depends: Any,
) -> list[dict[str, Any]]:
    """One record per image, in cells that are done once.

    Args:
        study: Keeps the cells.
        name: Of the cells.
        classifier: What is explained; the cells depend on it.
        source: Images.
        indices: Which of them.
        measure: Gives the records of a batch, as JSON values.
        **depends: What else the records depend on, as JSON values.

    Returns:
        The records, in the order of the indices.
    """
    found: list[dict[str, Any]] = []
    for start in range(0, len(indices), CHUNK):
        part = list(indices[start : start + CHUNK])
        study.progress(f"{name}: images {start + 1:,} to {start + len(part):,} of {len(indices):,}")
        found += study.cell(
            f"{name}-{start:06d}",
            partial(_measured, study, classifier, source, part, measure),
            classifier=classifier.name,
            source=source.name,
            indices=part,
            **depends,
        )
    return found


def _measured(
    study: Study,
    classifier: Classifier,
    source: ImageSource,
    indices: Sequence[int],
    measure: Callable[[Examples], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for batch in examples(study, classifier, source, indices):
        made += measure(batch)
    return made
