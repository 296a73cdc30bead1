"""Boxes around what a mask keeps: a level, its connected components, and the box of the largest.

The pixels of a mask that are at least as large as a level are kept; the box is tight around the
largest connected component of them (Zolna et al. 2019, eq. 9 and the localisation protocol). The
rules that find the level, where ``n`` counts the pixels that are not NaN::

    mean     m >= alpha * mean(m)                    eq. 9; the mean in float64
    area     m > the k-th smallest pixel, k = 1 + int((n - 1) * (1 - alpha * mean(m)) + 0.5)
             the quantile that keeps a share alpha * mean(m), as the authors' code takes it: k
             clamped to 1..n, the k-th smallest pixel to [1e-6, 1 - 1e-6]
    value    m >= min(m) + alpha * (max(m) - min(m))
    energy   m >= the highest pixel v with sum(m[m >= v]) >= alpha * sum(m)
             the fewest highest pixels that hold alpha of the mass; equal pixels go together,
             negative pixels have no mass

Levels are computed in float64 and rounded to float32 (not rounded for float64 masks). CPU and CUDA
give the same level to the last bit, hence equal boxes and labels: the sum has one fixed order, and
masses are counted in whole units of a power of two, as fine as 53 bits allow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from casm_fast.ops import library  # noqa: F401  (loads the kernels)
from casm_fast.ops.checks import check_number, check_tensor, shape_of
from casm_fast.ops.registry import specified_by

RULES = ("mean", "area", "value", "energy")
COMPONENTS = ("largest", "all")

_WARPS, _LANES = 16, 64  # of a block of threads, two lanes each
_BLOCK = 64 * _WARPS * _LANES
_NOWHERE = 2**30  # above every label


def _fixed_order_sum(pixels: Tensor) -> float:
    """The float64 sum of ``[n]`` in the order of csrc/mask_boxes/mask_boxes.h, NaN as zero."""
    total = 0.0
    numbers = pixels.double().nan_to_num(0.0, math.inf, -math.inf)
    for block in torch.split(numbers, _BLOCK):
        padded = torch.nn.functional.pad(block, (0, -len(block) % (_WARPS * _LANES)))
        lanes = padded.new_zeros(_WARPS, _LANES)
        for row in padded.view(-1, _WARPS, _LANES):
            lanes = lanes + row
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
        while lanes.shape[1] > 1:
            lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
        part = 0.0
        for warp in lanes[:, 0].tolist():
            part += warp
        total += part
    return total


def _energy_level(numbers: Tensor, alpha: float) -> float:
    """The level of rule ``energy`` for ``[n]`` float64 pixels without NaN."""
    highest = numbers.max().item()
    if not 0 < highest < math.inf:
        return highest
    bits = 53 - len(numbers).bit_length()
    shift = bits - math.frexp(highest)[1]  # the highest pixel has less than 2^bits units of mass
    mass = numbers.clamp(min=0) * math.ldexp(1.0, shift // 2) * math.ldexp(1.0, shift - shift // 2)
    values, order = numbers.sort(descending=True)
    held = mass.long()[order].cumsum(0)
    target = max(1, math.ceil(alpha * float(held[-1])))
    return values[held >= target][0].item()


def _keep(pixels: Tensor, rule: str, alpha: float) -> Tensor:
    """Which of the pixels ``[n]`` of one mask are kept, as bool ``[n]``."""
    pixels = pixels if pixels.dtype == torch.float64 else pixels.float()
    numbers = pixels[~pixels.isnan()].double()
    if len(numbers) == 0:
        return torch.zeros_like(pixels, dtype=torch.bool)
    low, high = numbers.min().item(), numbers.max().item()
    mean = _fixed_order_sum(pixels) / len(numbers)
    if rule == "area":
        last = len(numbers) - 1
        below = last * (1 - alpha * mean) + 0.5
        k = 1 + int(min(max(0.0, below), last))
        quantile = torch.tensor(numbers.kthvalue(k)[0].item(), dtype=pixels.dtype)
        return pixels > quantile.clamp(1e-6, 1 - 1e-6).to(pixels.device)
    if rule == "mean":
        # Rounding must not lift the mean of a constant float64 mask above the mask.
        level = alpha * (min(max(mean, low), high) if mean == mean else mean)
    elif rule == "value":
        level = low + alpha * (high - low)
        level = min(level, high) if alpha <= 1 else level
    else:
        level = _energy_level(numbers, alpha)
    return pixels >= torch.tensor(level, dtype=pixels.dtype, device=pixels.device)


def connected_components_reference(binary: Tensor, connectivity: int = 4) -> Tensor:
    """The same labels in plain PyTorch: the smallest label spreads until nothing changes."""
    B, _, H, W = binary.shape
    kept = (binary != 0) & (binary == binary)
    first = torch.arange(H * W, device=binary.device).view(1, 1, H, W)
    label = torch.where(kept, first, _NOWHERE)
    # Steps to half of the neighbours; the other half is reached by looking back.
    steps = [(0, 1), (1, 0)] + ([(1, 1), (1, -1)] if connectivity == 8 else [])
    while True:
        padded = torch.nn.functional.pad(label, (1, 1, 1, 1), value=_NOWHERE)
        lowest = label
        for dy, dx in [*steps, *((-dy, -dx) for dy, dx in steps)]:
            lowest = lowest.minimum(padded[..., 1 + dy : 1 + dy + H, 1 + dx : 1 + dx + W])
        lowest = torch.where(kept, lowest, _NOWHERE)
        if torch.equal(lowest, label):
            return torch.where(kept, label + 1, 0).int()
        # What a pixel learns, the pixel that names its component learns too, and all that it names.
        table = torch.cat((lowest.view(B, -1), lowest.new_full((B, 1), _NOWHERE)), dim=1)
        named = label.view(B, -1).clamp(max=H * W)
        table = table.scatter_reduce(1, named, lowest.view(B, -1), "amin")
        label = table.gather(1, table[:, :-1].clamp(max=H * W)).view_as(label)


def reference(
    mask: Tensor,
    level: Tensor | None = None,
    rule: str = "mean",
    alpha: float = 1.0,
    connectivity: int = 4,
    component: str = "largest",
) -> tuple[Tensor, Tensor]:
    """The same boxes and areas in plain PyTorch, one mask after the other."""
    boxes = torch.zeros(mask.shape[0], 4, dtype=torch.int32, device=mask.device)
    area = torch.zeros(mask.shape[0], dtype=torch.int32, device=mask.device)
    for b, image in enumerate(mask.detach()[:, 0]):
        if level is None:
            kept = _keep(image.flatten(), rule, alpha).view_as(image)
        else:
            wide = torch.float64 if mask.dtype == torch.float64 else torch.float32
            kept = image.to(wide) >= level[b].to(wide)
        if component == "largest" and kept.any():
            labels = connected_components_reference(kept[None, None], connectivity)[0, 0]
            sizes = labels[kept].long().bincount()
            kept = labels == sizes.argmax()
        if kept.any():
            y, x = kept.nonzero().T
            boxes[b] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            area[b] = kept.sum()
    return boxes, area


def _check_connectivity(op: str, connectivity: object) -> None:
    if isinstance(connectivity, bool) or connectivity not in (4, 8):
        raise ValueError(f"{op}: expected `connectivity` to be 4 or 8, got {connectivity!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"mask_boxes: expected `{name}` to be one of {listed}, got {value!r}")


def _check_size(op: str, name: str, tensor: Tensor) -> None:
    H, W = tensor.shape[2:]
    if H * W >= 2**30 or H * -(-W // 64) >= 2**25:
        raise ValueError(
            f"{op}: expected images of `{name}` with fewer than 2^30 pixels in fewer than 2^25 "
            f"words of 64 of a row, got {shape_of(tensor)}"
        )


def _check_level(level: object, mask: Tensor) -> Tensor:
    if not isinstance(level, Tensor):
        raise TypeError(
            f"mask_boxes: expected `level` to be a tensor or None, got {type(level).__name__}"
        )
    if level.shape != mask.shape[:1]:
        raise ValueError(
            f"mask_boxes: expected `level` of shape [{mask.shape[0]}], got {shape_of(level)}"
        )
    if not level.is_floating_point():
        got = str(level.dtype).removeprefix("torch.")
        raise TypeError(f"mask_boxes: expected `level` in a floating dtype, got {got}")
    if level.device != mask.device:
        raise ValueError(
            f"mask_boxes: expected `level` on the device of `mask` ({mask.device}), "
            f"got {level.device}"
        )
    return level.to(torch.float64 if mask.dtype == torch.float64 else torch.float32)


@specified_by(reference)
def mask_boxes(
    mask: Tensor,
    level: Tensor | None = None,
    rule: str = "mean",
    alpha: float = 1.0,
    connectivity: int = 4,
    component: str = "largest",
) -> tuple[Tensor, Tensor]:
    """Box and area of the largest connected component of each mask of a batch.

    Args:
        mask: Masks, ``[B, 1, H, W]``, usually in [0, 1]. NaN pixels are never kept and count in no
            statistic of a rule.
        level: Levels, ``[B]``: pixels ``>=`` them are kept. Given, they stand in the place of
            `rule` and `alpha`. Compared in float32, or in float64 for float64 masks. A level of
            NaN keeps nothing.
        rule: How a level is found, see the head of this module: ``mean`` (a constant mask keeps
            every pixel), ``area``, ``value`` or ``energy``.
        alpha: Factor of the rule, at least 0, for ``energy`` at most 1.
        connectivity: 4 (neighbours share a side) or 8 (or a corner).
        component: ``largest``: the component with most pixels, among equals the one whose first
            pixel comes first in raster order. ``all``: everything that is kept.

    Returns:
        Boxes ``(x0, y0, x1, y1)``, half-open, int32 ``[B, 4]``, and the number of pixels of the
        component (of all that is kept), int32 ``[B]``. Zeros where nothing is kept.

    Raises:
        TypeError: An argument of a wrong type, or a mask in a dtype without kernels.
        ValueError: A wrong shape, a choice that does not exist, or `alpha` out of range.

    Not differentiable: the results are integers. Exact for every mask, bitwise equal on every
    device, and no call waits for a device.
    """
    check_tensor("mask_boxes", "mask", mask, "[B, 1, H, W]", channels=1)
    _check_size("mask_boxes", "mask", mask)
    _check_choice("rule", rule, RULES)
    _check_choice("component", component, COMPONENTS)
    _check_connectivity("mask_boxes", connectivity)
    alpha = check_number(
        "mask_boxes", "alpha", alpha, at_least=0, at_most=1 if rule == "energy" else math.inf
    )
    if level is not None:
        level = _check_level(level, mask)
    boxes, area = torch.ops.casm_fast.mask_boxes(mask, level, rule, alpha, connectivity, component)
    return boxes, area


@specified_by(connected_components_reference)
def connected_components(binary: Tensor, connectivity: int = 4) -> Tensor:
    """Labels of the connected components of each image of a batch.

    Args:
        binary: Images, ``[B, 1, H, W]``: bool, uint8 or floating; every pixel that is neither zero
            nor NaN is foreground.
        connectivity: 4 (neighbours share a side) or 8 (or a corner).

    Returns:
        Labels, int32 ``[B, 1, H, W]``: the raster number ``y * W + x`` of the first pixel of the
        component, plus one; 0 in the background. Labels are no consecutive numbers.

    Raises:
        TypeError: `binary` is no tensor or has a dtype without kernels.
        ValueError: `binary` is not ``[B, 1, H, W]`` with pixels, or `connectivity` is not 4 or 8.

    Not differentiable. Exact, and bitwise equal on every device.
    """
    check_tensor(
        "connected_components",
        "binary",
        binary,
        "[B, 1, H, W]",
        channels=1,
        also=(torch.bool, torch.uint8),
    )
    _check_size("connected_components", "binary", binary)
    _check_connectivity("connected_components", connectivity)
    labels: Tensor = torch.ops.casm_fast.connected_components(binary, connectivity)
    return labels


def _fake(
    mask: Tensor,
    level: Tensor | None,
    rule: str,
    alpha: float,
    connectivity: int,
    component: str,
) -> tuple[Tensor, Tensor]:
    B = mask.shape[0]
    return mask.new_empty((B, 4), dtype=torch.int32), mask.new_empty(B, dtype=torch.int32)


def _fake_components(binary: Tensor, connectivity: int) -> Tensor:
    return binary.new_empty(binary.shape, dtype=torch.int32)


def register(namespace: str) -> None:
    """Gives the operators in `namespace` their fakes."""
    torch.library.register_fake(f"{namespace}::mask_boxes", _fake)
    torch.library.register_fake(f"{namespace}::connected_components", _fake_components)


register("casm_fast")
