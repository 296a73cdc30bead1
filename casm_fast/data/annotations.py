"""Ground-truth files: XML of ImageNet and PASCAL VOC, and lists that name each image's class."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

_WNID = re.compile(r"n\d{8}")

# Besides bad XML: values that are no numbers, and numbers that an int32 does not hold.
_BAD_XML = (ElementTree.ParseError, ValueError, OverflowError)
_MOST = 2**31 - 1  # an int32 holds


@dataclass(frozen=True)
class Annotation:
    """What an XML file says about an image.

    Attributes:
        names: Class of each object, such as "n01440764".
        boxes: ``[n, 4]`` int32 (x0, y0, x1, y1), in pixels of the upright image.
    """

    names: tuple[str, ...]
    boxes: NDArray[np.int32]


@dataclass(frozen=True)
class VocAnnotation:
    """What an XML file of PASCAL VOC says about a picture.

    Attributes:
        size: (height, width), (0, 0) where the file does not say.
        names: Class of each object, such as "aeroplane".
        boxes: (x0, y0, x1, y1) of each, half-open, in pixels; (0, 0, 0, 0) without a pixel.
        difficult: Whether each is marked as difficult.
    """

    size: tuple[int, int]
    names: tuple[str, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    difficult: tuple[bool, ...]


def read_annotation(path: str | Path) -> Annotation:
    """Reads the objects of an XML file of ImageNet.

    xmin, ymin, xmax, ymax are taken as they stand for a half-open box, the convention of the CASM
    authors' scoring. (PASCAL VOC itself counts from 1 and includes the last pixel, see `read_voc`,
    which differs by at most one pixel a side.)

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not such XML; the message names it.
    """
    try:
        things = list(_root(path).iter("object"))
        names = tuple((thing.findtext("name") or "").strip() for thing in things)
        boxes = np.array([[int(value) for value in _bounds(t)] for t in things], np.int32)
    except _BAD_XML as error:
        raise ValueError(f"cannot read the annotation {path}: {error}") from error
    return Annotation(names, boxes.reshape(-1, 4))


def read_voc(path: Path) -> VocAnnotation:
    """Reads an XML file of PASCAL VOC.

    VOC counts pixels from 1 and xmax, ymax are the last ones inside; the boxes returned count from
    0 and are half-open, which covers the same pixels. Fractions are rounded outwards, and what
    leaves the picture is cut off where its size is known.

    Raises:
        ValueError: The file is not such XML; the message names it.
    """
    try:
        root = _root(path)
        size = {child.tag: child.text for tag in root.findall("size") for child in tag}
        height, width = (int(float(size.get(tag) or 0)) for tag in ("height", "width"))
        height, width = (height, width) if min(height, width) > 0 else (0, 0)
        names, boxes, difficult = [], [], []
        for number, thing in enumerate(root.findall("object"), 1):
            tags = {child.tag: child for child in thing}
            name = (tags["name"].text or "").strip() if "name" in tags else ""
            if not name:
                raise ValueError(f"object {number} has no name")
            names.append(name)
            boxes.append(_half_open(_bounds(thing), width or _MOST, height or _MOST))
            flag = (tags["difficult"].text or "").strip() if "difficult" in tags else "0"
            if flag not in ("0", "1"):
                raise ValueError(f"expected 0 or 1 for difficult, got {flag!r}")
            difficult.append(flag == "1")
    except _BAD_XML as error:
        raise ValueError(f"cannot read the annotation {path}: {error}") from error
    return VocAnnotation((height, width), tuple(names), tuple(boxes), tuple(difficult))


def _half_open(bounds: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    """From VOC's pixels, counted from 1, both ends inside, to half-open ones from 0."""
    xmin, ymin, xmax, ymax = bounds
    x0, y0 = max(math.floor(xmin) - 1, 0), max(math.floor(ymin) - 1, 0)
    x1, y1 = min(math.ceil(xmax), width), min(math.ceil(ymax), height)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else (0, 0, 0, 0)


def _root(path: str | Path) -> ElementTree.Element:
    with open(path, "rb", buffering=0) as file:
        return ElementTree.fromstring(file.read())


def _bounds(thing: ElementTree.Element) -> list[float]:
    """xmin, ymin, xmax, ymax as they stand; a ValueError names what is no number."""
    box = thing.find("bndbox")
    texts = {} if box is None else {child.tag: (child.text or "").strip() for child in box}
    bounds = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        try:
            value = float(texts.get(tag, ""))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"expected a number for {tag}, got {texts.get(tag, '')!r}")
        bounds.append(value)
    return bounds


def read_solution(path: Path) -> dict[str, Annotation]:
    """Reads Kaggle's LOC_val_solution.csv: ``ImageId,PredictionString`` with "wnid x0 y0 x1 y1 …".

    Returns:
        An annotation per image id.

    Raises:
        ValueError: A line is not of that form; the message names file and line.
    """
    found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if number == 1 and row[:1] == ["ImageId"]:
                continue
            words = row[1].split() if len(row) == 2 else []
            try:
                if not words or len(words) % 5:
                    raise ValueError(f"got {len(words)} words")
                values = [int(word) for k, word in enumerate(words) if k % 5]
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: expected an image id and groups of "
                    f"`wnid x0 y0 x1 y1` ({error})"
                ) from error
            boxes = np.array(values, np.int32).reshape(-1, 4)
            found[row[0]] = Annotation(tuple(words[::5]), boxes)
    return found


def read_ground_truth(path: Path, stems: list[str], classes: tuple[str, ...]) -> list[str]:
    """Reads a text file that names the class of every validation image.

    Three forms are understood: "<wnid>" a line, in the order of the sorted file names;
    "<file> <wnid>"; and "<file> <label>", the label being a place among the sorted wnids (Caffe's
    val.txt).

    Args:
        path: The file.
        stems: File names without extension, sorted.
        classes: Known wnids by label, () when unknown.

    Returns:
        A wnid per stem.

    Raises:
        ValueError: Another form, or an image without a line.
    """
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if all(len(row) == 1 and _WNID.fullmatch(row[0]) for row in rows):
        if len(rows) != len(stems):
            raise ValueError(
                f"{path}: expected one wnid for each of {len(stems)} images, got {len(rows)} lines"
            )
        return [row[0] for row in rows]
    if all(len(row) == 1 for row in rows):
        raise ValueError(
            f"{path}: expected wnids such as n01440764, got {rows[0][0]!r}; the devkit's numbers "
            "are not labels, give a file with `<file> <wnid>` a line"
        )
    named = {Path(row[0]).stem: row[1] for row in rows if len(row) == 2}
    missing = [stem for stem in stems if stem not in named]
    if missing:
        raise ValueError(
            f"{path}: expected a line `<file> <wnid>` for every image, got none for {missing[0]} "
            f"and {len(missing) - 1} others"
        )
    result = [named[stem] for stem in stems]
    if all(value.isdecimal() for value in result):
        if not classes or max(map(int, result)) >= len(classes):
            raise ValueError(
                f"{path}: expected wnids, or labels below the number of known classes "
                f"({len(classes)}), got label {max(map(int, result))}"
            )
        return [classes[int(value)] for value in result]
    return result


def read_mapping(path: Path) -> dict[str, str]:
    """Reads LOC_synset_mapping.txt: "<wnid> <description>" a line, in the order of the labels."""
    mapping = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        wnid, _, description = line.strip().partition(" ")
        if wnid:
            mapping[wnid] = description
    return mapping
