"""The authors' checkpoint format: a file as they write it, round trips, refusals."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from casm_fast.models import SaliencyModel, build_model, export_casme, fingerprint, import_casme


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class AuthorsDecoder(nn.Module):
    """A decoder with the authors' state-dict names and fixed factors, written independently."""

    def __init__(
        self, channels: tuple[int, ...], layers: tuple[int, ...] = (0, 1, 2, 3, 4)
    ) -> None:
        super().__init__()
        self.layers = layers
        total = 0
        for index in layers:
            total += channels[0] if index == 0 else 64
            if index:
                self.add_module(
                    f"conv1x1_{index}",
                    nn.Sequential(
                        nn.Conv2d(channels[index], 64, 1, bias=False),
                        nn.BatchNorm2d(64),
                        nn.ReLU(),
                        nn.Upsample(
                            scale_factor=2 ** (index - 1), mode="bilinear", align_corners=False
                        ),
                    ),
                )
        self.final = nn.Sequential(nn.Conv2d(total, 1, 3, padding=1), nn.Sigmoid())

    def forward(self, taps: list[Tensor]) -> Tensor:
        found = [
            taps[0] if index == 0 else self.get_submodule(f"conv1x1_{index}")(taps[index])
            for index in self.layers
        ]
        return self.final(torch.cat(found, 1))


RESNET18 = (64, 64, 128, 256, 512)


def authors_content(
    layers: tuple[int, ...] = (0, 1, 2, 3, 4),
) -> tuple[dict[str, object], nn.Module, AuthorsDecoder]:
    torch.manual_seed(1)
    classifier = torchvision.models.resnet18()
    decoder = AuthorsDecoder(RESNET18, layers)
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    optimiser = torch.optim.Adam(decoder.parameters())
    content = {
        "epoch": 59,
        "state_dict_classifier": classifier.state_dict(),
        "state_dict_decoder": decoder.state_dict(),
        "optimizer_classifier": torch.optim.SGD(classifier.parameters(), 0.1).state_dict(),
        "optimizer_decoder": optimiser.state_dict(),
        "args": argparse.Namespace(hp=0.5, smf=100, adversarial=False, data="/data", pot=None),
    }
    return content, classifier.eval(), decoder.eval()


def authors_result(classifier: nn.Module, decoder: AuthorsDecoder) -> tuple[Tensor, Tensor]:
    net = classifier
    assert isinstance(net, torchvision.models.ResNet)
    taps = [net.maxpool(net.relu(net.bn1(net.conv1(images()))))]
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        taps.append(layer(taps[-1]))
    return decoder(taps), net.fc(F.adaptive_avg_pool2d(taps[-1], 1).flatten(1))


def assert_same_results(
    model: SaliencyModel, classifier: nn.Module, decoder: AuthorsDecoder
) -> None:
    with torch.no_grad():
        saliency, logits = model(images())
        expected, expected_logits = authors_result(classifier, decoder)
    assert torch.equal(logits, expected_logits)
    # The decoder's sum is in another order; worst measured: 1.2e-7.
    torch.testing.assert_close(saliency, expected, rtol=0, atol=5e-6)


def test_a_file_of_the_authors(tmp_path: Path) -> None:
    content, classifier, decoder = authors_content()
    path = tmp_path / "casm.chk"
    torch.save(content, path)
    model = import_casme(path)
    assert not model.training
    assert model.shared
    assert model.classifier.name == "resnet18"
    assert (model.input_size, model.resize_policy) == (224, "crop")
    assert_same_results(model, classifier, decoder)
    assert model.extra == {
        "imported": "casme",
        "epoch": 59,
        "args": {"hp": 0.5, "smf": 100, "adversarial": False, "data": "/data", "pot": None},
    }


def test_a_file_from_before_the_zip_format_without_step_counters(tmp_path: Path) -> None:
    content, classifier, decoder = authors_content()
    for key in ("state_dict_classifier", "state_dict_decoder"):
        state = content[key]
        assert isinstance(state, dict)
        content[key] = {k: v for k, v in state.items() if "num_batches" not in k}
    path = tmp_path / "casm.chk"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert_same_results(import_casme(path), classifier, decoder)


def test_data_parallel_and_the_masker_of_phang(tmp_path: Path) -> None:
    content, classifier, decoder = authors_content(layers=(3, 4))
    for new, old in (
        ("state_dict_classifier", "state_dict_classifier"),
        ("state_dict_masker", "state_dict_decoder"),
    ):
        state = content.pop(old)
        assert isinstance(state, dict)
        content[new] = {f"module.{k}": v for k, v in state.items()}
    content["args"] = {"masker_use_layers": (3, 4), "lr": math.pi}
    path = tmp_path / "ca.chk"
    torch.save(content, path)
    model = import_casme(path)
    assert model.decoder.tap_indices == (3, 4)
    assert_same_results(model, classifier, decoder)
    assert model.extra["args"] == {"masker_use_layers": "(3, 4)", "lr": math.pi}


