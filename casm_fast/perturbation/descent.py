"""The descent: Adam on the masks of a batch of images, B independent problems at once.

The objective of one image (Fong & Vedaldi 2017, eq. 6; supplement, eqs. 1 and 2)::

    deletion       lambda_l1 * sum |1 - m| + lambda_tv * TV(m) + score(m)
    preservation   lambda_l1 * sum |m|     + lambda_tv * TV(m) - score(m)
    both           lambda_l1 * sum |1 - m| + lambda_tv * TV(m) + score(m) - score(1 - m)

score(m) is the targets' summed score of the image seen through m, shifted anew at each step. Only
the score goes through autograd; the gradients of the two norms are written down. The only
synchronisation is that of early stopping, where it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from casm_fast import ops
from casm_fast.models.targets import Targets
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.judging import Judge
from casm_fast.perturbation.showing import Pictures

BETAS = (0.9, 0.999)
EPSILON = 1e-8
LOOK_EVERY = 10
"""Steps between two looks at which images are finished, with early stopping."""

TERMS = ("objective", "score", "complement", "l1", "tv")
"""The rows of the history; complement is score(1 - m), of the game "both"."""


@dataclass(frozen=True)
class Descent:
    """Where the masks of B images arrived.

    Attributes:
        masks: ``[B, 1, h, w]``, after the last step, or before the first that was not finite.
        best: ``[B, 1, h, w]``, those of the lowest objective.
        history: ``[B, 5, steps]``, `TERMS` before each step; NaN after an image's last step.
        steps: ``[B]`` int64, steps taken.
        broken: ``[B]`` bool, a score or gradient was not finite.
    """

    masks: Tensor
    best: Tensor
    history: Tensor
    steps: Tensor
    broken: Tensor


def evaluate(
    judge: Judge, pictures: Pictures, targets: Targets, masks: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The terms of the objective and its gradient.

    Args:
        judge: Gives the scores.
        pictures: B images.
        targets: Their classes.
        masks: ``[B, 1, h, w]`` in [0, 1].
        shift: ``[2]`` int32.

    Returns:
        ``[5, B]``, `TERMS`, and the gradient of the objective, ``[B, 1, h, w]``. At the border of
        an absolute value (m = 1; preservation: m = 0) the L1 term's gradient is 0.
    """
    config = judge.config
    with torch.enable_grad():
        leaf = masks.detach().requires_grad_()
        score = judge.scores(pictures, leaf, shift, targets)
        complement = None
        aim = -score if config.game == "preservation" else score
        if config.game == "both":
            complement = judge.scores(pictures, 1 - leaf, shift, targets)
            aim = score - complement
        (gradient,) = torch.autograd.grad(aim.sum(), leaf)
    tv, smooth = ops.tv_norm_with_gradient(
        masks, config.lambda_tv, config.tv_beta, config.tv_isotropic
    )
    marked = masks if config.game == "preservation" else masks - 1
    gradient = gradient + smooth + config.lambda_l1 * marked.sign()
    l1 = marked.abs().sum(dim=(1, 2, 3))
    objective = aim.detach() + config.lambda_l1 * l1 + config.lambda_tv * tv
    if complement is None:
        complement = torch.full_like(score, torch.nan)
    return torch.stack([objective, score.detach(), complement.detach(), l1, tv]), gradient


def descend(
    judge: Judge, pictures: Pictures, targets: Targets, masks: Tensor, shifts: Tensor
) -> Descent:
    """Run Adam from first masks.

    Args:
        judge: Gives the scores.
        pictures: B images, with room for the shifts.
        targets: Their classes.
        masks: First masks, ``[B, 1, h, w]``.
        shifts: ``[steps, 2]`` int32, on the device of the images.

    Returns:
        The masks and how they came about.
    """
    config = judge.config
    count, steps = len(masks), len(shifts)
    history = masks.new_full((steps, len(TERMS), count), torch.nan)
    taken = torch.full((count,), steps, dtype=torch.int64, device=masks.device)
    last, best = masks.clone(), masks.clone()
    broken = torch.zeros(count, dtype=torch.bool, device=masks.device)

    places = torch.arange(count, device=masks.device)  # of the images still in the batch
    state = _State.of(masks)
    for step in range(steps):
        terms, gradient = evaluate(judge, pictures, targets, state.masks, shifts[step])
        finite = (terms[0] + gradient.sum(dim=(1, 2, 3))).isfinite()  # of all, in one pass
        history[step][:, places] = torch.where(state.broken, torch.nan, terms)
        state.note(terms[0], finite, config)
        state.move(gradient, step, config)
        if config.patience > 0 and (step + 1) % LOOK_EVERY == 0:
            done = (state.stale >= config.patience) | state.broken
            if bool(done.any()):  # waits for the device
                gone = places[done]
                last[gone], best[gone] = state.masks[done], state.best[done]
                broken[gone], taken[gone] = state.broken[done], step + 1
                stay = torch.nonzero(~done)[:, 0]
                places, state = places[stay], state.select(stay)
                pictures, targets = pictures.select(stay), targets.select(stay)
            if len(places) == 0:
                break
    last[places], best[places], broken[places] = state.masks, state.best, state.broken
    return Descent(last, best, history.permute(2, 1, 0).contiguous(), taken, broken)


@dataclass
class _State:
    """What the descent carries from step to step, one row per image still in the batch."""

    masks: Tensor
    mean: Tensor  # Adam's moments
    square: Tensor
    best: Tensor
    lowest: Tensor  # objective of `best`
    level: Tensor  # objective that must be undercut by the tolerance
    stale: Tensor  # steps since it was
    broken: Tensor

    @staticmethod
    def of(masks: Tensor) -> _State:
        count, device = len(masks), masks.device
        high = torch.full((count,), torch.inf, dtype=masks.dtype, device=device)
        return _State(
            masks=masks.clone(),
            mean=torch.zeros_like(masks),
            square=torch.zeros_like(masks),
            best=masks.clone(),
            lowest=high,
            level=high.clone(),
            stale=torch.zeros(count, dtype=torch.int64, device=device),
            broken=torch.zeros(count, dtype=torch.bool, device=device),
        )

    def select(self, places: Tensor) -> _State:
        return _State(**{name: value[places] for name, value in vars(self).items()})

    def note(self, objective: Tensor, finite: Tensor, config: PerturbConfig) -> None:
        """Keep the best masks; an image that is not finite stays where it is from now on."""
        self.broken = self.broken | ~finite
        better = (objective < self.lowest) & ~self.broken
        self.lowest = torch.where(better, objective, self.lowest)
        self.best = torch.where(better[:, None, None, None], self.masks, self.best)
        if config.patience > 0:
            lower = objective < self.level - config.tolerance
            self.level = torch.where(lower, objective, self.level)
            self.stale = torch.where(lower, 0, self.stale + 1)

    def move(self, gradient: Tensor, step: int, config: PerturbConfig) -> None:
        """One step of Adam, and the clamp."""
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        spread = (self.square / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPSILON)
        size = config.learning_rate / (1 - BETAS[0] ** (step + 1))
        moved = torch.addcdiv(self.masks, self.mean, spread, value=-size).clamp_(0, 1)
        self.masks = torch.where(self.broken[:, None, None, None], self.masks, moved)
