"""The recipes, in seconds instead of days: what they train, and every number by another way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from casm_fast.data import predictions
from casm_fast.data.classes import labels_of, of_classes
from casm_fast.data.folder import FolderSource
from casm_fast.data.source import ArraySource, ImageSource
from casm_fast.data.synthetic import SyntheticSource, generate, write_tree
from casm_fast.evaluation import published
from casm_fast.experiments import EXPERIMENTS, SMOKE, figure2, figure3, reproduce, table1, table3
from casm_fast.experiments.inpainting import Inpainter
from casm_fast.experiments.reproduction import Reproduction
from casm_fast.experiments.study import Run, Scale, Study
from casm_fast.models import load

# Table 1 and Table 3 as they are printed in the paper.
TABLE_1 = """
Baseline 62.7 53.5
CASM 48.6 36.1
Fan et al. (2017) 54.5 43.5
Bach et al. (2015) - 57.8
Zeiler and Fergus (2014) - 48.6
Zhou et al. (2016) - 48.1
Selvaraju et al. (2017) 56.4 47.5
Fong and Vedaldi (2017) - 43.1
Mahendran and Vedaldi (2016) - 42.0
Simonyan et al. (2013) - 41.7
Cao et al. (2015) - 38.8
Zhang et al. (2016) - 38.7
Du et al. (2018) - 38.2
Dabkowski and Gal (2017) - 36.7
Simonyan and Zisserman (2014), supervised - 34.3
"""
TABLE_3 = """
46.5 46.4 48.1 45.0 45.7 41.3 44.9
39.5 41.2 43.1 40.3 39.5 38.7 40.0
37.9 39.3 40.0 38.0 38.0 37.4 38.1
38.2 38.5 39.9 37.9 37.9 37.8 38.1
36.7 36.8 39.9 37.4 37.0 37.0 37.4
35.6 36.1 39.0 37.0 36.6 36.7 36.9
"""
# Gray cells of Table 3: 1 where the classes of the column were not learned from.
UNSEEN = """
1 1 1 1 1 0
1 1 1 1 0 0
1 1 1 0 0 0
1 1 0 0 0 0
1 0 0 0 0 0
0 0 0 0 0 0
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that the recipes share their trainings."""
    return tmp_path_factory.mktemp("reproduce")


def smoke(name: str, output: Path, **options: Any) -> Reproduction:
    return reproduce(name, scale=SMOKE, output=output, workers=0, device="cpu", **options)


def study_of(name: str, output: Path) -> Study:
    """The study of an experiment that was reproduced."""
    return Study(
        name,
        output,
        scale=SMOKE,
        embedded=EXPERIMENTS[name].embedded,
        device="cpu",
        workers=0,
    )


def numbers(text: str) -> list[list[float]]:
    return [[float(word) for word in line.split()] for line in text.strip().split("\n")]


# --- the sets of classes --------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_images_of_some_classes(in_memory: bool, tmp_path: Path) -> None:
    whole: ImageSource = generate(40, size=32, classes=5, workers=1)
    if not in_memory:
        assert isinstance(whole, SyntheticSource)
        write_tree(tmp_path, whole, None, sides=(20, 24), workers=1)
        whole = FolderSource(tmp_path / "train")
    part = of_classes(whole, [4, 1])
    expected = [i for i in range(len(whole)) if whole.label(i) in (1, 4)]
    assert len(part) == len(expected) > 8
    assert part.classes == (whole.classes[1], whole.classes[4])
    for index, place in enumerate(expected):
        assert part.image_id(index) == whole.image_id(place)
        assert part.classes[part.label(index)] == whole.classes[whole.label(place)]
        np.testing.assert_array_equal(part.image(index), whole.image(place))
        np.testing.assert_array_equal(part.boxes(index), whole.boxes(place))
    assert part.has_boxes == whole.has_boxes
    assert part.name == f"{whole.name} (classes 1,4)"
    assert isinstance(part, ImageSource)
    assert isinstance(part, ArraySource) == in_memory
    if isinstance(part, ArraySource):
        np.testing.assert_array_equal(part.labels, labels_of(part))
        np.testing.assert_array_equal(part.images[3], part.image(3))


@pytest.mark.parametrize("labels", [[5], [-1], [1, 1]])
def test_labels_that_are_no_choice(labels: list[int]) -> None:
    with pytest.raises(ValueError) as refusal:
        of_classes(generate(10, size=16, classes=5, workers=1), labels)
    assert str(refusal.value) == (
        f"of_classes: expected different labels from 0 to 4, got {labels}"
    )


def test_classes_without_images() -> None:
    few = generate(3, size=16, classes=8, workers=1)
    missing = next(label for label in range(8) if label not in few.labels)
    with pytest.raises(ValueError, match="expected images of the classes"):
        of_classes(few, [missing])


# --- Table 1 --------------------------------------------------------------------------------------


def test_table1(output: Path) -> None:
    result = smoke("table1", output)
    rows = {row.name.split(" (here")[0]: row for row in result.findings.tables[0].rows}
    printed = dict(
        zip(
            [m.name for m in table1.METHODS if m.published],
            TABLE_1.strip().split("\n"),
            strict=True,
        )
    )
    for name, line in printed.items():
        words, om, le = line.rsplit(maxsplit=2)
        assert name.split(" (F)")[0].split(" (L100)")[0] == words
        paper = rows[name].published
        assert f"{100 * (paper['le'] or 0):.1f}" == le
        assert (paper["om"] is None) if om == "-" else f"{100 * (paper['om'] or 0):.1f}" == om
    assert "CASM (L100) (here L1)" in str(result)
    # What nobody can run shows no number of ours, the rest do.
    shown = [name for name, row in rows.items() if row.kind != "head" and not row.ours]
    assert shown == ["Fan et al. (2017)", "Simonyan and Zisserman (2014), supervised"]
    # The box in the middle, by a loop over pixels.
    study = study_of("table1", output)
    wrong = 0
    margin = round(32 * 33 / 224)
    for index in range(study.limit):
        best = 0.0
        for x0, y0, x1, y1 in study.validation.boxes(index):
            true, box = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
            true[y0:y1, x0:x1] = True
            box[margin : 32 - margin, margin : 32 - margin] = True
            best = max(best, (true & box).sum() / (true | box).sum())
        wrong += best <= 0.5
    assert rows["Centred box"].ours["le"] == pytest.approx(wrong / study.limit)


# --- Table 3 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def third(output: Path) -> Reproduction:
    return smoke("table3", output)


def test_the_parts_have_the_papers_sizes() -> None:
    parts = table3.divide(1000)
    assert [len(part) for part in parts.values()] == [50, 50, 100, 300, 300, 200]
    assert sorted(label for part in parts.values() for label in part) == list(range(1000))
    assert [len(part) for part in table3.divide(20).values()] == [1, 1, 2, 6, 6, 4]
    assert [len(part) for part in table3.divide(8).values()] == [1, 1, 1, 2, 1, 2]
    assert table3.divide(20) == table3.divide(20)
    with pytest.raises(ValueError) as refusal:
        table3.divide(6)
    assert str(refusal.value) == (
        "table3: expected a data set of at least 7 classes, one for each of the parts A to E and "
        "two for F, got 6"
    )


def test_unseen_cells_and_published_errors(third: Reproduction) -> None:
    table = third.findings.tables[0]
    for row, gray, printed in zip(table.rows, numbers(UNSEEN), numbers(TABLE_3), strict=True):
        assert row.marked == {part for part, unseen in zip("ABCDEF", gray, strict=True) if unseen}
        assert [round(1000 * (v or 0)) / 10 for v in row.published.values()] == printed
    assert third.page.read_text().count('class="marked"') == sum(map(sum, numbers(UNSEEN)))


def test_models_learn_from_their_classes_alone(third: Reproduction, output: Path) -> None:
    parts = table3.divide(8)
    runs = [json.loads(p.read_text()) for p in (output / "runs").glob("*/finished.json")]
    mine = [run for run in runs if "classes=4" not in run["data"]]  # 8 is the default
    for training in table3.TRAININGS:
        seen = sorted(label for part in training for label in parts[part])
        suffix = f"(classes {','.join(map(str, seen))})" if len(seen) < 8 else "size=32"
        own = [run for run in mine if run["data"].endswith(suffix)]
        assert len(own) == 2
        classifier, casm = sorted(own, key=lambda run: run["epochs"])
        assert casm["strategy"] == "L"
        assert casm["weights"].startswith("classifier-")
        assert classifier["weights"] == "none"
        # As many images as the model of all classes sees: one epoch of 64, in either phase.
        images = int(np.isin(generate(64, size=32, workers=1).labels, seen).sum())
        assert classifier["pretrain_epochs"] == round(64 / images)
        assert casm["epochs"] * casm["epoch_fraction"] * images == pytest.approx(64)
        assert casm["epochs"] == -(-64 // images)


ON_DISK = Scale(
    "trial",
    elsewhere={
        "backbone": "compact",
        "weights": "none",
        "input_size": 32,
        "batch_size": 8,
        "decoder_width": 4,
        "epochs": 1,
        "epoch_fraction": 1.0,
    },
    scratch={"pretrain_epochs": 1, "batch_size": 8},
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ImageNet of JPEG files."""
    train, val = generate(64, size=32, workers=1), generate(16, size=32, split="val", workers=1)
    return write_tree(tmp_path_factory.mktemp("tree"), train, val, sides=(32, 40), workers=1)


