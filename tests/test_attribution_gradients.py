"""Guided backpropagation and its kin, Grad-CAM and CAM, feedback: against captum and formulas."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import casm_fast
from casm_fast.attribution.layers import as_grid, find_layer
from casm_fast.attribution.problem import Problem
from casm_fast.models.targets import Targets

captum = pytest.importorskip("captum.attr")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting backward hooks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already:UserWarning"),
]

TARGETS = [0, 3, 1]


def images_of(count: int = 3, size: tuple[int, int] = (20, 16), seed: int = 1) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=stream, dtype=torch.float64)


def plain(relu: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    """A network of which captum knows every module."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        relu(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        relu(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
        relu(),
        nn.Linear(10, 5),
    ).double()


class Called(nn.Module):
    """The plain network, with its activation function called in one of many ways."""

    def __init__(self, layers: nn.Sequential, call: Any) -> None:
        super().__init__()
        self.layers = layers
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.call(x) if isinstance(layer, nn.ReLU) else layer(x)
        return x


def discarding(x: Tensor) -> Tensor:
    x.relu_()
    return x


CALLS = {
    "one module for all": nn.ReLU(),
    "one module in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "function in place": lambda x: F.relu(x, inplace=True),
    "function in place, by position": lambda x: F.relu(x, True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": discarding,
    "clamp": lambda x: x.clamp(min=0),
    "threshold": lambda x: F.threshold(x, 0, 0),
}


def largest(values: Tensor) -> Tensor:
    return values.abs().amax(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        ("gradient", "Saliency"),
        ("guided_backprop", "GuidedBackprop"),
        ("salient_deconvolution", "GuidedBackprop"),
        ("deconvolution", "Deconvolution"),
    ],
)
def test_the_backward_rules_are_captum_s(method: str, oracle: str) -> None:
    net, images = plain().eval(), images_of()
    expected = getattr(captum, oracle)(copy.deepcopy(net)).attribute(images, target=TARGETS)
    made = casm_fast.attribute(method, net, images, TARGETS)
    assert (made - largest(expected)).abs().max() <= 1e-13 * made.abs().max()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution", "feedback"])
def test_a_relu_is_found_however_it_is_called(method: str, call: str) -> None:
    images = images_of()
    expected = casm_fast.attribute(method, plain(), images, TARGETS)
    made = casm_fast.attribute(method, Called(plain(), CALLS[call]), images, TARGETS)
    assert torch.equal(made, expected)


def test_relu6_rectifies_between_its_bounds() -> None:
    weight = torch.tensor([[1.0, 2, -1, 3], [2, 1, 1, -1], [1, 1, 2, 1]]).double()
    top = torch.tensor([1.0, -2, 3]).double()

    def net(x: Tensor) -> Tensor:
        hidden = F.relu6(x.flatten(1) @ weight.T)
        return torch.stack((hidden @ top, -hidden @ top), dim=1)

    pixels = torch.tensor([1.0, 2, -1, 0.5]).double()
    hidden = weight @ pixels  # 7.5, 2.5, 1.5: the first is beyond 6
    assert hidden.tolist() == [7.5, 2.5, 1.5]
    image = pixels.view(1, 1, 2, 2)
    guided = casm_fast.attribute("guided_backprop", net, image, 0)
    assert torch.equal(guided.flatten(), (3 * weight[2]).abs())
    deconvolved = casm_fast.attribute("deconvolution", net, image, 0)
    assert torch.equal(deconvolved.flatten(), (weight[0] + 3 * weight[2]).abs())


def test_signed_maps_keep_the_sign_of_the_strongest_colour() -> None:
    net, images = plain(), images_of()
    signed = casm_fast.attribute("guided_backprop", net, images, TARGETS, signed=True)
    assert torch.equal(signed.abs(), casm_fast.attribute("guided_backprop", net, images, TARGETS))
    oracle = captum.GuidedBackprop(plain().eval()).attribute(images, target=TARGETS)
    same = (oracle - signed).abs() <= 1e-13 * signed.abs().max()
    assert same.any(dim=1).all()
    assert (signed < 0).any()
    assert (signed > 0).any()


@pytest.mark.parametrize("method", ["guided_backprop", "deconvolution", "feedback"])
def test_networks_without_relu_are_refused(method: str) -> None:
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute(method, plain(nn.GELU), images_of(), 0)
    assert str(caught.value) == (
        f"{method}: expected ReLU as the activation function, for which alone it is defined, "
        'got gelu; explain this network by "gradient"'
    )
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute(method, plain(nn.Sigmoid), images_of(), 0)
    assert str(caught.value) == (
        f"{method}: expected a network that calls ReLU, got none in its forward pass; "
        'explain this network by "gradient"'
    )


# --- class activation maps ---


