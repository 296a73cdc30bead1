"""From gradients to a step: loss scaling, clipping, fused optimisers; nothing waits for the device.

Float16 represents nothing below 6e-8, which is larger than many gradients of activations. With
``amp="fp16"`` each loss is therefore multiplied by a scale before its gradient is taken, and the
gradient divided by it. Where that gradient is not finite the step of its optimiser is left out and
the scale halved; after `GROWTH_INTERVAL` steps without such an event it is doubled (Micikevicius et
al., "Mixed precision training", 2018). `torch.amp.GradScaler` does the same for gradients that
``backward()`` left in ``.grad``; a CASM step takes the gradients of two objectives with
`torch.autograd.grad`, each for its own parameters, so that each has its own scale here. Whether a
step is left out is decided on the device, inside the fused optimisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Gradients = Sequence[Tensor | None]  # None: the loss does not reach that parameter (a second head)

# The values of torch.amp.GradScaler.
INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000

# So many steps left out in a row stop the run: 32 halvings take the first scale to 2^-16, and a
# gradient that still overflows does not do so because of the scale.
MOST_SKIPPED = 32


class LossScale:
    """A loss scale that adapts itself.

    Attributes:
        scale: What the loss is multiplied by, ``[]``.
        skipped: Steps left out in a row, ``[]``.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin at `INITIAL_SCALE`."""
        self.scale = torch.full((), INITIAL_SCALE, device=device)
        self.skipped = torch.zeros((), device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self._overflow = torch.zeros((), device=device)

    def remove(self, gradients: Sequence[Tensor]) -> Tensor:
        """Divide gradients by the scale, in place, and adapt it.

        Returns:
            1 where a gradient is not finite, else 0, ``[]``.
        """
        self._overflow.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(
            list(gradients), self._overflow, self.scale.reciprocal()
        )
        torch._amp_update_scale_(
            self.scale, self._good_steps, self._overflow, 2.0, 0.5, GROWTH_INTERVAL
        )
        self.skipped.add_(1).mul_(self._overflow)
        return self._overflow

    def tensors(self) -> dict[str, Tensor]:
        """All that the next steps depend on."""
        return {"scale": self.scale, "skipped": self.skipped, "good_steps": self._good_steps}


class Descent:
    """An optimiser with its parameters, its loss scale and the clipping of its gradients.

    Attributes:
        optimizer: A fused SGD or Adam.
        scale: `None` unless losses are scaled.
    """

    def __init__(
        self,
        optimizer: torch.optim.SGD | torch.optim.Adam,
        *,
        scaled: bool,
        clip: float | None = None,
    ) -> None:
        """Take a fresh optimiser of one parameter group, made with ``fused=True``.

        Args:
            optimizer: The optimiser.
            scaled: Whether losses are scaled.
            clip: Largest joint norm of the gradients.
        """
        self.optimizer = optimizer
        self.parameters: list[Tensor] = optimizer.param_groups[0]["params"]
        self.scale = LossScale(self.parameters[0].device) if scaled else None
        self.clip = clip

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @rate.setter
    def rate(self, rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = rate

    @property
    def factor(self) -> Tensor | None:
        """What the loss must be multiplied by before its gradient is taken, ``[]``, or `None`."""
        return None if self.scale is None else self.scale.scale

    def step(self, gradients: Gradients) -> None:
        """Do one step; with loss scaling, leave it out where a gradient is not finite.

        Args:
            gradients: Of the scaled loss, one for each parameter.
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else _laid_out(gradient, parameter)
        if self.scale is not None:
            reached = [
                parameter.grad for parameter in self.parameters if parameter.grad is not None
            ]
            # The fused optimisers look for these two names, as GradScaler leaves them.
            self.optimizer.found_inf = self.scale.remove(reached)  # type: ignore[union-attr]
            self.optimizer.grad_scale = None  # type: ignore[union-attr]
            self._start_momentum()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on, but the parameters."""
        scale = {} if self.scale is None else self.scale.tensors()
        return {"optimizer": self.optimizer.state_dict(), "scale": scale}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scale is not None:
            for name, tensor in self.scale.tensors().items():
                tensor.copy_(state["scale"][name])

    def _start_momentum(self) -> None:
        """Let SGD's momentum begin at zero, which gives the same first step.

        In its first step fused SGD makes the buffers without writing them where that step is left
        out; later ones would read what lay in that memory.
        """
        if self.optimizer.param_groups[0].get("momentum", 0.0) == 0.0:
            return
        for parameter in self.parameters:
            if parameter.grad is not None and not self.optimizer.state[parameter]:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter.

    torch's fused optimisers walk through both as they lie in memory, whatever their strides, and
    would move each weight by another one's gradient. (torch.nn's convolutions give gradients in the
    order of their input: ConvNeXt's strided ones in channels-last, where its weights are not.)
    """
    same = all(
        size == 1 or given == wanted
        for size, given, wanted in zip(
            parameter.shape, gradient.stride(), parameter.stride(), strict=True
        )
    )
    return gradient if same else torch.empty_like(parameter).copy_(gradient)


class GradientSum:
    """The sum of the gradients of several losses for the same parameters."""

    def __init__(self) -> None:
        self._total: list[Tensor | None] | None = None

    def add(self, gradients: Gradients) -> None:
        """Add the gradients of one loss, which stay as they are."""
        if self._total is None:
            self._total = list(gradients)
            return
        places, sums, terms = [], [], []
        for place, (so_far, gradient) in enumerate(zip(self._total, gradients, strict=True)):
            if so_far is None:
                self._total[place] = gradient
            elif gradient is not None:
                places.append(place)
                sums.append(so_far)
                terms.append(gradient)
        if places:
            # Not in place: two parameters may have been given one and the same tensor.
            for place, total in zip(places, torch._foreach_add(sums, terms), strict=True):
                self._total[place] = total

    def take(self) -> Gradients:
        """The sum; the next one starts at nothing."""
        total, self._total = self._total, None
        if total is None:
            raise RuntimeError("GradientSum.take: expected a gradient to have been added, got none")
        return total
