"""What the training of real-time saliency is told: `RealTimeConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from casm_fast.attribution.realtime import WIDTH
from casm_fast.data.loading import Augment

Phase = Literal["selector", "masks"]
PHASES: tuple[Phase, ...] = get_args(Phase)

# The authors' images lie in [-1, 1] and reach their classifier times two; normalised images have
# about that range, so that their amplitudes are doubled here.
DOMAIN = 2.0

_LEAST: dict[str, float] = {
    "selector_steps": 0,
    "mask_steps": 0,
    "selector_batch": 1,
    "mask_batch": 1,
    "selector_decay": 1,
    "weight_decay": 0,
    "width": 1,
    "input_size": 1,
    "area_weight": 0,
    "smoothness_weight": 0,
    "preserver_weight": 0,
    "destroyer_margin": 0,
    "preserver_margin": 0,
    "colour_range": 0,
    "noise": 0,
    "image_noise": 0,
    "seed": 0,
    "workers": 0,
    "log_interval": 1,
    "save_interval": 1,
}


@dataclass(frozen=True)
class RealTimeConfig:
    """How a real-time masking network is trained. The defaults are the authors', for ImageNet."""

    output: Path | None = None
    """The run folder; None: runs/real_time."""

    resume: bool = False
    """Go on with the run in `output`."""

    selector_steps: int = 8500
    """Steps of the first phase."""

    mask_steps: int = 3000
    """Steps of the second phase."""

    selector_batch: int = 128
    """Images in a step of the first phase."""

    mask_batch: int = 64
    """Images in a step of the second phase."""

    selector_fakes: float = 0.5
    """Share of the images that are asked for another class than theirs, in the first phase."""

    mask_fakes: float = 0.3
    """The same in the second phase."""

    learning_rate: float = 1e-3
    """Of Adam, in both phases."""

    selector_decay: int = 4000
    """Steps of the first phase after which its learning rate falls to a tenth."""

    weight_decay: float = 1e-4
    """Of Adam, as L2."""

    width: int = WIDTH
    """Channels of the decoder at its finest resolution."""

    input_size: int = 224
    """Side of the images in pixels."""

    augment: Augment = "imagenet"
    """What happens to the images, see `casm_fast.data`."""

    area_weight: float = 8.0
    """Of the masks' area."""

    area_power: float = 0.3
    """Of each pixel of a mask before their mean."""

    smoothness_weight: float = 0.005
    """Of the masks' total variation."""

    preserver_weight: float = 0.3
    """Of the loss on what the masks keep."""

    destroyer_margin: float = 5.0
    """By how much the class's logit shall fall below another one where it is hidden."""

    preserver_margin: float = 1.0
    """By how much it shall stand above all others where it is kept."""

    blur_probability: float = 0.5
    """With which an image's replacement is its blur, and not a colour with noise."""

    blur_sigma: float | None = None
    """Standard deviation of the blur in pixels; None: 11 on images of 224, in proportion to the
    diagonal on others."""

    colour_range: float = 0.66 * DOMAIN
    """Width of the uniform distribution of a random colour around 0, in normalised units."""

    noise: float = 0.11 * DOMAIN
    """Standard deviation of the noise on that colour, in the same units."""

    image_noise: float = 0.03 * DOMAIN
    """Standard deviation of the noise on the images themselves."""

    seed: int = 0
    """Of everything that is drawn."""

    device: str = "auto"
    """"auto", "cpu", or a GPU."""

    workers: int = 4
    """Threads that read images."""

    log_interval: int = 50
    """Steps from one record to the next."""

    save_interval: int = 500
    """Steps after which the state is saved."""

    progress: bool = True
    """Show a bar on a terminal."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is computed.

        Raises:
            ValueError: Naming the field, what was expected and what came.
        """
        for name, value in _LEAST.items():
            if not getattr(self, name) >= value:
                raise ValueError(
                    f"{name}: expected a number of at least {value:g}, got {getattr(self, name)}"
                )
        for name in ("learning_rate", "area_power"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("selector_fakes", "mask_fakes", "blur_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")
        if self.blur_sigma is not None and not self.blur_sigma >= 0:
            raise ValueError(f"blur_sigma: expected a number of at least 0, got {self.blur_sigma}")

    def steps(self, phase: Phase) -> int:
        """Of a phase."""
        return self.selector_steps if phase == "selector" else self.mask_steps

    def batch(self, phase: Phase) -> int:
        """Images in a step of a phase."""
        return self.selector_batch if phase == "selector" else self.mask_batch

    def describe(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        return {**dataclasses.asdict(self), "output": str(self.output)}
