"""PASCAL VOC's layout: torchvision as the oracle, hand-made trees, and the embedded set in it."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import VOCDetection, VOCSegmentation

from casm_fast.data import (
    DecodeError,
    ImageNetSource,
    ImageSource,
    VocSource,
    generate,
    open_source,
    write_tree,
    write_voc,
)
from casm_fast.data.annotations import read_voc
from casm_fast.data.voc import VOC_CLASSES

Thing = tuple[str, str, tuple[Any, Any, Any, Any]]


def xml(things: list[Thing], size: tuple[int, int] | None = (30, 20)) -> str:
    """The XML of a picture of (width, height) with (class, difficult, xmin ymin xmax ymax)."""
    text = "<annotation><filename>any.jpg</filename>"
    if size:
        text += f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for name, difficult, box in things:
        tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        bounds = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
        text += f"<object><name>{name}</name>{difficult}<bndbox>{bounds}</bndbox>"
        # A person's parts have boxes of their own, which are none of the object's.
        text += "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin></bndbox></part>"
        text += "</object>"
    return text + "</annotation>"


HARD = "<difficult>1</difficult>"
EASY = "<difficult>0</difficult>"

# Objects of two classes in turn, fractions, a box that leaves the picture, one without a pixel, a
# class that is difficult throughout, a picture whose XML is silent about its size, one without
# objects, and another extension.
HAND_MADE: dict[str, str] = {
    "000012": xml(
        [
            ("dog", EASY, (2, 3, 10, 12)),
            ("person", HARD, (1, 1, 30, 20)),
            ("dog", HARD, (20, 5, 20, 5)),
            ("person", "", (4.5, 6.2, 9.5, 8.0)),
        ]
    ),
    "000005": xml([("car", HARD, (25, 15, 40, 21)), ("dog", EASY, (9, 9, 8, 12))]),
    "2008_000001": xml([("train", "", (1, 2, 3, 4))], size=None),
    "000007": xml([]),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The hand-made set as VOCdevkit/VOC2007."""
    folder = tmp_path / "VOCdevkit/VOC2007"
    for inner in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / inner).mkdir(parents=True)
    for stem, text in HAND_MADE.items():
        (folder / f"Annotations/{stem}.xml").write_text(text)
    for name in ("000012.jpg", "000005.png", "2008_000001.jpg"):
        Image.new("RGB", (30, 20), (9, 9, 9)).save(folder / "JPEGImages" / name)
    (folder / "ImageSets/Main/val.txt").write_text("".join(f"{stem}\n" for stem in HAND_MADE))
    (folder / "ImageSets/Main/train.txt").write_text("000012  1\n\n")
    return tmp_path


@pytest.fixture(scope="module")
def sets() -> Any:
    return generate(12, seed=1), generate(16, seed=1, split="val")


