"""The functions of torch that a network calls, whichever way it calls them.

``nn.ReLU``, in place or not, used once or in ten places, ``F.relu``, ``torch.relu`` and
``x.relu_()`` all end in one function named relu, and a `TorchFunctionMode` sees it. So methods with
a backward rule of their own for some function need not know the modules of a network, and they
change none: an `Interception` runs its own function in place of the network's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

SMOOTH = frozenset(
    {
        "celu",
        "elu",
        "gelu",
        "hardshrink",
        "hardswish",
        "leaky_relu",
        "log_sigmoid",
        "logsigmoid",
        "mish",
        "prelu",
        "rrelu",
        "selu",
        "silu",
        "softplus",
        "softshrink",
        "softsign",
        "tanhshrink",
    }
)
"""Activation functions that stand where a ReLU could, and are none."""

_IN_PLACE_ARGUMENT = SMOOTH | {"relu", "relu6", "hardtanh", "hardsigmoid", "threshold", "dropout"}


@dataclass(frozen=True)
class Call:
    """One call of a function of torch.

    Attributes:
        function: What is called.
        args: Its arguments.
        kwargs: Those given by name.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """Its name, without the underscore of those that work in place."""
        name = str(getattr(self.function, "__name__", self.function))
        return name if name.startswith("__") else name.strip("_")

    @property
    def in_place(self) -> bool:
        """Whether it overwrites its input."""
        name = str(getattr(self.function, "__name__", ""))
        if name.endswith("_") and not name.endswith("__"):
            return True
        positional = self.name in _IN_PLACE_ARGUMENT and any(one is True for one in self.args[1:])
        return positional or self.kwargs.get("inplace") is True

    @property
    def input(self) -> Any:
        """Its first argument."""
        return self.args[0] if self.args else self.kwargs.get("input")

    def of_input(self) -> Callable[[Tensor], Any]:
        """The call as a function of its input, which does not hold the input that was given."""
        function, more = self.function, self.args[1:]
        named = {name: value for name, value in self.kwargs.items() if name != "input"}
        return lambda value: function(value, *more, **named)

    def run(self) -> Any:
        """What torch answers."""
        return self.function(*self.args, **self.kwargs)

    def argument(self, place: int, name: str, otherwise: Any = None) -> Any:
        """The argument at a place, or of a name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, otherwise)

    @property
    def ceiling(self) -> float | None:
        """Of a rectifier max(x, 0) the bound above, mostly infinity; None: it is none."""
        if not isinstance(self.input, Tensor) or not self.input.requires_grad:
            return None
        low: Any = None
        high: Any = math.inf
        if self.name in ("relu", "relu6"):
            low, high = 0, math.inf if self.name == "relu" else 6
        elif self.name in ("clamp", "clip"):
            low, high = self.argument(1, "min"), self.argument(2, "max", math.inf)
        elif self.name == "clamp_min":
            low = self.argument(1, "min")
        elif self.name == "hardtanh":
            low, high = self.argument(1, "min_val", -1), self.argument(2, "max_val", 1)
        elif self.name == "threshold":
            low = 0 if self.argument(1, "threshold") == self.argument(2, "value") == 0 else None
        if isinstance(low, (int, float)) and low == 0 and not isinstance(high, Tensor):
            return math.inf if high is None else float(high)
        return None


class Interception(TorchFunctionMode):
    """Within it, every function of torch that is called on tensors is given to `answer`."""

    def answer(self, call: Call) -> Any:
        """What the network gets for a call."""
        return call.run()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        return self.answer(Call(func, args, kwargs or {}))


def instead(call: Call, substitute: Callable[[Tensor], Tensor]) -> Tensor:
    """A call answered by a function of its input; the input is overwritten if the call does so."""
    before: Tensor = call.input
    return before.copy_(substitute(before.clone())) if call.in_place else substitute(before)
