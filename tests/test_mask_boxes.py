"""mask_boxes and connected_components: reference, oracles, registration, errors, properties."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import scipy.ndimage
import skimage.measure
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from casm_fast.ops import connected_components, mask_boxes

RULES = ["mean", "area", "value", "energy"]
# Around the words of 32 and 64 pixels that the kernels work in, and no multiple of anything.
SHAPES = [(1, 1), (1, 131), (131, 1), (5, 7), (28, 28), (33, 31), (9, 32), (16, 63), (8, 64),
          (7, 65), (5, 127), (4, 128), (6, 129)]  # fmt: skip


def spiral(H: int, W: int) -> np.ndarray:
    """One path, a pixel wide, from the corner inwards."""
    image = np.zeros((H, W), bool)
    y, x, dy, dx = 0, 0, 0, 1
    image[0, 0] = True

    def blocked(y: int, x: int) -> bool:
        return not (0 <= y < H and 0 <= x < W) or image[y, x]

    while True:
        for _ in range(2):
            ahead = (y + dy, x + dx)
            if not blocked(*ahead) and (
                not (0 <= y + 2 * dy < H and 0 <= x + 2 * dx < W)
                or not image[y + 2 * dy, x + 2 * dx]
            ):
                break
            dy, dx = dx, -dy
        else:
            return image
        y, x = ahead
        image[y, x] = True


def snake(H: int, W: int) -> np.ndarray:
    """Full rows, joined at their right and left end in turn."""
    image = np.zeros((H, W), bool)
    image[::2] = True
    image[1::4, -1] = True
    image[3::4, 0] = True
    return image


def comb(H: int, W: int) -> np.ndarray:
    """Columns that meet in the last row only: every union comes late."""
    image = np.zeros((H, W), bool)
    image[:, ::2] = True
    image[-1] = True
    return image


def checkerboard(H: int, W: int) -> np.ndarray:
    return np.indices((H, W)).sum(0) % 2 == 0


def diagonals(H: int, W: int) -> np.ndarray:
    """Lines that touch at corners only, across every border of words."""
    y, x = np.indices((H, W))
    return ((x - y) % 4 == 0) | ((x + y) % 9 == 0)


def cells(H: int, W: int) -> np.ndarray:
    """Noise of 4x4 pixels: rows repeat, as in upsampled masks."""
    return noise(-(-H // 4), -(-W // 4), 0.55).repeat(4, 0).repeat(4, 1)[:H, :W]


def noise(H: int, W: int, p: float) -> np.ndarray:
    return np.random.default_rng(int(1000 * p)).random((H, W)) < p


ADVERSARIAL = {
    "empty": lambda H, W: np.zeros((H, W), bool),
    "full": lambda H, W: np.ones((H, W), bool),
    "single": lambda H, W: np.arange(H * W).reshape(H, W) == H * W // 2,
    "spiral": spiral,
    "snake": snake,
    "comb": comb,
    "comb_sideways": lambda H, W: comb(W, H).T,
    "checkerboard": checkerboard,
    "diagonals": diagonals,
    "cells": cells,
    "noise_10": lambda H, W: noise(H, W, 0.1),
    "noise_50": lambda H, W: noise(H, W, 0.5),
    "noise_593": lambda H, W: noise(H, W, 0.593),  # the percolation threshold
    "noise_90": lambda H, W: noise(H, W, 0.9),
}


def images(shape: tuple[int, int]) -> np.ndarray:  # bool [B, H, W]
    return np.stack([make(*shape) for make in ADVERSARIAL.values()])


def batch(image: np.ndarray, device, dtype=torch.float32) -> torch.Tensor:  # [B, 1, H, W]
    return torch.from_numpy(image.copy()).to(dtype)[:, None].to(device)


def masks(shape, batch=3, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    """Smooth blobs with some noise, as saliency is; every third mask has ties."""
    rng = np.random.default_rng(seed)
    blobs = scipy.ndimage.gaussian_filter(rng.standard_normal((batch, *shape)), (0, 4, 4))
    mask = 1 / (1 + np.exp(-30 * blobs - 0.3 * rng.standard_normal(blobs.shape)))
    mask[::3] = np.round(8 * mask[::3]) / 8
    return torch.from_numpy(mask)[:, None].to(dtype).to(device)


def same(ours, expected) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, expected, strict=True))


# ---------------------------------------------------------------- reference
@pytest.mark.parametrize("shape", SHAPES)
def test_labels_equal_reference(shape, device):
    binary = batch(images(shape), device)
    for connectivity in (4, 8):
        labels = connected_components(binary, connectivity)
        assert labels.dtype == torch.int32
        assert labels.shape == binary.shape
        expected = connected_components.reference(binary.cpu(), connectivity)
        assert torch.equal(labels.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape, rule, dtype, device):
    mask = masks(shape, dtype=dtype, device=device)
    mask[2] = 0.3  # constant
    for alpha in (0.0, 0.4, 1.0):
        for connectivity, component in ((4, "largest"), (8, "largest"), (4, "all")):
            ours = mask_boxes(mask, None, rule, alpha, connectivity, component)
            expected = mask_boxes.reference(mask.cpu(), None, rule, alpha, connectivity, component)
            assert same(ours, expected), (alpha, connectivity, component)
    assert [t.dtype for t in ours] == [torch.int32] * 2
    assert [tuple(t.shape) for t in ours] == [(3, 4), (3,)]


@pytest.mark.parametrize("rule", RULES)
def test_equals_reference_for_16_bits(rule, gpu_device):
    for dtype in (torch.float16, torch.bfloat16):
        mask = masks((13, 40), dtype=dtype, device=gpu_device)
        assert same(mask_boxes(mask, rule=rule), mask_boxes.reference(mask.cpu(), rule=rule))


@pytest.mark.parametrize("shape", [(144, 144), (98, 200), (4000, 1), (1950, 40)])
def test_images_at_the_limits_of_shared_memory_equal_reference(shape, gpu_device):
    """Just below the 48 KiB that need no permission, and too much for any block: the kernels that
    keep bits and slots in global memory. Tall images have most words.
    """
    names = ["spiral", "comb_sideways", "diagonals", "noise_593"]
    binary = np.stack([ADVERSARIAL[name](*shape) for name in names])
    labels = connected_components(batch(binary, gpu_device, torch.uint8), 8)
    for name, image, ours in zip(names, binary, labels[:, 0].cpu(), strict=True):
        np.testing.assert_array_equal(ours, scipy_labels(image, 8), err_msg=name)
    boxes, area = mask_boxes(batch(binary, gpu_device), connectivity=4)
    for name, image, box, size in zip(names, binary, boxes, area, strict=True):
        assert (box.tolist(), size.item()) == cv2_box(image, 4), name
    mask = masks(shape, batch=2, device=gpu_device)
    for rule in RULES:
        for component in ("largest", "all"):
            ours = mask_boxes(mask, rule=rule, component=component)
            on_cpu = mask_boxes.reference(mask.cpu(), rule=rule, component=component)
            assert same(ours, on_cpu)


@pytest.mark.parametrize("rule", RULES)
def test_equals_reference_beyond_one_block_of_the_sum(rule, device):
    mask = masks((300, 230), batch=1, device=device)
    assert same(mask_boxes(mask, rule=rule), mask_boxes.reference(mask.cpu(), rule=rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_levels(dtype, device):
    mask = masks((28, 28), dtype=dtype, device=device)
    for level in (
        torch.tensor([0.2, 0.625, math.nan], device=device),
        torch.tensor([0.7, -math.inf, math.inf], device=device, dtype=torch.float64),
        torch.tensor([0.5, 0.25, 0.75], device=device, dtype=torch.float16),
    ):
        ours = mask_boxes(mask, level)
        assert same(ours, mask_boxes.reference(mask.cpu(), level.cpu()))
        kept = mask.cpu()[:, 0].numpy() >= level.to(dtype).cpu().numpy()[:, None, None]
        assert same(mask_boxes(mask, level, component="all")[1:], [batch_area(kept)])


def batch_area(kept: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(kept.sum((1, 2))).int()


def test_empty_batch(device):
    empty = torch.zeros(0, 1, 5, 4, device=device)
    boxes, area = mask_boxes(empty)
    assert boxes.shape == (0, 4)
    assert area.shape == (0,)
    assert connected_components(empty).shape == (0, 1, 5, 4)


# ---------------------------------------------------------------- outside oracles
def scipy_labels(image: np.ndarray, connectivity: int) -> np.ndarray:
    """scipy.ndimage.label, each component renamed to its first pixel plus one."""
    structure = np.ones((3, 3)) if connectivity == 8 else None
    labels, count = scipy.ndimage.label(image, structure)
    names = np.zeros(count + 1, np.int64)
    numbers = np.arange(1, image.size + 1).reshape(image.shape)
    if count:
        names[1:] = scipy.ndimage.minimum(numbers, labels, np.arange(1, count + 1))
    return names[labels]


@pytest.mark.parametrize("shape", [(7, 9), (40, 65), (31, 100)])
@pytest.mark.parametrize("connectivity", [4, 8])
def test_labels_equal_scipy(shape, connectivity, device):
    binary = images(shape)
    labels = connected_components(batch(binary, device), connectivity).cpu().numpy()
    for name, image, ours in zip(ADVERSARIAL, binary, labels[:, 0], strict=True):
        np.testing.assert_array_equal(ours, scipy_labels(image, connectivity), err_msg=name)


def cv2_box(image: np.ndarray, connectivity: int) -> tuple[list[int], int]:
    """OpenCV's statistics; among the largest, the one whose first pixel comes first."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        image.astype(np.uint8), connectivity=connectivity
    )
    if count == 1:
        return [0, 0, 0, 0], 0
    areas = stats[1:, cv2.CC_STAT_AREA]
    tied = np.flatnonzero(areas == areas.max()) + 1
    label = labels.flat[np.flatnonzero(np.isin(labels, tied))[0]]
    x, y, w, h, area = stats[label]
    return [x, y, x + w, y + h], area


