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
products of a table with the neighbourhoods of cells. They are worked through row by row of a cell,
and again for the gradient, which needs less time than keeping them needs memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


class SmoothMax:
    """The way from parameters to masks of one size, and that of gradients back.

    Attributes:
        grid: (h, w) of the parameters, ``ceil(H / cell)`` by ``ceil(W / cell)``.
        radius: Cells on each side of a pixel's own among which the maximum is taken.

    Args:
        size: (H, W) of the masks.
        cell: Pixels per cell and axis.
        sigma: Of the kernel, in pixels.
        coldness: c; the maximum is the harder the larger.
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
        # [row inside a cell, column inside it, neighbours]
        self.kernels = torch.exp(-2 * beyond.square()).flatten(2).to(like)

    def masks(self, parameters: Tensor) -> Tensor:
        """``[n, 1, h, w]`` -> ``[n, 1, H, W]``, both in [0, 1]."""
        rows = []
        for _, values, weights in self._rows(parameters):
            total = weights.sum(dim=2)
            rows.append(values.mul_(weights).sum(dim=2).div_(total))
        return self._as_images(torch.stack(rows, dim=1))

    def pull(self, parameters: Tensor, masks: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the masks brought back to their parameters.

        ``dm / df_v = exp(c f_v) (1 + c (f_v - m)) / sum exp(c f)``.

        Args:
            parameters: ``[n, 1, h, w]``.
            masks: What `masks` made of them.
            gradient: ``[n, 1, H, W]``.

        Returns:
            ``[n, 1, h, w]``.
        """
        c, side, (h, w) = self.coldness, 2 * self.radius + 1, self.grid
        made, wanted = self._as_cells(masks), self._as_cells(gradient)
        pulled = parameters.new_zeros(len(parameters), side * side, h * w)
        for row, values, weights in self._rows(parameters):
            scale = wanted[:, row] / weights.sum(dim=2)
            values.sub_(made[:, row, :, None]).mul_(c).add_(1).mul_(weights)
            values.mul_(scale[:, :, None]).mul_(self.kernels[row][:, :, None])
            pulled.add_(values.sum(dim=1))  # over the columns inside a cell
        return F.fold(pulled, self.grid, side, padding=self.radius)

    def _rows(self, parameters: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each row inside a cell: f and exp(c f), ``[n, cell, neighbours, h w]``."""
        around = F.unfold(parameters, 2 * self.radius + 1, padding=self.radius)
        for row in range(self.cell):
            values = self.kernels[row][:, :, None] * around[:, None]
            yield row, values, values.mul(self.coldness).exp_()

    def _as_images(self, cells: Tensor) -> Tensor:
        """``[n, cell, cell, h w]`` -> ``[n, 1, H, W]``."""
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
        return cells.reshape(len(images), cell, cell, h * w)
