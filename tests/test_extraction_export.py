"""Export, with pycocotools as the judge of what it reads and what it matches."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from casm_fast import cli
from casm_fast.data.synthetic import generate, write_coco, write_tree
from casm_fast.extraction import Extraction, export, extract
from casm_fast.models.saliency import build_model

coco = pytest.importorskip("pycocotools.coco", reason="needs casm_fast[eval]")

IMAGES = 40


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """pycocotools prints whatever it does."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def loaded(truth: Path, results: Path) -> tuple[Any, Any]:
    with silence():
        reference = coco.COCO(str(truth))
        return reference, reference.loadRes(str(results))


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    val = generate(IMAGES, size=32, classes=3, seed=4, split="val")
    write_coco(root / "coco", None, val, sides=(40, 60))
    write_tree(root / "imagenet", None, val, layout="flat", sides=(40, 60))
    (root / "imagenet/val/ILSVRC2012_val_00000003.JPEG").write_bytes(b"nothing")
    return root


def near_the_truth(made: Extraction) -> pa.Table:
    """The table with boxes that hit some objects and miss others, and one image without a box."""
    rng = np.random.default_rng(0)
    rows = made.table.to_pylist()
    for k, row in enumerate(rows):
        if row["error"] is None:
            box = np.array(row["gt_boxes"][-1]) + rng.integers(-9, 10, 4)
            box[2:] = np.maximum(box[2:], box[:2] + 1)
            if k == 7:
                box[:] = 0
            row |= dict(zip(("x0", "y0", "x1", "y1"), box.tolist(), strict=True))
    return pa.Table.from_pylist(rows, schema=made.table.schema)


def extracted(trees: Path, spec: str) -> Extraction:
    names = generate(1, size=32, classes=3).classes
    return extract(build_model("compact", classes=names, input_size=32), spec)


@pytest.fixture(scope="module")
def coco_boxes(trees: Path) -> pa.Table:
    return near_the_truth(extracted(trees, f"coco:{trees / 'coco'}"))


@pytest.fixture(scope="module")
def tree_boxes(trees: Path) -> pa.Table:
    return near_the_truth(extracted(trees, f"imagenet-val:{trees / 'imagenet'}"))


