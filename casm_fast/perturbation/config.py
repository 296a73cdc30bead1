"""What a mask optimisation is told: `PerturbConfig` and its presets.

The numbers are those of Fong & Vedaldi, "Interpretable explanations of black boxes by meaningful
perturbation" (ICCV 2017), its supplement, and the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

Game = Literal["deletion", "preservation", "both"]
Score = Literal["softmax", "logit", "log_softmax"]
Initial = Literal["disc", "random", "constant"]
Preset = Literal["default", "localization", "layers"]

REPLACEMENTS = ("blur", "constant", "noise")
"""What a mixture may consist of."""

VARYING_BLUR = "varying_blur"


class Layer(NamedTuple):
    """A layer of the supplement's section 6.4.

    Attributes:
        module: Its name in torchvision's network.
        lambda_l1: Weight of the L1 term, for a mask of the activation's size.
        lambda_tv: Weight of the TV term.
    """

    module: str
    lambda_l1: float
    lambda_tv: float


LAYERS: dict[tuple[str, str], Layer] = {
    ("alexnet", "pool1"): Layer("features.2", 1e-4, 1e-2),
    ("alexnet", "pool2"): Layer("features.5", 5e-3, 1e-2),
    ("alexnet", "relu3"): Layer("features.7", 5e-3, 1e-2),
    ("alexnet", "relu4"): Layer("features.9", 5e-3, 1e-2),
    ("alexnet", "pool5"): Layer("features.12", 1e-2, 1e-3),
    ("vgg16", "pool1"): Layer("features.4", 5e-5, 1e-2),
    ("vgg16", "pool2"): Layer("features.9", 1e-4, 1e-2),
    # The exponent is illegible in our copy of the supplement; this one lies between its neighbours.
    ("vgg16", "pool3"): Layer("features.16", 1e-3, 1e-2),
    ("vgg16", "pool4"): Layer("features.23", 5e-3, 1e-2),
    ("vgg16", "pool5"): Layer("features.30", 1e-2, 1e-3),
}
"""The layers that supplement 6.4 visualises, by network and the paper's name."""

_CHOICES: dict[str, tuple[object, ...]] = {
    "game": get_args(Game),
    "score": get_args(Score),
    "initial": get_args(Initial),
    "amp": ("off", "bf16"),
    "layout": ("auto", "contiguous", "channels_last"),
}
_LEAST: dict[str, float] = {
    "steps": 1,
    "top_k": 1,
    "jitter": 0,
    "patience": 0,
    "blur_sigma": 0,
    "mask_sigma": 0,
    "noise_std": 0,
    "lambda_l1": 0,
    "lambda_tv": 0,
    "tv_beta": 1,
    "tolerance": 0,
}
_POSITIVE = ("learning_rate", "mask_scale", "batch_size", "memory_budget")


