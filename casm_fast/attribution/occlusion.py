"""Occlusion: how far the score falls while a part of the image is hidden.

``occlusion`` (Zeiler & Fergus 2014; supplement of Fong & Vedaldi 2017, section 3) hides squares of
35x35 pixels under the mean colour, which is 0 after normalisation. Their upper left corners lie
every 8 pixels from the image's own on, while they lie in the image, as in the authors' code: on
224x224 at 0, 8, ..., 216, which makes 28 x 28 = 784 squares, cut off at the right and lower border.
``blur_occlusion`` (supplement, 4.1) shows the image blurred by sigma 10 within discs of diameter
35, at the places of those squares, whose edges are softened by sigma 10. Each pixel gets the mean
of what the hiding of it cost, weighed by the occluders ``m_n`` (1 hides)::

    map[y, x] = s(image) - sum_n m_n[y, x] s(occluded_n) / sum_n m_n[y, x]

A pixel that no occluder reaches, with a stride above the size, gets 0.

``variable_occlusion`` (supplement, 4.1) draws 784 softened discs instead: the area log-normal
(7.5060, 1.2848), the centre's y normal (116.0759, 47.5054), its x uniform over the width. Of the
tenth of them that leaves the lowest scores the one of the smallest radius wins, and its centre is
the paper's point. The map says more and has its maximum there: a pixel belongs to the smallest disc
of that tenth which covers it, the r-th smallest of k (from 0), and gets ``(k - r - d / R) / k``,
d its distance from the disc's centre and R the radius; 0 where none of them is.

Lengths are those of images of 224x224, and in proportion to the diagonal on others: a square covers
the same share of the picture, and their number stays about 784. Every length can be given in
pixels. Areas and the centre's y follow the image's area and height. The occluders are the same for
all images::

    casm_fast.attribute("occlusion", classifier, images, targets)
    casm_fast.attribute("occlusion", classifier, images, targets, size=16, stride=4)
    casm_fast.attribute("variable_occlusion", classifier, images, targets, seed=1)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from casm_fast import ops
from casm_fast.attribution.problem import Method, Problem
from casm_fast.attribution.proportion import SIDE, in_proportion
from casm_fast.models.memory import slices

SIZE = 35.0
"""Side of the squares and diameter of the discs."""
STRIDE = 8.0
SOFTENING = 10.0
"""Gaussian over the edge of a disc."""
BLUR = 10.0
"""Gaussian of the blurred image within a disc."""


def _check_positive(method: str, **lengths: float | None) -> None:
    for name, length in lengths.items():
        if length is not None and not (length > 0 and math.isfinite(length)):
            raise ValueError(f"{method}: expected {name} above 0, got {length}")


def _check_not_negative(method: str, **lengths: float | None) -> None:
    for name, length in lengths.items():
        if length is not None and not (length >= 0 and math.isfinite(length)):
            raise ValueError(f"{method}: expected {name} of at least 0, got {length}")


@dataclass(frozen=True)
class SquareOptions:
    """Of ``occlusion``."""

    size: int | None = None
    """Side of the squares in pixels, no larger than the image; None: 35 on images of 224, in
    proportion to the diagonal on others."""

    stride: int | None = None
    """Pixels from one square to the next; None: 8, in proportion likewise."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _check_positive("occlusion", size=self.size, stride=self.stride)


