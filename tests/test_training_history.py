"""The sample set F: what is kept, what is drawn, and that a snapshot is a real copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from casm_fast.training.config import Strategy
from casm_fast.training.history import History


class Network(nn.Module):
    """Logits and no taps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.layers(images), ()


def history_after(name: str, steps: int, size: int = 30, seed: int = 0) -> History:
    network = Network()
    history = History(network, Strategy.parse(name), size=size, seed=seed)
    for step in range(steps):
        with torch.no_grad():
            network.layers[0].weight.fill_(step)
        history.observe(step, network)
    return history


@pytest.mark.parametrize(
    ("name", "kept"), [("F", []), ("L", []), ("FL", [0]), ("L4", [0, 4, 8]), ("L100", [0])]
)
def test_strategies_keep_their_steps(name: str, kept: list[int]) -> None:
    history = history_after(name, 10)
    assert history.steps == kept
    assert [float(s["layers.0.weight"].mean()) for s in history.snapshots] == kept


def test_a_full_history_overwrites_at_random_and_uniformly() -> None:
    steps, size = 400, 5
    history = history_after("L1", steps, size=size)
    assert len(history.snapshots) == size
    assert [float(s["layers.0.weight"].mean()) for s in history.snapshots] == history.steps
    # A snapshot survives a store with probability 1 - 1/size: the mean age is `size` stores.
    ages = [
        steps - 1 - step for seed in range(20) for step in history_after("L1", 60, 5, seed).steps
    ]
    ages = [age - (steps - 60) for age in ages]
    assert 3.0 < sum(ages) / len(ages) < 5.5  # 4 expected; standard error 0.45


def test_draws_are_half_live_and_half_uniform() -> None:
    history = history_after("L2", 8)  # four snapshots
    places = {id(snapshot): place for place, snapshot in enumerate(history.snapshots)}
    counts = [0] * 5
    for _ in range(4000):
        drawn = history.draw()
        counts[4 if drawn is None else places[id(drawn)]] += 1
    assert abs(counts[4] - 2000) < 160  # 5 sigma of a binomial
    assert all(abs(count - 500) < 105 for count in counts[:4])


@pytest.mark.parametrize("name", ["F", "L"])
def test_strategies_without_history_always_judge_live(name: str) -> None:
    history = history_after(name, 10)
    assert all(history.draw() is None for _ in range(50))


def test_a_snapshot_is_a_copy_that_judges_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    network = Network()
    network(torch.randn(16, 3))  # running statistics that are not the initial ones
    history = History(network, Strategy.parse("FL"))
    history.observe(0, network)
    images = torch.randn(5, 3, requires_grad=True)
    network.eval()
    expected, _ = network(images)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    network.train()
    with torch.no_grad():
        for tensor in [*network.parameters(), network.layers[1].running_mean]:
            tensor.add_(1.0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    logits = history.judge(history.snapshots[0], images)
    assert torch.equal(logits, expected)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert torch.equal(gradient, expected_gradient)
    assert network.training
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())
    assert not any(tensor.requires_grad for tensor in history.snapshots[0].values())


def test_a_restored_history_goes_on_with_the_same_draws() -> None:
    history = history_after("L1", 40, size=3)
    other = History(Network(), Strategy.parse("L1"), size=3, seed=99)
    other.restore(history.steps, history.snapshots, history.generator.get_state())
    live = Network()
    for step in range(40, 80):
        for each in (history, other):
            each.observe(step, live)
        one, two = history.draw(), other.draw()
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert one is not two
            assert all(torch.equal(one[name], two[name]) for name in one)
    assert history.steps == other.steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_host_snapshots_are_pinned() -> None:
    network = Network().cuda()
    history = History(network, Strategy.parse("FL"), place="host")
    history.observe(0, network)
    assert all(t.device.type == "cpu" and t.is_pinned() for t in history.snapshots[0].values())
    drawn = [history.fetch() for _ in range(20)]
    fetched = next(snapshot for snapshot in drawn if snapshot is not None)
    assert history.judge(fetched, torch.randn(2, 3, device="cuda")).is_cuda
