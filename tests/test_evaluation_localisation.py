"""Localisation protocols on maps and boxes, against their definitions written as loops.

The transcriptions below follow the published definitions step by step, one image, one threshold and
one set of pixels after the other, with OpenCV and np.histogram where the authors use them. They are
compared exactly unless a tolerance says otherwise.
"""

from __future__ import annotations

import json
import re
from typing import Any

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses

from casm_fast import evaluation
from casm_fast.data import localization
from casm_fast.data.predictions import Convention
from casm_fast.evaluation import published
from casm_fast.evaluation.weak_localisation import GRIDS
from casm_fast.ops import mask_boxes

RULES = ["value", "energy", "mean"]


def blobs(n: int, h: int, w: int, seed: int = 0, ties: bool = False) -> np.ndarray:
    """Smooth maps from 0 to 1, float64 ``[n, h, w]``."""
    rng = np.random.default_rng(seed)
    field = scipy.ndimage.gaussian_filter(rng.standard_normal((n, h, w)), (0, 2, 2))
    field -= field.min((1, 2), keepdims=True)
    field /= field.max((1, 2), keepdims=True)
    return np.round(field * 6) / 6 if ties else field


def true_boxes(n: int, height: int, width: int, seed: int = 0) -> list[np.ndarray]:
    """One to three boxes an image, last pixel included."""
    rng = np.random.default_rng(seed)
    truth = []
    for _ in range(n):
        m = rng.integers(1, 4)
        x, y = (np.sort(rng.integers(0, side, (m, 2)), 1) for side in (width, height))
        truth.append(np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1))
    return truth


def inclusive_iou(a: Any, b: Any) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


# ---------------------------------------------------------------- CASM
@pytest.mark.parametrize("policy", ["crop", "squash"])
def test_casm_equals_a_loop_over_pixels(policy):
    n, size = 6, 28
    maps = blobs(n, 14, 14).astype(np.float32)
    sizes = np.array([(40, 50), (50, 40), (28, 28), (90, 30), (33, 47), (28, 60)])
    truth = [true_boxes(1, h, w, i)[0] for i, (h, w) in enumerate(sizes)]
    right = np.array([1, 0, 1, 1, 0, 1], bool)
    result = evaluation.localise(maps, truth, sizes, policy=policy, size=size, right=right)
    found, f1, f1_mean = [], [], []
    for m, boxes, (height, width) in zip(maps, truth, sizes, strict=True):
        pixels = np.kron(m, np.ones((2, 2)))
        labels, _ = scipy.ndimage.label(pixels >= np.float32(pixels.mean()))
        ys, xs = np.nonzero(labels == np.bincount(labels.ravel())[1:].argmax() + 1)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        overlaps, scores = [], []
        for x0, y0, x1, y1 in boxes:
            if policy == "crop":
                scale = size / min(height, width)
                cut = (max(width * scale - size, 0) / 2, max(height * scale - size, 0) / 2)
                scales = (scale, scale)
            else:
                scales, cut = (size / width, size / height), (0, 0)
            t = [int(v * scales[i % 2] - cut[i % 2]) for i, v in enumerate((x0, y0, x1, y1))]
            area = max(t[2] - t[0], 0) * max(t[3] - t[1], 0)
            shared = max(min(box[2], t[2]) - max(box[0], t[0]), 0)
            shared *= max(min(box[3], t[3]) - max(box[1], t[1]), 0)
            union = (box[2] - box[0]) * (box[3] - box[1]) + area - shared
            overlaps.append(shared / union)
            inside = pixels[max(t[1], 0) : max(t[3], 0), max(t[0], 0) : max(t[2], 0)].sum()
            p, r = inside / (pixels.sum() + 1e-6), inside / area if area else 0
            scores.append(2 * p * r / (p + r + 1e-6))
        found.append(max(overlaps) > 0.5)
        f1.append(max(scores))
        f1_mean.append(np.mean(scores))
    assert result.found.tolist() == found
    assert result.localisation.le == pytest.approx(1 - np.mean(found), abs=1e-12)
    assert result.localisation.om == pytest.approx(1 - np.mean(np.array(found) & right), abs=1e-12)
    # Sums in another order: 1e-15 was seen.
    assert result.localisation.f1 == pytest.approx(np.mean(f1), abs=1e-12)
    assert result.localisation.f1_mean == pytest.approx(np.mean(f1_mean), abs=1e-12)
    assert result.convention == Convention(size, policy, "mean", 1.0, "largest", 4)


