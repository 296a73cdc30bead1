"""Checkpoints: round trips, crashes while writing, and every way in which a file can be wrong."""

from __future__ import annotations

import copy
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import casm_fast.models.checkpoint as checkpoint
from casm_fast.models import (
    Decoder,
    SaliencyModel,
    TracedEncoder,
    build_encoder,
    build_model,
    fingerprint,
    load,
    save,
)


def images(size: tuple[int, int] = (64, 64)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> SaliencyModel:
    torch.manual_seed(0)
    return build_model("compact", classes=["a", "b", "c"], width=8)


def header(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as handle:
        return json.loads(handle.metadata()["casm_fast"])


# Round trips


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "compact"},
        {"backbone": "compact", "shared": False},
        {"backbone": "compact", "tap_indices": (3, 4), "width": 8},
        {"backbone": "compact", "tap0_projection": True, "input_size": 96},
        {"backbone": "resnet18", "resize_policy": "squash"},
        {"backbone": "mobilenet_v3_small", "finest_stride": 2, "mean": (0, 0, 0), "std": (1, 1, 2)},
    ],
)
def test_round_trip(options: dict[str, object], tmp_path: Path) -> None:
    model = build_model(classes=["x", "ÿ"], **options)
    model(images())  # moves the running statistics away from their defaults
    path = save(model, tmp_path / "new" / "m.safetensors", extra={"epochs": 3, "log": [1.5]})
    again = load(path)
    assert not again.training
    assert again.extra == {"epochs": 3, "log": [1.5]}
    for name in ("classes", "input_size", "resize_policy", "mean", "std", "shared"):
        assert getattr(again, name) == getattr(model, name), name
    assert again.decoder.description() == model.decoder.description()
    for got, want in zip(again(images()), model.eval()(images()), strict=True):
        assert torch.equal(got, want)
    assert fingerprint(again) == fingerprint(model)
    assert path == tmp_path / "new" / "m.safetensors"


def test_extra_stays_unless_replaced(model: SaliencyModel, tmp_path: Path) -> None:
    path = save(model, tmp_path / "m.safetensors", extra={"epoch": 1})
    again = load(path)
    save(again, path)
    assert load(path).extra == {"epoch": 1}
    save(again, path, extra={})
    assert load(path).extra == {}


def test_folder_of_a_run(model: SaliencyModel, tmp_path: Path) -> None:
    assert save(model, tmp_path) == tmp_path / "model.safetensors"
    assert fingerprint(load(tmp_path)) == fingerprint(model)
    assert fingerprint(load(str(tmp_path))) == fingerprint(model)


def test_shared_weights_are_stored_once_and_others_can_read_them(
    model: SaliencyModel, tmp_path: Path
) -> None:
    path = save(model, tmp_path / "m.safetensors")
    tensors = load_file(path)
    assert set(tensors) == set(model.state_dict())
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert size < path.stat().st_size < size + 40_000
    # The classifier alone starts another model.
    encoder = build_encoder("compact", classes=3, weights=path)
    assert torch.equal(encoder(images())[0], model.train().classifier(images())[0])


def test_half_precision_keeps_its_dtype(model: SaliencyModel, tmp_path: Path) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    again = load(save(half, tmp_path / "m.safetensors"))
    assert again.decoder.final.weight.dtype == torch.bfloat16
    assert fingerprint(again) == fingerprint(half)


def test_strides_of_the_weights_do_not_matter(model: SaliencyModel, tmp_path: Path) -> None:
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert fingerprint(other) == fingerprint(model)
    assert fingerprint(load(save(other, tmp_path / "m.safetensors"))) == fingerprint(model)


def test_loading_leaves_the_random_state(model: SaliencyModel, tmp_path: Path) -> None:
    path = save(model, tmp_path / "m.safetensors")
    state = torch.get_rng_state()
    load(path)
    assert torch.equal(state, torch.get_rng_state())