def test_table3_on_files(tree: Path, tmp_path: Path) -> None:
    result = reproduce(
        "table3", data=f"imagenet:{tree}", scale=ON_DISK, output=tmp_path, device="cpu", workers=0
    )
    assert result.notice == (
        f"imagenet-val:{tree}, 8 classes, 16 images: compare directions, not numbers"
    )
    runs = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/finished.json")]
    parts = [run for run in runs if "(classes " in run["data"]]
    assert len(parts) == 10  # a classifier and a model for each of five unions
    # Nothing that a part's classifier starts from has seen another class.
    for run in parts:
        if run["epochs"]:
            own = next(r for r in parts if not r["epochs"] and r["data"] == run["data"])
            assert own["weights"] == "none"
            assert run["weights"].startswith("classifier-")
        else:
            assert run["pretrain_epochs"] == 1
    (whole,) = [run for run in runs if "(classes " not in run["data"]]
    assert whole["weights"] == "none"  # on ImageNet: the model zoo's, here switched off


def test_data_that_cannot_be_used_are_refused_before_any_training(
    tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as refusal:
        reproduce("figure2", data=f"folder:{tree / 'val'}", scale=ON_DISK, output=tmp_path / "a")
    assert str(refusal.value) == (
        f"reproduce: expected training and validation images, got folder:{tree / 'val'} for both; "
        "give imagenet:DIR, or a folder that holds train and val"
    )
    bare = tmp_path / "bare"
    for split in ("train", "val"):
        shutil.copytree(tree / split, bare / split)
    with pytest.raises(ValueError) as refusal:
        reproduce("table2", data=str(bare), scale=ON_DISK, output=tmp_path / "b")
    assert str(refusal.value) == (
        f"reproduce: expected true boxes for table2, got none with imagenet-val:{bare}; "
        "for ImageNet, put its XML annotations beside the images"
    )
    assert not list(tmp_path.glob("*/runs"))


def test_errors_by_part_by_hand(third: Reproduction, output: Path) -> None:
    """The row of all classes, by a loop over its boxes."""
    study = study_of("table3", output)
    trained = study.train(strategy="L")
    rows = predictions.read(study.boxes(trained))[0].to_pylist()
    found: dict[str, list[bool]] = {}
    for index, row in enumerate(rows):
        part = next(p for p, of in table3.divide(8).items() if study.validation.label(index) in of)
        p = [row[f"net_{c}"] for c in ("x0", "y0", "x1", "y1")]
        best = 0.0
        for t in row["gt_net_boxes"]:
            width = max(0, min(p[2], t[2]) - max(p[0], t[0]))
            height = max(0, min(p[3], t[3]) - max(p[1], t[1]))
            areas = (p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1])
            best = max(best, width * height / (areas - width * height))
        found.setdefault(part, []).append(best > 0.5)
        found.setdefault("all", []).append(best > 0.5)
    ours = third.findings.tables[0].rows[-1].ours
    for part, right in found.items():
        assert ours[part] == pytest.approx(1 - sum(right) / len(right))
    assert {part for part, error in ours.items() if error is not None} == set(found)


