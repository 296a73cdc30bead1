"""The passes of a step as compiled functions, one graph each: forward and gradients together.

`torch.compile` on the networks alone would give each its own backward graph, which computes the
gradients of everything that requires one: the judge's weights too, which nobody asked for. Here the
compiler traces through `torch.autograd.grad` (torch 2.11 and later), so that a pass is one graph
from images to gradients, and what is not asked for is never computed.

With CUDA graphs (``mode="reduce-overhead"``) such a graph is replayed in one launch. Weights and
running statistics are read and written in place; images, labels, and the judge's weights are copied
into the replayed graph's own buffers, so that any snapshot may judge. The optimisers stay outside:
they are fused and take a handful of launches. What a replay returns is overwritten by the next
step's, so that a step uses it up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from casm_fast.training.passes import Clean, Masked, Passes

P = ParamSpec("P")
R = TypeVar("R")

BACKEND = "inductor"


class Calls(NamedTuple):
    """The two passes as functions; see `Passes.clean` and `Passes.masked`."""

    clean: Callable[..., Clean]
    masked: Callable[..., Masked]


def compiled(passes: Passes, *, cuda_graphs: bool) -> Calls:
    """Compile both passes; each kind of call (phase, judge) when it is first made.

    The shapes of those calls become constants, so that other shapes should not be passed: they
    would be compiled, too.

    Args:
        passes: What to compile.
        cuda_graphs: Capture the graphs of a GPU.

    Raises:
        ValueError: When this torch cannot trace the gradients.
    """
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise ValueError(
            f"compile: expected a torch that can compile torch.autograd.grad (2.11 or later), "
            f"got {torch.__version__}; pass compile=False, or install a later one"
        )
    mode = "reduce-overhead" if cuda_graphs else None
    return Calls(_compiled(passes.clean, mode), _compiled(passes.masked, mode))


def _compiled(function: Callable[P, R], mode: str | None) -> Callable[P, R]:
    fast = torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND, mode=mode)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            result: R = fast(*args, **kwargs)
            return result

    return call
