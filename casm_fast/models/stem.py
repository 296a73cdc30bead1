"""The first convolution of a ResNet, in a form whose gradient for the images is cheap on a CPU.

The mask objective, and every method that asks what in an image a classifier needs, takes a gradient
through the first convolution to the images. Their three channels fill three of a CPU's sixteen
lanes, so that this one gradient takes five times as long as as much arithmetic does elsewhere: 46
of the 178 ms that a gradient through a whole ResNet-18 takes (16 images of 112x112, one thread). A
convolution of stride 2 is one of stride 1 on the four pixels of each 2x2 block as channels, twelve
of them; its gradient takes 18 ms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stem_convolution(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """What ``convolution(images)`` gives, up to rounding.

    Args:
        convolution: The module. It is simply called where images want no gradient, where they are
            not on a CPU in float32, and where it has another stride than 2, a kernel below 5x5,
            or hooks.
        images: ``[B, C, H, W]``.

    Returns:
        ``[B, K, h, w]``.
    """
    if not _gains(convolution, images):
        result: Tensor = convolution(images)
        return result
    weight, padding = convolution.weight, int(convolution.padding[0])
    side = weight.shape[-1]
    # Place i of the kernel meets pixel 2 y + i - padding = 2 (y + a) + r of output y: row r of
    # block y + a, with `first` <= a < `first` + `blocks`.
    first = -((padding + 1) // 2)
    blocks = (side - 1 - padding) // 2 - first + 1
    before = -2 * first - padding
    after = 2 * blocks - side - before
    by_block = F.pixel_unshuffle(F.pad(weight, (before, after, before, after)), 2)
    # Rows and columns that the outputs read; a negative one cuts off what none of them does.
    pads = [
        (-2 * first, 2 * ((pixels + 2 * padding - side) // 2 + blocks + first) - pixels)
        for pixels in images.shape[-2:]
    ]
    pixels = F.pixel_unshuffle(F.pad(images, (*pads[1], *pads[0])), 2)
    order = (
        torch.channels_last
        if images.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    return F.conv2d(
        pixels.contiguous(memory_format=order),
        by_block.contiguous(memory_format=order),
        convolution.bias,
    )


def _gains(convolution: nn.Conv2d, images: Tensor) -> bool:
    """Whether the other form is possible here, and faster."""
    watched = any(
        getattr(convolution, hooks)
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    )
    return (
        images.requires_grad
        and torch.is_grad_enabled()
        and images.device.type == "cpu"
        and images.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not watched
        and convolution.kernel_size in ((5, 5), (7, 7))
        and convolution.stride == (2, 2)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and convolution.padding in ((0, 0), (1, 1), (2, 2), (3, 3))
    )
