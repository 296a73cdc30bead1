"""What is handed back through a network by shares: the common core of excitation backprop and LRP.

Both hand what a neuron has to its inputs in proportion to their contributions, and the rules differ
in what counts as a contribution. Within `Propagation` autograd does the handing back: every affine
map that the network computes, however it calls it, is replaced by itself with a rule in place of
its gradient, and what flows back is relevance. Concatenation, reshaping, dropout, ReLU and max
pools (the winner takes it) then need nothing: their gradient is the rule.

With the contributions z_ij = x_i w_ij of x_i to the sum z_j, all rules are

    R_i = sum_j  z_ij / (sum_i z_ij + b_j)  R_j  =  x_i * (Jacobian^T (R / z))_i,

one pass forward and one backward through the map with other inputs or weights (`contributions`).

How layers are taken:

* Batch norm in eval mode is folded into the convolution or linear layer before it: one affine map
  of the weights w * gamma / sigma. Elsewhere it is a map of one input an output, as is layer norm
  after its mean was subtracted, with its deviation taken as constant (Ali et al. 2022).
* The sum of two activations is a map of both, with weights 1 (or -1), a constant summand its bias.
* A pool by the mean, and the mean or sum over places, are maps whose weights are not negative.
* Element-wise activation functions, local response normalisation, and factors that are constant
  have one input an output and hand all of it on.
* Of a product the smaller factor is a gate and gets nothing; of two of one size each gets half.
* Attention weights are constant: relevance goes to the values (Ali et al. 2022).

What is none of these is refused once relevance reaches it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from casm_fast.attribution.calls import SMOOTH, Call, Interception, instead
from casm_fast.attribution.problem import Problem

_AFFINE = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
_MEANS = frozenset(
    [f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)] + ["mean", "sum"]
)
_ELEMENTWISE = SMOOTH | {
    "clamp",
    "clamp_min",
    "clip",
    "hardsigmoid",
    "hardtanh",
    "local_response_norm",
    "neg",
    "relu6",
    "sigmoid",
    "tanh",
    "threshold",
}
_MOVES = """
    __get__ __getitem__ __setitem__ adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    alpha_dropout cat channel_shuffle chunk clone concat concatenate contiguous detach double
    dropout dropout1d dropout2d dropout3d expand expand_as feature_alpha_dropout flatten flip
    float half index_select masked_fill max_pool1d max_pool1d_with_indices max_pool2d
    max_pool2d_with_indices max_pool3d max_pool3d_with_indices movedim narrow
    native_channel_shuffle pad permute pixel_shuffle pixel_unshuffle relu repeat reshape
    reshape_as roll select split squeeze stack swapaxes swapdims t to transpose type_as unbind
    unflatten unsqueeze view view_as
"""
_OWN_GRADIENT = frozenset(_MOVES.split())
"""What only moves or selects values, with the gradient as its rule."""


@dataclass(frozen=True, eq=False)
class Map:
    """An affine map y = f(x, w) + b, linear in the input and in the weights.

    Attributes:
        kind: "dense" and "conv" have weights, and a linear layer that is applied at every place is
            a convolution; "each" has one input an output; "mean" and "sum" have
            weights that are not negative; "centre" subtracts the mean.
        apply: f(x, w) + b; without weights it is given None.
        weight: w.
        bias: b, as `apply` takes it.
        first: Whether it reads the image: the first dense or convolutional map of the pass.
    """

    kind: Literal["dense", "conv", "each", "mean", "sum", "centre"]
    apply: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None
    first: bool = False

    def folded(self, scale: Tensor, shift: Tensor) -> Map:
        """The map followed by a scale and a shift of each output channel, both ``[O]``."""
        assert self.weight is not None
        weight = self.weight * scale.view((-1,) + (1,) * (self.weight.dim() - 1))
        bias = shift if self.bias is None else self.bias * scale + shift
        return Map(self.kind, self.apply, weight, bias, self.first)


@dataclass(frozen=True, eq=False)
class _Origin:
    """Of the output of a map: the map, its input, and the output's version when it was made."""

    layer: Map
    value: Tensor
    version: int


