"""The saliency maps behind the rows of a table: those that were kept, else the model's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from casm_fast.data.geometry import Geometry, geometry
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.predictions import Convention
from casm_fast.data.source import locate
from casm_fast.data.subset import Subset
from casm_fast.data.transforms import normalize
from casm_fast.extraction.exporting.job import Job, Row
from casm_fast.models import checkpoint
from casm_fast.models.modes import evaluating
from casm_fast.models.saliency import SaliencyModel

_BATCH = 64


class Mapped(NamedTuple):
    """A row and its map.

    Attributes:
        row: Of an image that could be read.
        saliency: ``[h, w]`` of the network's square.
        where: From the picture to that square.
    """

    row: Row
    saliency: NDArray[np.float32]
    where: Geometry


def maps_of(job: Job) -> Iterator[Mapped]:
    """The rows of the images that could be read, in order, with their maps.

    Raises:
        FileNotFoundError: The images, a map or the checkpoint are no longer there.
        ValueError: The model did not make the table, or there is none.
    """
    from tqdm import tqdm

    stored = None if job.model is not None or job.folder is None else StoredMaps.of(job.folder)
    made = _made(job, _model(job)) if stored is None else _stored(job, stored)
    return iter(tqdm(made, "export", len(job.table), unit="img", disable=None))


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


def _stored(job: Job, maps: StoredMaps) -> Iterator[Mapped]:
    convention = job.description.convention
    good = [(place, row) for place, row in enumerate(job.rows()) if row["error"] is None]
    planes = maps.read(place for place, _ in good)
    for (_, row), plane in zip(good, planes, strict=True):
        yield Mapped(row, plane, _geometry(row, convention))


def _made(job: Job, model: SaliencyModel) -> Iterator[Mapped]:
    convention = job.description.convention
    rows = [row for row in job.rows() if row["error"] is None]
    places = locate(job.source, [row["image_id"] for row in rows])
    chosen = Subset(job.source, np.array(places, np.int64))
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        for batch in evaluation_batches(
            chosen, size=convention.size, batch_size=_BATCH, policy=convention.policy
        ):
            if batch.errors:
                place, error = batch.errors[0]
                raise ValueError(
                    f"export: expected to read {rows[place]['image_id']} again, got: {error}"
                )
            images = normalize(batch.images.to(device), model.mean, model.std)
            planes = model(images)[0][:, 0].float().cpu().numpy()
            for index, plane, where in zip(batch.indices, planes, batch.geometries, strict=True):
                yield Mapped(rows[index], plane, where)


def _geometry(row: Row, convention: Convention) -> Geometry:
    return geometry(row["height"], row["width"], convention.size, convention.policy)


def _model(job: Job) -> SaliencyModel:
    """The model that made the table."""
    model = job.model if job.model is not None else job.description.checkpoint
    if model is None:
        raise ValueError(
            "export: expected `model` for maps, because the table was made by a model in memory, "
            "got None"
        )
    if not isinstance(model, SaliencyModel):
        model = checkpoint.load(model)
    if job.description.model and checkpoint.fingerprint(model) != job.description.model:
        raise ValueError(
            "export: expected the model that made the boxes, got one with other weights; give it "
            "as `model`"
        )
    return model
