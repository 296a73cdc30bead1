"""Masks for photos, folders and data sets: files, resume, and the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import casm_fast
from casm_fast import cli
from casm_fast.data.synthetic import generate, write_tree
from casm_fast.data.transforms import normalize
from casm_fast.models import checkpoint, open_classifier
from casm_fast.models.saliency import build_model
from casm_fast.perturbation import PerturbConfig, folder, perturb_set


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint, a folder of pictures with one that is none, and a labelled tree."""
    root = tmp_path_factory.mktemp("perturb")
    torch.manual_seed(0)
    val = generate(5, size=32, classes=3, seed=4)
    model = build_model("compact", classes=val.classes, input_size=32)
    checkpoint.save(model, root / "model.safetensors")
    (root / "photos").mkdir()
    for index in range(4):
        Image.fromarray(val.image(index)).save(root / "photos" / f"{index}.png")
    (root / "photos" / "broken.png").write_bytes(b"no picture")
    write_tree(root / "tree", None, val, layout="folders")
    return root


QUICK = PerturbConfig(steps=2, initial="constant", mask_size=(8, 8))


def test_a_folder_gets_rows_masks_and_figures(place: Path, tmp_path: Path) -> None:
    classifier = open_classifier(place / "model.safetensors")
    made = perturb_set(
        classifier, place / "photos", tmp_path / "out", QUICK, device="cpu", progress=False
    )
    assert made.done == len(made.rows) == 5
    rows = {row["image_id"]: row for row in made.rows}
    assert rows.pop("broken.png")["error"]
    assert str(made).endswith(", 1 unreadable")
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["steps"] == 2

    pictures = [np.asarray(Image.open(place / "photos" / f"{n}.png")) for n in range(4)]
    images = normalize(torch.from_numpy(np.stack(pictures)), classifier.mean, classifier.std)
    expected = casm_fast.perturb(classifier.network, images, None, QUICK)
    for number in range(4):
        row = rows[f"{number}.png"]
        assert row["score_after"] == pytest.approx(float(expected.score_after[number]), abs=1e-5)
        assert row["names"] == [classifier.classes[row["targets"][0]]]
        mask = np.load(tmp_path / "out" / "images" / f"{number}.png.npy")
        assert np.abs(mask - expected.masks[number, 0].numpy()).max() < 1e-4
        with Image.open(tmp_path / "out" / "images" / f"{number}.png.png") as figure:
            assert figure.width > 600


def test_goes_on_where_it_stopped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = open_classifier(place / "model.safetensors")
    options = {"figures": False, "progress": False}
    one = PerturbConfig(steps=2, initial="constant", batch_size=1)
    asked: list[int] = []
    whole = folder.perturb

    def stops(network: object, images: torch.Tensor, *rest: object) -> object:
        asked.append(len(images))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(network, images, *rest)

    monkeypatch.setattr(folder, "perturb", stops)
    with pytest.raises(KeyboardInterrupt):
        perturb_set(classifier, place / "photos", tmp_path, one, **options)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"image_id": "2.p')  # cut by the interruption
    again = perturb_set(classifier, place / "photos", tmp_path, one, **options)
    assert again.done == 3
    assert [row["image_id"] for row in again.rows] == [f"{n}.png" for n in range(4)] + [
        "broken.png"
    ]
    assert asked == [1] * 5
    assert perturb_set(classifier, place / "photos", tmp_path, one, **options).done == 0

    changed = PerturbConfig(steps=3, initial="constant", batch_size=2)
    with pytest.raises(ValueError) as caught:
        perturb_set(classifier, place / "photos", tmp_path, changed, **options)
    assert str(caught.value) == (
        f"output: expected a folder of the same settings, got {tmp_path} with steps 2 instead "
        "of 3; give another folder"
    )


