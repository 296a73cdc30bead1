"""What a step computes, counted by operator: nothing twice, nothing for nobody, no waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from test_training_engine import CLASSES, CPU, config, float_batches, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from casm_fast.training.engine import Engine
from casm_fast.training.history import History

# What makes the host wait for a GPU: values, and shapes that depend on values.
WAITS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "repeat_interleave",
)


class Recorder(TorchDispatchMode):
    """Every operator that reaches a kernel, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls.append((function.overloadpacket.__name__, args))
        return function(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)


def record_step(monkeypatch: pytest.MonkeyPatch, drawn: bool, **fields: Any) -> Recorder:
    """The second step of a run, with a judge from the history or the live one."""

    def draw(self: History) -> Any:
        return self.snapshots[0] if drawn else None

    monkeypatch.setattr(History, "draw", draw)
    engine = Engine(tiny_model().float(), config(**fields), classes=CLASSES, device=CPU)
    engine.begin("casm")
    data = float_batches(2)
    engine.step(*data[0], 0, 2, 0)
    with Recorder() as recorder:
        engine.step(*data[1], 1, 2, 0)
    return recorder


def classifier_work(recorder: Recorder) -> tuple[int, int, int]:
    """Convolutions of the classifiers: forward, for weight gradients, for input gradients.

    The tiny classifier has two, with 4 and 6 filters of 3x3; the decoder's have other shapes.
    """
    counts = Counter[str]()
    for name, args in recorder.calls:
        if name == "convolution" and tuple(args[1].shape[::3]) in ((4, 3), (6, 3)):
            counts["forward"] += 1
        if name == "convolution_backward" and tuple(args[2].shape[::3]) in ((4, 3), (6, 3)):
            for_input, for_weight, _ = args[-1]
            counts["weights"] += for_weight
            counts["inputs"] += for_input
    return counts["forward"], counts["weights"], counts["inputs"]


# With n convolutions a pass costs n forward, n for weights and n for inputs (n - 1 where nobody
# wants the image's gradient). In such units, for a deep network, the CASM authors' loop costs 8
# where the live classifier judges (2 forward, 2 x 2 for its two steps, 2 for the mask's gradient
# with the weights' that nobody uses) and 6 where a snapshot does; F costs them 4.
@pytest.mark.parametrize(
    ("fields", "drawn", "expected", "units"),
    [
        ({"strategy": "F"}, False, (4, 0, 2), 3),
        ({"strategy": "L"}, False, (4, 4, 4), 7),
        ({"strategy": "L100"}, True, (6, 4, 4), 8),
        ({"strategy": "L", "classifier_update": "alternating"}, False, (4, 4, 4), 7),
        ({"strategy": "FL", "classifier_update": "alternating"}, True, (4, 2, 3), 5),
    ],
)
def test_a_step_computes_what_the_arithmetic_asks_for(
    fields: dict[str, Any],
    drawn: bool,
    expected: tuple[int, int, int],
    units: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The judge gets no weight gradients, and a live judge shares its masked forward pass."""
    forward, weights, inputs = classifier_work(record_step(monkeypatch, drawn, **fields))
    assert (forward, weights, inputs) == expected
    first_layers = weights // 2  # passes that ask for weights alone leave out the image's gradient
    assert (forward + weights + inputs + first_layers) / 2 == units


@pytest.mark.parametrize("update", ["joint", "alternating"])
def test_the_classification_score_of_a_live_judge_costs_no_gradient_of_its_own(
    update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 units: the masked images' gradient comes with the classifier's own."""
    fields = {"strategy": "L", "score": "classification", "classifier_update": update}
    forward, weights, inputs = classifier_work(record_step(monkeypatch, False, **fields))
    assert (forward, weights, inputs) == (4, 4, 3)  # the clean images' gradient nobody wants


@pytest.mark.parametrize("strategy", ["F", "L", "L100"])
@pytest.mark.parametrize("fields", [{}, {"amp": "fp16"}, {"accumulate": 3, "decoder_ema": 0.9}])
def test_a_step_reads_no_value_and_moves_each_network_once(
    strategy: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = strategy == "L100"
    recorder = record_step(monkeypatch, drawn, strategy=strategy, lambda_r="auto", **fields)
    assert [name for name, _ in recorder.calls if name in WAITS] == []
    assert recorder.count("_fused_adam_") == 1
    assert recorder.count("_fused_sgd_") == (strategy != "F")


def test_the_recorder_sees_waits() -> None:
    with Recorder() as recorder:
        float(torch.ones(()))
        bool(torch.ones(()) > 0)
    assert recorder.count("_local_scalar_dense") == 2