def test_casm_of_maps_and_of_their_boxes_agree():
    maps, truth = blobs(8, 16, 16), true_boxes(8, 16, 16)
    of_maps = evaluation.localise(maps, truth, size=16, rule="value", alpha=0.4, connectivity=8)
    boxes, _ = mask_boxes(torch.from_numpy(maps)[:, None], None, "value", 0.4, 8)
    of_boxes = evaluation.localise_boxes(boxes, truth, convention=of_maps.convention)
    np.testing.assert_array_equal(of_maps.boxes, of_boxes.boxes)
    assert of_maps.localisation.le == of_boxes.localisation.le
    assert of_maps.baselines == of_boxes.baselines
    flat, owners = localization.pair(truth)
    f1 = localization.best(localization.f1_of_boxes(boxes.numpy()[owners], flat), owners, 8)
    assert of_boxes.localisation.f1 == pytest.approx(f1.mean(), abs=1e-12)


def test_casm_prints_its_convention():
    result = evaluation.localise(
        blobs(2, 8, 8), true_boxes(2, 8, 8), size=16, rule="area", component="all", source="two"
    )
    text = str(result)
    assert text.startswith("Localisation on two\n")
    assert "the mean(m) share of pixels with the highest m (rule area, alpha 1)" in text
    assert "tight box of every kept pixel" in text
    assert "shorter side to 16, centre crop 16 x 16" in text
    assert "IoU > 0.5 (strictly)" in text


