"""Excitation backprop and LRP: against loops, captum, gradient times input, and conservation."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import casm_fast
from casm_fast.attribution.excitation import Excitation
from casm_fast.attribution.layers import recorded
from casm_fast.attribution.problem import Problem
from casm_fast.attribution.propagation import Propagation
from casm_fast.models.targets import Targets


def images_of(count: int = 2, size: tuple[int, int] = (8, 6), colours: int = 3) -> Tensor:
    stream = torch.Generator().manual_seed(1)
    return torch.randn(count, colours, *size, generator=stream, dtype=torch.float64)


def trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network in double precision with weights, biases and statistics of every sign."""
    stream = torch.Generator().manual_seed(seed)
    net = net.double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.weight.shape
            module.running_mean.copy_(0.3 * torch.randn(size, generator=stream))
            module.running_var.copy_(0.5 + torch.rand(size, generator=stream))
            module.weight.data.copy_(torch.randn(size, generator=stream))
            module.bias.data.copy_(0.3 * torch.randn(size, generator=stream))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            size = module.weight.shape
            fan = module.weight[0].numel()
            module.weight.data.copy_(torch.randn(size, generator=stream) / fan**0.5)
            if module.bias is not None:
                module.bias.data.copy_(0.2 * torch.randn(len(module.bias), generator=stream))
    return net.train()


class Block(nn.Module):
    """Convolution with batch norm, max pool, a residual sum, a concatenation, a mean and a head."""

    def __init__(self, in_place: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=in_place)
        self.relu2 = self.relu if shared else nn.ReLU(inplace=in_place)
        self.pool = nn.MaxPool2d(2)
        self.branch = nn.Conv2d(4, 4, 1)
        self.branch_norm = nn.BatchNorm2d(4)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        y = self.branch_norm(self.branch(x))
        if self.in_place:
            y += x
        else:
            y = y + x
        y = self.relu2(y)
        return self.head(self.drop(torch.flatten(self.mean(torch.cat((y, x), dim=1)), 1)))


# --- excitation backprop ---


def excited(values: list[float], weights: list[float], probability: float) -> list[float]:
    """What a neuron hands to its inputs: the rule, word by word."""
    exciting = [max(a, 0.0) * max(w, 0.0) for a, w in zip(values, weights, strict=True)]
    total = sum(exciting)
    return [probability * e / total if total > 0 else 0.0 for e in exciting]


