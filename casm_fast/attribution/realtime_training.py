"""`train_real_time`: the network of `casm_fast.attribution.realtime`, for one classifier.

Two phases (the authors' code). In "selector" the class embeddings alone learn to tell the image's
class from a fake one, by logistic regression. In "masks" they are fixed, and the decoder learns.
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

The loop is made of the training engine's parts: loader, optimiser steps, log, atomic files, stop
signals. The random numbers of a step belong to the step, not to the steps before it, so that a run
that was stopped goes on to the same weights, bit by bit on a CPU. One process trains::

    run = train_real_time("runs/classifier", "imagenet:/data/ILSVRC", output="runs/real_time")
    casm_fast.attribute("real_time", classifier, images, targets, model=run.checkpoint)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast import ops
from casm_fast.attribution.proportion import in_proportion
from casm_fast.attribution.realtime import FILE_NAME, WIDTH, RealTimeModel, save_real_time
from casm_fast.data.decoding import DecodeError
from casm_fast.data.loading import Augment, TrainingBatch, batches_per_epoch, training_batches
from casm_fast.data.signals import StopRequest, obey, stop_requests
from casm_fast.data.source import ImageSource, open_source
from casm_fast.models.checkpoint import load
from casm_fast.models.encoder import Encoder
from casm_fast.models.placement import choose_device
from casm_fast.models.saliency import SaliencyModel
from casm_fast.training.descent import Descent
from casm_fast.training.objective import smoothness
from casm_fast.training.progress import RunLog
from casm_fast.training.state import compare, write_atomically

logger = logging.getLogger(__name__)

Phase = Literal["selector", "masks"]
PHASES: tuple[Phase, ...] = get_args(Phase)

# The authors' images lie in [-1, 1] and reach their classifier times two; normalised images have
# about that range, so that their amplitudes are doubled here.
DOMAIN = 2.0

# The derivative of m^0.3 has no bound at 0.
AREA_OFFSET = 0.0005

# 55 taps at sigma 11.
BLUR_TRUNCATE = 27 / 11

_FREE = ("output", "resume", "device", "workers", "log_interval", "save_interval", "progress")


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


@dataclass(frozen=True)
class RealTimeResult:
    """What a run left behind.

    Attributes:
        folder: The run folder.
        checkpoint: The trained model, for ``attribute("real_time", ..., model=checkpoint)``.
        log: One JSON object per line.
    """

    folder: Path
    checkpoint: Path
    log: Path


def train_real_time(
    classifier: Encoder | SaliencyModel | str | Path,
    data: str | Path | ImageSource,
    config: RealTimeConfig | None = None,
    **overrides: Any,
) -> RealTimeResult:
    """Train a network that masks the evidence of a classifier.

    Args:
        classifier: What is to be explained; its copy is the encoder as well. From
            `casm_fast.models.build_encoder`, a `SaliencyModel`, or the file or run folder of one.
        data: Labelled training images, see `casm_fast.data.open_source`.
        config: What to do; the authors' settings when left out.
        **overrides: Fields of `RealTimeConfig` by name.

    Returns:
        Where everything is.

    Raises:
        ValueError: A setting that cannot be used, a classifier that cannot be built again, other
            classes than the data's, or a saved state of another run.
        FloatingPointError: A loss that is not a finite number.
        KeyboardInterrupt: After Ctrl-C, with the state saved.
        SystemExit: After SIGTERM, with the state saved.
    """
    config = replace(config or RealTimeConfig(), **overrides)
    source = open_source(data, "train")
    encoder = _encoder(classifier)
    if encoder.classes != len(source.classes):
        raise ValueError(
            f"classifier: expected one of the {len(source.classes)} classes of {source.name}, got "
            f"one of {encoder.classes}"
        )
    if encoder.classes < 2:
        raise ValueError(f"data: expected at least 2 classes, got 1 in {source.name}")
    device = choose_device(config.device)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(config.seed)
        model = RealTimeModel(encoder, width=config.width, input_size=config.input_size)
    folder = _folder(config)
    with stop_requests() as stop:
        return _Run(model.to(device), source, config, folder, stop).finish()


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


def _encoder(classifier: Encoder | SaliencyModel | str | Path) -> Encoder:
    """The classifier as an encoder that a file can name."""
    if isinstance(classifier, (str, Path)):
        return load(classifier).classifier
    found = classifier.classifier if isinstance(classifier, SaliencyModel) else classifier
    if not isinstance(found, Encoder):
        raise TypeError(
            "classifier: expected an encoder from build_encoder, a SaliencyModel or its file, got "
            f"{type(found).__name__}"
        )
    if not found.name:
        raise ValueError(
            "classifier: expected an encoder from build_encoder, which the model's file can name, "
            f"got a {type(found.backbone).__name__} of the caller's own"
        )
    return found


def _folder(config: RealTimeConfig) -> Path:
    folder = Path("runs/real_time") if config.output is None else Path(config.output)
    if not config.resume and (folder / "config.json").exists():
        raise ValueError(
            f"output: expected a new folder, got {folder}, which holds a run; "
            "pass resume=True to continue that run, or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _Run:
    """A run between its first and its last step."""

    def __init__(
        self,
        model: RealTimeModel,
        source: ImageSource,
        config: RealTimeConfig,
        folder: Path,
        stop: StopRequest,
    ) -> None:
        self.model, self.source, self.config = model, source, config
        self.folder, self.stop = folder, stop
        self.device = next(model.parameters()).device
        self.stream = torch.Generator(self.device)
        self.phase: Phase = "selector"
        self.step = 0
        self.sums: dict[str, Tensor] = {}
        self.images = 0
        self.descent = self._begin("selector")
        described = config.describe()
        self.fingerprint = {
            **{name: described[name] for name in described if name not in _FREE},
            "images": len(source),
            "classes": list(source.classes),
            "classifier": _digest(model.encoder),
        }

    def finish(self) -> RealTimeResult:
        sizes = self._restore() if self.config.resume else None
        text = json.dumps(self.config.describe(), indent=2) + "\n"
        write_atomically(self.folder / "config.json", lambda path: path.write_text(text))
        with RunLog(self.folder, self.config.progress, tensorboard=False, sizes=sizes) as self.log:
            for phase in PHASES[PHASES.index(self.phase) :]:
                if phase != self.phase:
                    self.phase, self.step = phase, 0
                    self.descent = self._begin(phase)
                self._go_on()
            checkpoint = save_real_time(self.model.eval(), self.folder / FILE_NAME)
        return RealTimeResult(self.folder, checkpoint, self.folder / "log.jsonl")

    def _begin(self, phase: Phase) -> Descent:
        """Enter a phase: what is learned in it, and its optimiser."""
        learned = {
            "selector": list(self.model.selector.parameters()),
            "masks": list(self.model.decoder_parameters()),
        }
        for name, parameters in learned.items():
            for parameter in parameters:
                parameter.requires_grad_(name == phase)
        self.model.train()
        config = self.config
        adam = torch.optim.Adam(
            learned[phase], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        return Descent(adam, scaled=False)

    def _go_on(self) -> None:
        """The remaining steps of the current phase."""
        config, total = self.config, self.config.steps(self.phase)
        self.log.open_bar(self.phase, total, self.step)
        self.clock = time.perf_counter()
        for batch in self._batches():
            self._advance(batch.images, batch.labels)
            self.step += 1
            self.log.advance()
            last = self.step == total
            if last or self.step % config.log_interval == 0:
                self._record()
            if last or self.step % config.save_interval == 0 or self.stop.signal is not None:
                self._save()
            if self.stop.signal is not None:
                obey(
                    self.stop.signal,
                    f"stopped after step {self.step} of the {self.phase} phase; to go on: "
                    f"resume=True, output={str(self.folder)!r}",
                )
        self.log.close_bar()

    def _batches(self) -> Iterator[TrainingBatch]:
        """The batches of the remaining steps; no two phases see the same epoch."""
        config, size = self.config, self.config.batch(self.phase)
        if self.step == config.steps(self.phase):
            return
        before = 0
        if self.phase == "masks" and config.selector_steps:
            before = -(-config.selector_steps // self._epoch("selector"))
        epoch = self._epoch(self.phase)
        step = self.step
        while step < config.steps(self.phase):
            batches = training_batches(
                self.source,
                size=config.input_size,
                batch_size=size,
                seed=config.seed,
                epoch=before + step // epoch,
                first_batch=step % epoch,
                workers=config.workers,
                augment=config.augment,
                pin_memory=self.device.type == "cuda",
            )
            for batch in batches:
                if batch.skipped:
                    logger.warning("skipped: %s", "; ".join(batch.skipped))
                if not len(batch.labels):
                    raise DecodeError(f"not one image of a batch can be read: {batch.skipped[0]}")
                yield batch
                step += 1
                if step == config.steps(self.phase):
                    return

    def _epoch(self, phase: Phase) -> int:
        return batches_per_epoch(self.source, self.config.batch(phase), 1.0)

    def _advance(self, images: Tensor, labels: Tensor) -> None:
        """One step."""
        config, stream, selects = self.config, self.stream, self.phase == "selector"
        stream.manual_seed(_seed(config.seed, PHASES.index(self.phase), self.step))
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        classes = self.model.encoder.classes
        share = config.selector_fakes if selects else config.mask_fakes
        fake = torch.rand(len(labels), generator=stream, device=self.device) < share
        other = torch.randint(
            1, classes, (len(labels),), generator=stream, device=self.device
        )  # never the class itself
        asked = torch.where(fake, (labels + other) % classes, labels)
        taps = self.model.read(images)
        if selects:
            rate = 0.1 ** (self.step // config.selector_decay)
            self.descent.rate = config.learning_rate * rate
            present = self.model.selector(taps[0], asked).mean(dim=(1, 2, 3))
            loss = F.binary_cross_entropy_with_logits(present, (~fake).to(present.dtype))
            parts = {"loss": loss, "accuracy": ((present > 0) == ~fake).float().mean()}
        else:
            masks, present = self.model(taps, asked)
            parts = mask_loss(self.model.encoder, images, labels, ~fake, masks, config, stream) | {
                "accuracy": ((present > 0) == ~fake).float().mean()
            }
        self.descent.step(torch.autograd.grad(parts["loss"], self.descent.parameters))
        for name, value in parts.items():
            summed = self.sums.get(name, torch.zeros((), device=self.device))
            self.sums[name] = summed + len(labels) * value.detach()
        self.images += len(labels)

    def _record(self) -> None:
        """Log the means since the last record; waits for the device."""
        seconds = time.perf_counter() - self.clock
        self._check_finite()
        means = {name: float(value) / self.images for name, value in self.sums.items()}
        self.log.write(
            {
                "phase": self.phase,
                "split": "train",
                "epoch": (self.step - 1) // self._epoch(self.phase),
                "step": self.step,
                **means,
                "images_per_second": round(self.images / max(seconds, 1e-9), 1),
                "seconds": round(seconds, 3),
            }
        )
        self.sums, self.images, self.clock = {}, 0, time.perf_counter()

    def _check_finite(self) -> None:
        loss = self.sums.get("loss")
        if loss is not None and not bool(loss.isfinite()):
            raise FloatingPointError(
                f"the loss is not a finite number by step {self.step} of the {self.phase} phase: "
                "try a lower learning_rate; the state saved last is from before"
            )

    def _save(self) -> None:
        self._check_finite()
        content = {
            "fingerprint": self.fingerprint,
            "phase": self.phase,
            "step": self.step,
            "model": self.model.state_dict(),
            "descent": self.descent.state(),
            "sums": self.sums,
            "images": self.images,
            "log_sizes": self.log.sizes(),
        }
        write_atomically(self.folder / "state.pt", partial(torch.save, content))

    def _restore(self) -> dict[str, int] | None:
        """Go where `_save` was; the sizes of the log files then, None where nothing is saved."""
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            fingerprint = saved["fingerprint"]
        except Exception as error:  # torch.load raises a dozen types for damaged files
            raise ValueError(
                f"{path}: expected a state written by train_real_time, got an unreadable file"
            ) from error
        compare(fingerprint, self.fingerprint, path)
        self.phase, self.step = saved["phase"], saved["step"]
        self.descent = self._begin(self.phase)
        self.model.load_state_dict(saved["model"])
        self.descent.restore(saved["descent"])
        self.sums, self.images = saved["sums"], saved["images"]
        sizes: dict[str, int] = saved["log_sizes"]
        return sizes


def _seed(*numbers: int) -> int:
    """A seed for a generator, of several numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _digest(encoder: Encoder) -> str:
    """What tells one classifier from another."""
    digest = hashlib.blake2b(json.dumps(encoder.description()).encode(), digest_size=16)
    for name, tensor in sorted(encoder.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
