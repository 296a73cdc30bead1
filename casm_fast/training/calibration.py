"""lambda_R = "auto": masks that cover a given share of the image, the paper's rule of 50 %.

The paper tunes lambda_R by hand "in order to get approximately 50 % of the image's pixels indicated
as salient" (section 4). Here a proportional-integral controller does it while the masks are
trained::

    every step:    e = mean saliency of the batch - setpoint
                   integral += INTEGRAL ln K e;  lambda_R = integral + PROPORTIONAL ln K e
                   recent += RECENT (mean saliency of the batch - recent)
    every epoch:   setpoint = target + recent - mean saliency of held-out images, in evaluation mode

The mean saliency answers lambda_R late and not in proportion (below some lambda_R masks grow no
further, because the judge is confused enough), hence the fast proportional part and a slow
integral. The setpoint takes away the difference between batches in training mode and unseen images
in evaluation mode. Where not even lambda_R = 0 makes the masks as large as asked for, it
becomes negative and rewards area.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# In units of ln K, the scale of the entropy that lambda_R is weighed against. Chosen on the
# embedded set.
PROPORTIONAL = 4.0
INTEGRAL = 0.1

# Share of a batch in the running mean: some ten steps, in which the masks change little.
RECENT = 0.1

# Held-out images: a twentieth of the training set, within these bounds.
HELD_OUT_SHARE = 20
FEWEST, MOST = 16, 1024

# What the paper's "approximately" is taken to mean.
TOLERANCE = 0.02

_STREAM = 0x6C616D62  # keeps the draw of the held-out images apart from every other use of the seed


class Calibration:
    """The controller of one run.

    Attributes:
        lambda_r: ``[]``, on the device; the controller writes it in place.
        target: The mean saliency asked for.
    """

    def __init__(self, lambda_r: Tensor, target: float, classes: int) -> None:
        """Start from the value of `lambda_r`.

        Args:
            lambda_r: ``[]``, in nats.
            target: A share of the image, in (0, 1).
            classes: K, at least 2.
        """
        self.lambda_r = lambda_r
        self.target = target
        self._unit = math.log(classes)
        self._integral = lambda_r.clone()
        self._setpoint = torch.full_like(lambda_r, target)
        self._recent = torch.full_like(lambda_r, math.nan)  # until the first batch

    def steer(self, mean_saliency: Tensor) -> None:
        """Answer a step; waits for no device.

        Args:
            mean_saliency: Of the batch, ``[]``, on the device.
        """
        self._recent.copy_(
            torch.where(
                self._recent.isnan(),
                mean_saliency,
                self._recent.lerp(mean_saliency.to(self._recent.dtype), RECENT),
            )
        )
        excess = mean_saliency - self._setpoint
        self._integral += INTEGRAL * self._unit * excess
        torch.add(self._integral, excess, alpha=PROPORTIONAL * self._unit, out=self.lambda_r)

    def correct(self, held_out_saliency: float) -> None:
        """Set the batches' masks such a size that those of held-out images have the target's.

        Args:
            held_out_saliency: Their mean saliency, in evaluation mode.
        """
        gap = held_out_saliency - self._recent
        self._setpoint.copy_((self.target - gap).clamp(0.0, 1.0))

    def state(self) -> dict[str, Any]:
        """What the next steps depend on."""
        return {
            "lambda_r": self.lambda_r,
            "integral": self._integral,
            "setpoint": self._setpoint,
            "recent": self._recent,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.lambda_r.copy_(state["lambda_r"])
        self._integral.copy_(state["integral"])
        self._setpoint.copy_(state["setpoint"])
        self._recent.copy_(state["recent"])


def split(images: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sets a random part of the training images aside, for the calibration alone.

    Args:
        images: How many there are.
        seed: Of the run.

    Returns:
        Indices to train on and indices held out, both rising.

    Raises:
        ValueError: When there are too few images to set any aside.
    """
    count = min(max(images // HELD_OUT_SHARE, FEWEST), MOST)
    if images < 2 * count:
        raise ValueError(
            f'lambda_r="auto": expected at least {2 * FEWEST} training images, of which '
            f'{FEWEST} are held out, got {images}; pass a number or "preset"'
        )
    order = np.random.default_rng([seed, _STREAM]).permutation(images)
    return np.sort(order[count:]), np.sort(order[:count])
