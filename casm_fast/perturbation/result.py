"""What a mask optimisation gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from casm_fast.perturbation.config import PerturbConfig


@dataclass(frozen=True)
class Curves:
    """What the descent saw before each of its steps, ``[B, steps]`` each.

    NaN after the last step of an image that finished early, or that was not finite.

    Attributes:
        objective: What is minimised.
        score: The targets' score of the shifted image seen through the mask.
        complement: That of what the mask hides; NaN but for the game "both".
        l1: Sum of |1 - m| (preservation: |m|), without its weight.
        tv: Total variation, without its weight.
    """

    objective: Tensor
    score: Tensor
    complement: Tensor
    l1: Tensor
    tv: Tensor


@dataclass(frozen=True)
class Perturbation:
    """Masks of B images and what they do, on the device of the images.

    Attributes:
        masks: ``[B, 1, h, w]`` in [0, 1]: 1 keeps, 0 replaces. Of an image that diverged: the best
            so far.
        masks_full: The same at the size of the images, ``[B, 1, H, W]``.
        perturbed: The images seen through the masks, without shifts, ``[B, C, H, W]``; None with a
            layer.
        targets: ``[B, n]`` int64, the classes; filled up with -1.
        score_before: ``[B]``, the targets' summed score of the images.
        score_after: ``[B]``, under the masks, without shifts.
        score_hidden: ``[B]``, with everything hidden.
        diverged: ``[B]`` bool: a score or gradient was not finite, or the objective rose: its mean
            over the last tenth of the steps is above that of the first mask by more than a tenth
            of its size (at least of 1).
        steps: ``[B]`` int64, steps taken.
        first_masks: ``[B, 1, h, w]``, where the descent began.
        curves: What happened on the way.
        config: As it was asked for.
        batch_size: Images optimised at once, after any halving.
    """

    masks: Tensor
    masks_full: Tensor
    perturbed: Tensor | None
    targets: Tensor
    score_before: Tensor
    score_after: Tensor
    score_hidden: Tensor
    diverged: Tensor
    steps: Tensor
    first_masks: Tensor
    curves: Curves
    config: PerturbConfig
    batch_size: int

    @property
    def saliency(self) -> Tensor:
        """``[B, 1, H, W]``, 1 = salient: what is hidden, or with preservation what is kept."""
        return self.masks_full if self.config.game == "preservation" else 1 - self.masks_full

    @property
    def normalised(self) -> Tensor:
        """``[B]``: share of the score that is left, between everything hidden (0) and shown (1).

        Not finite, or without meaning, where hiding everything does not lower the score.
        """
        return (self.score_after - self.score_hidden) / (self.score_before - self.score_hidden)

    def select(self, places: Tensor) -> Perturbation:
        """The results of some images.

        Args:
            places: ``[n]`` int64.
        """

        def at(value: Any) -> Any:
            if isinstance(value, Curves):
                return Curves(**{name: curve[places] for name, curve in vars(value).items()})
            return value[places] if isinstance(value, Tensor) else value

        return Perturbation(**{name: at(value) for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.masks)

    def __str__(self) -> str:
        failed = int(self.diverged.sum())
        note = f", {failed} diverged" if failed else ""
        return (
            f"{len(self)} images: score {float(self.score_before.mean()):.3f} -> "
            f"{float(self.score_after.mean()):.3f}, "
            f"salient {100 * float(self.saliency.mean()):.1f} %{note}"
        )