Rule = Callable[[Map, Tensor, Tensor], Tensor]
"""From a map, its input x and the relevance of its output, the relevance of x."""


def contributions(
    layer: Map,
    parts: Sequence[tuple[Tensor, Tensor | None]],
    bias: Tensor | None,
    relevance: Tensor,
    epsilon: float = 0.0,
) -> Tensor:
    """Hands relevance on to inputs by their contributions z_ij = x_i w_ij.

    Args:
        layer: The map.
        parts: Inputs and weights, of which z_j is the sum.
        bias: What is added to z_j and takes its share of the relevance with it.
        relevance: R_j, in the shape of the output.
        epsilon: Added to z_j with its sign; where z_j is zero nothing is handed on.

    Returns:
        The relevance of the input, summed over the parts.
    """
    with torch.enable_grad():
        inputs = [value.detach().requires_grad_() for value, _ in parts]
        sums = [
            layer.apply(value, weight, bias if place == 0 else None)
            for place, (value, (_, weight)) in enumerate(zip(inputs, parts, strict=True))
        ]
        total = torch.stack(sums).sum(dim=0) if len(sums) > 1 else sums[0]
    stable = total.detach()
    if epsilon:
        stable = stable + torch.where(stable < 0, -epsilon, epsilon)
    zero = stable.abs() < torch.finfo(stable.dtype).tiny
    quotient = torch.where(zero, 0, relevance / stable.masked_fill(zero, 1))
    slopes = torch.autograd.grad(total, inputs, quotient)
    handed = [value.detach() * slope for value, slope in zip(inputs, slopes, strict=True)]
    return handed[0] if len(handed) == 1 else torch.stack(handed).sum(dim=0)


