"""PASCAL VOC's devkit: an XML file per picture, the list of the set, and the results per class.

| file | what |
|---|---|
| VOCdevkit/VOC2012/Annotations/STEM.xml | the boxes of a picture, its id in source/image |
| VOCdevkit/VOC2012/ImageSets/Main/val.txt | the stems |
| VOCdevkit/VOC2012/JPEGImages/STEM.jpg | the pictures, when they are asked for |
| VOCdevkit/results/VOC2012/Main/comp4_det_val_CLASS.txt | stem, score, box: a line each |

Boxes count from 1 and name their last pixels: (x0, y0, x1, y1) half-open is written as
xmin = x0 + 1, ymin = y0 + 1, xmax = x1, ymax = y1. An object has its score in a tag of its own,
which readers of VOC pass over.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from casm_fast.extraction.exporting.job import Box, Job, Picture, Stems
from casm_fast.extraction.exporting.writing import new_folder

YEAR, SET = "VOC2012", "val"


def write(job: Job, output: Path) -> tuple[Path, ...]:
    """Write a devkit.

    Args:
        job: What.
        output: A new or empty folder, which gets VOCdevkit/.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder is not empty.
        ValueError: An image has no label.
    """
    with new_folder(output) as root:
        folder = root / "VOCdevkit" / YEAR
        for inner in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (folder / inner).mkdir(parents=True)
        pictures = []
        results: dict[int, list[str]] = defaultdict(list)
        for picture in job.readable():
            pictures.append(picture)
            _annotation(picture, job.classes).write(folder / f"Annotations/{picture.stem}.xml")
            for box in picture.found:
                numbers = " ".join(map(str, _from_one(box)))
                results[box.label].append(f"{picture.stem} {box.score:.6f} {numbers}\n")
        stems = "".join(f"{picture.stem}\n" for picture in pictures)
        (folder / f"ImageSets/Main/{SET}.txt").write_text(stems, encoding="utf-8")
        _write_results(results, job.classes, root / "VOCdevkit/results" / YEAR / "Main")
        if job.pictures:
            job.write_pictures(pictures, folder / "JPEGImages")
    return (output,)


def _from_one(box: Box) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box.corners
    return x0 + 1, y0 + 1, x1, y1


def _write_results(results: dict[int, list[str]], classes: tuple[str, ...], folder: Path) -> None:
    folder.mkdir(parents=True)
    names = Stems()
    for label in sorted(results):
        name = names(classes[label])
        path = folder / f"comp4_det_{SET}_{name}.txt"
        path.write_text("".join(results[label]), encoding="utf-8")


def _annotation(
    picture: Picture, classes: tuple[str, ...]
) -> ElementTree.ElementTree[ElementTree.Element]:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, text: object = None) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag)
        element.text = None if text is None else str(text)
        return element

    add(root, "folder", YEAR)
    add(root, "filename", f"{picture.stem}.jpg")
    source = add(root, "source")
    for tag, text in (("database", "casm_fast"), ("annotation", "predicted")):
        add(source, tag, text)
    add(source, "image", picture.id)
    size = add(root, "size")
    for tag, value in (("width", picture.width), ("height", picture.height), ("depth", 3)):
        add(size, tag, value)
    add(root, "segmented", 0)
    for box in picture.found:
        thing = add(root, "object")
        add(thing, "name", classes[box.label])
        add(thing, "pose", "Unspecified")
        add(thing, "truncated", 0)
        add(thing, "difficult", 0)
        bounds = add(thing, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), _from_one(box), strict=True):
            add(bounds, tag, value)
        add(thing, "score", f"{box.score:.6f}")
    ElementTree.indent(root, "\t")
    return ElementTree.ElementTree(root)
