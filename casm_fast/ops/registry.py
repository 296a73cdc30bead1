"""What the rooms share at torch's registry: the reference beside an op, gradients, and the call.

An op whose gradient is registered from Python costs 3 microseconds more at every call, also where
no gradient is wanted, and 20 more where one is: as much as a kernel needs for a small mask or two.
So the doors call ops by way of `light`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Op(Protocol, Generic[P, R]):
    """A function of `casm_fast.ops`, with its specification in plain PyTorch as ``.reference``."""

    reference: Callable[P, R]
    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the fused kernels."""


def specified_by(reference: Callable[P, R]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Marks a function as the fast form of `reference`, which stays reachable beside it."""

    def mark(function: Callable[P, R]) -> Op[P, R]:
        op = cast(Op[P, R], function)
        op.reference = reference
        return op

    return mark


def refuse_double_backward(qualified_name: str) -> None:
    """Makes the gradient of a backward op an error with a sentence, instead of a silent zero."""
    name = qualified_name.rpartition("::")[2].partition("_backward")[0]

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name}: expected a first derivative, got a request for the second (create_graph); "
            f"use casm_fast.ops.{name}.reference where double backward is needed"
        )

    torch.library.register_autograd(qualified_name, refuse)


Setup = Callable[..., None]
Backward = Callable[..., Any]


def light(
    name: str, setup: Setup | None = None, backward: Backward | None = None
) -> Callable[..., Any]:
    """The op `name` as eager code calls it: the same results and gradients, less on the way.

    Args:
        name: The op in ``torch.ops.casm_fast``; it is looked up at every call.
        setup: What `torch.library.register_autograd` gets as ``setup_context``, and
        backward: what it gets as the gradient. Without them autograd takes its registered way.

    Returns:
        A function of the op's arguments, all by position. Where no gradient is wanted it skips
        autograd; where one is, it enters it by a plain `torch.autograd.Function`. Compiled code
        sees the op itself.
    """

    def op(*inputs: Any) -> Any:
        return getattr(torch.ops.casm_fast, name)(*inputs)

    differentiable = op
    if setup is not None and backward is not None:
        differentiable = _function(name, setup, backward).apply

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if torch.is_grad_enabled():
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    return differentiable(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.casm_fast, name)(*inputs)

    return call


# _AutoDispatchBelowAutograd is private, and what register_autograd itself enters below a gradient.
def _function(name: str, setup: Setup, backward: Backward) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = getattr(torch.ops.casm_fast, name)(*inputs)
        setup(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Light_{name}", (torch.autograd.Function,), methods)
