"""From measurements to rows of the table: labels, names, true boxes, and original pixels.

Rows are made by the batch, column by column: a Python loop runs over nothing but ids and labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data import localization, predictions
from casm_fast.data.geometry import Geometry, to_network, to_original
from casm_fast.data.loading import ImageBatch
from casm_fast.data.source import ImageSource
from casm_fast.extraction.extractor import Measurements

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's output is not finite"

_CORNERS = ("x0", "y0", "x1", "y1")


def label_numbers(source: Sequence[str], model: Sequence[str]) -> dict[int, int] | None:
    """How the source's labels are called in the model, when both know the names and they differ.

    A folder with some of the classes numbers them from zero, unlike the model that was trained on
    all of them: names, not numbers, say which is which. Two sets of names without one in common
    (the WordNet ids of a tree, the words of a model) can only agree by number, and do so when they
    are equally many.

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


@dataclass(frozen=True)
class Truth:
    """The true boxes of the images of a batch, as one list.

    Attributes:
        original: ``[n, 4]`` int32, in pixels of the images.
        network: ``[n, 4]`` int32, in network pixels, not clipped.
        owners: ``[n]`` the image of each, in order.
    """

    original: NDArray[np.int32]
    network: NDArray[np.int32]
    owners: NDArray[np.int64]


def true_boxes(batch: ImageBatch) -> Truth:
    """The true boxes of a batch; none when it was read without."""
    flat, owners = localization.pair(batch.truth)
    original = np.asarray(flat, np.int32)
    owned = [batch.geometries[owner] for owner in owners]
    return Truth(original, to_network(owned, original), owners)


@dataclass(frozen=True)
class Naming:
    """What rows say about images beside what was measured.

    Attributes:
        source: Where the images come from.
        classes: The model's class names.
        labels: From :func:`label_numbers`.
        rule: Threshold rule.
    """

    source: ImageSource
    classes: Sequence[str]
    labels: dict[int, int] | None
    rule: str

    def label(self, index: int) -> int:
        """The label of an image, in the model's numbering."""
        label = int(self.source.label(index))
        return label if self.labels is None else self.labels.get(label, -1)


def batch_table(
    naming: Naming, batch: ImageBatch, measurements: Measurements | None, truth: Truth
) -> pa.Table:
    """The rows of a batch, in the order of the source.

    Args:
        naming: Ids, labels and names.
        batch: Images and errors.
        measurements: Of the images; None when none could be read.
        truth: From :func:`true_boxes`.

    Returns:
        A table without a description, one row per image and per error.
    """
    import pyarrow as pa

    tables, good, errors = [], [], list(batch.errors)
    if measurements is not None:
        table = _measured(naming, batch.indices, batch.geometries, measurements, truth)
        finite = np.isfinite(measurements.mean) & np.isfinite(measurements.score)
        tables.append(table if finite.all() else table.filter(pa.array(finite)))
        good = [batch.indices[k] for k in np.flatnonzero(finite)]
        errors += [(batch.indices[k], NOT_FINITE) for k in np.flatnonzero(~finite)]
    if not errors:
        return tables[0]
    tables.append(_failed(naming, errors))
    places = good + [index for index, _ in errors]
    return pa.concat_tables(tables).take(np.argsort(places))


def segmented(table: pa.Table, encoded: Mapping[int, str]) -> pa.Table:
    """Rows with the column ``rle``, null where a row has an error.

    Args:
        table: From :func:`batch_table`.
        encoded: Run lengths by place in the table.
    """
    import pyarrow as pa

    errors = table["error"].to_pylist()
    column = [encoded.get(k) if error is None else None for k, error in enumerate(errors)]
    return table.append_column("rle", pa.array(column, pa.string()))


def _failed(naming: Naming, errors: Sequence[tuple[int, str]]) -> pa.Table:
    """Rows of images that could not be read: nothing but id, label and error."""
    import pyarrow as pa

    rows = [
        {
            "image_id": naming.source.image_id(index),
            "label": naming.label(index),
            "error": error,
        }
        for index, error in errors
    ]
    return pa.Table.from_pylist(rows, schema=predictions.schema())


def _measured(
    naming: Naming,
    indices: Sequence[int],
    geometries: Sequence[Geometry],
    found: Measurements,
    truth: Truth,
) -> pa.Table:
    import pyarrow as pa

    schema = predictions.schema()
    count, classes = len(indices), naming.classes
    best = found.top[:, 0].tolist()
    original = to_original(geometries, found.boxes)
    ends = np.searchsorted(truth.owners, np.arange(count + 1)).astype(np.int32)

    def boxes(flat: NDArray[np.int32]) -> pa.Array:
        if not naming.source.has_boxes:
            return pa.nulls(count, schema.field("gt_boxes").type)
        corners = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), 4)
        return pa.ListArray.from_arrays(pa.array(ends), corners)

    def numbers(values: NDArray[np.float64], name: str) -> pa.Array:
        return pa.array(values.astype(np.float32), schema.field(name).type, from_pandas=True)

    likely = np.arange(count + 1, dtype=np.int32) * found.top.shape[1]
    columns: dict[str, Any] = {
        "image_id": [naming.source.image_id(index) for index in indices],
        "height": [geometry.height for geometry in geometries],
        "width": [geometry.width for geometry in geometries],
        "label": [naming.label(index) for index in indices],
        "predicted": best,
        "predicted_name": [classes[k] if k < len(classes) else "" for k in best],
        "score": numbers(found.score, "score"),
        "top5": pa.ListArray.from_arrays(
            pa.array(likely), pa.array(found.top.reshape(-1).astype(np.int32))
        ),
        **{name: original[:, axis] for axis, name in enumerate(_CORNERS)},
        **{f"net_{name}": found.boxes[:, axis] for axis, name in enumerate(_CORNERS)},
        "area": found.area,
        "rule": [naming.rule] * count,
        **{
            name: numbers(values, name)
            for name, values in (
                ("mean_saliency", found.mean),
                ("tv", found.tv),
                ("entropy", found.entropy),
                ("entropy_full", found.entropy_full),
                ("f1", found.f1),
                ("f1_mean", found.f1_mean),
            )
        },
        "gt_boxes": boxes(truth.original),
        "gt_net_boxes": boxes(truth.network),
        "error": pa.nulls(count, pa.string()),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)