def by_loops(net: Block, image: Tensor, label: int, sign: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """P at the input of the head ``[8]`` and, handed down from there, at the pool ``[4, h, w]``."""
    net = net.eval()
    with torch.no_grad():
        x = net.pool(F.relu(net.norm(net.conv(image[None]))))
        branch = net.branch_norm(net.branch(x))
        y = F.relu(branch + x)
        read = torch.cat((y, x), 1).mean((2, 3))[0].tolist()
        fused = fuse_conv_bn_eval(net.branch, net.branch_norm)
    top = excited(read, (sign * net.head.weight[label]).tolist(), 1.0)
    return np.array(top), down(x[0], branch[0], y[0], fused, top)


def down(x: Tensor, branch: Tensor, y: Tensor, fused: nn.Conv2d, top: Any) -> np.ndarray:
    height, width = x.shape[1:]
    handed = np.zeros((4, height, width))
    places = [(r, c) for r in range(height) for c in range(width)]
    for channel in range(8):
        below = (y if channel < 4 else x)[channel % 4]
        shares = excited([below[p].item() for p in places], [1.0] * len(places), top[channel])
        for place, share in zip(places, shares, strict=True):
            if channel >= 4:
                handed[(channel - 4, *place)] += share
                continue
            at = (channel, *place)
            to_branch, to_x = excited([branch[at].item(), x[at].item()], [1.0, 1.0], share)
            handed[at] += to_x
            inputs = [x[(k, *place)].item() for k in range(4)]
            weights = fused.weight[channel, :, 0, 0].tolist()
            for k, part in enumerate(excited(inputs, weights, to_branch)):
                handed[(k, *place)] += part
    return handed


def enlarged(coarse: np.ndarray, size: tuple[int, int] = (8, 6)) -> Tensor:
    maps = torch.from_numpy(coarse)[None, None]
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("label", [0, 1, 2, 3])
def test_excitation_is_its_rule(in_place: bool, shared: bool, label: int) -> None:
    net, images = trained(Block(in_place, shared)), images_of()
    made = casm_fast.attribute("excitation_backprop", net, images, label, layer="pool")
    for image in range(2):
        _, handed = by_loops(net, images[image], label)
        assert (made[image] - enlarged(handed.sum(axis=0))).abs().max() <= 1e-14


@pytest.mark.parametrize("label", [0, 1, 2, 3])
def test_contrastive_excitation_is_its_rule(label: int) -> None:
    net, images = trained(Block()), images_of()
    made = casm_fast.attribute("contrastive_excitation_backprop", net, images, label, layer="pool")
    named = casm_fast.attribute(
        "contrastive_excitation_backprop", net, images, label, layer="pool", contrast_layer="mean"
    )
    assert torch.equal(named, made)
    for image in range(2):
        target, _ = by_loops(net, images[image], label)
        dual, _ = by_loops(net, images[image], label, sign=-1)
        with torch.no_grad():
            x = net.pool(F.relu(net.norm(net.conv(images[image][None]))))
            branch = net.branch_norm(net.branch(x))
            y = F.relu(branch + x)
        fused = fuse_conv_bn_eval(net.branch, net.branch_norm)
        handed = down(x[0], branch[0], y[0], fused, target - dual)
        expected = np.maximum(handed, 0).sum(axis=0)
        assert (made[image] - enlarged(expected)).abs().max() <= 1e-14
        assert expected.max() > 0


def test_excitation_goes_to_the_place_of_the_maximum() -> None:
    net, images = trained(Block()), images_of()
    at_pool, at_relu = (
        casm_fast.attribute("excitation_backprop", net, images, 2, layer=layer)
        for layer in ("pool", "relu")
    )
    _, handed = by_loops(net, images[0], 2)
    with torch.no_grad():
        before = F.relu(net.norm(net.conv(images[:1])))
    _, places = F.max_pool2d(before, 2, return_indices=True)
    expected = torch.zeros(1, 4, 48).double()
    expected.scatter_(2, places.flatten(2), torch.from_numpy(handed).view(1, 4, -1))
    assert (at_relu[0] - expected.view(4, 8, 6).sum(0)).abs().max() <= 1e-14
    assert not torch.equal(at_pool, at_relu)


def mass(net: nn.Module, images: Tensor, layers: list[str]) -> Tensor:
    """The sum of P at layers, ``[layers, B]``."""
    problem = Problem(net.eval(), images, Targets(torch.zeros(len(images), 1, dtype=torch.int64)))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with ExitStack() as stack:
        records = [stack.enter_context(recorded(net, layer)) for layer in layers]
        _, logits = Propagation(Excitation(), "test").logits(problem)
    start = F.one_hot(problem.targets.classes[:, 0], logits.shape[1]).to(logits)
    activations = [record.activation(layer) for record, layer in zip(records, layers, strict=True)]
    handed = torch.autograd.grad(logits, activations, start)
    return torch.stack([one.flatten(1).sum(1) for one in handed])


def resnet() -> nn.Module:
    """The shortest of torchvision's residual networks."""
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5)


def googlenet() -> nn.Module:
    return torchvision.models.googlenet(num_classes=5, aux_logits=False, init_weights=False)


