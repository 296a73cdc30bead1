"""Score maps for wsolevaluation (Choe et al. 2020), which finds its boxes itself.

``ID.npy`` is an array ``[224, 224]`` float64 in [0, 1] over the **whole** picture, squashed to a
square, as its evaluator takes it (``--scoremap_root``): each map less its minimum, then divided by
its maximum; zeros where it is constant. ID is the one of its image_ids.txt: of a WsolSource's
images as it is, of ImageNet's validation images ``val/ILSVRC2012_val_00000001.JPEG``.

A model that was trained on centre crops sees no more than the crop: what lies outside is 0, the
lowest value. A pixel reads the cell that its centre falls into, as everywhere in casm_fast.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.geometry import Geometry
from casm_fast.extraction.exporting.job import Job
from casm_fast.extraction.exporting.maps import maps_of
from casm_fast.extraction.exporting.writing import new_folder

SIDE = 224
"""Of wsolevaluation's square (its ``_RESIZE_LENGTH``)."""


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
    with new_folder(output) as root:
        for row, saliency, where in maps_of(job):
            path = root / f"{_identity(row['image_id'], job)}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, spread(saliency, where, job.description.convention.size))
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


def _identity(name: str, job: Job) -> str:
    return f"val/{name}.JPEG" if job.description.source.startswith("imagenet-val:") else name
