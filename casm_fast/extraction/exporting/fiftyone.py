"""FiftyOne's detections: ``fiftyone.types.FiftyOneImageDetectionDataset``.

| file | what |
|---|---|
| labels.json | ``{"labels": {STEM: [{"label", "bounding_box", "confidence"}, ...]}}`` |
| data.json | ``{STEM: path}``: the pictures where they are, or |
| data/STEM.jpg | the pictures, when they are asked for |

A bounding box is ``[x, y, width, height]`` as shares of the picture. ``classes`` is left out, so
that a label is a name and no number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from casm_fast.extraction.exporting.job import Box, Job, Picture
from casm_fast.extraction.exporting.writing import new_folder, write_json


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write labels, and the pictures or where they are.

    Args:
        job: What.
        output: A new or empty folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is not empty.
        FileNotFoundError: The images are no longer there.
        ValueError: The images are no files and neither `images` nor `pictures` was given; or one
            has no label.
    """
    with new_folder(output) as root:
        pictures = list(job.readable())
        labels = {
            picture.stem: [_detection(box, picture, job.classes) for box in picture.found]
            for picture in pictures
        }
        write_json(root / "labels.json", {"labels": labels})
        if job.pictures:
            job.write_pictures(pictures, root / "data")
        else:
            places = zip(pictures, job.addresses(pictures), strict=True)
            paths = {picture.stem: _absolute(address) for picture, address in places}
            write_json(root / "data.json", paths)
    return (output,)


def _absolute(address: str) -> str:
    return address if "://" in address else str(Path(address).resolve())


def _detection(box: Box, picture: Picture, classes: tuple[str, ...]) -> dict[str, Any]:
    x0, y0, x1, y1 = box.corners
    width, height = picture.width, picture.height
    return {
        "label": classes[box.label],
        "bounding_box": [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height],
        "confidence": box.score,
    }