def test_renormalising_inception_remembers_it(tmp_path: Path) -> None:
    classifier = build_encoder("compact", classes=3)
    classifier.backbone.transform_input = True
    model = SaliencyModel(classifier, Decoder(classifier.tap_channels, width=8))
    again = load(save(model, tmp_path / "m.safetensors"))
    assert again.classifier.backbone.transform_input is True


# Fingerprint


def test_fingerprint_sees_weights_and_description_only(model: SaliencyModel) -> None:
    original = fingerprint(model)
    assert re.fullmatch(r"[0-9a-f]{64}", original)
    twin = copy.deepcopy(model).eval()
    twin.extra = {"note": "other"}
    assert fingerprint(twin) == original
    with torch.no_grad():
        twin.decoder.final.bias[0] += 1e-3
    assert fingerprint(twin) != original
    renamed = copy.deepcopy(model)
    renamed.classes = ("a", "b", "d")
    assert fingerprint(renamed) != original
    moved = copy.deepcopy(model)
    moved.classifier.backbone.bn1.running_mean[0] += 1
    assert fingerprint(moved) != original


# Writing


def test_a_crash_while_writing_leaves_the_old_file(
    model: SaliencyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(model, tmp_path / "m.safetensors")
    old = path.read_bytes()

    def crash(*_: object) -> None:
        raise OSError("power")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, call, crash)
            with pytest.raises(OSError, match="power"):
                save(model, path, extra={"epoch": 2})
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == ["m.safetensors"]


def test_writing_is_flushed_before_and_after_the_name_changes(
    model: SaliencyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path else "file"
        events.append(f"fsync {kind}")
        fsync(descriptor)

    def watched_replace(source: Path, target: Path) -> None:
        assert source.parent == target.parent
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", watched_fsync)
    monkeypatch.setattr(checkpoint.os, "replace", watched_replace)
    save(model, tmp_path / "m.safetensors")
    assert events == ["fsync file", "replace", "fsync folder"]


def test_saving_refuses(model: SaliencyModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="end on") as error:
        save(model, "m.pt")
    assert str(error.value) == "save: expected `path` to end on .safetensors, got m.pt"
    with pytest.raises(TypeError) as type_error:
        save(model, tmp_path / "m.safetensors", extra={"when": Path()})
    assert str(type_error.value) == (
        "save: expected `extra` of JSON values, got one that is not: Object of type PosixPath is "
        "not JSON serializable"
    )
    own = TracedEncoder(
        nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 2, 2), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten(), nn.Linear(4, 2))
    )  # fmt: skip
    with pytest.raises(ValueError, match="caller's own") as error:
        save(SaliencyModel(own, Decoder(own.tap_channels)), tmp_path / "m.safetensors")
    assert str(error.value) == (
        "save: expected encoders from build_encoder, which load can build again, got a Sequential "
        "of the caller's own; save its state dict instead"
    )
    assert list(tmp_path.iterdir()) == []


# Files that are wrong