# ---------------------------------------------------------------- weak localisation
def weak_box(heat: np.ndarray, rule: str, alpha: float, H: int, W: int) -> list[int]:
    """The authors' steps: threshold, set the rest to zero, resize (nearest), look for non-zeros."""
    heat = heat.astype(np.float64)
    kept = heat.copy()
    if rule == "mean":
        kept[heat < alpha * heat.mean()] = 0
    elif rule == "value":
        kept[heat - heat.min() < alpha * (heat.max() - heat.min())] = 0
    else:
        flat = heat.ravel().copy()
        order = np.argsort(flat, kind="stable")[::-1]
        held = np.cumsum(flat[order])
        end = np.flatnonzero(held >= alpha * held[-1])[0]
        flat[order[end:]] = 0
        kept = flat.reshape(heat.shape)
    h, w = heat.shape
    resized = np.empty((H, W))
    for y in range(H):
        for x in range(W):
            resized[y, x] = kept[y * h // H, x * w // W]
    if not resized.any():
        return [1, 1, W, H]
    ys, xs = np.nonzero(resized)
    return [xs.min() + 1, ys.min() + 1, xs.max() + 1, ys.max() + 1]


SIZES = [(12, 14), (31, 25), (40, 17), (9, 30), (7, 8), (12, 5)]  # larger, smaller, mixed


@pytest.mark.parametrize("rule", RULES)
def test_weak_boxes_equal_the_transcription(rule):
    maps = blobs(len(SIZES), 12, 14, seed=3).astype(np.float32)
    maps[1] = np.clip(maps[1] - 0.6, 0, None)  # zeros survive no threshold
    alphas = GRIDS[rule]
    boxes = evaluation.threshold_boxes(maps, SIZES, rule=rule, alphas=alphas)
    for i, (H, W) in enumerate(SIZES):
        for k, alpha in enumerate(alphas):
            assert boxes[i, k].tolist() == weak_box(maps[i], rule, alpha, H, W), (i, alpha)


@pytest.mark.parametrize("rule", ["value", "mean"])
def test_weak_boxes_equal_the_transcription_with_ties(rule):
    maps = blobs(len(SIZES), 12, 14, seed=4, ties=True)
    boxes = evaluation.threshold_boxes(maps, SIZES, rule=rule, alphas=GRIDS[rule])
    for i, (H, W) in enumerate(SIZES):
        for k, alpha in enumerate(GRIDS[rule]):
            assert boxes[i, k].tolist() == weak_box(maps[i], rule, alpha, H, W), (i, alpha)


@pytest.mark.parametrize("rule", RULES)
def test_weak_boxes_are_those_of_mask_boxes(rule):
    """At the map's own size, the extent of everything that the op keeps."""
    maps = torch.from_numpy(blobs(5, 12, 14, seed=5))[:, None] + 0.01
    for alpha in (0.2, 0.5, 0.9):
        ours = evaluation.threshold_boxes(maps, [(12, 14)] * 5, rule=rule, alphas=[alpha])[:, 0]
        boxes, area = mask_boxes(maps, None, rule, alpha, component="all")
        if rule == "energy":  # the op keeps the pixel that reaches alpha, the authors do not
            level = maps.flatten(1).sort(descending=True).values.gather(1, area[:, None].long() - 2)
            boxes, _ = mask_boxes(maps, level[:, 0], component="all")
        assert ours.tolist() == (boxes + torch.tensor([1, 1, 0, 0])).tolist()


def test_weak_energy_keeps_all_that_equal_the_last():
    heat = np.zeros((1, 6, 6))
    heat[0, 1:4, 2:5] = 1
    assert evaluation.threshold_boxes(
        heat, [(6, 6)], rule="energy", alphas=[0, 0.3, 1]
    ).tolist() == [[[1, 1, 6, 6], [3, 2, 5, 4], [3, 2, 5, 4]]]


def test_weak_localisation_equals_a_loop():
    n = 12
    rng = np.random.default_rng(1)
    maps, sizes = blobs(n, 10, 11, seed=6), rng.integers(8, 30, (n, 2))
    truth = [true_boxes(1, h, w, i)[0] + 1 for i, (h, w) in enumerate(sizes)]
    excluded = np.arange(n) % 5 == 2
    for rule, alpha in (("value", 0.4), ("energy", 0.7), ("mean", 1.0)):
        result = evaluation.weak_localisation(
            maps, truth, sizes, rule=rule, alpha=alpha, excluded=excluded
        )
        boxes = [weak_box(m, rule, alpha, H, W) for m, (H, W) in zip(maps, sizes, strict=True)]
        overlaps = [max(inclusive_iou(box, t) for t in true) for box, true in
                    zip(boxes, truth, strict=True)]  # fmt: skip
        assert result.boxes.tolist() == boxes
        assert result.overlap.tolist() == overlaps
        wrong = [o < 0.5 for o, out in zip(overlaps, excluded, strict=True) if not out]
        assert result.error == pytest.approx(np.mean(wrong), abs=1e-15)
        assert f"{n - 2} of {n} counted (2 on the list left out)" in str(result)


@pytest.mark.parametrize("rule", RULES)
def test_tune_takes_the_first_best_alpha_of_the_grid(rule):
    n = 15
    maps, sizes = blobs(n, 10, 11, seed=7), [(20, 22)] * n
    truth = true_boxes(n, 20, 22, seed=8)
    tuning = evaluation.tune(maps, truth, sizes, rule=rule)
    errors = [
        evaluation.weak_localisation(maps, truth, sizes, rule=rule, alpha=alpha).error
        for alpha in GRIDS[rule]
    ]
    assert tuning.errors.tolist() == errors
    assert tuning.alpha == GRIDS[rule][int(np.argmin(errors))]
    assert tuning.error == min(errors)
    assert tuning.images == n


def test_grids_are_the_published_ones():
    np.testing.assert_allclose(GRIDS["value"], np.arange(0, 1, 0.05), atol=1e-15)
    assert GRIDS["energy"] == GRIDS["value"]
    np.testing.assert_array_equal(GRIDS["mean"], np.arange(0, 10.5, 0.5))


def test_blacklist_by_number_or_id(tmp_path):
    ids = [f"val/ILSVRC2012_val_{k:08d}.JPEG" for k in (5, 36, 50, 70)]
    path = tmp_path / "list.txt"
    path.write_text("# bad\n36\n\nILSVRC2012_val_00000070\n50000\n")
    assert evaluation.read_blacklist(path, ids).tolist() == [False, True, False, True]
    path.write_text("1\n3\nb.jpg\n")
    # By order of the ids: a, c, d, x/b.png.
    on_it = evaluation.read_blacklist(path, ["c", "x/b.png", "a", "d"])
    assert on_it.tolist() == [False, True, True, True]
    path.write_text("5\n")
    with refuses(
        ValueError,
        f"{path}: expected numbers from 1 to 2, the images in order of their ids, got 5",
    ):
        evaluation.read_blacklist(path, ["a", "b"])
    path.write_text("0\n")
    with refuses(ValueError, f"{path}: expected numbers that count from 1, got 0"):
        evaluation.read_blacklist(path, ids)


# ---------------------------------------------------------------- MaxBoxAcc
def boxes_of_scoremap(scoremap: np.ndarray, t: float, every: bool) -> list[list[int]]:
    height, width = scoremap.shape
    image = (scoremap * 255).astype(np.uint8)
    _, binary = cv2.threshold(image, int(t * np.max(image)), 255, cv2.THRESH_BINARY)
    contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if len(contours) == 0:
        return [[0, 0, 0, 0]]
    if not every:
        contours = [max(contours, key=cv2.contourArea)]
    rects = map(cv2.boundingRect, contours)
    return [[x, y, min(x + w, width - 1), min(y + h, height - 1)] for x, y, w, h in rects]


def box_acc_loop(maps: np.ndarray, truth: Any, thresholds: Any, every: bool, delta: float) -> Any:
    correct = np.zeros(len(thresholds))
    for scoremap, boxes in zip(maps, truth, strict=True):
        for k, t in enumerate(thresholds):
            found = boxes_of_scoremap(scoremap, t, every)
            correct[k] += max(inclusive_iou(a, b) for a in found for b in boxes.tolist()) >= delta
    return correct / len(maps)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_max_box_acc_equals_the_loop(version, ties):
    n = 10
    maps, truth = blobs(n, 20, 23, seed=9, ties=ties), true_boxes(n, 20, 23, seed=10)
    maps[0] = 0  # no contour at all
    maps[1] *= 0.4  # a maximum below 1
    thresholds = np.arange(0, 1, 0.01)
    result = evaluation.max_box_acc(maps, truth, version=version, thresholds=thresholds)
    deltas = (0.5,) if version == 1 else (0.3, 0.5, 0.7)
    curves = [box_acc_loop(maps, truth, thresholds, version == 2, delta) for delta in deltas]
    np.testing.assert_array_equal(result.curve, curves)
    assert result.score == np.average([curve.max() for curve in curves])
    assert result.best == tuple(thresholds[curve.argmax()] for curve in curves)
    middle = deltas.index(0.5)
    assert result.found.mean() == pytest.approx(curves[middle].max(), abs=1e-15)


def test_max_box_acc_has_the_thresholds_of_the_public_code():
    maps, truth = blobs(3, 9, 9), true_boxes(3, 9, 9)
    result = evaluation.max_box_acc(maps, truth)
    np.testing.assert_array_equal(result.thresholds, np.arange(0, 1, 0.001))
    assert result.curve.shape == (3, 1000)


def test_max_box_acc_squashes_boxes_by_truncation():
    """Fractions that rounding would move: 224 of 224.0 pixels, 37 * 24 / 111 = 8."""
    maps = np.zeros((1, 24, 24))
    maps[0, 4:9, 8:12] = 1
    original = [np.array([[37, 26, 55, 60]])]  # 111 wide, 150 high
    width, height = 111, 150
    small = [[int(float(v) * 24 / side) for v, side in
              zip(original[0][0], (width, height) * 2, strict=True)]]  # fmt: skip
    assert small == [[8, 4, 11, 9]]
    there = evaluation.max_box_acc(maps, original, [(height, width)], version=1)
    here = evaluation.max_box_acc(maps, [np.array(small)], version=1)
    assert there.overlap.tolist() == here.overlap.tolist() == [24 / 30]


def test_max_box_acc_stretches_on_demand():
    maps, truth = blobs(4, 12, 12), true_boxes(4, 12, 12)
    plain = evaluation.max_box_acc(maps, truth)
    stretched = evaluation.max_box_acc(maps * 8 - 3, truth, normalise=True)
    eight = evaluation.max_box_acc((maps * 255).astype(np.uint8), truth)
    np.testing.assert_array_equal(eight.curve, plain.curve)
    np.testing.assert_allclose(stretched.curve, plain.curve, atol=0.26)  # one level may tip
    message = (
        "max_box_acc: expected `maps` in [0, 1], got values from -3 to 5; "
        "pass normalise=True to stretch each map"
    )
    with refuses(ValueError, message):
        evaluation.max_box_acc(maps * 8 - 3, truth)


# ---------------------------------------------------------------- PxAP
def pixel_ap_loop(maps: np.ndarray, masks: np.ndarray, thresholds: np.ndarray) -> float:
    edges = np.append(thresholds, [1.0, 2.0, 3.0])
    true, false = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for scoremap, mask in zip(maps, masks, strict=True):
        true += np.histogram(scoremap[mask == 1], bins=edges)[0]
        false += np.histogram(scoremap[mask == 0], bins=edges)[0]
    tp, fp = true[::-1].cumsum(), false[::-1].cumsum()
    with np.errstate(invalid="ignore"):
        precision = tp / (tp + fp)
    recall = tp / true.sum()
    return float((precision[1:] * np.diff(recall))[(tp + fp)[1:] != 0].sum())


@pytest.mark.parametrize("step", [0.001, 0.01, 0.003, 0.25])
def test_pixel_ap_equals_the_loop(step):
    rng = np.random.default_rng(2)
    maps = blobs(5, 16, 18, seed=11)
    edges = np.arange(0, 1, step)
    maps[1] = rng.choice(np.append(edges, 1.0), (16, 18))  # exactly on edges
    maps[2] = np.nextafter(rng.choice(edges, (16, 18)), rng.choice([-1, 2], (16, 18))).clip(0)
    masks = rng.choice([0, 0, 1, 255], (5, 16, 18)).astype(np.uint8)
    result = evaluation.pixel_ap(maps, masks, thresholds=edges)
    assert result.score == pixel_ap_loop(maps, masks, edges)
    irregular = np.sort(rng.random(7))
    maps = maps.clip(irregular[0])
    expected = pixel_ap_loop(maps, masks, irregular)
    assert evaluation.pixel_ap(maps, masks, thresholds=irregular).score == expected


def test_pixel_ap_is_average_precision():
    """With a bin for every score it is the area under the step curve, sorted by hand."""
    rng = np.random.default_rng(3)
    scores = rng.permutation(600)[:400].reshape(1, 20, 20) / 1000 + 0.0005
    mask = (rng.random((1, 20, 20)) < 0.3).astype(np.uint8)
    order = np.argsort(-scores.ravel())
    hits = mask.ravel()[order].cumsum()
    precision = hits / np.arange(1, 401)
    expected = precision[mask.ravel()[order] == 1].mean()
    # Sums in another order: 2e-16 was seen.
    assert evaluation.pixel_ap(scores, mask).score == pytest.approx(expected, abs=1e-12)


def test_object_mask_joins_objects_and_ignores_around_them():
    instances = np.zeros((2, 4, 8))
    instances[0, :2, :2] = instances[1, 2:, 4:6] = 1
    ignore = np.zeros((4, 8))
    ignore[:, :4] = 1
    mask = evaluation.object_mask(instances, ignore, size=4)
    assert mask.tolist() == [[1, 255, 0, 0], [1, 255, 0, 0], [255, 255, 1, 0], [255, 255, 1, 0]]
    by_opencv = [cv2.resize(np.float32(one), (4, 4), interpolation=cv2.INTER_NEAREST) > 0.5
                 for one in instances]  # fmt: skip
    np.testing.assert_array_equal(mask == 1, np.any(by_opencv, 0))
    assert evaluation.object_mask(instances).shape == (4, 8)


# ---------------------------------------------------------------- classes
def test_top_loc_equals_a_loop():
    rng = np.random.default_rng(4)
    n, K = 40, 5
    found, labels = rng.random(n) < 0.6, rng.integers(0, 8, n)
    guesses = np.stack([rng.permutation(8)[:K] for _ in range(n)])
    each = rng.random((n, K)) < 0.5
    for k in (1, 3, 5):
        one = [f and y in g[:k] for f, y, g in zip(found, labels, guesses.tolist(), strict=True)]
        assert evaluation.top_loc(found, guesses, labels, k) == np.mean(one)
        own = [any(f[i] and g[i] == y for i in range(k))
               for f, y, g in zip(each, labels, guesses, strict=True)]  # fmt: skip
        assert evaluation.top_loc(each, guesses, labels, k) == np.mean(own)
    result = evaluation.class_localisation(found, guesses, labels, box="IoU >= 0.5")
    assert result.gt_known == evaluation.gt_known(found) == found.mean()
    assert result.figures == (result.gt_known, result.top1, result.top5)
    assert result.top1 <= result.top5 <= result.gt_known
    assert "IoU >= 0.5" in str(result)


# ---------------------------------------------------------------- properties of every protocol
def score_of_boxes(protocol: str, predicted: np.ndarray, truth: list[np.ndarray], S: int) -> float:
    """A protocol's score of maps that are 1 in a box (half-open) and 0 elsewhere; 1 is best."""
    maps = np.zeros((len(predicted), S, S))
    for m, (x0, y0, x1, y1) in zip(maps, predicted, strict=True):
        m[y0:y1, x0:x1] = 1
    half_open = [t + np.array([0, 0, 1, 1]) for t in truth]
    if protocol == "casm":
        return 1 - evaluation.localise(maps, half_open, size=S).localisation.le
    if protocol in RULES:
        counted = [t + 1 for t in truth]
        result = evaluation.weak_localisation(
            maps, counted, [(S, S)] * len(maps), rule=protocol, alpha=0.5
        )
        return 1 - result.error
    if protocol == "pixel_ap":
        masks = np.zeros((len(maps), S, S), np.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, np.concatenate(half_open), strict=True):
            mask[y0:y1, x0:x1] = 1
        return evaluation.pixel_ap(maps, masks).score
    version = 1 if protocol == "V1" else 2
    return evaluation.max_box_acc(maps, truth, version=version).score


PROTOCOLS = ["casm", *RULES, "V1", "V2", "pixel_ap"]
S = 24
big_boxes = st.tuples(*[st.integers(0, S - 12)] * 2, *[st.integers(8, 11)] * 2).map(
    lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3])
)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@settings(max_examples=15, deadline=None)
@given(predicted=st.lists(big_boxes, min_size=1, max_size=4))
def test_a_perfect_box_scores_one(protocol, predicted):
    truth = [np.array([[x0, y0, x1 - 1, y1 - 1]]) for x0, y0, x1, y1 in predicted]
    # MaxBoxAcc's boxes reach a pixel beyond the contour: 9 x 9 for 8 x 8, an IoU of 0.79 at least.
    assert score_of_boxes(protocol, np.array(predicted), truth, S) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@settings(max_examples=15, deadline=None)
