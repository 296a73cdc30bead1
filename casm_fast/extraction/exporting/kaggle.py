"""The submission of Kaggle's ImageNet Object Localization Challenge.

A line per image, ``ImageId,PredictionString``; the string is ``label x0 y0 x1 y1``. The label is
the number of the class from 1, where class 1 stands in the first line of LOC_synset_mapping.txt:
the order of the model's classes, if it was trained on ImageNet. The box counts as the numbers of
ImageNet's annotations do here, as they stand. An image that could not be read, or that has no box,
has an empty string, because a submission names every image.
"""

from __future__ import annotations

import csv
from itertools import groupby
from pathlib import Path

from casm_fast.extraction.exporting.job import Job
from casm_fast.extraction.exporting.writing import new_file

HEADER = ("ImageId", "PredictionString")


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write a submission.

    Args:
        job: What.
        output: The CSV file.

    Returns:
        The file.

    Raises:
        ValueError: An image has no label.
    """
    found = {picture.id: picture.found for picture in job.readable()}
    with new_file(output) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(HEADER)
        for identity, _ in groupby(map(job.picture_id, job.rows())):
            boxes = ((box.label + 1, *box.corners) for box in found.get(identity, ()))
            writer.writerow((identity, " ".join(" ".join(map(str, box)) for box in boxes)))
    return (output,)
