"""The table of predicted boxes: its columns, its description, reading it and writing it atomically.

Extraction writes one row per image, evaluation and the report read them. A table is a Parquet
file, a folder of such files (`casm_fast.data.parts`) or the same table in memory; the metadata of
each carries a :class:`Description` as JSON under the key ``casm_fast``: which model made the boxes,
from which images, and by which conventions. A box is ``(x0, y0, x1, y1)``, half-open; "network
pixels" are those of the square that the network saw, "original pixels" those of the image file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from casm_fast.data import parts as folders
from casm_fast.data.geometry import Policy

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
"""Version of the columns and of the description; raised when a reader of the old ones would be
wrong.
"""

CODEC = "zstd"

_KEY = b"casm_fast"


@dataclass(frozen=True)
class Convention:
    """How a saliency map became a box, and how an image became the network's square.

    Attributes:
        size: Side of the network's square, in pixels.
        policy: ``"crop"`` (shorter side to ``size``, centre crop) or ``"squash"`` (both sides to
            ``size``).
        rule: Threshold rule: ``"mean"``, ``"area"``, ``"value"`` or ``"energy"``.
        alpha: The rule's parameter.
        component: ``"largest"`` connected component, or ``"all"`` kept pixels.
        connectivity: 4 or 8.
    """

    size: int
    policy: Policy
    rule: str
    alpha: float
    component: str
    connectivity: int

    @property
    def threshold(self) -> str:
        """The threshold as a formula, for people."""
        alpha = f"{self.alpha:g}"
        mean = "mean(m)" if self.alpha == 1 else f"{alpha} * mean(m)"
        return {
            "mean": f"m >= {mean}",
            "area": f"the {mean} share of pixels with the highest m",
            "value": f"m >= min + {alpha} * (max - min)",
            "energy": f"the highest m that hold {alpha} of the mass",
        }.get(self.rule, f"{self.rule} {alpha}")

    @property
    def geometry(self) -> str:
        """The resize policy, for people."""
        if self.policy == "crop":
            return f"shorter side to {self.size}, centre crop {self.size} x {self.size}"
        return f"squashed to {self.size} x {self.size}"


@dataclass(frozen=True)
class Description:
    """What a table of predictions says about itself.

    Attributes:
        source: Canonical name of the images, as ``open_source`` takes it.
        convention: Geometry and box rule.
        saliency_size: ``(h, w)`` of the saliency map before it is scaled to the network's square.
        classes: Class names by label, in the model's numbering; empty when unknown.
        checkpoint: File of the model, or None when it came from memory.
        model: SHA-256 of the model's weights: equal fingerprints, equal weights.
        config: The options of the extraction.
        device: Where the network ran.
        seconds: Wall time of the extraction.
        versions: Versions of the package, of torch and of Python.
        format: Version of the table's format.
    """

    source: str
    convention: Convention
    saliency_size: tuple[int, int]
    classes: tuple[str, ...] = ()
    checkpoint: str | None = None
    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """The description as one JSON object."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> Description:
        """The description that :meth:`to_json` wrote."""
        fields = json.loads(text)
        fields["convention"] = Convention(**fields["convention"])
        fields["saliency_size"] = tuple(fields["saliency_size"])
        fields["classes"] = tuple(fields["classes"])
        return Description(**fields)


def schema(*, segmented: bool = False) -> pa.Schema:
    """The columns of a table, without a description.

    A row whose ``error`` is not null is an image that could not be read: everything but its id
        and label is null.

    Args:
        segmented: Whether there is a column ``rle``, the kept pixels as COCO's compressed run
            lengths: ``pycocotools.mask.decode({"size": [height, width], "counts": rle})``.
    """
    import pyarrow as pa

    int32, float32 = pa.int32(), pa.float32()
    boxes = pa.list_(pa.list_(int32, 4))
    return pa.schema(
        [
            ("image_id", pa.string()),
            ("height", int32),
            ("width", int32),
            ("label", int32),
            ("predicted", int32),
            ("predicted_name", pa.string()),
            ("score", float32),
            ("top5", pa.list_(int32)),
            *[(name, int32) for name in ("x0", "y0", "x1", "y1")],
            *[(f"net_{name}", int32) for name in ("x0", "y0", "x1", "y1")],
            ("area", int32),
            ("rule", pa.string()),
            ("mean_saliency", float32),
            ("tv", float32),
            ("entropy", float32),
            ("entropy_full", float32),
            ("gt_boxes", boxes),
            ("gt_net_boxes", boxes),
            ("f1", float32),
            ("f1_mean", float32),
            ("error", pa.string()),
            *([("rle", pa.string())] if segmented else []),
        ]
    )


