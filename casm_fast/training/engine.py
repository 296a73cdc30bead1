"""One step of Algorithm 1, and the plain classifier step that comes before it.

`Passes` computes, `Descent` moves the weights; this is the order of things::

    history takes f(k), draws the judge f'
    clean pass       gradient of the clean half of eq. 8
    masked pass      gradient of its masked half; gradient of -S(m, f') for the decoder alone
    both steps       after both gradients

With ``classifier_update="alternating"`` the classifier steps after each pass. A batch may be cut
into micro-batches, whose gradients are added up. Nothing here waits for the device: statistics are
summed where they arise until `Engine.statistics` reads them. Where several processes share a batch
(`distributed`), each computes with its part, and gradients are averaged before they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casm_fast.models.encoder import ResNetEncoder
from casm_fast.models.saliency import SaliencyModel
from casm_fast.training.average import MappingAverage
from casm_fast.training.calibration import Calibration
from casm_fast.training.compiled import Calls, compiled
from casm_fast.training.config import Strategy, TrainConfig
from casm_fast.training.descent import MOST_SKIPPED, Descent, Gradients, GradientSum
from casm_fast.training.distributed import HostSyncBatchNorm, World, alone
from casm_fast.training.history import History
from casm_fast.training.passes import STATISTICS, Clean, Passes, hits

PHASES = ("pretrain", "casm")

# Share of the pre-training steps over which its learning rate rises from zero; then it falls along
# a cosine.
WARM_UP = 0.1


@dataclass(frozen=True)
class _Part:
    """A micro-batch.

    Attributes:
        images: ``[b, 3, H, W]``.
        labels: ``[b]``.
        noise: The infill, ``[b, 3, H, W]``, or `None`.
        weight: What its means count for in the mean over the batch.
    """

    images: Tensor
    labels: Tensor
    noise: Tensor | None
    weight: float


class Engine:
    """The networks, optimisers, history and counters of a run, and the steps that change them.

    Attributes:
        model: Classifier, encoder and decoder.
        history: The sampled classifiers.
        lambda_r: Current lambda_R, ``[]``, on the device.
        phase: ``"pretrain"`` or ``"casm"``, chosen by `begin`.
        images: Images since the statistics were read.
        calibration: What steers lambda_R, or `None` where it stays.
        passes: What the networks compute in a step.
        world: The processes of the run.
    """

    def __init__(
        self,
        model: SaliencyModel,
        config: TrainConfig,
        *,
        classes: int,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        """Place `model` on `device`; `begin` must follow before the first step."""
        self.world = world or alone(device)
        self.config = config
        self.recipe = config.recipe()
        self.strategy = Strategy.parse(self.recipe.strategy)
        self.device = device
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.memory_format = memory_format
        self.model = model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        if isinstance(model.classifier, ResNetEncoder):
            model.classifier.by_blocks = True  # every step takes a gradient for images
        self.history = History(
            model.classifier,
            self.strategy,
            size=config.history_size,
            probability=config.history_probability,
            place=config.history_device,
            seed=config.seed,
        )
        self.lambda_r = torch.tensor(config.lambda_value(classes), device=device)
        self.calibration = (
            Calibration(self.lambda_r, config.target_saliency, classes)
            if config.lambda_r == "auto"
            else None
        )
        self.passes = Passes(
            self.model,
            self.history,
            config,
            lambda_r=self.lambda_r,
            lambda_in=config.lambda_in_value(classes),
        )
        self._calls = self._plain = Calls(self.passes.clean, self.passes.masked)
        if config.cuda_graphs and device.type != "cuda":
            raise ValueError(
                f"cuda_graphs: expected a GPU to train on, got {str(device)!r}; "
                "pass cuda_graphs=False"
            )
        if config.compile:
            self._calls = compiled(self.passes, cuda_graphs=config.cuda_graphs)
        self._local_normalisations = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            and not isinstance(module, (nn.SyncBatchNorm, HostSyncBatchNorm))
        ]
        self.average = (
            MappingAverage(self.model, config.decoder_ema) if config.decoder_ema > 0 else None
        )
        self._sums = torch.zeros(len(STATISTICS), device=device)
        self.images = 0
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.begin("pretrain")

    def begin(self, phase: str) -> None:
        """Enter a phase: fresh optimisers, and gradients where the phase needs them."""
        self.phase = phase
        trains_classifier = phase == "pretrain" or not self.strategy.fixed
        self.model.requires_grad_(phase == "casm")
        self.model.classifier.requires_grad_(trains_classifier)
        config, recipe = self.config, self.recipe
        scaled = config.amp == "fp16"
        self.classifier_descent = Descent(
            torch.optim.SGD(
                self.passes.classifier_parameters,
                lr=recipe.classifier_lr if phase == "casm" else recipe.pretrain_lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay
                if phase == "casm"
                else recipe.pretrain_weight_decay,
                fused=True,
            ),
            scaled=scaled,
        )
        self.decoder_descent = Descent(
            torch.optim.Adam(
                self.passes.mask_parameters,
                lr=recipe.decoder_lr,
                weight_decay=config.weight_decay,
                fused=True,
            ),
            scaled=scaled,
            clip=config.clip_gradient,
        )
        if phase == "casm" and not self.model.shared and recipe.pretrain_epochs > 0:
            # A separate encoder starts as a copy of the pre-trained classifier.
            self.model.encoder.load_state_dict(self.model.classifier.state_dict())
        if self.average is not None:
            self.average.restart()
        self.set_modes()

    @property
    def outcome(self) -> SaliencyModel:
        """What is validated and written: `model`, or its averaged form."""
        return self.model if self.average is None else self.average.model

    def set_modes(self) -> None:
        """Train or evaluation mode for each part; a fixed classifier (F) is in the latter."""
        self.model.train(self.phase == "casm")
        self.model.classifier.train(self.phase == "pretrain" or not self.strategy.fixed)

    @property
    def least_images(self) -> int:
        """With how many images on each process a step can be done.

        Batch normalisation needs two in a micro-batch; and all processes must have as many
        micro-batches as the others, which synchronised normalisation joins.
        """
        if self.world.size == 1:
            return 2
        return 2 * max(
            1, min(self.config.accumulate, self.recipe.batch_size // self.world.size // 2)
        )

    def step(self, images: Tensor, labels: Tensor, index: int, total: int, epoch: int) -> None:
        """Do step `index` of `total` of the current phase.

        Args:
            images: This process's part of the batch, normalised, ``[B, 3, H, W]``, on any device.
            labels: ``[B]`` int64.
            index: Step within the phase, from 0.
            total: Steps of the whole phase.
            epoch: Epoch within the phase, from 0.
        """
        images = images.to(self.device, non_blocking=True).contiguous(
            memory_format=self.memory_format
        )
        labels = labels.to(self.device, non_blocking=True)
        if self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # the last step's results may be overwritten
        if self.phase == "pretrain":
            self.classifier_descent.rate = self.recipe.pretrain_lr * pretrain_schedule(index, total)
            self._pretrain_step(images, labels, index)
            self._average_statistics(len(labels))
            return
        factor = 1.0
        if self.config.schedule == "step":
            factor = self.config.schedule_factor ** (epoch // self.recipe.schedule_epochs)
        self.classifier_descent.rate = self.recipe.classifier_lr * factor
        self.decoder_descent.rate = self.recipe.decoder_lr * factor
        self._casm_step(images, labels, index)
        self._average_statistics(len(labels))
        if self.average is not None:
            self.average.update()

    def _pretrain_step(self, images: Tensor, labels: Tensor, index: int) -> None:
        theta = GradientSum()
        scale = self.classifier_descent.factor
        calls = self._calls_for(len(labels))
        for part in self._parts(images, labels):
            clean = calls.clean(
                part.images, part.labels, learns=True, weight=part.weight, scale=scale
            )
            theta.add(clean.gradients)
            means = torch.zeros_like(self._sums)
            means[STATISTICS.index("loss")] = clean.loss
            means[STATISTICS.index("accuracy")] = hits(clean.logits, part.labels)
            self._record(index, torch.isfinite(clean.loss), len(part.labels), means)
        self.classifier_descent.step(self._start_mean(theta, len(labels))())
        self._notice_skipped(index)

    def _casm_step(self, images: Tensor, labels: Tensor, index: int) -> None:
        """Algorithm 1, one pass through its loop; f(index) is the classifier as it enters."""
        self.history.observe(index, self.model.classifier)
        snapshot = self.history.fetch()
        trains = not self.strategy.fixed
        alternating = self.config.classifier_update == "alternating" and trains
        # Eq. 8 is the mean over the kinds of image; the authors' two steps take each loss whole.
        weight = 1.0 if alternating else 1.0 / (1 + self.passes.kinds)
        theta, phi = GradientSum(), GradientSum()
        area = torch.zeros((), device=self.device)
        parts = self._parts(images, labels)
        calls = self._calls_for(len(labels))

        def clean_pass(part: _Part) -> Clean:
            clean = calls.clean(
                part.images,
                part.labels,
                learns=trains,
                weight=weight * part.weight,
                scale=self.classifier_descent.factor,
            )
            if trains:
                theta.add(clean.gradients)
            return clean

        cleans: list[Clean] = []
        if alternating:
            cleans = [clean_pass(part) for part in parts]
            self.classifier_descent.step(self._start_mean(theta, len(labels))())
        learns = trains and not (alternating and snapshot is not None)
        for number, part in enumerate(parts):
            masked = calls.masked(
                part.images,
                part.labels,
                cleans[number] if alternating else clean_pass(part),
                snapshot,
                part.noise,
                learns=learns,
                weight=weight * part.weight,
                mask_weight=part.weight,
                scale=self.classifier_descent.factor,
                mask_scale=self.decoder_descent.factor,
            )
            if learns:
                theta.add(masked.classifier_gradients)
            phi.add(masked.mask_gradients)
            area += part.weight * masked.statistics[STATISTICS.index("mean_saliency")]
            self._record(index, masked.finite, len(part.labels), masked.statistics)

        theta_gradients = self._start_mean(theta, len(labels)) if learns else None
        phi_gradients = self._start_mean(phi, len(labels))
        if theta_gradients is not None:
            self.classifier_descent.step(theta_gradients())
        self.decoder_descent.step(phi_gradients())
        self._notice_skipped(index)
        if self.calibration is not None:
            (mean_area,) = self.world.start_mean([area], self._weight(len(labels)))()
            assert mean_area is not None  # `None` only stands for a gradient that is not there
            self.calibration.steer(mean_area)

    def _calls_for(self, images: int) -> Calls:
        """The compiled passes for a whole batch; a shorter one is not worth compiling for."""
        whole = images * self.world.size == self.recipe.batch_size
        return self._calls if whole else self._plain

    def _parts(self, images: Tensor, labels: Tensor) -> list[_Part]:
        """The micro-batches; each has two images or more."""
        noise = self._noise(images)
        count = max(1, min(self.config.accumulate, len(labels) // 2))
        return [
            _Part(part, targets, noisy, len(targets) / len(labels) * self._weight(len(labels)))
            for part, targets, noisy in zip(
                images.tensor_split(count),
                labels.tensor_split(count),
                [None] * count if noise is None else noise.tensor_split(count),
                strict=True,
            )
        ]

    def _noise(self, images: Tensor) -> Tensor | None:
        """What masked pixels become with ``infill="noise"``, ``[B, 3, H, W]``."""
        if self.config.infill != "noise" or self.phase == "pretrain":
            return None
        # All processes draw for a whole batch, so that their generators stay equal.
        first, _ = self.world.part(self.recipe.batch_size)
        rows = max(self.recipe.batch_size, first + len(images))
        whole = images.new_empty((rows, *images.shape[1:]))
        noise = torch.randn_like(whole.contiguous(memory_format=self.memory_format))
        return noise[first : first + len(images)]

    def _weight(self, images: int) -> float:
        """What this process's mean over `images` counts for in the mean over the batch."""
        return self.world.weight(images, self.recipe.batch_size)

    def _start_mean(self, gradients: GradientSum, images: int) -> Callable[[], Gradients]:
        """Begin to average gradients, weighted already, over the processes."""
        return self.world.start_mean(gradients.take(), self._weight(images))

    def _average_statistics(self, images: int) -> None:
        """Make the running batch statistics those of all processes.

        Their mean over the processes, weighted by images: so all classifiers, and their snapshots
        in the history, stay equal. The mean of running variances lacks the variance between the
        processes' batch means, a share of about one in the pixels of a channel.
        """
        layers = [layer for layer in self._local_normalisations if layer.training]
        if self.world.size == 1 or not layers:
            return
        running = [
            buffer
            for layer in layers
            for buffer in (layer.running_mean, layer.running_var)
            if buffer is not None
        ]
        weight = self._weight(images)
        with torch.no_grad():
            weighted = running if weight == 1.0 else torch._foreach_mul(running, weight)
            means = self.world.start_mean(weighted, weight)()
            torch._foreach_copy_(running, [mean for mean in means if mean is not None])

    def statistics(self) -> dict[str, float]:
        """Means over the images since the last call (one wait for the device), then start anew.

        All processes call it, and get the means over all of their images.

        Raises:
            FloatingPointError: When a loss since the last call was not a finite number.
        """
        self.check_finite()
        counted = torch.tensor([self.images], device=self.device, dtype=self._sums.dtype)
        *values, images = self.world.total(torch.cat([self._sums, counted])).tolist()
        self.images = 0
        self._sums.zero_()
        means = {
            name: value / max(images, 1) for name, value in zip(STATISTICS, values, strict=True)
        }
        if self.phase == "pretrain":
            means = {name: means[name] for name in ("loss", "accuracy")}
        elif self.passes.kinds == 1:
            del means["masked_in_accuracy"]
        for name, factor in (
            ("classifier_loss_scale", self.classifier_descent.factor),
            ("mask_loss_scale", self.decoder_descent.factor),
        ):
            if factor is not None:
                means[name] = float(factor)
        if self.phase == "pretrain":
            return means
        if self.calibration is not None:
            means["lambda_r"] = float(self.lambda_r)
        return means

    def check_finite(self) -> None:
        """Stop a run that has gone astray, on all processes at once; waits for the device.

        Raises:
            FloatingPointError: When a loss has not been a finite number, or `MOST_SKIPPED` steps
                in a row were left out by loss scaling; the message names the step.
        """
        never = torch.iinfo(torch.int64).max
        bad_step = int(self.world.smallest(torch.where(self._bad_step < 0, never, self._bad_step)))
        if bad_step < never:
            rates = "pretrain_lr" if self.phase == "pretrain" else "classifier_lr or decoder_lr"
            precision = ", or amp='off'" if self.config.amp != "off" else ""
            subject = "the loss or its gradient" if self.config.amp == "fp16" else "the loss"
            raise FloatingPointError(
                f"{subject} is not a finite number from step {bad_step} of the {self.phase} phase "
                f"on: try a lower {rates}{precision}; the state saved last is from before that step"
            )

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, the snapshots excepted: tensors and plain values.

        All processes call it, and get the same.
        """
        return {
            "model": self.model.state_dict(),
            "classifier_descent": self.classifier_descent.state(),
            "decoder_descent": self.decoder_descent.state(),
            "average": None if self.average is None else self.average.state(),
            "calibration": None if self.calibration is None else self.calibration.state(),
            "history_steps": self.history.steps,
            "history_generator": self.history.generator.get_state(),
            "sums": self.world.total(self._sums),
            "images": self.world.totals(self.images)[0],
            "bad_step": self._bad_step,
            "phase": self.phase,
        }

    def digest(self) -> str:
        """What must be equal on all processes, in short; empty where there is one process."""
        if self.world.size == 1:
            return ""
        tensors = [*self.model.state_dict().values(), self.lambda_r]
        sums = torch.stack([tensor.double().sum() for tensor in tensors])
        draws = [self.history.generator.get_state(), torch.get_rng_state()]
        return repr((sums.tolist(), self.history.steps, [d.numpy().tobytes() for d in draws]))

    def restore(self, state: dict[str, Any], snapshots: list[dict[str, Tensor]]) -> None:
        """Continue from what `state` returned."""
        self.begin(state["phase"])
        self.model.load_state_dict(state["model"])
        self.classifier_descent.restore(state["classifier_descent"])
        self.decoder_descent.restore(state["decoder_descent"])
        if self.average is not None:
            self.average.restore(state["average"])
        if self.calibration is not None:
            self.calibration.restore(state["calibration"])
        self.history.restore(state["history_steps"], snapshots, state["history_generator"])
        if self.world.leads:  # what all have summed is counted once
            self._sums.copy_(state["sums"])
            self.images = state["images"]
        self._bad_step.copy_(state["bad_step"])

    def _record(self, index: int, finite: Tensor, images: int, means: Tensor) -> None:
        """Add batch means, in the order of `STATISTICS`; remember the first step not finite."""
        self._sums += images * means
        self.images += images
        self._bad_step = torch.where((self._bad_step < 0) & ~finite, index, self._bad_step)

    def _notice_skipped(self, index: int) -> None:
        """Remember this step where too many in a row had to be left out."""
        for descent in (self.classifier_descent, self.decoder_descent):
            if descent.scale is not None:
                stuck = descent.scale.skipped >= MOST_SKIPPED
                self._bad_step = torch.where((self._bad_step < 0) & stuck, index, self._bad_step)


def pretrain_schedule(step: int, total: int) -> float:
    """Factor of the pre-training rate: a linear rise over `WARM_UP`, then a cosine to zero."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
