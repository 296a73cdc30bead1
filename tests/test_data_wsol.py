"""wsolevaluation's metadata: hand-made files, OpenCV as the oracle of masks, the embedded set."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from casm_fast.data import (
    DecodeError,
    ImageNetSource,
    ImageSource,
    WsolSource,
    generate,
    open_source,
    write_tree,
    write_wsol,
)

# Lines out of order, several boxes, none, a comma in a path, an image that is not listed.
FILES = {
    "image_ids.txt": "val/b.jpg\nval/a, too.jpg\nval/c.jpg\n",
    "class_labels.txt": "val/a, too.jpg,7\nval/b.jpg,0\nval/c.jpg,999\nval/other.jpg,3\n",
    "image_sizes.txt": "val/b.jpg,30,20\nval/a, too.jpg,40,50\nval/c.jpg,30,20\n",
    "localization.txt": (
        "val/a, too.jpg,1,2,3,4\nval/b.jpg,0,0,29,19\nval/other.jpg,1,1,2,2\n"
        "val/a, too.jpg,10,20,39,49\n\n"
    ),
    "image_ids_proxy.txt": "val/c.jpg\n",
}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def write_picture(path: Path, size: tuple[int, int] = (30, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The hand-made set as metadata/CUB/test and dataset/CUB."""
    write_files(tmp_path / "metadata/CUB/test", FILES)
    write_picture(tmp_path / "dataset/CUB/val/b.jpg")
    write_picture(tmp_path / "dataset/CUB/val/a, too.jpg", (40, 50))
    return tmp_path


def set_masks(tree: Path, sizes: dict[str, tuple[int, int]], lines: str) -> dict[str, Any]:
    """Random mask files of (width, height) below dataset/CUB, and their lines."""
    (tree / "metadata/CUB/test/localization.txt").write_text(lines)
    (tree / "metadata/CUB/test/image_sizes.txt").unlink()
    drawn = {}
    for k, (name, (width, height)) in enumerate(sizes.items()):
        shown = cv2.resize(np.random.default_rng(k).random((4, 4)), (width, height)) > 0.5
        drawn[name] = 255 * shown.astype(np.uint8)
        path = tree / "dataset/CUB" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn[name]).convert("1" if k % 2 else "L").save(path)
    return drawn


@pytest.fixture(scope="module")
def sets() -> Any:
    return generate(24, seed=1), generate(16, seed=1, split="val")


