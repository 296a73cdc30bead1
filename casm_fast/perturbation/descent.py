"""The descent: Adam on the masks of a batch of images, B independent problems at once.

The objective of one image (Fong & Vedaldi 2017, eq. 6; supplement, eqs. 1 and 2)::

    deletion       lambda_l1 * sum |1 - m| + lambda_tv * TV(m) + score(m)
    preservation   lambda_l1 * sum |m|     + lambda_tv * TV(m) - score(m)
    both           lambda_l1 * sum |1 - m| + lambda_tv * TV(m) + score(m) - score(1 - m)

score(m) is the targets' summed score of the image seen through m, shifted anew at each step. Only
the classifier and what it is shown go through autograd; the rest of the gradient is written down.
A step works in buffers that stay where they are and counts on the device, so that it can be
captured in a CUDA graph. The only synchronisation is that of early stopping, where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from casm_fast import ops
from casm_fast.models.memory import is_out_of_memory
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
    preserves = config.game == "preservation"
    score, pull = judge.pull(pictures, masks, shift, targets)
    aim, complement = score, None
    if config.game == "both":
        complement, other = judge.pull(pictures, 1 - masks, shift, targets)
        aim, pull = score - complement, pull.add_(other)
    tv, gradient = ops.tv_norm_with_gradient(
        masks, config.lambda_tv, config.tv_beta, config.tv_isotropic
    )
    costly = masks if preserves else 1 - masks  # not negative: an absolute value already
    l1 = costly.sum(dim=(1, 2, 3))
    sign = -1 if preserves else 1
    gradient.add_(pull, alpha=sign).add_(costly.sign(), alpha=-sign * config.lambda_l1)
    objective = torch.mul(tv, config.lambda_tv).add_(l1, alpha=config.lambda_l1)
    objective.add_(aim, alpha=sign)
    if complement is None:
        complement = torch.full_like(score, torch.nan)
    return torch.stack([objective, score, complement, l1, tv]), gradient


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

    Raises:
        ValueError: A CUDA graph is asked for, and the classifier's pass cannot be captured.
    """
    patience, steps = judge.config.patience, len(shifts)
    made = _State.of(masks, steps)  # of all images, each as it left
    taken = torch.full((len(masks),), steps, dtype=torch.int64, device=masks.device)
    places = torch.arange(len(masks), device=masks.device)  # of the images still in the batch
    over = torch.zeros_like(places, dtype=torch.bool)  # which of these are finished
    batch = Step(judge, pictures, targets, shifts, _State.of(masks, steps))
    aside = torch.cuda.Stream(masks.device) if judge.config.cuda_graph else None  # type: ignore[no-untyped-call]
    step = batch.ready(aside)
    for number in range(1, steps + 1):
        step()
        if patience > 0 and number % LOOK_EVERY == 0 and number < steps:
            done = ((batch.state.stale >= patience) | batch.state.broken) & ~over
            if not bool(done.any()):  # waits for the device
                continue
            made.put(places[done], batch.state.select(done))
            taken[places[done]] = number
            over |= done
            # A capture costs more than steps in vain: the finished stay until they are a half.
            if aside is not None and 2 * int(over.sum()) < len(over):
                continue
            places, batch, over = places[~over], batch.select(~over), over[~over]
            if len(places) == 0:
                break
            step = batch.ready(aside)
    state = batch.state
    if patience > 0:
        places, state = places[~over], state.select(~over)
    made.put(places, state)
    history = made.history.permute(0, 2, 1).contiguous()
    return Descent(made.masks, made.best, history, taken, made.broken)


