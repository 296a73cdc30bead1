"""What an experiment finds: tables with the published value beside ours, charts, pictures."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.report.charts import Draw
from casm_fast.report.figure import picture_grid
from casm_fast.report.page import Strip, Tile
from casm_fast.report.pictures import data_uri

PAPER = (
    "Zolna, Geras and Cho, Classifier-agnostic saliency map extraction, "
    "Computer Vision and Image Understanding 196 (2020)"
)
"""The paper whose figures stand beside ours, unless an experiment names another."""

SUPPLEMENT = (
    "Fong and Vedaldi, Interpretable explanations of black boxes by meaningful perturbation, "
    "ICCV 2017, supplementary material"
)
"""That of meaningful perturbation and the comparison methods."""

_LETTER = 0.07  # inches, of a name beside a row of pictures


@dataclass(frozen=True)
class Column:
    """One quantity of a table.

    Attributes:
        key: Its name in rows and files.
        name: Its name for people, with an arrow to where better is.
        form: ``"percent"`` shows a share in [0, 1] as 36.1; anything else is a format
            specification.
    """

    key: str
    name: str
    form: str = "percent"

    def show(self, value: float | None) -> str:
        """The value for people; a dash for None."""
        if value is None:
            return "–"
        return f"{100 * value:.1f}" if self.form == "percent" else format(value, self.form)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: What it is about.
        ours: Values by the keys of the columns; a missing one was not measured.
        published: Values of the paper, likewise.
        marked: Keys of cells that the table marks.
        kind: ``"ours"`` for lines that matter most, ``"head"`` for a line that opens a group.
    """

    name: str
    ours: Mapping[str, float | None] = field(default_factory=dict)
    published: Mapping[str, float | None] = field(default_factory=dict)
    marked: frozenset[str] = frozenset()
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table; it becomes ``<name>.csv``, and a part of the page.

    Attributes:
        name: Stem of its file.
        title: What it shows.
        columns: From left to right.
        rows: From top to bottom.
        source: Where the published values stand, e.g. "Table 2"; empty when it has none.
        note: How to read it.
        mark: What a marked cell means.
        paper: What `source` is part of.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    source: str = ""
    note: str = ""
    mark: str = ""
    paper: str = PAPER

    def published(self, column: Column) -> bool:
        """Whether the paper gives any value of the column."""
        return any(row.published.get(column.key) is not None for row in self.rows)

    def show(self, row: Row, column: Column) -> str:
        """Our value for people; a dash where a row lacks one, nothing where it has none at all."""
        return column.show(row.ours.get(column.key)) if row.ours else ""

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values."""
        return {
            "name": self.name,
            "title": self.title,
            "source": f"{self.source}, {self.paper}" if self.source else None,
            "note": self.note,
            "columns": [{"key": c.key, "name": c.name} for c in self.columns],
            "rows": [
                {
                    "name": row.name,
                    "ours": dict(row.ours),
                    "published": dict(row.published),
                    "marked": sorted(row.marked),
                }
                for row in self.rows
                if row.kind != "head"
            ],
        }

    def write_csv(self, path: Path) -> None:
        """One line per row, two columns per quantity where the paper has it: ours, published."""
        heads, keys = ["row"], []
        for column in self.columns:
            keys.append((column.key, False))
            heads.append(column.key)
            if self.published(column):
                keys.append((column.key, True))
                heads.append(f"{column.key}_published")
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(heads)
            for row in self.rows:
                if row.kind != "head":
                    values = [(row.published if paper else row.ours).get(k) for k, paper in keys]
                    writer.writerow([row.name, *values])

    def __str__(self) -> str:
        """The table for a terminal: ours, and the published value in brackets."""
        text = [[row.name for row in self.rows], *(self._cells(column) for column in self.columns)]
        heads = ["", *(column.name for column in self.columns)]
        widths = [max(map(len, (head, *cells))) for head, cells in zip(heads, text, strict=True)]
        lines = ["  ".join("-" * width for width in widths)]
        for cells in (heads, *zip(*text, strict=True)):
            pairs = list(zip(cells, widths, strict=True))
            rest = [f"{cell:>{width}}" for cell, width in pairs[1:]]
            lines.append("  ".join([f"{cells[0]:<{widths[0]}}", *rest]).rstrip())
        lines[:2] = lines[1::-1]
        lines += [f"({self.source} of the paper)"] if self.source else []
        lines += [f"* {self.mark}"] if self.mark else []
        return "\n".join([self.title, "", *(f"  {line}" for line in lines)])

    def _cells(self, column: Column) -> list[str]:
        """A column for a terminal, digits below digits."""
        ours = [self.show(row, column) for row in self.rows]
        if any(column.key in row.marked for row in self.rows):
            marks = ["*" if column.key in row.marked else " " for row in self.rows]
            ours = [value + mark for value, mark in zip(ours, marks, strict=True)]
        if not self.published(column):
            return ours
        known = [row.published.get(column.key) for row in self.rows]
        paper = ["" if value is None else f"({column.show(value)})" for value in known]
        width = max(map(len, paper))
        return [f"{a} {b:>{width}}" for a, b in zip(ours, paper, strict=True)]


@dataclass(frozen=True)
class Chart:
    """A chart; it becomes ``<name>.png``, and a part of the page.

    Attributes:
        name: Stem of its file.
        title: What it shows.
        caption: How to read it.
        draw: Draws it in given colours.
        size: Width and height in inches.
    """

    name: str
    title: str
    caption: str
    draw: Draw
    size: tuple[float, float] = (4.6, 2.5)


@dataclass(frozen=True)
class Line:
    """One row of pictures.

    Attributes:
        name: Whose it is.
        form: What is done to the images; may be empty.
        say: What it shows.
        pictures: ``[D, D, 3]`` uint8 each.
    """

    name: str
    form: str
    say: str
    pictures: Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures; it becomes ``<name>.png``, and a part of the page.

    Attributes:
        name: Stem of its file.
        title: What it shows.
        caption: How to read it.
        groups: Rows that belong together.
        ids: Of the images of each group.
    """

    name: str
    title: str
    caption: str
    groups: Sequence[Sequence[Line]]
    ids: Sequence[Sequence[str]]

    def strips(self) -> list[list[Strip]]:
        """The rows for the page."""
        return [
            [
                Strip(
                    line.name,
                    f"{line.form}: {line.say}" if line.form else line.say,
                    tuple(
                        Tile(data_uri(picture), f"{line.name} {line.form} of {image}")
                        for picture, image in zip(line.pictures, ids, strict=True)
                    ),
                )
                for line in group
            ]
            for group, ids in zip(self.groups, self.ids, strict=True)
        ]

    def draw(self, path: Path) -> None:
        """The rows as one picture file."""
        rows = [
            (f"{line.name}\n{line.form}".strip().replace(" (", "\n("), line.pictures)
            for group in self.groups
            for line in group
        ]
        longest = max(len(part) for name, _ in rows for part in name.split("\n"))
        figure, _ = picture_grid(rows, label=0.25 + _LETTER * longest)
        figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Findings:
    """Everything that an experiment found.

    Attributes:
        verdict: The result in one sentence, computed from the numbers.
        tables: The first is the one that the experiment is called after.
        charts: The figures.
        galleries: The pictures.
        notes: What differs from the paper and what to keep in mind, one sentence or two each.
    """

    verdict: str
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    galleries: Sequence[Gallery] = ()
    notes: Sequence[str] = ()