def missing(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    return path, (
        "load: expected a checkpoint file or the folder of a training run, got {path}, which does "
        "not exist"
    )


def empty_folder(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    return path.parent, (
        "load: expected the folder of a training run with model.safetensors, got {path}, which has "
        "none"
    )


def truncated(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    save(model, path)
    path.write_bytes(path.read_bytes()[:-100])
    return path, DAMAGED.replace("{reason}", r"Error while deserializing header: .*")


def cut_in_the_header(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    save(model, path)
    path.write_bytes(path.read_bytes()[:500])
    return path, DAMAGED.replace("{reason}", r"Error while deserializing header: .*")


def foreign(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    torch.save(model.state_dict(), path)
    return path, DAMAGED.replace("{reason}", r"Error while deserializing header: .*")


def empty(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    path.touch()
    return path, DAMAGED.replace("{reason}", r".*")


def bare_weights(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    save_file(model.state_dict(), path)
    return path, (
        "load: expected a checkpoint of casm_fast, got a safetensors file of another origin in "
        "{path}; the weights of a classifier alone are read by build_encoder(weights=…)"
    )


def newer(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    rewrite(path, model, lambda d: d.update(format=2, surprise=None))
    return path, (
        "load: expected a checkpoint of format 1 or older, got format 2 in {path}; upgrade "
        "casm_fast"
    )


def description_is_no_json(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    save_file(model.state_dict(), path, metadata={"casm_fast": "{"})
    return path, DESCRIPTION


def description_is_a_list(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    save_file(model.state_dict(), path, metadata={"casm_fast": "[]"})
    return path, DESCRIPTION


def description_lacks_a_key(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    rewrite(path, model, lambda d: d.pop("input_size"))
    return path, DESCRIPTION


def description_has_a_wrong_type(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    rewrite(path, model, lambda d: d.update(classifier="compact"))
    return path, DESCRIPTION


def another_architecture(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    rewrite(path, model, lambda d: d["decoder"].update(width=4, tap_indices=[0, 4]))
    return path, (
        "load: expected the weights of the compact model that the file describes, got 18 unknown "
        "(first: decoder.projections.1.0.weight) and 6 of another shape (first: "
        "decoder.projections.4.0.weight, [8, 128, 1, 1] instead of [4, 128, 1, 1]) in {path}"
    )


def missing_tensors(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    rewrite(path, model, lambda d: d["decoder"].update(tap0_projection=True))
    return path, (
        "load: expected the weights of the compact model that the file describes, got 5 tensors "
        "missing (first: decoder.projections.0.0.weight) and 1 of another shape (first: "
        "decoder.final.weight, [1, 48, 3, 3] instead of [1, 40, 3, 3]) in {path}"
    )


def other_library(path: Path, model: SaliencyModel) -> tuple[Path, str]:
    rewrite(path, model, lambda d: d["classifier"].update(tap_channels=[1, 2]))
    return path, (
        "load: expected taps of [1, 2] channels in compact, got [16, 16, 32, 64, 128] from the "
        "installed library for {path}; install the version of it that the model was trained with"
    )


def rewrite(
    path: Path, model: SaliencyModel, change: Callable[[dict[str, object]], object]
) -> None:
    description = header(save(model, path))
    change(description)
    save_file(model.state_dict(), path, metadata={"casm_fast": json.dumps(description)})


DAMAGED = (
    "load: expected a checkpoint in the safetensors format, got a damaged, truncated or foreign "
    "file in {path} ({reason}); a .chk file of the CASM authors is read by import_casme"
)
DESCRIPTION = (
    "load: expected a complete description of a model in the header, got a damaged one in {path}"
)


@pytest.mark.parametrize(
    "make",
    [
        missing,
        empty_folder,
        truncated,
        cut_in_the_header,
        foreign,
        empty,
        bare_weights,
        newer,
        description_is_no_json,
        description_is_a_list,
        description_lacks_a_key,
        description_has_a_wrong_type,
        another_architecture,
        missing_tensors,
        other_library,
    ],
)
def test_wrong_files(
    make: Callable[[Path, SaliencyModel], tuple[Path, str]], model: SaliencyModel, tmp_path: Path
) -> None:
    path, message = make(tmp_path / "m.safetensors", model)
    kind = FileNotFoundError if make in (missing, empty_folder) else ValueError
    pattern = "".join(
        {"{path}": re.escape(str(path))}.get(part, part if ".*" in part else re.escape(part))
        for part in re.split(r"(\{path\}|Error while deserializing header: \.\*|\.\*)", message)
    )
    with pytest.raises(kind, match=f"^{pattern}$"):
        load(path)


def test_a_header_that_claims_terabytes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
    with pytest.raises(ValueError, match="damaged, truncated or foreign"):
        load(path)