@pytest.fixture(scope="module")
def written(sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in VOC's and in ImageNet's layout."""
    root = tmp_path_factory.mktemp("written")
    options: dict[str, Any] = {"sides": (40, 64), "greyscale": 0.2, "rotated": 0.2}
    write_voc(root / "voc", *sets, test=sets[1], **options)
    write_tree(root / "imagenet", *sets, **options)
    return root


def test_items_are_pairs_of_picture_and_class(tree: Path) -> None:
    source = VocSource(tree)
    assert isinstance(source, ImageSource)
    assert source.name == f"voc-val2007:{tree}"
    assert source.classes == VOC_CLASSES
    assert tuple(sorted(VOC_CLASSES)) == VOC_CLASSES
    ids = [source.image_id(k) for k in range(len(source))]
    assert ids == [
        "000012/dog", "000012/person", "000005/car", "000005/dog", "2008_000001/train",
    ]  # fmt: skip
    assert [source.classes[source.label(k)] for k in range(5)] == [
        "dog", "person", "car", "dog", "train",
    ]  # fmt: skip
    assert source.image(2).shape == (20, 30, 3)


def test_boxes_cover_the_same_pixels_from_0_and_half_open(tree: Path) -> None:
    source = VocSource(tree)
    assert [source.boxes(k).tolist() for k in range(5)] == [
        [[1, 2, 10, 12], [19, 4, 20, 5]],
        [[0, 0, 30, 20], [3, 5, 10, 8]],
        [[24, 14, 30, 20]],
        [],  # ends before it begins
        [[0, 1, 3, 4]],
    ]
    assert source.boxes(0).dtype == np.int32
    assert source.boxes(-1).tolist() == [[0, 1, 3, 4]]
    with pytest.raises(IndexError):
        source.boxes(5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 30)] * 2, *[st.integers(1, 20)] * 2), max_size=4))
def test_boxes_cover_the_pixels_that_voc_counts(ends: list[tuple[int, int, int, int]]) -> None:
    boxes = [(min(x, u), min(y, v), max(x, u), max(y, v)) for x, u, y, v in ends]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.xml"
        path.write_text(xml([("dog", EASY, box) for box in boxes]))
        read = read_voc(path).boxes
    for (xmin, ymin, xmax, ymax), (x0, y0, x1, y1) in zip(boxes, read, strict=True):
        for row in range(20):
            assert (y0 <= row < y1) == (ymin <= row + 1 <= ymax)
        for column in range(30):
            assert (x0 <= column < x1) == (xmin <= column + 1 <= xmax)


def test_what_an_evaluator_asks_of_a_pair(tree: Path) -> None:
    source = VocSource(tree)
    assert [source.difficult(k).tolist() for k in range(5)] == [
        [False, True], [True, False], [True], [], [False],
    ]  # fmt: skip
    names = [[source.classes[label] for label in source.picture_labels(k)] for k in range(5)]
    assert names == [["dog", "person"]] * 2 + [["car", "dog"]] * 2 + [["train"]]
    assert [source.size(k) for k in range(5)] == [(20, 30)] * 5


def test_a_sentence_says_what_is_there_and_what_is_missing(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        source = VocSource(tree)
    assert source.found == (
        f"voc: val2007 with 4 pictures in {tree}/VOCdevkit/VOC2007/JPEGImages, 20 classes, 5 pairs "
        "of both, 6 boxes (3 difficult) and masks of 0 pictures; left out: 1 without an object; "
        "without a box: 1 objects; missing: 1 files, 000007.jpg first"
    )
    assert caplog.messages == [source.found]


def test_a_missing_picture_is_an_error_of_its_item(tree: Path) -> None:
    (tree / "VOCdevkit/VOC2007/JPEGImages/000012.jpg").unlink()
    with pytest.raises(DecodeError, match=r"^cannot read .*000012\.jpg: No such file"):
        VocSource(tree).image(0)


@pytest.mark.parametrize("name", ["train", "val", "trainval", "test"])
def test_the_embedded_set_as_torchvision_reads_it(written: Path, name: str, sets: Any) -> None:
    source = open_source(f"voc-{name}2007:{written / 'voc'}")
    assert isinstance(source, VocSource)
    reference = VOCDetection(str(written / "voc"), year="2007", image_set=name)
    assert len(source) == len(reference)
    assert source.classes == tuple(sorted(sets[0].classes))
    for k, (_, target) in enumerate(reference):
        note = target["annotation"]
        assert source.image_id(k).split("/")[0] == note["filename"].removesuffix(".jpg")
        objects = note["object"]
        assert {thing["name"] for thing in objects} == {source.classes[source.label(k)]}
        corners = [[int(v) for v in thing["bndbox"].values()] for thing in objects]
        expected = np.array(corners) - [1, 1, 0, 0]
        assert list(objects[0]["bndbox"]) == ["xmin", "ymin", "xmax", "ymax"]
        np.testing.assert_array_equal(source.boxes(k), expected)
        assert not source.difficult(k).any()
        size = (int(note["size"]["height"]), int(note["size"]["width"]))
        assert source.size(k) == source.image(k).shape[:2] == size


def test_masks_are_those_that_torchvision_reads(written: Path) -> None:
    source = VocSource(written / "voc", "test")
    reference = VOCSegmentation(str(written / "voc"), year="2007", image_set="test")
    assert "and masks of 16 pictures" in source.found
    for k, (_, target) in enumerate(reference):
        numbers = np.asarray(target)
        assert target.mode == "P"
        # VOC's colours: dark red, dark green, dark yellow.
        assert target.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        assert set(np.unique(numbers)) == {0, source.label(k) + 1}
        np.testing.assert_array_equal(source.mask(k), numbers > 0)
        assert source.has_masks(k)
        assert not source.ignore(k).any()
        masks = source.masks(k)
        assert masks.dtype == np.bool_
        assert (masks.sum(0) == source.mask(k)).all()
        for mask, box in zip(masks, source.boxes(k), strict=True):
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_masks_of_one_class_among_others(tree: Path) -> None:
    folder = tree / "VOCdevkit/VOC2007"
    objects = np.zeros((20, 30), np.uint8)
    for number in range(1, 5):
        objects[number * 2, : number * 3] = number
    classes = np.array([0, 12, 15, 12, 15], np.uint8)[objects]
    objects[0], classes[0] = 255, 255
    for kind, values in (("SegmentationObject", objects), ("SegmentationClass", classes)):
        (folder / kind).mkdir()
        Image.fromarray(values).save(folder / kind / "000012.png")
    source = VocSource(tree)
    assert source.masks(0).sum((1, 2)).tolist() == [3, 9]  # the dogs are objects 1 and 3
    assert source.masks(1).sum((1, 2)).tolist() == [6, 12]
    assert (source.mask(1).sum(), source.ignore(1).sum()) == (18, 30)
    assert [source.has_masks(k) for k in range(5)] == [True, True, False, False, False]
    with pytest.raises(FileNotFoundError) as caught:
        source.masks(2)
    assert str(caught.value) == (
        f"voc: expected the segmentation of a picture in {folder}/SegmentationObject/000005.png, "
        "got none; VOC segments some pictures only, `has_masks` says which"
    )
    Image.new("RGB", (30, 20)).save(folder / "SegmentationClass/000012.png")
    with pytest.raises(ValueError) as coloured:
        source.mask(0)
    assert str(coloured.value) == (
        f"voc: expected a number a pixel (mode P or L) in {folder}/SegmentationClass/000012.png, "
        "got mode RGB"
    )


def test_the_embedded_set_is_that_of_the_imagenet_layout(written: Path, sets: Any) -> None:
    for name, own in (("train", sets[0]), ("val", sets[1])):
        source = VocSource(written / "voc", name)
        other = ImageNetSource(written / "imagenet", name)
        place = {other.files[k].rpartition("_")[2]: k for k in range(len(other))}
        for k in range(len(source)):
            number = f"{k + 1}.JPEG" if name == "train" else f"{k + 1:08d}.JPEG"
            twin = place[number]
            first = source.folder / "JPEGImages" / source.files[k]
            assert first.read_bytes() == (other.folder / other.files[twin]).read_bytes()
            assert source.classes[source.label(k)] == own.classes[own.label(k)]
            if name == "val":
                np.testing.assert_array_equal(source.boxes(k), other.boxes(twin))


def test_specs(written: Path, tree: Path) -> None:
    root = written / "voc"
    for spec, split, name in (
        (f"voc:{root}", "train", f"voc-train2007:{root}"),
        (f"voc:{root}", "val", f"voc-val2007:{root}"),
        (f"voc-test2007:{root}", "train", f"voc-test2007:{root}"),
        (f"voc-test:{root}", "val", f"voc-test2007:{root}"),
        (f"voc-trainval:{root}", "val", f"voc-trainval2007:{root}"),
        (str(root), "val", f"voc-val2007:{root}"),
        (f"voc:{root}/VOCdevkit", "val", f"voc-val2007:{root}/VOCdevkit"),
        (f"{root}/VOCdevkit/VOC2007", "val", f"voc-val2007:{root}/VOCdevkit/VOC2007"),
        (tree, "train", f"voc-train2007:{tree}"),
    ):
        source = open_source(spec, split)
        assert isinstance(source, VocSource)
        assert source.name == name
        assert open_source(name).name == name


def test_a_folder_without_a_year(tree: Path) -> None:
    (tree / "VOCdevkit/VOC2007").rename(tree / "mine")
    source = open_source(tree / "mine")
    assert source.name == f"voc-val:{tree}/mine"
    assert open_source(source.name).name == source.name


def test_classes_of_other_sets_are_those_of_lists_and_objects(tree: Path) -> None:
    folder = tree / "VOCdevkit/VOC2007"
    (folder / "Annotations/000007.xml").write_text(xml([("zebra", EASY, (1, 1, 2, 2))]))
    (folder / "ImageSets/Main/apple_val.txt").write_text("000007 -1\n")
    source = VocSource(tree)
    assert source.classes == ("apple", "car", "dog", "person", "train", "zebra")
    assert source.image_id(5) == "000007/zebra"


def test_two_years_with_one_set(tree: Path) -> None:
    devkit = tree / "VOCdevkit"
    (devkit / "VOC2012/JPEGImages").mkdir(parents=True)
    (devkit / "VOC2012/ImageSets/Main").mkdir(parents=True)
    for name in ("val", "trainval"):
        (devkit / f"VOC2012/ImageSets/Main/{name}.txt").write_text("a\n")
    with pytest.raises(ValueError) as caught:
        VocSource(tree)
    assert str(caught.value) == (
        f"voc: expected one year with a set val in {tree}, got VOC2007, VOC2012; say "
        f"voc-val2007:{tree} or voc-val2012:{tree}"
    )
    assert VocSource(tree, "val2007").name == f"voc-val2007:{tree}"
    assert VocSource(tree, "train").name == f"voc-train2007:{tree}"


def test_missing_things_are_named(tree: Path, tmp_path: Path) -> None:
    folder = tree / "VOCdevkit/VOC2007"
    with pytest.raises(FileNotFoundError) as caught:
        VocSource(tree, "test2007")
    assert str(caught.value) == (
        f"voc: expected ImageSets/Main/test2007.txt in {folder}, got train2007, val2007 alone; say "
        f"voc-train2007:{tree}"
    )
    (folder / "Annotations/000005.xml").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        VocSource(tree)
    assert str(caught.value) == (
        f"voc: expected an annotation in {folder}/Annotations for every picture of val, got none "
        "for 1 of 4, 000005.xml first"
    )
    (folder / "ImageSets/Main/val.txt").unlink()
    (folder / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        open_source(tree)
    assert str(caught.value) == (
        f"voc: expected ImageSets/Main/val.txt in {folder}, got none; add the lists of VOC's devkit"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        open_source(f"voc:{tmp_path}/empty")
    assert str(caught.value) == (
        f"voc: expected JPEGImages/ in {tmp_path}/empty, {tmp_path}/empty/VOC2007 or "
        f"{tmp_path}/empty/VOCdevkit/VOC2007 (or another year), got none; give the folder that "
        "holds VOCdevkit/"
    )


def test_lists_that_contradict_themselves_are_named(tree: Path) -> None:
    path = tree / "VOCdevkit/VOC2007/ImageSets/Main/val.txt"
    path.write_text("000012\n000005\n000012\n")
    with pytest.raises(ValueError) as caught:
        VocSource(tree)
    assert str(caught.value) == f"voc: expected every picture once in {path}, got 000012 twice"
    path.write_text("\n")
    with pytest.raises(ValueError) as caught:
        VocSource(tree)
    assert str(caught.value) == f"voc: expected pictures in {path}, got none"
    path.write_text("000007\n")
    with pytest.raises(ValueError) as caught:
        VocSource(tree)
    assert str(caught.value) == (
        f"voc: expected at least one object in the annotations of val in {path.parents[2]}, got "
        "none"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "no element found: line 1, column 20"),
        ("", "no element found: line 1, column 0"),
        (xml([("", EASY, (1, 2, 3, 4))]), "object 1 has no name"),
        (xml([("dog", EASY, (1, "x", 3, 4))]), "expected a number for ymin, got 'x'"),
        (xml([("dog", EASY, (1, 2, "inf", 4))]), "expected a number for xmax, got 'inf'"),
        (
            "<annotation><object><name>dog</name></object></annotation>",
            "expected a number for xmin, got ''",
        ),
        (
            xml([("dog", "<difficult>maybe</difficult>", (1, 2, 3, 4))]),
            "expected 0 or 1 for difficult, got 'maybe'",
        ),
        (
            "<annotation><size><width>w</width></size></annotation>",
            "could not convert string to float: 'w'",
        ),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_voc(path)
    assert str(caught.value) == f"cannot read the annotation {path}: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sides": (50, 40)},
            "write_voc: expected `sides` of 16 <= least <= largest, got (50, 40)",
        ),
        ({"aspect": 0.5}, "write_voc: expected `aspect` of at least 1, got 0.5"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        write_voc(tmp_path, None, None, **arguments)
    assert str(caught.value) == message
