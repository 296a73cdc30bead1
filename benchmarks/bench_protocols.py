"""Evaluation protocols on maps of 224 x 224, beside the structure of the public evaluators.

The peers are transcriptions of what the public code does, one map and one threshold after the
other: contours for each of 1,000 thresholds (and once more for each of the 256 levels that differ),
two histograms a map, a threshold, a resize and a box for each alpha, a disc around each maximum,
and labels of components. Each protocol is raced on
a few maps, then timed on 10,000: copies of 25, so that the right answer is known, and the loop
runs over the 25 alone.

A protocol is an entry of `PROTOCOLS`: its name, how we compute it, and the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import pytest
import scipy.ndimage

from casm_fast import evaluation
from casm_fast.evaluation.weak_localisation import GRIDS

cv2.setNumThreads(1)

S = 224


@dataclass(frozen=True)
class Inputs:
    """Maps and all that some protocol asks for.

    Attributes:
        maps: ``[n, S, S]`` float32 in [0, 1]: 2 GB for 10,000. The public code takes each to
            float64 first, as ours does.
        truth: ``[n, 2, 4]`` true boxes, last pixel included.
        masks: ``[n, S, S]`` uint8: 1 object, 0 background, 255 ignored.
        sizes: ``[n, 2]`` (H, W) of the original pictures.
    """

    maps: np.ndarray
    truth: np.ndarray
    masks: np.ndarray
    sizes: np.ndarray

    def times(self, copies: int) -> Inputs:
        """The same inputs over and over."""
        return Inputs(*(np.concatenate([part] * copies) for part in vars(self).values()))


def inputs(n: int) -> Inputs:
    """Smooth maps, as class activation maps and learned masks are."""
    rng = np.random.default_rng(0)
    field = scipy.ndimage.gaussian_filter(
        rng.standard_normal((n, S, S)).astype(np.float32), (0, S / 20, S / 20)
    )
    field -= field.min((1, 2), keepdims=True)
    field /= field.max((1, 2), keepdims=True)
    x, y = (np.sort(rng.integers(0, S, (n, 2, 2)), 2) for _ in range(2))
    truth = np.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], 2)
    masks = rng.choice(np.array([0, 0, 1, 255], np.uint8), (n, S, S))
    return Inputs(field, truth, masks, rng.integers(S, 500, (n, 2)))


# ---------------------------------------------------------------- the public evaluators
def inclusive_iou(boxes: np.ndarray, truth: np.ndarray) -> np.ndarray:  # [n, 4], [m, 4] -> [n, m]
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    shared = np.maximum(0, high - low + 1).prod(2)
    areas = [(table[:, 2:] - table[:, :2] + 1).prod(1) for table in (boxes, truth)]
    return shared / (areas[0][:, None] + areas[1] - shared)


def contour_boxes(image: np.ndarray, level: int, every: bool) -> list[list[int]]:
    _, kept = cv2.threshold(image, level, 255, cv2.THRESH_BINARY)
    found = cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not found:
        return [[0, 0, 0, 0]]
    chosen = found if every else [max(found, key=cv2.contourArea)]
    rects = map(cv2.boundingRect, chosen)
    return [[x, y, min(x + w, S - 1), min(y + h, S - 1)] for x, y, w, h in rects]


def box_acc(data: Inputs, every: bool, once: bool) -> np.ndarray:
    """The curve; `once`: each level once, where the public code asks again for each threshold."""
    deltas = np.array([0.3, 0.5, 0.7] if every else [0.5])
    thresholds = np.arange(0, 1, 0.001)
    correct = np.zeros((len(deltas), len(thresholds)))
    for scoremap, truth in zip(data.maps, data.truth, strict=True):
        image = (scoremap.astype(np.float64) * 255).astype(np.uint8)
        levels = [int(t * np.max(image)) for t in thresholds]
        asked = sorted(set(levels)) if once else levels
        overlap = [
            inclusive_iou(np.array(contour_boxes(image, level, every)), truth).max()
            for level in asked
        ]
        if once:
            known = dict(zip(asked, overlap, strict=True))
            overlap = [known[level] for level in levels]
        correct += np.array(overlap) >= deltas[:, None]
    return correct / len(data.maps)


def pixel_ap(data: Inputs) -> np.ndarray:
    edges = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])
    true, false = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for scoremap, mask in zip(data.maps, data.masks, strict=True):
        scoremap = scoremap.astype(np.float64)
        true += np.histogram(scoremap[mask == 1], bins=edges)[0]
        false += np.histogram(scoremap[mask == 0], bins=edges)[0]
    tp, fp = true[::-1].cumsum(), false[::-1].cumsum()
    some = (tp + fp)[1:] != 0
    precision = tp / np.maximum(tp + fp, 1)
    return np.array([(precision[1:] * np.diff(tp / tp[-1]))[some].sum()])


def weak_box(heat: np.ndarray, rule: str, alpha: float, H: int, W: int) -> list[int]:
    heat = heat.astype(np.float64)
    kept = heat.copy()
    if rule == "mean":
        kept[heat < alpha * heat.mean()] = 0
    elif rule == "value":
        kept[heat - heat.min() < alpha * (heat.max() - heat.min())] = 0
    else:
        flat = heat.flatten()
        order = np.argsort(flat)[::-1]
        flat[order[np.where(np.cumsum(flat[order]) >= alpha * heat.sum())[0][0] :]] = 0
        kept = flat.reshape(heat.shape)
    kept = kept[np.arange(H)[:, None] * S // H, np.arange(W) * S // W]
    if not kept.any():
        return [1, 1, W, H]
    x, y = (np.where(kept.sum(axis) > 0)[0] + 1 for axis in (0, 1))
    return [x[0], y[0], x[-1], y[-1]]


def weak_errors(data: Inputs, rule: str) -> np.ndarray:
    wrong = [
        [
            inclusive_iou(np.array([weak_box(heat, rule, alpha, H, W)]), truth).max() < 0.5
            for heat, truth, (H, W) in zip(data.maps, data.truth, data.sizes, strict=True)
        ]
        for alpha in GRIDS[rule]
    ]
    return np.mean(wrong, 1)


def pointing(data: Inputs, masks: bool) -> np.ndarray:
    v, u = np.meshgrid(np.arange(S), np.arange(S), indexing="ij")
    hits = []
    for heat, boxes, mask in zip(data.maps, data.truth, data.masks, strict=True):
        truth = mask == 1
        if not masks:
            truth = np.zeros((S, S), bool)
            for x0, y0, x1, y1 in boxes:
                truth[y0 : y1 + 1, x0 : x1 + 1] = True
        points = np.argwhere(heat == heat.max())
        near = [(truth & ((v - y) ** 2 + (u - x) ** 2 < 15**2)).any() for y, x in points]
        hits.append(np.mean(near))
    return np.array([np.mean(hits)])


def casm_boxes(data: Inputs) -> np.ndarray:
    found = []
    for heat, boxes in zip(data.maps, data.truth, strict=True):
        labels, _ = scipy.ndimage.label(heat >= np.float32(heat.mean(dtype=np.float64)))
        largest = labels == np.bincount(labels.ravel(), labels.ravel() > 0).argmax()
        y, x = (np.flatnonzero(largest.any(axis)) for axis in (1, 0))
        box = np.array([[x[0], y[0], x[-1] + 1, y[-1] + 1]])
        low, high = np.maximum(box[:, :2], boxes[:, :2]), np.minimum(box[:, 2:], boxes[:, 2:] + 1)
        shared = np.clip(high - low, 0, None).prod(1)
        areas = [(b[:, 2:] - b[:, :2] + more).prod(1) for b, more in ((box, 0), (boxes, 1))]
        found.append((shared / (areas[0] + areas[1] - shared)).max() > 0.5)
    return np.array([1 - np.mean(found)])


# ---------------------------------------------------------------- the protocols
def our_box_acc(data: Inputs, version: int) -> np.ndarray:
    return evaluation.max_box_acc(data.maps, data.truth, version=version).curve


def our_pixel_ap(data: Inputs) -> np.ndarray:
    return np.array([evaluation.pixel_ap(data.maps, data.masks).score])


def our_weak_errors(data: Inputs, rule: str) -> np.ndarray:
    return evaluation.tune(data.maps, data.truth, data.sizes, rule=rule).errors


def our_pointing(data: Inputs, masks: bool) -> np.ndarray:
    labels = np.zeros(len(data.maps), np.int64)  # one class, so that its mean is that of all
    half_open = data.truth + np.array([0, 0, 1, 1])
    truth = {"masks": list(data.masks == 1)} if masks else {"boxes": list(half_open)}
    return np.array([evaluation.pointing_game(data.maps, labels, **truth).overall()])


def our_casm_boxes(data: Inputs) -> np.ndarray:
    half_open = data.truth + np.array([0, 0, 1, 1])
    return np.array([evaluation.localise(data.maps, list(half_open)).localisation.le])


Protocol = Callable[[Inputs], np.ndarray]

PROTOCOLS: dict[str, tuple[Protocol, dict[str, Protocol]]] = {
    **{
        f"MaxBoxAcc V{version}": (
            partial(our_box_acc, version=version),
            {
                "loop, 1000 thresholds": partial(box_acc, every=version == 2, once=False),
                "loop, each level once": partial(box_acc, every=version == 2, once=True),
            },
        )
        for version in (1, 2)
    },
    "PxAP": (our_pixel_ap, {"loop, two histograms": pixel_ap}),
    **{
        f"weak localisation, {rule}": (
            partial(our_weak_errors, rule=rule),
            {f"loop, {len(GRIDS[rule])} alphas": partial(weak_errors, rule=rule)},
        )
        for rule in GRIDS
    },
    **{
        f"pointing game, {truth}": (
            partial(our_pointing, masks=truth == "masks"),
            {"loop": partial(pointing, masks=truth == "masks")},
        )
        for truth in ("boxes", "masks")
    },
    "CASM's localisation": (our_casm_boxes, {"loop, SciPy": casm_boxes}),
}

TOLERANCE = 1e-12  # PxAP's sums have another order; all else is counted and equal
MANY, DISTINCT = 10_000, 25


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol(name, race, device):
    if device.type == "cuda":
        pytest.skip("the protocols take maps to the CPU")
    data, (ours, loops) = inputs(8), PROTOCOLS[name]
    race(
        op=f"protocol: {name}",
        case=f"8 maps of {S}x{S}",
        ours=partial(ours, data),
        peers={peer: partial(loop, data) for peer, loop in loops.items()},
        expected=partial(next(iter(loops.values())), data),
        tolerance=TOLERANCE,
        bytes=data.maps.nbytes,
        images=len(data.maps),
    )


@pytest.mark.long
@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_on_many_maps(name, race, device):
    if device.type == "cuda":
        pytest.skip("the protocols take maps to the CPU")
    few, (ours, loops) = inputs(DISTINCT), PROTOCOLS[name]
    data = few.times(MANY // DISTINCT)
    part = f"on {DISTINCT} of the {MANY:,} maps"
    race(
        op=f"protocol: {name}",
        case=f"{MANY} maps of {S}x{S}",
        ours=partial(ours, data),
        peers={f"{peer}, {part}": partial(loop, few) for peer, loop in loops.items()},
        expected=partial(list(loops.values())[-1], few),
        tolerance=TOLERANCE,
        bytes=data.maps.nbytes,
        images=MANY,
        inexact={f"{peer}, {part}": f"{DISTINCT / MANY:.2%} of the work" for peer in loops},
    )
