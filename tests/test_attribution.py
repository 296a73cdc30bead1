"""`attribute`: what all methods promise, one after another, and what callers are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import casm_fast
from casm_fast.attribution import METHODS, find, listing
from casm_fast.attribution.realtime import RealTimeModel
from casm_fast.models import SaliencyModel, build_encoder, build_model

CLASSES = 5


def a_saliency_model() -> SaliencyModel:
    torch.manual_seed(0)
    return build_model("compact", classes=CLASSES).double()


def a_masking_model() -> RealTimeModel:
    torch.manual_seed(0)
    return RealTimeModel(build_encoder("compact", classes=CLASSES), width=4).double()


OPTIONS: dict[str, dict[str, Any]] = {
    "occlusion": {"size": 5, "stride": 4},
    "blur_occlusion": {"diameter": 5, "stride": 4, "softening": 1},
    "variable_occlusion": {"count": 30},
    "rise": {"masks": 30},
    "guided_inversion": {"steps": 14},
    "meaningful_perturbation": {"steps": 3, "mask_size": (6, 5), "blur_sigma": 2.0},
    "extremal_perturbation": {"steps": 3, "cell": 4, "sigma": 6.0, "max_blur": 2.0},
    "casm": {"model": a_saliency_model()},
    "real_time": {"model": a_masking_model(), "confidence": 0.0},
}
"""Options that a method needs on the small network."""


class Network(nn.Module):
    """Every kind of layer that methods treat apart: in-place ReLU, batch norm, pools, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.features(images)), 1))


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    net = Network()
    for module in net.modules():  # statistics of a network that was trained
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net.train()


def some_images(count: int = 3, size: tuple[int, int] = (24, 20), seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def state_of(net: nn.Module) -> Iterator[Any]:
    """Everything of a network that a caller can see."""
    for name, module in net.named_modules():
        yield name, module.training
        yield [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks")]
        yield [len(getattr(module, kind)) for kind in ("_backward_hooks", "_backward_pre_hooks")]
        yield type(module), module.extra_repr(), getattr(module, "inplace", None)
    for name, parameter in net.named_parameters():
        yield name, parameter.requires_grad, parameter.grad, parameter.detach().tolist()
    for name, buffer in net.named_buffers():
        yield name, buffer.tolist()


def maps_of(method: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    return casm_fast.attribute(method, *args, **{**OPTIONS.get(method, {}), **kwargs})


@pytest.mark.parametrize("method", METHODS)
def test_gives_one_map_an_image(method: str) -> None:
    images = some_images()
    maps = maps_of(method, network(), images, [0, 3, 1])
    assert maps.shape == (3, 1, 24, 20)
    assert maps.dtype == images.dtype
    assert maps.isfinite().all()
    assert (maps.flatten(1).std(dim=1) > 0).all()
    assert not maps.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_leaves_the_network_as_it_was(method: str) -> None:
    net = network()
    net.head.weight.requires_grad_(False)
    net.features[0].weight.grad = torch.ones_like(net.features[0].weight)
    before = list(state_of(net))
    maps_of(method, net, some_images(), 2)
    assert list(state_of(net)) == before


class Failing(Network):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes > 2:  # the methods are at work by then
            raise ArithmeticError("broken")
        return super().forward(images)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].uses != "nothing"])
def test_leaves_a_network_that_fails_as_it_was(method: str) -> None:
    torch.manual_seed(0)
    net = Failing().train()
    before = list(state_of(net))
    with pytest.raises(ArithmeticError, match="broken"):
        maps_of(method, net, some_images(), 2, batch_size=1)
    assert list(state_of(net)) == before


