"""Pixels of a picture to the network's input."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.data.decoding import Reduced, size_of
from casm_fast.data.geometry import Policy, check_policy

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's training pixels in [0, 1], RGB; what torchvision's classifiers expect."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Their standard deviation."""


ELONGATED = 16
"""Longer pictures are not scaled as a whole."""


def resize(image: NDArray[np.uint8], size: int, policy: Policy = "crop") -> NDArray[np.uint8]:
    """A picture as a square, bilinear with antialiasing.

    "crop" gives the pixels of torchvision's ``Resize(size)`` followed by ``CenterCrop(size)`` on a
    PIL picture, "squash" those of ``Resize((size, size))``. Of a picture more than `ELONGATED`
    times as long as wide only the middle is scaled, where a value may differ by 1: all of a strip
    of 1 x 60,000 pixels would take 9 GB.

    Args:
        image: ``[H, W, 3]`` uint8 RGB; of a `casm_fast.data.decoding.Reduced` one the full size
            says how long the longer side becomes.
        size: Side of the square in pixels.
        policy: "crop" or "squash".

    Returns:
        ``[size, size, 3]`` uint8. The input itself when it has that shape already.
    """
    check_policy(policy)
    if size < 1:
        raise ValueError(f"resize: expected `size` of at least 1, got {size}")
    height, width = image.shape[:2]
    if height == width == size:
        return image
    if policy == "squash":
        return _scaled(image, size, size)
    height, width = size_of(image)
    short, long = sorted((height, width))
    if long > ELONGATED * short:
        return _middle(image, size)
    long = int(size * long / short)
    image = _scaled(image, *((size, long) if height <= width else (long, size)))
    cut = round((long - size) / 2)
    return image[:, cut : cut + size] if height <= width else image[cut : cut + size]


def _middle(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The centre crop of a strip, scaled from its own pixels and those beside it alone."""
    from PIL import Image

    short, long = sorted(image.shape[:2])
    scaled = int(size * long / short)
    cut = round((scaled - size) / 2)
    low, high = cut * long / scaled, (cut + size) * long / scaled
    first = max(0, int(low) - short)  # room for the support of the filter
    part = slice(first, int(high) + short + 1)
    wide = image.shape[1] > image.shape[0]
    picture = Image.fromarray(np.ascontiguousarray(image[:, part] if wide else image[part]))
    box = (low - first, 0, high - first, short) if wide else (0, low - first, short, high - first)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))


def crop_and_resize(
    image: NDArray[np.uint8], top: int, left: int, height: int, width: int, size: int
) -> NDArray[np.uint8]:
    """A rectangle of a picture as a square, bilinear with antialiasing.

    Args:
        image: ``[H, W, 3]`` uint8 RGB, not a `casm_fast.data.decoding.Reduced` one.
        top: First row of the rectangle.
        left: First column.
        height: Rows.
        width: Columns.
        size: Side of the square in pixels.

    Returns:
        ``[size, size, 3]`` uint8.
    """
    return _scaled(image[top : top + height, left : left + width], size, size)


def _scaled(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    extent = image.extent if isinstance(image, Reduced) else None
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box=extent))


def normalize(
    images: Tensor,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """(x / 255 - mean) / std, on the device of the input.

    Args:
        images: ``[B, H, W, 3]`` or ``[B, 3, H, W]`` uint8 (a picture of width 3 is taken as the
            former).
        mean: Per channel, of pixels in [0, 1].
        std: Per channel.

    Returns:
        ``[B, 3, H, W]`` float32, contiguous; bitwise what torchvision's ToTensor and Normalize
        give.

    Raises:
        TypeError: The images are not uint8.
        ValueError: The shape is another.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalize: expected `images` of uint8, got {images.dtype}")
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise ValueError(
            "normalize: expected `images` of shape [B, H, W, 3] or [B, 3, H, W], "
            f"got {list(images.shape)}"
        )
    if images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format)
    shift, scale = _channels(tuple(mean), images.device), _channels(tuple(std), images.device)
    # A GPU multiplies by the reciprocal of a number, but divides by a tensor.
    return pixels.div_(_channels((255.0,) * 3, images.device)).sub_(shift).div_(scale)


@functools.lru_cache
@torch.inference_mode(False)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """``[C, 1, 1]``; kept, because the copy to a GPU would wait for it at every call."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def denormalize(
    images: Tensor,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """The inverse of `normalize`, for the eye: x * std + mean, clipped to [0, 1].

    Args:
        images: ``[B, 3, H, W]`` floating point.
        mean: Per channel.
        std: Per channel.

    Returns:
        ``[B, 3, H, W]`` of the same dtype and device.
    """
    shift = torch.tensor(mean, device=images.device, dtype=images.dtype).view(-1, 1, 1)
    scale = torch.tensor(std, device=images.device, dtype=images.dtype).view(-1, 1, 1)
    return (images * scale + shift).clamp(0, 1)
