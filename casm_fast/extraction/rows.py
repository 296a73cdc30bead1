"""From measurements to rows of the table: labels, names, true boxes, and original pixels."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data import predictions
from casm_fast.data.geometry import Geometry
from casm_fast.data.loading import ImageBatch
from casm_fast.data.source import ImageSource
from casm_fast.extraction.extractor import Extractor, Measurements

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

Row = dict[str, Any]

_CORNERS = ("x0", "y0", "x1", "y1")


def label_numbers(source: Sequence[str], model: Sequence[str]) -> dict[int, int] | None:
    """How the source's labels are called in the model, when both know the names and they differ.

    A folder with some of the classes numbers them from zero, unlike the model that was trained on
    all of them: names, not numbers, say which is which. Two sets of names without one in common
        (the
    WordNet ids of a tree, the words of a model) can only agree by number, and do so when they are
    equally many.

    Args:
        source: Class names of the images, by label.
        model: Class names of the model, by label.

    Returns:
        The model's label for each of the source's, -1 for a class that the model does not know;
        None when the numbers agree.
    """
    if not source or not model or tuple(source) == tuple(model):
        return None
    numbers = {name: number for number, name in enumerate(model)}
    mapping = {label: numbers.get(name, -1) for label, name in enumerate(source)}
    unknown = sum(number < 0 for number in mapping.values())
    if unknown == len(source) == len(model):
        return None
    if unknown:
        logger.warning(
            "%d of %d classes of the images are unknown to the model: their images have no label",
            unknown,
            len(source),
        )
    return mapping


def batch_rows(
    extractor: Extractor, source: ImageSource, batch: ImageBatch, labels: dict[int, int] | None
) -> tuple[dict[int, Row], tuple[int, int]]:
    """Rows of a batch by their place in the source, and the size of the saliency maps.

    Args:
        extractor: Measures the images.
        source: Where they come from.
        batch: Images and errors.
        labels: From :func:`label_numbers`.

    Returns:
        The rows; and ``(h, w)``, (0, 0) when no image could be read.
    """
    rows = {index: error_row(source, index, error, labels) for index, error in batch.errors}
    if not batch.indices:
        return rows, (0, 0)
    truth, net_truth = _true_boxes(source, batch)
    measurements = extractor(batch.images, net_truth)
    made = measured_rows(
        measurements,
        source,
        batch.indices,
        batch.geometries,
        truth,
        net_truth,
        classes=extractor.model.classes,
        labels=labels,
        rule=extractor.convention.rule,
    )
    rows.update(zip(batch.indices, made, strict=True))
    return rows, measurements.saliency_size


def _true_boxes(
    source: ImageSource, batch: ImageBatch
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
    """The true boxes of a batch in original and in network pixels."""
    if not source.has_boxes:
        none = [np.zeros((0, 4), np.int32)] * len(batch.indices)
        return none, none
    truth = [source.boxes(index) for index in batch.indices]
    moved = [
        geometry.to_network(boxes) for geometry, boxes in zip(batch.geometries, truth, strict=True)
    ]
    return truth, moved


def measured_rows(
    measurements: Measurements,
    source: ImageSource,
    indices: Sequence[int],
    geometries: Sequence[Geometry],
    truth: Sequence[NDArray[np.int32]],
    net_truth: Sequence[NDArray[np.int32]],
    *,
    classes: Sequence[str],
    labels: dict[int, int] | None,
    rule: str,
) -> list[Row]:
    """One row per image of a batch.

    Args:
        measurements: Of B images.
        source: Where the images come from.
        indices: B positions in the source.
        geometries: B ways from original to network pixels.
        truth: B lists of true boxes in original pixels.
        net_truth: The same in network pixels.
        classes: The model's class names.
        labels: From :func:`label_numbers`.
        rule: Threshold rule.

    Returns:
        B rows.
    """
    rows = []
    for i, index in enumerate(indices):
        if not math.isfinite(measurements.mean[i]) or not math.isfinite(measurements.score[i]):
            rows.append(error_row(source, index, "the model's output is not finite", labels))
            continue
        geometry, box = geometries[i], measurements.boxes[i]
        top = measurements.top[i].tolist()
        kept = box[2] > box[0]
        original = geometry.to_original(box[None])[0] if kept else box
        rows.append(
            {
                "image_id": source.image_id(index),
                "height": geometry.height,
                "width": geometry.width,
                "label": _label(source, index, labels),
                "predicted": top[0],
                "predicted_name": classes[top[0]] if top[0] < len(classes) else "",
                "score": measurements.score[i],
                "top5": top,
                **{name: int(c) for name, c in zip(_CORNERS, original, strict=True)},
                **{f"net_{name}": int(c) for name, c in zip(_CORNERS, box, strict=True)},
                "area": int(measurements.area[i]),
                "rule": rule,
                "mean_saliency": measurements.mean[i],
                "tv": measurements.tv[i],
                "entropy": measurements.entropy[i],
                "entropy_full": measurements.entropy_full[i],
                "gt_boxes": truth[i].tolist() if source.has_boxes else None,
                "gt_net_boxes": net_truth[i].tolist() if source.has_boxes else None,
                "f1": _number(measurements.f1[i]),
                "f1_mean": _number(measurements.f1_mean[i]),
                "error": None,
            }
        )
    return rows


def error_row(
    source: ImageSource, index: int, error: str, labels: dict[int, int] | None = None
) -> Row:
    """The row of an image that could not be read.

    Args:
        source: Where the image comes from.
        index: Its position.
        error: What went wrong, in one sentence.
        labels: From :func:`label_numbers`.

    Returns:
        A row with nothing but id, label and error.
    """
    return {
        "image_id": source.image_id(index),
        "label": _label(source, index, labels),
        "error": error,
    }


def to_table(rows: list[Row]) -> pa.Table:
    """Rows as a table without a description."""
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=predictions.schema())


def _label(source: ImageSource, index: int, labels: dict[int, int] | None) -> int:
    label = int(source.label(index))
    return label if labels is None else labels.get(label, -1)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