@pytest.mark.parametrize("method", METHODS)
def test_an_image_gets_the_map_that_it_would_get_alone(method: str) -> None:
    net, images = network().double(), some_images(4).double()
    targets = [0, 3, 1, 3]
    together = maps_of(method, net, images, targets)
    for size in (1, 3):
        apart = maps_of(method, net, images, targets, batch_size=size)
        assert (apart - together).abs().max() <= 1e-9 * together.abs().max()
    last = maps_of(method, net, images[3:], 3)
    assert (last[0] - together[3]).abs().max() <= 1e-9 * together.abs().max()


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].uses != "nothing"])
def test_the_class_matters(method: str) -> None:
    if METHODS[method].name == "casm":
        pytest.skip("CASM is class-agnostic")
    net, images = network(), some_images()
    first, second = (maps_of(method, net, images, target) for target in (0, 1))
    assert (first - second).abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_without_targets_the_best_class_is_explained(method: str) -> None:
    net, images = network(), some_images()
    best = net.eval()(images).argmax(dim=1)
    assert torch.equal(maps_of(method, net, images), maps_of(method, net, images, best))


def test_memory_that_runs_out_halves_the_batch() -> None:
    class Needy(Network):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(images)

    torch.manual_seed(0)
    net, images = Needy(), some_images(5)
    made = casm_fast.attribute("gradient", net, images, 1, batch_size=5)
    whole = casm_fast.attribute("gradient", net, images, 1, batch_size=1)
    torch.testing.assert_close(made, whole, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_autograd_s() -> None:
    net, images = network().eval(), some_images()
    leaf = images.clone().requires_grad_()
    net(leaf)[torch.arange(3), torch.tensor([0, 3, 1])].sum().backward()
    expected = leaf.grad.abs().amax(dim=1, keepdim=True)
    made = casm_fast.attribute("gradient", net, images, [0, 3, 1])
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("score", "slope"), [("logit", 1.0), ("softmax", None)])
def test_scores(score: Any, slope: float | None) -> None:
    """The gradient of a probability is that of the logits, weighed by softmax's derivative."""
    net, images = network().eval().double(), some_images(1).double()
    leaf = images.clone().requires_grad_()
    values = net(leaf)
    scored = values[0, 2] if slope else values.softmax(1)[0, 2]
    (expected,) = torch.autograd.grad(scored, leaf)
    made = casm_fast.attribute("gradient", net, images, 2, score=score)
    assert (made[0, 0] - expected[0].abs().amax(dim=0)).abs().max() < 1e-15


def test_centre_falls_off_from_the_middle() -> None:
    maps = casm_fast.attribute("centre", network(), some_images(2, (5, 7)), 0)
    assert maps[0, 0].argmax() == 2 * 7 + 3
    assert maps[0, 0, 0, 0] == 0
    assert torch.equal(maps[0], maps[1])


def test_random_differs_from_image_to_image() -> None:
    images = some_images(2)
    first = casm_fast.attribute("random", network(), images, 0)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first, casm_fast.attribute("random", network(1), images, 3))
    assert not torch.equal(first, casm_fast.attribute("random", network(), images, 0, seed=1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"method": "gradcam"},
            "method: expected the name of a method, got 'gradcam': did you mean",
        ),
        ({"method": "x"}, "method: expected the name of a method, got 'x': gradient, "),
        (
            {"layer": "features"},
            "gradient: expected an option out of none, got 'layer'",
        ),
        ({"score": "loss"}, "score: expected one of logit, softmax, log_softmax, got 'loss'"),
        ({"batch_size": 0}, "batch_size: expected a number above 0, got 0"),
        ({"targets": 5}, "targets: expected classes in 0 ... 4, got 5 for image 0"),
        (
            {"images": torch.full((1, 3, 8, 8), torch.nan)},
            "images: expected finite values, got NaN or infinity in image 0",
        ),
    ],
)
def test_refusals(call: dict[str, Any], message: str) -> None:
    asked = {"method": "gradient", "classifier": network(), "images": some_images(), "targets": 1}
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute(**{**asked, **call})
    assert str(caught.value).startswith(message)


def test_listing_names_every_method() -> None:
    lines = listing().splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert find("gradient").paper in lines[0]
