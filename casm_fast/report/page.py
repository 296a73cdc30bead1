"""The report: one HTML file that needs nothing else, neither files beside it nor a network."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from casm_fast.data import localization, predictions
from casm_fast.data.predictions import Description
from casm_fast.data.source import ImageSource, open_source
from casm_fast.models import checkpoint
from casm_fast.models.saliency import SaliencyModel
from casm_fast.report import charts, pictures
from casm_fast.report.charts import Chart
from casm_fast.report.pictures import Pictures
from casm_fast.report.rendering import write

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

GROUPS = 2
"""Groups of consecutive images in the gallery."""

SEED = 2020
"""Where the groups begin is drawn from this seed and the number of images: the same table, the same
page."""


class HasTable(Protocol):
    """Anything that holds a table of predictions, such as the result of ``casm_fast.extract``."""

    @property
    def table(self) -> pa.Table:
        """The rows, with their description in the metadata."""


class HasDict(Protocol):
    """Anything that turns into plain numbers, such as the result of ``casm_fast.evaluate``."""

    def to_dict(self) -> dict[str, Any]:
        """The scores as dictionaries, lists and numbers."""


@dataclass(frozen=True)
class Tile:
    """One picture of the page.

    Attributes:
        uri: The image itself.
        alt: What it shows, for those who cannot see it.
        name: Caption.
        iou: Best IoU, None without true boxes.
        predicted_boxes: Attributes of SVG rectangles.
        true_boxes: Attributes of SVG rectangles.
    """

    uri: str
    alt: str
    name: str = ""
    iou: float | None = None
    predicted_boxes: tuple[str, ...] = ()
    true_boxes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Strip:
    """One row of pictures.

    Attributes:
        name: What the row is.
        say: What it shows.
        pictures: From left to right.
        boxes: Whether boxes are drawn.
        captions: Whether IoU and class stand below.
    """

    name: str
    say: str
    pictures: tuple[Tile, ...]
    boxes: bool = False
    captions: bool = False


@dataclass(frozen=True)
class Card:
    """One number that matters.

    Attributes:
        name: What it is.
        value: The number.
        share: Length of its bar, in [0, 1].
        baseline: Where the centred box stands on the same bar.
        note: What it means.
        compare: What it stands against.
    """

    name: str
    value: str
    share: float
    baseline: float | None
    note: str
    compare: str = ""


def report(
    extraction: str | Path | pa.Table | HasTable,
    scores: str | Path | Mapping[str, Any] | HasDict,
    output: str | Path = "report.html",
    *,
    run: str | Path | None = None,
    model: SaliencyModel | str | Path | None = None,
    source: ImageSource | str | Path | None = None,
    columns: int = 7,
) -> Path:
    """Write a report of an extraction and its scores.

    Args:
        extraction: Parquet file of ``casm_fast.extract``, its table, or the extraction itself.
        scores: Result of ``casm_fast.evaluate``, or the JSON file that it wrote.
        output: The HTML file.
        run: Folder of the training run, for its curves.
        model: The model, for the pictures; by default the checkpoint that the table names.
        source: The images, for the pictures; by default those that the table names.
        columns: Pictures side by side.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError: If the table, the checkpoint or the images are gone.
        ValueError: If the images are not those that the table was made from.
    """
    table, description = read_table(extraction)
    numbers = _numbers(scores)
    network = load_model(model, description)
    images = open_source(source if source is not None else description.source, split="val")
    page = _Page(table, description, numbers, network, images, columns)
    return write("report/page.html.jinja", page.context(_log(run)), output)


class _Page:
    """Everything that the template is told."""

    def __init__(
        self,
        table: pa.Table,
        description: Description,
        scores: Mapping[str, Any],
        model: SaliencyModel,
        source: ImageSource,
        columns: int,
    ) -> None:
        self.rows: list[dict[str, Any]] = table.to_pylist()
        self.description = description
        self.scores = scores
        self.model = model
        self.source = source
        self.columns = columns
        self.readable = [i for i, row in enumerate(self.rows) if row["error"] is None]
        self.localized = [i for i in self.readable if self.rows[i]["gt_net_boxes"]]
        self.truth = [self.rows[i]["gt_net_boxes"] for i in self.localized]
        self.boxes = np.array([net_box(self.rows[i]) for i in self.localized]).reshape(-1, 4)
        self.iou = dict(zip(self.localized, localization.iou(self.boxes, self.truth), strict=True))
        for i in (0, len(self.rows) - 1):
            known = source.image_id(i) if i < len(source) else "no image"
            if known != self.rows[i]["image_id"]:
                raise ValueError(
                    f"report: expected image {self.rows[i]['image_id']!r} at position {i} of "
                    f"{source.name}, got {known!r}; give the images that the boxes were made from"
                )

    def context(self, log: list[dict[str, Any]]) -> dict[str, Any]:
        """Values of the template's names."""
        gallery, missing = self.gallery()
        curves = charts.training_charts(log)
        return {
            "title": f"casm-fast: {self.description.source}",
            "eyebrow": f"casm-fast report, {datetime.now():%d %B %Y}".replace(" 0", " "),
            "verdict": verdict(self.scores),
            "lead": self.lead(),
            "cards": self.cards(),
            "rows": self.table_rows(),
            "table_note": self.table_note(),
            "size": self.description.convention.size,
            "columns": self.columns,
            "gallery": gallery,
            "gallery_note": (
                "The inpainted row is missing: it needs OpenCV (pip install 'casm_fast[inpaint]')."
                if missing
                else ""
            ),
            "extremes": self.extremes(),
            "counted": f"{len(self.localized):,}",
            "histograms": self.histograms(),
            "curves": curves,
            "training_note": "How classifier and mask changed while they were trained together.",
            "convention": self.scores["explained"],
            "provenance": self.provenance(),
            "version": self.description.versions.get("casm_fast", ""),
            "footer": "Written by casm-fast. Everything on this page is inside this file.",
        }

    def lead(self) -> str:
        """What was measured on what, in a sentence."""
        count = self.scores["counts"]["images"]
        found = self.description.convention
        return (
            f"{count:,} images {_place(self.description.source)}, one box each: the tight box "
            f"around the {'largest connected' if found.component == 'largest' else 'kept'} part of "
            "the saliency map. The model was never shown a box."
        )

    def cards(self) -> list[Card]:
        """The numbers that matter most."""
        ours, cards = self.scores["localisation"], []
        centre = next((b for b in self.scores["baselines"] if b["name"] == "centred box"), None)
        if ours is not None and centre is not None:
            cards.append(
                Card(
                    "Localisation error, LE",
                    _percent(ours["le"]),
                    ours["le"],
                    centre["le"],
                    "Boxes with an IoU of 0.5 or less.",
                    f"Centred box: {_percent(centre['le'])}",
                )
            )
            if ours["om"] is not None:
                cards.append(
                    Card(
                        "Official metric, OM",
                        _percent(ours["om"]),
                        ours["om"],
                        centre["om"],
                        "Box or class is wrong.",
                        f"Centred box: {_percent(centre['om'])}",
                    )
                )
            cards.append(
                Card(
                    "F1 of the saliency",
                    _percent(ours["f1"]),
                    ours["f1"],
                    centre["f1"],
                    "How well it fills the true box.",
                    f"Centred box: {_percent(centre['f1'])}",
                )
            )
        if self.scores["top1"] is not None:
            cards.append(
                Card(
                    "Top-1 accuracy",
                    _percent(self.scores["top1"]),
                    self.scores["top1"],
                    None,
                    "Of the classifier trained along.",
                    f"Top-5: {_percent(self.scores['top5'])}",
                )
            )
        statistics = self.scores["saliency"]
        cards.append(
            Card(
                "Mean saliency",
                _percent(statistics["mean"]),
                statistics["mean"],
                None,
                "Share of the picture that is marked, on average.",
            )
        )
        return cards[:4]

    def table_rows(self) -> list[dict[str, Any]]:
        """The model, the baselines, and published figures where they compare."""
        ours = self.scores["localisation"]
        if ours is None:
            return []
        rows = []
        for entry in (ours, *self.scores["baselines"]):
            rows.append(
                {
                    "kind": "ours" if entry is ours else "",
                    "name": entry["name"].capitalize(),
                    "cells": [
                        *[_percent(entry[key]) for key in ("le", "om", "f1", "f1_mean")],
                        f"{entry['iou']:.2f}",
                        _percent(entry["coverage"]),
                    ],
                }
            )
        for entry in self.scores["published"]:
            cells = [_percent(entry[key]) for key in ("le", "om", "f1")]
            rows.append({"kind": "paper", "name": entry["name"], "cells": [*cells, "–", "–", "–"]})
        return rows

    def table_note(self) -> str:
        """The statistics of the maps, and why published figures are absent."""
        s = self.scores["saliency"]
        spread = "" if s["std"] is None else f", which varies by {s['std']:.2f} between images"
        note = (
            "LE counts boxes with an IoU of at most 0.5, OM boxes or classes that are wrong; F1 "
            "compares the saliency itself with the best true box, or with all of them. "
            f"The saliency maps mark {_percent(s['mean'])} of a picture{spread}; "
            f"their total variation is {s['tv']:,.0f}, "
            f"their entropy {s['entropy']:.3f} bits (one-sided)."
        )
        if not self.scores["published"]:
            note += (
                " Published figures are left out: they hold for all 50,000 validation images of "
                "ImageNet under one convention, and these are not those."
            )
        return note

    def gallery(self) -> tuple[list[list[Strip]], bool]:
        """Groups of consecutive images in every form; whether the inpainted row is missing."""
        groups, missing = [], False
        for indices in choose_group(self.rows, self.columns, GROUPS):
            drawn = self.draw(indices)
            strips = [
                Strip(
                    "Original",
                    "with the predicted and the true box",
                    tuple(
                        self.tile(i, d.original, "image")
                        for i, d in zip(indices, drawn, strict=True)
                    ),
                    boxes=True,
                    captions=True,
                ),
                *self.forms(indices, drawn),
            ]
            missing = missing or any(d.inpainted is None for d in drawn)
            groups.append(strips)
        return groups, missing

    def forms(self, indices: Sequence[int], drawn: Sequence[Pictures]) -> list[Strip]:
        """The rows below the originals."""
        rows: list[tuple[str, str, list[NDArray[np.uint8] | None]]] = [
            ("Saliency", "bright is evidence for the class", [d.saliency for d in drawn]),
            ("Masked-in", "what the map keeps", [d.masked_in for d in drawn]),
            ("Masked-out", "what is left without it", [d.masked_out for d in drawn]),
            ("Inpainted", "the hole, filled from its surroundings", [d.inpainted for d in drawn]),
        ]
        return [
            Strip(
                name,
                say,
                tuple(
                    self.tile(i, picture, name.lower())
                    for i, picture in zip(indices, made, strict=True)
                    if picture is not None
                ),
            )
            for name, say, made in rows
            if any(picture is not None for picture in made)
        ]

    def extremes(self) -> list[list[Strip]]:
        """The images with the highest and with the lowest IoU."""
        order = sorted(self.localized, key=lambda i: (-self.iou[i], str(self.rows[i]["image_id"])))
        if len(order) < 2 * self.columns:
            return []
        groups = []
        for name, say, indices in (
            ("Best", "the highest IoU", order[: self.columns]),
            ("Worst", "the lowest IoU", order[: -self.columns - 1 : -1]),
        ):
            drawn = self.draw(indices)
            originals, maps = (
                tuple(
                    self.tile(i, getattr(d, form), form)
                    for i, d in zip(indices, drawn, strict=True)
                )
                for form in ("original", "saliency")
            )
            groups.append(
                [
                    Strip(name, say, originals, boxes=True, captions=True),
                    Strip("", "", maps, boxes=True),
                ]
            )
        return groups

    def histograms(self) -> list[Chart]:
        """How IoU and box size are distributed."""
        if not self.localized:
            return []
        convention = self.description.convention
        size = convention.size
        centre = np.tile(localization.centred_box(size), (len(self.localized), 1))
        flat, _ = localization.pair(self.truth)
        ours = '<span class="swatch"></span>'
        other = '<span class="swatch line"></span>'
        return [
            Chart(
                "Overlap with the true box",
                f"{ours}this model, {other}a centred box. "
                "Right of the dashed line a box counts as correct.",
                charts.iou_chart(
                    np.array([self.iou[i] for i in self.localized]),
                    localization.iou(centre, self.truth),
                ),
            ),
            Chart(
                "Size of the boxes",
                f"{ours}predicted, {other}true. "
                "Where the two part, boxes are systematically too large or too small.",
                charts.area_chart(
                    localization.area(self.boxes) / size**2, localization.area(flat) / size**2
                ),
            ),
        ]

    def provenance(self) -> list[tuple[str, str]]:
        """Where every number comes from."""
        d = self.description
        rate = len(self.rows) / d.seconds if d.seconds else 0
        facts = [
            ("Images", d.source),
            ("Model", d.checkpoint or "from memory"),
            ("Weights", f"sha256 {d.model[:16]}" if d.model else ""),
            ("Extraction", f"{len(self.rows):,} images in {d.seconds:.1f} s, {rate:,.0f} images/s"),
            ("Device", d.device),
            ("Versions", ", ".join(f"{name} {version}" for name, version in d.versions.items())),
            ("Commit", commit() or ""),
            ("Options", ", ".join(f"{k} {v}" for k, v in d.config.items() if v is not None)),
        ]
        return [(name, text) for name, text in facts if text]

    def draw(self, indices: Sequence[int]) -> list[Pictures]:
        """Pictures of rows of the table."""
        return pictures.draw(self.model, self.source, indices, self.description.convention)

    def tile(self, index: int, image: NDArray[np.uint8], what: str) -> Tile:
        """A picture of a row of the table."""
        row = self.rows[index]
        name = row["predicted_name"] or f"class {row['predicted']}"
        wrong = row["label"] >= 0 and row["label"] != row["predicted"]
        return Tile(
            uri=pictures.data_uri(image),
            alt=f"{what} of {row['image_id']}, predicted {name}" + (" (wrong)" if wrong else ""),
            name=f"✗ {name}" if wrong else name,
            iou=self.iou.get(index),
            predicted_boxes=(_rectangle(net_box(row)),),
            true_boxes=tuple(_rectangle(box) for box in row["gt_net_boxes"] or []),
        )