def test_round_trip(tmp_path: Path) -> None:
    model = build_model("resnet18", classes=9)
    model(images())
    path = export_casme(model, tmp_path / "model.chk")
    again = import_casme(path)
    assert fingerprint(again) == fingerprint(model)
    # As the authors load it: every name, strictly.
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    assert list(content) == [
        "epoch",
        "state_dict_classifier",
        "state_dict_decoder",
        "optimizer_classifier",
        "optimizer_decoder",
        "args",
    ]
    torchvision.models.resnet18(num_classes=9).load_state_dict(content["state_dict_classifier"])
    AuthorsDecoder(RESNET18).load_state_dict(content["state_dict_decoder"])
    assert content["args"].upsample == "nearest"


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"backbone": "compact"}, "compact with {'tap_channels': [16, 16, 32, 64, 128], 'width': "
         "64, 'tap0_projection': False, 'tap_indices': [0, 1, 2, 3, 4]}, shared encoder"),
        ({"backbone": "resnet18", "shared": False}, "resnet18 with {'tap_channels': [64, 64, 128, "
         "256, 512], 'width': 64, 'tap0_projection': False, 'tap_indices': [0, 1, 2, 3, 4]}, "
         "separate encoder"),
        ({"backbone": "resnet18", "width": 32}, "resnet18 with {'tap_channels': [64, 64, 128, "
         "256, 512], 'width': 32, 'tap0_projection': False, 'tap_indices': [0, 1, 2, 3, 4]}, "
         "shared encoder"),
        ({"backbone": "resnet18", "tap_indices": (3, 4)}, "resnet18 with {'tap_channels': [64, 64, "
         "128, 256, 512], 'width': 64, 'tap0_projection': False, 'tap_indices': [3, 4]}, shared "
         "encoder"),
    ],
)  # fmt: skip
def test_models_without_counterpart(options: dict[str, object], got: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^export_casme") as error:
        export_casme(build_model(classes=3, **options), tmp_path / "m.chk")
    assert str(error.value) == (
        "export_casme: expected a shared ResNet-18 to 152 with the default decoder, got "
        f"{got}; use save"
    )
    assert list(tmp_path.iterdir()) == []


# Refusals


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "epoch", "state_dict_decoder"])
def test_code_in_a_file_is_never_run(place: str, zipped: bool, tmp_path: Path) -> None:
    content, *_ = authors_content()
    path, target = tmp_path / "casm.chk", tmp_path / "touched"
    content[place] = argparse.Namespace(trap=Trap(target)) if place == "args" else Trap(target)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="nothing in it was run") as error:
        import_casme(path)
    assert str(error.value) == (
        "import_casme: expected tensors, plain values and an argparse.Namespace, got other "
        f"contents in {path}; nothing in it was run"
    )
    assert not target.exists()


def rejected(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        import_casme(path)
    return str(error.value).replace(str(path), "PATH")


def test_wrong_files(tmp_path: Path) -> None:
    path = tmp_path / "casm.chk"
    assert rejected(path) == (
        "import_casme: expected a checkpoint file, got PATH, which does not exist"
    )
    content, *_ = authors_content()
    torch.save(content, path)
    path.write_bytes(path.read_bytes()[:-2000])
    damaged = (
        "import_casme: expected a file written by torch.save, got a damaged, truncated or foreign "
        "one in PATH"
    )
    assert rejected(path) == damaged
    path.touch()
    path.write_bytes(b"")
    assert rejected(path) == damaged
    torch.save([1], path)
    assert rejected(path) == "import_casme: expected a dictionary, got list in PATH"
    torch.save({"model": {}, "epoch": 3}, path)
    assert rejected(path) == (
        "import_casme: expected the keys state_dict_classifier and state_dict_decoder (or "
        "state_dict_masker), got model, epoch in PATH"
    )
    torch.save({"state_dict_classifier": {"a": 1}, "state_dict_decoder": {}}, path)
    assert rejected(path) == (
        "import_casme: expected the state dicts to hold tensors, got other contents in PATH"
    )


def test_other_layouts(tmp_path: Path) -> None:
    path = tmp_path / "casm.chk"
    content, *_ = authors_content()
    torch.save({**content, "state_dict_classifier": {"conv.weight": torch.zeros(1)}}, path)
    assert rejected(path) == (
        "import_casme: expected the classifier to be a ResNet-18, 34, 50, 101 or 152, got another "
        "network in PATH"
    )
    embedding = {"class_module.embedding.weight": torch.zeros(1000, 64)}
    decoder_state = content["state_dict_decoder"]
    assert isinstance(decoder_state, dict)
    torch.save({**content, "state_dict_decoder": {**decoder_state, **embedding}}, path)
    assert rejected(path) == (
        "import_casme: expected the authors' decoder for resnet18, got 1 unknown (first: "
        "class_module.embedding.weight) in PATH"
    )
    gumbel = {re.sub(r"^final\.0", "final.conv", k): v for k, v in decoder_state.items()}
    torch.save({**content, "state_dict_decoder": gumbel}, path)
    assert rejected(path) == (
        "import_casme: expected the authors' decoder for resnet18, got 2 tensors missing (first: "
        "final.weight) and 2 unknown (first: final.conv.weight) in PATH"
    )
    torch.save({**content, "state_dict_decoder": {}}, path)
    assert rejected(path).startswith("import_casme: expected the authors' decoder for resnet18")