@given(predicted=st.lists(st.tuples(*[st.integers(0, 6)] * 2), min_size=1, max_size=4))
def test_a_disjoint_box_scores_zero(protocol, predicted):
    boxes = np.array([(x, y, x + 4, y + 4) for x, y in predicted])
    truth = [np.array([[14, 13, 22, 21]])] * len(boxes)
    score = score_of_boxes(protocol, boxes, truth, S)
    if protocol == "pixel_ap":  # the bin of score 0 holds all pixels: precision is their share
        assert score == pytest.approx(81 / S**2)
    else:
        assert score == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_do_not_depend_on_batch_size_or_order(protocol, monkeypatch):
    n, h, w = 9, 14, 15
    maps, truth = blobs(n, h, w, seed=12), true_boxes(n, h, w, seed=13)
    masks = np.random.default_rng(5).integers(0, 2, (n, h, w))
    sizes = np.random.default_rng(6).integers(10, 30, (n, 2))

    def run(order: np.ndarray) -> tuple[float, np.ndarray]:
        m, t = maps[order], [truth[i] for i in order]
        if protocol == "casm":
            result = evaluation.localise(m, t, size=15)
            return result.localisation.f1, result.found
        if protocol in RULES:
            weak = evaluation.weak_localisation(m, t, sizes[order], rule=protocol, alpha=0.6)
            return weak.error, weak.overlap
        if protocol == "pixel_ap":
            return evaluation.pixel_ap(m, masks[order]).score, order * 0
        acc = evaluation.max_box_acc(m, t, version=1 if protocol == "V1" else 2)
        return acc.score, acc.overlap

    straight = np.arange(n)
    score, each = run(straight)
    monkeypatch.setattr("casm_fast.evaluation.maps._PIXELS", 2 * h * w)
    shuffled = np.random.default_rng(7).permutation(n)
    for order in (straight, shuffled):
        again, parts = run(order)
        assert again == score
        np.testing.assert_array_equal(parts, each[order] if each.any() else each)