@dataclass(frozen=True)
class Step:
    """All that a step reads and writes, for the images still in the batch.

    Attributes:
        judge: Gives the scores.
        pictures: Of the images.
        targets: Their classes.
        shifts: ``[steps, 2]`` int32.
        state: What changes from step to step, each tensor in its place.
    """

    judge: Judge
    pictures: Pictures
    targets: Targets
    shifts: Tensor
    state: _State

    def __call__(self) -> None:
        """Take the next step; no allocation outlives it, and the host learns nothing."""
        state = self.state
        shift = self.shifts.index_select(0, state.place).view(2)
        terms, gradient = evaluate(self.judge, self.pictures, self.targets, state.masks, shift)
        state.note(terms, gradient, self.judge.config)
        state.move(gradient, self.judge.config)

    def select(self, places: Tensor) -> Step:
        """The steps of some images, in buffers of their own."""
        return Step(
            self.judge,
            self.pictures.select(places),
            self.targets.select(places),
            self.shifts,
            self.state.select(places),
        )

    def ready(self, aside: torch.cuda.Stream | None) -> Callable[[], None]:
        """The step as it will be taken: itself, or the replay of its CUDA graph.

        Args:
            aside: The stream that captures; None: there is no graph.

        Raises:
            ValueError: It cannot be captured.
        """
        if aside is None:
            return self
        here = torch.cuda.current_stream(aside.device)
        try:
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                rehearsal = replace(self, state=self.state.copy())
                rehearsal.state.place.zero_()
                rehearsal()  # libraries set themselves up
                rehearsal.state.place.zero_()
                with _waiting_refused():
                    rehearsal()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # A refused capture leaves its stream in place, which the outer context puts right. What
            # other threads do meanwhile is no reason to refuse one.
            with (
                torch.cuda.stream(here),
                torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"),
            ):
                self()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                "cuda_graph: expected a classifier whose pass can be captured, without waiting for "
                f"the device, got {str(error).splitlines()[0]}; leave cuda_graph off"
            ) from error
        return graph.replay


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """What would wait for the device raises an error, in all threads.

    A capture would refuse it as well, but can leave torch's allocator unusable then.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class _State:
    """What changes from step to step, one row per image, and the number of the step."""

    masks: Tensor
    mean: Tensor  # Adam's moments
    square: Tensor
    best: Tensor
    lowest: Tensor  # objective of `best`
    level: Tensor  # objective that must be undercut by the tolerance
    stale: Tensor  # steps since it was
    broken: Tensor
    history: Tensor  # [B, steps, 5]
    place: Tensor  # [1] int64, steps taken
    time: Tensor  # the same as Adam's kernel reads it, float32

    @staticmethod
    def of(masks: Tensor, steps: int) -> _State:
        count, device = len(masks), masks.device
        high = torch.full((count,), torch.inf, dtype=masks.dtype, device=device)
        return _State(
            masks=masks.clone(memory_format=torch.contiguous_format),
            mean=torch.zeros_like(masks, memory_format=torch.contiguous_format),
            square=torch.zeros_like(masks, memory_format=torch.contiguous_format),
            best=masks.clone(memory_format=torch.contiguous_format),
            lowest=high,
            level=high.clone(),
            stale=torch.zeros(count, dtype=torch.int64, device=device),
            broken=torch.zeros(count, dtype=torch.bool, device=device),
            history=masks.new_full((count, steps, len(TERMS)), torch.nan),
            place=torch.zeros(1, dtype=torch.int64, device=device),
            time=torch.zeros((), dtype=torch.float32, device=device),
        )

    def rows(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if name not in _SHARED}

    def select(self, places: Tensor) -> _State:
        """Some images, in buffers of their own."""
        some = {name: value[places] for name, value in self.rows().items()}
        return _State(**{**vars(self.copy()), **some})

    def copy(self) -> _State:
        return _State(**{name: value.clone() for name, value in vars(self).items()})

    def put(self, places: Tensor, other: _State) -> None:
        """Write the rows of some images."""
        for name, value in other.rows().items():
            getattr(self, name)[places] = value

    def note(self, terms: Tensor, gradient: Tensor, config: PerturbConfig) -> None:
        """Keep the best masks and the history; what is not finite is broken from now on."""
        terms.masked_fill_(self.broken, torch.nan)
        self.history.index_copy_(1, self.place, terms.T[:, None])
        objective = terms[0]
        # The objective where it and the gradient are finite, else NaN, which is below nothing.
        sound = gradient.sum(dim=(1, 2, 3)).add_(objective).mul_(0).add_(objective)
        torch.ne(sound, sound, out=self.broken)
        better = (sound < self.lowest).view(-1, 1, 1, 1)
        torch.where(better, self.masks, self.best, out=self.best)
        torch.fmin(self.lowest, sound, out=self.lowest)
        if config.patience > 0:
            lower = sound < self.level - config.tolerance
            torch.where(lower, sound, self.level, out=self.level)
            self.stale.add_(1).masked_fill_(lower, 0)

    def move(self, gradient: Tensor, config: PerturbConfig) -> None:
        """One step of Adam, and the clamp; broken images stay where they are."""
        broken = self.broken.view(-1, 1, 1, 1)
        gradient.masked_fill_(broken, 0)
        self.mean.masked_fill_(broken, 0)
        self.time.add_(1)
        # The kernel of torch.optim.Adam(fused=True), without the optimiser's 30 microseconds.
        torch._fused_adam_(
            [self.masks],
            [gradient],
            [self.mean],
            [self.square],
            [],
            [self.time],
            lr=config.learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        self.masks.clamp_(0, 1)
        self.place.add_(1)


_SHARED = ("place", "time")