def describe(table: pa.Table, description: Description) -> pa.Table:
    """``table`` with ``description`` in its metadata."""
    metadata: dict[bytes | str, bytes | str] = {_KEY: description.to_json()}
    return table.replace_schema_metadata(metadata)


def description_of(table: pa.Table | pa.Schema, name: str = "the table") -> Description:
    """The description in the metadata of ``table``.

    Args:
        table: A table that extraction wrote, or its schema.
        name: How error messages call it.

    Raises:
        ValueError: If the table has no description, or one of a newer format.
    """
    metadata = getattr(table, "schema", table).metadata
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise ValueError(
            f"{name} has no casm_fast description in its metadata: "
            "expected a table written by casm_fast.extract"
        )
    fields = json.loads(text)
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{name} has format {fields.get('format')}, "
            f"this version of casm_fast reads format {FORMAT}: extract the boxes again"
        )
    return Description.from_json(text)


def read(path: str | Path) -> tuple[pa.Table, Description]:
    """Read a table of predictions and its description.

    Args:
        path: A Parquet file that :func:`write` made, or the folder of an extraction. Where it does
            not exist but all of its shards do (``boxes.1-of-4.parquet``, …, see
            :func:`part_path`), they are read as one table.

    Returns:
        The table and its description.

    Raises:
        FileNotFoundError: If there is no such file, or a part of it is missing.
        ValueError: If the file is not Parquet, or not a table of predictions, or if the parts were
            not made by the same model and conventions from the same images.
    """
    path = Path(path)
    if path.is_dir():
        return read_places(path, range(folders.read_claim(path)["settings"]["images"]))
    parts = [] if path.is_file() else _parts(path)
    return _join([_read(part) for part in parts], path) if parts else _read(path)


def read_places(folder: Path, span: range) -> tuple[pa.Table, Description]:
    """Read some rows of the folder of an extraction.

    Args:
        folder: Of parts, see `casm_fast.data.parts`.
        span: The places of the rows, at least one.

    Returns:
        The rows in order, and their description.

    Raises:
        FileNotFoundError: If a row is missing.
        ValueError: If a part is damaged.
    """
    pieces = []
    for part in complete(folder, span):
        table, description = _read(part.path)
        low, high = max(span.start, part.start), min(span.stop, part.stop)
        pieces.append((table.slice(low - part.start, high - low), description))
    return _join(pieces, folder)


def complete(folder: Path, span: range) -> list[folders.Part]:
    """The parts that hold the rows of a span, in order.

    Raises:
        FileNotFoundError: If a row is missing.
    """
    found = folders.listed(folder)
    missing = sum(map(len, folders.gaps(found, span)))
    if missing:
        raise FileNotFoundError(
            f"{folder}: expected the rows of {len(span):,} images, got {len(span) - missing:,}; "
            "the casm-fast extract that began it goes on where it stopped"
        )
    return [part for part in found if part.stop > span.start and part.start < span.stop]