def skimage_box(image: np.ndarray, connectivity: int) -> tuple[list[int], int]:
    regions = skimage.measure.regionprops(
        skimage.measure.label(image, connectivity=connectivity // 4)
    )
    if not regions:
        return [0, 0, 0, 0], 0
    best = max(regions, key=lambda r: (r.area, -min(y * image.shape[1] + x for y, x in r.coords)))
    y0, x0, y1, x1 = best.bbox
    return [x0, y0, x1, y1], best.area


@pytest.mark.parametrize("oracle", [cv2_box, skimage_box])
@pytest.mark.parametrize("connectivity", [4, 8])
def test_boxes_equal_oracle(oracle, connectivity, device):
    for shape in ((23, 33), (12, 66)):
        binary = images(shape)
        level = torch.full((len(binary),), 0.5, device=device)
        boxes, area = mask_boxes(batch(binary, device), level, connectivity=connectivity)
        for name, image, box, size in zip(ADVERSARIAL, binary, boxes, area, strict=True):
            assert (box.tolist(), size.item()) == oracle(image, connectivity), (name, shape)


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("width", [224, 225, 1000])
def test_large_images_equal_opencv(width, connectivity):
    height = 224 if width < 1000 else 300
    binary = images((height, width))
    level = torch.full((len(binary),), 0.5)
    ours = mask_boxes(batch(binary, "cpu"), level, connectivity=connectivity)
    alone = [
        mask_boxes(m, level[:1], connectivity=connectivity) for m in batch(binary, "cpu").split(1)
    ]
    labels = connected_components(batch(binary, "cpu", torch.bool), connectivity)
    for i, (name, image) in enumerate(zip(ADVERSARIAL, binary, strict=True)):
        expected = cv2_box(image, connectivity)
        assert (ours[0][i].tolist(), ours[1][i].item()) == expected, name
        assert (alone[i][0][0].tolist(), alone[i][1].item()) == expected, name
        np.testing.assert_array_equal(labels[i, 0], scipy_labels(image, connectivity), err_msg=name)


def test_mean_rule_equals_formula(device):
    mask = masks((28, 28), device=device)
    kept = (mask >= mask.double().mean((1, 2, 3), keepdim=True).float()).cpu().numpy()[:, 0]
    boxes, area = mask_boxes(mask)
    for image, box, size in zip(kept, boxes, area, strict=True):
        assert (box.tolist(), size.item()) == cv2_box(image, 4)


def test_area_rule_equals_the_authors_quantile(device):
    mask = masks((56, 56), batch=4, device=device)
    _, area = mask_boxes(mask, rule="area", component="all")
    for image, size in zip(mask.cpu(), area, strict=True):
        flat = image.flatten()
        k = 1 + int((len(flat) - 1) * (1 - flat.double().mean().item()) + 0.5)
        level = flat.kthvalue(k).values.clamp(1e-6, 1 - 1e-6)
        assert size == (flat > level).sum()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.95, 1.0])
