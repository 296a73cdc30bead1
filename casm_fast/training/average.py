"""A running mean of the mask's weights, which wanders less than the weights themselves."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from casm_fast.models.saliency import SaliencyModel


class MappingAverage:
    """Exponential means of the decoder, and of a separate encoder, under the live classifier.

    After update number n (from 1) ``average = d * average + (1 - d) * weights`` with
    ``d = min(decay, n / (9 + n))``: early on a mean over the last tenth of the updates or so, so
    that the random weights of the beginning do not linger. Running batch statistics are averaged
    like weights.

    Attributes:
        model: The live classifier with the averaged mapping; shares the classifier's tensors.
        updates: Updates so far.
    """

    def __init__(self, model: SaliencyModel, decay: float) -> None:
        """Begin with what `model` holds.

        Args:
            model: The model in training.
            decay: In [0, 1); 0.999 averages over about 1,000 updates.
        """
        self.decay = decay
        self.model = copy.deepcopy(model, {id(model.classifier): model.classifier})
        self._live = model
        for parameter in self.model.mapping_parameters():
            parameter.requires_grad_(False)
        self.restart()

    def restart(self) -> None:
        """Forget; begin anew with what the live model holds."""
        self.updates = 0
        for average, live in self._pairs():
            average.copy_(live)

    def update(self) -> None:
        """Take the live model's weights in."""
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates))
        averages, lives = [], []
        for average, live in self._pairs():
            if average.is_floating_point():
                averages.append(average)
                lives.append(live)
            else:
                average.copy_(live)
        torch._foreach_lerp_(averages, lives, 1.0 - decay)

    def state(self) -> dict[str, Any]:
        """All that the next updates depend on."""
        return {"updates": self.updates, "tensors": [average for average, _ in self._pairs()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.updates = state["updates"]
        for (average, _), saved in zip(self._pairs(), state["tensors"], strict=True):
            average.copy_(saved)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each averaged tensor with its live one."""
        theirs = self._live.state_dict()
        return [
            (tensor, theirs[name])
            for name, tensor in self.model.state_dict().items()
            if not name.startswith("classifier.")
        ]
