"""`train`: open the data, build the networks, run the phases, and leave a run folder behind.

The folder holds::

    config.json          the configuration, every default filled in
    model.safetensors    the latest networks, replaced after every CASM epoch
    log.jsonl, log.csv   one record per log interval and per validation
    state/               what an exact resume needs
    tensorboard/         when TensorBoard is installed
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from casm_fast.data.decoding import DecodeError
from casm_fast.data.loading import TrainingBatch, batches_per_epoch, training_batches
from casm_fast.data.signals import StopRequest, obey, stop_requests
from casm_fast.data.source import ImageSource, open_source
from casm_fast.data.subset import subset
from casm_fast.data.transforms import normalize
from casm_fast.models import checkpoint
from casm_fast.models.saliency import SaliencyModel, build_model
from casm_fast.training import calibration, distributed, state
from casm_fast.training.config import TrainConfig
from casm_fast.training.distributed import World
from casm_fast.training.engine import Engine
from casm_fast.training.progress import RunLog
from casm_fast.training.validation import validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        folder: The run folder.
        checkpoint: The trained model, for `casm_fast.load`.
        log: One JSON object per line.
        scores: The last validation, see `casm_fast.training.validation.validate`; empty without
            one. With ``lambda_r="auto"`` also `lambda_r` and `held_out_saliency`, the mean saliency
            on the images that were held out for it.
    """

    folder: Path
    checkpoint: Path
    log: Path
    scores: dict[str, float]


def train(
    config: TrainConfig | None = None,
    *,
    sources: tuple[ImageSource, ImageSource | None] | None = None,
    **overrides: Any,
) -> TrainResult:
    """Train classifier-agnostic saliency maps (Algorithm 1 of the paper).

    Without arguments: the embedded synthetic set, a compact classifier trained from scratch, then
    CASM; some minutes on a CPU. Press Ctrl-C at any time: the state is saved, and
    ``train(config, output=folder, resume=True)`` continues to the same weights, bit by bit on a
    CPU. Started by torchrun, N processes share every batch and end with the same weights.

    Args:
        config: What to do; `TrainConfig()` when left out.
        sources: Training and validation images (or `None`: no validation), instead of those that
            `config.data` names.
        **overrides: Fields of `TrainConfig` that replace those of `config`.

    Returns:
        Where everything is, and the last validation scores.

    Raises:
        ValueError: A setting that cannot be used, or a saved state of another run.
        FloatingPointError: A loss that is not a finite number; the message names the step.
        KeyboardInterrupt: After Ctrl-C, with the state saved.
        SystemExit: After SIGTERM, with the state saved.
    """
    config = replace(config or TrainConfig(), **overrides)
    with distributed.joined(config.device) as world:
        return _train(config, world, sources)


def _train(
    config: TrainConfig, world: World, sources: tuple[ImageSource, ImageSource | None] | None
) -> TrainResult:
    distributed.check_batch_size(world, config.recipe().batch_size)
    device = world.device
    training, validation = sources or (
        open_source(config.data, "train"),
        open_source(config.data, "val"),
    )
    if validation is not None and validation.name == training.name:
        logger.warning("%s has no separate validation images: no validation", training.name)
        validation = None
    folder = Path(world.told_by_leader(str(prepare_folder(config)) if world.leads else ""))
    # The seed must not change the random numbers of the program that calls us.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        networks = build_networks(config, training)
        if config.sync_batchnorm:
            distributed.synchronize_batchnorm(networks, world)
        engine = Engine(networks, config, classes=len(training.classes), device=device, world=world)
        with stop_requests(patient=world.size > 1) as stop:
            return _run(engine, training, validation, folder, stop)


def build_networks(config: TrainConfig, source: ImageSource) -> SaliencyModel:
    """Classifier, encoder and decoder for a data set, freshly initialised or from `config.weights`.

    Raises:
        ValueError: When the data set has fewer than two classes.
    """
    recipe = config.recipe()
    if len(source.classes) < 2:
        raise ValueError(
            f"data: expected at least 2 classes to train on, got {len(source.classes)} in "
            f"{source.name}; a training set has one folder of images per class"
        )
    return build_model(
        recipe.backbone,
        classes=source.classes,
        weights=None if recipe.weights == "none" else recipe.weights,
        shared=config.shared_encoder,
        width=recipe.decoder_width,
        tap0_projection=config.tap0_projection,
        tap_indices=config.tap_indices(),
        input_size=recipe.input_size,
    )


