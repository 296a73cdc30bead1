"""Statistics of saliency maps of any origin: volume, spread, total variation, entropy.

Those of CASM's section 6.1, at the resolution that the maps stand for: the mean over the pixels;
the standard deviation of that mean over the images (unbiased); the sum of squared differences
between neighbouring pixels, and the same as means (the scale of the authors' code); and the mean of
``-m log2 m`` in bits, alone (one-sided, the scale of the paper's 0.05 and 0.21) and with the term
of 1 - m. The formulas are those of `casm_fast.models.statistics`, which extraction uses, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.evaluation.intervals import HasIntervals, Interval, bootstrap_means
from casm_fast.evaluation.maps import Maps, as_maps, check_unit
from casm_fast.evaluation.outcomes import PER_IMAGE, paragraph
from casm_fast.models.statistics import Cells, measure

_FORMS: dict[str, tuple[str, str]] = {
    "mean": ("mean saliency", ".3f"),
    "std": ("std of the volume", ".3f"),
    "tv": ("total variation, sum", ".4g"),
    "tv_mean": ("total variation, mean form", ".5f"),
    "entropy": ("entropy one-sided, bits", ".3f"),
    "entropy_full": ("entropy full, bits", ".3f"),
}


@dataclass(frozen=True, eq=False)
class MaskStatistics(HasIntervals):
    """Statistics of B maps. ``str(statistics)`` is the printed table.

    Attributes:
        mean: ``[B]``.
        tv: ``[B]``, sum of squared differences.
        entropy: ``[B]``, one-sided, bits.
        entropy_full: ``[B]``, bits.
        size: ``(H, W)`` that the maps stand for.
        convention: How they were measured.
    """

    mean: NDArray[np.float64] = field(metadata=PER_IMAGE)
    tv: NDArray[np.float64] = field(metadata=PER_IMAGE)
    entropy: NDArray[np.float64] = field(metadata=PER_IMAGE)
    entropy_full: NDArray[np.float64] = field(metadata=PER_IMAGE)
    size: tuple[int, int]
    convention: str

    @property
    def tv_mean(self) -> NDArray[np.float64]:
        """``[B]``: twice the mean squared difference between neighbours.

        For squares that is the mean over vertical neighbours plus the mean over horizontal ones.
        """
        H, W = self.size
        return self.tv / max((H * (W - 1) + W * (H - 1)) / 2, 1)

    def bootstrap(self, **told: Any) -> dict[str, Interval]:
        """Every statistic with its interval; "std" is that of the volume over the images."""
        each = {name: getattr(self, name) for name in _FORMS if name != "std"}
        found = bootstrap_means(each, {"std": self.mean}, **told)
        return {name: found[name] for name in _FORMS}

    def __str__(self) -> str:
        lines = [f"Statistics of {len(self.mean):,} saliency maps", ""]
        for name, (title, form) in _FORMS.items():
            lines.append(f"  {title:<26}  {self.intervals[name].show(form)}")
        return "\n".join([*lines, "", paragraph(self.convention)])


def mask_statistics(maps: Maps, size: tuple[int, int] | None = None) -> MaskStatistics:
    """Statistics of maps, for `join` over the batches of a data set.

    Args:
        maps: ``[B, 1, h, w]`` or ``[B, h, w]`` in [0, 1], 1 = salient.
        size: ``(H, W)`` that they stand for by the nearest rule; None: their own.

    Returns:
        The statistics of each map.

    Raises:
        TypeError: Maps are neither tensor nor array.
        ValueError: Maps are not in [0, 1].
    """
    values = as_maps("mask_statistics", maps)
    h, w = values.shape[1:]
    H, W = size or (h, w)
    check_unit(values)
    table = measure(values[:, None], Cells.of(h, H), Cells.of(w, W)).cpu().numpy()
    mean, tv, entropy, entropy_full = table.T
    return MaskStatistics(
        mean=mean,
        tv=tv,
        entropy=entropy,
        entropy_full=entropy_full,
        size=(H, W),
        convention=(
            f"maps of {h} x {w} cells as {H} x {W} pixels by the nearest rule; mean over the images"
        ),
    )