@dataclass(frozen=True)
class DiscOptions:
    """Of ``blur_occlusion``."""

    diameter: float | None = None
    """Of the discs in pixels; None: 35 on images of 224, in proportion to the diagonal on
    others."""

    stride: int | None = None
    """Pixels from one disc to the next; None: 8, in proportion likewise."""

    softening: float | None = None
    """Standard deviation of the Gaussian over the discs in pixels; None: 10, likewise."""

    blur_sigma: float | None = None
    """Standard deviation of the image's blur in pixels; None: 10, likewise."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _check_positive("blur_occlusion", diameter=self.diameter, stride=self.stride)
        _check_not_negative("blur_occlusion", softening=self.softening, blur_sigma=self.blur_sigma)


@dataclass(frozen=True)
class VariableOptions:
    """Of ``variable_occlusion``; the distributions are those of images of 224x224."""

    count: int = 784
    """Discs."""

    share: float = 0.1
    """Of the discs, those that leave the lowest scores, above 0 and at most 1."""

    log_area: tuple[float, float] = (7.5060, 1.2848)
    """Mean and standard deviation of the logarithm of the area in square pixels."""

    row: tuple[float, float] = (116.0759, 47.5054)
    """Mean and standard deviation of the centre's y."""

    softening: float | None = None
    """Standard deviation of the Gaussian over the discs in pixels; None: 10 on images of 224, in
    proportion to the diagonal on others."""

    blur_sigma: float | None = None
    """Standard deviation of the image's blur in pixels; None: 10, in proportion likewise."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _check_positive("variable_occlusion", count=self.count)
        if not 0 < self.share <= 1:
            raise ValueError(
                f"variable_occlusion: expected share above 0 and at most 1, got {self.share}"
            )
        _check_not_negative(
            "variable_occlusion", softening=self.softening, blur_sigma=self.blur_sigma
        )


def squares(problem: Problem, options: SquareOptions) -> Tensor:
    """``occlusion``: see the module; ``[B, 1, H, W]`` in units of the score."""
    images = problem.images
    H, W = images.shape[2:]
    size = _whole(options.size, SIZE, (H, W))
    if size > min(H, W):
        raise ValueError(
            f"occlusion: expected size of at most {min(H, W)} pixels, the shorter side of the "
            f"images, got {size}"
        )
    corners = [_corners(side, options.stride, (H, W), images) for side in (H, W)]
    rows, columns = (
        (torch.arange(side, device=images.device) - at[:, None]).div(size, rounding_mode="floor")
        == 0
        for side, at in zip((H, W), corners, strict=True)
    )  # [n_y, H] and [n_x, W], where a square hides
    wide = len(columns)

    def occluded(who: Tensor, which: Tensor) -> Tensor:
        hidden = rows[which // wide, :, None] & columns[which % wide, None, :]
        return ops.blend(images[who], None, (~hidden)[:, None].to(images.dtype))

    drops = _drops(problem, len(rows) * wide, occluded).view(-1, len(rows), wide)
    down, across = rows.double(), columns.double()
    # A square is a product of its rows and columns: the sum over all needs none of them whole.
    total = down.T @ drops @ across
    number = down.sum(dim=0)[:, None] * across.sum(dim=0)
    return _mean(total, number, images)


def discs(problem: Problem, options: DiscOptions) -> Tensor:
    """``blur_occlusion``: see the module; ``[B, 1, H, W]`` in units of the score."""
    images = problem.images
    size = images.shape[2:]
    diameter = options.diameter or in_proportion(SIZE, size)
    softening = _length(options.softening, SOFTENING, size)
    rows, columns = (
        _corners(side, options.stride, size, images) + (diameter - 1) / 2 for side in size
    )
    wide, count = len(columns), len(rows) * len(columns)
    radius = torch.full((count,), diameter / 2, dtype=torch.float64, device=images.device)
    place = torch.arange(count, device=images.device)
    centres = torch.stack([rows[place // wide], columns[place % wide]], dim=1)
    drops = _drops(problem, count, _under(images, centres, radius, softening, options.blur_sigma))
    total = torch.zeros(len(images), *size, dtype=torch.float64, device=images.device)
    number = total[0].clone()
    for part in slices(count, problem.batch_size):
        soft = soft_discs(centres[part], radius[part], softening, images)[:, 0].double()
        total += torch.tensordot(drops[:, part], soft, dims=1)
        number += soft.sum(dim=0)
    return _mean(total, number, images)


def variable(problem: Problem, options: VariableOptions) -> Tensor:
    """``variable_occlusion``: see the module; ``[B, 1, H, W]`` in [0, 1]."""
    images = problem.images
    size = images.shape[2:]
    centres, radius = (drawn.to(images.device) for drawn in draw(problem.seed, size, options))
    softening = _length(options.softening, SOFTENING, size)
    occluded = _under(images, centres - 0.5, radius, softening, options.blur_sigma)
    scores = problem.scores_of_variants(options.count, occluded)
    count = max(1, round(options.share * options.count))
    best = scores.argsort(dim=1, stable=True)[:, :count]  # the most suppressive, [B, k]
    best = best.gather(1, radius[best].argsort(dim=1, stable=True))  # the smallest first
    rows, columns = (torch.arange(side, device=images.device) for side in size)
    # The pixel that holds the centre, or is next to one beside the image.
    last = torch.tensor(size, device=images.device) - 1
    middle = centres.floor().long().clamp(min=torch.zeros_like(last), max=last)[best]  # [B, k, 2]
    made = torch.zeros(len(images), *size, dtype=torch.float64, device=images.device)
    for rank in range(count):
        y, x = (middle[:, rank, axis, None, None] for axis in (0, 1))
        distance = torch.hypot((rows[:, None] - y).double(), (columns[None, :] - x).double())
        reach = radius[best[:, rank]][:, None, None]
        level = (count - rank - distance / reach) / count
        made = made.maximum(level.masked_fill((distance >= reach) & (distance > 0), 0))
    return made[:, None].to(images.dtype)


def draw(seed: int, size: tuple[int, ...], options: VariableOptions) -> tuple[Tensor, Tensor]:
    """The discs of ``variable_occlusion``, the same for all images.

    Args:
        seed: Of the draw.
        size: (H, W) of the images.
        options: The distributions.

    Returns:
        Centres (y, x) ``[N, 2]``, where the image reaches from 0 to (H, W), and radii in pixels
        ``[N]``, float64 on the host. A radius follows from the area as sqrt(area / pi).
    """
    H, W = size
    stream = torch.Generator().manual_seed(seed)
    area, row = (
        mean + spread * torch.randn(options.count, generator=stream, dtype=torch.float64)
        for mean, spread in (options.log_area, options.row)
    )
    column = torch.rand(options.count, generator=stream, dtype=torch.float64)
    centres = torch.stack([row * (H / SIDE), column * W], dim=1)
    return centres, (area.exp() * (H * W / SIDE**2) / math.pi).sqrt()


def soft_discs(centres: Tensor, radius: Tensor, softening: float, images: Tensor) -> Tensor:
    """Discs of the size of the images, 1 inside, under a Gaussian that mirrors at the border.

    Args:
        centres: (y, x) in pixels, ``[n, 2]``; (0, 0) is the middle of the first pixel.
        radius: ``[n]`` in pixels; a pixel is inside whose distance is below it.
        softening: Standard deviation of the Gaussian in pixels.
        images: Gives size, dtype and device.

    Returns:
        ``[n, 1, H, W]`` in [0, 1].
    """
    y, x = (
        torch.arange(side, device=images.device) - centres[:, axis, None]
        for axis, side in enumerate(images.shape[2:])
    )
    inside = y.square()[:, :, None] + x.square()[:, None, :] < radius.square()[:, None, None]
    return ops.gaussian_blur(inside[:, None].to(images.dtype), softening).clamp(0, 1)


def _under(
    images: Tensor, centres: Tensor, radius: Tensor, softening: float, blur_sigma: float | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes images that are blurred within soft discs."""
    blurred = ops.gaussian_blur(images, _length(blur_sigma, BLUR, images.shape[2:]))

    def occluded(who: Tensor, which: Tensor) -> Tensor:
        soft = soft_discs(centres[which], radius[which], softening, images)
        return ops.blend(images[who], blurred[who], 1 - soft)

    return occluded