def prepare_folder(config: TrainConfig) -> Path:
    """Create the run folder, or find the one to resume.

    Raises:
        ValueError: When the folder holds a run and `config.resume` is off.
    """
    folder = config.output
    if folder is None:
        data = "".join(letter if letter.isalnum() else "-" for letter in config.data)[:40].strip(
            "-"
        )
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{data}-{config.recipe().strategy}"
        folder = Path("runs") / name
        for number in range(2, 1000):
            if not folder.exists():
                break
            folder = Path("runs") / f"{name}-{number}"
    folder = Path(folder)
    if not config.resume and (folder / "config.json").exists():
        raise ValueError(
            f"output: expected a new folder, got {folder}, which holds a run; "
            "pass resume=True to continue that run, or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(
    engine: Engine,
    training: ImageSource,
    validation: ImageSource | None,
    folder: Path,
    stop: StopRequest,
) -> TrainResult:
    """Restore what is saved, and do what is left."""
    config = engine.config
    fingerprint = {**config.describe(), "images": len(training), "classes": list(training.classes)}
    engine.world.check_equal(
        "the same options, data and initial weights", repr((fingerprint, engine.digest()))
    )
    held_out = None
    if engine.calibration is not None:
        kept, apart = calibration.split(len(training), config.seed)
        training, held_out = subset(training, kept), subset(training, apart)
    saved = None
    if config.resume:
        saved = state.load(folder / "state", engine, fingerprint=fingerprint)
    leads = engine.world.leads
    if leads:
        description = json.dumps(config.describe(), indent=2) + "\n"
        state.write_atomically(folder / "config.json", lambda path: path.write_text(description))
    sizes = None if saved is None else saved.log_sizes
    with RunLog(folder, config.progress, config.tensorboard, sizes, silent=not leads) as log:
        run = _Run(engine, training, validation, held_out, folder, stop, log, fingerprint)
        if saved is not None:
            run.position, run.scores = saved.position, dict(saved.scores)
            step, phase = run.position.step, run.position.phase
            logger.info("resuming %s at step %d of the %s phase", folder, step, phase)
        run.finish()
    return TrainResult(folder, run.checkpoint, folder / "log.jsonl", run.scores)