@pytest.mark.parametrize("layer", ["1", "2", "3", "4", "5", "6"])
@pytest.mark.parametrize("relu", [False, True])
def test_grad_cam_is_captum_s(layer: str, relu: bool) -> None:
    """Also before a ReLU that works in place, on a network whose ReLUs do not."""
    net, images = plain().eval(), images_of()
    oracle = captum.LayerGradCam(net, net[int(layer)])
    coarse = oracle.attribute(images, target=TARGETS, relu_attributions=relu)
    expected = F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=False)
    other = plain(lambda: nn.ReLU(inplace=True))
    made = casm_fast.attribute("grad_cam", other, images, TARGETS, layer=layer, relu=relu)
    assert (made - expected).abs().max() <= 1e-13 * expected.abs().max()


class Pooled(nn.Module):
    """Global average pooling in one of several ways, and a linear head."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 7, 3), nn.ReLU(inplace=True)
        )
        self.pool = pool
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


POOLS = [
    nn.AdaptiveAvgPool2d(1),
    lambda x: x.mean([2, 3]),
    lambda x: F.avg_pool2d(x, (x.shape[2], x.shape[3])),
]


@pytest.mark.parametrize("pool", POOLS)
def test_cam_is_the_weighted_activation(pool: Any) -> None:
    net, images = Pooled(pool).double(), images_of()
    classes = torch.tensor([[0, 2], [3, -1], [1, 4]])
    with torch.no_grad():
        features = net.features(images).numpy()
        weight = net.head.weight.numpy()
    coarse = np.zeros((3, 1, *features.shape[2:]))
    for image in range(3):
        for label in classes[image].tolist():
            for channel in range(7):
                if label >= 0:
                    coarse[image, 0] += weight[label, channel] * features[image, channel]
    expected = F.interpolate(torch.from_numpy(coarse), (20, 16), mode="bilinear")
    made = casm_fast.attribute("cam", net, images, classes)
    assert (made - expected).abs().max() <= 1e-13 * expected.abs().max()
    # Selvaraju et al. 2017, section 3.1: on such networks Grad-CAM is CAM divided by the places
    places = features.shape[2] * features.shape[3]
    grad_cam = casm_fast.attribute("grad_cam", net, images, classes) * places
    assert (grad_cam - expected).abs().max() <= 1e-13 * expected.abs().max()


def test_cam_refuses_other_heads() -> None:
    for net in (plain(), Pooled(nn.AdaptiveMaxPool2d(1)).double()):
        with pytest.raises(ValueError) as caught:
            casm_fast.attribute("cam", net, images_of(), 0)
        assert str(caught.value) == (
            "cam: expected a network that pools its last activation globally by the mean and gives "
            'logits by one linear layer, got another head; use "grad_cam"'
        )
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("cam", Pooled(POOLS[0]).double(), images_of(), 0, score="softmax")
    assert str(caught.value) == "cam: expected the logit score, which it splits, got softmax"


def built(name: str) -> nn.Module:
    """A network of torchvision with random weights and a small head, in train mode."""
    torch.manual_seed(0)
    if name == "vit":
        return torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
        )
    with torch.device("meta"):
        make = getattr(torchvision.models, name)
        net: nn.Module = make(**({"init_weights": False} if name == "googlenet" else {}))
        if name in ("alexnet", "vgg11"):
            net.avgpool = nn.AdaptiveAvgPool2d(2)
            width = 4 * (256 if name == "alexnet" else 512)
            net.classifier = nn.Sequential(
                nn.Dropout(), nn.Linear(width, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)
            )
        else:
            net.fc = nn.Linear(net.fc.in_features, 5)
            net.aux1 = net.aux2 = None
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net.train()


NETWORKS = {
    "googlenet": ("inception5b", "inception3b"),
    "resnet18": ("layer4", "layer2"),
    "vgg11": ("features.19", "features.14"),
    "alexnet": ("features.11", "features.4"),
    "vit": ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_0"),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, built(request.param)


def test_layers_are_found_by_looking(network: tuple[str, nn.Module]) -> None:
    name, net = network
    side = 32 if name == "vit" else 112
    problem = Problem(net.eval(), torch.zeros(1, 3, side, side), Targets(torch.zeros(1, 1).long()))
    found = find_layer(problem, "grad_cam"), find_layer(problem, "grad_cam", 1 / 9)
    net.train()
    assert found == NETWORKS[name]


METHODS = [
    "guided_backprop",
    "deconvolution",
    "excitation_backprop",
    "contrastive_excitation_backprop",
    "grad_cam",
    "lrp",
    "feedback",
]


@pytest.mark.parametrize("method", METHODS)
def test_known_networks_in_train_mode(network: tuple[str, nn.Module], method: str) -> None:
    name, net = network
    if name == "vit" and method in ("guided_backprop", "deconvolution", "feedback"):
        pytest.skip("its activation function is no ReLU")
    side = {"vit": 32, "alexnet": 64}.get(name, 40)
    if name == "vit":  # whose head begins at zero
        nn.init.normal_(net.heads.head.weight, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    maps = casm_fast.attribute(method, net, images, [1, 4])
    assert maps.shape == (2, 1, side, side)
    assert maps.isfinite().all()
    assert (maps.flatten(1).std(dim=1) > 0).all()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_grids_are_laid_out_by_the_shape_of_the_image() -> None:
    first = torch.randn(1, 96, 14, 10)
    size = torch.Size((224, 160))
    assert as_grid(first, "x", size) is first
    assert torch.equal(as_grid(first.permute(0, 2, 3, 1), "x", size), first)
    tokens = torch.randn(1, 17, 3)
    grid = as_grid(tokens, "x", torch.Size((8, 8)))
    assert grid.shape == (1, 3, 4, 4)
    assert torch.equal(grid[0, :, 2, 1], tokens[0, 1 + 2 * 4 + 1])


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.side = nn.Conv2d(3, 5, 1), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.side(x.detach())
        return self.used(x).mean((2, 3))


@pytest.mark.parametrize(
    ("net", "layer", "message"),
    [
        (
            Unused(),
            "idle",
            "layer: expected a module that gives a tensor in the forward pass, got 'idle', "
            "which does not",
        ),
        (Unused(), "side", "layer: expected a layer that the score depends on, got 'side'"),
        (Unused(), "use", "layer: expected the name of a module, got 'use'; near it: used, side"),
        (
            nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
            "3",
            "layer: expected an activation [B, C, h, w], or [B, N, D] of a square grid of tokens, "
            "got [3, 5] from '3'; name a module before it",
        ),
        (
            lambda x: x.mean((2, 3)),
            None,
            "grad_cam: expected a classifier with modules, among which a layer is found, "
            "got function",
        ),
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)),
            None,
            "grad_cam: expected a network with an activation that has places in the image, "
            "got none for images of 20 x 16; name a layer",
        ),
    ],
)
def test_layers_that_are_refused(net: Any, layer: str | None, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("grad_cam", net, images_of().float(), 0, layer=layer)
    assert str(caught.value) == message


# --- feedback ---


def test_feedback_closes_what_speaks_against_the_class() -> None:
    """Of one hidden layer, the weights that are not positive go, and nothing else."""
    stream = torch.Generator().manual_seed(0)
    first = torch.randn(9, 12, generator=stream, dtype=torch.float64)
    second = torch.randn(4, 9, generator=stream, dtype=torch.float64)
    images = torch.randn(2, 3, 2, 2, generator=stream, dtype=torch.float64)

    def net(x: Tensor) -> Tensor:
        return F.linear(F.linear(x.flatten(1), first).relu(), second)

    made = casm_fast.attribute("feedback", net, images, [2, 0]).numpy()
    for image, label in enumerate((2, 0)):
        slope = np.zeros(12)
        for unit in range(9):
            if first[unit] @ images[image].flatten() > 0 and second[label, unit] > 0:
                slope += second[label, unit].item() * first[unit].numpy()
        expected = np.abs(slope.reshape(3, 2, 2)).max(axis=0)
        assert np.abs(made[image, 0] - expected).max() <= 1e-14


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("pools", [False, True])
def test_feedback_is_its_definition(iterations: int, pools: bool) -> None:
    net, images = plain().eval(), images_of(2)

    def score(x: Tensor, gates: list[Tensor]) -> Tensor:
        place = 0
        for layer in net:
            x = layer(x)
            if isinstance(layer, nn.ReLU) or (pools and isinstance(layer, nn.MaxPool2d)):
                if place == len(gates):
                    gates.append(torch.ones_like(x).requires_grad_())
                x = x * gates[place]
                place += 1
        return x[0, 3] + x[1, 1]

    gates: list[Tensor] = []
    for _ in range(iterations):
        slopes = torch.autograd.grad(score(images, gates), gates)
        for gate, slope in zip(gates, slopes, strict=True):
            gate.data[slope > 0] = 1
            gate.data[slope < 0] = 0
    leaf = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(score(leaf, gates), leaf)
    made = casm_fast.attribute("feedback", net, images, [3, 1], iterations=iterations, pools=pools)
    assert (made - largest(expected)).abs().max() <= 1e-14 * made.abs().max()
    if iterations == 0:
        assert torch.equal(made, casm_fast.attribute("gradient", net, images, [3, 1]))


def test_feedback_refuses() -> None:
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("feedback", plain(), images_of(), 0, iterations=-1)
    assert str(caught.value) == "iterations: expected an integer, 0 or above, got -1"

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return x[:, :, : 1 + self.passes].relu().mean((2, 3))

    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("feedback", Moody(), images_of(1), 0)
    assert str(caught.value) == (
        "feedback: expected a network that computes the same layers in every pass, "
        "got another response, [1, 3, 5, 16], at gate 0"
    )
