"""Saliency maps for a photo, a folder or a data set: a picture, maps and a row per image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from casm_fast.attribution.figure import comparison
from casm_fast.attribution.methods import METHODS
from casm_fast.attribution.pipeline import attribute, find
from casm_fast.attribution.problem import Score
from casm_fast.data.journal import Journal
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.source import ImageSource, open_source
from casm_fast.data.subset import Subset
from casm_fast.data.transforms import normalize
from casm_fast.models.classifier import Classifier
from casm_fast.models.placement import choose_device

logger = logging.getLogger(__name__)

IMAGES = "images"

ON_CPU, ON_GPU = 8, 64
"""Images between two rows that are safe."""


@dataclass(frozen=True)
class AttributedSet:
    """What `attribute_set` made.

    Attributes:
        folder: Holds rows.jsonl, settings.json and, in images/, a picture (PNG) and the maps (NPZ,
            ``[H, W]`` float32 by method, in pixels of what the classifier saw) per image.
        rows: One per image, in the order in which they were done: image_id, target, name,
            peaks (x, y of each map's highest point); or image_id and error.
        done: How many were done by this call; the others were there.
    """

    folder: Path
    rows: tuple[dict[str, Any], ...]
    done: int

    def __str__(self) -> str:
        failed = sum("error" in row for row in self.rows)
        note = f", {failed:,} unreadable" if failed else ""
        return f"{len(self.rows):,} images, {self.done:,} of them now -> {self.folder}{note}"


def attribute_set(
    classifier: Classifier,
    source: str | Path | ImageSource,
    output: str | Path,
    methods: Sequence[str] = ("grad_cam",),
    *,
    target: int | str = "predicted",
    score: Score | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    figures: bool = True,
    progress: bool = True,
    **options: Any,
) -> AttributedSet:
    """Make saliency maps for a set of images, and write them as they come.

    Called again with the same output it goes on behind the last row; images that cannot be read
    get a row with their error.

    Args:
        classifier: See `casm_fast.models.open_classifier`.
        source: As `casm_fast.data.open_source` takes it: a photo, a folder, a data set.
        output: Folder; see `AttributedSet`.
        methods: Names out of `METHODS`; ("all",) takes every one that the classifier allows, and
            says why others are left out.
        target: "predicted" (the best class), "label" (the image's own), or one class for all.
        score: What is explained, see `attribute`; None: what each method's paper explains.
        batch_size: Images in one pass, see `attribute`.
        seed: Of random numbers.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        figures: Draw one picture per image, with all maps.
        progress: Show a progress bar when the error stream is a terminal.
        **options: Of the method, where there is one alone.

    Returns:
        All rows, those of earlier calls first.

    Raises:
        FileNotFoundError: The images are not there.
        ValueError: There is no such method, the folder belongs to other settings, labels are asked
            for and unknown, or as `attribute`.
    """
    from tqdm import tqdm

    if isinstance(target, str) and target not in ("predicted", "label"):
        raise ValueError(
            f"target: expected 'predicted', 'label' or the number of a class, got {target!r}"
        )
    if not methods:
        raise ValueError(f"methods: expected one at least, got none of {', '.join(METHODS)}")
    if "all" in methods and len(methods) > 1:
        raise ValueError(f"methods: expected 'all' alone, got {', '.join(methods)}")
    for method in methods:
        if method != "all":
            find(method)
    if options and (len(methods) > 1 or "all" in methods):
        raise ValueError(
            f"options: expected none beside several methods, got {', '.join(options)}; "
            "ask for one method at a time"
        )
    images = open_source(source, split="val")
    where = choose_device(device)
    settings = {
        "source": images.name,
        "model": classifier.name,
        "size": classifier.size,
        "resize_policy": classifier.policy,
        "methods": list(methods),
        "target": target,
        "score": score,
        "seed": seed,
        "options": {name: str(value) for name, value in options.items()},
    }
    journal = Journal(output, settings)
    known = journal.known()
    waiting = [index for index in range(len(images)) if images.image_id(index) not in known]
    todo = Subset(images, waiting)
    home = next(classifier.network.parameters()).device
    whole = classifier.saliency or classifier.network
    whole.to(where)
    active = list(METHODS) if "all" in methods else list(methods)

    def make(pixels: Tensor, targets: list[int]) -> dict[str, Tensor]:
        asked = None if target == "predicted" else targets
        made = {}
        for name in tuple(active):
            try:
                own = classifier.saliency if name == "casm" else None
                made[name] = attribute(
                    name,
                    classifier.network if own is None else own,
                    pixels,
                    asked,
                    score=score,
                    batch_size=batch_size,
                    seed=seed,
                    **options,
                )
            except ValueError as error:
                if "all" not in methods:
                    raise
                active.remove(name)
                logger.warning("left out: %s", error)
        return made

    try:
        with (
            journal,
            tqdm(
                total=len(images),
                initial=len(images) - len(waiting),
                unit="img",
                desc="attribute",
                disable=None if progress else True,
            ) as bar,
        ):
            for batch in evaluation_batches(
                todo,
                size=classifier.size,
                batch_size=ON_GPU if where.type == "cuda" else ON_CPU,
                policy=classifier.policy,
            ):
                fresh: list[dict[str, Any]] = [
                    {"image_id": todo.image_id(index), "error": message}
                    for index, message in batch.errors
                ]
                if batch.indices:
                    pixels = normalize(batch.images.to(where), classifier.mean, classifier.std)
                    targets = _targets(target, todo, batch.indices, classifier, pixels)
                    maps = make(pixels, targets)
                    names = [todo.image_id(index) for index in batch.indices]
                    fresh += _written(
                        journal.folder, names, targets, maps, pixels, classifier, figures
                    )
                journal.add(fresh)  # pictures and maps are there by now
                bar.update(len(fresh))
    finally:
        whole.to(home)
    return AttributedSet(journal.folder, tuple(journal.rows), len(waiting))


def _targets(
    target: int | str,
    images: ImageSource,
    indices: Sequence[int],
    classifier: Classifier,
    pixels: Tensor,
) -> list[int]:
    """The class of each image that is explained."""
    if isinstance(target, int):
        return [target] * len(indices)
    if target == "label":
        labels = [images.label(index) for index in indices]
        return classifier.numbers(labels, images.classes, images.name)
    return classifier.predict(pixels)


def _written(
    folder: Path,
    names: Sequence[str],
    targets: Sequence[int],
    maps: dict[str, Tensor],
    pixels: Tensor,
    classifier: Classifier,
    figures: bool,
) -> list[dict[str, Any]]:
    """The rows of a batch, once its maps and pictures are written."""
    width = pixels.shape[3]
    peaks = {
        method: [divmod(one, width)[::-1] for one in values.flatten(1).argmax(dim=1).tolist()]
        for method, values in maps.items()
    }
    rows = []
    for place, (name, number) in enumerate(zip(names, targets, strict=True)):
        path = folder / IMAGES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            method: values[place, 0].float().cpu().numpy() for method, values in maps.items()
        }
        np.savez_compressed(path.with_name(path.name + ".npz"), **arrays)
        (word,) = classifier.words([number])
        if figures:
            one = slice(place, place + 1)
            comparison(
                pixels[one],
                {method: values[one] for method, values in maps.items()},
                path.with_name(path.name + ".png"),
                titles=[word],
                mean=classifier.mean,
                std=classifier.std,
            )
        rows.append(
            {
                "image_id": name,
                "target": number,
                "name": word,
                "peaks": {method: list(points[place]) for method, points in peaks.items()},
            }
        )
    return rows
