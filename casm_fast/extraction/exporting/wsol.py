"""Score maps for wsolevaluation (Choe et al. 2020), which finds its boxes itself.

``ID.npy`` is an array ``[224, 224]`` float64 in [0, 1] over the **whole** picture, squashed to a
square, as its evaluator takes it (``--scoremap_root``): each map less its minimum, then divided by
its maximum; zeros where it is constant. ID is the one of its image_ids.txt: of a WsolSource's
images as it is, of ImageNet's validation images ``val/ILSVRC2012_val_00000001.JPEG``.

A model that was trained on centre crops sees no more than the crop: what lies outside is 0, the
lowest value. A pixel reads the cell that its centre falls into, as everywhere in casm_fast.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from casm_fast.data.geometry import Geometry, geometry
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.source import locate
from casm_fast.data.subset import Subset
from casm_fast.data.transforms import normalize
from casm_fast.extraction.exporting.job import Job
from casm_fast.extraction.exporting.writing import new_folder
from casm_fast.models import checkpoint
from casm_fast.models.modes import evaluating
from casm_fast.models.saliency import SaliencyModel

SIDE = 224
"""Of wsolevaluation's square (its ``_RESIZE_LENGTH``)."""

_BATCH = 64


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write the maps of the images that could be read: those stored, else the model's.

    Args:
        job: What, and the model.
        output: A new or empty folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is not empty.
        FileNotFoundError: The images or the checkpoint are no longer there.
        ValueError: The model did not make the table, or there is none.
    """
    stored = None if job.model is not None or job.folder is None else StoredMaps.of(job.folder)
    maps = _made(job, _model(job)) if stored is None else _stored(job, stored)
    with new_folder(output) as root:
        for identity, plane in maps:
            path = root / f"{identity}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, plane)
    return (output,)


def spread(saliency: NDArray[np.float32], where: Geometry, size: int) -> NDArray[np.float64]:
    """A map of what the network saw as a score map of the whole picture.

    Args:
        saliency: ``[h, w]`` of the network's square.
        where: From the picture to that square.
        size: Side of the network's square in pixels.

    Returns:
        ``[224, 224]`` in [0, 1].
    """
    low, high = float(saliency.min()), float(saliency.max())
    if not high > low:
        return np.zeros((SIDE, SIDE))
    scaled = (saliency.astype(np.float64) - low) / (high - low)
    centres = (np.arange(SIDE) + 0.5) / SIDE
    y = centres * where.height * where.scale_y - where.offset_y  # in network pixels
    x = centres * where.width * where.scale_x - where.offset_x
    seen = ((y >= 0) & (y < size))[:, None] & ((x >= 0) & (x < size))
    rows = _cells(y * saliency.shape[0] / size, saliency.shape[0])
    columns = _cells(x * saliency.shape[1] / size, saliency.shape[1])
    return np.where(seen, scaled[rows[:, None], columns], 0.0)


def _cells(places: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.clip(np.floor(places), 0, count - 1).astype(np.int64)


@dataclass(frozen=True)
class StoredMaps:
    """Saliency maps beside the rows of an extraction, by the place of the row.

    Attributes:
        arrays: First place and place behind the last of each file ``masks-START-STOP.npy``, and it.
        pictures: The folder of ``000012/000012345.png``, 8-bit grey.
    """

    arrays: tuple[tuple[int, int, Path], ...]
    pictures: Path

    @classmethod
    def of(cls, folder: Path) -> StoredMaps | None:
        """The maps in the folder of an extraction; None where there are none."""
        named = ((_ARRAY.fullmatch(path.name), path) for path in folder.iterdir())
        arrays = sorted((int(name[1]), int(name[2]), path) for name, path in named if name)
        pictures = folder / "masks"
        return cls(tuple(arrays), pictures) if arrays or pictures.is_dir() else None

    def read(self, places: Iterable[int]) -> Iterator[NDArray[np.float32]]:
        """The maps ``[h, w]`` at ascending places.

        Raises:
            FileNotFoundError: There is none at a place.
        """
        from PIL import Image

        waiting = list(self.arrays)
        held: tuple[int, int, NDArray[Any]] = (0, 0, np.zeros(0))
        for place in places:
            while waiting and place >= held[1]:
                start, stop, path = waiting.pop(0)
                held = (start, stop, np.load(path, mmap_mode="r"))
            if held[0] <= place < held[1]:
                yield np.asarray(held[2][place - held[0]], np.float32)
                continue
            path = self.pictures / f"{place // 1000:06d}" / f"{place:09d}.png"
            if not path.is_file():
                raise FileNotFoundError(
                    f"export: expected the map of row {place} in {path.parent.parent.parent}, got "
                    "none; give a `model`, which makes it again"
                )
            with Image.open(path) as picture:
                yield (np.asarray(picture) / 255).astype(np.float32)


_ARRAY = re.compile(r"masks-(\d+)-(\d+)\.npy")


def _stored(job: Job, maps: StoredMaps) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """The ids of the readable images and their score maps, from the maps that were stored."""
    convention = job.description.convention
    good = [(place, row) for place, row in enumerate(job.rows()) if row["error"] is None]
    planes = maps.read(place for place, _ in good)
    for (_, row), plane in zip(good, planes, strict=True):
        where = geometry(row["height"], row["width"], convention.size, convention.policy)
        yield _identity(row["image_id"], job), spread(plane, where, convention.size)


def _made(job: Job, model: SaliencyModel) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """The ids of the readable images and their score maps, from the model."""
    convention = job.description.convention
    names = [row["image_id"] for row in job.rows() if row["error"] is None]
    chosen = Subset(job.source, np.array(locate(job.source, names), np.int64))
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        for batch in evaluation_batches(
            chosen, size=convention.size, batch_size=_BATCH, policy=convention.policy
        ):
            if batch.errors:
                place, error = batch.errors[0]
                raise ValueError(f"export: expected to read {names[place]} again, got: {error}")
            images = normalize(batch.images.to(device), model.mean, model.std)
            planes = model(images)[0][:, 0].float().cpu().numpy()
            for index, plane, where in zip(batch.indices, planes, batch.geometries, strict=True):
                yield _identity(names[index], job), spread(plane, where, convention.size)


def _identity(name: str, job: Job) -> str:
    return f"val/{name}.JPEG" if job.description.source.startswith("imagenet-val:") else name


def _model(job: Job) -> SaliencyModel:
    """The model that made the table."""
    model = job.model if job.model is not None else job.description.checkpoint
    if model is None:
        raise ValueError(
            "export: expected `model` for wsol-npy, because the table was made by a model in "
            "memory, got None"
        )
    if not isinstance(model, SaliencyModel):
        model = checkpoint.load(model)
    if job.description.model and checkpoint.fingerprint(model) != job.description.model:
        raise ValueError(
            "export: expected the model that made the boxes, got one with other weights; give it "
            "as `model`"
        )
    return model