def overlap(a: list[int], b: list[int]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return shared / (sum(areas) - shared)


@pytest.mark.parametrize("layout", ["coco", "imagenet"])
def test_pycocotools_finds_the_objects_that_the_boxes_find(
    layout: str, coco_boxes: pa.Table, tree_boxes: pa.Table, trees: Path, tmp_path: Path
) -> None:
    from pycocotools.cocoeval import COCOeval

    table = coco_boxes if layout == "coco" else tree_boxes
    files = export(table, tmp_path / "boxes.json", category="label")
    truth = trees / "coco/annotations/instances_val2017.json" if layout == "coco" else files[1]
    reference, results = loaded(truth, files[0])
    with silence():
        judge = COCOeval(reference, results, "bbox")
        judge.params.iouThrs = np.array([0.5])
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.params.maxDets = [1]
        judge.evaluate()
    found = {
        verdict["image_id"]: bool(verdict["dtMatches"].any())
        for verdict in judge.evalImgs
        if verdict and verdict["dtIds"]
    }
    expected = {}
    rows = [row for row in table.to_pylist() if row["error"] is None]
    for number, row in enumerate(rows, 1):
        image = int(row["image_id"].split("/")[0]) if layout == "coco" else number
        box = [row[name] for name in ("x0", "y0", "x1", "y1")]
        if box[2] > box[0]:
            expected[image] = max(overlap(box, other) for other in row["gt_boxes"]) >= 0.5
    assert found == expected
    assert 5 < sum(expected.values()) < len(expected) - 5


def test_a_result_holds_what_the_row_holds(tree_boxes: pa.Table, tmp_path: Path) -> None:
    files = export(tree_boxes, tmp_path / "out" / "boxes.json")
    assert [path.name for path in files] == ["boxes.json", "boxes.instances.json"]
    assert sorted(path.name for path in files[0].parent.iterdir()) == sorted(p.name for p in files)
    reference, results = loaded(files[1], files[0])
    rows = [row for row in tree_boxes.to_pylist() if row["error"] is None]
    assert len(reference.imgs) == len(rows) == IMAGES - 1
    assert len(results.anns) == len(rows) - 1  # one image has no box
    names = {number: entry["name"] for number, entry in reference.cats.items()}
    assert list(names.values()) == list(generate(1, size=32, classes=3).classes)
    for number, row in enumerate(rows, 1):
        (entry,) = reference.loadImgs(number)
        assert entry["file_name"] == row["image_id"]
        assert (entry["height"], entry["width"]) == (row["height"], row["width"])
        truth = reference.loadAnns(reference.getAnnIds(number))
        x, y, w, h = np.transpose([note["bbox"] for note in truth])
        assert np.transpose([x, y, x + w, y + h]).tolist() == row["gt_boxes"]
        assert {note["category_id"] for note in truth} == {row["label"] + 1}
        for note in results.loadAnns(results.getAnnIds(number)):
            assert names[note["category_id"]] == row["predicted_name"]
            assert note["score"] == pytest.approx(row["score"])
            x, y, w, h = note["bbox"]
            assert [x, y, x + w, y + h] == [row[name] for name in ("x0", "y0", "x1", "y1")]


def test_a_picture_of_several_categories(trees: Path, coco_boxes: pa.Table, tmp_path: Path) -> None:
    # The second picture shows the categories of the first two rows.
    rows = coco_boxes.to_pylist()[:2]
    rows[1] = {**rows[0], "image_id": rows[0]["image_id"].split("/")[0] + "/3"}
    table = pa.Table.from_pylist(rows, schema=coco_boxes.schema)
    by_label, by_guess = (
        json.loads(export(table, tmp_path / "x.json", category=category)[0].read_text())
        for category in ("label", "predicted")
    )
    assert [result["category_id"] for result in by_label] == [
        int(row["image_id"].split("/")[1]) for row in rows
    ]
    assert len(by_guess) == 1  # the classifier predicts once


def test_models_of_other_classes(trees: Path, tmp_path: Path) -> None:
    spec = f"coco:{trees / 'coco'}"
    made = extract(build_model("compact", classes=("a", "b"), input_size=32), spec)
    with pytest.raises(ValueError) as caught:
        export(made, tmp_path / "x.json")
    assert re.fullmatch(
        rf"export: expected a model with the classes of {made.description.source}, got one that "
        r"predicts '[ab]'; choose category 'label', which serves any model",
        str(caught.value),
    )
    assert list(tmp_path.iterdir()) == []
    assert len(json.loads(export(made, tmp_path / "x.json", category="label")[0].read_text()))


def test_images_without_labels(trees: Path, tmp_path: Path) -> None:
    made = extracted(trees, f"folder:{trees / 'coco/val2017'}")
    with pytest.raises(ValueError) as caught:
        export(made, tmp_path / "x.json", category="label")
    assert str(caught.value) == (
        "export: expected a label for every image, got none for 000000000001.jpg and 39 others; "
        "choose category 'predicted'"
    )
    reference, results = loaded(*reversed(export(made, tmp_path / "x.json")))
    assert len(results.anns) == IMAGES
    assert not reference.anns


def test_unknown_options_are_refused(coco_boxes: pa.Table, tmp_path: Path) -> None:
    for options, message in (
        (
            {"to": "xml"},
            "export: expected `to` one of coco, voc, yolo, kaggle-loc, label-studio, fiftyone, "
            "wsol-npy, overlays, csv, got 'xml'",
        ),
        ({"category": "x"}, "export: expected `category` one of predicted, label, got 'x'"),
    ):
        with pytest.raises(ValueError) as caught:
            export(coco_boxes, tmp_path / "x.json", **options)
        assert str(caught.value) == message


def test_the_verb(trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from casm_fast.data import predictions

    made = extracted(trees, f"imagenet-val:{trees / 'imagenet'}")
    boxes = predictions.write(made.table, tmp_path / "val.parquet")
    assert cli.main(["export", str(boxes), "--to", "coco"]) == 0
    files = capsys.readouterr().out.split()
    assert files == [str(tmp_path / "val.json"), str(tmp_path / "val.instances.json")]
    _, results = loaded(*map(Path, reversed(files)))
    assert len(results.anns) == IMAGES - 1
