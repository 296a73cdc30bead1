"""Batch norms folded into convolutions, against torch.fx's own fusion and the unfolded network."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental import optimization

from casm_fast.models.folding import folded


def randomized(network: nn.Module) -> nn.Module:
    """Batch norms that do something, in float64 so that a fault is none of rounding."""
    chance = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data = torch.rand(tensor.shape, generator=chance) + 0.5
    return network.double().eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def images(side: int = 64) -> Tensor:
    return torch.rand(
        2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5"]
)
def test_torchvision_networks_are_folded_as_by_torch_fx(name: str) -> None:
    torch.manual_seed(0)
    network = randomized(torchvision.models.get_model(name, weights=None, num_classes=5))
    before = copy.deepcopy(network.state_dict())
    other = folded(network, images())
    fused = optimization.fuse(network)
    assert norms(other) == norms(fused) < norms(network)
    other_images = images().flip(0)
    # Float64 sums in another order: 2e-13 measured.
    torch.testing.assert_close(other(other_images), network(other_images), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in network.modules()
    )


class Twice(nn.Module):
    """A network that reads a convolution beside its batch norm, or runs it two times."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.how == "again":
            y = self.first(y)
        z = self.norm(y)
        return (z, y) if self.how == "both" else z


def test_a_batch_norm_stays_where_others_read_its_convolution() -> None:
    for how, norms_left in (("once", 0), ("again", 1), ("both", 1)):
        network = randomized(Twice(how))
        other = folded(network, images(8))
        assert norms(other) == norms_left, how
        assert (other is network) == bool(norms_left)


def test_passes_are_compared_without_tf32() -> None:
    """A GPU's default, whose rounding is as large as the tolerance."""
    seen: list[str] = []

    class Watching(Twice):
        def forward(self, x: Tensor) -> Any:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            if len(seen) == 4:
                raise RuntimeError("no")
            return super().forward(x)

    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        assert norms(folded(randomized(Watching("once")), images(8))) == 0
        assert seen == ["ieee", "ieee"]
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        with pytest.raises(RuntimeError, match="no"):
            folded(randomized(Watching("once")), images(8))
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_a_network_that_cannot_be_copied_is_returned_as_it_is() -> None:
    network = randomized(Twice("once"))
    network.lock = threading.Lock()  # type: ignore[assignment]
    assert folded(network, images(8)) is network


def test_a_network_without_pairs_is_returned_as_it_is() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.ReLU(), nn.BatchNorm2d(2))
    assert folded(network.eval(), torch.rand(1, 3, 4, 4)) is network
    unknown = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    assert folded(unknown.eval(), torch.rand(1, 3, 4, 4)) is unknown
