"""Batch norms folded into the convolutions before them, for networks that only run.

In eval mode a batch norm scales and shifts every channel by numbers that do not depend on the
input, and so does a convolution with other weights and another bias: the two are one convolution.
What is saved is a pass over every activation.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Difference of an output that rounding can make, by its largest value."""


def folded(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a network without the batch norms that a convolution can take over.

    Which batch norm follows which convolution is seen in a forward pass, so that any network will
    do. A second pass compares: where something else reads what the convolution gives, the outputs
    differ, and the network is returned as it is.

    Args:
        network: In eval mode. Left as it is.
        images: ``[B, 3, H, W]`` on its device, to look with.

    Returns:
        The copy, or the network itself where there is nothing to fold or no way to copy.
    """
    if not any(map(_foldable, network.modules())):
        return network
    with torch.inference_mode(False), torch.no_grad(), _whole_float32():
        expected, pairs = _pairs(network, images)
        if not pairs:
            return network
        try:
            other = copy.deepcopy(network)
        except (TypeError, RuntimeError) as error:  # what it holds beside its modules
            logger.info("the batch norms stay: the network cannot be copied (%s)", error)
            return network
        for convolution, norm in pairs:
            first: Any = other.get_submodule(convolution)
            second: Any = other.get_submodule(norm)
            _put(other, convolution, fuse_conv_bn_eval(first, second))
            _put(other, norm, nn.Identity())
        same = all(map(_close, _tensors(other(images)), _tensors(expected)))
    if not same:
        logger.info("the batch norms stay: the network reads the convolutions before them, too")
        return network
    logger.debug("%d batch norms are folded into the convolutions before them", len(pairs))
    return other


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Convolutions on a GPU without TF32, whose rounding is as large as `TOLERANCE`."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def _pairs(network: nn.Module, images: Tensor) -> tuple[Any, list[tuple[str, str]]]:
    """The outputs of a pass, and the names of convolutions and of the batch norms behind them."""
    given: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that none takes an id over
    found: list[tuple[str, str]] = []
    runs: Counter[str] = Counter()
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def convolved(_: nn.Module, __: Any, output: Tensor) -> None:
            runs[name] += 1
            given[id(output)] = (name, output)

        def normed(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            runs[name] += 1
            if id(inputs[0]) in given:
                found.append((given[id(inputs[0])][0], name))

        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(convolved))
        elif _foldable(module):
            hooks.append(module.register_forward_pre_hook(normed))

    for name, module in network.named_modules():
        watch(name, module)
    try:
        expected = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return expected, [pair for pair in found if all(runs[name] == 1 for name in pair)]


def _foldable(module: nn.Module) -> bool:
    """Whether it is a batch norm of constant numbers and nothing else; timm has others."""
    return type(module) is nn.BatchNorm2d and module.running_mean is not None


def _put(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _close(got: Tensor, expected: Tensor) -> bool:
    largest = expected.abs().max()
    return bool(largest.isfinite() and (got - expected).abs().max() <= TOLERANCE * largest)
