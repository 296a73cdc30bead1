"""How far masks are from regions of given areas, whatever their shapes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

TIED = 1e-5
"""Pixels whose masks differ by so little share their places in the order, which rounding would deal
out otherwise: where all parameters are 1, the mask repeats itself in every cell."""


def ranked_area(masks: Tensor, areas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The area loss of masks and its gradient (section 3.2, R_a).

    The sorted mask is compared with ``floor((1 - a) N)`` zeros followed by ones, so that a pixel
    is pulled to 1 if it is among the largest, else to 0. Pixels that are tied at the border of the
    two share the ones that are left: their gradient is the mean over all orders.

    Args:
        masks: ``[B, A, H, W]``.
        areas: A shares in (0, 1].

    Returns:
        The mean squared differences, ``[B, A]``, and the gradient of their sum,
        ``[B, A, H, W]``.
    """
    values = masks.flatten(2)
    count = values.shape[2]
    zeros = [math.floor(count * (1 - area)) for area in areas]
    border = torch.stack(
        [values[:, n].kthvalue(zero + 1, dim=1).values for n, zero in enumerate(zeros)], dim=1
    )[:, :, None]
    above, level = values > border + TIED, values >= border - TIED
    ones = _column(tuple(count - zero for zero in zeros), masks.device)
    larger = above.sum(dim=2, keepdim=True)
    tied = level.sum(dim=2, keepdim=True) - larger
    share = (ones - larger).to(values) / tied
    pulled_to = torch.where(above, 1.0, torch.where(level, share, 0.0))
    difference = values - pulled_to
    # A tied pixel is 1 in a share of the orders: t (m - 1)^2 + (1 - t) m^2.
    spread = (pulled_to - pulled_to.square()).sum(dim=2)
    loss = (difference.square().sum(dim=2) + spread) / count
    return loss, (2 / count * difference).view_as(masks)


@functools.lru_cache
@torch.inference_mode(False)
def _column(values: tuple[int, ...], device: torch.device) -> Tensor:
    """``[A, 1]``; kept, because the copy to a GPU would wait for it at every step."""
    return torch.tensor(values, device=device)[:, None]
