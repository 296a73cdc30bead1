"""Tables of boxes in the formats of other tools; COCO's results so far.

A results file is a list of ``{"image_id", "category_id", "bbox": [x, y, width, height],
"score"}`` in original pixels, what pycocotools' ``COCO.loadRes`` reads. Its numbers are those of an
annotation file: COCO's own where the boxes were extracted from COCO, else one that is written
beside it, with the images numbered in the order of the table and the classes of the model.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from casm_fast.data import predictions
from casm_fast.data.coco import CocoSource, instances
from casm_fast.data.predictions import Description
from casm_fast.data.source import open_source
from casm_fast.extraction.pipeline import Extraction

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

Format = Literal["coco"]
Category = Literal["predicted", "label"]

Row = dict[str, Any]


def export(
    boxes: str | Path | pa.Table | Extraction,
    output: str | Path,
    *,
    to: Format = "coco",
    category: Category = "predicted",
) -> tuple[Path, ...]:
    """Write predicted boxes in the format of another tool.

    Images that could not be read, and images without a box, have no result.

    Args:
        boxes: A Parquet file or folder from ``casm_fast.extract``, its table, or the extraction
            itself.
        output: The results file. Unless the images are COCO's, the annotation file that it refers
            to gets the same name with ``.instances.json``.
        to: "coco".
        category: Whose category a result has: the one that the classifier "predicted", once an
            image; or the true "label", which makes the results those of localisation with known
            classes. The score is the classifier's probability of its prediction in both cases.

    Returns:
        The files that were written, the results first.

    Raises:
        FileNotFoundError: There is no such table; or the images are COCO's and no longer there.
        ValueError: An unknown format, a table that is none, or a category that is unknown.
    """
    for name, value, known in (("to", to, Format), ("category", category, Category)):
        if value not in get_args(known):
            expected = ", ".join(get_args(known))
            raise ValueError(f"export: expected `{name}` one of {expected}, got {value!r}")
    if isinstance(boxes, (str, Path)):
        table, description = predictions.read(boxes)
    else:
        table = boxes.table if isinstance(boxes, Extraction) else boxes
        description = predictions.description_of(table)
    rows = [row for row in table.to_pylist() if row["error"] is None]
    path = Path(output)
    if description.source.startswith("coco-"):
        _write(path, _results(_pairs(rows, description, category)))
        return (path,)
    beside = path.with_suffix(".instances.json")
    content, found = _numbered(rows, description, category)
    _write(beside, content)
    _write(path, _results(found))
    return path, beside


def _results(found: list[tuple[int, int, Row]]) -> list[dict[str, Any]]:
    """(image id, category id, row) as COCO's results."""
    return [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [row["x0"], row["y0"], row["x1"] - row["x0"], row["y1"] - row["y0"]],
            "score": row["score"],
        }
        for image, category, row in found
        if row["x1"] > row["x0"] and row["y1"] > row["y0"]
    ]


def _pairs(
    rows: list[Row], description: Description, category: Category
) -> list[tuple[int, int, Row]]:
    """Rows of COCO's (picture, category) pairs, with COCO's ids."""
    ids = [tuple(map(int, row["image_id"].split("/"))) for row in rows]
    if category == "label":
        return [(image, label, row) for (image, label), row in zip(ids, rows, strict=True)]
    source = open_source(description.source)
    if not isinstance(source, CocoSource):
        raise TypeError(f"expected COCO behind {description.source}, got {type(source).__name__}")
    known = dict(zip(source.classes, source.category_ids, strict=True))
    once = {image: row for (image, _), row in zip(reversed(ids), reversed(rows), strict=True)}
    strange = {row["predicted_name"] for row in rows} - set(known)
    if strange:
        raise ValueError(
            f"export: expected a model with the classes of {description.source}, got one that "
            f"predicts {min(strange)!r}; choose category 'label', which serves any model"
        )
    return [(image, known[row["predicted_name"]], row) for image, row in sorted(once.items())]


def _numbered(
    rows: list[Row], description: Description, category: Category
) -> tuple[dict[str, Any], list[tuple[int, int, Row]]]:
    """An annotation file for any images, and the rows with its ids."""
    unknown = [row["image_id"] for row in rows if row["label"] < 0]
    if category == "label" and unknown:
        raise ValueError(
            f"export: expected a label for every image, got none for {unknown[0]} and "
            f"{len(unknown) - 1} others; choose category 'predicted'"
        )
    most = max((max(row["label"], row["predicted"]) for row in rows), default=-1)
    names = description.classes or tuple(map(str, range(most + 1)))
    pictures = [
        {
            "file_name": row["image_id"],
            "height": row["height"],
            "width": row["width"],
            "objects": [
                (row["label"], box, None) for box in row["gt_boxes"] or () if row["label"] >= 0
            ],
        }
        for row in rows
    ]
    found = [(number, row[category] + 1, row) for number, row in enumerate(rows, 1)]
    return instances(pictures, names), found


def _write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
