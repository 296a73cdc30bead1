"""contour_boxes and contour_overlap: reference, OpenCV's contours, registration, errors.

OpenCV is the oracle, as the public evaluators call it: contours of every level in the mode
RETR_TREE, the largest by contourArea, the bounding rectangle. Everything is compared exactly.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from refusals import refuses
from torch.library import opcheck

from casm_fast.ops import contour_boxes, contour_overlap

SHAPES = [(1, 1), (1, 17), (17, 1), (2, 2), (3, 3), (13, 9), (24, 31)]


# ---------------------------------------------------------------- maps
def rings(H: int, W: int) -> np.ndarray:
    """Rings in rings: components in holes of components."""
    y, x = np.indices((H, W))
    depth = np.minimum(np.minimum(y, H - 1 - y), np.minimum(x, W - 1 - x))
    return np.where(depth % 2 == 0, 200 - 10 * (depth % 7), 10 * (depth % 5))


def diagonals(H: int, W: int) -> np.ndarray:
    """Lines that touch at corners only: no area, components by 8 neighbours, holes by 4."""
    y, x = np.indices((H, W))
    return ((x - y) % 4 == 0) * 3 + ((x + y) % 5 == 0) * 2


def twins(H: int, W: int) -> np.ndarray:
    """Squares of equal size, which tie at every level."""
    y, x = np.indices((H, W))
    return ((y % 4 < 2) & (x % 4 < 2)) * 9 + ((y % 8 < 2) & (x % 8 < 2)) * 3


def spiral(H: int, W: int) -> np.ndarray:
    """A wall a pixel wide around a corridor that climbs: a hole that only its end drains."""
    y, x = np.indices((H, W))
    depth = np.minimum(np.minimum(y, H - 1 - y), np.minimum(x, W - 1 - x))
    wall = depth % 2 == 0
    gaps = (x == W // 2) & (y < H // 2) & wall & (depth > 0)
    return np.where(wall & ~gaps, 250, 5 * depth + (x + y) % 3)


def made(seed: int, H: int, W: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = scipy.ndimage.gaussian_filter(rng.standard_normal((3, H, W)), (0, 2, 2))
    smooth = 255 * (smooth - smooth.min()) / np.ptp(smooth).clip(1e-9)
    return [
        rng.integers(0, 256, (H, W)),
        rng.integers(0, 4, (H, W)),
        255 * (rng.random((H, W)) < 0.5),
        255 * (rng.random((H, W)) < 0.8),
        (rng.random((H, W)) < 0.15) * rng.integers(1, 20, (H, W)),
        np.kron(rng.integers(0, 5, (-(-H // 3), -(-W // 3))), np.ones((3, 3)))[:H, :W],
        smooth[0],
        smooth[1] // 40 * 40,
        np.clip(smooth[2] - 120, 0, 1) * 255,
        np.zeros((H, W)),
        np.full((H, W), 255),
    ]


def batch(H: int, W: int, seed: int = 0) -> torch.Tensor:  # uint8 [B, 1, H, W]
    drawn = [rings(H, W), diagonals(H, W), twins(H, W), spiral(H, W)]
    stack = np.stack([*drawn, *made(seed, H, W)]).astype(np.uint8)
    return torch.from_numpy(stack)[:, None]


def boxes_in(H: int, W: int, images: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two true boxes an image, shuffled, and none for the second image."""
    rng = np.random.default_rng(seed)
    x, y = (np.sort(rng.integers(0, side, (2 * images, 2)), 1) for side in (W, H))
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1).astype(np.int32)
    owners = np.repeat(np.arange(images), 2)
    order = rng.permutation(np.flatnonzero(owners != 1))
    return torch.from_numpy(boxes[order]), torch.from_numpy(owners[order])


# ---------------------------------------------------------------- the oracle
def contours(image: np.ndarray, level: int) -> Any:
    kept = (image > level).astype(np.uint8) * 255
    return cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]