@pytest.fixture(scope="module")
def written(sets: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures with boxes, with masks, and in ImageNet's layout."""
    root = tmp_path_factory.mktemp("written")
    options: dict[str, Any] = {"sides": (40, 64), "greyscale": 0.2, "rotated": 0.2}
    write_wsol(root / "boxes", *sets, test=sets[1], **options)
    write_wsol(
        root / "masks", None, None, test=sets[1], dataset="OpenImages", masks=True, **options
    )
    write_tree(root / "imagenet", *sets, **options)
    return root


def test_images_labels_boxes_and_sizes_are_those_of_the_lines(tree: Path) -> None:
    source = WsolSource(tree, "test")
    assert isinstance(source, ImageSource)
    assert source.name == f"wsol:{tree}/metadata/CUB/test"
    assert source.folder == tree / "dataset/CUB"
    assert source.classes == ()
    assert (source.has_boxes, source.has_masks) == (True, False)
    assert [source.image_id(k) for k in range(len(source))] == [
        "val/b.jpg", "val/a, too.jpg", "val/c.jpg",
    ]  # fmt: skip
    assert [source.label(k) for k in range(3)] == [0, 7, 999]
    assert [source.size(k) for k in range(3)] == [(20, 30), (50, 40), (20, 30)]
    assert [source.boxes(k).tolist() for k in range(3)] == [
        [[0, 0, 29, 19]],
        [[1, 2, 3, 4], [10, 20, 39, 49]],
        [],
    ]
    assert source.boxes(0).dtype == np.int32
    assert source.boxes(-2).tolist() == source.boxes(1).tolist()
    assert source.image(1).shape == (50, 40, 3)
    with pytest.raises(DecodeError, match=r"^cannot read .*val/c\.jpg: No such file"):
        source.image(2)
    with pytest.raises(IndexError):
        source.boxes(3)


def test_a_sentence_says_what_is_there_and_what_is_missing(
    tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        source = WsolSource(tree, "test")
    assert source.found == (
        f"wsol: 3 images in {tree}/dataset/CUB by {tree}/metadata/CUB/test, 3 classes without "
        "names, 3 boxes; without either: 1 images; left out: 1 lines of localization.txt about "
        "other images; missing: 1 files, val/c.jpg first"
    )
    assert caplog.messages == [source.found]


def test_labels_alone_and_the_proxy_set(tree: Path) -> None:
    folder = tree / "metadata/CUB/test"
    for name in ("image_sizes.txt", "localization.txt"):
        (folder / name).unlink()
    source = WsolSource(tree, "test")
    assert not source.has_boxes
    assert source.boxes(1).shape == (0, 4)
    assert source.size(1) == (50, 40)
    assert source.masks(1).shape == (0, 50, 40)
    assert not source.ignore(1).any()
    assert source.found == (
        f"wsol: 3 images in {tree}/dataset/CUB by {folder}, 3 classes without names, 0 boxes; "
        "missing: image_sizes.txt and localization.txt; missing: 1 files, val/c.jpg first"
    )
    proxy = open_source(f"wsol-test:{tree},images={tree}/dataset/CUB,proxy")
    assert proxy.name == f"wsol:{folder},images={tree}/dataset/CUB,proxy"
    assert (len(proxy), proxy.image_id(0), proxy.label(0)) == (1, "val/c.jpg", 999)
    assert open_source(proxy.name).name == proxy.name


def test_masks_are_those_of_opencv(tree: Path) -> None:
    sizes = {"val/b_1.png": (33, 21), "val/b_2.png": (33, 21), "val/b_ignore.png": (35, 70)}
    drawn = set_masks(
        tree, sizes, "val/b.jpg,val/b_1.png,val/b_ignore.png\nval/b.jpg,val/b_2.png,\n"
    )
    source = WsolSource(tree, "test")
    assert (source.has_boxes, source.has_masks) == (False, True)
    assert source.boxes(0).shape == (0, 4)
    for size in (None, (224, 224), (7, 50)):

        def resized(name: str, size: tuple[int, int] = size or (21, 33)) -> Any:
            return cv2.resize(drawn[name], size[::-1], interpolation=cv2.INTER_NEAREST) > 0

        objects = np.stack([resized("val/b_1.png"), resized("val/b_2.png")])
        np.testing.assert_array_equal(source.masks(0, size), objects)
        np.testing.assert_array_equal(source.mask(0, size), objects.any(0))
        ignored = source.ignore(0, size)
        np.testing.assert_array_equal(ignored, resized("val/b_ignore.png") & ~objects.any(0))
        assert 0 < ignored.sum() < resized("val/b_ignore.png").sum()
    assert source.masks(1, (5, 6)).shape == (0, 5, 6)
    assert source.found == (
        f"wsol: 3 images in {tree}/dataset/CUB by {tree}/metadata/CUB/test, 3 classes without "
        "names, 2 masks; without either: 2 images; missing: image_sizes.txt; missing: 1 files, "
        "val/c.jpg first"
    )


def test_masks_that_contradict_each_other_are_named(tree: Path) -> None:
    sizes = {"val/b_1.png": (33, 21), "val/b_2.png": (32, 21)}
    lines = "val/b.jpg,val/b_1.png,x.png\nval/b.jpg,val/b_2.png,"
    set_masks(tree, sizes, lines)
    with pytest.raises(ValueError) as caught:
        WsolSource(tree, "test").masks(0)
    assert str(caught.value) == (
        "wsol: expected masks of one size for val/b.jpg, got (21, 32), (21, 33); give `size`"
    )
    path = tree / "metadata/CUB/test/localization.txt"
    path.write_text(lines + "y.png\n")
    with pytest.raises(ValueError) as caught:
        WsolSource(tree, "test")
    assert str(caught.value) == (
        f"{path}, line 2: expected one ignore mask for val/b.jpg, got x.png and y.png"
    )


def test_the_embedded_set_is_that_of_the_imagenet_layout(written: Path, sets: Any) -> None:
    reference = ImageNetSource(written / "imagenet")
    for name in ("val", "test"):
        source = WsolSource(written / "boxes", name)
        assert len(source) == len(reference) == 16
        for k in range(16):
            first = (source.folder / source.files[k]).read_bytes()
            assert first == (reference.folder / reference.files[k]).read_bytes()
            np.testing.assert_array_equal(source.boxes(k), reference.boxes(k))
            assert source.label(k) == reference.label(k)
            assert source.size(k) == source.image(k).shape[:2]
    train = WsolSource(written / "boxes", "train")
    other = ImageNetSource(written / "imagenet", "train")
    assert not train.has_boxes
    paths = {train.image_id(k): k for k in range(24)}
    for k in range(24):
        twin = paths[f"train/{other.image_id(k)}"]
        assert train.label(twin) == other.label(k)
        np.testing.assert_array_equal(train.image(twin), other.image(k))


def test_masks_of_the_embedded_set_fill_its_boxes(written: Path) -> None:
    source = WsolSource(written / "masks", "test")
    boxed = WsolSource(written / "boxes", "test")
    for k in range(16):
        masks = source.masks(k)
        assert masks.shape[1:] == source.image(k).shape[:2]
        for mask, box in zip(masks, boxed.boxes(k), strict=True):
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert not source.ignore(k).any()


def test_specs(written: Path) -> None:
    root, folder = written / "boxes", written / "boxes/metadata/ILSVRC"
    for spec, split, name in (
        (f"wsol:{root}", "val", "val"),
        (f"wsol:{root}", "train", "train"),
        (f"wsol-test:{root}", "train", "test"),
        (f"wsol-test:{folder}", "val", "test"),
        (f"wsol-test:{root}/metadata", "val", "test"),
        (f"wsol:{folder}/test", "val", "test"),
        (root, "val", "val"),
        (folder, "train", "train"),
        (folder / "test", "val", "test"),
    ):
        source = open_source(spec, split)
        assert isinstance(source, WsolSource)
        assert source.name == f"wsol:{folder}/{name}"
        assert open_source(source.name).name == source.name


@pytest.mark.parametrize("place", ["", "images"])
def test_images_near_the_lists_and_elsewhere(tree: Path, tmp_path: Path, place: str) -> None:
    folder = tree / "metadata/CUB/test"
    (tree / "dataset/CUB/val").rename(tree / "val")
    with pytest.raises(FileNotFoundError) as caught:
        WsolSource(write_files(tmp_path / "far/away/from/it", FILES))
    assert str(caught.value) == (
        f"wsol: expected the images of {tmp_path}/far/away/from/it (val/b.jpg, …) in dataset/from/ "
        f"beside metadata/from/, or near the lists, got none; give wsol:{tmp_path}/far/away/from/it"
        ",images=DIR"
    )
    source = open_source(f"wsol:{folder},images={tree}")
    assert source.image(0).shape == (20, 30, 3)
    assert source.name == f"wsol:{folder},images={tree}"
    (folder / place).mkdir(exist_ok=True)
    (tree / "val").rename(folder / place / "val")
    assert WsolSource(folder).folder == folder / place


def test_missing_things_are_named(tree: Path, tmp_path: Path) -> None:
    folder = tree / "metadata/CUB/test"
    with pytest.raises(FileNotFoundError) as caught:
        open_source(tree)
    assert str(caught.value) == (
        f"wsol: expected image_ids.txt in {tree}, {tree}/val, {tree}/*/val or "
        f"{tree}/metadata/*/val, got none; say wsol:{folder}"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        open_source(f"wsol:{tmp_path}/empty")
    assert str(caught.value) == (
        f"wsol: expected image_ids.txt in {tmp_path}/empty, {tmp_path}/empty/val, "
        f"{tmp_path}/empty/*/val or {tmp_path}/empty/metadata/*/val, got none; give the folder of "
        "the metadata files"
    )
    write_files(tree / "metadata/ILSVRC/test", FILES)
    with pytest.raises(ValueError) as several:
        WsolSource(tree, "test")
    assert str(several.value) == (
        f"wsol: expected one set with a split test in {tree}, got 2; say wsol:{folder} or "
        f"wsol:{tree}/metadata/ILSVRC/test"
    )
    with pytest.raises(FileNotFoundError) as caught:
        WsolSource(folder, images=tree / "none")
    assert str(caught.value) == (
        f"wsol images: there is no {tree}/none; give the path of an existing folder"
    )
    (folder / "image_ids_proxy.txt").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        WsolSource(folder, proxy=True)
    assert str(caught.value) == f"wsol: there is no {folder}/image_ids_proxy.txt"
    (folder / "class_labels.txt").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        WsolSource(folder)
    assert str(caught.value) == (
        f"wsol: expected class_labels.txt beside image_ids.txt in {folder}, got none"
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("image_ids.txt", "\n", ": expected the path of an image a line, got none"),
        (
            "image_ids.txt",
            "val/b.jpg\nx\nval/b.jpg\n",
            ": expected every image once, got val/b.jpg twice",
        ),
        ("class_labels.txt", "val/b.jpg\n", ", line 1: expected `ID,label`, got 'val/b.jpg'"),
        ("class_labels.txt", "val/b.jpg,-1\n", ", line 1: expected `ID,label`, got '-1'"),
        (
            "class_labels.txt",
            "val/b.jpg,4\n",
            ": expected a label for every image, got none for val/a, too.jpg and 1 others",
        ),
        (
            "image_sizes.txt",
            "val/b.jpg,4\n",
            ", line 1: expected `ID,width,height`, got 'val/b.jpg,4'",
        ),
        (
            "image_sizes.txt",
            "val/b.jpg,4,0\n",
            ", line 1: expected `ID,width,height`, got '4,0'",
        ),
        (
            "image_sizes.txt",
            "val/b.jpg,4,5\n",
            ": expected a size for every image, got none for val/a, too.jpg and 1 others",
        ),
        (
            "localization.txt",
            "val/b.jpg,1,2,3,4\nval/b.jpg,1,2,3,four\n",
            ", line 2: expected `ID,x0,y0,x1,y1`, got '1,2,3,four'",
        ),
        (
            "localization.txt",
            "val/b.jpg,1,2,3,4\nval/b.jpg,1,2,3\n",
            ", line 2: expected `ID,x0,y0,x1,y1`, got 'val/b.jpg,1,2,3'",
        ),
        (
            "localization.txt",
            "val/b.jpg,1,2,3,3000000000\n",
            ", line 1: expected `ID,x0,y0,x1,y1`, got '1,2,3,3000000000'",
        ),
        (
            "localization.txt",
            "val/b.jpg,m.png,i.png\nval/b.jpg,m.png\n",
            ", line 2: expected `ID,mask,ignore mask`, got 'val/b.jpg,m.png'",
        ),
    ],
)
def test_bad_lines_are_named(tree: Path, name: str, text: str, message: str) -> None:
    path = tree / "metadata/CUB/test" / name
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        WsolSource(tree, "test")
    assert str(caught.value) == f"{path}{message}"


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        write_wsol(tmp_path, None, None, sides=(8, 9))
    assert str(caught.value) == (
        "write_wsol: expected `sides` of 16 <= least <= largest, got (8, 9)"
    )
