"""What a recipe works with: trainings, boxes, scores and cells that are made once and kept.

The output folder holds::

    runs/<strategy>-<digest>/     trained models, shared by all experiments in the folder, and
        boxes-<digest>.parquet    what was extracted with them
    <experiment>/
        settings.json             what the experiment was started with; other settings are refused
        cells/<name>.json         finished parts of the work
        results.json  *.csv  *.png  index.html

A digest names everything that a result depends on, so that two recipes (or two calls) that need the
same training share it, and nothing stale is ever taken for new. A call that was stopped, in
whatever way, goes on where it stopped: finished parts are read, and an unfinished training resumes
from its last saved state.

Started by torchrun, all processes run the recipe and share every training; everything else is done
by rank 0 alone, and the others read what it wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import casm_fast
from casm_fast.data.source import ImageSource, open_source
from casm_fast.evaluation import evaluate
from casm_fast.experiments.findings import PAPER, Findings
from casm_fast.extraction import extract
from casm_fast.models import checkpoint
from casm_fast.models.placement import choose_device
from casm_fast.models.saliency import SaliencyModel
from casm_fast.training import TrainConfig, train
from casm_fast.training.config import FREE_FIELDS
from casm_fast.training.distributed import leads
from casm_fast.training.state import compare

logger = logging.getLogger(__name__)

IMAGENET_CLASSES, IMAGENET_IMAGES = 1000, 50_000
"""Classes and validation images of the paper's data set."""

FROM_SCRATCH = {"pretrain_epochs": 90, "pretrain_lr": 0.1, "batch_size": 256}
"""How torchvision's model zoo trained ResNet-50 on ImageNet; our rate falls along a cosine."""

_DIGITS = 10
_POLL = 0.2  # seconds between two looks for what rank 0 writes
# Fields of a configuration that change no result; `epochs` is free only for a resumed run.
_IRRELEVANT = FREE_FIELDS - {"epochs"}


@dataclass(frozen=True)
class Scale:
    """How large an experiment is run.

    Attributes:
        name: Of the scale.
        embedded: Options of the embedded set, such as ``"images=2000"``.
        training: Fields of `TrainConfig` for the embedded set.
        elsewhere: Fields of `TrainConfig` for any other set.
        scratch: The same for classifiers that are trained from scratch on any other set.
        images: Validation images that are scored; all when None.
        strategies: Strategies that are replaced because a run has too few steps for them.
    """

    name: str
    embedded: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Mapping[str, Any] = field(default_factory=dict)
    scratch: Mapping[str, Any] = field(default_factory=dict)
    images: int | None = None
    strategies: Mapping[str, str] = field(default_factory=dict)


FULL = Scale("full")
"""The presets of the data set: on ImageNet those of the paper."""

QUICK = Scale(
    "quick",
    training={
        "batch_size": 32,
        "pretrain_epochs": 6,
        "pretrain_lr": 0.05,
        "epochs": 3,
        "epoch_fraction": 0.3,
        "schedule_epochs": 2,
    },
    elsewhere={"epochs": 2, "epoch_fraction": 0.02, "schedule_epochs": 2},
    scratch={"pretrain_epochs": 2},
    images=1000,
    strategies={"L100": "L10", "L1000": "L30"},
)
"""Minutes on two cores with the embedded set."""