@pytest.mark.parametrize("kind", ["array", "tensor", "channel", "float32"])
def test_maps_may_come_in_any_form(kind):
    maps, truth = np.float32(blobs(3, 12, 12)).astype(np.float64), true_boxes(3, 12, 12)
    form = {
        "array": maps,
        "tensor": torch.from_numpy(maps),
        "channel": torch.from_numpy(maps)[:, None],
        "float32": maps.astype(np.float32),
    }[kind]
    expected = evaluation.max_box_acc(maps, truth)
    np.testing.assert_array_equal(evaluation.max_box_acc(form, truth).curve, expected.curve)


# ---------------------------------------------------------------- saved maps
def test_saved_maps_are_read_in_every_form(tmp_path):
    maps = blobs(3, 6, 7).astype(np.float32)
    ids = ["val/a.JPEG", "val/b.JPEG", "c"]
    np.save(tmp_path / "all.npy", maps)
    torch.save(torch.from_numpy(maps)[:, None], tmp_path / "all.pt")
    torch.save(dict(zip(ids, torch.from_numpy(maps), strict=True)), tmp_path / "named.pt")
    folder = tmp_path / "folder"
    (folder / "val").mkdir(parents=True)
    np.save(folder / "val/a.JPEG.npy", maps[0])
    np.save(folder / "val/b.npy", maps[1][None])
    torch.save(torch.from_numpy(maps[2]), folder / "c.pt")
    lazy = evaluation.read_maps(tmp_path / "all.npy")
    assert isinstance(lazy, np.memmap)
    np.testing.assert_array_equal(lazy, maps)
    np.testing.assert_array_equal(evaluation.read_maps(tmp_path / "all.pt")[:, 0], maps)
    for path in (tmp_path / "named.pt", folder):
        np.testing.assert_array_equal(evaluation.read_maps(path, ids), maps)
        np.testing.assert_array_equal(evaluation.read_maps(path, ids[::-1]), maps[::-1])
    truth = true_boxes(3, 6, 7)
    assert evaluation.max_box_acc(lazy, truth).score == evaluation.max_box_acc(maps, truth).score


