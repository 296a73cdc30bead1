r"""Animal parts: are eyes more salient than feet?

Fong and Vedaldi 2017, animal part saliency; supplement, section 7 (figure 11, table 2): the mean
intensity of the deletion mask in a 5 x 5 window around every keypoint, for each class; where it is
low the region is salient. The ratio

.. math::
    r = \frac{\text{mean intensity around the feet}}{\text{mean intensity around the eyes}}

of a class is above 1 where eyes are the more salient. A group of classes has the mean of their
ratios and its standard error, ``std / sqrt(classes)`` with the unbiased std. Classes count that
have at least 10 images with an eye and a foot each, as in the paper (76 classes, 3,558 images).

Keypoints are read from CSV with the head ``image_id,class,part,x,y``, or from JSON Lines (.jsonl)
with these keys: one keypoint a line, visible ones only. ``x`` and ``y`` are pixels of the original
picture, 0 at the centre of its first pixel; ``part`` is "eye" or "foot", or any other part. Left
and right ones are separate lines.

Conventions: the window is one of map cells around the cell that holds the keypoint, cut at the
border of the map; a keypoint that the crop cut off is left out; a class's intensity is the mean
over its keypoints. For maps where high is salient the intensity is one minus the map. The paper's
maps have 224 x 224 cells; in a coarser map the window covers more of the picture.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.nn import functional as F

from casm_fast.data.geometry import Geometry
from casm_fast.evaluation.frames import check_count, side_of, to_network
from casm_fast.evaluation.maps import Maps, as_maps, check_unit
from casm_fast.evaluation.outcomes import PER_IMAGE, mean_of, paragraph

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Salient = Literal["high", "low"]
"""Where maps are salient: "high" for saliency maps, "low" for deletion masks (1 keeps)."""

WINDOW = 5
"""Side of the window around a keypoint, in map cells."""

LEAST_IMAGES = 10
"""Images with both parts that a class needs."""

FIELDS = ("image_id", "class", "part", "x", "y")
"""Of a line of a keypoint file."""


@dataclass(frozen=True)
class Ratio:
    """A published ratio of a group of classes.

    Attributes:
        classes: How many.
        mean: Of their ratios.
        error: Standard error of the mean.
    """

    classes: int
    mean: float
    error: float


PUBLISHED = {
    "small mammals": Ratio(3, 4.03, 0.25),
    "dogs": Ratio(8, 3.70, 0.50),
    "medium mammals": Ratio(14, 3.49, 0.32),
    "birds": Ratio(21, 3.03, 0.04),
    "large mammals": Ratio(23, 2.53, 0.17),
    "amphibians and reptiles": Ratio(7, 1.96, 0.23),
}
"""Table 2 of the supplement: GoogLeNet, deletion masks."""


@dataclass(frozen=True)
class Keypoint:
    """One visible keypoint.

    Attributes:
        image_id: Of its picture.
        label: Name of the class of the picture.
        part: "eye", "foot" or another part.
        x: In pixels of the original picture, 0 at the centre of the first pixel.
        y: Likewise.
    """

    image_id: str
    label: str
    part: str
    x: float
    y: float


@dataclass(frozen=True, eq=False)
class Intensities:
    """The intensity of maps around keypoints; `join` those of the batches of a data set.

    Attributes:
        values: ``[k]`` in [0, 1], low is salient.
        image_ids: ``[k]`` of str.
        labels: ``[k]`` of str.
        parts: ``[k]`` of str.
        left_out: ``[B]``, keypoints of each map that the crop cut off.
        convention: How they were measured.
    """

    values: NDArray[np.float64] = field(metadata=PER_IMAGE)
    image_ids: NDArray[np.str_] = field(metadata=PER_IMAGE)
    labels: NDArray[np.str_] = field(metadata=PER_IMAGE)
    parts: NDArray[np.str_] = field(metadata=PER_IMAGE)
    left_out: NDArray[np.int64] = field(metadata=PER_IMAGE)
    convention: str


@dataclass(frozen=True)
class ClassParts:
    """A class.

    Attributes:
        label: Its name.
        group: Its group; "" without.
        images: That show both parts.
        means: Mean intensity by part.
        ratio: Feet to eyes.
    """

    label: str
    group: str
    images: int
    means: Mapping[str, float]
    ratio: float


@dataclass(frozen=True)
class PartRatios:
    """Ratios of classes and groups. ``str(ratios)`` is the printed table.

    Attributes:
        classes: By group, then by name.
        groups: In falling order of their mean.
        parts: What is divided by what: ("foot", "eye").
        left_out: Keypoints that the crop cut off.
        few: Classes with too few images.
        convention: How the intensities were measured.
    """

    classes: tuple[ClassParts, ...]
    groups: Mapping[str, Ratio]
    parts: tuple[str, str]
    left_out: int
    few: tuple[str, ...]
    convention: str

    @property
    def overall(self) -> Ratio:
        """Of all classes."""
        return _ratio([one.ratio for one in self.classes])

    def __str__(self) -> str:
        above, below = self.parts
        head = f"Ratio {above}:{below} of the intensity; above 1 the {below} is more salient"
        width = max(map(len, ("all classes", *self.groups)))
        lines = [head, "", f"  {'':<{width}}  {'classes':>7}  {'ratio ± SE':>12}  published"]
        for name, ratio in {**self.groups, "all classes": self.overall}.items():
            known = PUBLISHED.get(name) if (above, below) == ("foot", "eye") else None
            paper = f"{known.mean:.2f} ± {known.error:.2f} ({known.classes})" if known else "-"
            ours = f"{ratio.mean:.2f} ± {ratio.error:.2f}"
            lines.append(f"  {name:<{width}}  {ratio.classes:>7}  {ours:>12}  {paper}")
        if self.left_out:
            lines.append(f"  ({self.left_out} keypoints left out: the crop cut them off)")
        if self.few:
            lines.append(f"  (classes left out, too few images: {', '.join(self.few)})")
        return "\n".join([*lines, "", paragraph(self.convention)])

    def draw(self, axes: Axes, first: str = "#2458c5", second: str = "#c2630a") -> None:
        """Draw figure 11: each class's intensities as two dots on a line, by group.

        Args:
            axes: Empty, of matplotlib.
            first: Colour of the upper part of the ratio.
            second: Colour of the lower one.
        """
        names = [one.label for one in self.classes]
        for place, one in enumerate(self.classes):
            ends = [one.means[part] for part in self.parts]
            axes.plot(ends, [place, place], color="#b8bec6", linewidth=1, zorder=1)
        for part, colour in zip(self.parts, (first, second), strict=True):
            axes.plot(
                [one.means[part] for one in self.classes],
                range(len(names)),
                "o",
                color=colour,
                markersize=4,
                label=part,
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("mean intensity, low is salient")
        axes.legend(frameon=False)


def read_keypoints(path: str | Path) -> list[Keypoint]:
    """Read a keypoint file, CSV or JSON Lines.

    Args:
        path: .csv with the head ``image_id,class,part,x,y``, or .jsonl with these keys.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another suffix, head or key, or a coordinate that is no number; the message
            names file and line.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"keypoints: expected a file .csv or .jsonl, got {path}")
    if not path.exists():
        raise FileNotFoundError(f"keypoints: there is no {path}")
    with path.open(newline="", encoding="utf-8") as file:
        lines = _csv_lines(path, file) if path.suffix == ".csv" else _json_lines(path, file)
        found = []
        for number, line in lines:
            try:
                x, y = float(line["x"]), float(line["y"])
            except (TypeError, ValueError):
                x = y = math.nan
            if not math.isfinite(x + y):
                raise ValueError(
                    f"{path}, line {number}: expected x and y as numbers, "
                    f"got {line['x']!r} and {line['y']!r}"
                )
            found.append(
                Keypoint(str(line["image_id"]), str(line["class"]), str(line["part"]), x, y)
            )
    if not found:
        raise ValueError(f"keypoints: expected at least one keypoint in {path}, got none")
    return found


