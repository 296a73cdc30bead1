"""Images that a Parquet file lists, with labels and boxes where it has them.

| column | what |
|---|---|
| path | text: paths or URLs; relative ones start at the folder of the manifest |
| label | integers from 0, or names, which are numbered in alphabetical order; null: unknown |
| boxes | lists of [x0, y0, x1, y1], half-open, in original pixels; null: none |

Only the path is needed. Boxes with fractions are rounded outwards, as COCO's are. Other columns are
not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data import remote
from casm_fast.data.decoding import ContentDecoder, Decoder, decode, decode_bytes
from casm_fast.data.lines import Lines
from casm_fast.data.paths import PathSource

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 8192  # that are in memory at a time
_SLACK = 1e-6  # of a fraction that is one by rounding alone


class ManifestSource(PathSource):
    """An `ImageSource` over a Parquet manifest; labels and boxes are kept in memory, paths not.

    Attributes:
        has_boxes: Whether the manifest has a column of boxes.
    """

    def __init__(
        self,
        file: str,
        *,
        decoder: Decoder = decode,
        content_decoder: ContentDecoder = decode_bytes,
    ) -> None:
        """Reads the manifest once, some rows at a time.

        Args:
            file: A path or URL.
            decoder: Reads one file.
            content_decoder: Reads what a URL gave.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no Parquet file, or a column is not what the module says.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if remote.is_url(file):
                filesystem, path = remote.open_filesystem(file)
                manifest, base = pq.ParquetFile(filesystem.open(path)), remote.parent(file)
            else:
                manifest, base = pq.ParquetFile(Path(file)), os.path.dirname(file)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"open_source: there is no manifest {file}") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"parquet: expected a Parquet file, got {file}: {error}") from error
        schema = manifest.schema_arrow
        _check_columns(schema, file)
        columns = [name for name in ("path", "label", "boxes") if name in schema.names]
        labels, boxes = _Labels(), _Boxes(file)

        def paths() -> Iterator[str]:
            for batch in manifest.iter_batches(_ROWS, columns=columns):
                if batch["path"].null_count:
                    raise ValueError(f"parquet: expected a path in every row of {file}, got null")
                if "label" in columns:
                    labels.add(batch["label"])
                if "boxes" in columns:
                    boxes.add(batch["boxes"])
                yield from batch["path"].to_pylist()

        files = Lines.spooled(paths())
        if not len(files):
            raise ValueError(f"parquet: expected rows in {file}, got none")
        classes, numbers = labels.finished() if "label" in columns else ((), None)
        self.has_boxes = "boxes" in columns
        self._table: NDArray[np.int32] = _NONE
        self._first: NDArray[np.int64] = np.broadcast_to(np.int64(0), len(files) + 1)
        if self.has_boxes:
            self._table, self._first = boxes.finished()
        found = f"parquet: {len(files):,} images in {file}"
        if classes:
            found += f" of {len(classes):,} classes"
        if self.has_boxes:
            found += f" with {len(self._table):,} boxes"
        missing = [name for name in ("label", "boxes") if name not in columns]
        if missing:
            found += f"; missing: {' and '.join(missing)}"
        super().__init__(
            f"parquet:{file}",
            files,
            base,
            found=found,
            classes=classes,
            labels=numbers,
            decoder=decoder,
            content_decoder=content_decoder,
        )

    def boxes(self, index: int) -> NDArray[np.int32]:
        """``[n, 4]`` (x0, y0, x1, y1) half-open, in original pixels; n may be 0."""
        index = range(len(self))[index]
        return self._table[self._first[index] : self._first[index + 1]]


_NONE = np.zeros((0, 4), np.int32)


def _check_columns(schema: pa.Schema, file: str) -> None:
    import pyarrow.types as kinds

    def is_text(kind: pa.DataType) -> bool:
        if kinds.is_dictionary(kind):
            kind = kind.value_type
        return bool(kinds.is_string(kind) or kinds.is_large_string(kind))

    def is_list(kind: pa.DataType) -> bool:
        tests = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
        return any(test(kind) for test in tests)

    def is_boxes(kind: pa.DataType) -> bool:
        if not (is_list(kind) and is_list(kind.value_type)):
            return False
        number = kind.value_type.value_type
        return bool(kinds.is_integer(number) or kinds.is_floating(number))

    rules: dict[str, tuple[Any, str]] = {
        "path": (is_text, "text"),
        "label": (lambda kind: kinds.is_integer(kind) or is_text(kind), "integers or text"),
        "boxes": (is_boxes, "lists of lists of four numbers"),
    }
    if "path" not in schema.names:
        have = ", ".join(schema.names) or "none"
        raise ValueError(f"parquet: expected a column path in {file}, got {have}")
    for name, (test, what) in rules.items():
        if name in schema.names and not test(schema.field(name).type):
            raise ValueError(
                f"parquet: expected {what} in the column {name} of {file}, got "
                f"{schema.field(name).type}"
            )


class _Labels:
    """Labels in the making: integers as they are, names numbered as they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._parts: list[NDArray[np.int32]] = []

    def add(self, column: Any) -> None:
        import pyarrow.types as kinds

        if kinds.is_integer(column.type):
            part = column.fill_null(-1).to_numpy(zero_copy_only=False)
        else:
            encoded = column if kinds.is_dictionary(column.type) else column.dictionary_encode()
            number = self._numbers
            known = [
                number.setdefault(name, len(number)) for name in encoded.dictionary.to_pylist()
            ]
            codes = encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
            part = np.array([*known, -1], np.int32)[codes]
        self._parts.append(part.astype(np.int32))

    def finished(self) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """Class names, () for integers; and the labels."""
        labels = np.concatenate(self._parts)
        names = sorted(self._numbers)
        if names:
            order = {name: k for k, name in enumerate(names)}
            place = np.array([*(order[name] for name in self._numbers), -1], np.int32)
            labels = place[labels]  # -1 finds the last
        return tuple(names), labels


class _Boxes:
    """Boxes in the making."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._counts: list[NDArray[np.int64]] = []
        self._parts: list[NDArray[np.int32]] = []

    def add(self, column: Any) -> None:
        import pyarrow.compute as pc

        counts = pc.list_value_length(column).fill_null(0)
        single = column.flatten()
        sides = pc.list_value_length(single)
        corners = single.flatten().to_numpy(zero_copy_only=False)
        table = corners.astype(np.float64)
        if sides.null_count or pc.all(pc.equal(sides, 4)).as_py() is False:
            raise ValueError(f"parquet: expected four numbers a box in {self._file}, got others")
        table = table.reshape(-1, 4)
        good = np.isfinite(table).all(axis=1) & (table[:, 2:] >= table[:, :2]).all(axis=1)
        if not good.all():
            x0, y0, x1, y1 = table[np.flatnonzero(~good)[0]]
            raise ValueError(
                f"parquet: expected boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1 in "
                f"{self._file}, got ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
            )
        low, high = np.floor(table[:, :2] + _SLACK), np.ceil(table[:, 2:] - _SLACK)
        self._counts.append(counts.to_numpy(zero_copy_only=False).astype(np.int64))
        self._parts.append(np.concatenate([low, high], axis=1).astype(np.int32))

    def finished(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All boxes ``[N, 4]``, and where those of each image begin ``[n + 1]``."""
        ends = np.cumsum(np.concatenate(self._counts))
        return np.concatenate(self._parts), np.concatenate([[0], ends])
