"""COCO's results.

A results file is a list of ``{"image_id", "category_id", "bbox": [x, y, width, height],
"score"}`` in original pixels, what pycocotools' ``COCO.loadRes`` reads, with a "segmentation" each
where masks were kept (``masks="rle"``). Its numbers are those of an annotation file: COCO's own
where the boxes were extracted from COCO, else one that is written beside it, with the pictures
numbered in the order of the table and the classes of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from casm_fast.data.coco import CocoSource, instances
from casm_fast.extraction.exporting.job import Box, Job, corners
from casm_fast.extraction.exporting.writing import write_json

Result = dict[str, Any]


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write results, and the annotations beside them unless they are COCO's own.

    Args:
        job: What.
        output: The results; the annotations get the same name with ``.instances.json``.

    Returns:
        The results first.

    Raises:
        FileNotFoundError: The images are COCO's and no longer there.
        ValueError: The model has other classes than COCO, or an image has no label.
    """
    if job.description.source.startswith("coco-"):
        write_json(output, _of_pairs(job))
        return (output,)
    pictures = list(job.readable())
    annotated = instances(
        [
            {
                "file_name": picture.id,
                "height": picture.height,
                "width": picture.width,
                "objects": [(box.label, box.corners, None) for box in picture.truth],
            }
            for picture in pictures
        ],
        job.classes,
    )
    results = [
        _result(number, box.label + 1, box, (picture.height, picture.width))
        for number, picture in enumerate(pictures, 1)
        for box in picture.found
    ]
    beside = output.with_suffix(".instances.json")
    write_json(beside, annotated)
    write_json(output, results)
    return output, beside


def _result(image: int, category: int, box: Box, size: tuple[int, int]) -> Result:
    x0, y0, x1, y1 = box.corners
    bbox = [x0, y0, x1 - x0, y1 - y0]
    result = {"image_id": image, "category_id": category, "bbox": bbox, "score": box.score}
    if box.rle is not None:
        result["segmentation"] = {"size": list(size), "counts": box.rle}
    return result


def _of_pairs(job: Job) -> list[Result]:
    """Results of COCO's (picture, category) pairs, with COCO's ids."""
    rows = [row for row in job.rows() if row["error"] is None]
    ids = [tuple(map(int, row["image_id"].split("/"))) for row in rows]
    if job.category == "label":
        found = [(image, category, row) for (image, category), row in zip(ids, rows, strict=True)]
    else:
        known = _categories(job)
        strange = {row["predicted_name"] for row in rows} - set(known)
        if strange:
            raise ValueError(
                f"export: expected a model with the classes of {job.description.source}, got one "
                f"that predicts {min(strange)!r}; choose category 'label', which serves any model"
            )
        once = {image: row for (image, _), row in zip(reversed(ids), reversed(rows), strict=True)}
        found = [(image, known[row["predicted_name"]], row) for image, row in sorted(once.items())]
    return [
        _result(
            image,
            category,
            Box(category, corners(row), row["score"], row.get("rle")),
            (row["height"], row["width"]),
        )
        for image, category, row in found
        if row["x1"] > row["x0"] and row["y1"] > row["y0"]
    ]


def _categories(job: Job) -> dict[str, int]:
    """COCO's category ids by name."""
    source = job.source
    if not isinstance(source, CocoSource):
        raise TypeError(
            f"expected COCO behind {job.description.source}, got {type(source).__name__}"
        )
    return dict(zip(source.classes, source.category_ids, strict=True))
