"""Masks that cannot help being smooth: the smooth max-convolution of a few parameters.

Fong, Patrick & Vedaldi 2019, section 3.2. A small grid p of parameters in [0, 1], one cell every
`cell` pixels, becomes a mask by taking, at each pixel u, the largest of the kernels around the
cells v, softly::

    m(u) = smax_v k(|u - v| / sigma) p(v),   smax f = sum f exp(c f) / sum exp(c f)
    k(z) = exp(-2 max(0, z - 1/2)^2)

k is 1 on a disc of radius sigma / 2 and falls off like a Gaussian of deviation sigma / 2: where one
parameter is 1, at least such a disc is shown. c is the coldness, 1 / T. The maximum goes over the
cells that lie at most ``1 + ceil(sigma / cell)`` cells beside the pixel's own, per axis; those
beyond the border are 0.

Pixels at the same place inside their cells have the same kernels, so that a mask is ``cell^2``
products of a table with the neighbourhoods of cells. They are worked through some places at a time,
and again for the gradient, which takes less time than keeping them would take memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast.models.memory import slices

ON_CPU, ON_GPU = 2**20, 2**28
"""Bytes of values that are worked on at a time: what a core's cache holds, what fills a GPU."""


class SmoothMax:
    """The way from parameters to masks of one size, and that of gradients back.

    Attributes:
        grid: (h, w) of the parameters, ``ceil(H / cell)`` by ``ceil(W / cell)``.
        radius: Cells on each side of a pixel's own among which the maximum is taken.

    Args:
        size: (H, W) of the masks.
        cell: Pixels per cell and axis.
        sigma: Of the kernel, in pixels.
        coldness: c, above 0; the maximum is the harder the larger.
        like: Gives dtype and device.
    """

    def __init__(
        self, size: tuple[int, int], cell: int, sigma: float, coldness: float, like: Tensor
    ) -> None:
        self.size, self.cell, self.coldness = size, cell, coldness
        self.radius = 1 + math.ceil(sigma / cell)
        self.grid = (math.ceil(size[0] / cell), math.ceil(size[1] / cell))
        inside = torch.arange(cell, dtype=torch.float64) - (cell - 1) / 2
        centres = cell * torch.arange(-self.radius, self.radius + 1, dtype=torch.float64)
        along = (inside[:, None] - centres).square()  # [cell, 2 r + 1]
        squares = along[:, None, :, None] + along[None, :, None, :]
        beyond = (squares.sqrt() / sigma - 0.5).clamp(min=0)
        # [places inside a cell, neighbours]
        self.kernels = torch.exp(-2 * beyond.square()).flatten(2).flatten(0, 1).to(like)

    def masks(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Make masks.

        Args:
            parameters: ``[n, 1, h, w]`` in [0, 1].

        Returns:
            The masks, ``[n, 1, H, W]`` in [0, 1], and each pixel's sum of exp(c f), for `pull`.
        """
        masks, sums = [], []
        for _, values, weights in self._values(parameters):
            sums.append(weights.sum(dim=2))
            masks.append(weights.mul_(values).sum(dim=2).div_(sums[-1]))
        return self._as_images(torch.cat(masks, dim=1)), self._as_images(torch.cat(sums, dim=1))

    def pull(self, parameters: Tensor, masks: Tensor, sums: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the masks brought back to their parameters.

        ``dm / df_v = exp(c f_v) (1 + c (f_v - m)) / sum exp(c f)``.

        Args:
            parameters: ``[n, 1, h, w]``.
            masks: What `masks` made of them,
            sums: and beside them.
            gradient: ``[n, 1, H, W]``.

        Returns:
            ``[n, 1, h, w]``.
        """
        (h, w), side = self.grid, 2 * self.radius + 1
        outer = self._as_cells(self.coldness * gradient / sums)
        inner = self._as_cells(1 / self.coldness - masks)
        pulled = parameters.new_zeros(len(parameters), side * side, h * w)
        for part, values, weights in self._values(parameters):
            weights.mul_(values.add_(inner[:, part, None])).mul_(outer[:, part, None])
            for place, kernel in enumerate(self.kernels[part]):
                pulled.addcmul_(weights[:, place], kernel[:, None])
        return F.fold(pulled, self.grid, side, padding=self.radius)

    def _values(self, parameters: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Of some places inside a cell: f and exp(c f), ``[n, places, neighbours, h w]``."""
        around = F.unfold(parameters, 2 * self.radius + 1, padding=self.radius)[:, None]
        most = ON_GPU if parameters.is_cuda else ON_CPU
        for part in slices(len(self.kernels), max(1, most // around.nbytes)):
            values = self.kernels[part, :, None] * around
            yield part, values, values.mul(self.coldness).exp_()

    def _as_images(self, cells: Tensor) -> Tensor:
        """``[n, places, h w]`` -> ``[n, 1, H, W]``."""
        h, w = self.grid
        n, cell = len(cells), self.cell
        large = cells.view(n, cell, cell, h, w).permute(0, 3, 1, 4, 2)
        large = large.reshape(n, 1, h * cell, w * cell)
        return large[..., : self.size[0], : self.size[1]].contiguous()

    def _as_cells(self, images: Tensor) -> Tensor:
        """The way back; beyond the border 0."""
        (h, w), cell = self.grid, self.cell
        (H, W) = self.size
        full = F.pad(images, (0, w * cell - W, 0, h * cell - H))
        cells = full.view(len(images), h, cell, w, cell).permute(0, 2, 4, 1, 3)
        return cells.reshape(len(images), cell * cell, h * w)
