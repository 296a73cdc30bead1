"""YOLO's text files, as Ultralytics and Darknet read them.

| file | what |
|---|---|
| data.yaml | where the images are, and the names of the classes |
| labels/STEM.txt | a line per box: class, centre x, centre y, width, height |
| images/STEM.jpg | the pictures, when they are asked for |

The four numbers are shares of the picture's width and height; a file without a line is a picture
without an object. A label has no score: Ultralytics refuses a sixth number.
"""

from __future__ import annotations

import json
from pathlib import Path

from casm_fast.extraction.exporting.job import Box, Job
from casm_fast.extraction.exporting.writing import new_folder


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write data.yaml and the labels.

    Args:
        job: What.
        output: A new or empty folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is not empty.
        ValueError: An image has no label.
    """
    with new_folder(output) as root:
        (root / "labels").mkdir()
        (root / "images").mkdir()
        pictures = []
        for picture in job.readable():
            pictures.append(picture)
            lines = (_line(box, picture.height, picture.width) for box in picture.found)
            (root / f"labels/{picture.stem}.txt").write_text("".join(lines), encoding="utf-8")
        # A JSON string is a YAML string, whatever is in it.
        names = "".join(f"  {k}: {json.dumps(name)}\n" for k, name in enumerate(job.classes))
        text = f"train: images\nval: images\nnc: {len(job.classes)}\nnames:\n{names}"
        (root / "data.yaml").write_text(text, encoding="utf-8")
        if job.pictures:
            job.write_pictures(pictures, root / "images")
    return (output,)


def _line(box: Box, height: int, width: int) -> str:
    """Six decimals: an error of a pixel's hundredth on a side of 10,000."""
    x0, y0, x1, y1 = box.corners
    centre = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height)
    size = ((x1 - x0) / width, (y1 - y0) / height)
    return f"{box.label} " + " ".join(f"{value:.6f}" for value in (*centre, *size)) + "\n"
