"""One step of Algorithm 1, and the plain classifier step that comes before it.

The flow of a CASM step::

    images -> classifier -> logits, taps                  one forward pass serves both
              taps, detached -> decoder -> saliency m     the mask objective never trains the shared
              encoder
    (1 - m) images -> f' -> masked logits                 f' = the live classifier or a snapshot of
    the history
    classifier:  gradient of eq. 8                        both gradients first,
    decoder:     gradient of -S(m, f'), decoder alone     then both steps

With ``objective="masked_in_out"`` f' sees the masked-in images m x as well, and so does the
classifier.

Nothing here waits for the device: statistics are summed where they arise until `Engine.statistics`
reads them. Where several processes share a batch (`distributed`), each computes with its part, and
gradients are averaged before they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casm_fast.models.saliency import SaliencyModel
from casm_fast.ops import blend, gaussian_blur
from casm_fast.training.config import Strategy, TrainConfig
from casm_fast.training.distributed import HostSyncBatchNorm, World, alone
from casm_fast.training.history import History
from casm_fast.training.objective import (
    classification_loss,
    full_precision,
    mask_loss,
    masked_in_loss,
    prediction_entropy,
    smoothness,
)

PHASES = ("pretrain", "casm")

# What is summed over images between two log lines. `loss`: cross-entropy (pre-training) or eq. 8;
# `entropy`: of the judge on the masked-out images, nats; `accuracy`: live classifier, clean images;
# `masked_accuracy`: judge, masked-out images; `masked_in_accuracy`: judge, masked-in images.
STATISTICS = (
    "loss",
    "entropy",
    "mean_saliency",
    "accuracy",
    "masked_accuracy",
    "masked_in_accuracy",
)

# lambda_R = "auto" moves ln(lambda_R) by this much per step and unit of excess saliency: an error
# of 0.1 in the mean saliency changes lambda_R by 1 % in 5 steps, slowly enough for the decoder to
# follow.
AUTO_GAIN = 0.02

# Share of the pre-training steps over which its learning rate rises from zero; then it falls along
# a cosine.
WARM_UP = 0.1


class Engine:
    """The networks, optimisers, history and counters of a run, and the steps that change them.

    Attributes:
        model: Classifier, encoder and decoder.
        history: The sampled classifiers.
        lambda_r: Current lambda_R, ``[]``, on the device.
        phase: ``"pretrain"`` or ``"casm"``, chosen by `begin`.
        images: Images since the statistics were read.
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
        self.classifier_parameters = list(model.classifier.parameters())
        self.mask_parameters = list(model.mapping_parameters())
        self.history = History(
            model.classifier,
            self.strategy,
            size=config.history_size,
            probability=config.history_probability,
            place=config.history_device,
            seed=config.seed,
        )
        self.lambda_r = torch.tensor(config.lambda_value(classes), device=device)
        self.lambda_in = config.lambda_in_value(classes)
        self.masks_in = config.objective == "masked_in_out"
        colour = (torch.tensor(config.infill_colour) - torch.tensor(model.mean)) / torch.tensor(
            model.std
        )
        self.infill_colour = colour.view(1, 3, 1, 1).to(device)
        self._normalisations = [
            module for module in model.classifier.modules() if isinstance(module, _BatchNorm)
        ]
        self._local_normalisations = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            and not isinstance(module, (nn.SyncBatchNorm, HostSyncBatchNorm))
        ]
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
        self.classifier_optimizer = torch.optim.SGD(
            self.classifier_parameters,
            lr=recipe.classifier_lr if phase == "casm" else recipe.pretrain_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay if phase == "casm" else recipe.pretrain_weight_decay,
        )
        self.decoder_optimizer = torch.optim.Adam(
            self.mask_parameters, lr=recipe.decoder_lr, weight_decay=config.weight_decay
        )
        if phase == "casm" and not self.model.shared and recipe.pretrain_epochs > 0:
            # A separate encoder starts as a copy of the pre-trained classifier.
            self.model.encoder.load_state_dict(self.model.classifier.state_dict())
        self.set_modes()

    def set_modes(self) -> None:
        """Train or evaluation mode for each part; a fixed classifier (F) is in the latter."""
        self.model.train(self.phase == "casm")
        self.model.classifier.train(self.phase == "pretrain" or not self.strategy.fixed)

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
        if self.phase == "pretrain":
            _set_rate(
                self.classifier_optimizer, self.recipe.pretrain_lr * pretrain_schedule(index, total)
            )
            self._pretrain_step(images, labels, index)
            self._average_statistics(labels.shape[0])
            return
        factor = 1.0
        if self.config.schedule == "step":
            factor = self.config.schedule_factor ** (epoch // self.recipe.schedule_epochs)
        _set_rate(self.classifier_optimizer, self.recipe.classifier_lr * factor)
        _set_rate(self.decoder_optimizer, self.recipe.decoder_lr * factor)
        self._casm_step(images, labels, index)
        self._average_statistics(labels.shape[0])

    def _pretrain_step(self, images: Tensor, labels: Tensor, index: int) -> None:
        with self._autocast():
            logits, _ = self.model.classifier(images)
        loss = F.cross_entropy(full_precision(logits), labels)
        _descend(
            self.classifier_optimizer,
            self.classifier_parameters,
            self._start_gradients(loss, self.classifier_parameters, labels.shape[0])(),
        )
        with torch.no_grad():
            zero = torch.zeros((), device=self.device)
            self._record(
                index,
                torch.isfinite(loss),
                labels.shape[0],
                loss,
                zero,
                zero,
                _hits(logits, labels),
                zero,
                zero,
            )

    def _casm_step(self, images: Tensor, labels: Tensor, index: int) -> None:
        """Algorithm 1, one pass through its loop; f(index) is the classifier as it enters."""
        model, theta, count = self.model, self.classifier_parameters, labels.shape[0]
        self.history.observe(index, model.classifier)
        snapshot = self.history.draw()
        alternating = self.config.classifier_update == "alternating" and not self.strategy.fixed

        with self._autocast(), torch.set_grad_enabled(not self.strategy.fixed):
            logits, taps = model.classifier(images)
        correct = logits.argmax(dim=1) == labels
        clean_loss = F.cross_entropy(full_precision(logits), labels)
        if alternating:
            clean_gradients = self._start_gradients(clean_loss, theta, count)
            _descend(self.classifier_optimizer, theta, clean_gradients())

        with self._autocast():
            # The taps of a shared encoder are detached in there.
            saliency = full_precision(model.decode(images, taps))
            kinds = self.masked(images, saliency)
            judged = [
                self._classify_masked(masked)
                if snapshot is None
                else self.history.judge(snapshot, masked)
                for masked in kinds
            ]
            live = judged
            if snapshot is not None and not alternating:
                live = [self._classify_masked(masked.detach()) for masked in kinds]

        if alternating:
            live = [masked_logits.detach() for masked_logits in live]
        loss = classification_loss([logits, *live], labels)
        theta_gradients: Callable[[], Sequence[Tensor | None]] | None = None
        if alternating and snapshot is None:
            masked_loss = len(judged) * classification_loss(judged, labels)
            theta_gradients = self._start_gradients(masked_loss, theta, count, retain=True)
        elif not alternating and not self.strategy.fixed:
            theta_gradients = self._start_gradients(loss, theta, count, retain=snapshot is None)
        objective = mask_loss(
            judged[0], labels, correct, saliency, self.lambda_r, self.config.score
        )
        if self.masks_in:
            objective = (
                objective
                + masked_in_loss(judged[1], labels, saliency, self.lambda_in)
                + self.config.lambda_tv * smoothness(saliency, images.shape[-2], images.shape[-1])
            )
        mask_gradients = self._start_gradients(objective, self.mask_parameters, count)

        if theta_gradients is not None:
            _descend(self.classifier_optimizer, theta, theta_gradients())
        _descend(
            self.decoder_optimizer,
            self.mask_parameters,
            mask_gradients(),
            clip=self.config.clip_gradient,
        )

        with torch.no_grad():
            area = saliency.mean()
            if self.config.lambda_r == "auto":
                excess = self._mean(area, count) - self.config.target_saliency
                self.lambda_r *= torch.exp(AUTO_GAIN * excess)
            self._record(
                index,
                torch.isfinite(loss) & torch.isfinite(objective),
                count,
                loss,
                prediction_entropy(judged[0]).mean(),
                area,
                correct.float().mean(),
                _hits(judged[0], labels),
                _hits(judged[-1], labels),
            )

    def _start_gradients(
        self, loss: Tensor, parameters: Sequence[Tensor], images: int, retain: bool = False
    ) -> Callable[[], Sequence[Tensor | None]]:
        """Compute gradients of `loss`, a mean over this process's `images`; begin to average them.

        Returns:
            A function that gives the gradients of the mean over the whole batch.
        """
        weight = self.world.weight(images, self.recipe.batch_size)
        if weight != 1.0:
            loss = loss * weight
        return self.world.start_mean(_gradients(loss, parameters, retain), weight)

    def _mean(self, mean: Tensor, images: int) -> Tensor:
        """The mean over the whole batch of what `mean` is over this process's `images`."""
        weight = self.world.weight(images, self.recipe.batch_size)
        (whole,) = self.world.start_mean([mean * weight], weight)()
        return mean if whole is None else whole

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
        weight = self.world.weight(images, self.recipe.batch_size)
        with torch.no_grad():
            means = self.world.start_mean([buffer * weight for buffer in running], weight)()
            for buffer, mean in zip(running, means, strict=True):
                if mean is not None:
                    buffer.copy_(mean)

    def _classify_masked(self, masked: Tensor) -> Tensor:
        """The live classifier on masked images, ``[B, 3, H, W] -> [B, K]``.

        In train mode it normalises by the batch. Whether the running statistics, which evaluation
        uses on clean images, follow too is `TrainConfig.masked_statistics`: where masks remove
        most of the evidence the two kinds of image have such different statistics that their
        mixture fits neither.
        """
        momenta = [layer.momentum for layer in self._normalisations]
        if not self.recipe.masked_statistics:
            for layer in self._normalisations:
                layer.momentum = 0.0
        logits: Tensor = self.model.classifier(masked)[0]
        for layer, momentum in zip(self._normalisations, momenta, strict=True):
            layer.momentum = momentum
        return logits

    def masked_out(self, images: Tensor, saliency: Tensor) -> Tensor:
        """``(1 - m) x + m r``: the images with their salient part replaced by the infill r.

        Args:
            images: Normalised, ``[B, 3, H, W]``.
            saliency: m, ``[B, 1, h, w]``, at the decoder's resolution.

        Returns:
            ``[B, 3, H, W]``, differentiable in `saliency`.
        """
        masked: Tensor = blend(images, self._reference(images), 1.0 - saliency)
        return masked

    def masked(self, images: Tensor, saliency: Tensor) -> list[Tensor]:
        """What the judge sees: `masked_out`, and if the objective asks for it ``m x + (1 - m) r``.

        Args:
            images: Normalised, ``[B, 3, H, W]``.
            saliency: m, ``[B, 1, h, w]``, at the decoder's resolution.

        Returns:
            One or two of ``[B, 3, H, W]``, differentiable in `saliency`.
        """
        reference = self._reference(images)
        kept = [1.0 - saliency, saliency] if self.masks_in else [1.0 - saliency]
        return [blend(images, reference, mask) for mask in kept]

    def _reference(self, images: Tensor) -> Tensor | None:
        """What masked pixels become; `None` is zero, the mean colour of normalised images."""
        if self.config.infill == "colour":
            return self.infill_colour.to(images.dtype).expand_as(images)
        if self.config.infill == "blur":
            return gaussian_blur(images, self.config.infill_sigma)
        if self.config.infill == "noise":
            if not self.model.training:
                # One picture for all: a validation must not depend on who looks at which image.
                return torch.randn_like(images[:1]).expand_as(images)
            # All processes draw for a whole batch, so that their generators stay equal.
            first, _ = self.world.part(self.recipe.batch_size)
            rows = max(self.recipe.batch_size, first + len(images))
            whole = images.new_empty((rows, *images.shape[1:]))
            noise = torch.randn_like(whole.contiguous(memory_format=self.memory_format))
            return noise[first : first + len(images)]
        return None

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
            return {name: means[name] for name in ("loss", "accuracy")}
        if not self.masks_in:
            del means["masked_in_accuracy"]
        if self.config.lambda_r == "auto":
            means["lambda_r"] = float(self.lambda_r)
        return means

    def check_finite(self) -> None:
        """Stop a run that has gone astray, on all processes at once; waits for the device.

        Raises:
            FloatingPointError: When a loss has not been a finite number; the message names the
                step.
        """
        never = torch.iinfo(torch.int64).max
        bad_step = int(self.world.smallest(torch.where(self._bad_step < 0, never, self._bad_step)))
        if bad_step < never:
            rates = "pretrain_lr" if self.phase == "pretrain" else "classifier_lr or decoder_lr"
            precision = ", or amp='off'" if self.config.amp != "off" else ""
            raise FloatingPointError(
                f"the loss is not a finite number from step {bad_step} of the {self.phase} phase "
                f"on: try a lower {rates}{precision}; the state saved last is from before that step"
            )

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, the snapshots excepted: tensors and plain values.

        All processes call it, and get the same.
        """
        return {
            "model": self.model.state_dict(),
            "classifier_optimizer": self.classifier_optimizer.state_dict(),
            "decoder_optimizer": self.decoder_optimizer.state_dict(),
            "lambda_r": self.lambda_r,
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
        sums = torch.stack([tensor.double().sum() for tensor in self.model.state_dict().values()])
        draws = [self.history.generator.get_state(), torch.get_rng_state()]
        return repr((sums.tolist(), self.history.steps, [d.numpy().tobytes() for d in draws]))

    def restore(self, state: dict[str, Any], snapshots: list[dict[str, Tensor]]) -> None:
        """Continue from what `state` returned."""
        self.begin(state["phase"])
        self.model.load_state_dict(state["model"])
        self.classifier_optimizer.load_state_dict(state["classifier_optimizer"])
        self.decoder_optimizer.load_state_dict(state["decoder_optimizer"])
        self.lambda_r.copy_(state["lambda_r"])
        self.history.restore(state["history_steps"], snapshots, state["history_generator"])
        if self.world.leads:  # what all have summed is counted once
            self._sums.copy_(state["sums"])
            self.images = state["images"]
        self._bad_step.copy_(state["bad_step"])

    def _record(self, index: int, finite: Tensor, images: int, *means: Tensor) -> None:
        """Add batch means, in the order of `STATISTICS`; remember the first step not finite."""
        self._sums += images * torch.stack([mean.detach().float() for mean in means])
        self.images += images
        self._bad_step = torch.where((self._bad_step < 0) & ~finite, index, self._bad_step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.config.amp == "bf16"
        )


def pretrain_schedule(step: int, total: int) -> float:
    """Factor of the pre-training rate: a linear rise over `WARM_UP`, then a cosine to zero."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the rows whose largest logit is the label's."""
    return (logits.argmax(dim=1) == labels).float().mean()


def _gradients(
    loss: Tensor, parameters: Sequence[Tensor], retain: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients for `parameters` alone; `None` where the loss does not reach (a second head)."""
    return torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)


def _descend(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    gradients: Sequence[Tensor | None],
    clip: float | None = None,
) -> None:
    """One optimiser step with these gradients, their joint norm clipped to `clip`."""
    parameters = list(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if clip is not None:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