def is_whole(part: folders.Part) -> bool:
    """Whether the file of a part can be read and has as many rows as its name says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: int = pq.read_metadata(part.path).num_rows
    except (pa.ArrowInvalid, OSError):
        return False
    return rows == part.stop - part.start


def errors_of(folder: Path, span: range) -> list[tuple[str, str]]:
    """Ids and errors of the images of a span that could not be read, as far as there are rows."""
    import pyarrow.parquet as pq

    found = []
    for part in folders.listed(folder):
        if part.stop <= span.start or part.start >= span.stop:
            continue
        table = pq.read_table(part.path, columns=["image_id", "error"])
        low, high = max(span.start, part.start), min(span.stop, part.stop)
        table = table.slice(low - part.start, high - low)
        if table["error"].null_count < len(table):
            table = table.filter(table["error"].is_valid())
            found += list(zip(*table.to_pydict().values(), strict=True))
    return found


def merge(folder: Path, span: range, path: Path) -> Path:
    """Write the rows of a folder into one file, which appears whole; a part at a time in memory.

    Args:
        folder: Of parts.
        span: The places of the rows.
        path: The Parquet file.

    Returns:
        ``path``.

    Raises:
        FileNotFoundError: If a row is missing.
        ValueError: If a part is damaged.
    """
    import pyarrow.parquet as pq

    parts = complete(folder, span)
    schemas = [pq.read_schema(part.path) for part in parts]
    descriptions = [
        description_of(schema, str(part.path)) for schema, part in zip(schemas, parts, strict=True)
    ]
    whole = schemas[0].with_metadata({_KEY: _agreed(descriptions, folder).to_json()})
    with (
        folders.unfinished(path, folders.merged_file(folder)) as stream,
        pq.ParquetWriter(stream, whole, compression=CODEC) as writer,
    ):
        for part in parts:
            writer.write_table(pq.read_table(part.path).replace_schema_metadata(whole.metadata))
    return path


def part_path(path: Path, part: int, parts: int) -> Path:
    """The file of one part of a table: ``boxes.2-of-4.parquet`` for ``boxes.parquet``."""
    return path if parts == 1 else path.with_name(f"{path.stem}.{part}-of-{parts}{path.suffix}")


def _parts(path: Path) -> list[Path]:
    """The files of the parts of a table, in order; [] when there is none."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.\d+-of-(\d+){re.escape(path.suffix)}")
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    counts = {int(found[1]) for name in names if (found := pattern.fullmatch(name))}
    if not counts:
        return []
    if len(counts) > 1:
        numbers = " and of ".join(map(str, sorted(counts)))
        raise ValueError(
            f"{path}: expected parts of one division, got parts of {numbers}; remove the old ones"
        )
    (count,) = counts
    files = [part_path(path, part, count) for part in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: expected all of its {count} parts, got none named {missing[0]} "
            f"({len(missing)} missing); extract with --shard i/{count} what is missing"
        )
    return files


def _join(parts: list[tuple[pa.Table, Description]], path: Path) -> tuple[pa.Table, Description]:
    """Parts as one table, with the description of the whole."""
    import pyarrow as pa

    whole = _agreed([description for _, description in parts], path)
    tables = [table.replace_schema_metadata() for table, _ in parts]
    return describe(pa.concat_tables(tables).combine_chunks(), whole), whole


def _agreed(parts: list[Description], path: Path) -> Description:
    """The description of a whole from those of its parts."""
    first = parts[0]
    for other in parts[1:]:
        for name in ("source", "convention", "classes", "model"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"{path}: expected parts that agree, got two with another {name}")
        if _segmented(other) != _segmented(first):
            raise ValueError(f"{path}: expected parts that agree, got some without masks")
    shards = {part.config.get("shard") for part in parts}
    return dataclasses.replace(
        first,
        saliency_size=max(part.saliency_size for part in parts),
        config={**first.config, "shard": shards.pop() if len(shards) == 1 else None},
        seconds=sum(part.seconds for part in parts),
    )


def _read(path: Path) -> tuple[pa.Table, Description]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(
            f"expected a Parquet file written by casm_fast.extract, got {path}: no such file"
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    return table, description_of(table, str(path))


def write(table: pa.Table, path: str | Path) -> Path:
    """Write ``table`` to ``path`` so that the file is whole or absent, whatever happens meanwhile.

    Args:
        table: Rows with the columns of a :func:`schema`.
        path: The Parquet file; folders are made.

    Returns:
        ``path``.
    """
    import pyarrow.parquet as pq

    with folders.unfinished(Path(path)) as stream:
        pq.write_table(table, stream, compression=CODEC)
    return Path(path)


def _segmented(description: Description) -> bool:
    return description.config.get("masks") == "rle"