def _csv_lines(path: Path, file: Iterable[str]) -> Iterable[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file)
    if reader.fieldnames is None or not set(FIELDS) <= set(reader.fieldnames):
        raise ValueError(
            f"{path}, line 1: expected the head {','.join(FIELDS)}, "
            f"got {','.join(reader.fieldnames or ()) or 'nothing'}"
        )
    for row in reader:
        missing = [name for name in FIELDS if row[name] is None]
        if missing:
            raise ValueError(f"{path}, line {reader.line_num}: expected `{missing[0]}`, got none")
        yield reader.line_num, row


def _json_lines(path: Path, file: Iterable[str]) -> Iterable[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected JSON, got {error}") from error
        missing = [name for name in FIELDS if not isinstance(record, dict) or name not in record]
        if missing:
            raise ValueError(f"{path}, line {number}: expected `{missing[0]}`, got none")
        yield number, record


def part_intensities(
    maps: Maps,
    image_ids: Sequence[str],
    keypoints: Iterable[Keypoint],
    *,
    geometries: Sequence[Geometry] | None = None,
    salient: Salient = "high",
    window: int = WINDOW,
) -> Intensities:
    """The intensity of maps around keypoints.

    Args:
        maps: ``[B, 1, h, w]`` or ``[B, h, w]`` in [0, 1].
        image_ids: Of the B pictures.
        keypoints: Of any pictures; those of other ones are passed over.
        geometries: Of the pictures, when the maps are of the network's square; without, keypoints
            are in cells of the map.
        salient: Where the maps are salient, "high" or "low".
        window: Side of the window in map cells, odd.

    Returns:
        What is around each keypoint, in the order of the keypoints.

    Raises:
        TypeError: Maps are neither tensor nor array.
        ValueError: Maps are not in [0, 1], what is given for them is not one for each, or the
            window is even.
    """
    if salient not in get_args(Salient):
        raise ValueError(f"salient: expected high or low, got {salient!r}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window: expected an odd number of cells, got {window}")
    values = as_maps("part_intensities", maps).double()
    count, h, w = values.shape
    check_count("image_ids", image_ids, count)
    if geometries is not None:
        check_count("geometries", geometries, count)
    check_unit(values)
    place = {image_id: k for k, image_id in enumerate(image_ids)}
    shown = [one for one in keypoints if one.image_id in place]
    owners = np.array([place[one.image_id] for one in shown], np.int64)
    points = np.array([(one.x, one.y) for one in shown], np.float64).reshape(-1, 2)
    if geometries is not None and count:
        points = to_network(points, geometries, owners)
        sides = np.array([side_of(one) for one in geometries])[owners, None]
        points = (points + 0.5) * np.array([w, h]) / sides - 0.5
    cells = np.floor(points + 0.5).astype(np.int64)
    inside: NDArray[np.bool_] = np.all((cells >= 0) & (cells < np.array([w, h])), axis=1)
    # The mean over the part of the window that lies on the map.
    around = F.avg_pool2d(values[:, None], window, 1, window // 2, count_include_pad=False)[:, 0]
    index = torch.from_numpy(owners[inside] * h * w + cells[inside, 1] * w + cells[inside, 0])
    found = around.flatten()[index.to(values.device)].cpu().numpy()
    kept = [one for one, within in zip(shown, inside, strict=True) if within]
    return Intensities(
        values=1 - found if salient == "high" else found,
        image_ids=np.array([one.image_id for one in kept], np.str_),
        labels=np.array([one.label for one in kept], np.str_),
        parts=np.array([one.part for one in kept], np.str_),
        left_out=np.bincount(owners[~inside], minlength=count),
        convention=(
            f"mean over a {window} x {window} window of map cells around each keypoint, cut at the "
            f"border; intensity: {'one minus the map' if salient == 'high' else 'the map'} "
            f"({h} x {w}), low is salient; a class's mean is over its keypoints"
        ),
    )


def part_ratios(
    intensities: Intensities,
    groups: Mapping[str, str] | None = None,
    *,
    parts: tuple[str, str] = ("foot", "eye"),
    least_images: int = LEAST_IMAGES,
) -> PartRatios:
    """Ratios of the intensity around two parts, for classes and groups of them.

    Args:
        intensities: Of a whole data set.
        groups: The group of each class, by name; classes of no group count in the last line alone.
        parts: What is divided by what.
        least_images: Images with both parts that a class needs.

    Returns:
        The ratios of the classes and their groups.

    Raises:
        ValueError: No class has enough images with both parts.
    """
    known = groups or {}
    classes, few = [], []
    for label in np.unique(intensities.labels).tolist():
        at = [
            np.flatnonzero((intensities.labels == label) & (intensities.parts == part))
            for part in parts
        ]
        both = set.intersection(*(set(intensities.image_ids[one].tolist()) for one in at))
        if len(both) < least_images:
            few.append(label)
            continue
        means = {p: mean_of(intensities.values[one]) for p, one in zip(parts, at, strict=True)}
        top, bottom = (means[part] for part in parts)
        ratio = top / bottom if bottom > 0 else math.inf
        classes.append(ClassParts(label, known.get(label, ""), len(both), means, ratio))
    if not classes:
        raise ValueError(
            f"part_ratios: expected a class with at least {least_images} images that show "
            f"{parts[0]} and {parts[1]}, got none of {len(few)}"
        )
    found = {
        group: _ratio([one.ratio for one in classes if one.group == group])
        for group in {one.group for one in classes if one.group}
    }
    order = sorted(found, key=lambda group: (-found[group].mean, group))
    rank = {group: k for k, group in enumerate(order)}
    classes.sort(key=lambda one: (rank.get(one.group, len(rank)), one.label))
    return PartRatios(
        classes=tuple(classes),
        groups={group: found[group] for group in order},
        parts=parts,
        left_out=int(intensities.left_out.sum()),
        few=tuple(few),
        convention=f"{intensities.convention}; a group has the mean of its classes' ratios",
    )


def _ratio(ratios: ArrayLike) -> Ratio:
    values = np.asarray(ratios, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Ratio(len(values), mean_of(values), float(error))
