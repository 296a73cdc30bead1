"""The recipes of the supplement, in seconds: what they show, and their numbers by another way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import casm_fast
from casm_fast.data.geometry import geometry
from casm_fast.data.synthetic import generate
from casm_fast.data.transforms import normalize
from casm_fast.experiments import (
    EXPERIMENTS,
    SMOKE,
    animal_parts,
    attributed,
    failures,
    layers,
    pointing_game,
    reproduce,
    showing,
    supplement_table1,
)
from casm_fast.experiments.coco_examples import objects
from casm_fast.experiments.examining import Entry, Examples, entry, explained, records
from casm_fast.experiments.reproduction import Reproduction
from casm_fast.experiments.study import Study
from casm_fast.perturbation import LAYERS, PerturbConfig

PICTURES = (
    "comparison_grid",
    "top5_setting",
    "architectures",
    "preservation_vs_deletion",
    "coco_examples",
    "layers",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that the recipes share their classifier."""
    return tmp_path_factory.mktemp("supplement")


def smoke(name: str, output: Path, **options: Any) -> Reproduction:
    return reproduce(name, scale=SMOKE, output=output, workers=0, device="cpu", **options)


def study_of(name: str, output: Path) -> Study:
    return Study(name, output, scale=SMOKE, device="cpu", workers=0)


def some_of(source: Any, indices: list[int]) -> Examples:
    images = normalize(torch.from_numpy(source.images[indices]))
    size = images.shape[2]
    return Examples(
        source,
        indices,
        images,
        [source.label(index) for index in indices],
        [geometry(size, size, size, "squash")] * len(indices),
    )


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_and_numbers_come_out(name: str, output: Path) -> None:
    result = smoke(name, output)
    for gallery in result.findings.galleries:
        for group, names in zip(gallery.groups, gallery.ids, strict=True):
            for line in group:
                assert len(line.pictures) == len(names)
                assert all(p.dtype == np.uint8 and p.shape[2] == 3 for p in line.pictures)
        with Image.open(result.folder / f"{gallery.name}.png") as picture:
            assert picture.width > 300
    stored = json.loads((result.folder / "results.json").read_text())
    assert "meaningful perturbation" in stored["provenance"]["paper"]
    assert stored["tables"][0]["rows"]
    page = result.page.read_text()
    assert result.findings.verdict.split(":")[0].split("%")[0] in page


def test_the_games_are_those_of_perturb(output: Path) -> None:
    result = smoke("preservation_vs_deletion", output)
    study = study_of("preservation_vs_deletion", output)
    classifier = explained(study)
    some = showing.load(study, classifier, showing.drawn(study, 2))
    for row, game in zip(result.findings.tables[0].rows, ("preservation", "deletion"), strict=True):
        made = casm_fast.perturb(
            classifier.network, some.images, list(some.targets), game=game, steps=2
        )
        assert row.ours["after"] == pytest.approx(float(made.score_after.mean()), abs=1e-6)
        assert row.ours["salient"] == pytest.approx(float(made.saliency.mean()), abs=1e-6)


def test_images_are_random_but_always_the_same(output: Path) -> None:
    study = study_of("top5_setting", output)
    first = showing.drawn(study, 5)
    assert first == sorted(first) == showing.drawn(study, 5)
    assert len(set(first)) == 5
    assert max(first) < study.limit


def test_the_mass_inside_boxes() -> None:
    source = generate(4, size=16, classes=2, workers=1)
    some = some_of(source, [0, 1, 3])
    maps = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for place, share in enumerate(showing.inside(some, maps)):
        held = np.zeros((16, 16), bool)
        for x0, y0, x1, y1 in source.boxes(some.indices[place]):
            for y in range(y0, y1):
                for x in range(x0, x1):
                    held[y, x] = True
        plane = maps[place, 0].double().numpy()
        assert share == pytest.approx(plane[held].sum() / plane.sum(), rel=1e-12)
    assert np.isnan(showing.inside(some, torch.zeros(3, 1, 16, 16))).all()
    assert showing.mean([float("nan"), 1.0, 3.0]) == 2.0
    assert showing.mean([float("nan")]) is None


