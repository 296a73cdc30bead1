"""ImageNet in every layout, folders, and the specs that open them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casm_fast.data import (
    DecodeError,
    FolderSource,
    ImageNetSource,
    ImageSource,
    generate,
    open_source,
    write_tree,
)
from casm_fast.data.annotations import read_annotation, read_solution
from casm_fast.data.synthetic import wnid

WNIDS = tuple(wnid(label) for label in range(8))


@pytest.fixture(scope="module")
def sets():
    return generate(24, seed=1), generate(20, seed=1, split="val")


@pytest.fixture(scope="module")
def trees(sets, tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    write_tree(root / "folders", *sets, sides=(40, 64))
    write_tree(root / "flat", *sets, sides=(40, 64), layout="flat", annotations="annotations")
    write_tree(root / "kaggle", *sets, sides=(40, 64), layout="kaggle")
    return root


def copy(tree: Path, to: Path) -> Path:
    shutil.copytree(tree, to, dirs_exist_ok=True)
    return to


def check(source: ImageSource, val) -> None:
    """The source shows the images, labels and number of boxes that were written."""
    assert isinstance(source, ImageSource)
    assert tuple(source.classes) == WNIDS
    assert source.has_boxes
    assert [source.image_id(k) for k in range(len(source))] == [
        f"ILSVRC2012_val_{k + 1:08d}" for k in range(20)
    ]
    assert [source.label(k) for k in range(20)] == val.labels.tolist()
    for k in range(20):
        boxes = source.boxes(k)
        assert boxes.dtype == np.int32
        assert len(boxes) == len(val.boxes(k))
        height, width, _ = source.image(k).shape
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= [width, height]).all()


@pytest.mark.parametrize("layout", ["folders", "flat", "kaggle"])
def test_val_is_the_same_in_every_layout(trees, sets, layout):
    source = ImageNetSource(trees / layout)
    check(source, sets[1])
    reference = ImageNetSource(trees / "folders")
    for k in range(20):
        np.testing.assert_array_equal(source.image(k), reference.image(k))
        np.testing.assert_array_equal(source.boxes(k), reference.boxes(k))


def test_boxes_are_on_the_object(trees, sets):
    # Scenes of one object without distractors: the strongest contrasts lie inside the box.
    val = sets[1]
    source = ImageNetSource(trees / "folders")
    hits = total = 0
    for k in range(20):
        image = source.image(k).astype(float).mean(-1)
        step = np.abs(np.diff(image, axis=1))
        inside = np.zeros(step.shape, bool)
        for x0, y0, x1, y1 in source.boxes(k):
            inside[y0:y1, x0:x1] = True
        if not val.items.present[k, :3].any():
            total += 1
            hits += step[inside].mean() > 1.5 * step[~inside].mean()
    assert total >= 4
    assert hits == total


def test_train(trees, sets):
    source = ImageNetSource(trees / "folders", "train")
    assert len(source) == 24
    assert not source.has_boxes
    assert source.boxes(0).shape == (0, 4)
    assert source.image_id(0).startswith("n90000000/n90000000_")
    counts = np.bincount([source.label(k) for k in range(24)], minlength=8)
    np.testing.assert_array_equal(counts, np.bincount(sets[0].labels, minlength=8))
    for k in range(24):
        assert source.classes[source.label(k)] == source.image_id(k).split("/")[0]


def test_descriptions_come_from_the_mapping(trees, sets):
    assert ImageNetSource(trees / "folders").descriptions == sets[1].classes


@pytest.mark.parametrize("inner", ["ILSVRC", ""])
def test_kaggle_from_either_root(trees, sets, inner):
    check(ImageNetSource(trees / "kaggle" / inner), sets[1])


def test_kaggle_boxes_from_the_solution_alone(trees, sets, tmp_path):
    root = copy(trees / "kaggle", tmp_path)
    shutil.rmtree(root / "ILSVRC/Annotations")
    source = ImageNetSource(root)
    assert source.annotations is None
    check(source, sets[1])


@pytest.mark.parametrize("place", ["bbox/val", "annotations/val", "Annotations/val", "Annotations"])
def test_annotations_are_found(trees, sets, tmp_path, place):
    root = copy(trees / "folders", tmp_path / "a")
    (root / "Annotations").rename(tmp_path / "b")
    shutil.copytree(tmp_path / "b/CLS-LOC/val", root / place)
    check(ImageNetSource(root), sets[1])


def test_annotations_in_class_folders_and_elsewhere(trees, sets, tmp_path):
    root = copy(trees / "folders", tmp_path / "a")
    val = ImageNetSource(trees / "folders")
    for k in range(20):
        folder = tmp_path / "notes" / WNIDS[val.label(k)]
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{val.image_id(k)}.xml"
        (root / "Annotations/CLS-LOC/val" / name).rename(folder / name)
    assert not ImageNetSource(root).has_boxes
    check(ImageNetSource(root, annotations=tmp_path / "notes"), sets[1])


@pytest.mark.parametrize("form", ["wnids", "file-wnid", "file-label"])
def test_flat_val_with_a_ground_truth_file(trees, sets, tmp_path, form):
    root = copy(trees / "flat", tmp_path)
    shutil.rmtree(root / "annotations")
    labels = sets[1].labels
    lines = {
        "wnids": [WNIDS[k] for k in labels],
        "file-wnid": [f"ILSVRC2012_val_{i + 1:08d}.JPEG {WNIDS[k]}" for i, k in enumerate(labels)],
        "file-label": [f"ILSVRC2012_val_{i + 1:08d}.JPEG {k}" for i, k in enumerate(labels)],
    }[form]
    (root / "val.txt").write_text("\n".join(lines) + "\n")
    for source in (ImageNetSource(root), ImageNetSource(root, ground_truth=root / "val.txt")):
        assert [source.label(k) for k in range(20)] == labels.tolist()
        assert not source.has_boxes


def test_flat_val_alone_takes_its_classes_from_xml(trees, sets, tmp_path):
    root = copy(trees / "flat", tmp_path)
    shutil.rmtree(root / "train")
    (root / "LOC_synset_mapping.txt").unlink()
    check(ImageNetSource(root), sets[1])


def test_objects_of_another_class_are_left_out(trees, tmp_path):
    root = copy(trees / "folders", tmp_path)
    path = root / "Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"
    text = path.read_text()
    other = (
        "<object><name>n1</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax>"
    )
    path.write_text(text.replace("</annotation>", other + "</bndbox></object></annotation>"))
    np.testing.assert_array_equal(
        ImageNetSource(root).boxes(0), ImageNetSource(trees / "folders").boxes(0)
    )
    annotation = read_annotation(path)
    assert annotation.names[-1] == "n1"
    np.testing.assert_array_equal(annotation.boxes[-1], [1, 2, 3, 4])  # as they stand


def test_a_missing_xml_file_means_no_boxes(trees, tmp_path):
    root = copy(trees / "folders", tmp_path)
    (root / "Annotations/CLS-LOC/val/ILSVRC2012_val_00000003.xml").unlink()
    assert ImageNetSource(root).boxes(2).shape == (0, 4)


def test_grey_and_rotated_files(sets, tmp_path):
    write_tree(tmp_path, *sets, sides=(40, 64), greyscale=0.5, rotated=0.5)
    check(ImageNetSource(tmp_path), sets[1])


def test_another_decoder(trees):
    source = ImageNetSource(trees / "folders", decoder=lambda path: np.full((2, 3, 3), 7, np.uint8))
    assert source.image(0).shape == (2, 3, 3)


# --- folders --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/a.jpg", "cat/deep/b.PNG", "dog/c.webp", "dog/notes.txt", "dog/.hidden.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4)).save(path, "PNG")
    return tmp_path


def test_class_folders(folder):
    source = FolderSource(folder)
    assert source.classes == ("cat", "dog")
    assert source.files == ["cat/a.jpg", "cat/deep/b.PNG", "dog/c.webp"]
    assert [source.label(k) for k in range(len(source))] == [0, 0, 1]
    assert source.image(1).shape == (4, 5, 3)
    assert source.boxes(0).shape == (0, 4)
    assert isinstance(source, ImageSource)


def test_flat_folder(folder):
    source = FolderSource(folder / "cat")
    assert source.classes == ()
    assert source.files == ["a.jpg", "deep/b.PNG"]
    assert source.label(0) == -1


def test_broken_image_is_named(folder):
    (folder / "cat/a.jpg").write_bytes(b"nothing")
    with pytest.raises(DecodeError) as caught:
        FolderSource(folder).image(0)
    assert str(caught.value) == (
        f"cannot decode {folder}/cat/a.jpg: it is not an image of a known format"
    )


# --- specs ----------------------------------------------------------------------------------------


def test_specs(trees, folder):
    cases = {
        ("synthetic:images=8", "train"): "synthetic:train,images=8",
        (f"imagenet:{trees}/folders", "train"): f"imagenet-train:{trees}/folders",
        (f"imagenet-val:{trees}/folders", "train"): f"imagenet-val:{trees}/folders",
        (f"imagenet-train:{trees}/folders", "val"): f"imagenet-train:{trees}/folders",
        (f"{trees}/kaggle", "val"): f"imagenet-val:{trees}/kaggle",
        (trees / "flat", "val"): f"imagenet-val:{trees}/flat",
        (f"folder:{folder}", "val"): f"folder:{folder}",
        (folder, "val"): f"folder:{folder}",
    }
    for (spec, split), name in cases.items():
        source = open_source(spec, split)
        assert source.name == name
        assert open_source(source) is source
        assert open_source(name).name == name


def test_missing_things_are_named(tmp_path, trees):
    (tmp_path / "empty").mkdir()
    file = tmp_path / "file.txt"
    file.write_text("x")
    none = tmp_path / "none"
    cases = [
        (
            none,
            FileNotFoundError,
            f"open_source: there is no {none}; give an existing path, synthetic, imagenet:DIR, "
            "imagenet-val:DIR, coco:DIR, voc:DIR, wsol:DIR or folder:DIR",
        ),
        (
            f"imagenet:{none}",
            FileNotFoundError,
            f"imagenet: there is no {none}; give the path of an existing folder",
        ),
        (
            f"folder:{file}",
            NotADirectoryError,
            f"folder: expected a folder, got the file {file}",
        ),
        (
            f"folder:{tmp_path / 'empty'}",
            FileNotFoundError,
            f"folder: expected image files in {tmp_path / 'empty'}, got none; give a folder of "
            "images or one that holds a folder per class",
        ),
        (
            f"imagenet:{tmp_path / 'empty'}",
            FileNotFoundError,
            "imagenet: expected val/ or ILSVRC/Data/CLS-LOC/val/ in "
            f"{tmp_path / 'empty'}, got neither; give the folder that holds it",
        ),
        ("folder:", ValueError, 'open_source: expected a path after "folder:", got none'),
    ]
    for spec, kind, message in cases:
        with pytest.raises(kind) as caught:
            open_source(spec)
        assert str(caught.value) == message
    with pytest.raises(ValueError) as split:
        open_source("synthetic", "test")
    assert str(split.value) == 'open_source: expected `split` "train" or "val", got \'test\''


def test_class_folders_without_images_are_named(trees, folder, tmp_path):
    for name in ("fox", "hen"):
        (folder / name).mkdir()
    with pytest.raises(ValueError) as caught:
        FolderSource(folder)
    assert str(caught.value) == (
        f"expected images in every class folder of {folder}, got none in 2 of 4: fox, hen; add "
        "images or remove the folders"
    )


def test_unknown_classes_are_named(trees, tmp_path):
    root = copy(trees / "folders", tmp_path)
    shutil.copytree(root / "val" / WNIDS[0], root / "val/n12345678")
    with pytest.raises(ValueError) as caught:
        ImageNetSource(root)
    assert str(caught.value) == (
        f"imagenet: expected the classes of {root}/val among the 8 of LOC_synset_mapping.txt or "
        "train/, got n12345678"
    )


def test_flat_val_without_classes_says_what_to_do(trees, tmp_path):
    root = copy(trees / "flat", tmp_path)
    shutil.rmtree(root / "annotations")
    with pytest.raises(ValueError) as caught:
        ImageNetSource(root)
    assert str(caught.value) == (
        f"imagenet: expected class folders in {root}/val, or beside a flat one "
        "LOC_val_solution.csv, a ground-truth list or XML annotations, got none; give "
        "`ground_truth=` or `annotations=`"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1\n2\n",
            "expected wnids such as n01440764, got '1'; the devkit's numbers are not labels, give "
            "a file with `<file> <wnid>` a line",
        ),
        ("n01440764\n", "expected one wnid for each of 20 images, got 1 lines"),
        (
            "ILSVRC2012_val_00000001.JPEG n90000001\n",
            "expected a line `<file> <wnid>` for every image, got none for "
            "ILSVRC2012_val_00000002 and 18 others",
        ),
    ],
)
def test_bad_ground_truth_files(trees, tmp_path, text, message):
    path = tmp_path / "truth.txt"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        ImageNetSource(trees / "flat", ground_truth=path)
    assert str(caught.value) == f"{path}: {message}"


def test_bad_annotations_are_named(tmp_path):
    xml, table = tmp_path / "a.xml", tmp_path / "a.csv"
    xml.write_text("<annotation><object>")
    with pytest.raises(ValueError, match=r"^cannot read the annotation .*a\.xml: "):
        read_annotation(xml)
    xml.write_text("<annotation><object><name>n1</name></object></annotation>")
    with pytest.raises(ValueError, match=r"^cannot read the annotation .*a\.xml: "):
        read_annotation(xml)
    table.write_text("ImageId,PredictionString\nx,n1 2 3\n")
    with pytest.raises(ValueError) as caught:
        read_solution(table)
    assert str(caught.value) == (
        f"{table}, line 2: expected an image id and groups of `wnid x0 y0 x1 y1` (got 3 words)"
    )