def test_the_gap_of_seen_and_unseen() -> None:
    row = table3.Row(
        "E, F", {"A": 0.5, "B": 0.3, "C": 0.2, "D": None, "E": 0.1, "F": 0.4, "all": 0.9}, {},
        frozenset("ABCD"),
    )  # fmt: skip
    unseen = (50 * 0.5 + 50 * 0.3 + 100 * 0.2) / 200
    seen = (300 * 0.1 + 200 * 0.4) / 500
    assert table3.gap(row) == pytest.approx(unseen - seen)


# --- seeds, statistics, resizing ------------------------------------------------------------------


def test_seeds(output: Path) -> None:
    result = smoke("seeds", output, seeds=3)
    *runs, low, mean, high = result.findings.tables[0].rows
    assert [row.name for row in runs] == ["seed 0", "seed 1", "seed 2"]
    errors = [row.ours["f1"] or 0.0 for row in runs]
    assert len(set(errors)) == 3
    assert (low.ours["f1"], high.ours["f1"]) == (min(errors), max(errors))
    assert mean.ours["f1"] == pytest.approx(np.mean(errors))
    assert [row.published["le"] for row in (low, mean, high)] == [0.360, 0.361, 0.363]
    # Further runs do not touch those that are there.
    again = smoke("seeds", output, seeds=2)
    assert again.findings.tables[0].rows[:2] == runs[:2]


