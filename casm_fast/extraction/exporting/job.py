"""What every format is made from: the pictures of a table with their boxes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from casm_fast.data.listing import is_image
from casm_fast.data.predictions import Description
from casm_fast.data.source import FileSource, ImageSource, locate, open_source
from casm_fast.models.saliency import SaliencyModel

if TYPE_CHECKING:
    import pyarrow as pa

Category = Literal["predicted", "label"]
Corners = tuple[int, int, int, int]
Row = dict[str, Any]

_CHUNK = 4096  # rows that are Python objects at a time


@dataclass(frozen=True)
class Box:
    """A box of a class.

    Attributes:
        label: Number of the class, from 0.
        corners: (x0, y0, x1, y1) half-open, in original pixels.
        score: Probability that the classifier gives its prediction; 1 for a true box.
        rle: The pixels that the box is drawn around as COCO's run lengths, where they were kept.
    """

    label: int
    corners: Corners
    score: float = 1.0
    rle: str | None = None


@dataclass(frozen=True)
class Picture:
    """An image and its boxes.

    Attributes:
        id: Of the image; of the picture where images are pairs of a picture and a class.
        row_id: Of the first row that shows it.
        stem: A file name for it, without a suffix; no two pictures share one.
        height: In pixels.
        width: In pixels.
        found: Predicted boxes, none of them empty.
        truth: True boxes of known classes.
    """

    id: str
    row_id: str
    stem: str
    height: int
    width: int
    found: tuple[Box, ...]
    truth: tuple[Box, ...]


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Attributes:
        table: Rows.
        description: Of the table.
        category: Whose class a box has.
        pictures: Whether pictures are to be written.
        prefix: Where the pictures are for those who read the export; None: where they are.
        model: Given for formats of maps.
        folder: Of the extraction, where the table is one; None for a file or a table in memory.
    """

    table: pa.Table
    description: Description
    category: Category
    pictures: bool = False
    prefix: str | None = None
    model: SaliencyModel | str | Path | None = None
    folder: Path | None = None

    @property
    def paired(self) -> bool:
        """Whether a row is a pair of a picture and a class, such as "139/62"."""
        return self.description.source.startswith(("coco-", "voc-"))

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by number: the model's, or the numbers themselves."""
        import pyarrow.compute as pc

        if self.description.classes:
            return self.description.classes
        most = (pc.max(self.table[name]).as_py() for name in ("label", "predicted"))
        return tuple(map(str, range(max((-1 if k is None else k for k in most), default=-1) + 1)))

    @cached_property
    def source(self) -> ImageSource:
        """The images, opened when they are asked for."""
        return open_source(self.description.source)

    def rows(self) -> Iterator[Row]:
        """Every row, a few of them in memory at a time."""
        for batch in self.table.to_batches(max_chunksize=_CHUNK):
            yield from batch.to_pylist()

    def readable(self) -> Iterator[Picture]:
        """The pictures that could be read, in the order of the table.

        Raises:
            ValueError: The category is the label, and an image has none.
        """
        if self.category == "label":
            self._check_labels()
        rows = (row for row in self.rows() if row["error"] is None)
        names = Stems()
        for identity, group in groupby(rows, key=self.picture_id):
            yield self._picture(identity, list(group), names(identity))

    def picture_id(self, row: Row) -> str:
        """The id of what a row shows."""
        name: str = row["image_id"]
        return name.rpartition("/")[0] if self.paired else name

    def addresses(self, pictures: list[Picture]) -> list[str]:
        """Where pictures are: ``images`` and the id, or the path or URL of the file itself.

        Raises:
            FileNotFoundError: The images are no longer there.
            ValueError: They are no files.
        """
        if self.prefix is not None:
            return [f"{self.prefix.rstrip('/')}/{picture.id}" for picture in pictures]
        source = self.source
        if not isinstance(source, FileSource):
            raise ValueError(
                f"export: expected images that are files, got {source.name}; say where the "
                "pictures are with `images`, a folder or URL that the ids are appended to"
            )
        places = locate(source, [picture.row_id for picture in pictures])
        return [source.address(place) for place in places]

    def write_pictures(self, pictures: Iterable[Picture], folder: Path) -> None:
        """Write STEM.jpg of each picture into a folder, upright.

        Raises:
            FileNotFoundError: The images are no longer there.
            DecodeError: One cannot be read any more.
        """
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        pictures = list(pictures)
        places = locate(self.source, [picture.row_id for picture in pictures])
        for picture, place in zip(pictures, places, strict=True):
            image = Image.fromarray(self.source.image(place))
            image.save(folder / f"{picture.stem}.jpg", "JPEG", quality=95, subsampling=0)

    def _picture(self, identity: str, rows: list[Row], stem: str) -> Picture:
        first = rows[0]
        # The network saw a picture once for each of its classes and found the same each time.
        found = rows if self.category == "label" else rows[:1]
        return Picture(
            id=identity,
            row_id=first["image_id"],
            stem=stem,
            height=first["height"],
            width=first["width"],
            found=tuple(
                Box(row[self.category], corners(row), row["score"], row.get("rle"))
                for row in found
                if row["x1"] > row["x0"] and row["y1"] > row["y0"]
            ),
            truth=tuple(
                Box(row["label"], (x0, y0, x1, y1))
                for row in rows
                for x0, y0, x1, y1 in row["gt_boxes"] or ()
                if row["label"] >= 0
            ),
        )

    def _check_labels(self) -> None:
        unknown = [r["image_id"] for r in self.rows() if r["error"] is None and r["label"] < 0]
        if unknown:
            raise ValueError(
                f"export: expected a label for every image, got none for {unknown[0]} and "
                f"{len(unknown) - 1} others; choose category 'predicted'"
            )


def corners(row: Row) -> Corners:
    """The predicted box of a row."""
    return (row["x0"], row["y0"], row["x1"], row["y1"])


class Stems:
    """Makes file names of ids: letters, digits, dots, hyphens; no name twice.

    "n01/cat 1.JPEG" becomes "n01_cat_1", and a second id that would become the same
    "n01_cat_1-2". (Upper and lower case of one name count as the same, as some disks have it.)
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, identity: str) -> str:
        """A name of its own for an id."""
        name = identity
        if is_image(name.rpartition("/")[2]):
            name = name.rpartition(".")[0]
        stem = re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "image"
        unique, count = stem, 1
        while unique.casefold() in self._taken:
            count += 1
            unique = f"{stem}-{count}"
        self._taken.add(unique.casefold())
        return unique
