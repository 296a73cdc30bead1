"""The forward passes of a step and their gradients: tensors in, tensors out.

A step of Algorithm 1 is two passes over a batch::

    clean    images -> f -> logits, taps                         gradient of the clean loss for f
    masked   taps -> decoder -> saliency m                       the taps are detached: the mask
                                                                 objective never trains f through
                                                                 them
             (1 - m) images -> f                                 gradient of the masked loss for f
             (1 - m) images -> judge f'                          gradient of -S(m, f') for the
                                                                 decoder alone

A pass takes its gradients before it ends, so that the activations of one forward pass of the
classifier are the most that is alive at a time. `torch.autograd.grad` is asked for the parameters
that are trained and computes nothing else: no weight gradients of the judge. Where the judge is f
itself, one masked forward pass serves both objectives. With ``objective="masked_in_out"`` f and the
judge see the masked-in images m x as well.

Neither pass keeps anything, waits for the device or depends on values, batch statistics aside, so
that they can be compiled whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from casm_fast.models.saliency import SaliencyModel
from casm_fast.ops import blend, gaussian_blur
from casm_fast.training.config import TrainConfig
from casm_fast.training.descent import Gradients
from casm_fast.training.history import History, Snapshot
from casm_fast.training.objective import (
    classification_loss,
    full_precision,
    mask_loss,
    masked_in_loss,
    prediction_entropy,
    smoothness,
)

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Batch means of a step. `loss`: cross-entropy (pre-training) or eq. 8; `entropy`: of the judge on
# the masked-out images, nats; `accuracy`: live classifier, clean images; `masked_accuracy`: judge,
# masked-out images; `masked_in_accuracy`: judge, masked-in images.
STATISTICS = (
    "loss",
    "entropy",
    "mean_saliency",
    "accuracy",
    "masked_accuracy",
    "masked_in_accuracy",
)


class Clean(NamedTuple):
    """What a pass over clean images gives.

    Attributes:
        gradients: For the classifier, of ``weight * scale * loss``; empty when it is not trained.
        logits: ``[B, K]``, detached.
        taps: Each ``[B, C_i, h_i, w_i]``, detached.
        loss: Mean cross-entropy, nats, ``[]``.
    """

    gradients: Gradients
    logits: Tensor
    taps: tuple[Tensor, ...]
    loss: Tensor


class Masked(NamedTuple):
    """What a pass over masked images gives.

    Attributes:
        classifier_gradients: Of ``weight * scale *`` the summed losses on the kinds of masked
            image; empty when they are not asked for.
        mask_gradients: Of ``mask_weight * mask_scale *`` the mask's objective, for the decoder and
            a separate encoder.
        statistics: The means of `STATISTICS`, ``[6]``.
        finite: Whether both losses are, ``[]`` bool.
    """

    classifier_gradients: Gradients
    mask_gradients: Gradients
    statistics: Tensor
    finite: Tensor


class Passes:
    """The two passes over the networks of a run.

    Attributes:
        kinds: Kinds of masked image: masked-out ones, or masked-out and masked-in ones.
    """

    def __init__(
        self,
        model: SaliencyModel,
        history: History,
        config: TrainConfig,
        *,
        lambda_r: Tensor,
        lambda_in: float,
    ) -> None:
        """Read the networks of `model`, and lambda_R from `lambda_r`, at every pass.

        Args:
            model: On the device of the training.
            history: Runs a snapshot as the judge.
            config: What the masks are learned from.
            lambda_r: lambda_R, ``[]``, on the device.
            lambda_in: See `masked_in_loss`.
        """
        self.model = model
        self.history = history
        self.config = config
        self.lambda_r = lambda_r
        self.lambda_in = lambda_in
        self.kinds = 2 if config.objective == "masked_in_out" else 1
        self.classifier_parameters = list(model.classifier.parameters())
        self.mask_parameters = list(model.mapping_parameters())
        self._device_type = lambda_r.device.type
        self._dtype = AUTOCAST[config.amp]
        self._masked_statistics = config.recipe().masked_statistics
        colour = (torch.tensor(config.infill_colour) - torch.tensor(model.mean)) / torch.tensor(
            model.std
        )
        self._infill_colour = colour.view(1, 3, 1, 1).to(lambda_r.device)
        self._normalisations = [
            module for module in model.classifier.modules() if isinstance(module, _BatchNorm)
        ]

    def clean(
        self, images: Tensor, labels: Tensor, *, learns: bool, weight: float, scale: Tensor | None
    ) -> Clean:
        """One forward pass of the live classifier on clean images serves its loss and the taps.

        Args:
            images: Normalised, ``[B, 3, H, W]``.
            labels: ``[B]`` int64.
            learns: Whether the classifier's gradients are wanted.
            weight: Of the loss in the classifier's objective.
            scale: Loss scale, ``[]``, or `None`.
        """
        with self._autocast(), torch.set_grad_enabled(learns):
            logits, taps = self.model.classifier(images)
            loss = F.cross_entropy(full_precision(logits), labels)
        gradients: Gradients = ()
        if learns:
            gradients = _gradients(_times(loss, weight, scale), self.classifier_parameters)
        detached = tuple(tap.detach() for tap in taps)
        return Clean(gradients, logits.detach(), detached, loss.detach())

    def masked(
        self,
        images: Tensor,
        labels: Tensor,
        clean: Clean,
        snapshot: Snapshot | None,
        noise: Tensor | None,
        *,
        learns: bool,
        weight: float,
        mask_weight: float,
        scale: Tensor | None,
        mask_scale: Tensor | None,
    ) -> Masked:
        """Mask the images, and take both gradients from what the classifiers make of them.

        Args:
            images: Normalised, ``[B, 3, H, W]``.
            labels: ``[B]`` int64.
            clean: What `clean` gave for these images.
            snapshot: The judge, on the device; `None` for the live classifier.
            noise: What masked pixels become with ``infill="noise"``, ``[B, 3, H, W]``, else `None`.
            learns: Whether the classifier's gradients are wanted.
            weight: Of the loss on each kind of masked image in the classifier's objective.
            mask_weight: Of the mask's objective.
            scale: Scale of the classifier's loss, ``[]``, or `None`.
            mask_scale: Scale of the mask's loss, ``[]``, or `None`.
        """
        live = None
        with self._autocast():
            saliency = full_precision(self.model.decode(images, clean.taps))
            kinds = self.blends(images, saliency, noise)
            if snapshot is None:
                live = [self._classify_masked(masked) for masked in kinds]
            elif learns:
                live = [self._classify_masked(masked.detach()) for masked in kinds]

        theta_gradients: Gradients = ()
        # A live judge's classification score is the classifier's own loss: one gradient through f
        # serves both. Not with loss scales, of which each objective has its own.
        shared = (
            learns
            and snapshot is None
            and self.config.score == "classification"
            and self.kinds == 1
            and scale is None
        )
        of_images: Gradients = ()
        if learns and live is not None:
            inputs = self.classifier_parameters
            gradients = _gradients(
                _times(classification_loss(live, labels), weight * self.kinds, scale),
                [*inputs, *kinds] if shared else inputs,
                retain=snapshot is None and not shared,
            )
            theta_gradients, of_images = gradients[: len(inputs)], gradients[len(inputs) :]
        if snapshot is not None:
            with self._autocast():
                judged = [self.history.judge(snapshot, masked) for masked in kinds]
        elif live is not None:
            judged = [logits.detach() for logits in live] if shared else live

        correct = clean.logits.argmax(dim=1) == labels
        objective = mask_loss(
            judged[0], labels, correct, saliency, self.lambda_r, self.config.score
        )
        if self.kinds == 2:
            objective = (
                objective
                + masked_in_loss(judged[1], labels, saliency, self.lambda_in)
                + self.config.lambda_tv * smoothness(saliency, images.shape[-2], images.shape[-1])
            )
        descended = _times(objective, mask_weight, mask_scale)
        for masked, gradient in zip(kinds, of_images, strict=False):
            assert gradient is not None
            # The score's part, linear in the images: its gradient is what was found above.
            descended = descended - mask_weight / weight * (gradient * masked).sum()
        mask_gradients = _gradients(descended, self.mask_parameters)

        with torch.no_grad():
            seen = judged if live is None else live
            loss = classification_loss([clean.logits, *seen], labels)
            statistics = (
                loss,
                prediction_entropy(judged[0]).mean(),
                saliency.mean(),
                correct.float().mean(),
                hits(judged[0], labels),
                hits(judged[-1], labels),
            )
            return Masked(
                theta_gradients,
                mask_gradients,
                torch.stack([mean.float() for mean in statistics]),
                torch.isfinite(loss) & torch.isfinite(objective),
            )

    def masked_out(self, images: Tensor, saliency: Tensor) -> Tensor:
        """``(1 - m) x + m r``: the images with their salient part replaced by the infill r.

        With ``infill="noise"`` one picture for all images, so that a validation does not depend on
        which of them share a batch.

        Args:
            images: Normalised, ``[B, 3, H, W]``.
            saliency: m, ``[B, 1, h, w]``, at the decoder's resolution.

        Returns:
            ``[B, 3, H, W]``, differentiable in `saliency`.
        """
        noise = None
        if self.config.infill == "noise":
            noise = torch.randn_like(images[:1]).expand_as(images)
        masked: Tensor = blend(images, self._reference(images, noise), 1.0 - saliency)
        return masked

    def blends(self, images: Tensor, saliency: Tensor, noise: Tensor | None) -> list[Tensor]:
        """What the judge sees: masked-out images, and if asked for ``m x + (1 - m) r``.

        Args:
            images: Normalised, ``[B, 3, H, W]``.
            saliency: m, ``[B, 1, h, w]``, at the decoder's resolution.
            noise: As in `masked`.

        Returns:
            One or two of ``[B, 3, H, W]``, differentiable in `saliency`.
        """
        reference = self._reference(images, noise)
        kept = [1.0 - saliency, saliency][: self.kinds]
        return [blend(images, reference, mask) for mask in kept]

    def _reference(self, images: Tensor, noise: Tensor | None) -> Tensor | None:
        """What masked pixels become; `None` is zero, the mean colour of normalised images."""
        if self.config.infill == "colour":
            return self._infill_colour.to(images.dtype).expand_as(images)
        if self.config.infill == "blur":
            return gaussian_blur(images, self.config.infill_sigma)
        return noise

    def _classify_masked(self, masked: Tensor) -> Tensor:
        """The live classifier on masked images, ``[B, 3, H, W] -> [B, K]``.

        In train mode it normalises by the batch. Whether the running statistics, which evaluation
        uses on clean images, follow too is `TrainConfig.masked_statistics`: where masks remove
        most of the evidence the two kinds of image have such different statistics that their
        mixture fits neither.
        """
        momenta = [layer.momentum for layer in self._normalisations]
        if not self._masked_statistics:
            for layer in self._normalisations:
                layer.momentum = 0.0
        logits: Tensor = self.model.classifier(masked)[0]
        for layer, momentum in zip(self._normalisations, momenta, strict=True):
            layer.momentum = momentum
        return logits

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the rows whose largest logit is the label's."""
    return (logits.argmax(dim=1) == labels).float().mean()


def _times(loss: Tensor, weight: float, scale: Tensor | None) -> Tensor:
    """The loss with its weight and its scale."""
    if weight != 1.0:
        loss = loss * weight
    return loss if scale is None else loss * scale


def _gradients(loss: Tensor, parameters: Sequence[Tensor], retain: bool = False) -> Gradients:
    """Gradients for `parameters` alone; `None` where the loss does not reach (a second head)."""
    return torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)
