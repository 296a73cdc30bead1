"""Encoders: logits and taps of one forward pass, against torchvision's and timm's extractors."""

from __future__ import annotations

import copy
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from casm_fast.models import (
    Encoder,
    ResNetEncoder,
    TracedEncoder,
    build_encoder,
    discover_taps,
)


def images(size: tuple[int, int] = (64, 64), batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# The paper's network


def test_resnet50_has_the_papers_taps_and_parameters() -> None:
    encoder = build_encoder("resnet50")
    assert sum(p.numel() for p in encoder.parameters()) == 25_557_032
    with torch.no_grad():
        logits, taps = encoder.eval()(images((224, 224), batch=1))
    assert logits.shape == (1, 1000)
    shapes = [tuple(tap.shape[1:]) for tap in taps]
    assert shapes == [(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert encoder.tap_channels == (64, 256, 512, 1024, 2048)
    assert encoder.tap_strides == (4, 4, 8, 16, 32)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnext50_32x4d"])
def test_resnet_taps_equal_torchvisions_feature_extractor(name: str) -> None:
    encoder = build_encoder(name, classes=7).eval()
    nodes = ["maxpool", "layer1", "layer2", "layer3", "layer4", "fc"]
    extractor = create_feature_extractor(encoder.backbone, nodes)
    with torch.no_grad():
        logits, taps = encoder(images())
        expected = extractor(images())
    for got, node in zip([*taps, logits], nodes, strict=True):
        assert torch.equal(got, expected[node]), node


def test_state_dict_interchanges_with_torchvision_both_ways() -> None:
    reference = torchvision.models.resnet50()
    encoder = build_encoder("resnet50")
    assert len(encoder.backbone.state_dict()) == 320
    encoder.backbone.load_state_dict(reference.state_dict())
    with torch.no_grad():
        ours, _ = encoder.eval()(images())
        assert torch.equal(ours, reference.eval()(images()))
    torchvision.models.resnet50().load_state_dict(encoder.backbone.state_dict())


def test_initialisation_of_convolutions_has_the_authors_deviation() -> None:
    torch.manual_seed(0)
    for name in ("compact", "resnet18"):
        convolution = build_encoder(name, classes=8).backbone.get_submodule("layer4.1.conv2")
        assert isinstance(convolution, nn.Conv2d)
        weight = convolution.weight.detach()
        expected = (2 / (9 * weight.shape[0])) ** 0.5
        # The deviation of n normal numbers is known to 1/sqrt(2n); five of them pass.
        assert abs(weight.std().item() / expected - 1) < 5 / (2 * weight.numel()) ** 0.5
    norm = build_encoder("compact", classes=8).backbone.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert torch.equal(norm.weight, torch.ones(16))
    assert torch.equal(norm.bias, torch.zeros(16))


# The compact network


def test_compact_gives_taps_of_32_for_64_and_matches_its_own_backbone() -> None:
    encoder = build_encoder("compact", classes=8).eval()
    logits, taps = encoder(images())
    shapes = [tuple(tap.shape[1:]) for tap in taps]
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4)]
    assert encoder.tap_channels == (16, 16, 32, 64, 128)
    assert encoder.tap_strides == (2, 2, 4, 8, 16)
    assert torch.equal(logits, encoder.backbone(images()))
    parameters = 3 * 16 * 9 + 2 * 16 + 128 * 8 + 8  # stem and head
    for before, width in ((16, 16), (16, 32), (32, 64), (64, 128)):
        parameters += 9 * width * (before + 3 * width) + 4 * 2 * width
        parameters += before * width + 2 * width if before != width else 0  # shortcut
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def test_compact_learns() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("compact", classes=2)
    bright = torch.arange(8) % 2
    batch = images((32, 32), batch=8) + 2 * bright.view(-1, 1, 1, 1)
    optimiser = torch.optim.SGD(encoder.parameters(), 0.05, momentum=0.9)
    for _ in range(15):
        optimiser.zero_grad()
        nn.functional.cross_entropy(encoder(batch)[0], bright).backward()
        optimiser.step()
    assert (encoder(batch)[0].argmax(1) == bright).all()


# Any other classifier: taps found by running it

TORCHVISION = {
    "vgg11": ("features.9", "features.14", "features.19", "features.20"),
    "densenet121": (
        "features.transition1.conv",
        "features.transition2.conv",
        "features.transition3.conv",
        "relu",  # in place on the output of features.norm5
    ),
    "googlenet": (
        "conv3.relu",
        "inception3b.cat",
        "inception4e.cat",
        "inception5b.cat",
    ),
    "mobilenet_v3_small": ("features.1.block.2", "features.3.add", "features.8.add", "features.12"),
    "convnext_tiny": (
        "features.2.0",
        "features.4.0",
        "features.6.0",
        "features.7.2.add",
    ),
    "swin_t": ("features.1.1.add_1", "features.3.1.add_1", "features.5.5.add_1", "permute"),
    "squeezenet1_1": ("features.4.cat", "features.7.cat", "features.12.cat"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_traced_taps_of_torchvision(name: str) -> None:
    encoder = build_encoder(name, classes=5).eval()
    assert isinstance(encoder, TracedEncoder)
    # An independent way to the same tensors: torch.fx, by the names of its nodes.
    nodes = list(TORCHVISION[name])
    extractor = create_feature_extractor(encoder.backbone, nodes)
    calls = count_calls(encoder.backbone)
    size = (64, 96) if name != "squeezenet1_1" else (96, 128)
    with torch.no_grad():
        logits, taps = encoder(images(size, batch=1))
        assert len(calls) == 1
        assert torch.equal(logits, encoder.backbone(images(size, batch=1)))
        expected = extractor(images(size, batch=1))
    assert logits.shape == (1, 5)
    assert encoder.tap_strides == (4, 8, 16, 32)[: len(nodes)]
    assert tuple(tap.shape[1] for tap in taps) == encoder.tap_channels
    for tap, node, stride in zip(taps, nodes, encoder.tap_strides, strict=True):
        want = expected[node]
        want = want.permute(0, 3, 1, 2) if want.shape[1:] != tap.shape[1:] else want
        assert torch.equal(tap, want), node
        # Networks without padding lose up to a cell of the exact quotient.
        assert abs(tap.shape[2] - size[0] / stride) <= 1
        assert abs(tap.shape[3] - size[1] / stride) <= 1


def test_discovery_finds_the_papers_stages_in_a_resnet() -> None:
    taps = discover_taps(torchvision.models.resnet50())
    assert [tap.module for tap in taps] == ["layer1", "layer2", "layer3", "layer4"]
    assert [tap.channels for tap in taps] == [256, 512, 1024, 2048]
    assert [tap.stride for tap in taps] == [4, 8, 16, 32]


def test_finer_taps_on_request() -> None:
    encoder = build_encoder("mobilenet_v3_small", classes=5, finest_stride=2)
    assert encoder.tap_strides == (2, 4, 8, 16, 32)


@pytest.mark.parametrize("name", ["resnet18d", "efficientnet_b0"])
def test_traced_taps_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    encoder = build_encoder(f"timm/{name}", classes=5).eval()
    extractor = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    extractor.load_state_dict(encoder.backbone.state_dict(), strict=False)
    with torch.no_grad():
        logits, taps = encoder(images())
        expected = extractor(images())
        assert torch.equal(logits, encoder.backbone(images()))
    assert encoder.tap_strides == (4, 8, 16, 32)
    # efficientnet_b0's last tap is the head's convolution, one step after timm's last feature.
    same = 4 if name == "resnet18d" else 3
    for got, want in zip(taps[:same], expected[:same], strict=True):
        assert got.shape == want.shape
    if name == "resnet18d":
        for got, want in zip(taps, expected, strict=True):
            assert torch.equal(got, want)


def test_network_of_one_fixed_size_and_channels_last() -> None:
    pytest.importorskip("timm")
    encoder = build_encoder("timm/swin_tiny_patch4_window7_224", classes=5).eval()
    with torch.no_grad():
        _, taps = encoder(images((224, 224), batch=1))
    shapes = [tuple(tap.shape[1:]) for tap in taps]
    assert shapes == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]


def test_plain_vision_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^discover_taps") as error:
        build_encoder("vit_b_16", classes=5)
    assert str(error.value) == (
        "discover_taps: expected a network with feature maps of two resolutions or more at stride "
        "4 and above, got 1 in vit_b_16; choose a convolutional or hierarchical network such as "
        "resnet50, convnext_tiny or swin_t"
    )


class Reused(nn.Module):
    """A network that calls one module at two resolutions and passes through an odd path."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.act = nn.ReLU()
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.act(self.stem(x))
        coarse = self.act(self.down(fine))
        return self.fc(coarse.mean((2, 3)))


def test_module_that_is_called_twice_gives_both_taps() -> None:
    network = Reused()
    encoder = TracedEncoder(network)
    assert [(t.module, t.call, t.stride) for t in encoder.recorder.taps] == [
        ("act", 0, 4),
        ("act", 1, 8),
    ]
    _, taps = encoder(images())
    fine = torch.relu(network.stem(images()))
    assert torch.equal(taps[0], fine)
    assert torch.equal(taps[1], torch.relu(network.down(fine)))
    assert encoder.classes == 3


def test_taps_of_the_right_call_whatever_ran_between() -> None:
    encoder = TracedEncoder(Reused())
    encoder.backbone(images())  # outside the encoder the hooks keep nothing
    assert encoder.recorder.maps == {}
    _, first = encoder(images())
    with pytest.raises(RuntimeError):
        encoder(torch.randn(2, 3, 64, 64, dtype=torch.float64))  # wrong dtype: fails midway
    _, second = encoder(images())
    assert torch.equal(first[1], second[1])


def test_auxiliary_heads_are_ignored_in_train_mode() -> None:
    network = torchvision.models.googlenet(num_classes=5, init_weights=False)
    assert network.aux1 is not None
    encoder = TracedEncoder(network).train()
    logits, taps = encoder(images((64, 64)))
    assert logits.shape == (2, 5)
    assert len(taps) == 4
    logits.sum().backward()
    assert network.fc.weight.grad is not None
    assert all(parameter.grad is None for parameter in network.aux1.parameters())


def test_discovery_leaves_the_network_and_the_random_state_as_they_were() -> None:
    network = torchvision.models.mobilenet_v3_small(num_classes=5)
    network.features[3].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    state = torch.get_rng_state()
    discover_taps(network)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in network.modules())


# What training does with encoders

KINDS = ["resnet18", "compact", "mobilenet_v3_small"]


@pytest.mark.parametrize("name", KINDS)
def test_train_mode_updates_statistics_once_and_gradients_reach_logits_and_taps(name: str) -> None:
    encoder = build_encoder(name, classes=5).train()
    norm = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked is not None
    logits, taps = encoder(images())
    assert norm.num_batches_tracked.item() == 1
    (logits.sum() + sum(tap.sum() for tap in taps)).backward()
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.eval()(images())
    assert norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize("name", KINDS)
def test_deep_copy_is_independent(name: str) -> None:
    encoder = build_encoder(name, classes=5).eval()
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        logits, taps = encoder(images())
        other_logits, other_taps = twin(images())
        again, taps_again = encoder(images())
    assert torch.equal(logits, again)
    assert all(torch.equal(a, b) for a, b in zip(taps, taps_again, strict=True))
    assert not torch.equal(logits, other_logits)
    assert not any(torch.equal(a, b) for a, b in zip(taps, other_taps, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_functional_call_evaluates_a_snapshot(name: str) -> None:
    encoder = build_encoder(name, classes=5).eval()
    snapshot = {k: v.detach().clone() for k, v in encoder.state_dict().items()}
    with torch.no_grad():
        expected, expected_taps = encoder(images())
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    batch = images().requires_grad_()
    logits, taps = torch.func.functional_call(encoder, snapshot, (batch,))
    assert torch.equal(logits, expected)
    assert torch.equal(taps[-1], expected_taps[-1])
    logits.sum().backward()
    assert batch.grad is not None
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_compiles_into_one_graph(name: str) -> None:
    encoder = build_encoder(name, classes=5).eval()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    for _ in range(2):
        logits, taps = encoder(images())
        compiled_logits, compiled_taps = compiled(images())
        assert torch.equal(logits, compiled_logits)
        assert all(torch.equal(a, b) for a, b in zip(taps, compiled_taps, strict=True))


@pytest.mark.parametrize("size", [(65, 97), (33, 64), (224, 160)])
@pytest.mark.parametrize("name", KINDS)
def test_any_size(name: str, size: tuple[int, int]) -> None:
    encoder = build_encoder(name, classes=5).eval()
    logits, taps = encoder(images(size))
    assert logits.shape == (2, 5)
    for tap, stride in zip(taps, encoder.tap_strides, strict=True):
        assert tap.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


# Weights


def resnet18_weights(folder: Path, classes: int = 5) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(3)
    state = torchvision.models.resnet18(num_classes=classes).state_dict()
    path = folder / "weights.pth"
    torch.save(state, path)
    return path, state


def assert_loaded(encoder: Encoder, state: dict[str, Tensor]) -> None:
    loaded = encoder.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_weights_from_every_kind_of_file(tmp_path: Path) -> None:
    path, state = resnet18_weights(tmp_path)
    assert_loaded(build_encoder("resnet18", classes=5, weights=path), state)
    assert_loaded(build_encoder("resnet18", classes=5, weights=str(path)), state)
    save_file(state, tmp_path / "weights.safetensors")
    assert_loaded(
        build_encoder("resnet18", classes=5, weights=tmp_path / "weights.safetensors"), state
    )
    parallel = {"epoch": 9, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(parallel, tmp_path / "checkpoint.pth.tar")
    assert_loaded(
        build_encoder("resnet18", classes=5, weights=tmp_path / "checkpoint.pth.tar"), state
    )


def test_weights_from_before_step_counters(tmp_path: Path) -> None:
    path, state = resnet18_weights(tmp_path)
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, path)
    assert_loaded(build_encoder("resnet18", classes=5, weights=path), old)


def test_named_weights_come_from_torchvisions_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state = resnet18_weights(tmp_path, classes=1000)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(state, cache / "resnet18-f37072fd.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert_loaded(build_encoder("resnet18", weights="imagenet"), state)
    assert_loaded(build_encoder("resnet18", weights="IMAGENET1K_V1"), state)


def test_weights_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        build_encoder("resnet18", weights="imagenet")
    assert str(error.value) == (
        "build_encoder: expected the weights 'imagenet' of resnet18 in the cache or from the "
        "network, got OSError: no route; download them elsewhere and pass the path of the file"
    )


def test_head_of_other_classes_keeps_its_initialisation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, state = resnet18_weights(tmp_path, classes=1000)
    with caplog.at_level(logging.WARNING):
        encoder = build_encoder("resnet18", classes=5, weights=path)
    body = {k: v for k, v in state.items() if not k.startswith("fc.")}
    assert_loaded(encoder, body)
    assert caplog.messages == [
        "resnet18: fc.weight has 1000 entries in the weights and 5 here; it keeps its random "
        "initialisation",
        "resnet18: fc.bias has 1000 entries in the weights and 5 here; it keeps its random "
        "initialisation",
    ]


def test_weights_of_another_network(tmp_path: Path) -> None:
    path, _ = resnet18_weights(tmp_path)
    with pytest.raises(ValueError, match="resnet34") as error:
        build_encoder("resnet34", classes=5, weights=path)
    assert str(error.value) == (
        "build_encoder: expected weights of resnet34, got 80 tensors missing (first: "
        f"layer1.2.conv1.weight) in {path}; choose the network that they were saved from"
    )
    with pytest.raises(ValueError, match="of another shape"):
        build_encoder("wide_resnet50_2", classes=5, weights=path)


def test_weights_that_are_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="damaged") as error:
        build_encoder("resnet18", weights=path)
    assert str(error.value) == (
        "build_encoder: expected `weights` to be a state dict, got a damaged or foreign file in "
        f"{path}"
    )
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="list") as error:
        build_encoder("resnet18", weights=path)
    assert str(error.value) == (
        "build_encoder: expected `weights` to be a state dict, got list with other contents in "
        f"{path}"
    )


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_weights_never_run_code(tmp_path: Path) -> None:
    path, target = tmp_path / "weights.pth", tmp_path / "touched"
    torch.save({"state_dict": Trap(target)}, path)
    with pytest.raises(ValueError, match="other than tensors") as error:
        build_encoder("resnet18", weights=path)
    assert str(error.value) == (
        "build_encoder: expected `weights` to be a state dict, got contents other than tensors, "
        f"which were not run in {path}"
    )
    assert not target.exists()


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: build_encoder("resnet5O"),
            ValueError,
            "build_encoder: expected `name` to be 'compact', a classifier of torchvision or "
            "'timm/<name>', got 'resnet5O': did you mean resnet50 or resnet152 or resnet34?",
        ),
        (
            lambda: build_encoder("#"),
            ValueError,
            "build_encoder: expected `name` to be 'compact', a classifier of torchvision or "
            "'timm/<name>', got '#': resnet50 is the paper's",
        ),
        (
            lambda: build_encoder("resnet18", classes=0),
            ValueError,
            "build_encoder: expected `classes` of at least 1, got 0",
        ),
        (
            lambda: build_encoder("vgg11", finest_stride=3),
            ValueError,
            "build_encoder: expected `finest_stride` to be a power of two, got 3",
        ),
        (
            lambda: build_encoder("resnet18", weights="none.pth"),
            FileNotFoundError,
            "build_encoder: expected `weights` to be 'imagenet', a name of torchvision's weights "
            "or the path of a file, got 'none.pth', which does not exist",
        ),
        (
            lambda: build_encoder("compact", classes=8)(torch.zeros(3, 64, 64)),
            ValueError,
            "Encoder: expected `images` of shape [B, 3, H, W], got [3, 64, 64]",
        ),
        (
            lambda: TracedEncoder(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))),
            ValueError,
            "discover_taps: expected Sequential to classify images of 224x224, got RuntimeError: "
            "Given groups=1, weight of size [8, 4, 3, 3], expected input[1, 3, 224, 224] to have 4 "
            "channels, but got 3 channels instead",
        ),
        (
            lambda: TracedEncoder(
                nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 2, 2), nn.ReLU(),
                              nn.Conv2d(8, 2, 1))
            ),
            ValueError,
            "discover_taps: expected Sequential to give logits [B, K], got an output of shape "
            "[1, 2, 28, 28]",
        ),
    ],
)  # fmt: skip
def test_errors(call: object, error: type[Exception], message: str) -> None:
    assert callable(call)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_timm_name_that_does_not_exist() -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(ValueError, match="resnetto") as error:
        build_encoder("timm/resnetto")
    assert str(error.value) == (
        f"build_encoder: expected `name` to be a network of timm {timm.__version__}, got "
        f"'timm/resnetto': Unknown model (resnetto)"
    )


def test_timm_is_only_needed_for_its_own_names() -> None:
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from casm_fast.models import build_encoder\n"
        "build_encoder('compact', classes=8)\n"
        "try: build_encoder('timm/resnet18d')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == (
        "build_encoder: expected timm for 'timm/resnet18d', got an environment without it; "
        "pip install timm"
    )


def test_description_in_print() -> None:
    text = repr(build_encoder("compact", classes=8))
    assert "name='compact', classes=8, taps=(16 at 1/2, 16 at 1/2, 32 at 1/4" in text
    assert isinstance(build_encoder("compact"), ResNetEncoder)