SMOKE = Scale(
    "smoke",
    embedded="images=64,size=32,classes=4",
    training={
        "input_size": 32,
        "batch_size": 8,
        "pretrain_epochs": 1,
        "epochs": 1,
        "history_size": 2,
        "decoder_width": 4,
    },
    images=24,
    strategies={"L100": "L1", "L1000": "L2"},
)
"""Seconds: everything is done, nothing is learned. For tests."""


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: Its folder; the name tells strategy and digest.
        config: What it was told, every default filled in.
    """

    folder: Path
    config: TrainConfig

    @property
    def checkpoint(self) -> Path:
        """The model."""
        return self.folder / checkpoint.FILE_NAME

    def model(self) -> SaliencyModel:
        """The model, in eval mode, on the device of the run."""
        return checkpoint.load(self.checkpoint, device=choose_device(self.config.device))


class Study:
    """One experiment on one data set at one scale.

    Attributes:
        name: Of the experiment.
        folder: Where its results go.
        data: Spec of the data set.
        scale: How large.
        seeds: How many repeated runs were asked for; None for the recipe's own number.
    """

    def __init__(
        self,
        name: str,
        output: Path,
        *,
        data: str = "synthetic",
        scale: Scale = FULL,
        embedded: str = "",
        seeds: int | None = None,
        device: str = "auto",
        workers: int = 4,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the data, and the folder if it was made with the same settings.

        Args:
            name: Of the experiment.
            output: Folder that the experiments share.
            data: Spec of the data set, as `open_source` takes it.
            scale: How large.
            embedded: Options of the embedded set that the experiment needs, beside the scale's.
            seeds: Repeated runs, for experiments that have any.
            device: Where networks run.
            workers: Threads that decode images.
            settings: Fields of `TrainConfig` for every training, over those of the scale.

        Raises:
            FileNotFoundError: The data set is not there.
            ValueError: The folder was made with other settings.
        """
        choose_device(device)
        if seeds is not None and seeds < 1:
            raise ValueError(f"seeds: expected a whole number of runs of at least 1, got {seeds}")
        self.name = name
        self.output = Path(output)
        self.folder = self.output / name
        self.scale = scale
        self.seeds = seeds
        self.device = device
        self.workers = workers
        self.settings = dict(settings or {})
        kind, _, options = data.partition(":")
        self.embedded = kind == "synthetic"
        if self.embedded:
            # The last of two values wins: what the caller asks for stands at the end.
            parts = (scale.embedded, embedded, options)
            data = f"{kind}:" + ",".join(filter(None, parts))
        self.data = data
        self._claim()

    # --- data -------------------------------------------------------------------------------------

    @cached_property
    def training(self) -> ImageSource:
        """The images that are learned from."""
        return open_source(self.data, "train")

    @cached_property
    def validation(self) -> ImageSource:
        """The images that are scored; `Scale.images` may take the first of them alone."""
        spec = self.data
        if self.embedded and self.scale.images is not None:
            spec += f",images={self.scale.images}"
        return open_source(spec, "val")

    @property
    def limit(self) -> int:
        """How many validation images are scored: the first ones."""
        return min(len(self.validation), self.scale.images or len(self.validation))

    @property
    def is_papers(self) -> bool:
        """Whether data and settings are the paper's, so that numbers may be compared."""
        return (
            self.scale == FULL
            and not self.settings
            and self.validation.name.startswith("imagenet")
            and len(self.validation.classes) == IMAGENET_CLASSES
            and len(self.validation) == IMAGENET_IMAGES
        )

    @property
    def notice(self) -> str:
        """What stands between these numbers and the paper's, in a sentence; empty if nothing."""
        if self.is_papers:
            return ""
        classes = len(self.validation.classes)
        what = f"{self.validation.name}, {classes} classes, {self.limit:,} images"
        if self.embedded:
            what = f"embedded synthetic set, {classes} classes, not ImageNet"
        elif classes == IMAGENET_CLASSES:
            what = f"{self.validation.name}, {self.limit:,} images, not the paper's settings"
        return f"{what}: compare directions, not numbers"

    @property
    def remarks(self) -> list[str]:
        """What this scale changes in every recipe, in sentences."""
        told = []
        if self.embedded and self.scale.strategies:
            pairs = ", ".join(f"{new} for {old}" for old, new in self.scale.strategies.items())
            told.append(
                "A run has hundreds of steps here instead of the paper's 140,000, so snapshots are "
                f"taken more often: {pairs}."
            )
        if self.scale != FULL:
            told.append(
                f"This is the {self.scale.name} form: fewer images and epochs than the preset. "
                "Runs of this length differ by ten points of LE and more from seed to seed (the "
                "experiment seeds measures it): smaller differences mean nothing."
            )
        return told

    def progress(self, what: str) -> None:
        """Say what comes next."""
        logger.info("%s: %s", self.name, what)

    def repeats(self, **by_scale: int) -> int:
        """How often something is repeated: as asked for, else the number of this scale."""
        return self.seeds or by_scale[self.scale.name]

    # --- work that is done once -------------------------------------------------------------------

    def cell(self, name: str, compute: Callable[[], Any], **depends: Any) -> Any:
        """A part of the work whose result is JSON: done once, then read.

        Args:
            name: Of the part; it becomes a file's name.
            compute: Does the work.
            **depends: JSON values that the result depends on; the work is done again when they
                change.

        Returns:
            The result, as JSON gives it back.
        """
        path = self.folder / "cells" / f"{name}.json"
        wanted = _plain(depends)
        while True:
            if path.is_file():
                saved = json.loads(path.read_text(encoding="utf-8"))
                if saved["depends"] == wanted:
                    return saved["value"]
            if leads():
                break
            time.sleep(_POLL)
        value = _plain(compute())
        write_json(path, {"depends": wanted, "value": value})
        return value

    def strategy(self, name: str) -> str:
        """The strategy that stands for `name` at this scale: L100 is L10 where runs are short."""
        return self.scale.strategies.get(name, name) if self.embedded else name

    def instead(self, strategy: str) -> str:
        """Such as " (here L10)", where another strategy stands for this one; else nothing."""
        name = self.strategy(strategy)
        return "" if name == strategy else f" (here {name})"

    def config(self, **settings: Any) -> TrainConfig:
        """The configuration of a training: the recipe's settings over the scale's.

        Args:
            **settings: Fields of `TrainConfig`; those given to the study win.
        """
        of_scale = self.scale.training if self.embedded else self.scale.elsewhere
        chosen = {**of_scale, **settings, **self.settings}
        if chosen.get("strategy") is not None:
            chosen["strategy"] = self.strategy(chosen["strategy"])
        return TrainConfig(
            data=self.data, device=self.device, workers=self.workers, **chosen
        ).resolved()

    def train(self, *, training: ImageSource | None = None, **settings: Any) -> Run:
        """Train a model, or find it trained.

        Where the data set's preset has no pre-trained weights, the classifier is trained first, on
        the same images and with seed 0, once for all runs: as the paper's runs share the one of the
        model zoo. With a part of the data set as `training` it is always trained first, so that it
        has seen nothing else.

        Args:
            training: Images to learn from; those of the data set by default.
            **settings: Fields of `TrainConfig`. With ``weights`` among them the run starts from
                these, and nothing is pre-trained.

        Returns:
            Where the model is.
        """
        config = self.config(**settings)
        given = "weights" in settings or "weights" in self.settings
        if not given and (training is not None or config.pretrain_epochs):
            fields = ("backbone", "input_size", "pretrain_epochs")
            shared = {name: settings[name] for name in fields if name in settings}
            classifier = self.classifier(training=training, **shared)
            config = dataclasses.replace(
                config, weights=str(classifier.checkpoint.resolve()), pretrain_epochs=0
            )
        elif "weights" in settings:
            config = dataclasses.replace(config, pretrain_epochs=0)
        return self._run(config, training or self.training)

    def classifier(self, *, training: ImageSource | None = None, **settings: Any) -> Run:
        """Train a classifier from scratch; its decoder stays untrained.

        Args:
            training: Images to learn from; those of the data set by default.
            **settings: Fields of `TrainConfig`.
        """
        scratch = {} if self.embedded else {**FROM_SCRATCH, **self.scale.scratch}
        config = self.config(**{**scratch, "weights": "none", **settings, "strategy": "F"})
        return self._run(dataclasses.replace(config, epochs=0), training or self.training)

    def boxes(self, run: Run, source: ImageSource | None = None, **options: Any) -> Path:
        """Boxes and statistics of the validation images, extracted once.

        Args:
            run: The model.
            source: Other images than the data set's validation images.
            **options: Fields of `ExtractConfig`.

        Returns:
            The Parquet file.
        """
        images = source or self.validation
        limit = len(images) if source is not None else self.limit
        path = run.folder / f"boxes-{_digest([images.name, limit, options])}.parquet"
        while not path.is_file():
            if not leads():
                time.sleep(_POLL)
                continue
            extract(
                run.checkpoint,
                images,
                path,
                limit=limit,
                device=self.device,
                workers=self.workers,
                **options,
            )
        return path

    def scores(self, run: Run, source: ImageSource | None = None, **options: Any) -> dict[str, Any]:
        """Localisation, accuracy and mask statistics of a model, see `casm_fast.evaluate`.

        Args:
            run: The model.
            source: Other images than the data set's validation images.
            **options: Fields of `ExtractConfig`.

        Returns:
            The scores as plain numbers.
        """
        found: dict[str, Any] = _plain(evaluate(self.boxes(run, source, **options)).to_dict())
        return found

    # --- inner workings ---------------------------------------------------------------------------

    def _run(self, config: TrainConfig, training: ImageSource) -> Run:
        described = {k: v for k, v in config.describe().items() if k not in _IRRELEVANT}
        # Weights of a run of ours are named by its digest, so that folders may move.
        weights = Path(config.weights or "")
        if weights.name == checkpoint.FILE_NAME:
            described["weights"] = weights.parent.name
        described["data"] = training.name
        kind = config.strategy if config.epochs else "classifier"
        digest = _digest([described, len(training), list(training.classes)])
        folder = self.output / "runs" / f"{kind}-{digest}"
        run = Run(folder, config)
        done = folder / "finished.json"
        if done.is_file():
            return run
        folder.mkdir(parents=True, exist_ok=True)
        if not leads():
            train(config, output=folder, resume=True, sources=(training, None))
            return run
        with _alone(folder):
            if not done.is_file():
                logger.info("training %s", folder.name)
                train(config, output=folder, resume=True, sources=(training, None))
                write_json(done, described)
        return run

    def _claim(self) -> None:
        """Make the folder, or see that it was made with the same settings."""
        if not leads():
            return
        settings = _plain(
            {
                "experiment": self.name,
                "data": self.data,
                "training_images": len(self.training),
                "validation_images": self.limit,
                "classes": len(self.training.classes),
                "scale": dataclasses.asdict(self.scale),
                "settings": self.settings,
                "version": casm_fast.__version__,
            }
        )
        path = self.folder / "settings.json"
        if path.is_file():
            compare(json.loads(path.read_text(encoding="utf-8")), settings, path)
        else:
            write_json(path, settings)


@dataclass(frozen=True)
class Experiment:
    """A table or figure that can be reproduced.

    Attributes:
        name: What the command calls it.
        summary: What it shows, in one line.
        run: The recipe.
        embedded: Options of the embedded set that it needs, such as ``"classes=20"``.
        quick: Further ones for its quick form, such as ``"images=2500"``.
        needs_boxes: Whether the validation images must have true boxes.
        paper: What it reproduces a part of.
    """

    name: str
    summary: str
    run: Callable[[Study], Findings]
    embedded: str = ""
    quick: str = ""
    needs_boxes: bool = True
    paper: str = PAPER


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()[:_DIGITS]


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    checkpoint.write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process trains in the folder."""
    try:
        import fcntl
    except ImportError:  # Windows has no advisory locks
        yield
        return
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
