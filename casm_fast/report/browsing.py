"""All images of an extraction on one page: to look through, to filter, to sort.

One HTML file without any other: thumbnails are JPEG files in base64, in chunks of JSON that the
page reads when it shows them, and it draws no more tiles than are seen. What is chosen stands in
the address behind the ``#``, so that a view can be kept and sent: ``#show=missed&sort=-score``.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import casm_fast
from casm_fast.data import localization
from casm_fast.data.decoding import DecodeError
from casm_fast.data.predictions import Description
from casm_fast.data.source import ImageSource, locate, open_source
from casm_fast.report.page import HasTable, net_box, read_table
from casm_fast.report.rendering import write

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

LIMIT = 5000
"""Images of a page, unless told: some 40 MB, which browsers open in a second or two."""

SIDE = 192
"""Longer side of a thumbnail in pixels."""

QUALITY = 72
"""Of its JPEG: 4 to 8 kB each."""

CHUNK = 250
"""Thumbnails that are unpacked at once."""

Row = dict[str, Any]


def browse(
    extraction: str | Path | pa.Table | HasTable,
    output: str | Path = "browse.html",
    source: ImageSource | str | Path | None = None,
    *,
    limit: int = LIMIT,
    side: int = SIDE,
    workers: int = 4,
) -> Path:
    """Write the page.

    Args:
        extraction: File or folder of ``casm_fast.extract``, its table, or the extraction itself.
        output: The HTML file.
        source: The images; by default those that the table names.
        limit: Images at most. Of more, as many are taken at even distances, in the order of the
            table.
        side: Longer side of a thumbnail in pixels; pictures that are smaller stay as they are.
        workers: Threads that make thumbnails.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError: There is no such table, or its images are no longer there.
        ValueError: ``limit``, ``side`` or ``workers`` is below 1, or the images are others.
    """
    for name, value in (("limit", limit), ("side", side), ("workers", workers)):
        if value < 1:
            raise ValueError(f"browse: expected `{name}` of at least 1, got {value}")
    table, description = read_table(extraction)
    if not len(table):
        raise ValueError("browse: expected a table with rows, got none")
    kept = np.unique(np.arange(min(limit, len(table))) * len(table) // min(limit, len(table)))
    rows: list[Row] = table.take(kept).to_pylist()
    images = open_source(source if source is not None else description.source, split="val")
    places = locate(images, [row["image_id"] for row in rows])

    def thumbnail(entry: tuple[Row, int]) -> str:
        row, place = entry
        if row["error"] is not None:
            return ""
        try:
            return _thumbnail(images.image(place), side)
        except DecodeError as error:
            row["error"] = str(error)
            return ""

    with ThreadPoolExecutor(workers) as pool:
        thumbnails = list(pool.map(thumbnail, zip(rows, places, strict=True)))
    context = {
        "version": casm_fast.__version__,
        "title": _title(extraction, description),
        "facts": _facts(description),
        "left_out": len(table) - len(rows),
        "count": len(rows),
        "data": _script(_columns(rows, description)),
        "chunks": [_script(thumbnails[k : k + CHUNK]) for k in range(0, len(thumbnails), CHUNK)],
        "chunk": CHUNK,
    }
    path = write("report/browse.html.jinja", context, output)
    logger.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
    return path


def _thumbnail(image: NDArray[np.uint8], side: int) -> str:
    """``[H, W, 3]`` as a small JPEG in base64."""
    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def _columns(rows: Sequence[Row], description: Description) -> dict[str, list[Any]]:
    """What the page knows of the images, by column; null where a row has an error."""
    good = [row["error"] is None for row in rows]
    most = max(row[k] for row in rows for k in ("label", "predicted") if row[k] is not None)
    names = description.classes or tuple(map(str, range(most + 1)))
    truth = [row["gt_net_boxes"] or [] for row, fine in zip(rows, good, strict=True) if fine]
    boxes = np.array([net_box(row) for row in rows if row["error"] is None]).reshape(-1, 4)
    overlaps = iter(localization.iou(boxes, truth).tolist())
    overlap = [next(overlaps) if fine else None for fine in good]
    return {
        "classes": list(names),
        "id": [row["image_id"] for row in rows],
        "label": [row["label"] for row in rows],
        "predicted": [row["predicted"] for row in rows],
        "score": [_rounded(row["score"]) for row in rows],
        "iou": [_rounded(value) for value in overlap],
        "saliency": [_rounded(row["mean_saliency"]) for row in rows],
        "size": [[row["width"], row["height"]] if row["width"] else None for row in rows],
        "box": [
            [row[name] for name in ("x0", "y0", "x1", "y1")] if row["error"] is None else None
            for row in rows
        ],
        "truth": [row["gt_boxes"] or [] for row in rows],
        "error": [row["error"] for row in rows],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(value, 4)


def _script(content: Any) -> Any:
    """JSON that may stand in a <script> element."""
    from markupsafe import Markup

    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))


def _title(extraction: object, description: Description) -> str:
    """What is looked at, in a few words."""
    if isinstance(extraction, (str, Path)):
        return Path(extraction).name
    return description.source.rpartition("/")[2]


def _facts(description: Description) -> str:
    convention = description.convention
    return f"{description.source}; box where {convention.threshold}; {convention.geometry}"