def test_energy_rule_keeps_the_fewest_pixels(alpha, device):
    mask = masks((20, 31), dtype=torch.float64, device=device)
    _, area = mask_boxes(mask, rule="energy", alpha=alpha, component="all")
    for image, size in zip(mask.cpu().numpy(), area, strict=True):
        highest_first = np.sort(image.ravel())[::-1]
        kept = highest_first[:size]
        total = alpha * highest_first.sum()
        slack = 1e-9 * total  # masses are counted in units of 2^-43 of the highest pixel
        assert kept.sum() >= total - slack
        assert kept[kept > kept[-1]].sum() < total + slack


# ---------------------------------------------------------------- rules at their edges
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["mean", "value", "energy"])
def test_constant_masks_keep_every_pixel(rule, dtype, device):
    values = torch.tensor([0.0, 0.1, 1 / 3, 0.7, 1.0, 1e-30], dtype=dtype)
    mask = values.view(-1, 1, 1, 1).expand(-1, 1, 33, 67).to(device)
    boxes, area = mask_boxes(mask, rule=rule)
    assert boxes.tolist() == [[0, 0, 67, 33]] * len(values)
    assert area.tolist() == [33 * 67] * len(values)


def test_constant_masks_have_nothing_above_their_quantile(device):
    boxes, area = mask_boxes(torch.full((1, 1, 6, 6), 0.3, device=device), rule="area")
    assert (boxes.tolist(), area.tolist()) == ([[0, 0, 0, 0]], [0])


