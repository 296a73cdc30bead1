"""The embedded set: pictures of shapes with textures, drawn from a seed in a second or two.

A class is a pair (shape, texture): "striped disc", "striped star", "dotted square", … The texture
alone never names the class, and it tells something about it wherever a piece of the object shows,
so a mask that hides the class must hide the whole object.

Size, place, angle, proportions,
colours and the ground are random and say nothing about the class; nor do the distractors, which
wear the same colours and textures on shapes that belong to no class. Some pictures show two or
three objects of their class.

With an emblem ("synthetic:emblem=100") the evidence is redundant: every object also wears a small
disc whose hue names the class. A classifier can then be right without looking at shape or texture,
and a mask that hides from it what it uses may be far smaller than the object. The scenes are those
of the set without emblems, with the emblems on top.

The same scenes can be written as a tree of JPEG files in ImageNet's layout (`write_tree`), drawn
anew at every file's own size and aspect ratio, or in COCO's layout (`write_coco`).
"""

from __future__ import annotations

import csv
import functools
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.coco import instances, run_lengths
from casm_fast.data.drawing import (
    CLASS_SHAPES,
    CLASS_TEXTURES,
    LOG_STRETCH,
    SHAPES,
    TEXTURES,
    Backgrounds,
    Items,
    View,
    colour,
    paint,
)

logger = logging.getLogger(__name__)

IMAGES = {"train": 4000, "val": 1000}
"""How many pictures each split has when nothing else is said."""

DISTRACTORS = 3  # slots painted first
OBJECTS = 3  # slots painted after them, on top
_OBJECT_SLOTS = slice(DISTRACTORS, DISTRACTORS + OBJECTS)
# With emblems, one more slot per object is painted last. An emblem is a disc of this share of its
# object's radius; 0.88 is the radius of the disc of `SHAPES`.
EMBLEM = 0.30
# Its centre lies this deep in the object, so that the whole disc does.
_EMBLEM_DEPTH = EMBLEM * 0.88 * np.exp(LOG_STRETCH)
# Shapes reach 1.08 radii, stretched by exp(0.12): items this many radii apart cannot touch.
_APART = 1.22
_BLOCK = 128  # scenes per random stream and per drawing pass: its planes fit the cache

Layout = Literal["folders", "flat", "kaggle"]
_Table = TypeVar("_Table", Items, Backgrounds)