def verdict(scores: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    ours = scores["localisation"]
    if ours is None:
        count = scores["counts"]["images"] - scores["counts"]["unreadable"]
        return f"{count:,} images have a box; none has a true box to score it with."
    centre = next(entry for entry in scores["baselines"] if entry["name"] == "centred box")
    found, simple = 100 * (1 - ours["le"]), 100 * (1 - centre["le"])
    if ours["le"] < centre["le"]:
        return (
            f"The box finds the object in {found:.0f} of 100 images, "
            f"where one in the middle of the picture finds {simple:.0f}."
        )
    return (
        f"The box finds the object in {found:.0f} of 100 images, "
        f"no better than one in the middle of the picture ({simple:.0f})."
    )


def commit() -> str | None:
    """The commit of the package's working tree; None for an installed package, or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def choose_group(rows: Sequence[Mapping[str, Any]], columns: int, groups: int) -> list[list[int]]:
    """Groups of consecutive readable images, in the order of their ids.

    Where the groups begin depends on the number of images alone.

    Args:
        rows: Rows of a table.
        columns: Images per group.
        groups: Most groups to choose.

    Returns:
        Positions in ``rows``.
    """
    readable = [i for i, row in enumerate(rows) if row["error"] is None]
    order = sorted(readable, key=lambda i: str(rows[i]["image_id"]))
    width = min(columns, len(order))
    places = np.random.default_rng(SEED).permutation(len(order) // width)[:groups]
    return [order[place * width : (place + 1) * width] for place in sorted(places)]


def read_table(source: str | Path | pa.Table | HasTable) -> tuple[pa.Table, Description]:
    """A table of predictions in any of its forms, and its description."""
    if isinstance(source, (str, Path)):
        return predictions.read(source)
    table = source.table if hasattr(source, "table") else source
    return table, predictions.description_of(table)


def _numbers(scores: str | Path | Mapping[str, Any] | HasDict) -> Mapping[str, Any]:
    """The scores as plain numbers, the way JSON holds them."""
    if isinstance(scores, (str, Path)):
        path = Path(scores)
        if not path.is_file():
            raise FileNotFoundError(
                f"expected the JSON file of an evaluation, got {path}: no such file"
            )
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return scores if isinstance(scores, Mapping) else scores.to_dict()


def load_model(model: SaliencyModel | str | Path | None, description: Description) -> SaliencyModel:
    """The model in eval mode: the one given, else the checkpoint that the table names."""
    if isinstance(model, SaliencyModel):
        return model
    path = model if model is not None else description.checkpoint
    if path is None:
        raise ValueError(
            "report: expected `model`, because the table was made by a model in memory, got None"
        )
    return checkpoint.load(path)


def _log(run: str | Path | None) -> list[dict[str, Any]]:
    if run is None:
        return []
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"report: expected the folder of a training run, got {run}: no log.jsonl"
        )
    return charts.read_log(path)


def _place(source: str) -> str:
    """Where images come from, for people: the folder's name instead of its whole path."""
    kind, colon, rest = source.partition(":")
    if kind == "synthetic":
        return "of the embedded synthetic set"
    if kind == "wsol":  # "wsol:metadata/ILSVRC/test,images=…"
        lists = rest.removesuffix(",proxy").partition(",images=")[0]
        return "from " + "/".join(Path(lists).parts[-2:])
    where = Path(rest if colon else source).name
    return f"from {where} (ImageNet layout)" if kind.startswith("imagenet") else f"from {where}"


def net_box(row: Mapping[str, Any]) -> list[int]:
    """The predicted box of a row, in network pixels."""
    return [row[f"net_{name}"] for name in ("x0", "y0", "x1", "y1")]


def _rectangle(box: Sequence[int]) -> Any:
    """Attributes of an SVG rectangle; integers only, so that nothing needs escaping."""
    from markupsafe import Markup

    x0, y0, x1, y1 = (int(corner) for corner in box)
    return Markup(f'x="{x0}" y="{y0}" width="{max(x1 - x0, 0)}" height="{max(y1 - y0, 0)}"')


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
