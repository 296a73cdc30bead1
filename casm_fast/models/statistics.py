"""What is measured of a saliency map, at the network's resolution but from the map's own cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from casm_fast.models.cells import Cells


def entropy_terms(saliency: Tensor) -> Tensor:
    """``-m log2 m`` for every cell, 0 at m = 0.

    Args:
        saliency: ``[...]`` in [0, 1].

    Returns:
        ``[...]``.
    """
    nats: Tensor = torch.special.xlogy(saliency, saliency)
    return nats / -math.log(2)


def measure(saliency: Tensor, rows: Cells, columns: Cells) -> Tensor:
    r"""Mean, total variation and entropies of saliency maps, as if they were at full resolution.

    The total variation is the sum of squared differences between neighbouring pixels, the unit of
    the CASM paper; the entropy is the mean of ``-m log2 m`` (one-sided: the unit of the paper's
    0.05 and 0.21), the full one adds the term of ``1 - m``.

    Args:
        saliency: ``[B, 1, h, w]`` in [0, 1].
        rows: Pixel rows of the cells.
        columns: Pixel columns of the cells.

    Returns:
        ``[B, 4]`` float64: mean, TV, entropy, full entropy.
    """
    m = saliency[:, 0].double()
    row_weights = rows.sizes.to(m.device, torch.float64)
    column_weights = columns.sizes.to(m.device, torch.float64)
    pixels = float(rows.edges[-1] * columns.edges[-1])

    def mean(values: Tensor) -> Tensor:
        total: Tensor = torch.einsum("bhw,w,h->b", values, column_weights, row_weights)
        return total / pixels

    one_sided = entropy_terms(m)
    variation = (m.diff(dim=1).square() @ column_weights).sum(1)
    variation = variation + (row_weights @ m.diff(dim=2).square()).sum(1)
    return torch.stack(
        [mean(m), variation, mean(one_sided), mean(one_sided + entropy_terms(1 - m))], dim=1
    )