@dataclass(frozen=True, eq=False)
class SyntheticSource:
    """An embedded set in memory; an `ImageSource`.

    Attributes:
        name: The spec that opens it again.
        classes: Class names by label.
        images: ``[N, S, S, 3]`` uint8 RGB.
        labels: ``[N]`` int64.
        masks: ``[N, S, S]`` bool, the union of the objects of the picture's class.
        emblem_masks: ``[N, S, S]`` bool, the union of the emblems, each within its object; all
            false without emblems.
        split: "train" or "val"; the two share no picture.
        emblem: Percentage of the pictures whose emblems tell the truth; None without emblems.
        items: What the scenes show.
        grounds: What it is painted on.
        box_table: ``[M, 4]`` int32 boxes of all pictures, one after the other.
        box_starts: ``[N + 1]``, where each picture's boxes begin in ``box_table``.
    """

    name: str
    classes: tuple[str, ...]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]
    emblem_masks: NDArray[np.bool_]
    split: str
    emblem: int | None
    items: Items
    grounds: Backgrounds
    box_table: NDArray[np.int32]
    box_starts: NDArray[np.int64]

    @property
    def has_boxes(self) -> bool:
        """Always true."""
        return True

    @property
    def found(self) -> str:
        """A sentence about what it holds; nothing can be missing."""
        emblems = "" if self.emblem is None else f", emblems of which {self.emblem} % are true"
        size = self.images.shape[1]
        return (
            f"synthetic: {self.split} with {len(self):,} pictures of {size} x {size}, "
            f"{len(self.classes)} classes, {len(self.box_table):,} boxes{emblems}"
        )

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.images)

    def image_id(self, index: int) -> str:
        """Such as "val-000017"."""
        return f"{self.split}-{range(len(self))[index]:06d}"

    def image(self, index: int) -> NDArray[np.uint8]:
        """The picture, ``[S, S, 3]`` uint8 RGB."""
        picture: NDArray[np.uint8] = self.images[index]
        return picture

    def label(self, index: int) -> int:
        """The class of the picture."""
        return int(self.labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        """Tight half-open boxes (x0, y0, x1, y1) of the objects, ``[n, 4]``, n from 1 to 3."""
        index = range(len(self))[index]
        return self.box_table[self.box_starts[index] : self.box_starts[index + 1]]

    def mask(self, index: int) -> NDArray[np.bool_]:
        """What the objects cover, ``[S, S]``."""
        region: NDArray[np.bool_] = self.masks[index]
        return region


def class_names(classes: int) -> tuple[str, ...]:
    """The names of the first classes.

    Eight shapes, then the same shapes in another of the four textures, and so on: of the first
    eight classes two wear each texture, a compact shape and one with notches.

    Args:
        classes: 2 to 32.

    Raises:
        ValueError: The number is outside that range.
    """
    most = CLASS_SHAPES * CLASS_TEXTURES
    if not 2 <= classes <= most:
        raise ValueError(f"synthetic: expected `classes` from 2 to {most}, got {classes}")
    shapes, textures = list(SHAPES), list(TEXTURES)
    return tuple(f"{textures[t]} {shapes[s]}" for s, t in (_pair(k) for k in range(classes)))


def generate(
    images: int,
    size: int = 64,
    classes: int = 8,
    seed: int = 0,
    *,
    split: str = "train",
    emblem: int | None = None,
    workers: int = 2,
) -> SyntheticSource:
    """Draws a set.

    The k-th picture depends on (seed, split, size, classes, emblem, k) alone: a larger set begins
    with the pictures of a smaller one, and the number of workers does not matter.

    Args:
        images: How many, 1 or more.
        size: Side of the square pictures in pixels, 16 or more.
        classes: 2 to 32, see `class_names`.
        seed: 0 or more.
        split: "train" or "val"; they draw from separate random streams.
        emblem: Percentage of the pictures whose emblems have the hue of their class, 0 to 100; in
            the others it is a hue drawn at random among all classes. None: no emblems.
        workers: Threads.

    Raises:
        ValueError: An argument is out of its range.
    """
    names = class_names(classes)
    if split not in IMAGES:
        raise ValueError(f'synthetic: expected `split` "train" or "val", got {split!r}')
    for argument, value, least in (("images", images, 1), ("size", size, 16), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"synthetic: expected `{argument}` of at least {least}, got {value}")
    if emblem is not None and not 0 <= emblem <= 100:
        raise ValueError(
            f"synthetic: expected `emblem` from 0 to 100 (percent of the pictures), got {emblem}"
        )

    pictures = np.empty((images, size, size, 3), np.uint8)
    masks = np.empty((images, size, size), np.bool_)
    emblem_masks = np.zeros((images, size, size), np.bool_)
    starts = range(0, images, _BLOCK)

    def draw(start: int) -> tuple[NDArray[np.int64], Items, Backgrounds, list[NDArray[np.int32]]]:
        count = min(_BLOCK, images - start)
        stream = np.random.SeedSequence([seed, list(IMAGES).index(split), start // _BLOCK])
        labels, items, grounds = _sample(np.random.default_rng(stream), classes, start)
        if emblem is not None:
            own = np.random.default_rng(stream.spawn(1)[0])
            items = _with_emblems(own, items, labels, classes, emblem / 100)
        first = slice(0, count)
        labels, items, grounds = labels[first], _rows(items, first), _rows(grounds, first)
        block = slice(start, start + count)
        marked = slice(DISTRACTORS, None)
        pictures[block], parts = paint(items, grounds, View(size, size), marked)
        parts, emblems = parts[:, :OBJECTS], parts[:, OBJECTS:]
        masks[block] = parts.any(axis=1)
        emblem_masks[block] = emblems.any(axis=1)
        return labels, items, grounds, [_boxes(part) for part in parts]

    with ThreadPoolExecutor(workers) as pool:
        blocks = list(pool.map(draw, starts))
    boxes = [of_picture for block in blocks for of_picture in block[3]]
    options = [f"seed={seed}"] * (seed != 0) + [f"images={images}"] * (images != IMAGES[split])
    options += [f"size={size}"] * (size != 64) + [f"classes={classes}"] * (classes != 8)
    options += [f"emblem={emblem}"] * (emblem is not None)
    return SyntheticSource(
        name="synthetic:" + ",".join([split, *options]),
        classes=names,
        images=pictures,
        labels=np.concatenate([block[0] for block in blocks]),
        masks=masks,
        emblem_masks=emblem_masks,
        split=split,
        emblem=emblem,
        items=_join([block[1] for block in blocks]),
        grounds=_join([block[2] for block in blocks]),
        box_table=np.concatenate(boxes),
        box_starts=np.cumsum([0, *map(len, boxes)]),
    )


def open_synthetic(options: str, split: str) -> SyntheticSource:
    """Opens the set of a spec.

    Args:
        options: What follows "synthetic:", such as "" or
            "val,seed=3,images=400,size=96,classes=16,emblem=100". A leading "train" or "val"
            overrides ``split``; ``images`` is the size of the split opened.
        split: "train" or "val".

    Raises:
        ValueError: An unknown option, or a value out of range.
    """
    values: dict[str, int] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        if option in IMAGES:
            split = option
            continue
        key, _, value = option.partition("=")
        if key not in ("images", "size", "classes", "seed", "emblem") or not value.isdecimal():
            raise ValueError(
                "synthetic: expected options among train, val, images=N, size=N, classes=N, "
                f"seed=N, emblem=N, got {option!r}"
            )
        values[key] = int(value)
    if split not in IMAGES:
        raise ValueError(f'synthetic: expected `split` "train" or "val", got {split!r}')
    source = generate(
        values.get("images", IMAGES[split]),
        values.get("size", 64),
        values.get("classes", 8),
        values.get("seed", 0),
        split=split,
        emblem=values.get("emblem"),
    )
    logger.info("%s", source.found)
    return source


# --- sampling -------------------------------------------------------------------------------------


def _pair(label: int) -> tuple[int, int]:
    """(shape, texture) of a label: a Latin square, so that the first labels share the least."""
    return label % CLASS_SHAPES, (label + label // CLASS_SHAPES) % CLASS_TEXTURES


def _sample(
    rng: np.random.Generator, classes: int, start: int
) -> tuple[NDArray[np.int64], Items, Backgrounds]:
    """One block of scenes with balanced labels; always a whole block, so that prefixes agree."""
    n, slots = _BLOCK, DISTRACTORS + OBJECTS
    labels = rng.permutation((np.arange(n) + start) % classes)
    pairs = np.array([_pair(label) for label in range(classes)])

    several = rng.random(n)
    objects = 1 + (several < 0.25).astype(np.int64) + (several < 0.07)
    shape = rng.integers(CLASS_SHAPES, len(SHAPES), (n, slots))
    worn, plain = np.unique(pairs[:, 1]), len(TEXTURES) - 1
    texture = np.where(
        rng.random((n, slots)) < 0.75, plain, worn[rng.integers(0, len(worn), (n, slots))]
    )
    shape[:, DISTRACTORS:] = pairs[labels, 0, None]
    texture[:, DISTRACTORS:] = pairs[labels, 1, None]

    radius = rng.uniform(0.09, 0.17, (n, slots))
    radius[:, DISTRACTORS:] = (
        rng.uniform(0.185, 0.35, (n, OBJECTS)) * np.where(objects > 1, 0.78, 1.0)[:, None]
    )
    present = np.empty((n, slots), np.bool_)
    present[:, :DISTRACTORS] = np.arange(DISTRACTORS) < rng.integers(0, DISTRACTORS + 1, n)[:, None]
    present[:, DISTRACTORS:] = np.arange(OBJECTS) < objects[:, None]
    centre, present = _place(rng, radius, present)

    items = Items(
        present=present,
        shape=shape,
        texture=texture,
        centre=centre.astype(np.float32),
        radius=radius.astype(np.float32),
        angle=rng.uniform(0, 2 * np.pi, (n, slots)).astype(np.float32),
        stretch=np.exp(rng.uniform(-LOG_STRETCH, LOG_STRETCH, (n, slots))).astype(np.float32),
        period=rng.uniform(0.085, 0.115, (n, slots)).astype(np.float32),
        phase=rng.random((n, slots, 2)).astype(np.float32),
        colours=_item_colours(rng, (n, slots)),
    )
    return labels, items, _sample_grounds(rng, n)


def _with_emblems(
    rng: np.random.Generator,
    items: Items,
    labels: NDArray[np.int64],
    classes: int,
    reliability: float,
) -> Items:
    """The same scenes with a slot more per object: its emblem, anywhere inside it."""
    n = len(labels)
    u, v = np.empty((2, n, OBJECTS), np.float32)
    for kind in np.unique(items.shape[:, _OBJECT_SLOTS]):
        of_kind = items.shape[:, _OBJECT_SLOTS] == kind
        inside = _inner_points(list(SHAPES)[kind])
        u[of_kind], v[of_kind] = inside[rng.integers(0, len(inside), of_kind.sum())].T
    objects = _rows(items, (slice(None), _OBJECT_SLOTS))
    # From the object's own coordinates to the scene's: stretch, then turn (cf. `paint`).
    p, q = u * objects.radius * objects.stretch, v * objects.radius / objects.stretch
    angle = objects.angle.astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    offset = np.stack([p * sin + q * cos, p * cos - q * sin], axis=-1)

    shown = np.where(rng.random(n) < reliability, labels, rng.integers(0, classes, n))
    hue = 2 * np.pi / classes * shown[:, None] + rng.uniform(-0.1, 0.1, (n, OBJECTS))
    flat = colour(np.full_like(hue, 0.7), np.full_like(hue, 0.28), hue)
    emblems = Items(
        present=objects.present,
        shape=np.full((n, OBJECTS), list(SHAPES).index("disc")),
        texture=np.full((n, OBJECTS), list(TEXTURES).index("plain")),
        centre=(objects.centre + offset).astype(np.float32),
        radius=np.float32(EMBLEM) * objects.radius,
        angle=np.zeros_like(objects.angle),
        stretch=np.ones_like(objects.stretch),
        period=objects.period,
        phase=objects.phase,
        colours=np.stack([flat, flat], axis=2),
    )
    return _join([items, emblems], axis=1)


@functools.cache
def _inner_points(shape: str) -> NDArray[np.float32]:
    """Points (u, v) of a shape that are deep enough inside for an emblem's centre, ``[n, 2]``."""
    axis = np.linspace(-1, 1, 129, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    deep = SHAPES[shape](u, v) <= -_EMBLEM_DEPTH
    return np.stack([u[deep], v[deep]], axis=1)


def _place(
    rng: np.random.Generator, radius: NDArray[np.float64], present: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Centres that keep the items inside the square and apart; what finds no room is left out.

    Objects are placed before distractors, so the first object always finds room.
    """
    n, slots = radius.shape
    tries = 24
    centre = np.zeros((n, slots, 2))
    placed = np.zeros_like(present)
    rows = np.arange(n)
    for slot in (*range(DISTRACTORS, slots), *range(DISTRACTORS)):
        r = radius[:, slot, None, None]
        candidates = r + rng.random((n, tries, 2)) * (1 - 2 * r)
        gap = candidates[:, :, None] - centre[:, None]  # [n, tries, slots, 2]
        near = np.sqrt((gap**2).sum(-1)) < _APART * (r + radius[:, None])
        free = ~(near & placed[:, None]).any(-1)  # [n, tries]
        centre[:, slot] = candidates[rows, free.argmax(-1)]
        placed[:, slot] = present[:, slot] & free.any(-1)
    return centre, placed


def _item_colours(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Two colours per item, one light and one dark, of related hues."""
    light, dark = rng.uniform(0.76, 0.93, shape), rng.uniform(0.36, 0.56, shape)
    swap = rng.random(shape) < 0.5
    hue = rng.uniform(0, 2 * np.pi, shape)
    turn = rng.uniform(-1.2, 1.2, shape)
    first = colour(np.where(swap, dark, light), rng.uniform(0.08, 0.18, shape), hue)
    second = colour(np.where(swap, light, dark), rng.uniform(0.03, 0.16, shape), hue + turn)
    return np.stack([first, second], axis=2)


def _sample_grounds(rng: np.random.Generator, n: int) -> Backgrounds:
    spread = rng.uniform(0.06, 0.15, (n, 1)) * rng.choice([-1.0, 1.0], (n, 1)) * [1, -1, 0]
    lightness = rng.uniform(0.38, 0.82, (n, 1)) + spread + rng.uniform(-0.05, 0.05, (n, 3))
    hue = rng.uniform(0, 2 * np.pi, (n, 1)) + rng.uniform(-0.9, 0.9, (n, 3))
    angle = rng.uniform(0, np.pi, (n, 1)) + np.array([0, np.pi / 2])
    frequency = rng.uniform(2.0, 6.5, (n, 2))
    waves = np.stack(
        [
            frequency * np.sin(angle),
            frequency * np.cos(angle),
            rng.random((n, 2)),
            rng.uniform(0, 2.5, (n, 2)),
        ],
        axis=-1,
    )
    # A ground may be stripes, a weave, checks or clouds: each strength is zero half of the time.
    strength = rng.uniform(0.12, 0.4, (n, 3)) * (rng.random((n, 3)) < 0.5)
    return Backgrounds(
        colours=colour(lightness.clip(0.25, 0.95), rng.uniform(0.015, 0.075, (n, 3)), hue),
        coarse=rng.random((n, 6, 6), np.float32),
        fine=rng.random((n, 16, 16), np.float32),
        waves=waves.astype(np.float32),
        strength=strength.astype(np.float32),
        grain=rng.uniform(0.004, 0.016, n).astype(np.float32),
        seed=rng.integers(0, 2**62, n),
    )


def _boxes(masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Tight half-open boxes of the masks ``[slots, H, W]`` that show anything, ``[n, 4]``."""
    found = []
    for mask in masks:
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if ys.size:
            found.append((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
    return np.array(found, np.int32).reshape(-1, 4)


def _rows(table: _Table, rows: slice | tuple[slice, slice]) -> _Table:
    return type(table)(*(getattr(table, field.name)[rows] for field in fields(table)))


def _join(tables: Sequence[_Table], axis: int = 0) -> _Table:
    columns = (
        np.concatenate([getattr(table, field.name) for table in tables], axis)
        for field in fields(tables[0])
    )
    return type(tables[0])(*columns)


# --- files ----------------------------------------------------------------------------------------


def write_tree(
    root: str | Path,
    train: SyntheticSource | None,
    val: SyntheticSource | None,
    *,
    layout: Layout = "folders",
    annotations: str = "Annotations/CLS-LOC/val",
    sides: tuple[int, int] = (80, 160),
    aspect: float = 1.6,
    quality: int = 92,
    greyscale: float = 0.0,
    rotated: float = 0.0,
    seed: int = 0,
    workers: int = 2,
) -> Path:
    """Writes embedded sets as JPEG files in ImageNet's layout, with PASCAL VOC annotations for val.

    Every scene is drawn anew at the size of its file: the scene's square is one shorter side wide,
    the longer side shows more ground. Boxes are those of the drawn masks; they stand in the XML as
    half-open coordinates, the way `casm_fast.data.imagenet` reads them. The folders' names are
    invented WordNet ids, n90000000 for label 0; ``LOC_synset_mapping.txt`` says what they mean.

    Args:
        root: Folder to write into; created when missing.
        train: The training split, or None for none.
        val: The validation split, or None for none.
        layout: "folders" has train/<wnid>/ and val/<wnid>/, "flat" has all of val in val/,
            "kaggle" is ILSVRC/Data/CLS-LOC/{train,val} with a flat val, ILSVRC/Annotations and
            LOC_val_solution.csv.
        annotations: Folder of the XML files below ``root``, for example "annotations"; the Kaggle
            layout has its own.
        sides: Least and largest shorter side in pixels.
        aspect: The longer side is at most this many times the shorter one; two thirds of the
            pictures are wider than high.
        quality: Of the JPEG files.
        greyscale: Share of the files that hold one channel.
        rotated: Share of the files whose pixels lie rotated under an EXIF orientation tag; size
            and boxes in their XML are those of the upright picture.
        seed: Of the sizes and the oddities.
        workers: Threads.

    Returns:
        ``root``.

    Raises:
        ValueError: An argument is out of its range.
    """
    if layout not in ("folders", "flat", "kaggle"):
        raise ValueError(
            f'write_tree: expected `layout` "folders", "flat" or "kaggle", got {layout!r}'
        )
    shape = FileShape("write_tree", sides, aspect, quality, greyscale, rotated, seed)
    root = Path(root)
    pictures = root / "ILSVRC/Data/CLS-LOC" if layout == "kaggle" else root
    notes = root / ("ILSVRC/Annotations/CLS-LOC/val" if layout == "kaggle" else annotations)
    solution: list[tuple[str, str]] = []
    splits = [(name, source) for name, source in (("train", train), ("val", val)) if source]
    for name, source in splits:
        nested = name == "train" or layout == "folders"
        for label in range(len(source.classes)):
            folder = pictures / name / wnid(label) if nested else pictures / name
            folder.mkdir(parents=True, exist_ok=True)
        if name == "val":
            notes.mkdir(parents=True, exist_ok=True)

        def write(index: int, name: str = name, source: SyntheticSource = source) -> str:
            label = wnid(source.label(index))
            stem = f"{label}_{index + 1}" if name == "train" else f"ILSVRC2012_val_{index + 1:08d}"
            folder = pictures / name / (label if name == "train" or layout == "folders" else "")
            drawn = draw(source, index, name, shape, folder / f"{stem}.JPEG")
            if name == "val":
                _write_annotation(notes / f"{stem}.xml", label, drawn.size, drawn.boxes)
            return " ".join(f"{label} {x0} {y0} {x1} {y1}" for x0, y0, x1, y1 in drawn.boxes)

        with ThreadPoolExecutor(workers) as pool:
            predictions = list(pool.map(write, range(len(source))))
        if name == "val":
            stems = (f"ILSVRC2012_val_{index + 1:08d}" for index in range(len(source)))
            solution = list(zip(stems, predictions, strict=True))
    if splits:
        names = splits[0][1].classes
        lines = (f"{wnid(label)} {name}\n" for label, name in enumerate(names))
        (root / "LOC_synset_mapping.txt").write_text("".join(lines), encoding="utf-8")
    if layout == "kaggle" and solution:
        with (root / "LOC_val_solution.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("ImageId", "PredictionString"), *solution])
    return root


def write_coco(
    root: str | Path,
    train: SyntheticSource | None,
    val: SyntheticSource | None,
    *,
    sides: tuple[int, int] = (80, 160),
    aspect: float = 1.6,
    quality: int = 92,
    greyscale: float = 0.0,
    rotated: float = 0.0,
    seed: int = 0,
    workers: int = 2,
) -> Path:
    """Writes embedded sets in COCO's layout: train2017/, val2017/ and annotations/instances_*.json.

    The files hold the pixels that `write_tree` writes for the same arguments, and the annotations
    the same boxes, besides the mask of every object as run lengths. Categories are called as the
    classes are.

    Args:
        root: Folder to write into; created when missing.
        train: The training split, or None for none.
        val: The validation split, or None for none.
        sides: Least and largest shorter side in pixels.
        aspect: The longer side is at most this many times the shorter one.
        quality: Of the JPEG files.
        greyscale: Share of the files that hold one channel.
        rotated: Share of the files whose pixels lie rotated under an EXIF orientation tag; size,
            boxes and masks are those of the upright picture.
        seed: Of the sizes and the oddities.
        workers: Threads.

    Returns:
        ``root``.

    Raises:
        ValueError: An argument is out of its range.
    """
    shape = FileShape("write_coco", sides, aspect, quality, greyscale, rotated, seed)
    root = Path(root)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name, source in (("train", train), ("val", val)):
        if source is None:
            continue
        folder = root / f"{name}2017"
        folder.mkdir(exist_ok=True)

        def write(
            index: int,
            name: str = name,
            source: SyntheticSource = source,
            folder: Path = folder,
        ) -> dict[str, Any]:
            path = folder / f"{index + 1:012d}.jpg"
            drawn = draw(source, index, name, shape, path)
            return {
                "file_name": path.name,
                "height": drawn.size[0],
                "width": drawn.size[1],
                "objects": [
                    (source.label(index), box, run_lengths(mask))
                    for box, mask in zip(drawn.boxes, drawn.masks, strict=True)
                ],
            }

        with ThreadPoolExecutor(workers) as pool:
            content = instances(pool.map(write, range(len(source))), source.classes)
        path = root / "annotations" / f"instances_{name}2017.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    return root


def wnid(label: int) -> str:
    """The invented WordNet id of a label in a written tree."""
    return f"n{90_000_000 + label}"


@dataclass(frozen=True)
class FileShape:
    """How the files of a written set look; the arguments of `write_tree`.

    Raises:
        ValueError: An argument is out of its range; the message begins with ``function``.
    """

    function: str
    sides: tuple[int, int]
    aspect: float
    quality: int
    greyscale: float
    rotated: float
    seed: int

    def __post_init__(self) -> None:
        if not 16 <= self.sides[0] <= self.sides[1]:
            raise ValueError(
                f"{self.function}: expected `sides` of 16 <= least <= largest, got {self.sides}"
            )
        if self.aspect < 1:
            raise ValueError(f"{self.function}: expected `aspect` of at least 1, got {self.aspect}")


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a written file shows.

    Attributes:
        size: (height, width) of the upright picture.
        boxes: ``[n, 4]`` int32 half-open boxes of its objects.
        masks: ``[n, H, W]`` bool.
    """

    size: tuple[int, int]
    boxes: NDArray[np.int32]
    masks: NDArray[np.bool_]


def draw(source: SyntheticSource, index: int, split: str, shape: FileShape, path: Path) -> Drawn:
    """Writes one scene as a JPEG file, whose bytes depend on all arguments but ``path``.

    Args:
        source: An embedded set.
        index: Of the picture.
        split: "train" or "val"; they draw sizes and oddities from separate random streams.
        shape: How files look.
        path: The file.
    """
    rng = np.random.default_rng([shape.seed, list(IMAGES).index(split), index])
    image, objects = _draw_at_size(source, index, rng, shape.sides, shape.aspect)
    grey, rotate = (bool(rng.random() < share) for share in (shape.greyscale, shape.rotated))
    _write_jpeg(path, image, quality=shape.quality, grey=grey, rotate=rotate)
    seen = objects[objects.any(axis=(1, 2))]
    return Drawn(image.shape[:2], _boxes(seen), seen)


def _draw_at_size(
    source: SyntheticSource,
    index: int,
    rng: np.random.Generator,
    sides: tuple[int, int],
    aspect: float,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The picture ``[H, W, 3]`` and the mask of each object ``[slots, H, W]``."""
    side = int(rng.integers(sides[0], sides[1] + 1))
    long = round(side * float(np.exp(rng.uniform(0, np.log(aspect)))))
    # The square stays near the middle: at most a quarter of the extra ground off the centre.
    offset = (long - side) / side * float(rng.uniform(0.25, 0.75))
    wide = rng.random() < 2 / 3
    view = View(side, long, left=offset) if wide else View(long, side, top=offset)
    scene = slice(index, index + 1)
    items, grounds = _rows(source.items, scene), _rows(source.grounds, scene)
    images, masks = paint(items, grounds, view, _OBJECT_SLOTS)
    return images[0], masks[0]


def _write_jpeg(
    path: Path, image: NDArray[np.uint8], *, quality: int, grey: bool, rotate: bool
) -> None:
    from PIL import Image

    picture = Image.fromarray(image)
    if grey:
        picture = picture.convert("L")
    exif = Image.Exif()
    if rotate:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6  # Orientation: turn 90 degrees clockwise to display
    picture.save(path, "JPEG", quality=quality, exif=exif)


def _write_annotation(
    path: Path, label: str, size: tuple[int, int], boxes: NDArray[np.int32]
) -> None:
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, text: object) -> None:
        ElementTree.SubElement(parent, tag).text = str(text)

    add(root, "folder", "val")
    add(root, "filename", path.stem)
    shape = ElementTree.SubElement(root, "size")
    for tag, value in zip(("width", "height", "depth"), (size[1], size[0], 3), strict=True):
        add(shape, tag, value)
    add(root, "segmented", 0)
    for box in boxes:
        thing = ElementTree.SubElement(root, "object")
        add(thing, "name", label)
        bounds = ElementTree.SubElement(thing, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            add(bounds, tag, int(value))
    ElementTree.indent(root, "\t")
    ElementTree.ElementTree(root).write(path)