def test_saved_maps_that_cannot_be_read(tmp_path):
    path = tmp_path / "maps.npy"
    with refuses(
        FileNotFoundError, f"expected saved maps (.npy, .pt or a folder), got {path}: no such file"
    ):
        evaluation.read_maps(path)
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    np.save(tmp_path / "b.npy", np.zeros((3, 5)))
    with refuses(
        ValueError,
        f"{tmp_path}: expected `image_ids` for maps that are saved by image, got None",
    ):
        evaluation.read_maps(tmp_path)
    with refuses(
        FileNotFoundError, f"{tmp_path}: expected a map for every image, got no c.npy or .pt"
    ):
        evaluation.read_maps(tmp_path, ["a", "c"])
    with refuses(
        ValueError,
        f"{tmp_path}: expected maps of one size [h, w], got [3, 5] for b and [3, 4] for a",
    ):
        evaluation.read_maps(tmp_path, ["a", "b"])
    torch.save({"a": torch.zeros(2, 2)}, tmp_path / "named.pt")
    with refuses(
        ValueError,
        f"{tmp_path / 'named.pt'}: expected a map for each of 2 images, got none for b (1 missing)",
    ):
        evaluation.read_maps(tmp_path / "named.pt", ["a", "b"])
    torch.save([1], tmp_path / "list.pt")
    with refuses(
        ValueError,
        f"{tmp_path / 'list.pt'}: expected a tensor or a dictionary from image ids to maps, "
        "got list",
    ):
        evaluation.read_maps(tmp_path / "list.pt")
    (tmp_path / "maps.txt").write_text("")
    with refuses(
        ValueError, f"{tmp_path / 'maps.txt'}: expected a .npy or .pt file, or a folder of them"
    ):
        evaluation.read_maps(tmp_path / "maps.txt")


