"""contour_boxes and contour_overlap: all levels of a map at once, beside a search for each level.

The peer is what evaluators do, at its best: OpenCV's contours once for each of the 256 levels (not
for each of 1,000 thresholds, most of which ask for the same level again), with as many threads as
ours. `bench_protocols.py` races whole protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch

from casm_fast.ops import contour_boxes, contour_overlap

cv2.setNumThreads(1)  # the pool has the threads


def smooth(B: int, S: int) -> np.ndarray:  # [B, S, S]
    return scipy.ndimage.gaussian_filter(
        np.random.default_rng(0).standard_normal((B, S, S)), (0, S / 20, S / 20)
    )


def cells(B: int, S: int) -> np.ndarray:
    return np.kron(smooth(B, S // 4), np.ones((1, 4, 4)))


def rough(B: int, S: int) -> np.ndarray:
    field = smooth(B, S)
    return field / field.std() + 0.1 * np.random.default_rng(1).standard_normal(field.shape)


MAPS = {"smooth": smooth, "CASM cells": cells, "rough": rough}


def eight_bits(field: np.ndarray) -> np.ndarray:
    low, high = (f(field, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    return (255 * (field - low) / (high - low)).astype(np.uint8)


def contours(image: np.ndarray, level: int) -> tuple[np.ndarray, ...]:
    _, kept = cv2.threshold(image, level, 255, cv2.THRESH_BINARY)
    return cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]


def largest(image: np.ndarray) -> np.ndarray:  # [256, 4]
    boxes = np.zeros((256, 4))
    for level in range(image.max()):
        x, y, w, h = cv2.boundingRect(max(contours(image, level), key=cv2.contourArea))
        boxes[level] = x, y, x + w, y + h
    return boxes


def best(image: np.ndarray, truth: np.ndarray) -> np.ndarray:  # [256]
    H, W = image.shape
    overlap = np.empty(256)
    for level in range(256):
        found = [cv2.boundingRect(contour) for contour in contours(image, level)]
        rects = np.array(found or [(0, 0, 0, 0)])
        low, high = rects[:, :2], np.minimum(rects[:, :2] + rects[:, 2:], [W - 1, H - 1])
        sides = np.minimum(high, truth[2:]) - np.maximum(low, truth[:2]) + 1
        shared = np.clip(sides, 0, None).prod(1)
        together = (high - low + 1).prod(1) + (truth[2:] - truth[:2] + 1).prod() - shared
        overlap[level] = (shared / together).max()
    return overlap


def each(
    pool: ThreadPoolExecutor, one: Callable[..., np.ndarray], *columns: np.ndarray
) -> np.ndarray:
    return np.stack(list(pool.map(one, *columns)))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        yield threads


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("op", ["contour_boxes", "contour_overlap"])
def test_contours(op, name, race, device, pool):
    if device.type == "cuda":
        pytest.skip("contours are found on the CPU")
    B, S = 16, 224
    images = eight_bits(MAPS[name](B, S))
    maps = torch.from_numpy(images)[:, None]
    if op == "contour_boxes":
        ours, peer = partial(contour_boxes, maps), partial(each, pool, largest, images)
    else:
        truth = np.tile([S // 4, S // 3, S // 2, S - 9], (B, 1))
        boxes, owners = torch.from_numpy(truth).int(), torch.arange(B)
        ours = partial(contour_overlap, maps, boxes, owners)
        peer = partial(each, pool, best, images, truth)
    race(
        op=op,
        case=f"{B}x1x{S}x{S}, {name}",
        ours=ours,
        peers={"OpenCV, 256 levels": peer},
        expected=peer,
        tolerance=0.0,
        bytes=maps.nbytes + 256 * B * (16 if op == "contour_boxes" else 8),
        images=B,
    )
