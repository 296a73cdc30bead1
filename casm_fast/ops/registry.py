"""What the rooms share at torch's registry: the reference beside an op, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import torch

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

    def refuse(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(
            f"{name}: expected a first derivative, got a request for the second (create_graph); "
            f"use casm_fast.ops.{name}.reference where double backward is needed"
        )

    torch.library.register_autograd(qualified_name, refuse)
