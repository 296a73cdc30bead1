"""COCO's layout: pycocotools as the oracle, and the embedded set through it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from casm_fast.data import (
    CocoSource,
    DecodeError,
    ImageNetSource,
    ImageSource,
    generate,
    open_source,
    write_coco,
    write_tree,
)
from casm_fast.data.coco import run_lengths

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning:pycocotools")
coco = pytest.importorskip("pycocotools.coco", reason="needs casm_fast[eval]")


def oracle(path: Path) -> Any:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        return coco.COCO(str(path))


# Ids with gaps and out of order, fractions of pixels, a crowd, a category only as a crowd, a
# picture without objects, a box that leaves the picture, and one without a pixel.
HAND_MADE: dict[str, Any] = {
    "categories": [
        {"id": 62, "name": "chair"}, {"id": 1, "name": "person"}, {"id": 90, "name": "x"},
    ],
    "images": [
        {"id": 139, "file_name": "b.jpg", "height": 40, "width": 50},
        {"id": 7, "file_name": "a.jpg", "height": 30, "width": 20},
        {"id": 8, "file_name": "none.jpg", "height": 30, "width": 20},
    ],
    "annotations": [
        {"id": 1, "image_id": 139, "category_id": 62, "iscrowd": 0,
         "bbox": [10.25, 5.0, 9.5, 20.75],
         "segmentation": [[10.25, 5.0, 19.75, 5.0, 19.75, 25.75, 10.25, 25.75]]},
        {"id": 2, "image_id": 139, "category_id": 62, "iscrowd": 0, "bbox": [30, 30, 10, 10],
         "segmentation": [[30, 30, 40, 30, 35, 40], [31, 20, 39, 20, 35, 28]]},
        {"id": 3, "image_id": 139, "category_id": 62, "iscrowd": 1, "bbox": [0, 0, 3, 2],
         "segmentation": {"size": [40, 50], "counts": [0, 2, 38, 2, 38, 2, 1918]}},
        {"id": 4, "image_id": 139, "category_id": 1, "iscrowd": 0, "bbox": [45.5, 35.5, 10, 10],
         "segmentation": [[45.5, 35.5, 50, 35.5, 50, 40, 45.5, 40]]},
        {"id": 5, "image_id": 7, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 2, 1],
         "segmentation": {"size": [30, 20], "counts": [0, 1, 29, 1, 569]}},
        {"id": 6, "image_id": 7, "category_id": 62, "iscrowd": 0, "bbox": [3, 4, 0, 5],
         "segmentation": [[3, 4, 3, 9, 3, 7]]},
    ],
}  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, size in (("a.jpg", (20, 30)), ("b.jpg", (50, 40))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "images" / name)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val2014.json").write_text(json.dumps(HAND_MADE))
    return tmp_path


@pytest.fixture(scope="module")
def val():
    return generate(20, seed=1, split="val")


@pytest.fixture(scope="module")
def written(val, tmp_path_factory):
    """The same pictures in COCO's and in ImageNet's layout."""
    root = tmp_path_factory.mktemp("written")
    options: dict[str, Any] = {"sides": (40, 64), "greyscale": 0.2, "rotated": 0.2}
    write_coco(root / "coco", generate(8, seed=1), val, **options)
    write_tree(root / "imagenet", None, val, **options)
    return root


def test_items_are_pairs_of_picture_and_category(tree):
    source = CocoSource(tree)
    assert isinstance(source, ImageSource)
    assert source.name == f"coco-val2014:{tree}"
    assert source.classes == ("person", "chair", "x")
    assert source.category_ids == (1, 62, 90)
    assert [source.image_id(k) for k in range(len(source))] == ["7/1", "7/62", "139/1", "139/62"]
    assert [source.label(k) for k in range(4)] == [0, 1, 0, 1]
    assert source.image(0).shape == (30, 20, 3)
    assert source.image(3).shape == (40, 50, 3)


def test_boxes_are_rounded_outwards_and_clipped(tree):
    source = CocoSource(tree)
    assert [source.boxes(k).tolist() for k in range(4)] == [
        [],  # a crowd alone
        [],  # no pixel wide
        [[45, 35, 50, 40]],
        [[10, 5, 20, 26], [30, 30, 40, 40]],
    ]
    assert source.boxes(2).dtype == np.int32


def test_what_an_evaluator_asks_of_a_pair(tree):
    source = CocoSource(tree)
    assert [source.picture_labels(k).tolist() for k in range(4)] == [[0, 1]] * 4
    assert [source.size(k) for k in range(4)] == [(30, 20)] * 2 + [(40, 50)] * 2


def test_masks_are_those_of_pycocotools(tree):
    source = CocoSource(tree)
    reference = oracle(source.annotations)
    for k in range(4):
        picture, category = map(int, source.image_id(k).split("/"))
        notes = reference.loadAnns(reference.getAnnIds(imgIds=picture, catIds=category))
        expected = np.any([reference.annToMask(note) for note in notes], axis=0)
        got = source.mask(k)
        assert got.dtype == np.bool_
        np.testing.assert_array_equal(got, expected)
    assert source.mask(0).sum() == 2
    assert source.mask(3)[5:25, 11:19].all()


def test_a_sentence_says_what_is_there_and_what_is_missing(tree, caplog):
    with caplog.at_level(logging.INFO):
        source = CocoSource(tree)
    assert source.found == (
        f"coco: val2014 with 3 pictures in {tree}/images, 3 categories, 4 pairs of both and "
        "3 boxes; left out: 1 without an object; without a box: 2 crowds; missing: 1 files, "
        "none.jpg first"
    )
    assert caplog.messages == [source.found]


def test_a_missing_file_is_an_error_of_its_image(tree):
    (tree / "images/b.jpg").unlink()
    with pytest.raises(DecodeError, match=r"^cannot read .*b\.jpg: No such file or directory$"):
        CocoSource(tree).image(3)


def test_the_embedded_set_as_pycocotools_reads_it(written, val):
    source = CocoSource(written / "coco")
    reference = oracle(source.annotations)
    assert len(source) == len(reference.imgs) == 20
    assert source.classes == val.classes
    assert source.found.startswith("coco: val2017 with 20 pictures in ")
    for k in range(20):
        picture, category = map(int, source.image_id(k).split("/"))
        notes = reference.loadAnns(reference.getAnnIds(imgIds=picture))
        assert {note["category_id"] for note in notes} == {category}
        (entry,) = reference.loadImgs(picture)
        assert source.image(k).shape == (entry["height"], entry["width"], 3)
        x, y, w, h = np.transpose([note["bbox"] for note in notes])
        np.testing.assert_array_equal(source.boxes(k), np.transpose([x, y, x + w, y + h]))
        masks = [reference.annToMask(note) for note in notes]
        np.testing.assert_array_equal(source.mask(k), np.any(masks, axis=0))
        for note, mask, box in zip(notes, masks, source.boxes(k), strict=True):
            assert note["area"] == mask.sum()
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_the_embedded_set_is_that_of_the_imagenet_layout(written, val):
    source, other = CocoSource(written / "coco"), ImageNetSource(written / "imagenet")
    for k in range(20):
        np.testing.assert_array_equal(source.image(k), other.image(k))
        np.testing.assert_array_equal(source.boxes(k), other.boxes(k))
        assert source.label(k) == other.label(k) == val.label(k)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 2)])
def test_run_lengths_are_coco_s(shape):
    from pycocotools import mask as codec

    for seed in range(20):
        mask = np.random.default_rng(seed).random(shape) < seed / 19
        lengths = run_lengths(mask)
        assert sum(lengths["counts"]) == mask.size
        decoded = codec.decode(codec.frPyObjects(lengths, *shape))
        np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_specs(written, tree):
    root = written / "coco"
    for spec, split, name in (
        (f"coco:{root}", "train", "train2017"),
        (f"coco:{root}", "val", "val2017"),
        (f"coco-train2017:{root}", "val", "train2017"),
        (str(root), "val", "val2017"),
        (tree, "val", "val2014"),
    ):
        source = open_source(spec, split)
        assert isinstance(source, CocoSource)
        assert source.name.partition(":")[0] == f"coco-{name}"
        assert open_source(source.name).name == source.name


def test_missing_things_are_named(tree, tmp_path):
    notes = tree / "annotations/instances_val2014.json"
    pictures = tree / "images"
    with pytest.raises(FileNotFoundError) as caught:
        open_source(f"coco:{tree}", "train")
    assert str(caught.value) == (
        f"coco: expected annotations/instances_train*.json in {tree}, got val2014 alone; give the "
        "folder that holds annotations/"
    )
    (tree / "annotations/instances_val2017.json").write_text(notes.read_text())
    with pytest.raises(ValueError) as caught:
        CocoSource(tree)
    assert str(caught.value) == (
        f"coco: expected one set whose name begins with val in {tree}, got val2014, val2017; say "
        f"coco-val2014:{tree} or coco-val2017:{tree}"
    )
    pictures.rename(tree / "elsewhere")
    with pytest.raises(FileNotFoundError) as caught:
        CocoSource(tree, "val2017")
    assert str(caught.value) == (
        f"coco: expected the pictures of val2017 in {tree}/val2017, {tree}/images/val2017 or "
        f"{tree}/images, got none of these folders"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": None}, "no 'annotations'"),
        ({"annotations": []}, "expected at least one annotated object, got none"),
        ({"categories": []}, "annotation 1 is of a picture or category that is not listed"),
    ],
)
def test_files_that_are_not_coco_s_are_named(tree, change, message):
    path = tree / "annotations/instances_val2014.json"
    content = {key: value for key, value in (HAND_MADE | change).items() if value is not None}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        CocoSource(tree)
    assert str(caught.value) == f"coco: cannot read {path}: {message}"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"^coco: cannot read .*instances_val2014\.json: "):
        CocoSource(tree)


def test_without_pycocotools_only_masks_are_missing(tree):
    program = (
        "import sys; sys.modules['pycocotools'] = None\n"
        "from casm_fast.data import CocoSource\n"
        f"source = CocoSource({str(tree)!r})\n"
        "print(source.boxes(2).tolist())\n"
        "try: source.mask(2)\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "[[45, 35, 50, 40]]",
        "coco: expected pycocotools, which reads masks, but it is not installed: "
        "pip install 'casm_fast[eval]'",
    ], run.stderr
