"""The pictures of the gallery, in the manner of Figure 2 of the CASM paper.

The original, the masked-in image b * x, the masked-out image (1 - b) * x, and the latter repaired
by Telea's inpainting, where b is the saliency map after the threshold: every kept pixel, not only
the largest component.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from casm_fast import ops
from casm_fast.data.predictions import Convention
from casm_fast.data.source import ImageSource
from casm_fast.data.transforms import normalize, resize
from casm_fast.models.saliency import SaliencyModel, full_size

logger = logging.getLogger(__name__)

GREY = 0.35
"""Removed pixels of masked-in and masked-out pictures, as in the CASM authors' plots."""

INPAINT_RADIUS = 3
"""Neighbourhood of the inpainting in network pixels, as in the paper's evaluation."""

_SHARP = 192  # pixels: a tile of a small network is drawn from the original at least this large


@dataclass(frozen=True)
class Pictures:
    """One image in every form of the gallery, ``[D, D, 3]`` uint8 each.

    Attributes:
        original: What the network saw, drawn at D pixels.
        saliency: The map as colour over the greyed original.
        masked_in: What the map keeps.
        masked_out: What is left without it.
        inpainted: The masked-out image repaired; None without OpenCV.
    """

    original: NDArray[np.uint8]
    saliency: NDArray[np.uint8]
    masked_in: NDArray[np.uint8]
    masked_out: NDArray[np.uint8]
    inpainted: NDArray[np.uint8] | None


def draw(
    model: SaliencyModel, source: ImageSource, indices: Sequence[int], convention: Convention
) -> list[Pictures]:
    """Draw images of a source as the model sees them.

    Args:
        model: In eval mode.
        source: Where the images are.
        indices: Which ones.
        convention: Geometry and threshold.

    Returns:
        One set of pictures per index.
    """
    if not indices:
        return []
    size = convention.size
    scale = max(1, -(-_SHARP // size))
    seen, shown = [], []
    for index in indices:
        image = source.image(index)
        seen.append(resize(image, size, convention.policy))
        shown.append(resize(image, size * scale, convention.policy))
    device = next(model.parameters()).device
    with torch.inference_mode():
        saliency, _ = model(
            normalize(torch.from_numpy(np.stack(seen)).to(device), model.mean, model.std)
        )
        saliency = saliency.float().cpu()
        kept = threshold(saliency, convention)
        maps = full_size(saliency, (size, size))[:, 0].numpy()
        masks = full_size(kept.float(), (size, size))[:, 0].numpy() > 0
    return [_pictures(*views) for views in zip(seen, shown, maps, masks, strict=True)]


def threshold(saliency: torch.Tensor, convention: Convention) -> torch.Tensor:
    """The pixels that the convention keeps.

    Args:
        saliency: ``[B, 1, h, w]``.
        convention: Threshold rule and alpha.

    Returns:
        ``[B, 1, h, w]`` bool.
    """
    _, kept = ops.mask_boxes(
        saliency, rule=convention.rule, alpha=convention.alpha, component="all"
    )
    # Every rule keeps the highest pixels, equal ones together: the last one kept is the level.
    ranked = saliency.flatten(1).sort(dim=1, descending=True).values
    level = ranked.gather(1, (kept.long() - 1).clamp(min=0)[:, None])
    chosen = saliency >= level[:, :, None, None]
    return chosen & (kept > 0)[:, None, None, None]


def _pictures(
    seen: NDArray[np.uint8],
    shown: NDArray[np.uint8],
    saliency: NDArray[np.float32],
    kept: NDArray[np.bool_],
) -> Pictures:
    """One image in every form.

    Args:
        seen: ``[S, S, 3]``, what the network saw.
        shown: ``[D, D, 3]``, the same at D = scale * S pixels.
        saliency: ``[S, S]``.
        kept: ``[S, S]``.
    """
    scale = len(shown) // len(seen)
    grey = np.full_like(shown, round(255 * GREY))
    large = enlarge(kept, scale)
    repaired = inpaint(seen, kept, INPAINT_RADIUS)
    if repaired is not None:
        # Only the hole comes from the inpainting, which works at the network's resolution.
        smooth = resize(repaired, len(shown), "squash")
        repaired = np.where(large[:, :, None], smooth, shown)
    return Pictures(
        original=shown,
        saliency=overlay(shown, enlarge(saliency, scale)),
        masked_in=np.where(large[:, :, None], shown, grey),
        masked_out=np.where(large[:, :, None], grey, shown),
        inpainted=repaired,
    )


def enlarge(plane: NDArray[Any], scale: int) -> NDArray[Any]:
    """``[S, S]`` with every pixel repeated ``scale`` times along both axes."""
    return np.asarray(plane.repeat(scale, 0).repeat(scale, 1))


def overlay(image: NDArray[np.uint8], saliency: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A saliency map as colour over a greyed image.

    Args:
        image: ``[D, D, 3]`` uint8.
        saliency: ``[D, D]`` in [0, 1].

    Returns:
        ``[D, D, 3]`` uint8.
    """
    from matplotlib import colormaps

    luminance = image @ np.array([0.299, 0.587, 0.114])
    colours = colormaps["inferno"](saliency)[..., :3] * 255
    mixed = 0.4 * luminance[..., None] + 0.6 * colours
    return np.asarray(np.rint(mixed), np.uint8)


def inpaint(
    image: NDArray[np.uint8], removed: NDArray[np.bool_], radius: float
) -> NDArray[np.uint8] | None:
    """Repair the removed pixels from their surroundings (Telea 2004).

    Args:
        image: ``[D, D, 3]`` uint8.
        removed: ``[D, D]`` bool.
        radius: Neighbourhood in pixels.

    Returns:
        ``[D, D, 3]`` uint8, or None when OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError:
        return None
    repaired: Any = cv2.inpaint(image, removed.astype(np.uint8), radius, cv2.INPAINT_TELEA)
    return np.asarray(repaired, np.uint8)


def data_uri(image: NDArray[np.uint8], quality: int = 86) -> str:
    """An image as a JPEG inside a URI.

    Args:
        image: ``[H, W, 3]`` uint8.
        quality: Of the JPEG.

    Returns:
        ``data:image/jpeg;base64,…``.
    """
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