@pytest.mark.parametrize("rule", RULES)
def test_nan_pixels_are_never_kept_and_count_in_no_statistic(rule, device):
    mask = masks((28, 30), device=device)
    holes = torch.zeros_like(mask, dtype=torch.bool)
    holes[..., ::5, 3::7] = True
    mask[holes] = math.nan
    ours = mask_boxes(mask, rule=rule, component="all")
    assert same(ours, mask_boxes.reference(mask.cpu(), rule=rule, component="all"))
    for image, area in zip(mask, ours[1], strict=True):
        rest = image[~image.isnan()].view(1, 1, 1, -1)
        assert mask_boxes(rest, rule=rule, component="all")[1] == area


@pytest.mark.parametrize("rule", RULES)
def test_masks_of_nan_alone_give_zeros(rule, device):
    boxes, area = mask_boxes(torch.full((2, 1, 5, 70), math.nan, device=device), rule=rule)
    assert torch.count_nonzero(boxes) == 0
    assert torch.count_nonzero(area) == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("values", [
    [math.inf, 0, 1, 2], [-math.inf, 0, 1, 2], [-math.inf, math.inf, 1, 2], [-3, -1, -2, -1],
    [1e38, 3e38, 3e38, -3e38], [1e-45, 3e-45, 0, 1e-45], [-0.0, 0.0, -0.0, 0.0],
])  # fmt: skip
def test_unusual_values_equal_reference(values, rule, device):
    for dtype in (torch.float32, torch.float64):
        mask = torch.tensor(values, dtype=dtype, device=device).view(1, 1, 2, 2)
        ours = mask_boxes(mask, rule=rule, alpha=0.8)
        assert same(ours, mask_boxes.reference(mask.cpu(), rule=rule, alpha=0.8))


def test_among_equals_the_first_in_raster_order_wins(device):
    binary = np.zeros((1, 9, 70), bool)
    binary[0, 5:7, 1:3] = True
    binary[0, 2:4, 66:68] = True
    binary[0, 2:4, 30:32] = True
    boxes, area = mask_boxes(batch(binary, device), torch.tensor([0.5], device=device))
    assert (boxes.tolist(), area.tolist()) == ([[30, 2, 32, 4]], [4])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_binary_dtypes(dtype, device):
    image = noise(20, 70, 0.5)
    binary = batch(image[None], device, dtype)
    if dtype == torch.uint8:
        binary = binary * 200
    if dtype.is_floating_point:
        binary = torch.where(binary == 0, math.nan, -0.25)
    labels = connected_components(binary)
    np.testing.assert_array_equal(labels[0, 0].cpu(), scipy_labels(image, 4))


