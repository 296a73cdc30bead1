"""The caller's classifier as a judge: the scores of masked images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from casm_fast import ops
from casm_fast.models.borrowing import (
    Classifies,
    as_logits,
    borrowed,
    dtype_of,
    find_module,
    token_grid,
)
from casm_fast.models.targets import Targets
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.showing import Pictures


@dataclass
class Judge:
    """Scores of masked images; see `judging`.

    Attributes:
        classifier: In eval mode, without gradients of its parameters.
        config: Score, layer and precision.
        dtype: What the classifier takes; None: whatever comes.
        mask: What the layer's activation is multiplied by during a pass.
        activation: Shape of the layer's activation in the last pass.
        visits: How often the layer ran in the last pass.
        wanted: Targets, and how often each class is among them, ``[B, K]``: of the last descent.
    """

    classifier: Classifies
    config: PerturbConfig
    dtype: torch.dtype | None = None
    mask: Tensor | None = None
    activation: tuple[int, ...] = ()
    visits: int = field(default=0)
    wanted: tuple[Targets, Tensor] | None = field(default=None, repr=False)

    def scores(
        self, pictures: Pictures, mask: Tensor | None, shift: Tensor, targets: Targets
    ) -> Tensor:
        """The targets' summed score of each image, ``[B]``, under masks ``[B, 1, h, w]``."""
        values = self.logits(pictures, mask, shift)
        if self.config.score == "softmax":
            values = values.softmax(dim=1)
        elif self.config.score == "log_softmax":
            values = values.log_softmax(dim=1)
        return targets.of(values)

    def pull(
        self, pictures: Pictures, mask: Tensor, shift: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """`scores`, and the gradient of each for its own mask, ``[B, 1, h, w]``.

        From the logits on the gradient is written down: of the softmax p and targets w it is
        ``p * (w - score)``, of its logarithm ``w - sum(w) * p``, of the logits w.
        """
        with torch.enable_grad():
            leaf = mask.detach().requires_grad_()
            logits = self.logits(pictures, leaf, shift)
        values = logits.detach()
        wanted = self._wanted(targets, values)
        if self.config.score == "softmax":
            values = values.softmax(dim=1)
            score = (values * wanted).sum(dim=1)
            seed = (wanted - score[:, None]).mul_(values)
        elif self.config.score == "log_softmax":
            values = values.log_softmax(dim=1)
            score = targets.of(values)
            seed = wanted - values.exp() * wanted.sum(dim=1, keepdim=True)
        else:
            score, seed = targets.of(values), wanted
        (gradient,) = torch.autograd.grad(logits, leaf, seed)
        return score, gradient

    def _wanted(self, targets: Targets, values: Tensor) -> Tensor:
        if self.wanted is None or self.wanted[0] is not targets:
            counts, there = torch.zeros_like(values), targets.classes >= 0
            counts.scatter_add_(1, targets.classes.clamp(min=0), there.to(values))
            self.wanted = targets, counts
        return self.wanted[1]

    def logits(self, pictures: Pictures, mask: Tensor | None, shift: Tensor) -> Tensor:
        """What the classifier answers, ``[B, K]`` in the dtype of the images.

        Raises:
            ValueError: It answers something else.
        """
        inner = self.config.layer is not None
        images = pictures.shown(None if inner else mask, shift)
        self.mask, self.visits = (mask if inner else None), 0
        answer = self.ask(images)
        self.mask = None
        return answer

    def ask(self, images: Tensor) -> Tensor:
        """What the classifier answers to images ``[B, C, H, W]`` as they are.

        Raises:
            ValueError: It answers something else than logits.
        """
        with self._precision(images.device.type):
            answer = self.classifier(images if self.dtype is None else images.to(self.dtype))
        return as_logits(answer, len(images), self.config.score).to(images.dtype)

    def _precision(self, device: str) -> AbstractContextManager[object]:
        if self.config.amp == "off" and not torch.is_autocast_enabled(device):
            return nullcontext()  # autocast costs 10 microseconds even where it does nothing
        return torch.autocast(device, torch.bfloat16, enabled=self.config.amp == "bf16")

    def hook(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Multiplies the activation of the layer by the mask."""
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer: expected a module that returns a tensor, got {self.config.layer!r}, "
                f"which returns {type(output).__name__}"
            )
        self.visits += 1
        self.activation = tuple(output.shape)
        if self.mask is None:
            return None
        if output.dim() == 4:
            return ops.blend(output, None, self._fitted(output, output.shape[2], output.shape[3]))
        first, h, w = token_grid(self.activation, str(self.config.layer))
        cells = self._fitted(output, h, w).flatten(2).movedim(1, 2)  # [B, h * w, 1]
        kept = torch.ones_like(cells[:, :1]).expand(-1, first, 1)
        return output * torch.cat([kept, cells], dim=1).to(output.dtype)

    def _fitted(self, output: Tensor, h: int, w: int) -> Tensor:
        mask = self.mask
        if mask is None:
            raise RuntimeError("expected a mask during the pass")
        if mask.shape[2:] != (h, w):
            mask = ops.upsample_mask(mask, (h, w), self.config.mask_sigma)
        # Beside 16-bit activations the mask stays float32, as `blend` takes it.
        return mask.to(torch.float64 if output.dtype == torch.float64 else torch.float32)


@contextmanager
def judging(classifier: Classifies, config: PerturbConfig) -> Iterator[Judge]:
    """A judge that asks the caller's classifier, on loan; see `casm_fast.models.borrowing`.

    Raises:
        TypeError: `classifier` cannot be called.
        ValueError: The layer does not exist, or normalisation couples the images of a batch.
    """
    with borrowed(classifier) as lent:
        judge = Judge(lent, config, dtype_of(lent))
        if config.layer is not None:
            find_module(lent, config.layer).register_forward_hook(judge.hook)
        yield judge