# ---------------------------------------------------------------- published figures
def test_published_figures_stand_beside_the_same_convention_only():
    choe = published.choe("imagenet-val", 50_000, (224, 224), "MaxBoxAcc V2", True)
    assert ("CAM, ResNet-50 (Choe et al. 2020)", 0.637) in choe
    assert published.choe("imagenet-val", 49_999, (224, 224), "MaxBoxAcc V2", True) == ()
    assert published.choe("imagenet-val", 50_000, (112, 112), "MaxBoxAcc V2", True) == ()
    assert published.choe("imagenet-val", 50_000, (224, 224), "MaxBoxAcc V2", False) == ()
    assert published.choe("imagenet-val", 50_000, (224, 224), "MaxBoxAcc V1", True) == ()
    assert published.choe("folder:x", 50_000, (224, 224), "MaxBoxAcc V2", True) == ()
    pixels = published.choe("openimages-test", 5_000, (224, 224), "PxAP", True)
    assert ("centre (Choe et al. 2020)", 0.458) in pixels
    weak = published.weak_localisation("imagenet-val", 48_238, "mean")
    assert ("mask, default settings, alpha 1 (Fong & Vedaldi 2017, GoogLeNet)", 0.460) in weak
    assert published.weak_localisation("imagenet-val", 50_000, "mean") == ()


def test_results_print_and_save_the_same(monkeypatch):
    rows = (("someone (2020)", 0.5),)
    monkeypatch.setattr(published, "choe", lambda *_: rows)
    result = evaluation.max_box_acc(blobs(2, 8, 9), true_boxes(2, 8, 9), source="two")
    saved = json.loads(json.dumps(result.to_dict()))
    assert saved["published"] == dict(rows)
    assert saved["figures"]["MaxBoxAcc V2"] == result.score
    text = str(result)
    assert text.startswith("MaxBoxAcc V2 on two\n")
    for name, sentence in saved["convention"].items():
        assert re.search(rf"^  {name} +{re.escape(sentence)}$", text, re.MULTILINE)
    assert re.search(r"^  someone \(2020\) +50\.0 % +- +- +-$", text, re.MULTILINE)


# ---------------------------------------------------------------- errors
MAPS, TRUTH = blobs(2, 5, 6), true_boxes(2, 5, 6)


@pytest.mark.parametrize("name", ["localise", "max_box_acc", "threshold_boxes", "pixel_ap"])
def test_refuses_other_maps(name):
    call = {
        "localise": lambda m: evaluation.localise(m, TRUTH),
        "max_box_acc": lambda m: evaluation.max_box_acc(m, TRUTH),
        "threshold_boxes": lambda m: evaluation.threshold_boxes(
            m, [(5, 6)] * 2, rule="mean", alphas=[1]
        ),
        "pixel_ap": lambda m: evaluation.pixel_ap(m, np.zeros((2, 5, 6))),
    }[name]
    with refuses(TypeError, f"{name}: expected `maps` to be a tensor or an array, got list"):
        call([1])
    with refuses(TypeError, f"{name}: expected `maps` in a floating dtype or uint8, got int64"):
        call(MAPS.astype(np.int64))
    with refuses(
        ValueError,
        f"{name}: expected `maps` of shape [n, 1, h, w] or [n, h, w], got [2, 3, 5, 6]",
    ):
        call(np.zeros((2, 3, 5, 6)))


def test_refuses_other_truth():
    with refuses(ValueError, "max_box_acc: expected `truth` for 2 images, got 1 lists of boxes"):
        evaluation.max_box_acc(MAPS, TRUTH[:1])
    with refuses(
        ValueError,
        "localise: expected at least one true box for every image, got none for image 1; "
        "leave such images out",
    ):
        evaluation.localise(MAPS, [TRUTH[0], []])
    with refuses(
        ValueError,
        "weak_localisation: expected `truth` as arrays [m, 4], got [4] for image 0",
    ):
        evaluation.weak_localisation(MAPS, [[1, 2, 3, 4], TRUTH[1]], [(5, 6)] * 2)
    with refuses(ValueError, "max_box_acc: expected at least one image, got none"):
        evaluation.max_box_acc(MAPS[:0], [])
    with refuses(
        ValueError, "localise: expected `sizes` as positive (H, W) of shape [2, 2], got [1, 2]"
    ):
        evaluation.localise(MAPS, TRUTH, [(5, 6)])
    with refuses(
        ValueError,
        "max_box_acc: expected true boxes with x0 <= x1 and y0 <= y1, got (3, 1, 2, 2) for image 1",
    ):
        evaluation.max_box_acc(MAPS, [TRUTH[0], [(3, 1, 2, 2)]])


