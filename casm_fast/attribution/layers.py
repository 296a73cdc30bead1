"""Activations of a network: recorded by name, found by looking, laid out over the image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casm_fast.attribution.calls import Call, Interception
from casm_fast.attribution.problem import Problem
from casm_fast.models.borrowing import Classifies, find_module, token_grid

_POOLING = nn.MaxPool2d.__module__

_SAME_SHAPE = 0.15
"""Half the logarithm of how much the shape of a small map may differ from its image's."""


@dataclass
class Recorded:
    """What the module gave in its last call; None before it was called."""

    value: Tensor | None = None

    def activation(self, layer: str) -> Tensor:
        """The activation.

        Raises:
            ValueError: The module was not called, or gave no tensor.
        """
        if self.value is None:
            raise ValueError(
                f"layer: expected a module that gives a tensor in the forward pass, got {layer!r}, "
                "which does not"
            )
        return self.value


@contextmanager
def recorded(classifier: Classifies, layer: str) -> Iterator[Recorded]:
    """Keeps what a module gives, also if later layers overwrite it in place.

    Args:
        classifier: A module.
        layer: The name of the module; of several calls the last counts, of a tuple the first.

    Raises:
        ValueError: There is no such module.
    """
    record = Recorded()

    def keep(module: nn.Module, given: Any, answer: Any) -> Any:
        del module, given
        first = answer[0] if isinstance(answer, tuple) and answer else answer
        if not isinstance(first, Tensor):
            return answer
        record.value = first
        copied = first.clone()
        return (copied, *answer[1:]) if isinstance(answer, tuple) else copied

    hook = find_module(classifier, layer).register_forward_hook(keep)
    try:
        yield record
    finally:
        hook.remove()


def as_grid(activation: Tensor, layer: str, size: torch.Size) -> Tensor:
    """An activation laid out over the image, ``[B, C, h, w]``; of a transformer's its patches.

    ``[B, h, w, C]`` is told from ``[B, C, h, w]`` by the image's shape.

    Args:
        activation: Of four dimensions, or tokens ``[B, N, D]``.
        layer: Its name, for messages.
        size: Height and width of the images.

    Raises:
        ValueError: It has no places in the image.
    """
    if activation.dim() == 4:
        first, last = (
            abs(math.log(activation.shape[d] / activation.shape[d + 1] / size[0] * size[1]))
            for d in (2, 1)
        )
        return activation.permute(0, 3, 1, 2) if last < first / 2 > _SAME_SHAPE else activation
    first_token, height, width = token_grid(tuple(activation.shape), layer)
    tokens = activation[:, first_token:].transpose(1, 2)
    return tokens.reshape(*tokens.shape[:2], height, width)


def enlarged(maps: Tensor, size: torch.Size) -> Tensor:
    """``[B, 1, h, w]`` at the size of the images, bilinear, corners not aligned."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def find_layer(
    problem: Problem, method: str, coarsest: float = 0.0, max_pools: bool = False
) -> str:
    """The name of the last module with places at whose output all of the image passes by.

    It is found by looking at one pass over an image of noise. An activation counts if it is a
    feature map or a square grid of tokens with more than one place; if it does not come out of a
    pool; if every way from the image to the logits leads through it, so that it lies in no branch
    beside another; and if what the last linear layer reads has a gradient for its places: in a
    vision transformer whose head reads the class token, only what comes before the last block has
    one.

    Args:
        problem: The classifier, and the size of the images.
        method: Who asks.
        coarsest: The least side of the activation as a share of the image's; without any of this
            size the last of the largest counts.
        max_pools: Whether what comes out of a max pool counts, too.

    Raises:
        ValueError: The classifier has no modules or no such activation.
    """
    classifier = problem.classifier
    if not isinstance(classifier, nn.Module):
        raise ValueError(
            f"{method}: expected a classifier with modules, among which a layer is found, "
            f"got {type(classifier).__name__}"
        )
    images = problem.images
    stream = torch.Generator().manual_seed(0)
    noise = torch.randn((1, *images.shape[1:]), generator=stream).to(images)
    with torch.enable_grad():
        noise.requires_grad_()
        with _watched(classifier, max_pools) as seen, _LastLinear() as last:
            logits = problem.logits(noise)
        upper = last.read_for(logits)
        weights = torch.randn(upper.shape, generator=stream).to(upper)
        gradients: Sequence[Tensor | None] = ()
        if seen and upper.requires_grad:
            values = [value for _, value in seen]
            gradients = torch.autograd.grad(upper, values, weights, allow_unused=True)
    sides: dict[str, float] = {}
    size = images.shape[2:]
    for (name, value), gradient in zip(seen, gradients, strict=False):
        sides.pop(name, None)  # of several calls the last counts
        reached = gradient is not None and bool(as_grid(gradient, name, size).any())
        if reached and not _has_way_around(upper, value, noise):
            grid = as_grid(value, name, size)
            sides[name] = min(a / b for a, b in zip(grid.shape[2:], size, strict=True))
    if not sides:
        raise ValueError(
            f"{method}: expected a network with an activation that has places in the image, "
            f"got none for images of {images.shape[2]} x {images.shape[3]}; name a layer"
        )
    least = min(coarsest, max(sides.values()))
    return [name for name, side in sides.items() if side >= least][-1]


class _LastLinear(Interception):
    """Notes what the last linear layer reads and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: tuple[Tensor, Tensor] | None = None

    def answer(self, call: Call) -> Any:
        """The call; of a linear layer both ends are noted."""
        made = call.run()
        if call.name == "linear":
            self.noted = call.input, made
        return made

    def read_for(self, logits: Tensor) -> Tensor:
        """What it reads if it gives the logits, which weights of zero would hide; else those."""
        if self.noted is not None:
            read, made = self.noted
            if made.shape == logits.shape and torch.equal(made.to(logits.dtype), logits):
                return read
        return logits


@contextmanager
def _watched(classifier: nn.Module, max_pools: bool) -> Iterator[list[tuple[str, Tensor]]]:
    """Every activation with places, in the order in which the modules finish."""
    seen: list[tuple[str, Tensor]] = []
    pooled: list[Tensor] = []

    def watch(name: str, module: nn.Module) -> Any:
        def note(_: nn.Module, __: Any, value: Any) -> None:
            pools = type(module).__module__ == _POOLING
            pools &= not (max_pools and isinstance(module, nn.MaxPool2d))
            if pools and isinstance(value, Tensor):
                pooled.append(value)
            elif _has_places(value) and not any(value is other for other in pooled):
                seen.append((name, value))

        return module.register_forward_hook(note)

    hooks = [watch(name, module) for name, module in classifier.named_modules() if name]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _has_way_around(upper: Tensor, value: Tensor, leaf: Tensor) -> bool:
    """Whether autograd's graph leads from `upper` to `leaf` without passing `value`."""
    met = {value.grad_fn}
    ahead = [upper.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if getattr(node, "variable", None) is leaf:
            return True
        ahead += [below for below, _ in node.next_functions]
    return False


def _has_places(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.requires_grad:
        return False
    if value.dim() == 4:
        return value.shape[2] * value.shape[3] > 1
    try:
        token_grid(tuple(value.shape), "")
    except ValueError:
        return False
    return True
