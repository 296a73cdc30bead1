"""What a training run is told: `TrainConfig`, its presets, and what the names in it mean.

A setting whose good value depends on the data (network, rates, epochs ...) is `None` in
`TrainConfig` until somebody sets it; `TrainConfig.recipe` fills the gaps from one of two presets:

* `PAPER`, for ImageNet and every other data set on disk: Zolna, Geras and Cho, "Classifier-agnostic
  saliency map extraction", CVIU 196 (2020), section 4 and its supplement.
* `EMBEDDED`, for the synthetic set (64x64 images, 8 classes): a compact network that is trained
  from scratch first; its values were chosen by localisation error on held-out pictures of the
  training split of other seeds. L10 stands for the paper's L100: CASM takes 372 steps here, and
  for the first 100 of them L100 knows no other judge than the first classifier and the live one.

The regularisation coefficient lambda_R is given in units of ln(classes), see `lambda_preset`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from casm_fast.data.loading import Augment

Score = Literal["entropy", "classification"]
Objective = Literal["masked_out", "masked_in_out"]
ClassifierUpdate = Literal["joint", "alternating"]
Infill = Literal["mean", "colour", "blur", "noise"]

STRATEGY_PATTERN = re.compile(r"F|L|FL|L[1-9][0-9]*")

# lambda_R of the CASM authors' own presets (their option --reproduce), tuned for the 1,000 classes
# of ImageNet so that about half of the pixels are marked. Strategies Lk share one value: the
# authors use the same for L100 and L1000.
AUTHORS_LAMBDA: dict[tuple[str, Score], float] = {
    ("F", "entropy"): 2.5,
    ("L", "entropy"): 14.0,
    ("FL", "entropy"): 7.5,
    ("Lk", "entropy"): 10.0,
    ("F", "classification"): 9.0,
    ("L", "classification"): 18.0,
    ("FL", "classification"): 11.0,
    ("Lk", "classification"): 17.0,
}
AUTHORS_CLASSES = 1000

# The published settings of the successor, whose masks are scored on what they keep as well: Phang,
# Park and Geras, "Investigating and simplifying masking-based saliency methods" (2020).
SUCCESSOR_LAMBDA_OUT = {"fixed": 10.0, "trained": 15.0}
SUCCESSOR_LAMBDA_IN = 1.0
SUCCESSOR_LAMBDA_TV = 1e-3
SUCCESSOR_TAPS = (-2, -1)  # the coarsest two: layer3 and layer4 of a ResNet


@dataclass(frozen=True)
class Strategy:
    """How the set of sampled classifiers F is thinned (paper, section 3.3, "Thinning").

    Attributes:
        name: "F", "L", "FL" or "Lk" with a number for k.
        fixed: The classifier is never trained (F: the classifier-dependent baseline).
        keeps_first: f(0) is a sample (FL).
        interval: A sample is taken every `interval` iterations (Lk), or `None`.
    """

    name: str
    fixed: bool = False
    keeps_first: bool = False
    interval: int | None = None

    @staticmethod
    def parse(name: str) -> Strategy:
        """Read a strategy's name: F, L, FL, L100, L1000 or any Lk.

        Raises:
            ValueError: For any other name.
        """
        if not STRATEGY_PATTERN.fullmatch(name):
            raise ValueError(
                f"strategy: expected F, L, FL or L followed by a number of steps such as L100, "
                f"got {name!r}"
            )
        return Strategy(
            name=name,
            fixed=name == "F",
            keeps_first=name == "FL",
            interval=int(name[1:]) if name[1:].isdigit() else None,
        )


def in_units_of_entropy(authors: float, classes: int) -> float:
    """A coefficient tuned for ImageNet, carried over to K classes: times ln K / ln 1000."""
    return authors / math.log(AUTHORS_CLASSES) * math.log(classes)


def lambda_preset(
    strategy: str, score: Score, classes: int, objective: Objective = "masked_out"
) -> float:
    """The authors' lambda_R for a strategy and a score, carried over to another number of classes.

    lambda_R weighs the mean saliency, a number in [0, 1], against the score of the masked-out
    image. The entropy score is at most ln K for K classes, so a coefficient tuned for K = 1000 is
    6.9 / 2.1 = 3.3 times too strong for K = 8. The presets are therefore kept in units of ln K:
    ``lambda = authors' lambda / ln 1000 * ln K`` (L100 with entropy: 10 / 6.908 = 1.448 ln K).

    The classification score, a cross-entropy, has no upper bound. It gets the same scale because a
    classifier that is trained on the masked images too, and finds no evidence in them, answers with
    the prior, whose cross-entropy is ln K; and a fixed classifier's logits are of the size that
    separates K classes.

    Args:
        strategy: See `Strategy.parse`.
        score: ``"entropy"`` or ``"classification"``.
        classes: K, at least 2.
        objective: ``"masked_in_out"``: the successor's weights, 10 for a fixed classifier and 15
            for one in training, whatever the score.

    Returns:
        lambda_R, in nats.
    """
    if objective == "masked_in_out":
        kind = "fixed" if Strategy.parse(strategy).fixed else "trained"
        return in_units_of_entropy(SUCCESSOR_LAMBDA_OUT[kind], classes)
    row = strategy if strategy in ("F", "L", "FL") else "Lk"
    return in_units_of_entropy(AUTHORS_LAMBDA[row, score], classes)


@dataclass(frozen=True)
class Recipe:
    """The settings of `TrainConfig` whose default depends on the data."""

    strategy: str
    backbone: str
    weights: str
    decoder_width: int
    input_size: int
    augment: Augment
    batch_size: int
    epochs: int
    epoch_fraction: float
    schedule_epochs: int
    classifier_lr: float
    decoder_lr: float
    pretrain_epochs: int
    pretrain_lr: float
    pretrain_weight_decay: float
    masked_statistics: bool


PAPER = Recipe(
    strategy="L100",
    backbone="resnet50",
    weights="imagenet",
    decoder_width=64,
    input_size=224,
    augment="imagenet",
    batch_size=128,
    epochs=70,
    epoch_fraction=0.2,
    schedule_epochs=20,
    classifier_lr=1e-3,
    decoder_lr=1e-3,
    pretrain_epochs=0,
    pretrain_lr=0.1,
    pretrain_weight_decay=1e-4,
    masked_statistics=True,
)

EMBEDDED = Recipe(
    strategy="L10",
    backbone="compact",
    weights="none",
    decoder_width=16,
    input_size=64,
    augment="flip",
    batch_size=64,
    epochs=6,
    epoch_fraction=1.0,
    schedule_epochs=4,
    classifier_lr=1e-2,
    decoder_lr=3e-3,
    pretrain_epochs=8,
    pretrain_lr=0.1,
    pretrain_weight_decay=1e-3,
    masked_statistics=False,
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on.

    A field that is `None` takes its value from the preset of the data set (`PAPER` or `EMBEDDED`);
    `resolved` shows the result.
    """

    data: str = "synthetic"
    """Data set: "synthetic" (embedded), "imagenet:DIR", "folder:DIR" or a path."""

    output: Path | None = None
    """Run folder; default: runs/<date>-<time>-<data>-<strategy>."""

    resume: bool = False
    """Continue the run in `output` where its last saved state left it (a new run starts if there is
    none)."""

    strategy: str | None = None
    """Thinning of the classifier history: F, L, FL, or Lk for a snapshot every k steps (paper:
    L100; embedded set: L10)."""

    objective: Objective = "masked_out"
    """What the mask is learned from: what is left without it (CASM, eq. 7), or also what it keeps
    (Phang, Park and Geras 2020)."""

    score: Score = "entropy"
    """What the mask maximises on the masked-out image: the judge's entropy, or its classification
    loss."""

    lambda_r: float | Literal["preset", "auto"] = "preset"
    """Weight of the mean saliency: a number, the authors' preset in units of ln(classes), or
    "auto", steered to `target_saliency` on held-out training images."""

    lambda_in: float | Literal["preset"] = "preset"
    """Weight of the mean saliency where the judge is right on the masked-in image, for
    objective="masked_in_out": a number, or the authors' 1.0 in units of ln(classes)."""

    lambda_tv: float = SUCCESSOR_LAMBDA_TV
    """Weight of the mask's smoothness at the image's resolution, for
    objective="masked_in_out"."""

    target_saliency: float = 0.5
    """Mean saliency that lambda_r="auto" steers to (the paper's 50 % of the pixels)."""

    classifier_update: ClassifierUpdate = "joint"
    """"joint": eq. 8, one step on clean and masked images together; "alternating": two steps, as in
    the authors' code."""

    masked_statistics: bool | None = None
    """The classifier's running batch statistics see masked images too, as in the authors' code
    (paper: yes; embedded set: no)."""

    history_probability: float = 0.5
    """Probability that the judge is drawn from the history; otherwise it is the newest
    classifier."""

    history_size: int = 30
    """Most snapshots that the history holds; afterwards a random one is overwritten."""

    history_device: Literal["auto", "device", "host"] = "auto"
    """Where snapshots live: on the training device, in (pinned) host memory, or on the device when
    they fit."""

    backbone: str | None = None
    """Network of classifier and encoder (paper: resnet50; embedded set: compact)."""

    weights: str | None = None
    """Initial weights: "imagenet", another torchvision name, a file, or "none" (paper: imagenet;
    embedded set: none)."""

    shared_encoder: bool = True
    """The decoder reads the classifier's own activations; otherwise a second encoder is trained
    with the mask objective."""

    taps: tuple[int, ...] | None = None
    """Which taps the decoder reads: 0 is the finest, -1 the coarsest; default: all, or the coarsest
    two for objective="masked_in_out"."""

    tap0_projection: bool | None = None
    """A 1x1 convolution on the finest tap too (the paper's text); default: none for ResNets, as in
    the authors' code."""

    decoder_width: int | None = None
    """Channels of the decoder's 1x1 convolutions (paper: 64; embedded set: 16)."""

    infill: Infill = "mean"
    """What replaces the masked-out pixels: the mean colour, a constant colour, the blurred image,
    or noise."""

    infill_colour: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Red, green, blue in [0, 1] for infill="colour"."""

    infill_sigma: float = 10.0
    """Standard deviation in pixels of the Gaussian for infill="blur"."""

    input_size: int | None = None
    """Side of the square that the network sees (paper: 224; embedded set: 64)."""

    augment: Augment | None = None
    """Augmentation: random resized crop and flip, flip alone, or none (paper: imagenet; embedded
    set: flip)."""

    batch_size: int | None = None
    """Images per step, over all processes (paper: 128; embedded set: 64)."""

    epochs: int | None = None
    """CASM epochs (paper: 70; embedded set: 6)."""

    epoch_fraction: float | None = None
    """Share of the training images in one epoch, drawn afresh for each (paper: 0.2; embedded set:
    1)."""

    classifier_lr: float | None = None
    """Learning rate of the classifier's SGD (paper: 0.001; embedded set: 0.01)."""

    decoder_lr: float | None = None
    """Learning rate of the decoder's Adam (paper: 0.001; embedded set: 0.003)."""

    decoder_ema: float = 0.0
    """Validate and write an exponential mean of the decoder (and a separate encoder) over the
    steps, with this decay, such as 0.999; 0: the newest weights."""

    schedule: Literal["step", "constant"] = "step"
    """Both rates are multiplied by `schedule_factor` every `schedule_epochs` epochs, or stay."""

    schedule_epochs: int | None = None
    """Epochs between two steps of the schedule (paper: 20; embedded set: 4)."""

    schedule_factor: float = 0.1
    """Factor of the schedule."""

    momentum: float = 0.9
    """Momentum of the classifier's SGD."""

    weight_decay: float = 1e-4
    """L2 weight decay of both optimisers in the CASM phase."""

    clip_gradient: float = 10.0
    """Largest norm of the mask objective's gradient."""

    pretrain_epochs: int | None = None
    """Epochs of plain classifier training before CASM (paper: 0, the weights are pre-trained;
    embedded set: 8)."""

    pretrain_lr: float | None = None
    """Peak learning rate of that training, which falls to zero along a cosine."""

    pretrain_weight_decay: float | None = None
    """L2 weight decay of that training (paper: 0.0001; embedded set: 0.001)."""

    seed: int = 0
    """Seed of initial weights, data order, augmentation and history draws."""

    device: str = "auto"
    """"auto" (a GPU when there is one), "cpu", "cuda", "cuda:1" ...; with several processes
    "auto" and "cuda" give each its own GPU."""

    sync_batchnorm: bool = False
    """Several processes: normalise by the whole batch instead of each process's part of it."""

    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision of the networks' passes; weights, losses and statistics stay float32. "fp16"
    scales the losses, and leaves out steps whose gradients overflow."""

    accumulate: int = 1
    """Micro-batches that a batch is cut into to save memory; their gradients are added up, batch
    normalisation sees each alone."""

    compile: bool = False
    """Compile the passes of a step with torch.compile, gradients included: slower to start (minutes
    on a CPU), then faster."""

    cuda_graphs: bool = False
    """With `compile` on a GPU: replay the passes as CUDA graphs."""

    channels_last: bool = True
    """Keep images and weights in channels-last memory order (faster convolutions on GPUs and some
    CPUs)."""

    workers: int = 4
    """Threads that decode images beside the training; 0 decodes in between. The images do not
    depend on it, and a set in memory needs none."""

    strict: bool = False
    """Stop at an image that cannot be read, instead of skipping and naming it."""

    validation_interval: int = 1
    """Validate every so many CASM epochs and after the last; 0: after the last alone."""

    log_interval: int = 20
    """Steps between two log lines; the host waits for the device only then."""

    save_interval: int = 500
    """Steps between two saved states inside an epoch; every epoch ends with one too."""

    progress: bool = True
    """Show a progress bar when the error stream is a terminal."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder when the tensorboard package is installed."""

    def __post_init__(self) -> None:
        """Refuse values that no run can use.

        Raises:
            ValueError: Naming the field, what was expected and what came.
        """
        if not isinstance(self.data, str) or not self.data:
            raise ValueError(
                f"data: expected a data set such as 'synthetic' or 'imagenet:DIR', "
                f"got {self.data!r}"
            )
        if self.strategy is not None:
            Strategy.parse(self.strategy)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in RECIPE_FIELDS):
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        for name, (kind, low, high, requirement) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in RECIPE_FIELDS:
                continue
            numeric = isinstance(value, int if kind is int else (int, float)) and not isinstance(
                value, bool
            )
            if not numeric or not low <= value <= high:
                raise ValueError(f"{name}: expected {requirement}, got {value!r}")
        batch_size = self.recipe().batch_size
        if batch_size < 2 * self.accumulate:
            raise ValueError(
                f"accumulate: expected micro-batches of at least 2 images (batch normalisation "
                f"needs two), got {self.accumulate} of a batch of {batch_size}"
            )
        if self.cuda_graphs and not self.compile:
            raise ValueError(
                "cuda_graphs: expected compile=True, whose graphs they capture, got compile=False"
            )
        if self.compile and self.sync_batchnorm:
            raise ValueError(
                "sync_batchnorm: expected compile=False, whose graphs cannot hold what processes "
                "tell one another, got compile=True"
            )
        if self.lambda_r not in ("preset", "auto") and (
            isinstance(self.lambda_r, (str, bool)) or not 0 <= self.lambda_r < math.inf
        ):
            raise ValueError(
                f"lambda_r: expected a number >= 0, 'preset' or 'auto', got {self.lambda_r!r}"
            )
        if self.lambda_in != "preset" and (
            isinstance(self.lambda_in, (str, bool)) or not 0 <= self.lambda_in < math.inf
        ):
            raise ValueError(
                f"lambda_in: expected a number >= 0 or 'preset', got {self.lambda_in!r}"
            )
        if len(self.infill_colour) != 3 or not all(0 <= level <= 1 for level in self.infill_colour):
            raise ValueError(
                f"infill_colour: expected three numbers from 0 to 1, got {self.infill_colour!r}"
            )
        if self.resume and self.output is None:
            raise ValueError(
                "resume: expected `output` to name the folder of the run to continue, "
                "got output=None"
            )

    @property
    def embedded(self) -> bool:
        """Whether the data set is the embedded synthetic one."""
        return self.data == "synthetic" or self.data.startswith("synthetic:")

    def recipe(self) -> Recipe:
        """The data-dependent settings: those set here, the rest from `EMBEDDED` or `PAPER`."""
        chosen = {
            name: getattr(self, name) for name in RECIPE_FIELDS if getattr(self, name) is not None
        }
        return replace(EMBEDDED if self.embedded else PAPER, **chosen)

    def resolved(self) -> TrainConfig:
        """The same configuration with every field that was `None` filled in (`output` excepted)."""
        return replace(self, **dataclasses.asdict(self.recipe()))

    def tap_indices(self) -> tuple[int, ...] | None:
        """The taps that the decoder reads; `None` for all."""
        if self.taps is None and self.objective == "masked_in_out":
            return SUCCESSOR_TAPS
        return self.taps

    def lambda_value(self, classes: int) -> float:
        """The number that lambda_R starts from: the one given, or `lambda_preset`."""
        if isinstance(self.lambda_r, str):
            return lambda_preset(self.recipe().strategy, self.score, classes, self.objective)
        return float(self.lambda_r)

    def lambda_in_value(self, classes: int) -> float:
        """The number that `lambda_in` stands for."""
        if isinstance(self.lambda_in, str):
            return in_units_of_entropy(SUCCESSOR_LAMBDA_IN, classes)
        return float(self.lambda_in)

    def describe(self) -> dict[str, Any]:
        """The resolved fields as JSON values, for config.json, checkpoints and comparisons."""
        described = dataclasses.asdict(self.resolved())
        described["output"] = None if self.output is None else str(self.output)
        described["infill_colour"] = list(self.infill_colour)
        described["taps"] = None if self.taps is None else list(self.taps)
        return described


RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))

# Fields that change where a run happens and what it prints, but none of its weights: a resumed run
# may change them. `epochs` is among them because no step depends on how many follow.
FREE_FIELDS = frozenset(
    {
        "output",
        "resume",
        "epochs",
        "history_device",
        "device",
        "workers",
        "strict",
        "validation_interval",
        "log_interval",
        "save_interval",
        "progress",
        "tensorboard",
    }
)

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("masked_out", "masked_in_out"),
    "score": ("entropy", "classification"),
    "classifier_update": ("joint", "alternating"),
    "history_device": ("auto", "device", "host"),
    "infill": ("mean", "colour", "blur", "noise"),
    "augment": ("imagenet", "flip", "none"),
    "schedule": ("step", "constant"),
    "amp": ("off", "bf16", "fp16"),
}

_MOST = 2**31 - 1
_TINY = 1e-30  # "greater than zero" for a rate: anything smaller than this cannot be meant

RANGES: dict[str, tuple[type[int] | type[float], float, float, str]] = {
    "lambda_tv": (float, 0.0, 1e30, "a number >= 0"),
    "target_saliency": (float, 0.01, 0.99, "a number from 0.01 to 0.99"),
    "history_probability": (float, 0.0, 1.0, "a probability from 0 to 1"),
    "history_size": (int, 1, _MOST, "a whole number >= 1"),
    "infill_sigma": (float, 0.0, 1e6, "a number of pixels >= 0"),
    "decoder_width": (int, 1, 1 << 16, "a whole number >= 1"),
    "input_size": (int, 8, 1 << 16, "a whole number of pixels >= 8"),
    "batch_size": (int, 2, _MOST, "a whole number >= 2 (batch normalisation needs two images)"),
    "accumulate": (int, 1, _MOST, "a whole number >= 1"),
    "epochs": (int, 0, _MOST, "a whole number >= 0"),
    "epoch_fraction": (float, _TINY, 1.0, "a share greater than 0 and at most 1"),
    "classifier_lr": (float, 0.0, 1e6, "a number >= 0"),
    "decoder_lr": (float, 0.0, 1e6, "a number >= 0"),
    "decoder_ema": (float, 0.0, 1.0 - 1e-9, "a decay from 0 (off) to below 1"),
    "schedule_epochs": (int, 1, _MOST, "a whole number >= 1"),
    "schedule_factor": (float, _TINY, 1.0, "a number greater than 0 and at most 1"),
    "momentum": (float, 0.0, 1.0, "a number from 0 to 1"),
    "weight_decay": (float, 0.0, 1e6, "a number >= 0"),
    "clip_gradient": (float, _TINY, 1e30, "a number greater than 0"),
    "pretrain_epochs": (int, 0, _MOST, "a whole number >= 0"),
    "pretrain_lr": (float, 0.0, 1e6, "a number >= 0"),
    "pretrain_weight_decay": (float, 0.0, 1e6, "a number >= 0"),
    "seed": (int, 0, _MOST, "a whole number >= 0"),
    "workers": (int, 0, 4096, "a whole number >= 0"),
    "validation_interval": (int, 0, _MOST, "a whole number >= 0"),
    "log_interval": (int, 1, _MOST, "a whole number >= 1"),
    "save_interval": (int, 1, _MOST, "a whole number >= 1"),
}