def test_refuses_other_options():
    sizes = [(5, 6)] * 2
    with refuses(ValueError, "max_box_acc: expected `version` to be 1 or 2, got 3"):
        evaluation.max_box_acc(MAPS, TRUTH, version=3)
    with refuses(ValueError, "max_box_acc: expected `thresholds` in [0, 1), at least one"):
        evaluation.max_box_acc(MAPS, TRUTH, thresholds=[1.0])
    with refuses(ValueError, "pixel_ap: expected `thresholds` in [0, 1), rising, at least one"):
        evaluation.pixel_ap(MAPS, np.ones((2, 5, 6)), thresholds=[0.5, 0.2])
    with refuses(
        ValueError, 'tune: expected `rule` to be "value", "energy" or "mean", got \'area\''
    ):
        evaluation.tune(MAPS, TRUTH, sizes, rule="area")
    with refuses(ValueError, "threshold_boxes: expected `alphas` to be finite and at least 0"):
        evaluation.weak_localisation(MAPS, TRUTH, sizes, alpha=-1)
    with refuses(
        ValueError,
        "threshold_boxes: expected `sizes` as positive (H, W) of shape [2, 2], got [2]",
    ):
        evaluation.weak_localisation(MAPS, TRUTH, [5, 6])
    with refuses(ValueError, "threshold_boxes: expected `maps` without NaN"):
        evaluation.weak_localisation(MAPS * np.nan, TRUTH, sizes)
    with refuses(ValueError, "localise: expected `maps` without NaN"):
        evaluation.localise(MAPS * np.nan, TRUTH)
    with refuses(ValueError, "weak_localisation: expected `excluded` of shape [2], got [3]"):
        evaluation.weak_localisation(MAPS, TRUTH, sizes, excluded=[True] * 3)
    with refuses(
        ValueError,
        "tune: expected some images to be counted, got all of them excluded",
    ):
        evaluation.tune(MAPS, TRUTH, sizes, excluded=[True] * 2)
    with refuses(ValueError, "localise: expected `right` of shape [2], got [3]"):
        evaluation.localise(MAPS, TRUTH, right=[True] * 3)
    with refuses(ValueError, "localise_boxes: expected `boxes` of shape [n, 4], got [4]"):
        evaluation.localise_boxes(
            [1, 2, 3, 4], TRUTH, convention=Convention(5, "crop", "mean", 1, "largest", 4)
        )


def test_refuses_other_masks_and_guesses():
    masks = np.zeros((2, 5, 6), np.uint8)
    with refuses(ValueError, "pixel_ap: expected some object pixels in `masks`, got none"):
        evaluation.pixel_ap(MAPS, masks)
    with refuses(ValueError, "pixel_ap: expected `masks` for 2 maps, got 1"):
        evaluation.pixel_ap(MAPS, masks[:1])
    with refuses(
        ValueError, "pixel_ap: expected a mask of [5, 6] for every map, got [5, 5] for image 1"
    ):
        evaluation.pixel_ap(MAPS, [masks[0], masks[1, :, :5]])
    masks[1] = 7
    with refuses(
        ValueError,
        "pixel_ap: expected masks with 1 for object, 0 for background and 255 for ignored pixels, "
        "got 7 in image 1",
    ):
        evaluation.pixel_ap(MAPS, masks)
    with refuses(ValueError, "object_mask: expected `instances` of shape [k, H, W], got [4, 4]"):
        evaluation.object_mask(np.zeros((4, 4)))
    with refuses(ValueError, "object_mask: expected `ignore` of shape [H, W], got [4]"):
        evaluation.object_mask(np.zeros((1, 4, 4)), np.zeros(4))
    with refuses(
        ValueError,
        "top_loc: expected `found` [n] or [n, K], `guesses` [n, K] and `labels` [n] with n >= 1, "
        "got [2], [3, 5] and [2]",
    ):
        evaluation.top_loc([True, False], np.zeros((3, 5)), [0, 1])
    with refuses(ValueError, "top_loc: expected `k` from 1 to 2, got 5"):
        evaluation.top_loc([True], [[0, 1]], [0], 5)
    with refuses(ValueError, "gt_known: expected `found` of shape [n] with n >= 1, got [0]"):
        evaluation.gt_known([])
