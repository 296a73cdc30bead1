"""The contours of an 8-bit map above each of its 256 levels: the largest, or all of them.

A contour is a closed path of neighbouring pixels (8) along the border of a connected component (8)
of ``{map > level}``: around it, or around one of its holes (4-connected). These are the contours
that ``cv2.findContours`` lists in the mode ``RETR_TREE``. The area of a contour is that of the
polygon through the centres of its pixels, as of ``cv2.contourArea``: a line a pixel wide has none.

A map has at most 256 different levels, and every evaluation that thresholds it a thousand times
asks for contours at these alone. Both ops find all of them in one sweep over the pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from casm_fast.ops import library  # noqa: F401  (loads the kernels)
from casm_fast.ops.checks import check_tensor, shape_of
from casm_fast.ops.mask_boxes import connected_components_reference
from casm_fast.ops.registry import specified_by

LEVELS = 256


def _extent(mask: Tensor) -> list[int]:
    """The tight box of the pixels of ``[H, W]`` bool, the last pixel included."""
    y, x = mask.nonzero().unbind(1)
    return [int(x.min()), int(y.min()), int(x.max()), int(y.max())]


def _parts(mask: Tensor, connectivity: int) -> list[Tensor]:
    """The connected components of ``[H, W]`` bool, each as such a mask, in raster order."""
    labels = connected_components_reference(mask[None, None], connectivity)[0, 0]
    return [labels == label for label in sorted(set(labels[mask].tolist()))]


def _holes(mask: Tensor) -> list[Tensor]:
    """The components of the complement of ``[H, W]`` bool that do not touch the map's border."""
    parts = _parts(~mask, 4)
    return [p for p in parts if not (p[0].any() or p[-1].any() or p[:, 0].any() or p[:, -1].any())]


def _twice_area(solid: Tensor) -> int:
    """Twice the area of the polygon through the border pixels of ``[H, W]``, without holes."""
    squares = torch.nn.functional.avg_pool2d(solid[None, None].double(), 2, 1) * 4
    return int((squares == 4).sum() * 2 + (squares == 3).sum())


def contour_boxes_reference(maps: Tensor) -> Tensor:
    """The same boxes in plain PyTorch, one level after the other."""
    boxes = torch.zeros(len(maps), LEVELS, 4, dtype=torch.int32)
    for b, image in enumerate(maps[:, 0]):
        for level in range(int(image.max())):
            if level > 0 and not (image == level).any():
                boxes[b, level] = boxes[b, level - 1]  # the same pixels
                continue
            kept = image > level
            components = _parts(kept, 8)
            # With its holes filled a component is what it surrounds.
            solid = [torch.stack([part, *_holes(part)]).any(0) for part in components]
            # Among equals the last in raster order; padded, so that a line has squares too.
            padded = [torch.nn.functional.pad(s, (0, 1, 0, 1)) for s in solid]
            largest = max(range(len(solid)), key=lambda i: (_twice_area(padded[i]), i))
            x0, y0, x1, y1 = _extent(components[largest])
            boxes[b, level] = torch.tensor([x0, y0, x1 + 1, y1 + 1])
    return boxes


def contour_overlap_reference(maps: Tensor, boxes: Tensor, owners: Tensor) -> Tensor:
    """The same overlaps in plain PyTorch, one level after the other."""
    H, W = maps.shape[2:]
    overlap = torch.zeros(len(maps), LEVELS, dtype=torch.float64)
    for b, image in enumerate(maps[:, 0]):
        truth = boxes[owners == b].long()
        if len(truth) == 0:
            continue
        for level in range(LEVELS):
            if level > 0 and not (image == level).any():
                overlap[b, level] = overlap[b, level - 1]  # the same pixels
                continue
            kept = image > level
            found = [_extent(part) for part in _parts(kept, 8)]
            for hole in _holes(kept) if found else []:
                x0, y0, x1, y1 = _extent(hole)
                found.append([x0 - 1, y0 - 1, x1 + 1, y1 + 1])
            extents = torch.tensor(found or [[0, 0, -1, -1]])
            extents[:, 2:] += 1
            extents[:, 2:] = extents[:, 2:].minimum(torch.tensor([W - 1, H - 1]))
            overlap[b, level] = _inclusive_iou(extents[:, None], truth[None]).max()
    return overlap


def _inclusive_iou(first: Tensor, second: Tensor) -> Tensor:
    """Overlap of boxes whose last pixel is included, int64 ``[..., 4]``, by broadcasting."""
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    shared = (high - low + 1).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2] + 1).prod(-1) for box in (first, second)]
    together = areas[0] + areas[1] - shared
    return torch.where(together > 0, shared.double() / together.double(), 0.0)


