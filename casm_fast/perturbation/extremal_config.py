"""What the search for extremal perturbations is told: `ExtremalConfig`.

The numbers are those of Fong, Patrick & Vedaldi 2019 and of the library that they published with
it, TorchRay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Variant = Literal["preserve", "delete", "dual"]
Reward = Literal["simple", "contrastive"]


@dataclass(frozen=True)
class ExtremalConfig:
    """How masks of given areas are learned. The defaults are the paper's, for 224 x 224 pixels."""

    areas: tuple[float, ...] = (0.1,)
    """Shares of the image, in (0, 1]; each gets a mask. The pointing game of the paper takes 0.025,
    0.05, 0.1 and 0.2."""

    variant: Variant = "preserve"
    """preserve: the region that alone keeps the score high. delete: without which it is low. dual:
    both, their difference is rewarded."""

    reward: Reward = "simple"
    """simple: the targets' summed logits. contrastive: minus the largest other logit."""

    perturbation: Literal["blur", "fade"] = "blur"
    """What hides pixels: blur by max_blur * (1 - m), or fading to 0, the data set's mean colour."""

    max_blur: float = 20.0
    """Standard deviation of the blur where the mask is 0, in pixels."""

    levels: int = 8
    """Blurs between which hidden pixels are interpolated: max_blur to none in even steps."""

    cell: int = 7
    """Pixels per parameter of the mask and axis."""

    sigma: float = 21.0
    """Of the kernel around a parameter, in pixels: a disc of radius sigma / 2 with a soft edge."""

    coldness: float = 20.0
    """How hard the maximum of the kernels is; the paper's 1 / T."""

    steps: int = 800
    """Steps of SGD."""

    learning_rate: float = 0.01
    """Of SGD."""

    momentum: float = 0.9
    """Of SGD, in [0, 1)."""

    dampening: float = 0.9
    """Share of each gradient but the first that is kept out of the momentum, in [0, 1]."""

    area_weight: float = 300.0
    """Of the area's penalty in the first step. For logits of ImageNet's size; with logits a tenth
    as large take a tenth, and ten times the learning rate."""

    area_growth: float = 1.0035
    """Factor of that weight from step to step, at least 1; 16 times as much after 800."""

    flip: bool = True
    """Show mirrored images at every other step, the first included."""

    smooth: float = 0.09
    """Gaussian over the summed masks, `Extremal.saliency`, as a share of the shorter side; 0:
    none."""

    batch_size: int | None = None
    """Masks learned at once; None: as many as memory_budget holds. Halved when memory runs out; no
    result depends on it beyond rounding."""

    memory_budget: float | None = None
    """GiB for one batch; None: half of what is free, on the CPU at most 4."""

    amp: Literal["off", "bf16"] = "off"
    """Mixed precision of the classifier; masks and sums stay float32."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is computed.

        Raises:
            ValueError: Naming the field, what was expected and what came.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if not self.areas or not all(0 < area <= 1 for area in self.areas):
            raise ValueError(
                f"areas: expected shares of the image in (0, 1], one at least, got {self.areas}"
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not value >= least or not math.isfinite(value):
                raise ValueError(f"{name}: expected a number of at least {least:g}, got {value}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (not value > 0 or not math.isfinite(value)):
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum}")
        if not 0 <= self.dampening <= 1:
            raise ValueError(f"dampening: expected a number in [0, 1], got {self.dampening}")


_CHOICES: dict[str, tuple[str, ...]] = {
    "variant": get_args(Variant),
    "reward": get_args(Reward),
    "perturbation": ("blur", "fade"),
    "amp": ("off", "bf16"),
}
_LEAST: dict[str, float] = {
    "steps": 1,
    "cell": 1,
    "levels": 2,
    "max_blur": 0,
    "area_weight": 0,
    "area_growth": 1,
    "smooth": 0,
}
_POSITIVE = ("learning_rate", "sigma", "coldness", "batch_size", "memory_budget")