def test_statistics(output: Path) -> None:
    table = smoke("statistics", output).findings.tables[0]
    study = study_of("statistics", output)
    for row, strategy in zip(table.rows, ("L100", "F"), strict=True):
        model = study.train(strategy=strategy).model()
        images = torch.from_numpy(study.validation.images)  # type: ignore[attr-defined]
        x = (images.permute(0, 3, 1, 2).float() / 255 - torch.tensor(model.mean).view(3, 1, 1)) / (
            torch.tensor(model.std).view(3, 1, 1)
        )
        with torch.no_grad():
            m = model(x)[0].repeat_interleave(2, 2).repeat_interleave(2, 3)[:, 0].double()
        tv = (m.diff(dim=1) ** 2).sum((1, 2)) + (m.diff(dim=2) ** 2).sum((1, 2))
        assert row.ours["tv"] == pytest.approx(float(tv.mean()), rel=1e-4)
        assert row.ours["entropy"] == pytest.approx(float(-(m * m.log2()).mean()), rel=1e-4)
        assert row.ours["std"] == pytest.approx(float(m.mean((1, 2)).std()), rel=1e-4)
    assert [dict(row.published) for row in table.rows] == [
        {"tv": 2500, "entropy": 0.05, "std": 0.19},
        {"tv": 7000, "entropy": 0.21, "std": 0.14},
    ]


def test_resizing(output: Path) -> None:
    result = smoke("resizing", output)
    crop, squash, difference = result.findings.tables[0].rows
    assert difference.ours["le"] == abs((crop.ours["le"] or 0) - (squash.ours["le"] or 0))
    assert crop.ours != squash.ours  # the images are not square
    assert (crop.published["le"], difference.published["le"]) == (0.361, 0.006)
    study = study_of("resizing", output)
    described = {
        predictions.read(path)[1].convention.policy
        for path in study.train(strategy="L100").folder.glob("boxes-*.parquet")
        if "jpegs" in predictions.read(path)[1].source
    }
    assert described == {"crop", "squash"}


# --- Figure 2 and Figure 3 ------------------------------------------------------------------------


def test_figure2(output: Path) -> None:
    result = smoke("figure2", output)
    (group,) = result.findings.galleries[0].groups
    assert [line.name for line in group] == ["Original", *["CASM"] * 3, *["Baseline"] * 3]
    assert all(len(line.pictures) == figure2.COLUMNS for line in group)
    assert len({picture.tobytes() for line in group for picture in line.pictures}) == 49
    ids = [row.name for row in result.findings.tables[0].rows]
    first = int(ids[0].split("-")[1])
    assert ids == [f"val-{first + k:06d}" for k in range(7)]
    picture = cv2.imread(str(result.folder / "figure2.png"))
    assert picture.shape[1] > 1000
    assert result.page.read_text().count("<img") == 49


