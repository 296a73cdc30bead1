"""Maps for photos, folders and data sets: files, resume, and the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import casm_fast
from casm_fast import cli
from casm_fast.attribution import METHODS, attribute_set, comparison, shade
from casm_fast.data.synthetic import generate, write_tree
from casm_fast.data.transforms import normalize, resize
from casm_fast.models import checkpoint, open_classifier
from casm_fast.models.saliency import build_model

CLASSES = 3
CHEAP = ("gradient", "centre")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attributed")
    source = generate(5, size=32, classes=CLASSES, split="val")
    write_tree(folder / "tree", None, source, layout="flat")
    torch.manual_seed(0)
    model = build_model("compact", classes=CLASSES, input_size=32)
    checkpoint.save(model.eval(), folder / "model.safetensors")
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_maps_are_those_of_attribute(place: Path, tmp_path: Path) -> None:
    classifier = open_classifier(place / "model.safetensors")
    images = place / "tree" / "val"
    options: dict[str, Any] = {"target": 1, "progress": False, "device": "cpu"}
    made = attribute_set(classifier, f"folder:{images}", tmp_path, CHEAP, **options)
    assert made.done == 5
    assert list(made.rows) == rows_of(tmp_path)
    assert str(made) == f"5 images, 5 of them now -> {tmp_path}"
    file = sorted(images.iterdir())[0]
    with Image.open(file) as picture:
        seen = resize(np.asarray(picture.convert("RGB")), 32, "crop")
    pixels = normalize(torch.from_numpy(seen.copy())[None], classifier.mean, classifier.std)
    stored = np.load(tmp_path / "images" / f"{file.name}.npz")
    for method in CHEAP:
        expected = casm_fast.attribute(method, classifier.network, pixels, 1)[0, 0].numpy()
        assert np.abs(stored[method] - expected).max() <= 1e-5 * np.abs(expected).max()
        y, x = np.unravel_index(stored[method].argmax(), (32, 32))
        assert made.rows[0]["peaks"][method] == [x, y]
    assert (tmp_path / "images" / f"{file.name}.png").stat().st_size > 1000


def test_a_run_s_own_saliency_is_a_method(place: Path, tmp_path: Path) -> None:
    classifier = open_classifier(place / "model.safetensors")
    source = f"folder:{place / 'tree' / 'val'}"
    made = attribute_set(classifier, source, tmp_path, ["casm"], figures=False, progress=False)
    assert made.done == 5
    assert all({*row["peaks"]} == {"casm"} for row in made.rows)


def test_goes_on_behind_the_last_row(place: Path, tmp_path: Path) -> None:
    classifier = open_classifier(place / "model.safetensors")
    source = f"folder:{place / 'tree' / 'val'}"
    settings: dict[str, Any] = {"methods": CHEAP, "figures": False, "progress": False}
    whole = attribute_set(classifier, source, tmp_path / "whole", **settings)
    attribute_set(classifier, source, tmp_path / "cut", **settings)
    rows = tmp_path / "cut" / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]) + '{"image')
    again = attribute_set(classifier, source, tmp_path / "cut", **settings)
    assert again.done == 3
    assert again.rows == whole.rows


def test_unreadable_images_get_a_row(place: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"no picture")
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "pictures" / "b.png")
    made = attribute_set(
        open_classifier(place / "model.safetensors"),
        tmp_path / "pictures",
        tmp_path / "out",
        ["centre"],
        progress=False,
    )
    assert sorted(row["image_id"] for row in made.rows if "error" in row) == ["a.jpg"]
    assert str(made).endswith(", 1 unreadable")


def test_all_leaves_out_what_the_classifier_does_not_allow(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(problem: Any, options: Any) -> torch.Tensor:
        raise ValueError("gradient: expected a head, got none")

    for name in set(METHODS) - {"gradient", "centre"}:
        monkeypatch.delitem(METHODS, name)
    monkeypatch.setitem(METHODS, "gradient", dataclasses.replace(METHODS["gradient"], maps=refuse))
    source = f"folder:{place / 'tree' / 'val'}"
    classifier = open_classifier(place / "model.safetensors")
    made = attribute_set(classifier, source, tmp_path / "all", ["all"], progress=False)
    assert {*made.rows[0]["peaks"]} == {"centre"}
    assert caplog.messages == ["left out: gradient: expected a head, got none"]
    with pytest.raises(ValueError, match="gradient: expected a head, got none"):
        attribute_set(classifier, source, tmp_path / "one", ["gradient"], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": []}, "methods: expected one at least, got none of gradient, "),
        ({"methods": ["all", "random"]}, "methods: expected 'all' alone, got all, random"),
        ({"methods": ["gradent"]}, "method: expected the name of a method, got 'gradent'"),
        (
            {"methods": CHEAP, "layer": "x"},
            "options: expected none beside several methods, got layer; ask for one method",
        ),
        (
            {"target": "best"},
            "target: expected 'predicted', 'label' or the number of a class, got 'best'",
        ),
        ({"target": "label"}, "target: expected labelled images for 'label', got folder:"),
    ],
)
def test_refusals(place: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    classifier = open_classifier(place / "model.safetensors")
    source = f"folder:{place / 'tree' / 'val'}"
    with pytest.raises(ValueError) as caught:
        attribute_set(
            classifier, source, tmp_path, **{"methods": ["centre"], "progress": False, **options}
        )
    assert str(caught.value).startswith(message)


def test_labels_are_taken_by_name(place: Path, tmp_path: Path) -> None:
    classifier = open_classifier(place / "model.safetensors")
    made = attribute_set(
        classifier,
        f"imagenet-val:{place / 'tree'}",
        tmp_path,
        ["centre"],
        target="label",
        figures=False,
        progress=False,
    )
    source = generate(5, size=32, classes=CLASSES, split="val")
    assert [row["target"] for row in made.rows] == [source.label(index) for index in range(5)]


def test_shade_runs_from_least_to_highest() -> None:
    maps = torch.tensor([[[[-2.0, 0.0], [2.0, 1.0]]], [[[3.0, 3.0], [3.0, 3.0]]]])
    assert shade(maps).tolist() == [[[[0.0, 0.5], [1.0, 0.75]]], [[[0.0, 0.0], [0.0, 0.0]]]]


def test_comparison_of_one_and_of_several_images(tmp_path: Path) -> None:
    images = torch.randn(3, 3, 24, 32)
    maps = {"gradient": torch.rand(3, 1, 24, 32), "my own": torch.rand(3, 1, 24, 32)}
    rows = comparison(images, maps, tmp_path / "rows.png", titles=["a", "b", "c"])
    one = comparison(images[:1], {k: v[:1] for k, v in maps.items()}, tmp_path / "one.png")
    with Image.open(rows) as tall, Image.open(one) as wide:
        assert tall.size[0] == wide.size[0]
        assert abs(tall.size[1] - 3 * wide.size[1]) <= 3
    with pytest.raises(ValueError) as caught:
        comparison(images, {"x": maps["my own"][:2]}, tmp_path / "x.png")
    assert str(caught.value) == "maps: expected [3, 1, 24, 32], got [2, 1, 24, 32] from 'x'"
    with pytest.raises(ValueError, match="titles: expected 3, one per image, got 1"):
        comparison(images, maps, tmp_path / "x.png", titles=["a"])


def test_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = sorted((place / "tree" / "val").iterdir())[0]
    model = str(place / "model.safetensors")
    words = ["attribute", str(photo), "--model", model, "--method", *CHEAP]
    assert cli.main([*words, "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"1 images, 1 of them now -> {tmp_path / 'out'}\n"
    assert (tmp_path / "out" / "images" / f"{photo.name}.png").exists()
    assert cli.main([*words, "-o", str(tmp_path / "x"), "--option", "layer"]) == 1
    assert (
        capsys.readouterr().err
        == "casm-fast: option: expected NAME=VALUE, such as layer=layer4, got 'layer'\n"
    )
    assert cli.main(["attribute"]) == 0
    assert "gradient  " in capsys.readouterr().out


def test_options_are_literals_or_text() -> None:
    assert cli.named_values(["layer=layer4.1", "size=(3, 4)", "p=0.5", "on=True"]) == {
        "layer": "layer4.1",
        "size": (3, 4),
        "p": 0.5,
        "on": True,
    }
