"""`train_real_time`: the network of `casm_fast.attribution.realtime`, for one classifier.

Two phases (the authors' code). In "selector" the class embeddings alone learn to tell the image's
class from a fake one, by logistic regression. In "masks" they are fixed, and the decoder learns by
the loss of `casm_fast.attribution.realtime_loss`.

The loop is made of the training engine's parts: loader, optimiser steps, log, atomic files, stop
signals. The random numbers of a step belong to the step, not to the steps before it, so that a run
that was stopped goes on to the same weights, bit by bit on a CPU. One process trains::

    run = train_real_time("runs/classifier", "imagenet:/data/ILSVRC", output="runs/real_time")
    casm_fast.attribute("real_time", classifier, images, targets, model=run.checkpoint)
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast.attribution.realtime import FILE_NAME, RealTimeModel, save_real_time
from casm_fast.attribution.realtime_config import PHASES, Phase, RealTimeConfig
from casm_fast.attribution.realtime_loss import mask_loss
from casm_fast.data.decoding import DecodeError
from casm_fast.data.loading import TrainingBatch, batches_per_epoch, training_batches
from casm_fast.data.signals import StopRequest, obey, stop_requests
from casm_fast.data.source import ImageSource, open_source
from casm_fast.data.transforms import normalize
from casm_fast.models.checkpoint import load
from casm_fast.models.encoder import Encoder
from casm_fast.models.placement import choose_device
from casm_fast.models.saliency import SaliencyModel
from casm_fast.training.descent import Descent
from casm_fast.training.progress import RunLog
from casm_fast.training.state import compare, write_atomically

logger = logging.getLogger(__name__)

_FREE = ("output", "resume", "device", "workers", "log_interval", "save_interval", "progress")


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
            pixels = normalize(batch.images.to(self.device, non_blocking=True))
            self._advance(pixels, batch.labels)
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