def test_layers_take_the_weights_of_their_size(output: Path) -> None:
    assert layers._nearest(28) is LAYERS["vgg16", "pool3"]
    assert layers._nearest(13) is LAYERS["vgg16", "pool4"]
    assert layers._nearest(2) is LAYERS["vgg16", "pool5"]
    assert layers._nearest(100) is LAYERS["vgg16", "pool1"]
    names = [row.name for row in smoke("layers", output).findings.tables[0].rows]
    assert names == [
        "Compact ResNet",
        "layer1 (16 x 16)",
        "layer2 (8 x 8)",
        "layer3 (4 x 4)",
        "layer4 (2 x 2)",
    ]


def test_outlines_are_read_under_the_network_s_pixels() -> None:
    class Source:
        def mask(self, index: int) -> np.ndarray:
            region = np.zeros((40, 60), bool)
            region[10:30, 15:45] = True
            return region

    some = SimpleNamespace(
        source=Source(),
        indices=[0],
        images=torch.zeros(1, 3, 20, 20),
        geometries=[geometry(40, 60, 20, "squash")],
    )
    (region,) = objects(some)  # type: ignore[arg-type]
    expected = np.zeros((20, 20), bool)
    expected[5:15, 5:15] = True
    np.testing.assert_array_equal(region, expected)


def test_failures_are_told_apart() -> None:
    source = generate(4, size=16, classes=2, workers=1)
    some = some_of(source, [0, 1, 2, 3])
    blank = torch.zeros(4, 1, 16, 16)
    made = SimpleNamespace(
        normalised=torch.tensor([0.1, 0.9, 0.0, 0.2]),
        config=PerturbConfig(),
        saliency=torch.cat([blank[:3], blank[3:] + 1]),
        diverged=torch.tensor([True, False, False, False]),
        curves=SimpleNamespace(objective=torch.zeros(4, 3)),
    )
    found = {kind: flags.tolist() for kind, (flags, _) in failures.failures(some, made).items()}
    assert found == {
        "diverged": [True, False, False, False],
        "stayed": [False, True, False, False],
        "missed": [False, False, True, False],
    }
    made.config = dataclasses.replace(made.config, game="preservation")
    kept = failures.failures(some, made)["stayed"][0]
    assert kept.tolist() == [True, False, True, True]


def test_failures_are_counted_and_shown(output: Path) -> None:
    result = smoke("failures", output)
    for row in result.findings.tables[0].rows:
        assert 0 <= row.ours["fine"] <= 1
    shown = {gallery.name for gallery in result.findings.galleries}
    for row in result.findings.tables[0].rows:
        slug = row.name.lower().replace(",", "").replace(" ", "-")
        for kind in failures.KINDS:
            assert (f"failures-{slug}-{kind}" in shown) == (row.ours[kind] > 0)


def test_outlines_are_needed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            picture = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
            picture.save(tmp_path / "set" / split / name / "x.png")
    experiment = EXPERIMENTS["coco_examples"]
    study = Study("coco_examples", tmp_path / "out", data=str(tmp_path / "set"), device="cpu")
    with pytest.raises(ValueError) as caught:
        experiment.run(study)
    assert str(caught.value) == (
        f"coco_examples: expected a set whose objects have outlines, got {study.validation.name}; "
        "give coco:DIR, or leave --data out"
    )


# --- pointing, parts, sizes, localisation ---------------------------------------------------------