def densenet() -> nn.Module:
    return torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=5)


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (resnet, ["avgpool", "layer4", "layer3", "layer2.0", "layer1", "maxpool", "relu"]),
        (googlenet, ["avgpool", "inception5b", "inception4c", "maxpool3", "maxpool2", "conv1"]),
        (densenet, ["features", "features.transition2", "features.pool0"]),
    ],
)
def test_mass_is_conserved(make: Any, layers: list[str]) -> None:
    torch.manual_seed(0)
    sums = mass(make().double(), images_of(2, (40, 40)), layers)
    assert (sums - 1).abs().max() <= 1e-14  # measured: 8e-16


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3))
def test_mass_never_grows(seed: int, width: int, stride: int) -> None:
    net = trained(
        nn.Sequential(
            nn.Conv2d(3, width, 3, stride=stride, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AvgPool2d(2, ceil_mode=True),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 3),
        ),
        seed,
    )
    sums = mass(net, images_of(2), ["7", "5", "3", "2"])
    assert (sums >= 0).all()
    assert (sums <= 1 + 1e-12).all()
    assert (sums.diff(dim=0) <= 1e-12).all()


def test_nothing_is_handed_on_without_excitation() -> None:
    net = trained(Block())
    net.head.weight.data.clamp_(max=0)
    for method in ("excitation_backprop", "contrastive_excitation_backprop"):
        made = casm_fast.attribute(method, net, images_of(), 0, layer="pool")
        assert torch.equal(made, torch.zeros(2, 1, 8, 6).double())


def test_several_targets_share_the_probability() -> None:
    net, images = trained(Block()), images_of()
    one, two, both = (
        casm_fast.attribute("excitation_backprop", net, images, t, layer="pool")
        for t in ([[1, -1]] * 2, 3, [[1, 3]] * 2)
    )
    assert (both - (one + two) / 2).abs().max() <= 1e-15


def test_googlenet_has_the_layers_of_the_supplement() -> None:
    torch.manual_seed(0)
    net = googlenet()
    images = images_of(1, (40, 40)).float()
    for method, more in (
        ("excitation_backprop", {}),
        ("contrastive_excitation_backprop", {"contrast_layer": "avgpool"}),
    ):
        made = casm_fast.attribute(method, net, images, 1)
        named = casm_fast.attribute(method, net, images, 1, layer="maxpool2", **more)
        assert torch.equal(made, named)
        assert made.max() > 0
    wrapped = casm_fast.attribute("excitation_backprop", nn.Sequential(net), images, 1)
    assert torch.equal(wrapped, casm_fast.attribute("excitation_backprop", net, images, 1))


# --- LRP ---


def pixels(net: nn.Module, images: Tensor, labels: Any) -> Tensor:
    """Gradient times input, summed over the colours."""
    leaf = images.clone().requires_grad_()
    logits = net.eval()(leaf)
    score = logits[torch.arange(len(images)), torch.as_tensor(labels)].sum()
    (slope,) = torch.autograd.grad(score, leaf)
    net.train()
    return (slope * images).sum(1, keepdim=True)


@pytest.mark.parametrize("make", [lambda: Block(True, True), resnet, googlenet, densenet])
def test_without_epsilon_lrp_is_gradient_times_input(make: Any) -> None:
    """Ancona et al. 2018, proposition 1, for ReLU networks with biases. Measured: 9e-14."""
    net, images = trained(make()), images_of(2, (40, 36))
    made = casm_fast.attribute("lrp", net, images, [2, 1], rule="epsilon", epsilon=0)
    expected = pixels(net, images, [2, 1])
    assert (made - expected).abs().max() <= 2e-12 * expected.abs().max()