def _check_maps(op: str, maps: object) -> None:
    if isinstance(maps, Tensor) and maps.device.type != "cpu":
        raise ValueError(
            f"{op}: expected `maps` on the CPU, where its kernel is, got {maps.device}; "
            "use maps.cpu()"
        )
    if isinstance(maps, Tensor) and maps.dtype != torch.uint8:
        got = str(maps.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: expected `maps` in uint8, got {got}")
    tensor = check_tensor(op, "maps", maps, "[B, 1, H, W]", channels=1, also=(torch.uint8,))
    if (tensor.shape[2] + 2) * (tensor.shape[3] + 2) >= 2**30:
        raise ValueError(
            f"{op}: expected `maps` with fewer than 2^30 pixels each, got {shape_of(tensor)}"
        )


@specified_by(contour_boxes_reference)
def contour_boxes(maps: Tensor) -> Tensor:
    """The box of the contour with the largest area, at each of the 256 levels of each map.

    Args:
        maps: uint8 ``[B, 1, H, W]``, on the CPU.

    Returns:
        Boxes ``(x0, y0, x1, y1)``, half-open, int32 ``[B, 256, 4]``: entry ``level`` is about
        ``{map > level}``, zeros where no pixel is larger. Among contours of equal area it is the
        one whose first pixel comes last in raster order: the first that OpenCV lists, so that
        ``max(contours, key=cv2.contourArea)`` is the same contour.

    Raises:
        TypeError: `maps` is no tensor, or not in uint8.
        ValueError: `maps` is not ``[B, 1, H, W]`` with pixels, or not on the CPU.

    Not differentiable. Exact, and the same in every batch.
    """
    _check_maps("contour_boxes", maps)
    boxes: Tensor = torch.ops.casm_fast.contour_boxes(maps)
    return boxes


@specified_by(contour_overlap_reference)
def contour_overlap(maps: Tensor, boxes: Tensor, owners: Tensor) -> Tensor:
    """The best overlap of any contour's box with any true box, at each of the 256 levels.

    Boxes have the convention of Choe et al. 2020 ("Evaluating weakly supervised object localization
    methods right"), whose metric this serves: with `(x, y, w, h)` the bounding rectangle of a
    contour, around a component or a hole, its box is ``(x, y, min(x + w, W - 1), min(y + h, H -
    1))``, where no pixel is larger than the level it is (0, 0, 0, 0), and both ends of a box count
    as inside, so that sides are ``x1 - x0 + 1``.

    Args:
        maps: uint8 ``[B, 1, H, W]``, on the CPU.
        boxes: True boxes ``(x0, y0, x1, y1)``, the last pixel included, int32 ``[N, 4]``.
        owners: The map that each belongs to, int64 ``[N]``, in any order.

    Returns:
        Intersection over union in [0, 1], float64 ``[B, 256]``: entry ``level`` is about ``{map >
        level}``. Zeros for a map without true boxes.

    Raises:
        TypeError: An argument is no tensor, or in another dtype.
        ValueError: A wrong shape or device, or `owners` names no map.

    Not differentiable. Exact, and the same in every batch.
    """
    _check_maps("contour_overlap", maps)
    for name, value, dtype in (("boxes", boxes, torch.int32), ("owners", owners, torch.int64)):
        if not isinstance(value, Tensor) or value.dtype != dtype:
            wanted = str(dtype).removeprefix("torch.")
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            got = str(kind).removeprefix("torch.")
            raise TypeError(f"contour_overlap: expected `{name}` in {wanted}, got {got}")
        if value.device.type != "cpu":
            raise ValueError(
                f"contour_overlap: expected `{name}` on the CPU, like `maps`, got {value.device}"
            )
    if boxes.dim() != 2 or boxes.shape[1] != 4 or owners.shape != boxes.shape[:1]:
        raise ValueError(
            "contour_overlap: expected `boxes` of shape [N, 4] and `owners` of shape [N], "
            f"got {shape_of(boxes)} and {shape_of(owners)}"
        )
    try:
        overlap: Tensor = torch.ops.casm_fast.contour_overlap(maps, boxes, owners)
    except RuntimeError as error:
        raise ValueError(
            f"contour_overlap: expected `owners` from 0 to {len(maps) - 1}, "
            f"got {int(owners.min())} to {int(owners.max())}"
        ) from error
    return overlap


def _fake_boxes(maps: Tensor) -> Tensor:
    return maps.new_empty((maps.shape[0], LEVELS, 4), dtype=torch.int32)


def _fake_overlap(maps: Tensor, boxes: Tensor, owners: Tensor) -> Tensor:
    return maps.new_empty((maps.shape[0], LEVELS), dtype=torch.float64)


def register(namespace: str) -> None:
    """Gives the operators in `namespace` their fakes."""
    torch.library.register_fake(f"{namespace}::contour_boxes", _fake_boxes)
    torch.library.register_fake(f"{namespace}::contour_overlap", _fake_overlap)


register("casm_fast")
