"""Every picture under its saliency, with its box: to look at, or for a talk.

``STEM.jpg`` for each row whose image could be read, at the size of the original.
"""

from __future__ import annotations

from pathlib import Path

from casm_fast.data.source import locate
from casm_fast.extraction.drawing import full_saliency, overlay
from casm_fast.extraction.exporting.job import Job, Stems, corners
from casm_fast.extraction.exporting.maps import maps_of
from casm_fast.extraction.exporting.writing import new_folder

QUALITY = 90
"""Of the JPEG files."""


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write the overlays of the images that could be read, with the maps of `maps_of`.

    Args:
        job: What, and the model.
        output: A new or empty folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is not empty.
        FileNotFoundError: The images, a map or the checkpoint are no longer there.
        ValueError: The model did not make the table, or there is none.
    """
    from PIL import Image

    size, stems = job.description.convention.size, Stems()
    with new_folder(output) as root:
        names = [row["image_id"] for row in job.rows() if row["error"] is None]
        places = locate(job.source, names)
        for place, (row, saliency, where) in zip(places, maps_of(job), strict=True):
            drawn = overlay(
                job.source.image(place), full_saliency(saliency, where, size), corners(row)
            )
            file = root / f"{stems(row['image_id'])}.jpg"
            Image.fromarray(drawn).save(file, quality=QUALITY)
    return (output,)
