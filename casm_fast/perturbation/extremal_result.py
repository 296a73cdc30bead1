"""What the search for extremal perturbations gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from casm_fast.perturbation.extremal_config import ExtremalConfig


@dataclass(frozen=True)
class ExtremalCurves:
    """What SGD saw before each of its steps, ``[B, A, steps]`` each; NaN from where it broke.

    Attributes:
        objective: What is maximised: reward minus the weighted area loss.
        reward: Of the image, mirrored at every other step, seen through the mask.
        area_loss: Mean squared difference of the sorted mask to the step, without its weight.
    """

    objective: Tensor
    reward: Tensor
    area_loss: Tensor


@dataclass(frozen=True)
class Extremal:
    """Masks of B images at A areas and what they do, on the device of the images.

    Attributes:
        masks: ``[B, A, H, W]`` in [0, 1], 1 = salient: kept (with delete: replaced).
        parameters: The small masks behind them, ``[B, A, h, w]``.
        areas: ``[A]``, as asked for.
        reached: ``[B, A]``, mean of each mask.
        saliency: ``[B, 1, H, W]``, the masks summed over the areas and smoothed.
        targets: ``[B, n]`` int64, the classes; filled up with -1.
        score_before: ``[B]``, the targets' summed logits of the images.
        score_after: ``[B, A]``, with only the region shown (delete: without it).
        score_hidden: ``[B]``, with everything hidden.
        diverged: ``[B, A]`` bool: a score or gradient was not finite, and the mask is the last
            before; or the area loss ended above where it began, by more than 0.01.
        curves: What happened on the way.
        config: As it was asked for.
        batch_size: Masks learned at once, after any halving.
    """

    masks: Tensor
    parameters: Tensor
    areas: Tensor
    reached: Tensor
    saliency: Tensor
    targets: Tensor
    score_before: Tensor
    score_after: Tensor
    score_hidden: Tensor
    diverged: Tensor
    curves: ExtremalCurves
    config: ExtremalConfig
    batch_size: int

    def __len__(self) -> int:
        return len(self.masks)

    def __str__(self) -> str:
        failed = int(self.diverged.sum())
        after = ", ".join(
            f"{float(score):.3f} at {100 * area:g} %"
            for score, area in zip(self.score_after.mean(dim=0), self.config.areas, strict=True)
        )
        return (
            f"{len(self)} images: logit {float(self.score_before.mean()):.3f} -> {after}"
            f"{f', {failed} masks diverged' if failed else ''}"
        )
