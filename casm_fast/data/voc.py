"""PASCAL VOC on disk: one item for every class of every picture.

As in COCO a picture shows objects of several classes, so an item is a pair (picture, class), the
unit of the pointing game: its label is the class, its boxes are those of the class's objects. A
picture comes once for each of its classes, and a picture without objects not at all.

| what | where, below FOLDER |
|---|---|
| FOLDER | DIR/VOCdevkit/VOC2007, DIR/VOC2007, DIR itself; any year |
| pictures | JPEGImages/ID.jpg |
| objects | Annotations/ID.xml |
| sets | ImageSets/Main/NAME.txt; NAME is test, val, trainval, train, … |
| masks | SegmentationObject/ID.png and SegmentationClass/ID.png, of some pictures only |

Boxes count from 0 and are half-open, unlike the numbers in the files, and cover the same pixels.

Objects that VOC marks as difficult are objects here: their boxes stand among the others, and a
class that shows nothing else in a picture is an item, too, which is how the pointing game counts
them (Zhang et al. 2018 and TorchRay). VOC's own detection score passes over them;
`VocSource.difficult` says which they are. The pointing game's difficult *pictures* are another
thing: those where the class covers little and other classes are present, which follows from
`VocSource.boxes`, `VocSource.size` and `VocSource.picture_labels`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.annotations import VocAnnotation, read_voc
from casm_fast.data.decoding import Decoder, decode
from casm_fast.data.listing import check_folder, is_image, missing_files

logger = logging.getLogger(__name__)

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""The twenty classes of VOC in the order of their numbers in the segmentation masks, from 1."""

VOID = 255
"""The value in a segmentation mask of borders and of what belongs to no object."""

_SETS = "ImageSets/Main"


def voc_folders(root: Path) -> list[Path]:
    """The folders of VOC at or below a path: those that hold JPEGImages; [] where there is none."""
    inner = [root, *sorted(root.glob("VOC2*")), *sorted(root.glob("VOCdevkit/VOC2*"))]
    return [folder for folder in inner if (folder / "JPEGImages").is_dir()]


