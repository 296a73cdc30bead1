"""Layers of a classifier: the one to explain by default, and its activation as maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from casm_fast.attribution.problem import Problem
from casm_fast.models.borrowing import Classifies, find_module, token_grid


def last_spatial(problem: Problem) -> str:
    """The name of the last layer whose activation still lies in the image.

    The last module that gives ``[B, C, h, w]`` of more than one place, pooling to a fixed size left
    out; of several that return one and the same tensor the outermost. So it is "layer4" of a
    ResNet, "inception5b" of GoogLeNet, and "features" of a VGG, whose last step is features.36 of
    VGG19.

    Raises:
        ValueError: The classifier has no such module.
    """
    classifier = problem.classifier
    if not isinstance(classifier, nn.Module):
        raise ValueError(
            "layer: expected a classifier of named modules, whose last spatial activation is "
            f"taken, got {type(classifier).__name__}"
        )
    names = {module: name for name, module in classifier.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        fixed = isinstance(module, (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd))
        spatial = isinstance(output, Tensor) and output.dim() == 4
        if spatial and not fixed and output.shape[2] * output.shape[3] > 1:
            found.append(names[module])

    handles = [module.register_forward_hook(look) for module in names if names[module]]
    try:
        problem.logits(problem.images[:1])
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            "layer: expected a classifier with a module that gives [B, C, h, w], got none in "
            f"{type(classifier).__name__}; name the layer"
        )
    return found[-1]  # children end before their parents


class Tap:
    """What a layer gave in the last pass.

    Attributes:
        layer: Its name.
        output: Its activation, with its graph; None before the first pass.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.output: Any = None

    def maps(self) -> Tensor:
        """The activation as ``[B, C, h, w]``; of tokens ``[B, N, D]`` those of the square grid.

        Raises:
            ValueError: The activation has no places in the image.
        """
        output = self.output
        if isinstance(output, Tensor) and output.dim() == 4:
            return output
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        first, h, w = token_grid(shape, self.layer)
        tokens: Tensor = output[:, first:]  # [B, h * w, D]
        return tokens.mT.reshape(len(tokens), -1, h, w)


@contextmanager
def tapped(classifier: Classifies, layer: str) -> Iterator[Tap]:
    """Watch a layer by its name.

    Raises:
        ValueError: There is no such layer.
    """
    tap = Tap(layer)

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        # A ReLU in place behind the layer would change what is kept.
        tap.output = output.clone() if isinstance(output, Tensor) else output

    handle = find_module(classifier, layer).register_forward_hook(keep)
    try:
        yield tap
    finally:
        handle.remove()