def test_targets(place: Path, tmp_path: Path) -> None:
    classifier = open_classifier(place / "model.safetensors")
    tree, options = f"folder:{place / 'tree' / 'val'}", {"figures": False, "progress": False}
    made = perturb_set(classifier, tree, tmp_path / "a", QUICK, target="label", **options)
    source = casm_fast.data.open_source(tree)
    labels = {source.image_id(n): [source.label(n)] for n in range(len(source))}
    assert {row["image_id"]: row["targets"] for row in made.rows} == labels
    assert len({label[0] for label in labels.values()}) == 3
    renamed = dataclasses.replace(classifier, classes=tuple(reversed(source.classes)))
    made = perturb_set(renamed, tree, tmp_path / "n", QUICK, target="label", **options)
    assert {row["image_id"]: [2 - row["targets"][0]] for row in made.rows} == labels
    fewer = dataclasses.replace(classifier, classes=("a", "b"))
    with pytest.raises(ValueError) as caught:
        perturb_set(fewer, tree, tmp_path / "f", QUICK, target="label", **options)
    assert str(caught.value) == (
        "target: expected the 2 classes of the classifier for 'label', got 3 with other names; "
        "ask for 'predicted' or a class"
    )
    two = perturb_set(classifier, tree, tmp_path / "b", QUICK, target=2, **options)
    assert {row["targets"][0] for row in two.rows} == {2}
    with pytest.raises(ValueError) as caught:
        perturb_set(classifier, place / "photos", tmp_path / "c", QUICK, target="label", **options)
    assert str(caught.value) == (
        f"target: expected labelled images for 'label', got folder:{place / 'photos'} without; "
        "ask for 'predicted' or a class"
    )
    with pytest.raises(ValueError) as caught:
        perturb_set(classifier, tree, tmp_path / "d", QUICK, target="best", **options)
    assert str(caught.value) == (
        "target: expected 'predicted', 'label' or the number of a class, got 'best'"
    )


def test_architectures_by_name() -> None:
    classifier = open_classifier("squeezenet1_1", weights=None, classes=7, size=96)
    assert classifier.network(torch.zeros(1, 3, 96, 96)).shape == (1, 7)
    assert (classifier.size, classifier.policy, classifier.classes) == (96, "crop", ())
    with pytest.raises(ValueError, match="did you mean googlenet"):
        open_classifier("googlnet", weights=None)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, model = place / "photos" / "0.png", place / "model.safetensors"
    words = ("perturb", photo, "--model", model, "--steps", "2", "--mask-size", "6", "7")
    code, out, _ = run(capsys, *words, "-o", tmp_path / "one")
    assert code == 0
    assert out.startswith(f"1 images, 1 of them now -> {tmp_path / 'one'}: score ")
    assert np.load(tmp_path / "one" / "images" / "0.png.npy").shape == (6, 7)
    with Image.open(tmp_path / "one" / "images" / "0.png.png") as figure:
        assert figure.width > 600

    code, _, err = run(
        capsys, *words, "-o", tmp_path / "two", "--preset", "layers", "--layer", "layer22"
    )
    assert code == 1
    assert "layer: expected the name of a module, got 'layer22'; near it: layer2" in err
    code, _, _ = run(
        capsys, *words, "-o", tmp_path / "three", "--preset", "layers", "--layer", "layer2"
    )
    assert code == 0
    settings = json.loads((tmp_path / "three" / "settings.json").read_text())
    assert (settings["perturbation"], settings["jitter"], settings["steps"]) == ("constant", 0, 2)
    assert (tmp_path / "three" / "images" / "0.png.png").exists()

    code, _, err = run(capsys, "perturb", tmp_path / "none.jpg", "--model", model)
    assert code == 1
    assert f"there is no {tmp_path / 'none.jpg'}" in err
    code, _, err = run(capsys, *words, "--lambda-l1", "-1", "-o", tmp_path / "four")
    assert code in (1, 2)
    assert "lambda_l1: expected a number of at least 0, got -1" in err
    assert "Traceback" not in err