@dataclass(frozen=True)
class PerturbConfig:
    """How masks are learned. The defaults are the paper's, for GoogLeNet and a mask of 28x28."""

    game: Game = "deletion"
    """deletion: the smallest region without which the score falls (main paper, eq. 6).
    preservation: the smallest region that keeps it (supplement, eq. 1). both: one mask whose hidden
    region does both: score(m) - score(1 - m)."""

    score: Score = "softmax"
    """What is lowered or kept: the class probability, its logit, or its log-probability. Of several
    classes: the sum (supplement, eq. 2)."""

    top_k: int = 1
    """Without targets: so many of each image's best classes are its targets."""

    perturbation: str = "blur"
    """What replaces hidden pixels: blur, constant, noise, the mean of several ("blur+noise"), or
    varying_blur: each pixel is blurred by blur_sigma * (1 - m) (main paper, section 4.1)."""

    blur_sigma: float = 10.0
    """Standard deviation of the blur in pixels."""

    colour: tuple[float, ...] | None = None
    """Constant replacement, one value per channel of the normalised images; None is 0, the mean
    colour of the data set."""

    noise_std: float = 1.0
    """Standard deviation of the noise replacement around 0, in units of the normalised images."""

    mask_size: tuple[int, int] | None = None
    """Height and width of the mask; None: by mask_scale, else 28 x 28, or the size of the
    activation with a layer."""

    mask_scale: float | None = None
    """Pixels per cell of the mask, instead of mask_size: 8, or 7.56 for AlexNet's 227 x 227."""

    mask_sigma: float = 0.625
    """Gaussian of the up-sampling in cells of the mask (5 pixels at scale 8); 0 is nearest."""

    jitter: int = 4
    """The image, enlarged by so many pixels, is shifted at each step by 0 .. jitter - 1 pixels per
    axis under a mask that stays; 0 or 1: it is not."""

    lambda_l1: float = 1e-4
    """Weight of the sum over the mask of |1 - m| (preservation: of |m|)."""

    lambda_tv: float = 1e-2
    """Weight of the mask's total variation, a sum too."""

    tv_beta: float = 3.0
    """Exponent of the total variation."""

    tv_isotropic: bool = True
    """Sum (dx^2 + dy^2)^(beta/2); otherwise |dx|^beta + |dy|^beta."""

    learning_rate: float = 0.1
    """Of Adam, with betas 0.9 and 0.999."""

    steps: int = 300
    """Steps of Adam; the mask is clamped to [0, 1] after each."""

    initial: Initial = "disc"
    """First mask. disc: the smallest centred disc that settles the game by 99 % of the normalised
    score, else everything hidden (supplement, section 2). random: uniform in [0, 1]. constant:
    initial_value everywhere."""

    initial_value: float = 0.5
    """Of the constant first mask, in [0, 1]."""

    layer: str | None = None
    """Name of a module: the mask multiplies its activation instead of the image (supplement, 6.4),
    which drops it out; wants perturbation="constant" and no colour, as in the preset "layers"."""

    patience: int = 0
    """An image is finished when its objective has not come down for so many steps, and the rest
    goes on without it; 0: every image takes all steps."""

    tolerance: float = 1e-3
    """By how much the objective must come down to count, for patience."""

    batch_size: int | None = None
    """Images optimised at once; None: as many as memory_budget holds. Halved when memory runs out;
    no result depends on it beyond rounding."""

    memory_budget: float | None = None
    """GiB for one batch; None: half of what is free, on the CPU at most 4."""

    amp: Literal["off", "bf16"] = "off"
    """Mixed precision of the classifier; masks, scores and sums stay float32."""

    layout: Literal["auto", "contiguous", "channels_last"] = "auto"
    """How the classifier's images lie in memory; only rounding depends on it. auto: channels_last
    for float32 images on the CPU, and with amp on GPUs, if a trial shows that the classifier takes
    it."""

    cuda_graph: bool = False
    """Capture one step in a CUDA graph and replay it, on GPUs: for classifiers whose kernels are
    shorter than their launches. The classifier must not wait for the device."""

    seed: int = 0
    """Of shifts, noise and random first masks. Each image gets the numbers that it would get
    alone."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is computed.

        Raises:
            ValueError: Naming the field, what was expected and what came.
        """
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = ", ".join(str(choice) for choice in choices)
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not value >= least or not math.isfinite(value):
                raise ValueError(f"{name}: expected a number of at least {least:g}, got {value}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and (not value > 0 or not math.isfinite(value)):
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if not 0 <= self.initial_value <= 1:
            raise ValueError(
                f"initial_value: expected a number in [0, 1], got {self.initial_value}"
            )
        if self.mask_size is not None and (len(self.mask_size) != 2 or min(self.mask_size) < 1):
            raise ValueError(
                f"mask_size: expected a height and a width of at least 1, got {self.mask_size}"
            )
        if self.mask_size is not None and self.mask_scale is not None:
            raise ValueError(
                "mask_scale: expected None beside a mask_size, "
                f"got {self.mask_scale} and {self.mask_size}; give one of them"
            )
        self._check_perturbation()

    def _check_perturbation(self) -> None:
        parts = self.replacements
        if self.perturbation != VARYING_BLUR and (
            not set(parts) <= set(REPLACEMENTS) or len(set(parts)) < len(parts)
        ):
            raise ValueError(
                f"perturbation: expected {', '.join(REPLACEMENTS)}, a mixture such as "
                f"'blur+noise', or {VARYING_BLUR}, got {self.perturbation!r}"
            )

    @property
    def replacements(self) -> tuple[str, ...]:
        """The parts of the mixture."""
        return tuple(self.perturbation.split("+"))

    @staticmethod
    def preset(
        name: Preset = "default",
        network: str | None = None,
        layer: str | None = None,
        **changes: Any,
    ) -> PerturbConfig:
        """The settings of one of the paper's experiments.

        * "default": one class is deleted (main paper, section 4).
        * "localization": the five best classes are, with lambda_l1 1e-3 and beta 2
          (supplement, 6.2).
        * "layers": drop-out of an inner layer, no up-sampling, blur or shifts, beta 3
          (supplement, 6.4). With a network of `LAYERS` and the paper's name of the layer, the
          weights are those of its table; else `layer` is the name of a module.

        Args:
            name: Which one.
            network: "alexnet" or "vgg16", for "layers".
            layer: For "layers".
            **changes: Fields of `PerturbConfig` that differ.

        Raises:
            ValueError: There is no such preset, network or layer.
        """
        if name not in get_args(Preset):
            known = ", ".join(get_args(Preset))
            raise ValueError(f"preset: expected one of {known}, got {name!r}")
        if (network is not None or layer is not None) and name != "layers":
            raise ValueError(f"preset: expected 'layers' beside a network or layer, got {name!r}")
        base = PerturbConfig()
        if name == "localization":
            base = replace(base, top_k=5, lambda_l1=1e-3, tv_beta=2.0)
        if name == "layers":
            base = replace(base, perturbation="constant", mask_sigma=0.0, jitter=0)
            if network is not None:
                found = LAYERS.get((network, str(layer)))
                if found is None:
                    known = ", ".join(" ".join(key) for key in LAYERS)
                    raise ValueError(
                        f"preset: expected a network and layer out of {known}, "
                        f"got {network} {layer}"
                    )
                base = replace(base, lambda_l1=found.lambda_l1, lambda_tv=found.lambda_tv)
                layer = found.module
            base = replace(base, layer=layer)
        return replace(base, **changes)
