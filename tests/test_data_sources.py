"""ImageNet in every layout, folders, the specs that open them, and one score in all layouts."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from casm_fast.data import (
    CocoSource,
    DecodeError,
    FolderSource,
    ImageNetSource,
    ImageSource,
    VocSource,
    WsolSource,
    generate,
    open_source,
    write_coco,
    write_tree,
    write_voc,
    write_wsol,
)
from casm_fast.data.annotations import read_annotation, read_solution
from casm_fast.data.synthetic import wnid
from casm_fast.evaluation import evaluate
from casm_fast.extraction import export, extract
from casm_fast.models.saliency import SaliencyModel
from casm_fast.report import report

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


def test_kaggle_boxes_of_train_from_the_solution(trees, tmp_path):
    root = copy(trees / "kaggle", tmp_path)
    name = min((root / "ILSVRC/Data/CLS-LOC/train/n90000003").iterdir()).stem
    lines = f"ImageId,PredictionString\n{name},n90000003 1 2 3 4 n90000003 5 6 7 8 \n"
    (root / "LOC_train_solution.csv").write_text(lines)
    source = ImageNetSource(root, "train")
    assert source.has_boxes
    boxes = {source.image_id(k): source.boxes(k).tolist() for k in range(24)}
    assert boxes.pop(f"n90000003/{name}.JPEG") == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert not any(boxes.values())
    (root / "LOC_train_solution.csv").write_text(lines + "x,n90000003 1\n")
    with pytest.raises(ValueError, match=r"LOC_train_solution\.csv, line 3: expected an image id"):
        ImageNetSource(root, "train").boxes(0)


@pytest.mark.parametrize(
    "place",
    [
        "bbox/val",
        "annotations/val",
        "Annotations/val",
        "Annotations",
        "ILSVRC2012_bbox_val_v3",
        "ILSVRC2012_bbox_val_v3/val",
    ],
)
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


# --- one score in all layouts ---------------------------------------------------------------------


class Painted(SaliencyModel):
    """Saliency is how far a pixel's red is from the picture's mean; logits are random features."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(len(classes), 3 * 16, generator=generator))
        self.classes = classes
        self.input_size = 32
        self.resize_policy = "crop"
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.classifier = self.decoder = SimpleNamespace(description=dict)
        self.separate_encoder = None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        red = nn.functional.avg_pool2d(images[:, :1], 2)
        features = nn.functional.avg_pool2d(images, 8).flatten(1)
        logits = (features - features.mean(1, keepdim=True)) @ self.weight.T
        return (red - red.mean((2, 3), keepdim=True)).abs(), logits


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same twenty pictures in every layout, and the spec of each."""
    root = tmp_path_factory.mktemp("layouts")
    val = generate(20, seed=1, split="val")
    options = {"sides": (40, 64), "greyscale": 0.2, "rotated": 0.2}
    for layout in ("folders", "flat", "kaggle"):
        write_tree(root / layout, None, val, layout=layout, **options)
    copy(root / "kaggle", root / "solution")
    shutil.rmtree(root / "solution/ILSVRC/Annotations")
    write_coco(root / "coco", None, val, **options)
    write_voc(root / "voc", None, None, test=val, **options)
    write_wsol(root / "wsol", None, None, test=val, **options)
    return {
        "folders": root / "folders",
        "flat": root / "flat",
        "kaggle": root / "kaggle",
        "solution": root / "solution",
        "coco": root / "coco",
        "voc": f"voc-test2007:{root}/voc",
        "wsol": f"wsol-test:{root}/wsol",
    }


@pytest.fixture(scope="module")
def first_scores(layouts):
    val = generate(20, seed=1, split="val")
    made = extract(Painted(val.classes), layouts["folders"], batch_size=8)
    return made.table, evaluate(made)


@pytest.mark.parametrize("layout", ["flat", "kaggle", "solution", "coco", "voc", "wsol"])
def test_the_same_pictures_have_the_same_scores(layouts, first_scores, layout):
    table, scores = first_scores
    assert scores.localisation is not None
    assert 0 < scores.localisation.le < 1
    assert 0 < scores.top1 < 1
    val = generate(20, seed=1, split="val")
    source = open_source(layouts[layout])
    reference = open_source(layouts["folders"])
    for k in range(20):
        np.testing.assert_array_equal(source.boxes(k), reference.boxes(k))
        np.testing.assert_array_equal(source.image(k), reference.image(k))
    made = extract(Painted(val.classes), layouts[layout], batch_size=8)
    assert made.description.source == source.name
    # What an image is called, and the random baseline drawn from it, are the layout's.
    assert made.table.drop_columns(["image_id"]).equals(table.drop_columns(["image_id"]))
    assert made.table["label"].to_pylist() == val.labels.tolist()
    got = evaluate(made)
    for name in ("localisation", "top1", "top5", "saliency", "counts"):
        assert getattr(got, name) == getattr(scores, name)
    assert "Localisation on " + source.name in str(got)


@pytest.mark.parametrize("layout", ["voc", "wsol"])
def test_a_table_finds_its_pictures_again(layouts, tmp_path, layout):
    val = generate(20, seed=1, split="val")
    model = Painted(val.classes)
    made = extract(model, layouts[layout], tmp_path / "boxes.parquet", limit=6)
    page = report(made.path, evaluate(made), tmp_path / "page.html", model=model)
    assert open_source(layouts[layout]).image_id(0) in page.read_text()
    results, truth = export(made.path, tmp_path / "results.json", category="label")
    shown = json.loads(truth.read_text())
    assert [len(shown[key]) for key in ("images", "categories")] == [6, 8]
    notes = [note["category_id"] - 1 for note in shown["annotations"]]
    assert sorted(set(notes)) == sorted(set(val.labels[:6].tolist()))
    assert len(json.loads(results.read_text())) == 6


# --- looking --------------------------------------------------------------------------------------


def test_a_path_is_opened_by_looking(layouts, folder, tmp_path):
    write_wsol(tmp_path / "tuned", None, generate(4, split="val"), sides=(20, 30))
    write_voc(tmp_path / "voc", None, generate(4, split="val"), sides=(20, 30))
    for path, kind in (
        (layouts["folders"], ImageNetSource),
        (layouts["kaggle"], ImageNetSource),
        (layouts["kaggle"] / "ILSVRC", ImageNetSource),
        (layouts["coco"], CocoSource),
        (tmp_path / "voc", VocSource),
        (tmp_path / "tuned", WsolSource),
        (folder, FolderSource),
        (folder / "cat", FolderSource),
    ):
        assert type(open_source(path)) is kind
        assert type(open_source(str(path))) is kind


def test_every_source_says_what_was_found_and_what_is_missing(
    sets, trees, layouts, folder, tmp_path_factory, caplog
):
    val = sets[1]
    root = tmp_path_factory.mktemp("found")
    cut = copy(trees / "folders", root / "cut")
    for number in (3, 9):
        (cut / f"Annotations/CLS-LOC/val/ILSVRC2012_val_{number:08d}.xml").unlink()
    nested = copy(trees / "flat", root / "nested")
    (nested / "annotations/n90000000").mkdir()
    for path in (nested / "annotations").glob("*.xml"):
        path.rename(nested / "annotations/n90000000" / path.name)
    short = layouts["solution"] / "LOC_val_solution.csv"
    picture = folder / "cat/a.jpg"
    kaggle = f"{layouts['solution']}/ILSVRC/Data/CLS-LOC/val"
    cases = {
        trees / "folders": (
            f"imagenet: val with 20 images of 8 classes in {trees}/folders/val (class folders), "
            f"boxes from the XML files in {trees}/folders/Annotations/CLS-LOC/val"
        ),
        f"imagenet-train:{trees}/folders": (
            f"imagenet: train with 24 images of 8 classes in {trees}/folders/train (class folders);"
            " missing: boxes"
        ),
        cut: (
            f"imagenet: val with 20 images of 8 classes in {cut}/val (class folders), boxes from "
            f"the XML files in {cut}/Annotations/CLS-LOC/val; missing: boxes of 2 images, "
            "ILSVRC2012_val_00000003 first"
        ),
        nested: (
            f"imagenet: val with 20 images of 8 classes in {nested}/val (flat), boxes from the XML "
            f"files in {nested}/annotations"
        ),
        layouts["solution"]: (
            f"imagenet: val with 20 images of 8 classes in {kaggle} (flat), boxes from {short}"
        ),
        folder: f"folder: 3 images in {folder}, of 2 classes in folders; missing: boxes",
        folder / "cat": (
            f"folder: 2 images in {folder}/cat, without classes; missing: labels and boxes"
        ),
        picture: f"picture: {picture}; missing: its label and boxes",
        "synthetic:images=20,seed=1": (
            "synthetic: val with 20 pictures of 64 x 64, 8 classes, "
            f"{sum(len(val.boxes(k)) for k in range(20))} boxes"
        ),
        "synthetic:images=9,emblem=60": (
            "synthetic: val with 9 pictures of 64 x 64, 8 classes, 9 boxes, emblems of which 60 % "
            "are true"
        ),
    }
    for spec, sentence in cases.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="casm_fast.data"):
            source = open_source(spec)
        assert source.found == sentence
        assert caplog.messages[-1:] == [sentence]
        assert caplog.messages.count(sentence) == 1


def test_trees_of_two_layouts_and_of_none_are_named(tmp_path):
    both, none = tmp_path / "both", tmp_path / "none"
    val = generate(4, split="val")
    write_coco(both, None, val, sides=(20, 30))
    write_voc(both, None, val, sides=(20, 30))
    (both / "train").mkdir()
    with pytest.raises(ValueError) as caught:
        open_source(both)
    assert str(caught.value) == (
        f"open_source: expected one layout in {both}, got coco ({both}/annotations/"
        f"instances_val2017.json) and voc ({both}/VOCdevkit/VOC2007/JPEGImages); say coco:{both} "
        f"or voc:{both}"
    )
    assert type(open_source(f"coco:{both}")) is CocoSource
    none.mkdir()
    (none / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError) as nothing:
        open_source(none)
    assert str(nothing.value) == (
        f"open_source: expected images in {none}: train/ or val/ (ImageNet), annotations/"
        "instances_*.json (COCO), JPEGImages/ (VOC), image_ids.txt (wsolevaluation), or a folder "
        "of image files, got none of these; give the folder that holds one"
    )
    with pytest.raises(NotADirectoryError) as file:
        open_source(none / "notes.txt")
    assert str(file.value) == f"folder: expected a folder, got the file {none}/notes.txt"


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
            "imagenet-val:DIR, coco:DIR, voc:DIR, wsol:DIR, folder:DIR, list:FILE, parquet:FILE or "
            "webdataset:TAR",
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
        ("voc-test:", ValueError, 'open_source: expected a path after "voc-test:", got none'),
        ("wsol:", ValueError, 'open_source: expected a path after "wsol:", got none'),
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
