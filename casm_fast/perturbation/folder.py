"""Masks for a photo, a folder or a data set: one picture, mask and row per image, resumable."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from casm_fast.data.journal import Journal
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.source import ImageSource, open_source
from casm_fast.data.subset import Subset
from casm_fast.data.transforms import normalize
from casm_fast.models.classifier import Classifier
from casm_fast.models.placement import choose_device
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.figure import grid, panels
from casm_fast.perturbation.pipeline import perturb
from casm_fast.perturbation.result import Perturbation

logger = logging.getLogger(__name__)

IMAGES = "images"

ON_CPU, ON_GPU = 8, 64
"""Images between two rows that are safe, where batch_size names no number."""

_SPEED = ("batch_size", "memory_budget", "layout", "cuda_graph")  # no row depends on them


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
        source: As `casm_fast.data.open_source` takes it: a photo, a folder, a data set.
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
    images = open_source(source, split="val")
    where = choose_device(device)
    journal = Journal(output, _settings(classifier, images, config, target))
    known = journal.known()
    waiting = [index for index in range(len(images)) if images.image_id(index) not in known]
    count = config.batch_size or (ON_GPU if where.type == "cuda" else ON_CPU)
    home = next(classifier.network.parameters()).device
    classifier.network.to(where)
    try:
        with (
            journal,
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
                fresh: list[dict[str, Any]] = [
                    {"image_id": todo.image_id(index), "error": message}
                    for index, message in batch.errors
                ]
                if batch.indices:
                    pixels = normalize(batch.images.to(where), classifier.mean, classifier.std)
                    targets = _classes(target, todo, batch.indices, classifier)
                    made = perturb(classifier.network, pixels, targets, config)
                    names = [todo.image_id(index) for index in batch.indices]
                    fresh += _written(journal.folder, names, made, pixels, classifier, figures)
                journal.add(fresh)  # pictures and masks are there by now
                bar.update(len(fresh))
    finally:
        classifier.network.to(home)
    return PerturbedSet(journal.folder, tuple(journal.rows), len(waiting))


def _settings(
    classifier: Classifier, images: ImageSource, config: PerturbConfig, target: int | str
) -> dict[str, Any]:
    """What the rows of a folder have in common."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in _SPEED}
    return {
        "source": images.name,
        "model": classifier.name,
        "size": classifier.size,
        "resize_policy": classifier.policy,
        "target": target,
        **options,
    }


def _classes(
    target: int | str, images: ImageSource, indices: Sequence[int], classifier: Classifier
) -> int | list[int] | None:
    if isinstance(target, int):
        return target
    if target == "predicted":
        return None
    labels = [images.label(index) for index in indices]
    return classifier.numbers(labels, images.classes, images.name)


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
        words = classifier.words(classes) if classifier.classes else []
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
