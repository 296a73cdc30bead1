"""CASM's own localisation, of saliency maps or boxes from anywhere.

``casm_fast.evaluate`` scores the table of an extraction; these functions score what lies in memory,
by the same code: keep the pixels above the threshold, take the box of the largest connected
component, ask for an IoU strictly above 0.5 with some true box (Zolna, Geras and Cho 2020, eq. 9
and section 6.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from casm_fast import ops
from casm_fast.data import localization
from casm_fast.data.geometry import Policy, geometry
from casm_fast.data.predictions import Convention
from casm_fast.evaluation import published
from casm_fast.evaluation.intervals import HasIntervals, Interval
from casm_fast.evaluation.maps import Maps, check_maps, parts
from casm_fast.evaluation.printing import (
    TITLES,
    convention_lines,
    interval_lines,
    localisation_table,
    notes,
)
from casm_fast.evaluation.published import Published
from casm_fast.evaluation.scores import Counts, Localisation, score_baselines, score_boxes
from casm_fast.evaluation.truth import check_truth
from casm_fast.models.statistics import Cells, inside


@dataclass(frozen=True)
class CasmLocalisation(HasIntervals):
    """What `localise` found. ``str(result)`` is the printed table with the convention below.

    Attributes:
        source: Name of the images.
        localisation: Scores of the maps or boxes.
        baselines: Scores of the centred box, the whole image and a random box.
        boxes: ``[n, 4]`` int64 (x0, y0, x1, y1), half-open, in network pixels; zeros where no pixel
            was kept.
        found: ``[n]`` whether the box has an IoU above 0.5 with some true box.
        counts: Which images were counted: all.
        convention: Geometry and box rule.
        published: Published results by the same convention on the same images; mostly empty.
    """

    source: str
    localisation: Localisation
    baselines: tuple[Localisation, ...]
    boxes: NDArray[np.int64]
    found: NDArray[np.bool_]
    counts: Counts
    convention: Convention
    published: tuple[Published, ...]

    def bootstrap(self, **told: Any) -> dict[str, Interval]:
        """LE, OM, F1 and so on with their intervals, by the names in `Localisation`."""
        return self.localisation.bootstrap(**told)

    def __str__(self) -> str:
        table = localisation_table((self.localisation, *self.baselines), self.published)
        lines = [f"Localisation on {self.source}", "", *table, ""]
        explained = (*interval_lines(self.intervals, TITLES), *convention_lines(self))
        return "\n".join([*lines, *notes(explained)])


def localise(
    maps: Maps,
    truth: Sequence[ArrayLike],
    sizes: ArrayLike | None = None,
    *,
    policy: Policy = "crop",
    size: int = 224,
    rule: str = "mean",
    alpha: float = 1.0,
    component: str = "largest",
    connectivity: int = 4,
    right: ArrayLike | None = None,
    image_ids: Sequence[str] | None = None,
    source: str = "saved maps",
) -> CasmLocalisation:
    """Scores saliency maps against true boxes by CASM's convention.

    Args:
        maps: ``[n, 1, h, w]`` or ``[n, h, w]``, for the network's square: pixel y of `size` shows
            cell ``y * h // size``. Thresholds and components are those of the cells.
        truth: n arrays ``[m, 4]`` of true boxes (x0, y0, x1, y1), at least one for each image: in
            pixels of the original pictures when `sizes` is given, else in network pixels.
        sizes: ``[n, 2]`` (H, W) of the original pictures.
        policy: How a picture became the square: ``crop`` (shorter side to `size`, centre crop) or
            ``squash`` (both sides to `size`).
        size: Side of the network's square.
        rule: Threshold rule, see `casm_fast.ops.mask_boxes`; eq. 9 is ``mean``, the authors' code
            ``area``.
        alpha: Parameter of the rule.
        component: ``largest`` connected component, or ``all`` kept pixels.
        connectivity: 4 or 8.
        right: ``[n]`` whether the class was recognised, for OM; None when unknown.
        image_ids: n names, which decide about the random box alone; numbers when omitted.
        source: Name of the images, as ``casm_fast.data.open_source`` takes it.

    Returns:
        The scores, those of the baselines, and the convention.

    Raises:
        TypeError: Maps of a wrong type.
        ValueError: Shapes that do not agree, an image without a true box, or a wrong option.
    """
    n, height, width = check_maps("localise", maps)
    truth = _network_boxes("localise", truth, n, sizes, size, policy)
    rows, columns = Cells.of(height, size), Cells.of(width, size)
    boxes = np.empty((n, 4), np.int64)
    held, total = [], np.empty(n)
    for here, part in parts(maps):
        if part.dtype not in (torch.float32, torch.float64):
            part = part.float() / (255 if part.dtype == torch.uint8 else 1)
        if bool(part.isnan().any()):
            raise ValueError("localise: expected `maps` without NaN")
        found, _ = ops.mask_boxes(
            part, rule=rule, alpha=alpha, connectivity=connectivity, component=component
        )
        edges = (columns.edges, rows.edges)
        boxes[here] = np.stack(
            [edges[axis % 2].numpy()[found[:, axis].cpu().numpy()] for axis in range(4)], axis=1
        )
        flat, owners = localization.pair(truth[here])
        square = torch.tensor([[0, 0, size, size]]).expand(len(part), 4)
        corners = torch.cat([torch.from_numpy(flat.astype(np.int64)), square])
        whose = torch.cat([torch.from_numpy(owners), torch.arange(len(part))])
        sums = inside(part, corners, whose, rows, columns).cpu().numpy()
        held.append(sums[: len(flat)])
        total[here] = sums[len(flat) :]
    flat, owners = localization.pair(truth)
    f1 = localization.f1(np.concatenate(held), total[owners], localization.area(flat))
    return _result(
        "these maps",
        boxes,
        truth,
        Convention(size, policy, rule, float(alpha), component, connectivity),
        right,
        image_ids,
        source,
        f1=(localization.best(f1, owners, n), localization.mean(f1, owners, n)),
    )


def localise_boxes(
    boxes: ArrayLike,
    truth: Sequence[ArrayLike],
    sizes: ArrayLike | None = None,
    *,
    convention: Convention,
    right: ArrayLike | None = None,
    image_ids: Sequence[str] | None = None,
    source: str = "saved boxes",
) -> CasmLocalisation:
    """Scores one box per image against true boxes by CASM's convention.

    Args:
        boxes: ``[n, 4]`` (x0, y0, x1, y1), half-open, in network pixels.
        truth: As in `localise`.
        sizes: As in `localise`.
        convention: How the boxes were made: it is printed, and its geometry moves the truth.
        right: As in `localise`.
        image_ids: As in `localise`.
        source: As in `localise`.

    Returns:
        The scores; F1 is that of a map that is 1 in the box and 0 elsewhere.

    Raises:
        ValueError: Shapes that do not agree, or an image without a true box.
    """
    table = np.asarray(boxes)
    if table.ndim != 2 or table.shape[1] != 4:
        raise ValueError(
            f"localise_boxes: expected `boxes` of shape [n, 4], got {list(table.shape)}"
        )
    truth = _network_boxes(
        "localise_boxes", truth, len(table), sizes, convention.size, convention.policy
    )
    return _result(
        "these boxes", table.astype(np.int64), truth, convention, right, image_ids, source
    )


def _network_boxes(
    name: str,
    truth: Sequence[ArrayLike],
    images: int,
    sizes: ArrayLike | None,
    size: int,
    policy: Policy,
) -> list[NDArray[Any]]:
    """True boxes in network pixels, as scoring truncates them."""
    boxes, pictures = check_truth(name, truth, images, sizes)
    if pictures is None:
        return boxes
    return [
        geometry(int(height), int(width), size, policy).to_network(original)
        for original, (height, width) in zip(boxes, pictures, strict=True)
    ]


def _result(
    name: str,
    boxes: NDArray[np.int64],
    truth: Sequence[NDArray[Any]],
    convention: Convention,
    right: ArrayLike | None,
    image_ids: Sequence[str] | None,
    source: str,
    f1: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> CasmLocalisation:
    n, size = len(boxes), convention.size
    recognised = None if right is None else np.asarray(right, bool)
    if recognised is not None and recognised.shape != (n,):
        raise ValueError(f"localise: expected `right` of shape [{n}], got {list(recognised.shape)}")
    ids = [str(image) for image in range(n)] if image_ids is None else image_ids
    return CasmLocalisation(
        source=source,
        localisation=score_boxes(name, boxes, truth, size, recognised, f1),
        baselines=score_baselines(ids, truth, size, recognised),
        boxes=boxes,
        found=localization.iou(boxes, truth) > localization.THRESHOLD,
        counts=Counts(images=n, localized=n, labelled=0 if right is None else n, unreadable=0),
        convention=convention,
        published=published.comparable(source, n, convention),
    )
