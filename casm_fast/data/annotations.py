"""Ground-truth files of ImageNet: PASCAL VOC XML, and the lists that name each image's class."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Annotation:
    """What an XML file says about an image.

    Attributes:
        names: Class of each object, such as "n01440764".
        boxes: ``[n, 4]`` int32 (x0, y0, x1, y1), in pixels of the upright image.
    """

    names: tuple[str, ...]
    boxes: NDArray[np.int32]


def read_annotation(path: Path) -> Annotation:
    """Reads the objects of a PASCAL VOC XML file.

    xmin, ymin, xmax, ymax are taken as they stand for a half-open box, the convention of the CASM
    authors' scoring. (PASCAL VOC itself counts from 1 and includes the last pixel, which differs by
    at most one pixel a side.)

    Raises:
        ValueError: The file is not such XML; the message names it.
    """
    names, boxes = [], []
    try:
        for thing in ElementTree.parse(path).getroot().iter("object"):
            bounds = [thing.findtext(f"bndbox/{tag}") for tag in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append([int(float(value or "")) for value in bounds])
            names.append((thing.findtext("name") or "").strip())
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"cannot read the annotation {path}: {error}") from error
    return Annotation(tuple(names), np.array(boxes, np.int32).reshape(-1, 4))


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