class Plain(nn.Module):
    """A network of which captum knows every module."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(5, 6, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.AvgPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Linear(12, 7, bias=bias), nn.ReLU(), nn.Linear(7, 4, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))


@pytest.mark.parametrize("epsilon", [0.25, None])
def test_lrp_is_captum_s(epsilon: float | None) -> None:
    """The epsilon rule, and alpha-beta of images above zero without biases.

    Captum's alpha-beta takes biases and negative pixels another way than Bach et al. Measured:
    4e-16 and, since captum adds 1e-9 to every sum of its alpha-beta, 6e-9.
    """
    attr = pytest.importorskip("captum.attr")
    rules = pytest.importorskip("captum.attr._utils.lrp_rules")
    net, images = trained(Plain(epsilon is not None)).eval(), images_of().abs()
    for module in net.modules():
        if isinstance(module, nn.MaxPool2d):
            module.rule = rules.EpsilonRule(1e-30)
        elif isinstance(module, (nn.AvgPool2d, nn.Conv2d, nn.Linear)):
            alpha_beta = epsilon is None and not isinstance(module, nn.AvgPool2d)
            module.rule = (
                rules.Alpha1_Beta0_Rule() if alpha_beta else rules.EpsilonRule(epsilon or 1e-30)
            )
    options: dict[str, Any] = {"rule": "alpha_beta"}
    if epsilon is not None:
        options = {"rule": "epsilon", "epsilon": epsilon}
    made = casm_fast.attribute("lrp", net, images, 1, **options)
    expected = attr.LRP(net).attribute(images, target=1).sum(1, keepdim=True)
    tolerance = 1e-14 if epsilon else 3e-8
    assert (made - expected).abs().max() <= tolerance * expected.abs().max()


def handed_back(
    values: np.ndarray, weight: np.ndarray, bias: np.ndarray, relevance: np.ndarray, alpha: float
) -> np.ndarray:
    """Bach et al. 2015, equation 60, word by word."""
    handed = np.zeros(len(values))
    for j, has in enumerate(relevance):
        z = [values[i] * weight[j, i] for i in range(len(values))]
        above = sum(max(one, 0) for one in z) + max(bias[j], 0)
        below = sum(min(one, 0) for one in z) + min(bias[j], 0)
        for i, one in enumerate(z):
            if above:
                handed[i] += alpha * max(one, 0) / above * has
            if below:
                handed[i] -= (alpha - 1) * min(one, 0) / below * has
    return handed


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
def test_alpha_beta_is_equation_60(alpha: float) -> None:
    stream = torch.Generator().manual_seed(0)
    w1, b1, w2, b2 = (
        torch.randn(size, generator=stream, dtype=torch.float64)
        for size in ((9, 12), (9,), (3, 9), (3,))
    )
    image = torch.randn(1, 3, 2, 2, generator=stream, dtype=torch.float64)

    def net(x: Tensor) -> Tensor:
        return F.linear(F.linear(x.flatten(1), w1, b1).relu(), w2, b2)

    hidden = (w1 @ image.flatten() + b1).relu()
    start = np.array([0.0, (w2 @ hidden + b2)[1].item(), 0.0])
    top = handed_back(hidden.numpy(), w2.numpy(), b2.numpy(), start, alpha)
    expected = handed_back(image.flatten().numpy(), w1.numpy(), b1.numpy(), top, alpha)
    made = casm_fast.attribute("lrp", net, image, 1, rule="alpha_beta", alpha=alpha)
    worst = np.abs(made.numpy().reshape(4) - expected.reshape(3, 4).sum(0)).max()
    assert worst <= 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("bounds", [None, (-2.0, 3.0), ((-2.0, -1.0, -3.0), (3.0, 2.5, 4.0))])
def test_the_composite_by_loops(bounds: Any) -> None:
    """Flat or z^B in the first convolution, z+ in the second, epsilon in the head."""
    stream = torch.Generator().manual_seed(3)
    first, second = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 5, 2, bias=False)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(5, 3))
    net, image = trained(net), torch.randn(1, 3, 3, 3, generator=stream).double()
    with torch.no_grad():
        one = first(image).relu()
        two = second(one).relu()
        logit = net(image)[0, 2].item()
    head = net[5]
    values, weight = two.flatten().numpy(), head.weight.detach().numpy()[2]
    total = values @ weight + head.bias[2].item()
    relevance = values * weight / (total + 0.125 * np.sign(total)) * logit

    handed = np.zeros((4, 2, 2))
    kernel = second.weight.detach().numpy()
    for j in range(5):
        z = np.maximum(one[0].numpy() * kernel[j], 0)
        handed += z / z.sum() * relevance[j] if z.sum() else 0

    low, high = (np.broadcast_to(b, (3,)).reshape(3, 1, 1) for b in bounds or (0, 0))
    expected = np.zeros((3, 3, 3))
    kernel = first.weight.detach().numpy()
    for j in range(4):
        for row in range(2):
            for column in range(2):
                window = np.s_[:, row : row + 2, column : column + 2]
                z = np.ones((3, 2, 2))
                if bounds:
                    z = image[0].numpy()[window] * kernel[j]
                    z = z - low * np.maximum(kernel[j], 0) - high * np.minimum(kernel[j], 0)
                expected[window] += z / z.sum() * handed[j, row, column]
    made = casm_fast.attribute("lrp", net, image, 2, epsilon=0.125, bounds=bounds)
    assert np.abs(made.numpy()[0, 0] - expected.sum(0)).max() <= 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("rule", ["composite", "alpha_beta", "epsilon"])
def test_relevance_is_conserved_without_biases(rule: str) -> None:
    """Of images above zero. Measured: 7e-16."""
    torch.manual_seed(0)
    net = resnet().double()
    net.fc.bias.data.zero_()
    images = images_of(2, (40, 40)).abs()
    options: dict[str, Any] = {} if rule == "alpha_beta" else {"epsilon": 0}
    made = casm_fast.attribute("lrp", net, images, 3, rule=rule, **options)
    logits = net.eval()(images)[:, 3]
    assert (made.sum((1, 2, 3)) - logits).abs().max() <= 1e-14 * logits.abs().max()


METHODS = [
    ("excitation_backprop", {"layer": "pool"}),
    ("contrastive_excitation_backprop", {"layer": "pool"}),
    ("lrp", {}),
    ("lrp", {"rule": "alpha_beta", "alpha": 2}),
    ("lrp", {"rule": "epsilon"}),
]


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_batch_norm_is_folded(method: str, options: dict[str, Any]) -> None:
    images = images_of()
    expected = casm_fast.attribute(method, trained(Block()), images, 1, **options)
    merged = trained(Block()).eval()
    merged.conv = fuse_conv_bn_eval(merged.conv, merged.norm)
    merged.branch = fuse_conv_bn_eval(merged.branch, merged.branch_norm)
    merged.norm = merged.branch_norm = nn.Identity()
    made = casm_fast.attribute(method, merged, images, 1, **options)
    assert (made - expected).abs().max() <= 1e-13 * expected.abs().max()  # measured: 3e-15


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_what_works_in_place_or_twice_gives_the_same(method: str, options: dict[str, Any]) -> None:
    images = images_of()
    expected = casm_fast.attribute(method, trained(Block()), images, 1, **options)
    for in_place, shared in ((True, False), (False, True), (True, True)):
        made = casm_fast.attribute(method, trained(Block(in_place, shared)), images, 1, **options)
        assert torch.equal(made, expected)


@pytest.mark.parametrize(("method", "options"), METHODS[2:])
def test_a_function_is_explained_as_its_module(method: str, options: dict[str, Any]) -> None:
    """Its parameters still want gradients: they get none, and no relevance."""
    net, images = trained(Block()), images_of()
    expected = casm_fast.attribute(method, net, images, 1, **options)
    net.eval()
    made = casm_fast.attribute(method, lambda x: net(x), images, 1, **options)
    assert torch.equal(made, expected)
    assert all(parameter.grad is None for parameter in net.parameters())


class Attending(nn.Module):
    """A transformer; ``frozen`` computes the same with gates, deviations and GELU's slope held."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2, bias=False)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 4)
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        tokens = 2 * self.embed(x).flatten(2).transpose(1, 2) - 0.5
        if not self.frozen:
            read = self.norm(tokens)
            tokens = tokens + self.attention(read, read, read, need_weights=False)[0]
            tokens = tokens + self.mlp(tokens)
            return self.head(tokens.mean(dim=1) * torch.sigmoid(tokens.sum(dim=(1, 2)))[:, None])
        centred = tokens - tokens.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt().detach()
        read = centred / deviation * self.norm.weight + self.norm.bias
        made = F.linear(read, self.attention.in_proj_weight, self.attention.in_proj_bias)
        query, key, value = (p.unflatten(2, (2, 4)).transpose(1, 2) for p in made.chunk(3, dim=2))
        weights = (query @ key.transpose(2, 3) / 2).softmax(-1).detach()
        mixed = self.attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
        tokens = tokens + mixed
        hidden = self.mlp[0](tokens)
        tokens = tokens + self.mlp[2](hidden * (F.gelu(hidden) / hidden).detach())
        gate = torch.sigmoid(tokens.sum(dim=(1, 2)))[:, None].detach()
        return self.head(tokens.mean(dim=1) * gate)