def _drops(problem: Problem, count: int, occluded: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """By how much each occluder lowers the score of each image, ``[B, N]`` float64."""
    before = problem.scores(problem.images).double()
    return before[:, None] - problem.scores_of_variants(count, occluded).double()


def _mean(total: Tensor, number: Tensor, images: Tensor) -> Tensor:
    """The mean over the occluders that reach a pixel, 0 where none does, ``[B, 1, H, W]``."""
    reached = number > 0
    mean = total / torch.where(reached, number, 1.0)
    return torch.where(reached, mean, 0.0)[:, None].to(images.dtype)


def _corners(side: int, stride: int | None, size: tuple[int, ...], images: Tensor) -> Tensor:
    """Where occluders begin along a side, ``[n]``."""
    return torch.arange(0, side, _whole(stride, STRIDE, size), device=images.device)


def _whole(given: int | None, pixels: float, size: tuple[int, ...]) -> int:
    return given if given is not None else max(1, round(in_proportion(pixels, size)))


def _length(given: float | None, pixels: float, size: tuple[int, ...]) -> float:
    return given if given is not None else in_proportion(pixels, size)


METHODS = (
    Method("occlusion", "Occlusion", "Zeiler & Fergus 2014", squares, SquareOptions, uses="scores"),
    Method(
        "blur_occlusion",
        "Blur occlusion",
        "Fong & Vedaldi 2017, supplement 4.1",
        discs,
        DiscOptions,
        uses="scores",
    ),
    Method(
        "variable_occlusion",
        "Variable occlusion",
        "Fong & Vedaldi 2017, supplement 4.1",
        variable,
        VariableOptions,
        uses="scores",
    ),
)
