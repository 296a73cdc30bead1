"""Masks for a photo, a folder or a data set: one picture, mask and row per image, resumable."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from casm_fast.data.decoding import decode
from casm_fast.data.geometry import Policy
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.source import ImageSource, open_source
from casm_fast.data.subset import Subset
from casm_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize
from casm_fast.models import checkpoint
from casm_fast.models.encoder import build_encoder
from casm_fast.models.placement import choose_device
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.figure import grid, panels
from casm_fast.perturbation.pipeline import perturb
from casm_fast.perturbation.result import Perturbation

logger = logging.getLogger(__name__)

ROWS, SETTINGS, IMAGES = "rows.jsonl", "settings.json", "images"

ON_CPU, ON_GPU = 8, 64
"""Images between two rows that are safe, where batch_size names no number."""

_SPEED = ("batch_size", "memory_budget")  # no row depends on them


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
    policy: Policy
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class PerturbedSet:
    """What `perturb_set` made.

    Attributes:
        folder: Holds rows.jsonl, settings.json and, in images/, a figure (PNG) and the mask
            ``[h, w]`` float32 (NPY) per image.
        rows: One per image, in the order in which they were done: image_id, targets, names,
            score_before, score_after, score_hidden, diverged, steps, salient (share of the image);
            or image_id and error.
        done: How many were done by this call; the others were there.
    """

    folder: Path
    rows: tuple[dict[str, Any], ...]
    done: int

    def __str__(self) -> str:
        good = [row for row in self.rows if "error" not in row]
        text = f"{len(self.rows):,} images, {self.done:,} of them now -> {self.folder}"
        if good:
            before, after = (np.mean([row[key] for row in good]) for key in _BOTH)
            text += f": score {before:.3f} -> {after:.3f}"
        for count, what in (
            (sum(row["diverged"] for row in good), "diverged"),
            (len(self.rows) - len(good), "unreadable"),
        ):
            text += f", {count:,} {what}" if count else ""
        return text


_BOTH = ("score_before", "score_after")


def open_classifier(
    name: str | Path,
    weights: str | Path | None = "imagenet",
    classes: int = 1000,
    size: int | None = None,
    policy: Policy | None = None,
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


def perturb_set(
    classifier: Classifier,
    source: str | Path | ImageSource,
    output: str | Path,
    config: PerturbConfig | None = None,
    *,
    target: int | str = "predicted",
    device: str = "auto",
    figures: bool = True,
    progress: bool = True,
) -> PerturbedSet:
    """Learn masks for a set of images, and write them as they come.

    Called again with the same output it goes on behind the last row; images that cannot be read
    get a row with their error.

    Args:
        classifier: See `open_classifier`.
        source: A picture file, or what `casm_fast.data.open_source` takes.
        output: Folder; see `PerturbedSet`.
        config: Options; the paper's when not given.
        target: "predicted" (`top_k` best classes), "label" (the image's own), or one class for all.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        figures: Draw twelve panels per image (with a layer: one row of pictures).
        progress: Show a progress bar when the error stream is a terminal.

    Returns:
        All rows, those of earlier calls first.

    Raises:
        FileNotFoundError: The images are not there.
        ValueError: The folder belongs to other settings, labels are asked for and unknown, or as
            `perturb`.
    """
    from tqdm import tqdm

    config = config or PerturbConfig()
    if isinstance(target, str) and target not in ("predicted", "label"):
        raise ValueError(
            f"target: expected 'predicted', 'label' or the number of a class, got {target!r}"
        )
    images = _opened(source)
    where, folder = choose_device(device), Path(output)
    rows = _resumed(folder, _settings(classifier, images, config, target))
    known = {row["image_id"] for row in rows}
    waiting = [index for index in range(len(images)) if images.image_id(index) not in known]
    count = config.batch_size or (ON_GPU if where.type == "cuda" else ON_CPU)
    home = next(classifier.network.parameters()).device
    classifier.network.to(where)
    try:
        with (
            (folder / ROWS).open("a", encoding="utf-8") as file,
            tqdm(
                total=len(images),
                initial=len(images) - len(waiting),
                unit="img",
                desc="perturb",
                disable=None if progress else True,
            ) as bar,
        ):
            todo = Subset(images, waiting)
            for batch in evaluation_batches(
                todo, size=classifier.size, batch_size=count, policy=classifier.policy
            ):
                fresh = [
                    {"image_id": todo.image_id(index), "error": message}
                    for index, message in batch.errors
                ]
                if batch.indices:
                    pixels = normalize(batch.images.to(where), classifier.mean, classifier.std)
                    targets = _classes(target, todo, batch.indices, classifier)
                    made = perturb(classifier.network, pixels, targets, config)
                    names = [todo.image_id(index) for index in batch.indices]
                    fresh += _written(folder, names, made, pixels, classifier, figures)
                for row in fresh:  # pictures and masks are there by now
                    file.write(json.dumps(row) + "\n")
                file.flush()
                rows += fresh
                bar.update(len(fresh))
    finally:
        classifier.network.to(home)
    return PerturbedSet(folder, tuple(rows), len(waiting))


class _Photo:
    """A single picture as an `ImageSource`."""

    classes: Sequence[str] = ()
    has_boxes = False

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def __len__(self) -> int:
        return 1

    def image_id(self, index: int) -> str:
        return self.path.name

    def image(self, index: int) -> NDArray[np.uint8]:
        return decode(self.path)

    def label(self, index: int) -> int:
        return -1

    def boxes(self, index: int) -> NDArray[np.int32]:
        return np.zeros((0, 4), np.int32)


def _opened(source: str | Path | ImageSource) -> ImageSource:
    if isinstance(source, (str, Path)) and Path(source).is_file():
        return _Photo(Path(source))
    return open_source(source, split="val")


def _settings(
    classifier: Classifier, images: ImageSource, config: PerturbConfig, target: int | str
) -> dict[str, Any]:
    """What the rows of a folder have in common."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in _SPEED}
    settings = {
        "source": images.name,
        "model": classifier.name,
        "size": classifier.size,
        "resize_policy": classifier.policy,
        "target": target,
        **options,
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _resumed(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are there; a row that an interruption cut is taken away."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if not path.exists():
        _replace(path, json.dumps(settings, indent=1) + "\n")
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"output: expected a folder of the same settings, got {folder} with {name} "
                f"{before.get(name)!r} instead of {value!r}; give another folder"
            )
    if not (folder / ROWS).exists():
        return []
    text = (folder / ROWS).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        _replace(folder / ROWS, whole)
    return [json.loads(line) for line in whole.splitlines()]


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _classes(
    target: int | str, images: ImageSource, indices: Sequence[int], classifier: Classifier
) -> int | list[int] | None:
    if isinstance(target, int):
        return target
    if target == "predicted":
        return None
    labels = [images.label(index) for index in indices]
    if min(labels) < 0:
        raise ValueError(
            f"target: expected labelled images for 'label', got {images.name} without; "
            "ask for 'predicted' or a class"
        )
    # Names tell which logit a label means. Other names for as many classes are in the same order,
    # such as ImageNet's ids, which torchvision writes out as words.
    if images.classes and set(images.classes) <= set(classifier.classes):
        return [classifier.classes.index(images.classes[label]) for label in labels]
    if classifier.classes and len(images.classes) != len(classifier.classes):
        raise ValueError(
            f"target: expected the {len(classifier.classes)} classes of the classifier for "
            f"'label', got {len(images.classes)} with other names; ask for 'predicted' or a class"
        )
    return labels


def _written(
    folder: Path,
    names: list[str],
    made: Perturbation,
    images: Tensor,
    classifier: Classifier,
    figures: bool,
) -> list[dict[str, Any]]:
    """The rows of a batch, once its masks and figures are written."""
    rows = []
    mean, std = classifier.mean, classifier.std
    for place, name in enumerate(names):
        path = folder / IMAGES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_name(path.name + ".npy"), made.masks[place, 0].float().cpu().numpy())
        classes = [one for one in made.targets[place].tolist() if one >= 0]
        words = [classifier.classes[one] for one in classes] if classifier.classes else []
        before, after = float(made.score_before[place]), float(made.score_after[place])
        title = f"{name}: {', '.join(words or map(str, classes))}, {before:.3f} → {after:.3f}"
        picture = path.with_name(path.name + ".png")
        if figures and made.perturbed is not None:
            panels(made, images, picture, index=place, title=title, mean=mean, std=std)
        elif figures:
            one = torch.tensor([place], device=images.device)
            grid(made.select(one), images[one], picture, mean=mean, std=std)
        rows.append(
            {
                "image_id": name,
                "targets": classes,
                "names": words,
                "score_before": before,
                "score_after": after,
                "score_hidden": float(made.score_hidden[place]),
                "diverged": bool(made.diverged[place]),
                "steps": int(made.steps[place]),
                "salient": float(made.saliency[place].mean()),
            }
        )
    return rows