class Propagation(Interception):
    """Within it a network's pass is recorded so that autograd hands relevance back.

    Args:
        rule: How a map does it.
        method: Who asks, for messages.

    Attributes:
        last: The last dense or convolutional map, which gives the logits, and its input; None
            before there was one.
    """

    def __init__(self, rule: Rule, method: str) -> None:
        super().__init__()
        self.rule = rule
        self.method = method
        self.last: tuple[Map, Tensor] | None = None

    def logits(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """The images, as a leaf of the graph, and their logits.

        Raises:
            ValueError: Another score than the logit is asked for.
        """
        if problem.score != "logit":
            raise ValueError(
                f"{self.method}: expected the logit score, which it hands back, got {problem.score}"
            )
        with torch.enable_grad(), self:
            images = problem.images.detach().requires_grad_()
            return images, problem.logits(images.clone())  # which is no leaf of the graph

    def answer(self, call: Call) -> Any:
        """The call with a rule; see the module."""
        name = call.name
        if name == "multi_head_attention_forward":
            with self:  # its parts are seen, not the whole
                return _opened(call.function)(*call.args, **call.kwargs)
        if not _depends(*call.args, *call.kwargs.values()):
            return call.run()
        if name in _OWN_GRADIENT:
            return call.run()
        if name in _AFFINE:
            return self._affine(call)
        if call.function is F.batch_norm and not call.argument(5, "training", False):
            return self._batch_norm(call)
        if call.function is F.layer_norm:
            return self._layer_norm(call)
        if name in _MEANS:
            mean = call.of_input()
            return self._map(Map("mean", lambda x, w, b: mean(x)), call.input)
        if name in ("add", "sub", "__rsub__") and "alpha" not in call.kwargs:
            return self._sum(call)
        if name in ("mul", "div"):
            return self._product(call)
        if name in ("matmul", "bmm"):
            return self._matrix_product(call)
        if name == "scaled_dot_product_attention":
            return self._attention(call)
        if name == "softmax":
            return call.run().detach()
        if name in _ELEMENTWISE:
            return instead(call, lambda x: _handing_on(lambda: call.of_input()(x.detach()), x))
        return self._refused(call)

    def _map(self, layer: Map, value: Tensor, made: Tensor | None = None) -> Tensor:
        rule = self.rule

        def run(x: Tensor) -> Tensor:
            return layer.apply(x, layer.weight, layer.bias) if made is None else made

        def back(x: Tensor, relevance: Tensor) -> Tensor:
            return rule(layer, x, relevance)

        return _Substituted.apply(value, run, back)  # type: ignore[no-any-return]

    def _affine(self, call: Call) -> Any:
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        if not _depends(call.input) or _depends(weight, bias):
            return self._refused(call)
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        function, more = call.function, call.args[3:]
        named = {k: v for k, v in call.kwargs.items() if k not in ("input", "weight", "bias")}

        def apply(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
            answer: Tensor = function(x, w, b, *more, **named)
            return answer

        at_places = call.name != "linear" or call.input.dim() > 2
        kind: Literal["dense", "conv"] = "conv" if at_places else "dense"
        layer = Map(kind, apply, weight, bias, first=self.last is None)
        made = self._map(layer, call.input)
        self.last = (layer, call.input)
        if call.name != "linear" or kind == "dense":
            made.origin = _Origin(layer, call.input, made._version)  # type: ignore[attr-defined]
        return made

    def _batch_norm(self, call: Call) -> Tensor:
        value = call.input
        mean, variance = call.argument(1, "running_mean"), call.argument(2, "running_var")
        weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
        scale = (variance + call.argument(7, "eps", 1e-5)).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        origin: _Origin | None = getattr(value, "origin", None)
        changed = origin is None or origin.version != value._version
        if origin is None or changed:
            wide = (1, -1) + (1,) * (value.dim() - 2)
            return self._map(_each(scale.view(wide), shift.view(wide)), value)
        folded = origin.layer.folded(scale, shift)
        if self.last is not None and self.last[0] is origin.layer:
            self.last = (folded, origin.value)
        with torch.no_grad():
            made: Tensor = call.run()
        return self._map(folded, origin.value, made)

    def _layer_norm(self, call: Call) -> Tensor:
        shape, eps = call.argument(1, "normalized_shape"), call.argument(4, "eps", 1e-5)
        weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
        places = tuple(range(-len(shape), 0))
        centred = self._map(
            Map("centre", lambda x, w, b: x - x.mean(dim=places, keepdim=True)), call.input
        )
        deviation = centred.detach().square().mean(dim=places, keepdim=True) + eps
        scale = deviation.rsqrt() if weight is None else deviation.rsqrt() * weight
        return self._map(_each(scale, bias), centred)

    def _sum(self, call: Call) -> Tensor:
        other = call.argument(1, "other")
        first, second = (-1, 1) if call.name == "__rsub__" else (1, -1 if call.name == "sub" else 1)

        def summed(x: Tensor) -> Tensor:
            if not _depends(other):
                shift = second * (other if isinstance(other, Tensor) else x.new_tensor(other))
                return self._map(_each(x.new_full((), first), shift), x)
            if not _depends(x):
                return self._map(_each(other.new_full((), second), first * x), other)
            shape = torch.broadcast_shapes(x.shape, other.shape)  # type: ignore[no-untyped-call]
            both = torch.stack((first * x.expand(shape), second * other.expand(shape)))
            return self._map(Map("sum", lambda s, w, b: s.sum(dim=0)), both)

        return instead(call, summed)

    def _product(self, call: Call) -> Any:
        one, other = call.input, call.argument(1, "other")
        if call.name == "div" and _depends(other):
            return self._refused(call)

        def multiplied(x: Tensor) -> Tensor:
            if not _depends(other):
                return _handing_on(lambda: call.of_input()(x.detach()), x)
            made = x.detach() * other.detach()
            if not _depends(one) or x.numel() < other.numel():
                return _handing_on(lambda: made, other)
            if x.numel() > other.numel():
                return _handing_on(lambda: made, x)
            nothing = torch.zeros_like(made)
            return _handing_on(lambda: made, x, 0.5) + _handing_on(lambda: nothing, other, 0.5)

        return instead(call, multiplied)

    def _matrix_product(self, call: Call) -> Any:
        one, other = call.input, call.argument(1, "other", call.kwargs.get("mat2"))
        if _depends(one) == _depends(other):
            return self._refused(call)
        if _depends(one):
            return self._map(Map("conv", lambda x, w, b: torch.matmul(x, _given(w)), other), one)
        return self._map(Map("conv", lambda x, w, b: torch.matmul(_given(w), x), one), other)

    def _attention(self, call: Call) -> Tensor:
        query, key, value = (call.argument(i, n) for i, n in enumerate(("query", "key", "value")))
        more = call.args[3:]
        named = {k: v for k, v in call.kwargs.items() if k not in ("query", "key", "value")}
        query, key = query.detach(), key.detach()
        function = call.function
        if not _depends(value):
            return function(query, key, value, *more, **named)  # type: ignore[no-any-return]
        return self._map(
            Map("mean", lambda x, w, b: function(query, key, x, *more, **named)), value
        )

    def _refused(self, call: Call) -> Any:
        sentence = (
            f"{self.method}: expected layers with a rule (linear ones, convolutions, pools, sums, "
            "norms, activation functions, attention), "
            f"got {call.name} on the way back to the image"
        )

        def refuse(relevance: Tensor) -> None:
            del relevance
            raise ValueError(sentence)

        if call.in_place:
            raise ValueError(sentence)
        answer = call.run()
        for made in answer if isinstance(answer, (tuple, list)) else (answer,):
            if isinstance(made, Tensor) and made.requires_grad:
                made.register_hook(refuse)  # type: ignore[no-untyped-call]
        return answer


class _Substituted(torch.autograd.Function):
    """A function of x with another way back."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        run: Callable[[Tensor], Tensor],
        back: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(value)
        ctx.back = back
        return run(value)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None, None]:
        (value,) = ctx.saved_tensors
        return ctx.back(value, relevance[0]), None, None


class _HandedOn(torch.autograd.Function):
    """A function of one input an output: all relevance goes on to the input."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, run: Callable[[], Tensor], share: float) -> Tensor:
        ctx.shape = value.shape
        ctx.share = share
        return run()

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, None, None]:
        handed = relevance[0].sum_to_size(ctx.shape)
        return handed if ctx.share == 1 else handed * ctx.share, None, None


def _handing_on(run: Callable[[], Tensor], value: Tensor, share: float = 1.0) -> Tensor:
    return _HandedOn.apply(value, run, share)  # type: ignore[no-any-return]


def _each(weight: Tensor, bias: Tensor | None) -> Map:
    return Map("each", lambda x, w, b: _plus(x if w is None else x * w, b), weight, bias)


def _plus(value: Tensor, bias: Tensor | None) -> Tensor:
    return value if bias is None else value + bias


def _given(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight


def _depends(*values: Any) -> bool:
    """Whether a value depends on the image; a parameter, a leaf of the graph, does not."""
    for value in values:
        if isinstance(value, (tuple, list)):
            if _depends(*value):
                return True
        elif isinstance(value, Tensor) and value.grad_fn is not None:
            return True
    return False


@lru_cache(maxsize=8)
def _opened(function: Any) -> Callable[..., Any]:
    """A function of torch.nn.functional whose inner calls an interception sees.

    Its body is run without the question whether somebody intercepts the function as a whole, which
    would be answered by yes again.
    """
    own = {**function.__globals__, "has_torch_function": lambda _: False}
    opened = types.FunctionType(
        function.__code__, own, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened
