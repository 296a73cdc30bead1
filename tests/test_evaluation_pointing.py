"""The pointing game against a scalar loop over the pixels of the object, as TorchRay plays it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses

from casm_fast.data import CocoSource, generate, geometry, write_coco
from casm_fast.evaluation import (
    PointingConfig,
    first_per_class,
    join,
    maxima,
    pointing,
    pointing_game,
    shares_picture,
)
from casm_fast.evaluation.pointing import Points

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning:pycocotools")


def loop_hit(mask: np.ndarray, x: float, y: float, tolerance: float) -> bool:
    """Whether some pixel of the mask is strictly closer."""
    for v, u in zip(*np.nonzero(mask), strict=True):
        if (u - x) ** 2 + (v - y) ** 2 < tolerance**2:
            return True
    return False


def loop_score(values: np.ndarray, mask: np.ndarray, tolerance: float) -> float:
    """The share of tied maxima that hit; the map is resized by repeating cells."""
    peaks = np.argwhere(values == values.max())
    h, w = values.shape
    H, W = mask.shape
    hits = [
        loop_hit(mask, (c + 0.5) * W / w - 0.5, (r + 0.5) * H / h - 0.5, tolerance)
        for r, c in peaks
    ]
    return sum(hits) / len(hits)


def filled(boxes: Any, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, bool)
    for x0, y0, x1, y1 in boxes:
        mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = True
    return mask


def example(seed: int, n: int = 12, size: tuple[int, int] = (24, 31)) -> Any:
    """Maps of few levels, so that maxima tie, with boxes and masks."""
    rng = np.random.default_rng(seed)
    maps = rng.integers(0, 40, (n, *size)).astype(np.float32)
    boxes, masks = [], []
    for _ in range(n):
        corner = rng.integers(-3, 22, (rng.integers(1, 4), 2))
        boxes.append(np.concatenate([corner, corner + rng.integers(1, 9, corner.shape)], axis=1))
        masks.append(rng.random(size) < 0.004)
    return maps, boxes, masks, rng.integers(0, 3, n)


@pytest.mark.parametrize("tolerance", [1.0, 3.0, 4.5])
def test_agrees_with_a_loop_over_pixels(tolerance):
    maps, boxes, masks, labels = example(1)
    config = PointingConfig(tolerance=tolerance)
    ours = pointing_game(maps, labels, boxes=boxes, config=config)
    expected = [
        loop_score(m, filled(b, m.shape), tolerance) for m, b in zip(maps, boxes, strict=True)
    ]
    assert ours.hits.tolist() == pytest.approx(expected, abs=1e-15)
    assert 0 < ours.hits.mean() < 1
    ours = pointing_game(torch.from_numpy(maps)[:, None], labels, masks=masks, config=config)
    expected = [loop_score(m, mask, tolerance) for m, mask in zip(maps, masks, strict=True)]
    assert ours.hits.tolist() == pytest.approx(expected, abs=1e-15)
    assert any(0 < share < 1 for share in expected)


def test_chunks_change_nothing(monkeypatch):
    maps, boxes, masks, labels = example(2)
    whole = [pointing_game(maps, labels, **t) for t in ({"boxes": boxes}, {"masks": masks})]
    monkeypatch.setattr(pointing, "_CHUNK", 3000)
    parts = [pointing_game(maps, labels, **t) for t in ({"boxes": boxes}, {"masks": masks})]
    for one, other in zip(whole, parts, strict=True):
        assert one.hits.tolist() == other.hits.tolist()


def test_fifteen_pixels_are_a_miss_and_less_is_a_hit():
    maps = np.zeros((4, 64, 64))
    for k, (x, y) in enumerate([(5, 20), (6, 20), (8, 11), (9, 12)]):
        maps[k, y, x] = 1  # (9, 12) and (8, 11) away from (20, 20): 15 and more, and 13.6
    maps[2, 11, 8] = 0
    maps[2, 11, 8] = 1
    truth = [np.array([[20, 20, 30, 30]])] * 4
    hits = pointing_game(maps, [0] * 4, boxes=truth).hits
    away = [math.dist((x, y), (20, 20)) for x, y in [(5, 20), (6, 20), (8, 11), (9, 12)]]
    assert away[0] == away[2] == 15
    assert hits.tolist() == [float(d < 15) for d in away] == [0, 1, 0, 1]


def test_last_pixel_of_a_box_is_the_one_before_its_corner():
    maps = np.zeros((2, 8, 40))
    maps[0, 4, 24], maps[1, 4, 23] = 1, 1
    boxes = [np.array([[2, 2, 10, 6]])] * 2  # its last column is 9
    assert pointing_game(maps, [0, 0], boxes=boxes).hits.tolist() == [0, 1]


def test_ties():
    maps = np.zeros((1, 9, 60))
    maps[0, 4, [2, 3, 58]] = 1
    boxes = [np.array([[0, 0, 4, 9]])]
    hits = {
        ties: float(pointing_game(maps, [0], boxes=boxes, config=PointingConfig(ties=ties)).hits[0])
        for ties in ("share", "centre", "first")
    }
    assert hits == {"share": pytest.approx(2 / 3), "centre": 0, "first": 1}
    assert maxima(maps, ties="centre").places.tolist() == [[21, 4]]
    assert maxima(maps, ties="first").places.tolist() == [[2, 4]]


@pytest.mark.parametrize("policy", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(40, 90), (70, 50), (33, 33)])
def test_frames_agree_with_a_loop(policy, shape):
    """The map's cell in the original picture, and the truth in the network's square."""
    rng = np.random.default_rng(7)
    g = geometry(*shape, size=32, policy=policy)
    n = 10
    maps = rng.random((n, 8, 8))
    masks = [rng.random(shape) < 0.004 for _ in range(n)]
    corner = rng.integers(0, 30, (n, 1, 2))
    boxes = list(np.concatenate([corner, corner + rng.integers(2, 9, corner.shape)], axis=2))
    told = {"geometries": [g] * n, "labels": [0] * n}
    for tolerance in (3.0, 6.0):
        config = PointingConfig(tolerance=tolerance)
        by_mask = pointing_game(maps, masks=masks, config=config, **told).hits
        by_box = pointing_game(maps, boxes=boxes, config=config, **told).hits
        config = PointingConfig(tolerance=tolerance, frame="network")
        net_mask = pointing_game(maps, masks=masks, config=config, **told).hits
        net_box = pointing_game(maps, boxes=boxes, config=config, **told).hits
        for k in range(n):
            r, c = np.unravel_index(maps[k].argmax(), (8, 8))
            x, y = (c + 0.5) * 4, (r + 0.5) * 4  # from the corner of the square
            ox = (x + g.offset_x) / g.scale_x - 0.5
            oy = (y + g.offset_y) / g.scale_y - 0.5
            assert by_mask[k] == loop_hit(masks[k], ox, oy, tolerance)
            assert by_box[k] == loop_hit(filled(boxes[k], shape), ox, oy, tolerance)
            square = np.zeros((32, 32), bool)
            for i in range(32):
                for j in range(32):
                    v = int((i + 0.5 + g.offset_y) / g.scale_y)
                    u = int((j + 0.5 + g.offset_x) / g.scale_x)
                    square[i, j] = masks[k][min(v, shape[0] - 1), min(u, shape[1] - 1)]
            assert net_mask[k] == loop_hit(square, x - 0.5, y - 0.5, tolerance)
            inside = filled(g.to_network(boxes[k]), (32, 32))
            assert net_box[k] == loop_hit(inside, x - 0.5, y - 0.5, tolerance)


def test_what_the_crop_cut_off_cannot_be_hit():
    g = geometry(40, 120, size=40)
    maps = np.zeros((1, 40, 40))
    maps[0, 20, 0] = 1
    told = {"boxes": [np.array([[20, 10, 38, 30]])], "geometries": [g]}
    assert pointing_game(maps, [0], **told).hits.tolist() == [1]
    network = PointingConfig(frame="network")
    assert pointing_game(maps, [0], config=network, **told).hits.tolist() == [0]


def test_centre_baseline_by_hand():
    """Four pictures of 100 x 60; the centre lies at (49.5, 29.5), a box is hit within 15 pixels."""
    centre = np.zeros((4, 60, 100))
    centre[:, 29:31, 49:51] = 1
    boxes = [
        np.array([[40, 20, 60, 40]]),  # holds the centre
        np.array([[0, 0, 35, 60]]),  # 15 and 16 away from (49, y) and (50, y)
        np.array([[0, 0, 36, 60]]),  # 14 and 15
        np.array([[0, 0, 5, 5], [62, 28, 70, 32]]),  # 13 and 12 from the second
    ]
    labels = [0, 0, 1, 1]
    found = pointing_game(centre, labels, boxes=boxes, distractors=[True, True, True, False])
    assert found.hits.tolist() == [1, 0, 0.5, 1]
    assert found.per_class() == {0: 0.5, 1: 0.75}
    assert found.accuracy() == found.overall() == 0.625
    # Areas 400, 2,100, 2,160 and 57 of 6,000: a quarter is 1,500.
    assert found.difficult.tolist() == [True, False, False, False]
    assert found.per_class("difficult") == {0: 1.0}
    points = Points(np.arange(4), np.full((4, 2), (49.5, 29.5)), 4, (60, 100))
    assert pointing_game(points, labels, boxes=boxes).hits.tolist() == [1, 0, 1, 1]


def test_difficult_area_is_a_sum_of_boxes_but_the_pixels_of_a_mask():
    maps = np.zeros((1, 10, 10))
    twice = np.array([[0, 0, 5, 4], [0, 0, 5, 4]])
    told = {"labels": [0], "distractors": [True]}
    assert not pointing_game(maps, boxes=[twice], **told).difficult[0]  # 40 of 100
    assert pointing_game(maps, masks=[filled(twice, (10, 10))], **told).difficult[0]
    exact = np.array([[0, 0, 5, 5]])
    assert not pointing_game(maps, boxes=[exact], **told).difficult[0]  # 25 is not less


@given(st.integers(0, 50), st.permutations(range(6)), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_neither_batches_nor_order_matter(seed, order, batch):
    maps, boxes, _, labels = example(seed, 6)
    far = np.arange(6) % 2 == 0
    config = PointingConfig(tolerance=3)

    def play(places: Any) -> Any:
        return pointing_game(
            maps[places],
            labels[places],
            boxes=[boxes[k] for k in places],
            distractors=far[places],
            config=config,
        )

    whole = play(np.arange(6))
    parts = join(play(np.array(order[k : k + batch])) for k in range(0, 6, batch))
    assert parts.hits.tolist() == whole.hits[list(order)].tolist()
    assert parts.accuracy() == whole.accuracy()
    assert parts.overall("difficult") == whole.overall("difficult")


def test_inside_scores_one_and_far_away_nothing():
    size = (60, 60)
    boxes = [np.array([[5, 5, 9, 9]]), np.array([[50, 50, 58, 58]])]
    good = np.stack([filled(b, size) for b in boxes]).astype(float)
    assert pointing_game(good, [0, 1], boxes=boxes).accuracy() == 1
    assert pointing_game(good[::-1].copy(), [0, 1], boxes=boxes).accuracy() == 0


def test_coco_through_its_source(tmp_path: Path):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path, None, generate(6, size=32, classes=3), sides=(40, 60))
    source = CocoSource(tmp_path)
    apart = shares_picture([source.image_id(k) for k in range(len(source))])
    played: dict[str, list[Any]] = {"masks": [], "boxes": []}
    for k in range(len(source)):
        mask = source.mask(k)
        truth = {"masks": mask, "boxes": source.boxes(k)}
        for kind, one in truth.items():
            told = {kind: [one], "labels": [source.label(k)], "distractors": apart[k : k + 1]}
            game = pointing_game(mask[None].astype(float), classes=source.classes, **told)
            played[kind].append(game)
    assert join(played["masks"]).accuracy() == 1
    assert join(played["boxes"]).accuracy() == 1
    assert len(join(played["boxes"]).hits) == len(source)


def test_pictures_of_several_classes_and_first_images():
    assert shares_picture(["1/a", "2/a", "1/b", "c"]).tolist() == [True, False, True, False]
    assert first_per_class([3, 1, 3, 3, 1, 2], 2).tolist() == [0, 1, 2, 4, 5]
    assert first_per_class([], 2).tolist() == []


def test_prints_scores_intervals_and_convention():
    maps, boxes, _, labels = example(3)
    found = pointing_game(maps, labels, boxes=boxes, classes=["cat", "dog", "hen"])
    text = str(found)
    assert f"dog {100 * found.per_class()[1]:.1f}, hen" in text
    assert re.search(r"all +\d+\.\d \(\d+\.\d\.\.\d+\.\d\) over 3 classes", text)
    assert "difficult  no images" in text
    assert "less than 15 px (strictly) from the boxes of the class, in pixels of the map" in (
        " ".join(text.split())
    )
    nothing = pointing_game(maps[:0], [], boxes=[])
    assert math.isnan(nothing.accuracy())
    assert "all        no images" in str(nothing)


def test_bad_input_is_one_sentence():
    maps, boxes, masks, labels = example(4, 2)
    with refuses(ValueError, "pointing_game: expected either `boxes` or `masks`, got neither"):
        pointing_game(maps, labels)
    with refuses(ValueError, "pointing_game: expected either `boxes` or `masks`, got both"):
        pointing_game(maps, labels, boxes=boxes, masks=masks)
    with refuses(ValueError, "labels: expected one for each of 2 maps, got 1"):
        pointing_game(maps, labels[:1], boxes=boxes)
    with refuses(ValueError, "masks: expected [24, 31], got [3, 3]"):
        pointing_game(maps, labels, masks=[np.ones((3, 3), bool)] * 2)
    with refuses(
        ValueError,
        "pointing_game: expected `maps` of shape [n, 1, h, w] or [n, h, w], got [24, 31]",
    ):
        pointing_game(maps[0], labels, boxes=boxes)
    with refuses(TypeError, "pointing_game: expected `maps` to be a tensor or an array, got list"):
        pointing_game([1], labels, boxes=boxes)
    maps[1, 3, 3] = np.nan
    with refuses(ValueError, "pointing_game: expected finite `maps`, got NaN or infinity in map 1"):
        pointing_game(maps, labels, boxes=boxes)
    two = [geometry(9, 9, 8), geometry(9, 9, 16)]
    with refuses(ValueError, "geometries: expected squares of one side, got [8, 16]"):
        pointing_game(np.zeros((2, 4, 4)), labels, boxes=boxes, geometries=two)
    with refuses(ValueError, "tolerance: expected pixels above 0, got 0"):
        PointingConfig(tolerance=0)
    with refuses(ValueError, "frame: expected one of original, network, got 'map'"):
        PointingConfig(frame="map")
    with refuses(ValueError, "ties: expected one of share, centre, first, got 'mean'"):
        PointingConfig(ties="mean")
    with refuses(ValueError, "difficult_area: expected in (0, 1], got 25"):
        PointingConfig(difficult_area=25)
    with refuses(ValueError, "images: expected all or difficult, got 'easy'"):
        pointing_game(maps[:1], labels[:1], boxes=boxes[:1]).accuracy("easy")