class VocSource:
    """An `ImageSource` over (picture, class) pairs of PASCAL VOC.

    Every XML file of the set is read once, when it is opened.

    Attributes:
        name: "voc-<NAME><year>:<path>", without the year where the folder's name has none.
        classes: Class names by label, in alphabetical order as VOC numbers them: VOC's twenty, or,
            where there are others, those that the set's class lists and objects name.
        has_boxes: Always true.
        root: DIR.
        folder: The folder that holds JPEGImages.
        files: The file of each picture in JPEGImages, in the order of the set.
        found: A sentence about what was found, and what is missing.
    """

    has_boxes = True

    def __init__(self, root: str | Path, split: str = "val", *, decoder: Decoder = decode) -> None:
        """Reads the set and its annotations.

        Args:
            root: DIR, see the module.
            split: NAME, or NAME and year such as "test2007".
            decoder: Reads one file.

        Raises:
            FileNotFoundError: There is no such set, or one of its annotations is missing.
            ValueError: Several years have the set, or a file contradicts itself.
        """
        self.root = Path(root)
        check_folder(self.root, "voc")
        self._decoder = decoder
        self.folder, set_name = _find(self.root, split)
        self.name = f"voc-{set_name}{_year(self.folder)}:{self.root}"
        stems = _stems(self.folder / _SETS / f"{set_name}.txt")
        present = {
            os.path.splitext(entry.name)[0]: entry.name
            for entry in os.scandir(self.folder / "JPEGImages")
            if is_image(entry.name)
        }
        self.files = [present.get(stem, f"{stem}.jpg") for stem in stems]
        self._stems = stems
        self._read(self._annotations(set_name), set_name)
        self.found = self._sentence(set_name) + missing_files(self.files, set(present.values()))
        logger.info("%s", self.found)

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self._labels)

    def image_id(self, index: int) -> str:
        """The picture's id and its class, such as "000067/dog"."""
        return f"{self._stems[self._picture_of[index]]}/{self.classes[self._labels[index]]}"

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB; raises `DecodeError`."""
        return self._decoder(Path(self.address(index)))

    def address(self, index: int) -> str:
        """The path of the image file."""
        return str(self.folder / "JPEGImages" / self.files[self._picture_of[index]])

    def label(self, index: int) -> int:
        """The class's place in ``classes``."""
        return int(self._labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        """Boxes of the class's objects, ``[n, 4]`` (x0, y0, x1, y1) half-open; see the module."""
        return self._boxes[self._objects(index)]

    def difficult(self, index: int) -> NDArray[np.bool_]:
        """Which of the boxes VOC marks as difficult, ``[n]``."""
        return self._difficult[self._objects(index)]

    def picture_labels(self, index: int) -> NDArray[np.int64]:
        """Labels of all classes in the pair's picture, its own among them, ascending ``[k]``."""
        picture = self._picture_of[index]
        first, end = np.searchsorted(self._picture_of, [picture, picture + 1])
        return self._labels[first:end]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the picture, by its XML file, or of its pixels where that is silent.

        Raises:
            DecodeError: The XML does not say and the picture cannot be read.
        """
        height, width = map(int, self._sizes[self._picture_of[index]])
        if not height:
            height, width, _ = self.image(index).shape
        return height, width

    def has_masks(self, index: int) -> bool:
        """Whether the pair's picture is segmented."""
        return self._segmentation(index, "SegmentationObject").is_file()

    def masks(self, index: int) -> NDArray[np.bool_]:
        """The pixels of each object of the class, in the order of its boxes, ``[n, H, W]``.

        SegmentationObject numbers the objects in the order of the XML file, from 1.

        Raises:
            FileNotFoundError: The picture is not segmented.
            ValueError: The file holds colours instead of numbers.
        """
        numbers = self._numbers[self._objects(index)]
        drawn = self._drawn(index, "SegmentationObject")
        masks: NDArray[np.bool_] = drawn[None] == numbers[:, None, None]
        return masks

    def mask(self, index: int) -> NDArray[np.bool_]:
        """The pixels of the class, ``[H, W]``, by SegmentationClass; raises as `masks`."""
        covered: NDArray[np.bool_] = (
            self._drawn(index, "SegmentationClass") == self.label(index) + 1
        )
        return covered

    def ignore(self, index: int) -> NDArray[np.bool_]:
        """The pixels that count as nothing (borders), ``[H, W]``; raises as `masks`."""
        void: NDArray[np.bool_] = self._drawn(index, "SegmentationClass") == VOID
        return void

    # --- reading ----------------------------------------------------------------------------------

    def _objects(self, index: int) -> slice:
        index = range(len(self))[index]
        return slice(self._starts[index], self._starts[index + 1])

    def _segmentation(self, index: int, kind: str) -> Path:
        return self.folder / kind / f"{self._stems[self._picture_of[index]]}.png"

    def _drawn(self, index: int, kind: str) -> NDArray[np.uint8]:
        from PIL import Image

        path = self._segmentation(index, kind)
        if not path.is_file():
            raise FileNotFoundError(
                f"voc: expected the segmentation of a picture in {path}, got none; VOC segments "
                "some pictures only, `has_masks` says which"
            )
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L"):
                raise ValueError(
                    f"voc: expected a number a pixel (mode P or L) in {path}, got mode "
                    f"{picture.mode}"
                )
            return np.asarray(picture, np.uint8)

    def _annotations(self, set_name: str) -> list[VocAnnotation]:
        folder = self.folder / "Annotations"
        check_folder(folder, "voc")
        present = {entry.name for entry in os.scandir(folder)}
        names = [f"{stem}.xml" for stem in self._stems]
        missing = [name for name in names if name not in present]
        if missing:
            raise FileNotFoundError(
                f"voc: expected an annotation in {folder} for every picture of {set_name}, got "
                f"none for {len(missing):,} of {len(names):,}, {missing[0]} first"
            )
        return [read_voc(folder / name) for name in names]

    def _read(self, notes: Sequence[VocAnnotation], set_name: str) -> None:
        self._sizes = np.array([note.size for note in notes], np.int32).reshape(-1, 2)
        shown = {name for note in notes for name in note.names}
        self.classes = self._class_names(shown, set_name)
        label_of = {name: label for label, name in enumerate(self.classes)}

        picture = np.repeat(np.arange(len(notes)), [len(note.names) for note in notes])
        label = np.array([label_of[name] for note in notes for name in note.names], np.int64)
        number = np.concatenate([np.arange(1, len(note.names) + 1) for note in notes])
        boxes = np.array([box for note in notes for box in note.boxes], np.int32).reshape(-1, 4)
        difficult = np.array([flag for note in notes for flag in note.difficult], np.bool_)
        self._boxless = int((boxes[:, 2] == 0).sum())
        if not len(boxes):
            raise ValueError(
                f"voc: expected at least one object in the annotations of {set_name} in "
                f"{self.folder}, got none"
            )

        # Pairs are sorted by picture and class; the objects of a pair keep the order of the XML.
        pair = picture * len(self.classes) + label
        pairs = np.unique(pair)
        self._picture_of, self._labels = np.divmod(pairs, len(self.classes))
        kept = np.argsort(pair, kind="stable")
        kept = kept[boxes[kept, 2] > 0]
        self._boxes: NDArray[np.int32] = boxes[kept]
        self._difficult: NDArray[np.bool_] = difficult[kept]
        self._numbers = number[kept]
        self._starts = np.searchsorted(pair[kept], np.append(pairs, pairs[-1] + 1))

    def _class_names(self, shown: set[str], set_name: str) -> tuple[str, ...]:
        if shown <= set(VOC_CLASSES):
            return VOC_CLASSES
        ending = f"_{set_name}.txt"
        lists = [path.name for path in (self.folder / _SETS).glob(f"*{ending}")]
        return tuple(sorted(shown | {name.removesuffix(ending) for name in lists}))

    def _sentence(self, set_name: str) -> str:
        pictures = len(np.unique(self._picture_of))
        folder = self.folder / "JPEGImages"
        segmented = self.folder / "SegmentationObject"
        drawn = set(os.listdir(segmented)) if segmented.is_dir() else set()
        masks = sum(f"{stem}.png" in drawn for stem in self._stems)
        text = (
            f"voc: {set_name}{_year(self.folder)} with {len(self._stems):,} pictures in {folder}, "
            f"{len(self.classes)} classes, {len(self):,} pairs of both, {len(self._boxes):,} boxes "
            f"({self._difficult.sum():,} difficult) and masks of {masks:,} pictures"
        )
        if pictures < len(self._stems):
            text += f"; left out: {len(self._stems) - pictures:,} without an object"
        if self._boxless:
            text += f"; without a box: {self._boxless:,} objects"
        return text


def _year(folder: Path) -> str:
    """The year in a folder's name, such as "2007" of VOC2007; "" where there is none."""
    found = re.fullmatch(r"VOC(\d{4})", folder.name or folder.resolve().name)
    return found[1] if found else ""


def _find(root: Path, split: str) -> tuple[Path, str]:
    """The folder that has the set, and the set's NAME."""
    folders = voc_folders(root)
    if not folders:
        raise FileNotFoundError(
            f"voc: expected JPEGImages/ in {root}, {root}/VOC2007 or {root}/VOCdevkit/VOC2007 (or "
            "another year), got none; give the folder that holds VOCdevkit/"
        )
    have = [
        (folder, name)
        for folder in folders
        for name in {split, split.removesuffix(_year(folder))}
        if (folder / _SETS / f"{name}.txt").is_file()
    ]
    if not have:
        sets = {
            f"{path.stem}{_year(folder)}"
            for folder in folders
            for path in (folder / _SETS).glob("*.txt")
            if "_" not in path.stem
        }
        others = f"{', '.join(sorted(sets))} alone" if sets else "none"
        raise FileNotFoundError(
            f"voc: expected {_SETS}/{split}.txt in {', '.join(map(str, folders))}, got {others}; "
            + (f"say voc-{min(sets)}:{root}" if sets else "add the lists of VOC's devkit")
        )
    if len(have) > 1:
        specs = " or ".join(f"voc-{name}{_year(folder)}:{root}" for folder, name in have)
        raise ValueError(
            f"voc: expected one year with a set {split} in {root}, got "
            f"{', '.join(folder.name for folder, _ in have)}; say {specs}"
        )
    return have[0]


def _stems(path: Path) -> list[str]:
    """The ids of a list: the first word of every line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    stems = [line.split()[0] for line in lines if line.strip()]
    if not stems:
        raise ValueError(f"voc: expected pictures in {path}, got none")
    if len(set(stems)) < len(stems):
        twice = next(stem for k, stem in enumerate(stems) if stem in stems[:k])
        raise ValueError(f"voc: expected every picture once in {path}, got {twice} twice")
    return stems