def largest_by_opencv(image: np.ndarray) -> np.ndarray:
    boxes = np.zeros((256, 4), int)
    for level in range(int(image.max())):
        largest = max(contours(image, level), key=cv2.contourArea)
        x, y, w, h = cv2.boundingRect(largest)
        boxes[level] = x, y, x + w, y + h
    return boxes


def overlap(a: Any, b: Any) -> float:
    """IoU of two boxes by counting pixels, both ends included."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return shared / (sum(areas) - shared)


def overlap_by_opencv(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    H, W = image.shape
    best = np.zeros(256)
    for level in range(256):
        boxes = []
        for contour in contours(image, level):
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append((x, y, min(x + w, W - 1), min(y + h, H - 1)))
        pairs = [(box, true) for box in boxes or [(0, 0, 0, 0)] for true in truth.tolist()]
        best[level] = max((overlap(box, true) for box, true in pairs), default=0.0)
    return best


def check(maps: torch.Tensor, seed: int = 0) -> None:
    H, W = maps.shape[2:]
    truth, owners = boxes_in(H, W, len(maps), seed)
    boxes, best = contour_boxes(maps).numpy(), contour_overlap(maps, truth, owners).numpy()
    for b, image in enumerate(maps[:, 0].numpy()):
        np.testing.assert_array_equal(boxes[b], largest_by_opencv(image))
        mine = truth[owners == b].numpy()
        np.testing.assert_array_equal(best[b], overlap_by_opencv(image, mine))


# ---------------------------------------------------------------- reference
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (7, 8)])
def test_equals_reference(shape):
    maps = (batch(*shape) // 64) * 64
    truth, owners = boxes_in(*shape, len(maps))
    boxes = contour_boxes(maps)
    assert boxes.dtype == torch.int32
    assert torch.equal(boxes, contour_boxes.reference(maps))
    best = contour_overlap(maps, truth, owners)
    assert best.dtype == torch.float64
    assert torch.equal(best, contour_overlap.reference(maps, truth, owners))


def test_empty_batch():
    none = torch.zeros(0, 1, 4, 5, dtype=torch.uint8)
    assert contour_boxes(none).shape == (0, 256, 4)
    truth = torch.zeros(0, 4, dtype=torch.int32)
    assert contour_overlap(none, truth, torch.zeros(0, dtype=torch.int64)).shape == (0, 256)


# ---------------------------------------------------------------- OpenCV
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_opencv(shape):
    check(batch(*shape), seed=shape[0])


@pytest.mark.parametrize("seed", range(6))
def test_equals_opencv_on_small_maps(seed):
    """Where ties, holes and lines are most of a map."""
    H, W = np.random.default_rng(seed).integers(3, 9, 2)
    for more in range(4):
        check(batch(int(H), int(W), 10 * seed + more), seed)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)),
                  elements=st.sampled_from([0, 1, 2, 7, 255])))  # fmt: skip
def test_equals_opencv_on_any_map(image):
    check(torch.from_numpy(image)[None, None])


def test_a_line_has_no_area_and_a_hole_counts():
    image = np.zeros((9, 20), np.uint8)
    image[0] = 5  # 20 pixels, no area
    image[4:7, 3:6] = 5  # a ring of 8 pixels, area 4
    image[5, 4] = 0
    assert contour_boxes(torch.from_numpy(image)[None, None])[0, 0].tolist() == [3, 4, 6, 7]


def test_of_equals_the_one_that_begins_last():
    """Of two equal squares the one that begins last is taken; a spike changes where it begins."""
    image = np.zeros((12, 12), np.uint8)
    image[3:5, 1:3] = 200
    image[8:10, 6:8] = 200
    image[1:8, 8] = 100
    boxes = contour_boxes(torch.from_numpy(image)[None, None])[0]
    assert boxes[150].tolist() == [6, 8, 8, 10]
    assert boxes[50].tolist() == [1, 3, 3, 5]
    np.testing.assert_array_equal(boxes.numpy(), largest_by_opencv(image))


# ---------------------------------------------------------------- registration and layouts
def test_opcheck():
    maps = batch(6, 7)
    opcheck(torch.ops.casm_fast.contour_boxes, (maps,))
    opcheck(torch.ops.casm_fast.contour_overlap, (maps, *boxes_in(6, 7, len(maps))))


def test_layouts():
    maps = batch(12, 12)
    truth, owners = boxes_in(12, 12, len(maps))
    turned = maps.transpose(2, 3)
    assert torch.equal(contour_boxes(turned), contour_boxes(turned.contiguous()))
    wide = torch.zeros(len(maps), 1, 12, 24, dtype=torch.uint8)
    wide[..., ::2] = maps
    assert torch.equal(contour_boxes(wide[..., ::2]), contour_boxes(maps))
    expected = contour_overlap(maps, truth, owners)
    assert torch.equal(contour_overlap(wide[..., ::2], truth, owners), expected)
    assert torch.equal(contour_overlap(maps, truth.flip(0), owners.flip(0)), expected)


def test_the_same_in_every_batch():
    maps = batch(14, 11)
    truth, owners = boxes_in(14, 11, len(maps))
    boxes, best = contour_boxes(maps), contour_overlap(maps, truth, owners)
    for b in range(len(maps)):
        assert torch.equal(contour_boxes(maps[b : b + 1])[0], boxes[b])
        mine = owners == b
        alone = contour_overlap(maps[b : b + 1], truth[mine], owners[mine] - b)
        assert torch.equal(alone[0], best[b])


def test_compiles_whole():
    maps = batch(6, 6)
    compiled = torch.compile(contour_boxes, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(maps), contour_boxes(maps))


# ---------------------------------------------------------------- errors
MAPS = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
BOXES, OWNERS = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)


def test_refuses_other_maps():
    with refuses(TypeError, "contour_boxes: expected `maps` to be a tensor, got list"):
        contour_boxes([0])
    with refuses(TypeError, "contour_boxes: expected `maps` in uint8, got float32"):
        contour_boxes(MAPS.float())
    with refuses(ValueError, "contour_boxes: expected `maps` of shape [B, 1, H, W], got [2, 3, 3]"):
        contour_boxes(MAPS[:, 0])
    with refuses(ValueError, "contour_boxes: expected `maps` to have pixels, got [2, 1, 0, 3]"):
        contour_boxes(MAPS[:, :, :0])
    with refuses(
        ValueError,
        "contour_boxes: expected `maps` on the CPU, where its kernel is, got meta; use maps.cpu()",
    ):
        contour_boxes(MAPS.to("meta"))
    huge = MAPS[:1, :, :1, :1].expand(1, 1, 2**15, 2**15)
    with refuses(
        ValueError,
        "contour_boxes: expected `maps` with fewer than 2^30 pixels each, got [1, 1, 32768, 32768]",
    ):
        contour_boxes(huge)


def test_refuses_other_boxes():
    with refuses(TypeError, "contour_overlap: expected `boxes` in int32, got int64"):
        contour_overlap(MAPS, BOXES.long(), OWNERS)
    with refuses(TypeError, "contour_overlap: expected `owners` in int64, got list"):
        contour_overlap(MAPS, BOXES, [0])
    with refuses(ValueError, "contour_overlap: expected `boxes` on the CPU, like `maps`, got meta"):
        contour_overlap(MAPS, BOXES.to("meta"), OWNERS)
    with refuses(
        ValueError,
        "contour_overlap: expected `boxes` of shape [N, 4] and `owners` of shape [N], "
        "got [1, 4] and [2]",
    ):
        contour_overlap(MAPS, BOXES, OWNERS.repeat(2))
    with refuses(ValueError, "contour_overlap: expected `owners` from 0 to 1, got 2 to 2"):
        contour_overlap(MAPS, BOXES, OWNERS + 2)
