"""How alike two saliency maps are: rank correlation, SSIM, and histograms of their gradients.

The measures of Adebayo et al. 2018 (Sanity checks for saliency maps, section 3):

* "spearman": Spearman's rank correlation of the cells, tied ones with their mean rank;
* "spearman_abs": the same of absolute values, for maps whose sign means little;
* "ssim": mean structural similarity in a 5 x 5 window, of maps divided by their largest absolute
  value, so that they lie in [-1, 1] (data range 2);
* "hog": Pearson's correlation of the histograms of oriented gradients (9 orientations, cells of
  16 x 16 pixels, blocks of 3 x 3 cells) of the same maps, by scikit-image.

A measure is NaN where it is not defined: the correlation with a constant map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from casm_fast.evaluation.maps import Maps, as_maps

MEASURES = ("spearman", "spearman_abs", "ssim", "hog")
"""Every measure by name."""

WINDOW = 5
"""Side of SSIM's window in pixels."""

CELL, BLOCK = 16, 3
"""Side of a cell of the histograms in pixels, and of a block in cells."""

_RANGE = 2.0  # of maps in [-1, 1]


def similarity(
    first: Maps, second: Maps, measures: tuple[str, ...] = MEASURES
) -> dict[str, NDArray[np.float64]]:
    """Measures of how alike the maps of two batches are, one by one.

    Args:
        first: ``[B, 1, h, w]`` or ``[B, h, w]``.
        second: The same shape, on the same device.
        measures: Names out of `MEASURES`.

    Returns:
        ``[B]`` by name, 1 for equal maps.

    Raises:
        ImportError: scikit-image is missing, for "hog".
        ValueError: Shapes differ, maps are too small, or there is no such measure.
    """
    for name in measures:
        if name not in MEASURES:
            raise ValueError(f"measures: expected names out of {', '.join(MEASURES)}, got {name!r}")
    a, b = as_maps("similarity", first).double(), as_maps("similarity", second).double()
    if a.shape != b.shape:
        raise ValueError(
            f"maps: expected two batches of one shape, got {list(a.shape)} and {list(b.shape)}"
        )
    found = {}
    for name in measures:
        if name == "spearman":
            value = spearman(a, b)
        elif name == "spearman_abs":
            value = spearman(a.abs(), b.abs())
        elif name == "ssim":
            value = ssim(_unit(a), _unit(b))
        else:
            value = hog(_unit(a), _unit(b))
        found[name] = value.cpu().numpy()
    return found


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of the cells of maps ``[B, h, w]``: ``[B]``."""
    return correlation(ranks(first.flatten(1)), ranks(second.flatten(1)))


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0 within each row of ``[B, n]``, equal values with their mean rank, in float64."""
    ordered, order = values.sort(dim=1)
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    new = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    last = F.pad(new[:, 1:], (0, 1), value=True)
    # A run of equal values reaches from its first place up to its last one.
    begin = torch.where(new, place, 0).cummax(dim=1).values
    end = torch.where(last, place, values.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    mean = (begin + end).double() / 2
    return torch.empty_like(mean).scatter_(1, order, mean)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of the rows of ``[B, n]``: ``[B]``; NaN where a row is constant."""
    a = first.double() - first.double().mean(dim=1, keepdim=True)
    b = second.double() - second.double().mean(dim=1, keepdim=True)
    squares = a.square().sum(dim=1) * b.square().sum(dim=1)
    flat = (first == first[:, :1]).all(dim=1) | (second == second[:, :1]).all(dim=1)
    value = (a * b).sum(dim=1) / squares.sqrt()
    return torch.where(flat, torch.nan, value.clamp(-1, 1))


def ssim(first: Tensor, second: Tensor, window: int = WINDOW, data_range: float = _RANGE) -> Tensor:
    """Mean structural similarity of maps ``[B, h, w]``: ``[B]``.

    That of Wang et al. 2004 with a uniform window, unbiased variances, K1 = 0.01 and K2 = 0.03, as
    scikit-image computes it; windows lie inside the map.

    Raises:
        ValueError: Maps smaller than the window.
    """
    if min(first.shape[1:]) < window:
        raise ValueError(
            f"ssim: expected maps of at least {window} x {window}, got {list(first.shape[1:])}"
        )
    a, b = first[:, None], second[:, None]
    means = [F.avg_pool2d(values, window, stride=1)[:, 0] for values in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b, square_a, square_b, product = means
    unbiased = window**2 / (window**2 - 1)
    variance_a = unbiased * (square_a - mean_a**2)
    variance_b = unbiased * (square_b - mean_b**2)
    covariance = unbiased * (product - mean_a * mean_b)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (top / bottom).mean(dim=(1, 2))


def hog(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of the histograms of oriented gradients of maps ``[B, h, w]``: ``[B]``.

    Raises:
        ImportError: scikit-image is missing.
        ValueError: Maps smaller than one block.
    """
    try:
        from skimage import feature
    except ImportError as error:
        raise ImportError(
            "hog: expected scikit-image, which makes the histograms, but it is not installed: "
            "pip install 'casm_fast[eval]'"
        ) from error
    if min(first.shape[1:]) < CELL * BLOCK:
        raise ValueError(
            f"hog: expected maps of at least {CELL * BLOCK} x {CELL * BLOCK}, "
            f"got {list(first.shape[1:])}; leave hog out of the measures"
        )

    def histograms(maps: Tensor) -> Tensor:
        rows: list[Any] = [
            feature.hog(one, pixels_per_cell=(CELL, CELL), cells_per_block=(BLOCK, BLOCK))
            for one in maps.cpu().numpy()
        ]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, 1)

    return correlation(histograms(first), histograms(second))


def _unit(maps: Tensor) -> Tensor:
    """Maps divided by their largest absolute value; a map of zeros stays."""
    largest = maps.abs().amax(dim=(1, 2), keepdim=True)
    return maps / torch.where(largest > 0, largest, 1)
