"""The classifier is asked about many versions of images, in passes as full as memory allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from casm_fast.models.borrowing import Classifies, as_logits, dtype_of
from casm_fast.models.memory import budget, footprint, in_parts
from casm_fast.models.targets import Targets, as_targets

Score = Literal["softmax", "logit", "log_softmax"]
"""What of a class's logits is measured."""


def check_score(score: str) -> None:
    """Raises ValueError unless it is a score."""
    if score not in get_args(Score):
        raise ValueError(f"score: expected one of {', '.join(get_args(Score))}, got {score!r}")


def passes(
    lent: Classifies, images: Tensor, batch_size: int | None, memory_budget: float | None
) -> int:
    """How many images one pass may hold.

    Args:
        lent: The classifier, on loan.
        images: ``[B, C, H, W]``, of which the first is tried.
        batch_size: Asked for; None: as many as memory holds.
        memory_budget: GiB; None: half of what is free, on the CPU at most 4.

    Raises:
        ValueError: A number that is not above 0.
    """
    for name, value in (("batch_size", batch_size), ("memory_budget", memory_budget)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")
    if batch_size is not None:
        return batch_size

    def run() -> None:
        with torch.enable_grad():
            logits(lent, images[:1].clone().requires_grad_())

    kept = footprint(run, lent.parameters() if isinstance(lent, nn.Module) else ())
    return max(1, int(budget(images.device, memory_budget) / (kept + 8 * images[:1].nbytes)))


def logits(lent: Classifies, images: Tensor, score: str = "logit") -> Tensor:
    """What the classifier answers, ``[n, K]`` in the dtype of the images."""
    dtype = dtype_of(lent)
    answer = lent(images if dtype is None else images.to(dtype))
    return as_logits(answer, len(images), score).to(images.dtype)


def read(values: Tensor, targets: Targets, score: Score) -> Tensor:
    """The targets' summed score of each image, ``[n]``, from logits ``[n, K]``."""
    if score == "softmax":
        values = values.softmax(dim=1)
    elif score == "log_softmax":
        values = values.log_softmax(dim=1)
    return targets.of(values)


def targets_of(lent: Classifies, images: Tensor, targets: Any, size: int) -> Targets:
    """The classes that were given, or each image's best class, on the device of the images.

    Args:
        lent: The classifier, on loan.
        images: ``[B, C, H, W]``.
        targets: As `casm_fast.models.targets.as_targets` takes them.
        size: Images of a pass.
    """
    count = len(images)
    classes = logits(lent, images[:1]).shape[1]
    given = as_targets(targets, count, classes)
    if given is not None:
        return Targets(given.to(images.device))

    def best(part: slice) -> Tensor:
        return logits(lent, images[part]).argmax(dim=1, keepdim=True)

    return Targets(torch.cat([made for made, _ in in_parts(count, size, best, images.device)]))


def ask(
    lent: Classifies,
    count: int,
    show: Callable[[slice], Tensor],
    answer: Callable[[Tensor, slice], Tensor],
    size: int,
    device: torch.device,
) -> Tensor:
    """Shows `count` images to the classifier, `size` at once; half as many when memory runs out.

    Args:
        lent: The classifier, on loan.
        count: Number of images.
        show: Makes some of the images, ``[n, C, H, W]``.
        answer: What is kept of their logits.
        size: Images of a pass.
        device: Of the images.

    Returns:
        The answers of all images, one after the other.
    """

    def work(part: slice) -> Tensor:
        return answer(logits(lent, show(part)), part)

    return torch.cat([made for made, _ in in_parts(count, size, work, device)])
