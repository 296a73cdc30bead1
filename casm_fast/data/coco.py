"""COCO on disk: one item for every category of every picture.

A picture of COCO shows objects of several categories, and an `ImageSource` knows one label an
image. So an item is a pair (picture, category), the unit in which the pointing game and
localisation are scored on COCO: its label is the category, its boxes are those of the category's
objects, and its mask is what the objects cover. A picture comes once for each of its categories
(2.9 times on average), and a picture without objects not at all.

| what | where, below DIR |
|---|---|
| annotations | annotations/instances_NAME.json; NAME is val2014, val2017, train2017, … |
| pictures | NAME/, images/NAME/ or images/ |

Boxes are COCO's (x, y, width, height), rounded outwards to whole pixels and clipped to the picture.
Regions that are marked as crowds have no box of a single object; they count in the mask alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.decoding import Decoder, decode
from casm_fast.data.listing import check_folder, is_image, missing_files

logger = logging.getLogger(__name__)

# A box that ends on a pixel's edge but for the rounding of its sum does not reach the next pixel.
_SLACK = 1e-6


def annotation_files(root: Path) -> dict[str, Path]:
    """The annotation files of a folder by NAME, sorted; {} where there are none."""
    found = sorted((root / "annotations").glob("instances_*.json"))
    return {path.stem.removeprefix("instances_"): path for path in found}


class CocoSource:
    """An `ImageSource` over (picture, category) pairs of COCO.

    Attributes:
        name: "coco-<NAME>:<path>".
        classes: Category names by label, in the order of their ids.
        category_ids: COCO's id of each label.
        has_boxes: Always true.
        root: DIR.
        annotations: The annotation file.
        folder: The folder of the pictures.
        found: A sentence about what was found, and what is missing.
    """

    has_boxes = True

    def __init__(
        self,
        root: str | Path,
        split: str = "val",
        *,
        decoder: Decoder = decode,
    ) -> None:
        """Reads the annotations.

        Args:
            root: DIR, see the module.
            split: NAME, or how it begins when one NAME alone begins so: "val", "train".
            decoder: Reads one file.

        Raises:
            FileNotFoundError: There are no such annotations, or no folder of pictures.
            ValueError: Several NAMEs begin so, or the file is not COCO's or contradicts itself.
        """
        self.root = Path(root)
        check_folder(self.root, "coco")
        files = annotation_files(self.root)
        names = [split] if split in files else [name for name in files if name.startswith(split)]
        if not names:
            others = f"{', '.join(files)} alone" if files else "none"
            raise FileNotFoundError(
                f"coco: expected annotations/instances_{split}*.json in {self.root}, got {others}; "
                "give the folder that holds annotations/"
            )
        if len(names) > 1:
            specs = " or ".join(f"coco-{name}:{self.root}" for name in names)
            raise ValueError(
                f"coco: expected one set whose name begins with {split} in {self.root}, "
                f"got {', '.join(names)}; say {specs}"
            )
        (name,) = names
        self.name = f"coco-{name}:{self.root}"
        self.annotations = files[name]
        self.folder = self._pictures(name)
        self._decoder = decoder
        try:
            self._read(json.loads(self.annotations.read_bytes()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"coco: cannot read {self.annotations}: {reason}") from error
        self.found = self._sentence(name)
        logger.info("%s", self.found)

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self._labels)

    def image_id(self, index: int) -> str:
        """COCO's ids of the picture and of the category, such as "139/62"."""
        picture = self._ids[self._picture_of[index]]
        return f"{picture}/{self.category_ids[self._labels[index]]}"

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB; raises `DecodeError`."""
        return self._decoder(Path(self.address(index)))

    def address(self, index: int) -> str:
        """The path of the image file."""
        return str(self.folder / self._files[self._picture_of[index]])

    def label(self, index: int) -> int:
        """The category's place in ``classes``."""
        return int(self._labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        """Boxes of the category's single objects, ``[n, 4]`` (x0, y0, x1, y1) half-open."""
        index = range(len(self))[index]
        return self._boxes[self._box_starts[index] : self._box_starts[index + 1]]

    def picture_labels(self, index: int) -> NDArray[np.int64]:
        """Labels of all categories in the pair's picture, its own among them, ascending ``[k]``."""
        picture = self._picture_of[index]
        first, end = np.searchsorted(self._picture_of, [picture, picture + 1])
        labels: NDArray[np.int64] = self._labels[first:end]
        return labels

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the picture, by the annotation file."""
        height, width = self._sizes[self._picture_of[index]]
        return height, width

    def mask(self, index: int) -> NDArray[np.bool_]:
        """The pixels of the category's objects and crowds, by pycocotools (extra ``eval``).

        Args:
            index: Of the pair.

        Returns:
            ``[H, W]``.

        Raises:
            ImportError: pycocotools is missing.
        """
        try:
            from pycocotools import mask as codec
        except ImportError as error:
            raise ImportError(
                "coco: expected pycocotools, which reads masks, but it is not installed: "
                "pip install 'casm_fast[eval]'"
            ) from error
        index = range(len(self))[index]
        height, width = self._sizes[self._picture_of[index]]
        covered = np.zeros((height, width), np.bool_)
        for shape in self._shapes[index]:
            # Polygons and plain run lengths are encoded first; the rest is pycocotools' own form.
            plain = isinstance(shape, list) or isinstance(shape["counts"], list)
            parts = codec.frPyObjects(shape, height, width) if plain else shape
            whole = codec.merge(parts) if isinstance(parts, list) else parts
            covered |= codec.decode(whole).astype(np.bool_)
        return covered

    # --- reading ----------------------------------------------------------------------------------

    def _pictures(self, name: str) -> Path:
        places = [self.root / name, self.root / "images" / name, self.root / "images"]
        for place in places:
            if place.is_dir():
                return place
        raise FileNotFoundError(
            f"coco: expected the pictures of {name} in {places[0]}, {places[1]} or {places[2]}, "
            "got none of these folders"
        )

    def _read(self, content: Any) -> None:
        categories = sorted(content["categories"], key=lambda category: int(category["id"]))
        self.category_ids = tuple(int(category["id"]) for category in categories)
        self.classes = tuple(str(category["name"]) for category in categories)
        pictures = sorted(content["images"], key=lambda picture: int(picture["id"]))
        self._ids = [int(picture["id"]) for picture in pictures]
        self._files = [str(picture["file_name"]) for picture in pictures]
        self._sizes = [(int(picture["height"]), int(picture["width"])) for picture in pictures]
        place = {number: k for k, number in enumerate(self._ids)}
        label = {number: k for k, number in enumerate(self.category_ids)}

        pairs = _pairs(content["annotations"], place, label)
        order = sorted(pairs)
        self._picture_of = np.array([picture for picture, _ in order], np.int64)
        self._labels = np.array([label for _, label in order], np.int64)
        single = [
            (k, note["bbox"])
            for k, pair in enumerate(order)
            for note in pairs[pair]
            if not note.get("iscrowd")
        ]
        owners = np.array([k for k, _ in single], np.int64)
        sizes = np.array(self._sizes, np.int64)[self._picture_of[owners]]
        corners = _pixels([box for _, box in single], sizes)
        kept = (corners[:, 2:] > corners[:, :2]).all(axis=1)
        self._boxes: NDArray[np.int32] = corners[kept]
        self._box_starts = np.searchsorted(owners[kept], np.arange(len(order) + 1))
        self._crowds = sum(bool(note.get("iscrowd")) for notes in pairs.values() for note in notes)

    @cached_property
    def _shapes(self) -> list[list[Any]]:
        """What each object of a pair covers: most of the file, so kept only when masks are used."""
        content = json.loads(self.annotations.read_bytes())
        place = {number: k for k, number in enumerate(self._ids)}
        label = {number: k for k, number in enumerate(self.category_ids)}
        pairs = _pairs(content["annotations"], place, label)
        order = zip(self._picture_of.tolist(), self._labels.tolist(), strict=True)
        return [
            [note["segmentation"] for note in pairs[pair] if note.get("segmentation")]
            for pair in order
        ]

    def _sentence(self, name: str) -> str:
        shown = len(set(self._picture_of.tolist()))
        text = (
            f"coco: {name} with {len(self._ids):,} pictures in {self.folder}, {len(self.classes)} "
            f"categories, {len(self):,} pairs of both and {len(self._boxes):,} boxes"
        )
        if shown < len(self._ids):
            text += f"; left out: {len(self._ids) - shown:,} without an object"
        if self._crowds:
            text += f"; without a box: {self._crowds:,} crowds"
        present = {entry.name for entry in os.scandir(self.folder) if is_image(entry.name)}
        return text + missing_files([file for file in self._files if "/" not in file], present)


def _pairs(
    annotations: Iterable[Mapping[str, Any]], place: Mapping[int, int], label: Mapping[int, int]
) -> dict[tuple[int, int], list[Mapping[str, Any]]]:
    """The annotations of each pair (place of the picture, label of the category)."""
    pairs: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for note in annotations:
        if note["image_id"] not in place or note["category_id"] not in label:
            raise ValueError(
                f"annotation {note['id']} is of a picture or category that is not listed"
            )
        pairs.setdefault((place[note["image_id"]], label[note["category_id"]]), []).append(note)
    if not pairs:
        raise ValueError("expected at least one annotated object, got none")
    return pairs


def _pixels(boxes: Sequence[Sequence[float]], sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    """(x, y, width, height) as half-open corners of whole pixels within (height, width)."""
    table = np.array(boxes, np.float64).reshape(-1, 4)
    low = np.floor(table[:, :2] + _SLACK)
    high = np.ceil(table[:, :2] + table[:, 2:] - _SLACK)
    corners: NDArray[np.int32] = np.clip(
        np.concatenate([low, high], axis=1), 0, np.tile(sizes[:, ::-1], 2)
    ).astype(np.int32)
    return corners


# --- writing --------------------------------------------------------------------------------------


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask as COCO's plain run lengths: down the columns, background first.

    Args:
        mask: ``[H, W]``.

    Returns:
        "size" ``[H, W]`` and "counts".
    """
    flat = np.concatenate([[False], mask.ravel(order="F")])
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]), mask.size)
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def instances(
    pictures: Iterable[Mapping[str, Any]], categories: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The content of an annotation file; pictures and categories are numbered from 1.

    Args:
        pictures: Each with "file_name", "height", "width" and "objects": a list of (label, box
            ``(x0, y0, x1, y1)``, segmentation or None).
        categories: Names by label.

    Returns:
        What `json` writes.
    """
    images: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures, 1):
        size = {key: picture[key] for key in ("file_name", "height", "width")}
        images.append({"id": number, **size})
        for label, box, shape in picture["objects"]:
            x0, y0, x1, y1 = map(int, box)
            note: dict[str, Any] = {
                "id": len(notes) + 1,
                "image_id": number,
                "category_id": int(label) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            if shape is not None:
                note |= {"segmentation": shape, "area": sum(shape["counts"][1::2])}
            notes.append(note)
    named = [{"id": k, "name": name} for k, name in enumerate(categories, 1)]
    return {"images": images, "annotations": notes, "categories": named}
