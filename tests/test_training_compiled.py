"""Compiled passes: one graph each, the same steps as the plain ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._inductor.config
from test_training_engine import CLASSES, CPU, batches, config, float_batches, tiny_model

from casm_fast.training import compiled as compiled_module
from casm_fast.training.engine import Engine


@pytest.fixture(autouse=True)
def _forget_compiled() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def weights_after(steps: int, fields: dict[str, Any], compile: bool) -> dict[str, torch.Tensor]:
    settings = config(batch_size=24, compile=compile, **fields)
    model = tiny_model(settings.shared_encoder)
    engine = Engine(model, settings, classes=CLASSES, device=CPU)
    data = batches(steps)
    engine.step(*data[0], 0, 1, 0)
    engine.begin("casm")
    for index, (images, labels) in enumerate(data):
        engine.step(images, labels, index, steps, 0)
    engine.check_finite()
    return model.state_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "L1", "masked_statistics": False},
        {"strategy": "L", "score": "classification"},
        {"strategy": "F", "objective": "masked_in_out", "shared_encoder": False},
        {"strategy": "L1", "classifier_update": "alternating", "accumulate": 2, "infill": "blur"},
    ],
)
def test_passes_are_one_graph_and_take_the_same_steps(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced whole (``fullgraph``), gradients and casm_fast operators included; run as traced."""
    monkeypatch.setattr(compiled_module, "BACKEND", "aot_eager")
    plain, traced = (weights_after(4, fields, compile) for compile in (False, True))
    worst = max(float((plain[name] - tensor).abs().max()) for name, tensor in traced.items())
    assert worst < 1e-12  # measured 4e-16


def test_compiled_code_takes_the_plain_steps() -> None:
    """Inductor's C++, in float32."""
    found = []
    for compile in (False, True):
        settings = config(strategy="L", batch_size=24, compile=compile)
        engine = Engine(tiny_model().float(), settings, classes=CLASSES, device=CPU)
        engine.begin("casm")
        for index, (images, labels) in enumerate(float_batches(3)):
            engine.step(images, labels, index, 3, 0)
        found.append(engine.model.state_dict())
    for name, tensor in found[1].items():
        torch.testing.assert_close(tensor, found[0][name], rtol=1e-4, atol=1e-5)


def test_a_compiled_run_continues_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "BACKEND", "aot_eager")
    settings = config(strategy="L1", batch_size=24, compile=True, amp="fp16")
    data = float_batches(4)
    whole, first, second = (
        Engine(tiny_model().float(), settings, classes=CLASSES, device=CPU) for _ in range(3)
    )
    whole.begin("casm")
    first.begin("casm")
    for index in range(4):
        whole.step(*data[index], index, 4, 0)
    for index in range(2):
        first.step(*data[index], index, 4, 0)
    second.restore(copy.deepcopy(first.state()), first.history.snapshots)
    for index in range(2, 4):
        second.step(*data[index], index, 4, 0)
    expected = whole.model.state_dict()
    assert all(torch.equal(expected[n], t) for n, t in second.model.state_dict().items())


def test_a_short_batch_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "BACKEND", "unknown backend")
    settings = config(strategy="L", batch_size=24, compile=True)
    with pytest.raises(Exception, match="unknown backend"):
        Engine(tiny_model(), settings, classes=CLASSES, device=CPU)
    monkeypatch.setattr(compiled_module, "BACKEND", "aot_eager")
    engine = Engine(tiny_model(), settings, classes=CLASSES, device=CPU)
    images, labels = batches(1)[0]
    engine.step(images[:20], labels[:20], 0, 2, 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    engine.step(images, labels, 1, 2, 0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_cuda_graphs_need_a_gpu_and_the_compiler() -> None:
    with pytest.raises(ValueError, match=r"^cuda_graphs: expected compile=True, whose graphs they"):
        config(cuda_graphs=True)
    settings = config(cuda_graphs=True, compile=True)
    with pytest.raises(ValueError, match=r"^cuda_graphs: expected a GPU to train on, got 'cpu'; "):
        Engine(tiny_model(), settings, classes=CLASSES, device=CPU)


def test_a_torch_without_traced_gradients_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        pass

    monkeypatch.setattr(torch._dynamo, "config", Config)
    with pytest.raises(
        ValueError,
        match=r"^compile: expected a torch that can compile torch\.autograd\.grad \(2\.11",
    ):
        Engine(tiny_model(), config(compile=True), classes=CLASSES, device=CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("update", ["joint", "alternating"])
def test_cuda_graphs_take_the_same_steps(update: Any, accumulate: int) -> None:
    device = torch.device("cuda")
    found = []
    for cuda_graphs in (False, True):
        settings = config(
            strategy="L1",
            batch_size=24,
            classifier_update=update,
            accumulate=accumulate,
            compile=cuda_graphs,
            cuda_graphs=cuda_graphs,
        )
        engine = Engine(tiny_model().float(), settings, classes=CLASSES, device=device)
        data = [(images.to(device), labels.to(device)) for images, labels in float_batches(12)]
        engine.begin("casm")
        for index, (images, labels) in enumerate(data):
            engine.step(images, labels, index, 12, 0)
        engine.check_finite()
        found.append(engine.model.state_dict())
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    for name, tensor in found[1].items():
        torch.testing.assert_close(tensor, found[0][name], rtol=1e-3, atol=1e-4)
