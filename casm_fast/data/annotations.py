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
    """What an XML file of PASCAL VOC says about a picture with n objects.

    Attributes:
        size: (height, width), (0, 0) where the file does not say.
        names: Class of each object, such as "aeroplane".
        boxes: ``[n, 4]`` int32 (x0, y0, x1, y1) half-open, in pixels; one without a pixel is
            (0, 0, 0, 0).
        difficult: ``[n]`` bool.
    """

    size: tuple[int, int]
    names: tuple[str, ...]
    boxes: NDArray[np.int32]
    difficult: NDArray[np.bool_]


def read_annotation(path: Path) -> Annotation:
    """Reads the objects of an XML file of ImageNet.

    xmin, ymin, xmax, ymax are taken as they stand for a half-open box, the convention of the CASM
    authors' scoring. (PASCAL VOC itself counts from 1 and includes the last pixel, see `read_voc`,
    which differs by at most one pixel a side.)

    Raises:
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
        things = root.findall("object")
        names = tuple((thing.findtext("name") or "").strip() for thing in things)
        if "" in names:
            raise ValueError(f"object {names.index('') + 1} has no name")
        width, height = (
            int(float(root.findtext(f"size/{tag}") or 0)) for tag in ("width", "height")
        )
        known = width > 0 and height > 0
        bounds = np.array([_bounds(thing) for thing in things]).reshape(-1, 4)
        boxes = np.concatenate([np.floor(bounds[:, :2]) - 1, np.ceil(bounds[:, 2:])], axis=1)
        boxes = np.clip(boxes, 0, [width, height] * 2 if known else 2**31 - 1).astype(np.int32)
        boxes[(boxes[:, 2:] <= boxes[:, :2]).any(axis=1)] = 0
        difficult = [_flag(thing, "difficult") for thing in things]
    except _BAD_XML as error:
        raise ValueError(f"cannot read the annotation {path}: {error}") from error
    size = (height, width) if known else (0, 0)
    return VocAnnotation(size, names, boxes, np.array(difficult, np.bool_))


def _root(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_bytes())


def _flag(thing: ElementTree.Element, tag: str) -> bool:
    """A flag of an object, false where it is left out."""
    text = (thing.findtext(tag) or "0").strip()
    if text not in ("0", "1"):
        raise ValueError(f"expected 0 or 1 for {tag}, got {text!r}")
    return text == "1"


def _bounds(thing: ElementTree.Element) -> list[float]:
    """xmin, ymin, xmax, ymax as they stand; a ValueError names what is no number."""
    bounds = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = (thing.findtext(f"bndbox/{tag}") or "").strip()
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"expected a number for {tag}, got {text!r}")
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
