"""The loss of real-time saliency's masks (Dabkowski & Gal 2017; the authors' code).

With masks m at the image's size, images x whose hidden part is replaced, and
``margin(z) = z_label - max of the other logits``::

    destroyed = x (1 - m) + other m,   preserved = x m + other (1 - m)
    loss = destroyer + 8 mean((m + 0.0005)^0.3) + 0.005 smoothness(m) + 0.3 preserver
    asked for the image's class:  destroyer = relu(margin(f(destroyed)) + 5)
                                  preserver = relu(1 - margin(f(preserved)))
    asked for a fake class:       destroyer = relu(1 - margin(f(destroyed)))
                                  preserver = relu(margin(f(preserved)) + 1)

Both margins are those of the image's own class: a mask of a fake one has to leave it. The
smoothness is ``1/2B sum_b [ sum dx^2 + sum dy^2 + 0.3 sum border^2 ]``. What replaces pixels is
drawn anew for each image and each of its two versions: its own blur, or a random colour with noise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast import ops
from casm_fast.attribution.proportion import in_proportion
from casm_fast.attribution.realtime_config import RealTimeConfig
from casm_fast.models.encoder import Encoder
from casm_fast.training.objective import smoothness

# The derivative of m^0.3 has no bound at 0.
AREA_OFFSET = 0.0005

# 55 taps at sigma 11.
BLUR_TRUNCATE = 27 / 11


def mask_loss(
    judge: Encoder,
    images: Tensor,
    labels: Tensor,
    real: Tensor,
    masks: Tensor,
    config: RealTimeConfig,
    stream: torch.Generator,
) -> dict[str, Tensor]:
    """The loss of the second phase, see the module, and its parts, ``[]`` each.

    Args:
        judge: The classifier.
        images: ``[B, 3, H, W]``.
        labels: Their classes, ``[B]`` int64.
        real: Which masks were asked of the image's own class, ``[B]`` bool.
        masks: ``[B, 1, h, w]``.
        config: Weights and replacements.
        stream: Draws the replacements.
    """
    H, W = images.shape[2:]
    large = F.interpolate(masks, (H, W), mode="bilinear", align_corners=False)
    destroyed = _margin(judge(masked(images, 1 - large, config, stream))[0], labels)
    preserved = _margin(judge(masked(images, large, config, stream))[0], labels)
    destroyer = torch.where(real, destroyed + config.destroyer_margin, 1 - destroyed)
    preserver = torch.where(real, config.preserver_margin - preserved, preserved + 1)
    parts = {
        "destroyer": destroyer.relu().mean(),
        "preserver": preserver.relu().mean(),
        "area": ((large + AREA_OFFSET) ** config.area_power).mean(),
        "smoothness": smoothness(large, H, W) / 2,
        "mean_saliency": large.detach().mean(),
    }
    parts["loss"] = (
        parts["destroyer"]
        + config.area_weight * parts["area"]
        + config.smoothness_weight * parts["smoothness"]
        + config.preserver_weight * parts["preserver"]
    )
    return parts


def masked(images: Tensor, mask: Tensor, config: RealTimeConfig, stream: torch.Generator) -> Tensor:
    """Images with noise, replaced where the mask is 0 by their blur or by a colour with noise.

    Args:
        images: ``[B, C, H, W]``.
        mask: ``[B, 1, H, W]``, 1 keeps.
        config: Of the replacements.
        stream: Draws them.
    """
    count, channels = images.shape[:2]

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=stream, device=like.device, dtype=like.dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=stream, device=images.device, dtype=images.dtype)

    noisy = images + config.image_noise * normal(images)
    sigma = config.blur_sigma
    sigma = in_proportion(11.0, images.shape[2:]) if sigma is None else sigma
    blurred = ops.gaussian_blur(noisy, sigma, BLUR_TRUNCATE)
    colour = config.colour_range * (uniform(count, channels, 1, 1) - 0.5)
    plain = colour + config.noise * normal(images)
    blurs = uniform(count, 1, 1, 1) < config.blur_probability
    return ops.blend(noisy, torch.where(blurs, blurred, plain), mask)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the labels' logits stand above the best of the others, ``[B]``."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    return own - others
