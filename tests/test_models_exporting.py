"""Models for other programs: the same numbers as in eager mode, for batches of any size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from casm_fast import ops
from casm_fast.models import (
    build_model,
    compile_program,
    export_onnx,
    export_program,
    fingerprint,
    load,
)
from casm_fast.models.exporting import DESCRIPTION, Program
from casm_fast.models.saliency import SaliencyModel

CLASSES = ("cat", "dog", "zebra")


def made(backbone: str = "compact", **options: Any) -> SaliencyModel:
    torch.manual_seed(0)
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    model = build_model(backbone, classes=CLASSES, input_size=32, **statistics, **options)
    for module in model.modules():  # statistics that are not those of a new model
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.train()


def eager(model: SaliencyModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own answer, normalisation by hand."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    model.eval()
    with torch.no_grad():
        answer = model((images - mean[:, None, None]) / std[:, None, None])
    model.train()
    return answer


@pytest.mark.parametrize(("backbone", "boxes"), [("compact", True), ("resnet18", False)])
def test_a_torch_export_program(backbone: str, boxes: bool, tmp_path: Path) -> None:
    model = made(backbone, shared=not boxes)
    path = export_program(model, tmp_path / "new" / "model.pt2", boxes=boxes)
    assert [file.name for file in path.parent.iterdir()] == ["model.pt2"]
    assert all(module.training for module in model.modules())
    extra = {DESCRIPTION: ""}
    program = torch.export.load(path, extra_files=extra).module()
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 32, 32)
        with torch.no_grad():
            saliency, logits, *found = program(images)
        expected = eager(model, images)
        # The same kernels: no difference where the normalisation rounds as the program's.
        torch.testing.assert_close(saliency, expected[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(logits, expected[1], rtol=0, atol=1e-5)
        assert len(found) == 2 * boxes
        if boxes:
            for got, wanted in zip(found, ops.mask_boxes(saliency), strict=True):
                assert got.dtype == torch.int32
                assert torch.equal(got, wanted)
    description = json.loads(extra[DESCRIPTION])
    assert description["fingerprint"] == fingerprint(model)
    assert description["classes"] == list(CLASSES)
    assert (description["input_size"], description["resize_policy"]) == (32, "crop")
    assert description["outputs"] == ["saliency", "logits", "boxes", "area"][: 2 + 2 * boxes]


def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs casm_fast[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs casm_fast[onnx]")
    pytest.importorskip("onnxscript", reason="needs casm_fast[onnx]")
    model = made()
    path = export_onnx(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert model.training
    content = onnx.load(path)
    onnx.checker.check_model(content, full_check=True)
    properties = {entry.key: entry.value for entry in content.metadata_props}
    description = json.loads(properties["casm_fast"])
    assert description["fingerprint"] == fingerprint(model)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == ["saliency", "logits"]
    for count in (1, 4):
        images = torch.rand(count, 3, 32, 32)
        saliency, logits = session.run(None, {"images": images.numpy()})
        expected = eager(model, images)
        # Another library, other sums: 2.7e-6 and 4.8e-7 at most here.
        np.testing.assert_allclose(saliency, expected[0], atol=1e-4)
        np.testing.assert_allclose(logits, expected[1], atol=1e-4)


@pytest.mark.skipif(
    "CASM_FAST_TEST_AOT" not in os.environ,
    reason="compiling takes a minute: set CASM_FAST_TEST_AOT=1",
)
@pytest.mark.parametrize("boxes", [False, True])
def test_a_compiled_program(boxes: bool, tmp_path: Path) -> None:
    model = made()
    path = compile_program(model, tmp_path / "model.pt2", boxes=boxes)
    program = torch._inductor.aoti_load_package(str(path))
    for count in (1, 5):
        images = torch.rand(count, 3, 32, 32)
        found = program(images)
        expected = eager(model, images)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)
        if boxes:
            assert torch.equal(found[2], ops.mask_boxes(found[0])[0])


def test_the_program_is_what_is_exported() -> None:
    model = made().eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        plain, boxed = Program(model)(images), Program(model, boxes=True)(images)
    assert (len(plain), len(boxed)) == (2, 4)
    assert torch.equal(plain[0], boxed[0])
    assert set(Program(model).state_dict()) == {f"model.{key}" for key in model.state_dict()}


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    for function, suffix in (
        (export_program, ".pt2"),
        (compile_program, ".pt2"),
        (export_onnx, ".onnx"),
    ):
        with pytest.raises(ValueError) as caught:
            function(model, tmp_path / "x.bin")
        assert str(caught.value) == (
            f"{function.__name__}: expected `path` to end on {suffix}, got {tmp_path}/x.bin"
        )
    from casm_fast.models import exporting

    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as missing:
        export_onnx(model, tmp_path / "x.onnx")
    assert str(missing.value) == (
        "export_onnx: expected the package onnx, but it is not installed: "
        "pip install 'casm_fast[onnx]'"
    )
    assert list(tmp_path.iterdir()) == []


# --- the hub --------------------------------------------------------------------------------------


def test_a_folder_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="needs casm_fast[hub]")
    from casm_fast.models.hub import HubModel

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = made(shared=False).eval()
    model.extra = {"note": 1}
    shared = HubModel.of(model)
    assert shared.classifier is model.classifier
    assert not shared.training
    shared.save_pretrained(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    again = HubModel.from_pretrained(tmp_path / "model")
    assert isinstance(again, SaliencyModel)
    assert not again.training
    assert again.extra == {"note": 1}
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        for got, expected in zip(again(images), model(images), strict=True):
            assert torch.equal(got, expected)
    assert fingerprint(again) == fingerprint(model) == fingerprint(load(tmp_path / "model"))
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["casm_fast"]["classes"] == list(CLASSES)
    card = (tmp_path / "model/README.md").read_text()
    assert "library_name: casm_fast" in card
    assert "license: bsd-3-clause" in card

    with pytest.raises(TypeError) as caught:
        HubModel.from_pretrained(tmp_path / "model", width=3)
    assert str(caught.value) == (
        "from_pretrained: expected no arguments of the model, which its checkpoint holds, got width"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        HubModel.from_pretrained(tmp_path / "empty")


def test_a_repository_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="needs casm_fast[hub]")
    from casm_fast.models import hub, save

    file = save(made(), tmp_path / "model.safetensors")
    asked = []

    def fetch(*place: str, **options: Any) -> str:
        asked.append((place, options["revision"]))
        return str(file)

    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = hub.HubModel._from_pretrained(model_id="owner/name", revision="v1")
    assert asked == [(("owner/name", "model.safetensors"), "v1")]
    assert fingerprint(model) == fingerprint(load(file))
