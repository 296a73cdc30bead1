"""The embedded set in the layouts of PASCAL VOC and of wsolevaluation.

As `write_tree` and `write_coco` write it: for the same arguments a scene of the training or the
validation split has the same bytes in every layout, and the same boxes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.synthetic import Drawn, FileShape, SyntheticSource, draw, wnid
from casm_fast.data.wsol import IDS, LABELS, LOCALIZATION, SIZES


def write_voc(
    root: str | Path,
    train: SyntheticSource | None,
    val: SyntheticSource | None,
    *,
    test: SyntheticSource | None = None,
    year: int = 2007,
    sides: tuple[int, int] = (80, 160),
    aspect: float = 1.6,
    quality: int = 92,
    greyscale: float = 0.0,
    rotated: float = 0.0,
    seed: int = 0,
    workers: int = 2,
) -> Path:
    """Writes embedded sets in PASCAL VOC's layout, below VOCdevkit/VOC2007.

    Boxes stand in the XML as VOC counts them, from 1 and with the last pixel inside. Every picture
    is segmented; no object is marked as difficult. ImageSets/Main lists the sets train, val,
    trainval and test, and the pictures of each class in them.

    Args:
        root: Folder to write into; created when missing.
        train: The training set, or None for none.
        val: The validation set, or None for none.
        test: The test set, or None for none; drawn as a validation split is.
        year: In the name of the folder.
        sides: Least and largest shorter side in pixels.
        aspect: The longer side is at most this many times the shorter one.
        quality: Of the JPEG files.
        greyscale: Share of the files that hold one channel.
        rotated: Share of the files whose pixels lie rotated under an EXIF orientation tag; sizes,
            boxes and masks are those of the upright picture.
        seed: Of the sizes and the oddities.
        workers: Threads.

    Returns:
        ``root``.

    Raises:
        ValueError: An argument is out of its range.
    """
    shape = FileShape("write_voc", sides, aspect, quality, greyscale, rotated, seed)
    folder = Path(root) / f"VOCdevkit/VOC{year}"
    lists, segmented = folder / "ImageSets/Main", folder / "ImageSets/Segmentation"
    for inner in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationObject"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    for place in (lists, segmented):
        place.mkdir(parents=True, exist_ok=True)
    sets: dict[str, list[tuple[str, str]]] = {}  # (id, class) of each picture
    before = 0
    for name, source in (("train", train), ("val", val), ("test", test)):
        if source is None:
            continue
        numbers = {class_name: k for k, class_name in enumerate(sorted(source.classes), 1)}

        def write(
            index: int,
            split: str = "train" if name == "train" else "val",
            source: SyntheticSource = source,
            before: int = before,
            numbers: Mapping[str, int] = numbers,
        ) -> tuple[str, str]:
            stem = f"{before + index + 1:06d}"
            class_name = source.classes[source.label(index)]
            drawn = draw(source, index, split, shape, folder / f"JPEGImages/{stem}.jpg")
            _write_xml(folder / f"Annotations/{stem}.xml", class_name, drawn)
            objects = np.arange(1, len(drawn.masks) + 1)[:, None, None]
            for kind, values in (("Class", numbers[class_name]), ("Object", objects)):
                numbered = (drawn.masks * values).max(axis=0).astype(np.uint8)
                _write_numbers(folder / f"Segmentation{kind}/{stem}.png", numbered)
            return stem, class_name

        with ThreadPoolExecutor(workers) as pool:
            sets[name] = list(pool.map(write, range(len(source))))
        before += len(source)
    if "train" in sets and "val" in sets:
        sets["trainval"] = sets["train"] + sets["val"]
    class_names = sorted(
        {name for source in (train, val, test) if source for name in source.classes}
    )
    for name, pictures in sets.items():
        ids = "".join(f"{stem}\n" for stem, _ in pictures)
        for place in (lists, segmented):
            (place / f"{name}.txt").write_text(ids, encoding="utf-8")
        for class_name in class_names:
            lines = (f"{stem} {1 if shown == class_name else -1:2d}\n" for stem, shown in pictures)
            (lists / f"{class_name}_{name}.txt").write_text("".join(lines), encoding="utf-8")
    return Path(root)


def write_wsol(
    root: str | Path,
    train: SyntheticSource | None,
    val: SyntheticSource | None,
    *,
    test: SyntheticSource | None = None,
    dataset: str = "ILSVRC",
    masks: bool = False,
    sides: tuple[int, int] = (80, 160),
    aspect: float = 1.6,
    quality: int = 92,
    greyscale: float = 0.0,
    rotated: float = 0.0,
    seed: int = 0,
    workers: int = 2,
) -> Path:
    """Writes embedded sets as wsolevaluation has them: metadata/ILSVRC and dataset/ILSVRC.

    As there, the training set has labels alone. Boxes stand in localization.txt as half-open
    coordinates, the way `casm_fast.data.wsol` reads them.

    Args:
        root: Folder to write into; created when missing.
        train: The training set, or None for none.
        val: The set to tune on, wsolevaluation's "val", or None for none.
        test: The set to score on, ImageNet's validation set in wsolevaluation, or None for none;
            drawn as a validation split is.
        dataset: In the names of the folders.
        masks: Whether objects come with mask files, as in OpenImages, instead of boxes. The ignore
            masks are empty.
        sides: Least and largest shorter side in pixels.
        aspect: The longer side is at most this many times the shorter one.
        quality: Of the JPEG files.
        greyscale: Share of the files that hold one channel.
        rotated: Share of the files whose pixels lie rotated under an EXIF orientation tag; sizes,
            boxes and masks are those of the upright picture.
        seed: Of the sizes and the oddities.
        workers: Threads.

    Returns:
        ``root``.

    Raises:
        ValueError: An argument is out of its range.
    """
    shape = FileShape("write_wsol", sides, aspect, quality, greyscale, rotated, seed)
    images = Path(root) / "dataset" / dataset
    for name, source in (("train", train), ("val", val), ("test", test)):
        if source is None:
            continue
        files = [_wsol_file(name, source.label(k), k + 1) for k in range(len(source))]
        for parent in {(images / file).parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)

        def write(
            index: int,
            name: str = name,
            source: SyntheticSource = source,
            files: Sequence[str] = files,
        ) -> _WsolLines:
            file = files[index]
            split = "train" if name == "train" else "val"
            drawn = draw(source, index, split, shape, images / file)
            height, width = drawn.size
            label, size = f"{file},{source.label(index)}\n", f"{file},{width},{height}\n"
            if name == "train":
                return _WsolLines(label, size, "")
            if masks:
                return _WsolLines(label, size, _write_masks(images, file, drawn.masks))
            boxes = (f"{file},{x0},{y0},{x1},{y1}\n" for x0, y0, x1, y1 in drawn.boxes)
            return _WsolLines(label, size, "".join(boxes))

        with ThreadPoolExecutor(workers) as pool:
            lines = list(pool.map(write, range(len(source))))
        content = {
            IDS: "".join(f"{file}\n" for file in files),
            LABELS: "".join(line.label for line in lines),
        }
        if name != "train":
            content[LOCALIZATION] = "".join(line.localization for line in lines)
            content |= {} if masks else {SIZES: "".join(line.size for line in lines)}
        metadata = Path(root) / "metadata" / dataset / name
        metadata.mkdir(parents=True, exist_ok=True)
        for key, text in content.items():
            (metadata / key).write_text(text, encoding="utf-8")
    return Path(root)


@dataclass(frozen=True)
class _WsolLines:
    """What the metadata files say about an image."""

    label: str
    size: str
    localization: str


def _wsol_file(name: str, label: int, number: int) -> str:
    """Where an image lies, as ImageNet's do in wsolevaluation."""
    if name == "train":
        return f"train/{wnid(label)}/{wnid(label)}_{number}.JPEG"
    if name == "val":
        return f"val2/{label}/{number}.jpeg"
    return f"val/ILSVRC2012_val_{number:08d}.JPEG"


