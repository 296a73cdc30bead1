"""The pointing game: does the maximum of a map lie on an object of its class?

Zhang et al. 2016 (Top-down neural attention by excitation backprop, section 4.1), as TorchRay plays
it: a hit when some pixel of the object lies strictly closer than 15 pixels to the maximum; the
accuracy of a class is its share of hits, and the score is the mean over the classes.

* The object is what the boxes of the class cover (VOC07 test), or its mask (COCO14 val).
* Distances are measured in the original picture, where the centre of the map's highest cell lies
  between pixels in general; or in the network's square, into which the truth is moved (supplement
  of Fong & Vedaldi 2017, section 4, where all images are 224 x 224).
* TorchRay enlarges maps to the picture, bilinearly, before it looks for the maximum: enlarge them
  so and give no geometries to do the same.
* Maxima that tie share the image: two hits among three tied maxima count 2/3. The authors of
  meaningful perturbation take the mean place of the tied maxima instead (``ties="centre"``), and
  TorchRay the first in raster order (``ties="first"``).
* The difficult set holds the images whose class covers less than a quarter of them, where objects
  of another class are present. Boxes that overlap count twice in that area, as in the sources; a
  mask counts its pixels.
* An object that the crop cut off entirely cannot be hit, and its image counts as a miss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from casm_fast.data import localization
from casm_fast.data.geometry import Geometry
from casm_fast.evaluation.frames import (
    check_count,
    scale_points,
    side_of,
    to_original,
)
from casm_fast.evaluation.intervals import Interval, bootstrap
from casm_fast.evaluation.maps import Maps, as_maps
from casm_fast.evaluation.outcomes import PER_IMAGE, mean_of, paragraph
from casm_fast.models.memory import slices

Frame = Literal["original", "network"]
Ties = Literal["share", "centre", "first"]
Set = Literal["all", "difficult"]

TOLERANCE = 15.0
"""Pixels."""

DIFFICULT_AREA = 0.25
"""Share of the image that the class covers less than, in the difficult set."""

_CHUNK = 1 << 18  # pixels that are looked up at once


@dataclass(frozen=True)
class PointingConfig:
    """How the game is played.

    Attributes:
        tolerance: Pixels; a hit is strictly closer.
        frame: Where distances are measured: "original" picture, or "network", its square. Without
            geometries both are the map's own frame.
        ties: What tied maxima count: "share", each its share; "centre", their mean place; "first",
            the first in raster order.
        difficult_area: Share of the image that the class covers less than, in the difficult set.
    """

    tolerance: float = TOLERANCE
    frame: Frame = "original"
    ties: Ties = "share"
    difficult_area: float = DIFFICULT_AREA

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"tolerance: expected pixels above 0, got {self.tolerance}")
        for name, kind in (("frame", Frame), ("ties", Ties)):
            known = get_args(kind)
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if not 0 < self.difficult_area <= 1:
            raise ValueError(f"difficult_area: expected in (0, 1], got {self.difficult_area}")


@dataclass(frozen=True, eq=False)
class Points:
    """Where maps point to, several points of a map sharing its image.

    Attributes:
        owners: ``[M]``, the map of each point.
        places: ``[M, 2]`` (x, y) in pixels of the frame, 0 at the centre of the first pixel.
        images: How many maps there are.
        size: ``(H, W)`` of the frame in pixels.
    """

    owners: NDArray[np.int64]
    places: NDArray[np.float64]
    images: int
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Pointing:
    """What the pointing game gave for each image. ``str(pointing)`` is the printed table.

    Attributes:
        hits: ``[n]`` in [0, 1].
        labels: ``[n]`` classes.
        difficult: ``[n]``, whether an image is in the difficult set.
        classes: Names by label; () when unknown.
        convention: How the game was played.
    """

    hits: NDArray[np.float64] = field(metadata=PER_IMAGE)
    labels: NDArray[np.int64] = field(metadata=PER_IMAGE)
    difficult: NDArray[np.bool_] = field(metadata=PER_IMAGE)
    classes: tuple[str, ...]
    convention: str

    def per_class(self, images: Set = "all") -> dict[int, float]:
        """The accuracy of every class that has images in the set."""
        chosen = self._in(images)
        labels, hits = self.labels[chosen], self.hits[chosen]
        return {int(k): mean_of(hits[labels == k]) for k in np.unique(labels)}

    def accuracy(self, images: Set = "all") -> float:
        """The score: the mean over the classes of their accuracy; NaN for an empty set."""
        return mean_of(self.per_class(images).values())

    def overall(self, images: Set = "all") -> float:
        """The share of hits among the images of the set; NaN for an empty set."""
        return mean_of(self.hits[self._in(images)])

    def interval(
        self,
        images: Set = "all",
        statistic: Literal["class-mean", "mean"] = "class-mean",
        **told: Any,
    ) -> Interval:
        """The score with its bootstrap interval.

        Args:
            images: The set.
            statistic: "class-mean" for `accuracy`, "mean" for `overall`.
            **told: Options of `casm_fast.evaluation.bootstrap`.
        """
        chosen = self._in(images)
        return bootstrap(self.hits[chosen], statistic, classes=self.labels[chosen], **told)

    def __str__(self) -> str:
        lines = ["Pointing game, accuracy in percent, 95 % bootstrap intervals", ""]
        for name in get_args(Set):
            count = int(self._in(name).sum())
            if count:
                mean = self.interval(name).show(scale=100)
                overall = self.interval(name, "mean").show(scale=100)
                number = len(self.per_class(name))
                lines.append(
                    f"  {name:<9}  {mean} over {number} classes, {overall} over {count:,} images"
                )
            else:
                lines.append(f"  {name:<9}  no images")
        if self.classes and len(self.hits):
            each = self.per_class().items()
            text = ", ".join(f"{self.classes[label]} {100 * score:.1f}" for label, score in each)
            lines += ["", paragraph(text)]
        return "\n".join([*lines, "", paragraph(self.convention)])

    def _in(self, images: Set) -> NDArray[np.bool_]:
        if images not in get_args(Set):
            raise ValueError(f"images: expected all or difficult, got {images!r}")
        return np.ones(len(self.hits), np.bool_) if images == "all" else self.difficult


def pointing_game(
    maps: Maps | Points,
    labels: ArrayLike,
    *,
    boxes: Sequence[ArrayLike] | None = None,
    masks: Sequence[NDArray[np.bool_]] | None = None,
    distractors: ArrayLike | None = None,
    geometries: Sequence[Geometry] | None = None,
    classes: Sequence[str] = (),
    config: PointingConfig | None = None,
) -> Pointing:
    """Play the pointing game with maps of any origin; `join` the results of the batches of a set.

    Args:
        maps: ``[B, 1, h, w]`` or ``[B, h, w]``, higher is more salient, at any resolution; or the
            points themselves, for a method that gives no map.
        labels: ``[B]``, the class that each map is of.
        boxes: B arrays ``[m, 4]`` (x0, y0, x1, y1) half-open, those of the class.
        masks: B masks ``[H, W]`` of the class, instead of boxes. Either is in original pixels with
            geometries, and in pixels of the maps without.
        distractors: ``[B]`` bool, whether objects of another class are present (see
            `shares_picture`); without, no image is difficult.
        geometries: Of the pictures, when the maps are of the network's square.
        classes: Names by label.
        config: How the game is played.

    Returns:
        The hits of each image, and the convention.

    Raises:
        TypeError: Maps are neither tensor nor array.
        ValueError: Maps are not finite, or what is given for them is not one for each; neither or
            both of boxes and masks; a mask's size is another than the picture's.
    """
    config = config or PointingConfig()
    points = maps if isinstance(maps, Points) else maxima(maps, geometries, config.ties)
    count = points.images
    label = np.asarray(labels, np.int64).reshape(-1)
    present = np.zeros(count, np.bool_) if distractors is None else np.asarray(distractors, bool)
    given = {"labels": label, "boxes": boxes, "masks": masks, "distractors": present}
    for name, one in {**given, "geometries": geometries}.items():
        if one is not None:
            check_count(name, one, count)

    sizes = [points.size] * count
    if geometries is not None:
        sizes = [(one.height, one.width) for one in geometries]
    moved = geometries if config.frame == "network" else None
    places = points.places
    if geometries is not None and moved is None:
        places = to_original(points.places, geometries, points.owners)
    if boxes is not None and masks is None:
        truth = "boxes"
        tables = [np.asarray(one, np.float64).reshape(-1, 4) for one in boxes]
        flat, owners = localization.pair(tables)
        covered = np.bincount(owners, localization.area(flat), minlength=count)
        if moved is not None:
            tables = [
                np.asarray(g.to_network(t), float) for t, g in zip(tables, moved, strict=True)
            ]
        frames = sizes if moved is None else [points.size] * count
        near = _near_boxes(places, points.owners, tables, frames, config.tolerance)
    elif masks is not None and boxes is None:
        truth = "mask"
        regions = _checked(masks, sizes)
        covered = np.array([region.sum() for region in regions], np.float64)
        if moved is not None:
            regions = [_in_network(r, g) for r, g in zip(regions, moved, strict=True)]
        near = _near_masks(places, points.owners, regions, config.tolerance)
    else:
        got = "both" if boxes is not None else "neither"
        raise ValueError(f"pointing_game: expected either `boxes` or `masks`, got {got}")

    area = np.array([h * w for h, w in sizes], np.float64)
    number = np.bincount(points.owners, minlength=count)
    return Pointing(
        hits=np.bincount(points.owners, near, minlength=count) / np.maximum(number, 1),
        labels=label,
        difficult=present & (covered < config.difficult_area * area),
        classes=tuple(classes),
        convention=_convention(config, truth, geometries is not None),
    )


def maxima(
    maps: Maps, geometries: Sequence[Geometry] | None = None, ties: Ties = "share"
) -> Points:
    """Where maps have their highest cells.

    Args:
        maps: ``[B, 1, h, w]`` or ``[B, h, w]``, finite.
        geometries: Of the pictures, when the maps are of the network's square, which tells its
            side; without, a cell is a pixel.
        ties: "share" gives every tied cell, "centre" their mean place, "first" the first in raster
            order.

    Returns:
        The centres of the cells.
    """
    values = as_maps("pointing_game", maps)
    count, h, w = values.shape
    size = (h, w)
    if geometries is not None and len(geometries):
        sides = sorted({side_of(geometry) for geometry in geometries})
        if len(sides) > 1:
            raise ValueError(f"geometries: expected squares of one side, got {sides}")
        size = (sides[0], sides[0])
    found = np.concatenate([np.zeros(0, np.int64), *_highest(values.flatten(1), ties == "first")])
    owners, cells = np.divmod(found, h * w)
    places = np.stack([cells % w, cells // w], axis=1).astype(np.float64)
    if ties == "centre":
        number = np.bincount(owners, minlength=count)
        sums = [np.bincount(owners, places[:, axis], minlength=count) for axis in (0, 1)]
        owners, places = np.arange(count), np.stack(sums, axis=1) / number[:, None]
    return Points(owners, scale_points(places, (h, w), size), count, size)


def _highest(flat: Tensor, first: bool) -> Iterator[NDArray[np.int64]]:
    """Places of the highest cells among all of ``[B, h * w]``, in order, a few maps at a time."""
    most, cells = flat.amax(dim=1, keepdim=True), flat.shape[1]
    for part in slices(len(flat), max(1, _CHUNK // cells)):
        if flat.is_cuda:
            places = torch.nonzero((flat[part] == most[part]).flatten())[:, 0].cpu().numpy()
        else:  # NumPy compares and finds the few that are equal several times faster
            places = np.flatnonzero(flat[part].numpy() == most[part].numpy())
        if first:
            places = places[np.unique(places // cells, return_index=True)[1]]
        yield places + part.start * cells


def shares_picture(image_ids: Sequence[str]) -> NDArray[np.bool_]:
    """Whether each image's picture shows objects of another class, too.

    Args:
        image_ids: Of all images of a set whose ids are "picture/class", as those of COCO.

    Returns:
        ``[n]``; False for ids without a slash.
    """
    pictures = [image_id.rpartition("/")[0] for image_id in image_ids]
    times = Counter(pictures)
    return np.array([bool(one) and times[one] > 1 for one in pictures], np.bool_)


def first_per_class(labels: ArrayLike, most: int) -> NDArray[np.int64]:
    """The first images of each class, in their order: at most 400 in the supplement, section 4.

    Args:
        labels: ``[n]``.
        most: Images of a class.

    Returns:
        Places of the images, for `casm_fast.data.subset`.
    """
    label = np.asarray(labels, np.int64)
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], label[order])
    return np.sort(order[np.arange(len(order)) - starts < most])


# --- distances ------------------------------------------------------------------------------------


def _near_boxes(
    places: NDArray[np.float64],
    owners: NDArray[np.int64],
    boxes: Sequence[NDArray[np.float64]],
    sizes: Sequence[tuple[int, int]],
    tolerance: float,
) -> NDArray[np.bool_]:
    """Whether some pixel of some box of its image is near each point, ``[M]``."""
    most = max((len(table) for table in boxes), default=0)
    padded = np.zeros((len(boxes), max(most, 1), 4))
    for table, row, (height, width) in zip(boxes, padded, sizes, strict=True):
        row[: len(table)] = np.clip(table, 0, [width, height] * 2)
    low, last = padded[..., :2], padded[..., 2:] - 1  # first and last pixel
    full: NDArray[np.bool_] = np.all(low <= last, axis=2, keepdims=True)[..., 0]
    near = np.zeros(len(places), np.bool_)
    rows = max(1, _CHUNK // padded[0].size) if len(padded) else 1
    for start in range(0, len(places), rows):
        part = slice(start, start + rows)
        point, owner = places[part, None], owners[part]
        pixel = np.clip(np.rint(point), low[owner], np.maximum(last, low)[owner])
        squared = np.square(pixel - point).sum(axis=2)
        near[part] = ((squared < tolerance**2) & full[owner]).any(axis=1)
    return near


def _near_masks(
    places: NDArray[np.float64],
    owners: NDArray[np.int64],
    masks: Sequence[NDArray[np.bool_]],
    tolerance: float,
) -> NDArray[np.bool_]:
    """Whether some pixel of its image's mask is near each point, ``[M]``.

    The mask is not dilated: only the pixels around each point are looked up, in one array that
    holds the masks of all sizes one after the other.
    """
    if not len(masks):
        return np.zeros(len(places), np.bool_)
    pixels = np.concatenate([mask.ravel() for mask in masks])
    shapes = np.array([mask.shape for mask in masks], np.int64)
    starts = np.cumsum(shapes.prod(axis=1)) - shapes.prod(axis=1)
    reach = math.ceil(tolerance)
    around = np.arange(-reach, reach + 2)
    dy, dx = (grid.ravel() for grid in np.meshgrid(around, around, indexing="ij"))
    near = np.zeros(len(places), np.bool_)
    rows = max(1, _CHUNK // len(dx))
    for start in range(0, len(places), rows):
        part = slice(start, start + rows)
        point, owner = places[part], owners[part]
        corner = np.floor(point).astype(np.int64)
        x, y = corner[:, :1] + dx, corner[:, 1:] + dy
        height, width = shapes[owner].T[..., None]
        inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
        close = (x - point[:, :1]) ** 2 + (y - point[:, 1:]) ** 2 < tolerance**2
        index = np.where(inside, starts[owner][:, None] + y * width + x, 0)
        near[part] = (pixels[index] & inside & close).any(axis=1)
    return near


def _checked(
    masks: Sequence[NDArray[np.bool_]], sizes: Sequence[tuple[int, int]]
) -> list[NDArray[np.bool_]]:
    regions = [np.asarray(mask, np.bool_) for mask in masks]
    for region, size in zip(regions, sizes, strict=True):
        if region.shape != tuple(size):
            raise ValueError(f"masks: expected {list(size)}, got {list(region.shape)}")
    return regions


def _in_network(mask: NDArray[np.bool_], g: Geometry) -> NDArray[np.bool_]:
    """A mask of the network's square by the nearest rule."""
    place = np.arange(side_of(g)) + 0.5
    rows = np.clip(((place + g.offset_y) / g.scale_y).astype(np.int64), 0, g.height - 1)
    columns = np.clip(((place + g.offset_x) / g.scale_x).astype(np.int64), 0, g.width - 1)
    return np.asarray(mask[rows[:, None], columns])


def _convention(config: PointingConfig, truth: str, mapped: bool) -> str:
    frame = (
        {
            "original": "the original picture",
            "network": "the network's square",
        }[config.frame]
        if mapped
        else "the map"
    )
    ties = {
        "share": "tied maxima share the image",
        "centre": "tied maxima count as their mean place",
        "first": "of tied maxima the first in raster order counts",
    }[config.ties]
    return (
        f"a hit: the maximum lies less than {config.tolerance:.3g} px (strictly) from the {truth} "
        f"of the class, in pixels of {frame}; {ties}; mean over the classes present; difficult: "
        f"the {truth} of the class less than {100 * config.difficult_area:g} % of the image, and a "
        "distractor"
    )