# ---------------------------------------------------------------- registration
def test_opcheck(device):
    mask = masks((6, 70), device=device)
    level = torch.full((3,), 0.5, device=device)
    for needs_grad in (False, True):
        arguments = (mask.clone().requires_grad_(needs_grad), level, "mean", 1.0, 4, "largest")
        opcheck(torch.ops.casm_fast.mask_boxes.default, arguments)
        arguments = (arguments[0], None, "area", 1.0, 8, "all")
        opcheck(torch.ops.casm_fast.mask_boxes.default, arguments)
        opcheck(torch.ops.casm_fast.connected_components.default, (arguments[0], 8))


def test_results_need_no_gradient(device):
    mask = masks((6, 7), device=device).requires_grad_()
    assert not any(result.requires_grad for result in mask_boxes(mask))
    assert not connected_components(mask).requires_grad


def test_compiles_to_one_graph(device):
    mask = masks((12, 12), device=device)

    def both(mask):
        boxes, area = mask_boxes(2 * mask, rule="value", alpha=0.5)
        return boxes, area, connected_components(mask >= 0.5, 8)

    assert same(torch.compile(both, fullgraph=True, backend="aot_eager")(mask), both(mask))


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "expanded", "sliced"])
def test_layouts(layout, device):
    base = masks((12, 70), batch=4, device=device)
    mask = {
        "transposed": base.transpose(2, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "expanded": base[:1].expand(4, -1, -1, -1),
        "sliced": base[1::2, :, 1::3, 1::2],
    }[layout]
    packed = mask.clone(memory_format=torch.contiguous_format)
    level = torch.rand(2 * len(mask), device=device)[::2]
    assert same(mask_boxes(mask, level), mask_boxes(packed, level.clone()))
    assert same(mask_boxes(mask), mask_boxes(packed))
    assert torch.equal(connected_components(mask >= 0.5), connected_components(packed >= 0.5))


GOOD = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "mask_boxes: expected `mask` to be a tensor, got list"),
        (
            (torch.rand(1, 3, 4, 4),),
            ValueError,
            "mask_boxes: expected `mask` of shape [B, 1, H, W], got [1, 3, 4, 4]",
        ),
        (
            (torch.rand(1, 1, 0, 4),),
            ValueError,
            "mask_boxes: expected `mask` to have pixels, got [1, 1, 0, 4]",
        ),
        (
            (torch.zeros(1, 1, 4, 4, dtype=torch.bool),),
            TypeError,
            "mask_boxes: expected `mask` in one of float32, float64 on cpu, got bool",
        ),
        (
            (torch.zeros(1).expand(1, 1, 2**16, 2**15),),
            ValueError,
            "mask_boxes: expected images of `mask` with fewer than 2^30 pixels in fewer than 2^25 "
            "words of 64 of a row, got [1, 1, 65536, 32768]",
        ),
        (
            (GOOD, 0.5),
            TypeError,
            "mask_boxes: expected `level` to be a tensor or None, got float",
        ),
        (
            (GOOD, torch.zeros(3)),
            ValueError,
            "mask_boxes: expected `level` of shape [2], got [3]",
        ),
        (
            (GOOD, torch.zeros(2, dtype=torch.int64)),
            TypeError,
            "mask_boxes: expected `level` in a floating dtype, got int64",
        ),
        (
            (GOOD, torch.zeros(2, device="meta")),
            ValueError,
            "mask_boxes: expected `level` on the device of `mask` (cpu), got meta",
        ),
        (
            (GOOD, None, "median"),
            ValueError,
            "mask_boxes: expected `rule` to be one of 'mean', 'area', 'value', 'energy', "
            "got 'median'",
        ),
        (
            (GOOD, None, "mean", math.nan),
            ValueError,
            "mask_boxes: expected `alpha` to be finite and at least 0, got nan",
        ),
        (
            (GOOD, None, "energy", 1.5),
            ValueError,
            "mask_boxes: expected `alpha` to be finite and at least 0 and at most 1, got 1.5",
        ),
        (
            (GOOD, None, "mean", 1.0, 6),
            ValueError,
            "mask_boxes: expected `connectivity` to be 4 or 8, got 6",
        ),
        (
            (GOOD, None, "mean", 1.0, 4, "biggest"),
            ValueError,
            "mask_boxes: expected `component` to be one of 'largest', 'all', got 'biggest'",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error) as caught:
        mask_boxes(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), TypeError, "connected_components: expected `binary` to be a tensor, got int"),
        (
            (torch.zeros(4, 4),),
            ValueError,
            "connected_components: expected `binary` of shape [B, 1, H, W], got [4, 4]",
        ),
        (
            (torch.zeros(1, 1, 4, 4, dtype=torch.int64),),
            TypeError,
            "connected_components: expected `binary` in one of float32, float64, bool, uint8 "
            "on cpu, got int64",
        ),
        (
            (GOOD, True),
            ValueError,
            "connected_components: expected `connectivity` to be 4 or 8, got True",
        ),
    ],
)
def test_errors_of_connected_components(arguments, error, message):
    with pytest.raises(error) as caught:
        connected_components(*arguments)
    assert str(caught.value) == message