def test_pointing_is_a_loop_over_pixels(output: Path) -> None:
    result = smoke("pointing_game", output)
    study = study_of("pointing_game", output)
    classifier = explained(study)
    source = study.validation
    taken: dict[int, int] = {}
    hits: dict[int, list[bool]] = {}
    for index in range(study.limit):
        label = source.label(index)
        taken[label] = taken.get(label, 0) + 1
        if taken[label] > pointing_game.PER_CLASS["smoke"]:
            continue
        images = normalize(torch.from_numpy(source.image(index)[None].copy()))
        plane = casm_fast.attribute("gradient", classifier.network, images, label)[0, 0]
        y, x = divmod(int(plane.argmax()), plane.shape[1])
        near = 15 * classifier.size / 224
        hits.setdefault(label, []).append(
            any(
                (x - px) ** 2 + (y - py) ** 2 < near**2
                for x0, y0, x1, y1 in source.boxes(index)
                for px in range(x0, x1)
                for py in range(y0, y1)
            )
        )
    row = next(r for r in result.findings.tables[0].rows if r.name == "Gradient")
    assert row.ours["all"] == pytest.approx(np.mean([np.mean(one) for one in hits.values()]))
    assert row.ours["low"] <= row.ours["all"] <= row.ours["high"]
    mask = result.findings.tables[0].rows[-1]
    assert mask.published == {"all": 0.3640, "difficult": 0.2821}


def test_occlusion_variants_point(output: Path) -> None:
    rows = smoke("occlusion_variants", output).findings.tables[0].rows
    assert [row.name for row in rows] == [
        "Centre",
        "Occlusion",
        "Blur occlusion",
        "Variable occlusion",
        "Mask, default settings",
    ]


def test_keypoints_of_the_embedded_set() -> None:
    source = generate(20, size=32, classes=4, workers=1, emblem=100)
    found = animal_parts.embedded_keypoints(source, 20)
    assert len(found) == 2 * sum(len(source.boxes(index)) == 1 for index in range(20)) > 0
    for eye, foot in zip(found[::2], found[1::2], strict=True):
        index = next(i for i in range(20) if source.image_id(i) == eye.image_id)
        assert (eye.part, foot.part) == ("eye", "foot")
        assert eye.label == foot.label == source.classes[source.label(index)]
        assert source.emblem_masks[index, round(eye.y), round(eye.x)]
        assert source.mask(index)[int(foot.y), int(foot.x)]
        far = (eye.x - foot.x) ** 2 + (eye.y - foot.y) ** 2
        ys, xs = np.nonzero(source.mask(index))
        assert far == pytest.approx(((xs - eye.x) ** 2 + (ys - eye.y) ** 2).max())


def test_animal_parts(output: Path) -> None:
    result = smoke("animal_parts", output)
    rows = {row.name: row for row in result.findings.tables[0].rows}
    assert rows["dogs"].published == {"ratio": 3.70, "error": 0.50, "classes": 8.0}
    assert not rows["dogs"].ours
    assert rows["all classes"].ours["classes"] > 0


def test_keypoints_are_asked_for_by_name(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder / "x.png")
    study = Study("animal_parts", tmp_path / "out", data=f"imagenet:{tmp_path / 'set'}")
    with pytest.raises(FileNotFoundError) as caught:
        animal_parts.run(study)
    assert str(caught.value) == (
        f"animal_parts: expected {tmp_path / 'set' / 'keypoints.csv'} or keypoints.jsonl beside "
        "the images, got neither; write a line image_id,class,part,x,y for each visible eye and "
        "foot"
    )


def test_distributions(output: Path) -> None:
    result = smoke("distributions", output)
    rows = result.findings.tables[0].rows
    assert rows[0].published == {"first": 7.5060, "second": 1.2848}
    again = smoke("distributions", output).findings.tables[0].rows
    assert [row.ours for row in rows] == [row.ours for row in again]


