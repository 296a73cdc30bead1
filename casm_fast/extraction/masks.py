"""Masks: the pixels of the original picture that a box is drawn around, as COCO's run lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast import ops
from casm_fast.data.geometry import Geometry, cells_of
from casm_fast.data.predictions import Convention


def boxed(saliency: Tensor, convention: Convention) -> Tensor:
    """The cells that a box is drawn around: what the rule keeps, or its largest component.

    Args:
        saliency: ``[B, 1, h, w]`` floating.
        convention: Box rule.

    Returns:
        ``[B, 1, h, w]`` bool; their extent and number are what `casm_fast.ops.mask_boxes` gives.
    """
    flat = saliency.flatten(1)
    _, area = ops.mask_boxes(
        saliency, rule=convention.rule, alpha=convention.alpha, component="all"
    )
    count = area.long()[:, None]
    # Whatever the rule, it keeps the highest cells; their number says down to which one.
    levels = flat.nan_to_num(-math.inf, math.inf, -math.inf).sort(1, descending=True).values
    kept = (flat >= levels.gather(1, (count - 1).clamp(min=0))) & (count > 0)
    kept = kept.view_as(saliency)
    if convention.component == "all":
        return kept
    labels = ops.connected_components(kept, convention.connectivity)
    cells = flat.shape[1]
    sizes = flat.new_zeros(len(flat), cells + 1, dtype=torch.int64)
    sizes.scatter_add_(1, labels.flatten(1).long(), torch.ones_like(flat, dtype=torch.int64))
    sizes[:, 0] = 0
    # Among equals the smallest label, which is that of the first pixel.
    order = sizes * (cells + 1) - torch.arange(cells + 1, device=sizes.device)
    return kept & (labels == order.argmax(1)[:, None, None, None])


def run_lengths(maps: NDArray[np.uint8], geometries: Sequence[Geometry], size: int) -> list[str]:
    """Cells as COCO's compressed run lengths of the original pictures' pixels.

    A pixel belongs to the cell that its centre lies in; beyond the network's square nothing is set.

    Args:
        maps: ``[B, h, w]``, 0 or 1.
        geometries: Of the B pictures.
        size: Side of the network's square.
    """
    from pycocotools import mask as codec

    # COCO runs down the columns. The last row and column of zeros are those of the number -1.
    columns = np.pad(maps, ((0, 0), (0, 1), (0, 1))).transpose(0, 2, 1)
    height, width = maps.shape[1:]
    encoded = []
    for cells, where in zip(columns, geometries, strict=True):
        across = cells_of(where.width, where.scale_x, where.offset_x, size, width)
        down = cells_of(where.height, where.scale_y, where.offset_y, size, height)
        mask = cells.take(down, axis=1).take(across, axis=0).T  # whole columns are copied
        encoded.append(codec.encode(mask)["counts"].decode("ascii"))
    return encoded