def test_deterministic_for_any_number_of_threads():
    """Bands of one image, images of a batch, and blocks of the sum, cut in every way."""
    mask = masks((320, 420), batch=3)
    rough = batch(noise(320, 420, 0.593)[None], "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found = [*mask_boxes(mask), *mask_boxes(mask[:1], rule="value", alpha=0.5)]
            results.append([*found, *mask_boxes(rough), connected_components(rough, 8)])
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], result) for result in results[1:])


def test_results_do_not_depend_on_the_order_of_threads(gpu_device, monkeypatch):
    """Unions race by design: every interleaving must end in the same forest."""
    for shape in ((30, 70), (4000, 1)):
        binary = batch(noise(*shape, 0.593)[None], gpu_device)
        expected = connected_components.reference(binary.cpu(), 8)
        box = mask_boxes.reference(binary.cpu())
        for seed in range(12):
            monkeypatch.setenv("CASM_FAST_EMULATOR_SEED", str(seed))
            assert torch.equal(connected_components(binary, 8).cpu(), expected)
            assert same(mask_boxes(binary), box)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("shape", [(224, 224), (400, 400)])
def test_cuda_graph_without_synchronisation(shape):
    mask = masks(shape, device="cuda")
    expected = [mask_boxes(mask, rule=rule) for rule in RULES]
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [mask_boxes(mask, rule=rule) for rule in RULES]
            labels = connected_components(mask >= 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(labels.cpu(), connected_components(mask.cpu() >= 0.5))


# ---------------------------------------------------------------- properties
binaries = st.builds(
    lambda seed, shape, p: np.random.default_rng(seed).random(shape) < p,
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 40), st.integers(1, 140)),
    st.sampled_from([0.05, 0.3, 0.5, 0.593, 0.7, 0.95]),
)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def largest(image: np.ndarray, connectivity: int) -> tuple[list[int], int]:
    mask = batch(image[None], "cpu")
    boxes, area = mask_boxes(mask, torch.tensor([0.5]), connectivity=connectivity)
    return boxes[0].tolist(), int(area)


@quick
@given(binaries)
def test_areas_do_not_depend_on_orientation(image):
    for connectivity in (4, 8):
        areas = {
            largest(turned, connectivity)[1]
            for turned in (image, image[::-1], image[:, ::-1], image.T)
        }
        assert len(areas) == 1


@quick
@given(binaries)
def test_eight_connectivity_merges_four_connected_components(image):
    binary = batch(image[None], "cpu")
    four, eight = (connected_components(binary, c).numpy().ravel() for c in (4, 8))
    pairs = np.unique(np.stack([four, eight]), axis=1)
    assert len(pairs[0]) == len(np.unique(four))  # each lies in one
    assert largest(image, 8)[1] >= largest(image, 4)[1]


@quick
@given(binaries)
def test_boxes_are_tight(image):
    (x0, y0, x1, y1), area = largest(image, 4)
    labels = connected_components(batch(image[None], "cpu"))[0, 0].numpy()
    inside = labels[y0:y1, x0:x1]
    if area == 0:
        assert not image.any()
        return
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    component = inside == sizes.argmax()
    assert component.sum() == area == sizes.max()
    assert component.any(0)[[0, -1]].all()
    assert component.any(1)[[0, -1]].all()


@quick
@given(binaries)
def test_labels_name_the_first_pixel(image):
    labels = connected_components(batch(image[None], "cpu"), 8)[0, 0].numpy()
    names = np.unique(labels)
    first = {name: np.flatnonzero(labels == name)[0] + 1 for name in names if name}
    assert all(name == number for name, number in first.items())
    assert ((labels > 0) == image).all()
