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
reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casm_fast.models.saliency import SaliencyModel
from casm_fast.ops import blend, gaussian_blur
from casm_fast.training.config import Strategy, TrainConfig
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
    """

    def __init__(
        self, model: SaliencyModel, config: TrainConfig, *, classes: int, device: torch.device
    ) -> None:
        """Place `model` on `device`; `begin` must follow before the first step."""
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
            images: Normalised, ``[B, 3, H, W]``, on any device.
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
            return
        factor = 1.0
        if self.config.schedule == "step":
            factor = self.config.schedule_factor ** (epoch // self.recipe.schedule_epochs)
        _set_rate(self.classifier_optimizer, self.recipe.classifier_lr * factor)
        _set_rate(self.decoder_optimizer, self.recipe.decoder_lr * factor)
        self._casm_step(images, labels, index)

    def _pretrain_step(self, images: Tensor, labels: Tensor, index: int) -> None:
        with self._autocast():
            logits, _ = self.model.classifier(images)
        loss = F.cross_entropy(full_precision(logits), labels)
        _descend(
            self.classifier_optimizer,
            self.classifier_parameters,
            _gradients(loss, self.classifier_parameters),
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
        model, theta = self.model, self.classifier_parameters
        self.history.observe(index, model.classifier)
        snapshot = self.history.draw()
        alternating = self.config.classifier_update == "alternating" and not self.strategy.fixed

        with self._autocast(), torch.set_grad_enabled(not self.strategy.fixed):
            logits, taps = model.classifier(images)
        correct = logits.argmax(dim=1) == labels
        clean_loss = F.cross_entropy(full_precision(logits), labels)
        if alternating:
            _descend(self.classifier_optimizer, theta, _gradients(clean_loss, theta))

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
        theta_gradients: Sequence[Tensor | None] | None = None
        if alternating and snapshot is None:
            masked_loss = len(judged) * classification_loss(judged, labels)
            theta_gradients = _gradients(masked_loss, theta, retain=True)
        elif not alternating and not self.strategy.fixed:
            theta_gradients = _gradients(loss, theta, retain=snapshot is None)
        objective = mask_loss(
            judged[0], labels, correct, saliency, self.lambda_r, self.config.score
        )
        if self.masks_in:
            objective = (
                objective
                + masked_in_loss(judged[1], labels, saliency, self.lambda_in)
                + self.config.lambda_tv * smoothness(saliency, images.shape[-2], images.shape[-1])
            )
        mask_gradients = _gradients(objective, self.mask_parameters)

        if theta_gradients is not None:
            _descend(self.classifier_optimizer, theta, theta_gradients)
        _descend(
            self.decoder_optimizer,
            self.mask_parameters,
            mask_gradients,
            clip=self.config.clip_gradient,
        )

        with torch.no_grad():
            area = saliency.mean()
            if self.config.lambda_r == "auto":
                self.lambda_r *= torch.exp(AUTO_GAIN * (area - self.config.target_saliency))
            self._record(
                index,
                torch.isfinite(loss) & torch.isfinite(objective),
                labels.shape[0],
                loss,
                prediction_entropy(judged[0]).mean(),
                area,
                correct.float().mean(),
                _hits(judged[0], labels),
                _hits(judged[-1], labels),
            )

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
            return torch.randn_like(images)
        return None

    def statistics(self) -> dict[str, float]:
        """Means over the images since the last call (one wait for the device), then start anew.

        Raises:
            FloatingPointError: When a loss since the last call was not a finite number.
        """
        self.check_finite()
        values = self._sums.tolist()
        images, self.images = self.images, 0
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
        """Stop a run that has gone astray; waits for the device.

        Raises:
            FloatingPointError: When a loss has not been a finite number; the message names the
                step.
        """
        bad_step = int(self._bad_step)
        if bad_step >= 0:
            rates = "pretrain_lr" if self.phase == "pretrain" else "classifier_lr or decoder_lr"
            precision = ", or amp='off'" if self.config.amp != "off" else ""
            raise FloatingPointError(
                f"the loss is not a finite number from step {bad_step} of the {self.phase} phase "
                f"on: try a lower {rates}{precision}; the state saved last is from before that step"
            )

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, the snapshots excepted: tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "classifier_optimizer": self.classifier_optimizer.state_dict(),
            "decoder_optimizer": self.decoder_optimizer.state_dict(),
            "lambda_r": self.lambda_r,
            "history_steps": self.history.steps,
            "history_generator": self.history.generator.get_state(),
            "sums": self._sums,
            "images": self.images,
            "bad_step": self._bad_step,
            "phase": self.phase,
        }

    def restore(self, state: dict[str, Any], snapshots: list[dict[str, Tensor]]) -> None:
        """Continue from what `state` returned."""
        self.begin(state["phase"])
        self.model.load_state_dict(state["model"])
        self.classifier_optimizer.load_state_dict(state["classifier_optimizer"])
        self.decoder_optimizer.load_state_dict(state["decoder_optimizer"])
        self.lambda_r.copy_(state["lambda_r"])
        self.history.restore(state["history_steps"], snapshots, state["history_generator"])
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
