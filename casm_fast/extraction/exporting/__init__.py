"""Tables of boxes in the formats of other tools, one module each.

| format | what is written | boxes |
|---|---|---|
| coco | results, and annotations unless the images are COCO's | x, y, width, height |
| voc | VOCdevkit/VOC2012 with XML files, lists and results | from 1, last pixel inside |
| yolo | data.yaml and a text file per image | centre and size as shares of the image |
| kaggle-loc | one CSV file | x0, y0, x1, y1 |
| label-studio | tasks with predictions, and the labelling interface | corner and size in percent |
| fiftyone | labels.json and data.json | corner and size as shares of the image |
| wsol-npy | wsolevaluation's score maps, an array per image | none |
| overlays | every picture under its saliency, a JPEG file each | drawn |
| csv | every column of the table | x0, y0, x1, y1, half-open |

Boxes are those of the table, in original pixels. Files and folders appear when they are whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from casm_fast.data import predictions
from casm_fast.extraction.exporting import (
    coco,
    fiftyone,
    kaggle,
    label_studio,
    overlays,
    spreadsheet,
    voc,
    wsol,
    yolo,
)
from casm_fast.extraction.exporting.job import Category, Job
from casm_fast.extraction.pipeline import Extraction
from casm_fast.models.saliency import SaliencyModel

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FORMATS", "Category", "Format", "default_output", "export"]

Format = Literal[
    "coco", "voc", "yolo", "kaggle-loc", "label-studio", "fiftyone", "wsol-npy", "overlays", "csv"
]


@dataclass(frozen=True)
class Exporter:
    """A format.

    Attributes:
        write: Writes a job and says which files or folder it made, the main one first.
        suffix: Of the file; "" for a folder.
    """

    write: Callable[[Job, Path], tuple[Path, ...]]
    suffix: str


FORMATS: dict[str, Exporter] = {
    "coco": Exporter(coco.write, ".json"),
    "voc": Exporter(voc.write, ""),
    "yolo": Exporter(yolo.write, ""),
    "kaggle-loc": Exporter(kaggle.write, ".csv"),
    "label-studio": Exporter(label_studio.write, ".json"),
    "fiftyone": Exporter(fiftyone.write, ""),
    "wsol-npy": Exporter(wsol.write, ""),
    "overlays": Exporter(overlays.write, ""),
    "csv": Exporter(spreadsheet.write, ".csv"),
}


def export(
    boxes: str | Path | pa.Table | Extraction,
    output: str | Path | None = None,
    *,
    to: Format = "coco",
    category: Category = "predicted",
    pictures: bool = False,
    images: str | None = None,
    model: SaliencyModel | str | Path | None = None,
) -> tuple[Path, ...]:
    """Write predicted boxes in the format of another tool.

    Images that could not be read have no result; neither have images without a box. (Kaggle's list
    has an empty line for them, and csv is the table as it is.) Where an image is a pair of a
    picture and a class, as in COCO and VOC, the results of a picture stand together.

    Args:
        boxes: A Parquet file or folder from ``casm_fast.extract``, its table, or the extraction
            itself.
        output: The file; for voc, yolo, fiftyone, wsol-npy and overlays a new or empty folder. By
            default :func:`default_output` of ``boxes``.
        to: The format, see the module.
        category: Whose class a box has: the one that the classifier "predicted", once a picture; or
            the true "label", which makes the results those of localisation with known classes. The
            score is the classifier's probability of its prediction in both cases.
        pictures: Write the pictures, too: upright RGB files (JPEG, quality 95), so that no EXIF tag
            can turn a picture under its boxes. For voc, yolo and fiftyone.
        images: Where label-studio and fiftyone find the pictures: a folder or URL that the ids are
            appended to. By default the files of the images themselves.
        model: For wsol-npy and overlays, the model whose maps they are; by default the maps that
            lie beside the rows in a folder, else the checkpoint that the table names.

    Returns:
        What was written, the main file first, or the folder.

    Raises:
        FileExistsError: The folder is there and not empty.
        FileNotFoundError: There is no such table; or the images are needed and no longer there.
        ValueError: An unknown format, a table that is none, a category that is unknown, or a model
            that did not make the boxes.
    """
    for name, value, known in (("to", to, Format), ("category", category, Category)):
        if value not in get_args(known):
            expected = ", ".join(get_args(known))
            raise ValueError(f"export: expected `{name}` one of {expected}, got {value!r}")
    if isinstance(boxes, (str, Path)):
        table, description = predictions.read(boxes)
        output = default_output(boxes, to) if output is None else output
    else:
        table = boxes.table if isinstance(boxes, Extraction) else boxes
        description = predictions.description_of(table)
    if output is None:
        raise ValueError("export: expected `output` beside a table in memory, got None")
    named = isinstance(boxes, (str, Path)) and Path(boxes).is_dir()
    folder = Path(str(boxes)) if named else None
    job = Job(table, description, category, pictures, images, model, folder)
    return FORMATS[to].write(job, Path(output))


def default_output(boxes: str | Path, to: Format) -> Path:
    """Where an export goes unless told: beside the boxes, val.json, val-voc/ or val-kaggle-loc.csv.

    Args:
        boxes: The file or folder that is exported.
        to: The format.
    """
    path, suffix = Path(boxes), FORMATS[to].suffix
    stem = path.stem if path.suffix in (".parquet", ".pq") else path.name
    plain = to in ("coco", "csv")
    return path.with_name(f"{stem}{suffix}" if plain else f"{stem}-{to}{suffix}")
