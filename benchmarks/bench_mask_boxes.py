"""mask_boxes: the box of the largest component of everything at or above the mean.

Every peer does the whole job from float masks: mean in float64, threshold, components, the largest,
its box and area; images in a pool of as many threads as ours, or one after the other where that is
quicker. Kornia alone labels batches. On a GPU there is CuPy, where it is installed.
"""

from __future__ import annotations

import importlib.util
import statistics
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import cc3d
import cv2
import kornia.contrib
import numpy as np
import pytest
import scipy.ndimage
import skimage.measure
import torch

from casm_fast.ops import mask_boxes

cv2.setNumThreads(1)  # the pool has the threads

Found = tuple[int, int, int, int, int]  # x0, y0, x1, y1, area


# ---------------------------------------------------------------- masks
def blobs(B: int, S: int, sigma: float, rough: float = 0.0) -> np.ndarray:  # float64 [B, S, S]
    """Smooth saliency, with some noise where `rough`."""
    rng = np.random.default_rng(0)
    field = scipy.ndimage.gaussian_filter(rng.standard_normal((B, S, S)), (0, sigma, sigma))
    field = 3 * field / field.std() + rough * rng.standard_normal(field.shape)
    return 1 / (1 + np.exp(-field))


def spiral(S: int) -> np.ndarray:
    """Rings a pixel wide and a pixel apart, each open and joined to the next."""
    image = np.zeros((S, S))
    for r in range(0, S // 2, 2):
        image[r, r : S - r] = image[S - 1 - r, r : S - r] = 1
        image[r : S - r, r] = image[r : S - r, S - 1 - r] = 1
        image[r + 1, r] = 0
        image[r + 2, r : r + 3] = 1
    return image


def comb(S: int) -> np.ndarray:
    """Columns that meet in the last row."""
    image = np.zeros((S, S))
    image[:, ::2] = image[-1] = 1
    return image


def noise(p: float) -> Callable[[int, int], np.ndarray]:
    return lambda B, S: np.random.default_rng(0).random((B, S, S)) < p


def same(make: Callable[[int], np.ndarray]) -> Callable[[int, int], np.ndarray]:
    return lambda B, S: np.broadcast_to(make(S), (B, S, S))


MASKS: dict[str, Callable[[int, int], np.ndarray]] = {
    "CASM blobs": lambda B, S: np.kron(blobs(B, S // 4, S / 40), np.ones((1, 4, 4))),
    "blobs": lambda B, S: blobs(B, S, S / 20),
    "rough blobs": lambda B, S: blobs(B, S, S / 60, 1.0),
    "noise 0.5": noise(0.5),
    "noise 0.593": noise(0.593),
    "checkerboard": same(lambda S: np.indices((S, S)).sum(0) % 2),
    "spiral": same(spiral),
    "comb": same(comb),
}


# ---------------------------------------------------------------- peers, one image each
def kept(mask: np.ndarray) -> np.ndarray:
    return mask >= np.float32(mask.mean(dtype=np.float64))


def first_of_largest(labels: np.ndarray, areas: np.ndarray) -> int:
    """The label of the largest; among equals the one whose first pixel comes first."""
    tied = np.flatnonzero(areas == areas.max())
    if len(tied) == 1:
        return int(tied[0])
    return int(labels.flat[np.isin(labels, tied).argmax()])


def opencv(mask: np.ndarray, connectivity: int) -> Found:
    binary = kept(mask).view(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(binary, None, None, None, connectivity)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    x, y, w, h, area = stats[first_of_largest(labels, areas)]
    return x, y, x + w, y + h, area


def scipy_label(mask: np.ndarray, connectivity: int) -> Found:
    structure = np.ones((3, 3)) if connectivity == 8 else None
    labels, _ = scipy.ndimage.label(kept(mask), structure)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    best = first_of_largest(labels, areas)
    y, x = scipy.ndimage.find_objects((labels == best).view(np.uint8))[0]
    return x.start, y.start, x.stop, y.stop, areas[best]


def scikit_image(mask: np.ndarray, connectivity: int) -> Found:
    labels = skimage.measure.label(kept(mask), connectivity=connectivity // 4)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    best = first_of_largest(labels, areas)
    y, x = scipy.ndimage.find_objects((labels == best).view(np.uint8))[0]
    return x.start, y.start, x.stop, y.stop, areas[best]


def cc3d_label(mask: np.ndarray, connectivity: int) -> Found:
    labels = cc3d.connected_components(kept(mask), connectivity=connectivity)
    stats = cc3d.statistics(labels, no_slice_conversion=True)
    areas = stats["voxel_counts"].astype(np.int64)
    areas[0] = 0
    best = first_of_largest(labels, areas)
    y0, y1, x0, x1 = (int(v) for v in stats["bounding_boxes"][best][:4])
    return x0, y0, x1 + 1, y1 + 1, areas[best]


def kornia_boxes(masks: torch.Tensor) -> np.ndarray:
    """Kornia's exact labels (8-connected); boxes by NumPy, as for the others."""
    level = masks.double().mean((1, 2, 3), keepdim=True).float()
    labels = kornia.contrib.connected_components_union_find((masks >= level).float())
    found = []
    for image in labels[:, 0].long().cpu().numpy():
        names, compact = np.unique(image, return_inverse=True)
        compact = compact.reshape(image.shape) + (names[0] != 0)
        areas = np.bincount(compact.ravel())
        areas[0] = 0
        best = first_of_largest(compact, areas)
        y, x = scipy.ndimage.find_objects((compact == best).view(np.uint8))[0]
        found.append((x.start, y.start, x.stop, y.stop, areas[best]))
    return np.array(found)


def quickest(
    pool: ThreadPoolExecutor,
    find: Callable[[np.ndarray, int], Found],
    images: list[np.ndarray],
    connectivity: int,
) -> Callable[[], np.ndarray]:
    """All images one after the other, or in a pool, a share for each thread: what takes less time.

    Small images are quicker without a pool, whose threads take turns in the interpreter.
    """

    def loop(share: list[np.ndarray]) -> np.ndarray:
        return np.array([find(image, connectivity) for image in share])

    threads = min(torch.get_num_threads(), len(images))
    cuts = [i * len(images) // threads for i in range(threads + 1)]
    shares = [images[begin:end] for begin, end in pairwise(cuts)]
    ways = [
        lambda: loop(images),
        lambda: np.concatenate(list(pool.map(loop, shares))),
    ]
    return min(ways, key=lambda way: statistics.median(timeit.repeat(way, number=1, repeat=7)))


def cupy_label(masks: torch.Tensor, connectivity: int) -> Callable[[], None]:
    """cupyx.scipy.ndimage.label, image by image."""
    import cupy
    from cupyx.scipy.ndimage import label

    images = cupy.from_dlpack(masks[:, 0].contiguous())
    structure = cupy.ones((3, 3)) if connectivity == 8 else None

    def run() -> None:
        levels = images.mean((1, 2), dtype=cupy.float64).astype(cupy.float32)
        for image, level in zip(images, levels, strict=True):
            label(image >= level, structure)

    return run


long = pytest.mark.long
SIZES = [(1, 28), (256, 28), (1, 56), (256, 56), (1, 224), (256, 224), (8, 512), (1, 1024)]
CASES = [
    *((name, 32, 224, 4) for name in MASKS),
    *(pytest.param(name, 32, 224, 8, marks=long) for name in MASKS),
    *(
        pytest.param(name, *size, 4, marks=long)
        for name in ("blobs", "noise 0.5")
        for size in SIZES
    ),
]
ONE_BY_ONE = {
    "OpenCV": opencv,
    "SciPy": scipy_label,
    "scikit-image": scikit_image,
    "cc3d": cc3d_label,
}


@pytest.mark.parametrize(("name", "B", "S", "connectivity"), CASES)
def test_mask_boxes(name, B, S, connectivity, race, device):
    if device.type == "cuda" and (B, S) == (32, 224):
        B = 1024
    masks = torch.from_numpy(MASKS[name](B, S).astype(np.float32))[:, None].contiguous()
    images = list(masks[:, 0].numpy())
    right = np.array([opencv(image, connectivity) for image in images])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        # The specification is slow, so it checks OpenCV on one image, and OpenCV the others.
        box, area = mask_boxes.reference(masks[:1], connectivity=connectivity)
        assert right[0].tolist() == [*box[0].tolist(), area.item()]
        expected = [right[:, :4], right[:, 4]]
        peers, inexact = {}, {}
        if device.type == "cpu":
            for label, find in ONE_BY_ONE.items():
                peers[label] = apart(quickest(pool, find, images, connectivity))
            if connectivity == 8:
                peers["kornia"] = apart(lambda: kornia_boxes(masks))
        else:
            masks = masks.to(device)
            if importlib.util.find_spec("cupy"):
                run_label = cupy_label(masks, connectivity)
                peers["cupyx label"] = lambda: run_label() or expected
                inexact["cupyx label"] = "labels only: no areas, no boxes"
        race(
            op="mask_boxes",
            case=f"{B}x1x{S}x{S}, {name}, {connectivity}-connected",
            ours=lambda: mask_boxes(masks, connectivity=connectivity),
            peers=peers,
            expected=expected,
            tolerance=0.0,
            bytes=masks.nbytes + 20 * B,
            images=B,
            inexact=inexact,
        )


def apart(call: Callable[[], np.ndarray]) -> Callable[[], list[np.ndarray]]:
    """The result as ours comes: boxes and areas."""

    def run() -> list[np.ndarray]:
        found = call()
        return [found[:, :4], found[:, 4]]

    return run