def test_lrp_through_attention_holds_gates_and_deviations() -> None:
    """Ali et al. 2022: gradient times input of a network in which those are constants.

    Measured: 2e-14.
    """
    net, frozen = trained(Attending(False)), trained(Attending(True))
    frozen.load_state_dict(net.state_dict())
    images = images_of(2, (6, 4))
    torch.testing.assert_close(net(images), frozen(images))
    made = casm_fast.attribute("lrp", net, images, [2, 1], rule="epsilon", epsilon=0)
    expected = pixels(frozen, images, [2, 1])
    assert (made - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_attention_by_hand_is_understood() -> None:
    torch.manual_seed(0)
    net = torchvision.models.SwinTransformer([2, 2], 8, [1, 1], [1, 2], [2, 2], num_classes=4)
    images = images_of(2, (16, 16)).float()
    for method in ("lrp", "excitation_backprop", "contrastive_excitation_backprop"):
        maps = casm_fast.attribute(method, net, images, 1)
        assert maps.isfinite().all()
        assert (maps.flatten(1).std(dim=1) > 0).all()


def powered(x: Tensor) -> Tensor:
    return F.linear((x**2).mean((2, 3)), torch.ones(2, 3, dtype=x.dtype))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (
            "lrp",
            {"classifier": powered},
            "lrp: expected layers with a rule (linear ones, convolutions, pools, sums, norms, "
            "activation functions, attention), got pow on the way back to the image",
        ),
        (
            "lrp",
            {"classifier": lambda x: (x.sum((2, 3)) + 0).erfinv_()},
            "lrp: expected layers with a rule (linear ones, convolutions, pools, sums, norms, "
            "activation functions, attention), got erfinv on the way back to the image",
        ),
        (
            "lrp",
            {"score": "softmax"},
            "lrp: expected the logit score, which it hands back, got softmax",
        ),
        (
            "excitation_backprop",
            {"score": "log_softmax"},
            "excitation_backprop: expected the logit score, which it hands back, got log_softmax",
        ),
        (
            "lrp",
            {"rule": "gamma"},
            "rule: expected one of composite, epsilon, alpha_beta, got 'gamma'",
        ),
        ("lrp", {"epsilon": -1.0}, "epsilon: expected a number, 0 or above, got -1.0"),
        ("lrp", {"alpha": 0.5}, "alpha: expected a number, 1 or above, got 0.5"),
        (
            "lrp",
            {"rule": "epsilon", "bounds": (0, 1)},
            "bounds: expected none beside rule = 'epsilon', which has no rule for pixels, "
            "got (0, 1)",
        ),
        (
            "lrp",
            {"bounds": ((0, 0), 1)},
            "bounds: expected one number or 3, one for each colour, got (0, 0)",
        ),
        (
            "contrastive_excitation_backprop",
            {"layer": "mean", "contrast_layer": "pool"},
            "layer: expected a layer between the image and the logits, below the contrast layer "
            "if there is one, got 'mean'",
        ),
        (
            "contrastive_excitation_backprop",
            {"classifier": nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten())},
            "contrastive_excitation_backprop: expected a network with a linear layer, got none",
        ),
        (
            "excitation_backprop",
            {"layer": "head"},
            "layer: expected an activation [B, C, h, w], or [B, N, D] of a square grid of tokens, "
            "got [2, 4] from 'head'; name a module before it",
        ),
    ],
)
def test_refusals(method: str, options: dict[str, Any], message: str) -> None:
    asked = {"classifier": trained(Block()), "images": images_of(), "targets": 1, **options}
    if method.startswith("contrastive") and "layer" not in options:
        asked["layer"] = "0"
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute(method, **asked)
    assert str(caught.value) == message