def _write_masks(images: Path, file: str, masks: NDArray[np.bool_]) -> str:
    """A file per mask beside the image; its lines, of which the first names the ignore mask."""
    stem = file.rpartition(".")[0]
    names = [f"{stem}_m{k}.png" for k in range(1, len(masks) + 1)]
    ignore = f"{stem}_ignore.png"
    for name, mask in zip([*names, ignore], [*masks, np.zeros_like(masks[0])], strict=True):
        _write_grey(images / name, 255 * mask.astype(np.uint8))
    last = [ignore, *[""] * (len(names) - 1)]
    return "".join(f"{file},{mask},{end}\n" for mask, end in zip(names, last, strict=True))


def _write_grey(path: Path, values: NDArray[np.uint8]) -> None:
    from PIL import Image

    Image.fromarray(values).save(path)


def _write_numbers(path: Path, values: NDArray[np.uint8]) -> None:
    """Numbers under VOC's colours.

    The bits of a number, from low to high, go to R, G and B in turn, and fill each from its highest
    bit down.
    """
    from PIL import Image

    number = np.arange(256)[:, None]
    bits = [(number >> (3 * k + np.arange(3)) & 1) << (7 - k) for k in range(3)]
    picture = Image.fromarray(values)
    picture.putpalette(np.sum(bits, axis=0).astype(np.uint8).tobytes())
    picture.save(path)


def _write_xml(path: Path, class_name: str, drawn: Drawn) -> None:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, text: object = None) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag)
        element.text = None if text is None else str(text)
        return element

    add(root, "filename", f"{path.stem}.jpg")
    size = add(root, "size")
    for tag, value in zip(("width", "height", "depth"), (*drawn.size[::-1], 3), strict=True):
        add(size, tag, value)
    add(root, "segmented", 1)
    for x0, y0, x1, y1 in drawn.boxes.tolist():
        thing = add(root, "object")
        add(thing, "name", class_name)
        add(thing, "difficult", 0)
        bounds = add(thing, "bndbox")
        corners = (x0 + 1, y0 + 1, x1, y1)
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            add(bounds, tag, value)
    ElementTree.indent(root, "\t")
    ElementTree.ElementTree(root).write(path)
