"""What the classifier is shown: images through masks, shifted, with hidden pixels replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast import ops
from casm_fast.perturbation.config import VARYING_BLUR, PerturbConfig

LEVELS = 9
"""Blurs between which the spatially varying blur interpolates, denser where they are slight."""

# Each kind of random number has a stream of its own, so that none depends on which others are used.
_SHIFTS, _NOISE, _FIRST_MASK = range(3)


@dataclass(frozen=True)
class Pictures:
    """A batch of images ready to be shown through masks.

    Attributes:
        images: ``[B, C, H + j, W + j]``, j the room for shifts.
        hidden: What replaces them, of the same shape; None is 0.
        levels: For the varying blur: the images blurred by ``sigma * (l / (L - 1))^2`` for
            l = 0 ... L - 1, ``[B, C, H + j, W + j]`` each; empty otherwise.
        size: (H, W), what the classifier sees.
        sigma: Of the masks' up-sampling, in their cells.
        layout: How all of them, and what is shown, lie in memory; preserve_format: as they came.
    """

    images: Tensor
    hidden: Tensor | None
    levels: tuple[Tensor, ...]
    size: tuple[int, int]
    sigma: float
    layout: torch.memory_format = torch.preserve_format

    def laid_out(self, layout: torch.memory_format) -> Pictures:
        """The same pictures in another layout."""
        return replace(self, layout=layout)._each(lambda images: images.to(memory_format=layout))

    def select(self, places: Tensor | slice) -> Pictures:
        """The pictures at some places of the batch."""
        return self._each(lambda images: images[places].to(memory_format=self.layout))

    def enlarged(self, pixels: int) -> Pictures:
        """The pictures at ``[H + pixels, W + pixels]``, bilinear, still seen at ``[H, W]``.

        The authors' 228 x 228 for shifts of 224 x 224.
        """
        if pixels == 0:
            return self
        size = [side + pixels for side in self.size]

        def enlarge(images: Tensor) -> Tensor:
            large = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
            return large.to(memory_format=self.layout)

        return self._each(enlarge)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pictures:
        return replace(
            self,
            images=change(self.images),
            hidden=None if self.hidden is None else change(self.hidden),
            levels=tuple(change(level) for level in self.levels),
        )

    def shown(self, mask: Tensor | None, shift: Tensor) -> Tensor:
        """The images under masks: 1 keeps, 0 replaces.

        Args:
            mask: ``[B, 1, h, w]``; None keeps everything.
            shift: ``[2]`` int32, (y, x): where the window begins, the same for all.

        Returns:
            ``[B, C, H, W]``, in memory of its own. Differentiable in `mask`.
        """
        if mask is None:
            return self._window(self.images, shift)
        if self.levels:
            return self._blurred_by(ops.upsample_mask(mask, self.size, self.sigma), shift)
        offsets = shift.expand(len(mask), 2).contiguous()
        return ops.jitter_mask(self.images, self.hidden, mask, offsets, self.size, self.sigma)

    def _window(self, images: Tensor, shift: Tensor) -> Tensor:
        if images.shape[2:] == self.size:
            return images.clone()
        rows = shift[0] + torch.arange(self.size[0], device=images.device)
        columns = shift[1] + torch.arange(self.size[1], device=images.device)
        window = images.index_select(2, rows).index_select(3, columns)
        return window.to(memory_format=self.layout)

    def _blurred_by(self, mask: Tensor, shift: Tensor) -> Tensor:
        """Each pixel from the two blurs beside its own, ``sigma * (1 - m)``, linearly."""
        place = (1 - mask) * (len(self.levels) - 1) ** 2  # level n lies at n^2
        total = torch.zeros_like(self.images[..., : self.size[0], : self.size[1]])
        for number, level in enumerate(self.levels):
            rising = (place - (number - 1) ** 2) / (2 * number - 1)
            falling = ((number + 1) ** 2 - place) / (2 * number + 1)
            weight = torch.minimum(rising, falling).clamp(min=0)
            total = total + weight * self._window(level, shift)
        return total.to(memory_format=self.layout)


def pictures(
    images: Tensor, config: PerturbConfig, layout: torch.memory_format = torch.preserve_format
) -> Pictures:
    """Images and their replacements, without room for shifts; blurs are computed here, once.

    Args:
        images: ``[B, C, H, W]``, float32 or float64.
        config: Which replacements.
        layout: How they will lie in memory.

    Raises:
        ValueError: The colour has another number of channels.
    """
    hidden: Tensor | None = None
    levels: tuple[Tensor, ...] = ()
    if config.layer is None:
        if config.perturbation == VARYING_BLUR:
            levels = tuple(
                ops.gaussian_blur(images, config.blur_sigma * (number / (LEVELS - 1)) ** 2)
                for number in range(LEVELS)
            )
        else:
            hidden = _mixture(images, config)
    size = (images.shape[2], images.shape[3])
    return Pictures(images, hidden, levels, size, config.mask_sigma).laid_out(layout)


def _mixture(images: Tensor, config: PerturbConfig) -> Tensor | None:
    """The mean of the replacements, ``[B, C, H, W]``; None for zeros."""
    channels = images.shape[1]
    if config.colour is not None and len(config.colour) != channels:
        raise ValueError(
            f"colour: expected {channels} values, one per channel of the images, "
            f"got {len(config.colour)}"
        )
    total: Tensor | None = None
    for kind in config.replacements:
        if kind == "blur":
            part = ops.gaussian_blur(images, config.blur_sigma)
        elif kind == "noise":
            noise = torch.randn(images.shape[1:], generator=_stream(config, _NOISE))
            part = (config.noise_std * noise).to(images).expand_as(images)
        elif config.colour is not None:
            part = images.new_tensor(config.colour)[:, None, None].expand_as(images)
        else:
            continue
        total = part if total is None else total + part
    count = len(config.replacements)
    return total if total is None or count == 1 else total / count


def shifts(config: PerturbConfig) -> Tensor:
    """Where the window begins at each step: ``[steps, 2]`` int32, (y, x) in 0 ... jitter - 1."""
    size = (config.steps, 2)
    drawn = torch.randint(max(config.jitter, 1), size, generator=_stream(config, _SHIFTS))
    return drawn.to(torch.int32)


def random_mask(size: tuple[int, int], config: PerturbConfig) -> Tensor:
    """The random first mask, ``[1, 1, h, w]``."""
    return torch.rand(1, 1, *size, generator=_stream(config, _FIRST_MASK))


def _stream(config: PerturbConfig, kind: int) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed * 3 + kind)