def test_weak_localisation_by_another_route(output: Path) -> None:
    result = smoke("supplement_table1", output)
    study = study_of("supplement_table1", output)
    row = next(r for r in result.findings.tables[0].rows if r.name == "Centre")
    source, classifier = study.validation, explained(study)
    alpha = row.ours["mean_alpha"]
    assert alpha is not None
    wrong = []
    for index in range(8):
        images = normalize(torch.from_numpy(source.image(index)[None].copy()))
        plane = casm_fast.attribute("centre", classifier.network, images, 0)[0, 0].double().numpy()
        ys, xs = np.nonzero((plane >= alpha * plane.mean()) & (plane > 0))
        box = (0, 0, 32, 32) if not len(ys) else (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        best = 0.0
        for truth in source.boxes(index):
            shared = np.clip(np.minimum(box[2:], truth[2:]) - np.maximum(box[:2], truth[:2]), 0, 99)
            sizes = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, truth)]
            best = max(best, shared.prod() / (sum(sizes) - shared.prod()))
        wrong.append(best < 0.5)
    assert row.ours["mean"] == pytest.approx(np.mean(wrong))
    assert {r.name for r in result.findings.tables[0].rows if r.published} == {
        "Mask, one class",
        "Mask, five best classes",
        "Gradient",
        "Guided backpropagation",
        "Excitation backprop",
        "Occlusion",
        "Grad-CAM",
    }


def test_other_methods_in_table1_by_scipy(output: Path) -> None:
    study = study_of("table1", output)
    classifier = explained(study, policy="crop")
    some = some_of(study.validation, [0, 1, 2, 3])
    method = entry("gradient")
    rows = attributed._measured(method, classifier, some)
    maps = casm_fast.attribute("gradient", classifier.network, some.images, list(some.targets))
    for place, row in enumerate(rows):
        plane = maps[place, 0].double().numpy()
        plane = (plane - plane.min()) / (plane.max() - plane.min())
        for alpha, bit in zip(attributed.GRID, row["found"], strict=True):
            labels, count = ndimage.label(plane >= alpha * plane.mean())
            sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
            best = 0.0
            if count:
                ys, xs = np.nonzero(labels == 1 + sizes.argmax())
                box = np.zeros(plane.shape, bool)
                box[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
                for x0, y0, x1, y1 in some.boxes(place):
                    true = np.zeros(plane.shape, bool)
                    true[y0:y1, x0:x1] = True
                    best = max(best, (box & true).sum() / (box | true).sum())
            assert bit == ("1" if best > 0.5 else "0")
        f1 = []
        for x0, y0, x1, y1 in some.boxes(place):
            held = plane[y0:y1, x0:x1].sum()
            precision, recall = held / plane.sum(), held / ((x1 - x0) * (y1 - y0))
            f1.append(2 * precision * recall / (precision + recall))
        assert row["f1"] == pytest.approx(max(f1), abs=1e-5)  # EPSILON of the published code


def test_boxes_are_printed_as_imagenet_prints_them(tmp_path: Path) -> None:
    source = generate(2, size=32, classes=2, split="val", workers=1)
    boxes = source.boxes(0)
    printed = supplement_table1._printed(source, boxes)
    np.testing.assert_array_equal(printed[:, :2], boxes[:, :2] + 1)
    np.testing.assert_array_equal(printed[:, 2:], boxes[:, 2:])


def test_records_are_kept_and_in_order(output: Path) -> None:
    study = study_of("records", output)
    classifier = explained(study)
    asked: list[int] = []

    def measure(some: Examples) -> list[dict[str, Any]]:
        asked.extend(some.indices)
        return [{"label": target} for target in some.targets]

    indices = [3, 1, 7]
    first = records(study, "x", classifier, study.validation, indices, measure, setting=1)
    assert [one["label"] for one in first] == [study.validation.label(one) for one in indices]
    assert asked == indices
    assert records(study, "x", classifier, study.validation, indices, measure, setting=1) == first
    assert asked == indices
    records(study, "x", classifier, study.validation, indices, measure, setting=2)
    assert asked == indices * 2


def test_scales_make_methods_cheaper() -> None:
    mask = entry("gradient")
    assert mask.title == "Gradient"
    told = Entry("mask", "Mask", "meaningful_perturbation", {"top_k": 2})
    assert told.at("quick").options == {"steps": 60, "top_k": 2}
    assert told.at("full").options == {"top_k": 2}