@dataclass
class _Run:
    """A run between its first and its last step."""

    engine: Engine
    training: ImageSource
    validation: ImageSource | None
    held_out: ImageSource | None
    folder: Path
    stop: StopRequest
    log: RunLog
    fingerprint: dict[str, Any]
    position: state.Position = field(default_factory=state.Position)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "model.safetensors"

    def finish(self) -> None:
        """Do both phases from the current position on."""
        recipe = self.engine.recipe
        if self.position.phase == "pretrain":
            self._phase(recipe.pretrain_epochs, fraction=1.0)
            if recipe.pretrain_epochs > 0:
                self._validate()
            self.engine.begin("casm")
            self.position = state.Position("casm", skipped=self.position.skipped)
            self._write_model()
            self._save()
        self._phase(recipe.epochs, fraction=recipe.epoch_fraction)
        if self.position.skipped and self.engine.world.leads:
            logger.warning(
                "%d times an image could not be read and was skipped; log.jsonl names each",
                self.position.skipped,
            )

    def _phase(self, epochs: int, fraction: float) -> None:
        """The remaining epochs of the current phase."""
        steps = batches_per_epoch(self.training, self.engine.recipe.batch_size, fraction)
        total = epochs * steps
        if self.position.step >= total:
            return
        self.log.open_bar(self.position.phase, total, self.position.step)
        while self.position.epoch < epochs:
            self._epoch(total, fraction)
            self._log_interval()
            self.position = replace(self.position, epoch=self.position.epoch + 1, batch=0)
            if self.position.phase == "casm":
                interval = self.engine.config.validation_interval
                last = self.position.epoch == epochs
                self._calibrate(last)
                if last or (interval and self.position.epoch % interval == 0):
                    self._validate()
                self._write_model()
            self._save()
        self.log.close_bar()

    def _epoch(self, total: int, fraction: float) -> None:
        """The remaining batches of the current epoch."""
        config, position = self.engine.config, self.position
        self._start_clock()
        for batch in self._batches(fraction):
            images, skipped, short, interrupted, terminated = self.engine.world.totals(
                len(batch.labels),
                len(batch.skipped),
                len(batch.labels) < self.engine.least_images,
                self.stop.signal == signal.SIGINT,
                self.stop.signal == signal.SIGTERM,
            )
            if skipped:
                unread = self.engine.world.gathered(batch.skipped)
                if self.engine.world.leads:
                    logger.warning("skipped: %s", "; ".join(unread))
                position.unread += unread
                position.skipped += skipped
            if not images:
                raise DecodeError(f"not one image of a batch can be read: {batch.skipped[0]}")
            if not short:
                pixels = normalize(batch.images.to(self.engine.device, non_blocking=True))
                self.engine.step(pixels, batch.labels, position.step, total, position.epoch)
            self._seen += images
            position.batch += 1
            position.step += 1
            self.log.advance()
            if position.batch % config.log_interval == 0:
                self._log_interval()
            number = self.stop.signal
            if self.engine.world.size > 1:  # what all of them knew before the step
                number = signal.SIGINT if interrupted else signal.SIGTERM if terminated else None
            if number is not None:
                self._save()
                obey(
                    number,
                    f"stopped after step {position.step} of the {position.phase} phase; to go on: "
                    f"resume=True, output={str(self.folder)!r}",
                )
            if position.batch % config.save_interval == 0:
                self._save()

    def _batches(self, fraction: float) -> Iterator[TrainingBatch]:
        """The rest of the current epoch's batches; the two phases never see the same epoch."""
        config, recipe = self.engine.config, self.engine.recipe
        before = recipe.pretrain_epochs if self.position.phase == "casm" else 0
        return training_batches(
            self.training,
            size=recipe.input_size,
            batch_size=recipe.batch_size,
            seed=config.seed,
            epoch=before + self.position.epoch,
            fraction=fraction,
            first_batch=self.position.batch,
            workers=config.workers,
            augment=recipe.augment,
            pin_memory=self.engine.device.type == "cuda",
            strict=config.strict,
            shard=(self.engine.world.rank, self.engine.world.size),
        )

    def _validate(self) -> None:
        if self.validation is None:
            return
        scores = validate(self.engine, self.validation)
        if self.position.phase == "pretrain":
            self.scores = {"pretrained_accuracy": scores["accuracy"]}
            scores = {name: scores[name] for name in ("loss", "accuracy")}
        else:
            self.scores = {**self.scores, **scores}
        self.log.write({**self._where("val"), **scores})

    def _calibrate(self, last: bool) -> None:
        """Tell the calibration how large masks are on images that nothing is trained on."""
        steering = self.engine.calibration
        if steering is None or self.held_out is None:
            return
        lambda_r = float(self.engine.lambda_r)
        found = validate(self.engine, self.held_out)["mean_saliency"]
        steering.correct(found)
        self.scores.update(held_out_saliency=found, lambda_r=lambda_r)
        measured = {"mean_saliency": found, "lambda_r": lambda_r}
        self.log.write({**self._where("held_out"), **measured})
        if last and abs(found - steering.target) > calibration.TOLERANCE:
            logger.warning(
                "lambda_r='auto' ends at a mean saliency of %.3f on %d held-out images instead of "
                "%.3f +- %g: train for more epochs, or ask for another target_saliency",
                found,
                len(self.held_out),
                steering.target,
                calibration.TOLERANCE,
            )

    def _log_interval(self) -> None:
        images, means = self.engine.images, self.engine.statistics()
        seconds = time.perf_counter() - self._clock
        if images:
            rate = self._seen / max(seconds, 1e-9)
            timing = {"images_per_second": round(rate, 1), "seconds": round(seconds, 3)}
            record = {**self._where("train"), **means, **timing}
            if self.position.unread:
                record |= {
                    "skipped": len(self.position.unread),
                    "skipped_images": self.position.unread,
                }
                self.position.unread = []
            self.log.write(record)
        self._start_clock()

    def _start_clock(self) -> None:
        self._clock, self._seen = time.perf_counter(), 0

    def _where(self, split: str) -> dict[str, Any]:
        position = self.position
        return {
            "phase": position.phase,
            "split": split,
            "epoch": position.epoch,
            "step": position.step,
        }

    def _write_model(self) -> None:
        if not self.engine.world.leads:
            return
        extra: dict[str, Any] = {
            "training": self.engine.config.describe(),
            "scores": self.scores,
        }
        if self.engine.calibration is not None:
            extra["lambda_r"] = float(self.engine.lambda_r)
        checkpoint.save(self.engine.outcome, self.checkpoint, extra=extra)

    def _save(self) -> None:
        state.save(
            self.folder / "state",
            self.engine,
            self.position,
            fingerprint=self.fingerprint,
            scores=self.scores,
            log_sizes=self.log.sizes(),
        )