def test_opencv_is_asked_for_first(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("figure2", "figure3"):
        with pytest.raises(ModuleNotFoundError) as refusal:
            EXPERIMENTS[name].run(study_of(name, output))
        assert str(refusal.value) == (
            f"{name}: expected OpenCV, which inpaints by Telea's method, got an environment "
            "without it: pip install 'casm_fast[inpaint]'"
        )


@pytest.fixture(scope="module")
def many(output: Path) -> Reproduction:
    return smoke("figure3", output)


def test_figure3_by_a_plain_loop(many: Reproduction, output: Path) -> None:
    study = study_of("figure3", output)
    table = many.findings.tables[0]
    assert [row.name for row in table.rows] == [
        "resnet18", "compact, seed 0", "compact, seed 1", "mean",
    ]  # fmt: skip
    networks = [
        load(study.classifier(**settings).checkpoint).classifier
        for settings in ({"backbone": "resnet18"}, {}, {"seed": 1})
    ]
    masks = {"CASM": study.train(strategy="L100"), "Baseline": study.train(strategy="F")}
    right = np.zeros((3, len(figure3.CONDITIONS)))
    for index in range(study.limit):
        image, label = study.validation.image(index), study.validation.label(index)
        forms = {"clean": image}
        for name in figure3.MASKS:
            kept = _kept(masks[name], image) if name in masks else _random(index)
            forms[f"{name}_in"] = np.where(kept[..., None], image, 0).astype(np.uint8)
            forms[f"{name}_out"] = np.where(kept[..., None], 0, image).astype(np.uint8)
            forms[f"{name}_inpainted"] = cv2.inpaint(
                forms[f"{name}_out"], kept.astype(np.uint8), 3, cv2.INPAINT_TELEA
            )
        for column, condition in enumerate(figure3.CONDITIONS):
            for row, network in enumerate(networks):
                with torch.no_grad():
                    logits = network(_normalized(forms[condition]))[0]
                right[row, column] += int(logits.argmax()) == label
    for row, counts in zip(table.rows, right, strict=False):
        measured = np.array([row.ours[key] for key in figure3.CONDITIONS])
        # A logit within rounding of another may fall either way in a batch of another size.
        np.testing.assert_allclose(measured, counts / study.limit, atol=1.01 / study.limit)
        assert (np.abs(measured - counts / study.limit) > 1e-9).sum() <= 1


def _normalized(image: np.ndarray[Any, Any]) -> torch.Tensor:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return torch.tensor((image / 255 - mean) / std).permute(2, 0, 1)[None].float()


def _kept(trained: Run, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        saliency = trained.model()(_normalized(image))[0][0, 0].double().numpy()
    return np.kron(saliency >= saliency.mean(), np.ones((2, 2))) > 0


def _random(index: int) -> np.ndarray[Any, Any]:
    cells = np.random.default_rng([2020, index]).random((16, 16)) < 0.5
    return np.kron(cells, np.ones((2, 2))) > 0


def test_figure3_resumes_by_parts(
    many: Reproduction, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("finished work was done again")

    monkeypatch.setattr(figure3, "count", refuse)
    assert str(smoke("figure3", output)) == str(many)
    # In parts of ten images: the same table.
    monkeypatch.undo()
    monkeypatch.setattr(figure3, "CHUNK", 10)
    assert str(smoke("figure3", output)) == str(many)
    cells = sorted(path.name for path in (many.folder / "cells").glob("*.json"))
    assert cells == ["images-000000.json", "images-000010.json", "images-000020.json"]


def test_the_papers_classifiers_are_torchvisions() -> None:
    import torchvision

    assert len(set(figure3.TORCHVISION)) == 17
    for name in figure3.TORCHVISION:
        assert "IMAGENET1K_V1" in torchvision.models.get_model_weights(name).__members__


def test_inpainting_in_a_pool_is_opencvs() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 24, 20, 3), np.uint8)
    holes = rng.random((6, 24, 20)) < 0.3
    with Inpainter(workers=3) as inpainter:
        filled = [future.result() for future in inpainter.start(images, holes)]
    for image, hole, made in zip(images, holes, filled, strict=True):
        expected = cv2.inpaint(image, hole.astype(np.uint8), 3, cv2.INPAINT_TELEA)
        np.testing.assert_array_equal(made, expected)


def test_published_rows_of_evaluation_are_those_of_the_tables() -> None:
    casm, last, baseline = published.CASM
    assert (casm.le, casm.om) == (published.TABLE_1["CASM"].le, published.TABLE_1["CASM"].om)
    assert baseline.le == published.TABLE_1["Baseline"].le
    assert last.le == published.TABLE_2["b"].le
