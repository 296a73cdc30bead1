"""Exports to other tools: expectations by hand, torchvision, PyYAML and our own readers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image

from casm_fast.data import open_source, predictions
from casm_fast.data.annotations import read_solution
from casm_fast.data.geometry import geometry
from casm_fast.data.predictions import Convention, Description
from casm_fast.data.source import locate
from casm_fast.data.synthetic import generate, write_tree
from casm_fast.data.transforms import normalize, resize
from casm_fast.data.voc import VocSource
from casm_fast.extraction import export, extract, predict
from casm_fast.extraction.exporting import FORMATS, default_output, wsol
from casm_fast.extraction.exporting.job import Job, Stems
from casm_fast.models.saliency import build_model

CONVENTION = Convention(32, "squash", "mean", 1.0, "largest", 4)
CLASSES = ("cat", 'a "dog"', "zebra & <co>")


def row(name: str, box: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    corners = dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))
    return {
        "image_id": name, "height": 100, "width": 200, "label": 0, "predicted": 1,
        "predicted_name": CLASSES[1], "score": 0.75, "top5": [1, 0, 2], "gt_boxes": [[0, 1, 2, 3]],
        **corners, **more,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], **fields: Any) -> pa.Table:
    plain = pa.Table.from_pylist(rows, schema=predictions.schema())
    description = Description("folder:/nowhere", CONVENTION, (8, 8), classes=CLASSES, **fields)
    return predictions.describe(plain, description)


@pytest.fixture
def small() -> pa.Table:
    """A box that touches two sides, one of a single pixel, none, and an image that is broken."""
    return table(
        [
            row("a/one 1.JPEG", (0, 10, 200, 60)),
            row("b.png", (199, 99, 200, 100), predicted=2, predicted_name=CLASSES[2], score=0.5),
            row("c.png", (0, 0, 0, 0)),
            {"image_id": "d.png", "label": 2, "error": "cannot decode d.png"},
        ]
    )


def test_voc_by_hand_and_by_torchvision(small: pa.Table, tmp_path: Path) -> None:
    from torchvision.datasets import VOCDetection

    assert export(small, tmp_path / "out", to="voc") == (tmp_path / "out",)
    read = VOCDetection(str(tmp_path / "out"), year="2012", image_set="val")
    notes = [
        read.parse_voc_xml(ElementTree.parse(path).getroot())["annotation"]
        for path in read.annotations
    ]
    assert [note["filename"] for note in notes] == ["a_one_1.jpg", "b.jpg", "c.jpg"]
    assert [note["source"]["image"] for note in notes] == ["a/one 1.JPEG", "b.png", "c.png"]
    assert notes[0]["size"] == {"width": "200", "height": "100", "depth": "3"}
    (first,), (second,) = notes[0]["object"], notes[1]["object"]
    assert first["bndbox"] == {"xmin": "1", "ymin": "11", "xmax": "200", "ymax": "60"}
    assert second["bndbox"] == {"xmin": "200", "ymin": "100", "xmax": "200", "ymax": "100"}
    assert (first["name"], second["name"]) == CLASSES[1:]
    assert notes[2]["object"] == []
    results = tmp_path / "out/VOCdevkit/results/VOC2012/Main"
    assert {path.name: path.read_text() for path in results.iterdir()} == {
        "comp4_det_val_a_dog_.txt": "a_one_1 0.750000 1 11 200 60\n",
        "comp4_det_val_zebra_co_.txt": "b 0.500000 200 100 200 100\n",
    }


def test_yolo(small: pa.Table, tmp_path: Path) -> None:
    export(small, tmp_path / "out", to="yolo")
    data = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert data == {
        "train": "images",
        "val": "images",
        "nc": 3,
        "names": dict(enumerate(CLASSES)),
    }
    files = {path.name: path.read_text() for path in (tmp_path / "out/labels").iterdir()}
    assert files == {
        "a_one_1.txt": "1 0.500000 0.350000 1.000000 0.500000\n",
        "b.txt": "2 0.997500 0.995000 0.005000 0.010000\n",
        "c.txt": "",
    }


def test_yolo_gives_whole_pixels_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for k in range(200):
        height, width = rng.integers(2, 20_000, 2).tolist()
        x0, y0 = rng.integers(0, [width - 1, height - 1]).tolist()
        x1, y1 = rng.integers([x0 + 1, y0 + 1], [width + 1, height + 1]).tolist()
        rows.append(row(f"{k}.jpg", (x0, y0, x1, y1), height=height, width=width))
    export(table(rows), tmp_path / "out", to="yolo")
    for expected in rows:
        text = (tmp_path / f"out/labels/{expected['image_id'][:-4]}.txt").read_text()
        x, y, w, h = np.array(text.split()[1:], float) * np.tile(
            [expected["width"], expected["height"]], 2
        )
        corners = np.rint([x - w / 2, y - h / 2, x + w / 2, y + h / 2]).tolist()
        assert corners == [expected[name] for name in ("x0", "y0", "x1", "y1")]


def test_kaggle(small: pa.Table, tmp_path: Path) -> None:
    (path,) = export(small, tmp_path / "out.csv", to="kaggle-loc")
    assert path.read_text() == (
        "ImageId,PredictionString\na/one 1.JPEG,2 0 10 200 60\nb.png,3 199 99 200 100\n"
        "c.png,\nd.png,\n"
    )
    # With wnids for numbers it is one of Kaggle's lists of true boxes, which our reader reads.
    lines = path.read_text().replace(",2 ", ",n01 ").replace(",3 ", ",n02 ").splitlines()[:3]
    path.write_text("\n".join(lines) + "\n")
    read = read_solution(path)
    assert read["a/one 1.JPEG"].boxes.tolist() == [[0, 10, 200, 60]]
    assert read["b.png"].boxes.tolist() == [[199, 99, 200, 100]]


def test_label_studio(small: pa.Table, tmp_path: Path) -> None:
    where = "https://pictures.example/val/"
    files = export(small, tmp_path / "x.json", to="label-studio", images=where)
    assert [path.name for path in files] == ["x.json", "x.config.xml"]
    tasks = json.loads(files[0].read_text())
    assert tasks[0] == {
        "data": {"image": "https://pictures.example/val/a/one 1.JPEG", "id": "a/one 1.JPEG"},
        "predictions": [
            {
                "model_version": "casm_fast",
                "score": 0.75,
                "result": [
                    {
                        "id": "box0",
                        "type": "rectanglelabels",
                        "from_name": "label",
                        "to_name": "image",
                        "original_width": 200,
                        "original_height": 100,
                        "image_rotation": 0,
                        "score": 0.75,
                        "value": {
                            "rotation": 0,
                            "x": 0.0,
                            "y": 10.0,
                            "width": 100.0,
                            "height": 50.0,
                            "rectanglelabels": [CLASSES[1]],
                        },
                    }
                ],
            }
        ],
    }
    assert [len(task["predictions"][0]["result"]) for task in tasks] == [1, 1, 0]
    view = ElementTree.parse(files[1]).getroot()
    labels = view.find("RectangleLabels")
    assert labels is not None
    assert tuple(label.get("value") for label in labels) == CLASSES
    assert (labels.get("name"), labels.get("toName")) == ("label", "image")
    image = view.find("Image")
    assert image is not None
    assert image.attrib == {"name": "image", "value": "$image"}


def test_fiftyone(small: pa.Table, tmp_path: Path) -> None:
    export(small, tmp_path / "out", to="fiftyone", images="/pictures")
    assert json.loads((tmp_path / "out/labels.json").read_text()) == {
        "labels": {
            "a_one_1": [
                {"label": CLASSES[1], "bounding_box": [0.0, 0.1, 1.0, 0.5], "confidence": 0.75}
            ],
            "b": [
                {"label": CLASSES[2], "bounding_box": [0.995, 0.99, 0.005, 0.01], "confidence": 0.5}
            ],
            "c": [],
        }
    }
    assert json.loads((tmp_path / "out/data.json").read_text()) == {
        "a_one_1": "/pictures/a/one 1.JPEG",
        "b": "/pictures/b.png",
        "c": "/pictures/c.png",
    }


def test_csv_holds_the_table(small: pa.Table, tmp_path: Path) -> None:
    (path,) = export(small, tmp_path / "x.csv", to="csv")
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert list(rows[0]) == small.column_names
    for got, expected in zip(rows, small.to_pylist(), strict=True):
        for name, value in expected.items():
            if isinstance(value, list):
                assert json.loads(got[name]) == value
            else:
                assert got[name] == ("" if value is None else str(value))


def test_true_labels_instead_of_predictions(small: pa.Table, tmp_path: Path) -> None:
    export(small, tmp_path / "out", to="yolo", category="label")
    assert (tmp_path / "out/labels/b.txt").read_text().split()[0] == "0"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("formats")
    val = generate(12, size=32, classes=3, seed=4, split="val")
    write_tree(root, None, val, layout="kaggle", sides=(40, 60), rotated=0.3, seed=2)
    return root


def test_the_voc_export_is_a_set_of_images_with_the_same_boxes(tree: Path, tmp_path: Path) -> None:
    val = open_source(f"imagenet-val:{tree}")
    made = extract(build_model("compact", classes=val.classes, input_size=32), val)
    export(made, tmp_path / "out", to="voc", pictures=True)
    back = VocSource(tmp_path / "out", "val")
    rows = made.table.to_pylist()
    assert len(back) == len(rows)
    for k, expected in enumerate(rows):
        assert back.boxes(k).tolist() == [[expected[n] for n in ("x0", "y0", "x1", "y1")]]
        assert back.classes[back.label(k)] == expected["predicted_name"]
        picture, stored = back.image(k), val.image(k)
        assert picture.shape == stored.shape == (expected["height"], expected["width"], 3)
        assert back.size(k) == stored.shape[:2]
        assert np.abs(picture.astype(int) - stored).mean() < 3  # a second JPEG: 1.5 at most here


def test_pictures_are_upright_files(tree: Path, tmp_path: Path) -> None:
    from torchvision.datasets import VOCDetection

    made = extract(
        build_model("compact", classes=generate(1, size=32, classes=3).classes, input_size=32),
        f"imagenet-val:{tree}",
    )
    export(made, tmp_path / "fiftyone", to="fiftyone", pictures=True)
    export(made, tmp_path / "voc", to="voc", pictures=True)
    export(made, tmp_path / "yolo", to="yolo", pictures=True)
    read = VOCDetection(str(tmp_path / "voc"), year="2012", image_set="val")
    labels = json.loads((tmp_path / "fiftyone/labels.json").read_text())["labels"]
    assert not (tmp_path / "fiftyone/data.json").exists()
    for expected, (picture, note) in zip(made.table.to_pylist(), read, strict=True):
        size = (expected["width"], expected["height"])
        assert picture.size == size
        stem = note["annotation"]["filename"][:-4]
        for file in (f"fiftyone/data/{stem}.jpg", f"yolo/images/{stem}.jpg"):
            with Image.open(tmp_path / file) as image:
                assert image.size == size
                assert not image.getexif()
        assert stem in labels
        assert (tmp_path / f"yolo/labels/{stem}.txt").exists()


def test_files_are_named_where_they_are(tree: Path, tmp_path: Path) -> None:
    model = build_model("compact", classes=3, input_size=32)
    made = extract(model, f"imagenet-val:{tree}")
    export(made, tmp_path / "out", to="fiftyone")
    paths = json.loads((tmp_path / "out/data.json").read_text())
    assert len(paths) == 12
    assert all(Path(path).is_file() for path in paths.values())
    tasks = json.loads(export(made, tmp_path / "x.json", to="label-studio")[0].read_text())
    addresses = [task["data"]["image"] for task in tasks]
    start = "/data/local-files/?d="
    assert [a.removeprefix(start) for a in addresses] == [p.lstrip("/") for p in paths.values()]

    made = extract(model, "synthetic:images=4,size=32,classes=3")
    for to in ("fiftyone", "label-studio"):
        with pytest.raises(ValueError) as caught:
            export(made, tmp_path / "y", to=to)
        assert str(caught.value) == (
            f"export: expected images that are files, got {made.description.source}; say where the "
            "pictures are with `images`, a folder or URL that the ids are appended to"
        )
    assert not (tmp_path / "y").exists()


def test_pairs_of_picture_and_class_are_one_picture(tmp_path: Path) -> None:
    from casm_fast.data.synthetic import write_coco

    val = generate(8, size=32, classes=3, seed=1, split="val")
    write_coco(tmp_path / "coco", None, val, sides=(40, 60))
    rows = [
        row("7/1", (0, 0, 5, 5), label=0, gt_boxes=[[0, 0, 4, 4]]),
        row("7/2", (0, 0, 5, 5), label=1, gt_boxes=[[9, 9, 14, 14]]),
        row("9/1", (1, 1, 6, 6), label=0),
    ]
    plain = pa.Table.from_pylist(rows, schema=predictions.schema())
    source = open_source(f"coco:{tmp_path / 'coco'}").name.replace("coco-", "voc-")
    pairs = predictions.describe(plain, Description(source, CONVENTION, (8, 8), classes=CLASSES))
    files = {}
    for category in ("predicted", "label"):
        export(pairs, tmp_path / category, to="yolo", category=category)
        files[category] = {
            path.name: [int(line.split()[0]) for line in path.read_text().splitlines()]
            for path in (tmp_path / category / "labels").iterdir()
        }
    assert files["predicted"] == {"7.txt": [1], "9.txt": [1]}
    assert files["label"] == {"7.txt": [0, 1], "9.txt": [0]}
    annotated = json.loads(export(pairs, tmp_path / "x.json")[1].read_text())
    assert [image["file_name"] for image in annotated["images"]] == ["7", "9"]
    assert [note["category_id"] for note in annotated["annotations"]] == [1, 2, 1]


# --- score maps -----------------------------------------------------------------------------------


def spread_by_loop(saliency: np.ndarray, height: int, width: int, size: int, policy: str) -> Any:
    """Pixel by pixel, from the definitions."""
    where = geometry(height, width, size, policy)
    normal = (saliency - saliency.min()) / (saliency.max() - saliency.min())
    result = np.zeros((224, 224))
    for i in range(224):
        for j in range(224):
            y = (i + 0.5) / 224 * height * where.scale_y - where.offset_y
            x = (j + 0.5) / 224 * width * where.scale_x - where.offset_x
            if 0 <= y < size and 0 <= x < size:
                cell = int(y * saliency.shape[0] / size), int(x * saliency.shape[1] / size)
                result[i, j] = normal[cell]
    return result


@pytest.mark.parametrize("policy", ["crop", "squash"])
@pytest.mark.parametrize("shape", [(90, 120), (120, 61), (64, 64)])
def test_a_score_map_covers_the_whole_picture(policy: str, shape: tuple[int, int]) -> None:
    saliency = np.random.default_rng(1).random((9, 8)).astype(np.float32)
    made = wsol.spread(saliency, geometry(*shape, 64, policy), 64)
    expected = spread_by_loop(saliency.astype(np.float64), *shape, 64, policy)
    np.testing.assert_allclose(made, expected, atol=1e-12)
    outside = policy == "crop" and shape[0] != shape[1]
    assert (made[0, 0] == 0 and made[-1, -1] == 0) or not outside


def test_a_constant_map_is_zero() -> None:
    made = wsol.spread(np.full((4, 4), 0.3, np.float32), geometry(30, 30, 32), 32)
    assert made.shape == (224, 224)
    assert not made.any()


def test_wsol_npy(tree: Path, tmp_path: Path) -> None:
    model = build_model("compact", classes=3, input_size=32, resize_policy="squash")
    model.train()
    made = extract(model, f"imagenet-val:{tree}", limit=5)
    export(made, tmp_path / "maps", to="wsol-npy", model=model)
    assert model.training
    files = sorted(path.name for path in (tmp_path / "maps/val").iterdir())
    assert files == [f"ILSVRC2012_val_{k:08d}.JPEG.npy" for k in range(1, 6)]
    source = open_source(f"imagenet-val:{tree}")
    model.eval()
    for k, name in enumerate(files):
        plane = np.load(tmp_path / "maps/val" / name)
        assert plane.dtype == np.float64  # wsolevaluation refuses another
        assert plane.shape == (224, 224)
        assert (plane.min(), plane.max()) == (0, 1)
        image = resize(source.image(k), 32, "squash")
        with torch.no_grad():
            saliency, _ = model(normalize(torch.tensor(image[None])))
        cells = saliency[0, 0].numpy().astype(np.float64)
        side = 224 // len(cells)
        normal = (cells - cells.min()) / (cells.max() - cells.min())
        # Batches of another size round otherwise, and a flat map is stretched: 6.2e-6 at most.
        np.testing.assert_allclose(plane, normal.repeat(side, 0).repeat(side, 1), atol=5e-5)


@pytest.mark.parametrize("kind", ["npy", "png"])
def test_maps_that_were_stored(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [row(f"{k}.jpg", (0, 0, 3, 3), height=30 + k, width=40) for k in range(6)]
    rows[1] = {"image_id": "1.jpg", "label": 0, "error": "cannot decode 1.jpg"}
    made = table(rows)
    maps = rng.random((6, 5, 4)).astype(np.float16)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "extraction.json").write_text("{}")
    if kind == "npy":
        np.save(folder / "masks-000000000-000000004.npy", maps[:4])
        np.save(folder / "masks-000000004-000000006.npy", maps[4:])
    else:
        (folder / "masks/000000").mkdir(parents=True)
        grey = np.rint(255 * maps.astype(float)).astype(np.uint8)
        for k in (0, 2, 3, 4, 5):
            Image.fromarray(grey[k]).save(folder / f"masks/000000/{k:09d}.png")
        maps = (grey / 255).astype(np.float32)
    job = Job(made, predictions.description_of(made), "predicted", folder=folder)
    wsol.write(job, tmp_path / "maps")
    assert len(list((tmp_path / "maps").iterdir())) == 5
    for k in (0, 2, 3, 4, 5):
        where = geometry(30 + k, 40, 32, "squash")
        expected = wsol.spread(maps[k].astype(np.float32), where, 32)
        np.testing.assert_array_equal(np.load(tmp_path / f"maps/{k}.jpg.npy"), expected)

    gone = folder / "masks-000000004-000000006.npy"
    (gone if kind == "npy" else folder / "masks/000000/000000004.png").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        wsol.write(job, tmp_path / "again")
    assert str(caught.value) == (
        f"export: expected the map of row 4 in {folder}, got none; give a `model`, which makes it "
        "again"
    )
    assert not (tmp_path / "again").exists()


def test_maps_need_their_model(tree: Path, tmp_path: Path) -> None:
    model = build_model("compact", classes=3, input_size=32)
    made = extract(model, f"imagenet-val:{tree}", limit=2)
    with pytest.raises(ValueError) as caught:
        export(made, tmp_path / "maps", to="wsol-npy")
    assert str(caught.value) == (
        "export: expected `model` for maps, because the table was made by a model in memory, "
        "got None"
    )
    other = build_model("compact", classes=3, input_size=32)
    with pytest.raises(ValueError) as caught:
        export(made, tmp_path / "maps", to="wsol-npy", model=other)
    assert str(caught.value) == (
        "export: expected the model that made the boxes, got one with other weights; give it as "
        "`model`"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [True, False])
def test_overlays_are_those_of_single_predictions(kept: bool, tree: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("compact", classes=3, input_size=32)
    source, out = f"imagenet-val:{tree}", tmp_path / "out"
    made = extract(model, source, out, limit=4, masks="png" if kept else "off")
    good = [row for row in made.table.to_pylist() if row["error"] is None]
    folder = tmp_path / "overlays"
    export(out, folder, to="overlays", model=None if kept else model)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{row['image_id']}.jpg" for row in good
    ]
    opened = open_source(source)
    for place, row in zip(locate(opened, [row["image_id"] for row in good]), good, strict=True):
        expected = predict(model, opened.image(place)).overlay()
        drawn = np.asarray(Image.open(folder / f"{row['image_id']}.jpg"))
        assert drawn.shape == (row["height"], row["width"], 3)
        # The loss of JPEG: 2.8 measured.
        assert np.abs(drawn.astype(int) - expected).mean() < 6


# --- files ----------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(small: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    with pytest.raises(FileExistsError) as caught:
        export(small, tmp_path / "out", to="yolo")
    expected = f"export: expected a new or empty folder, got {tmp_path / 'out'}; "
    assert str(caught.value) == expected + "remove it or give another"
    (tmp_path / "out/mine").unlink()
    export(small, tmp_path / "out", to="yolo")


@pytest.mark.parametrize("to", ["voc", "yolo", "fiftyone", "label-studio", "kaggle-loc", "coco"])
def test_a_failure_leaves_nothing(to: Any, tmp_path: Path) -> None:
    broken = table([row("a.jpg", (0, 0, 3, 3)), row("b.jpg", (0, 0, 3, 3), label=-1)])
    with pytest.raises(ValueError, match="expected a label for every image, got none for b"):
        export(broken, tmp_path / "out", to=to, category="label", images="/x")
    assert list(tmp_path.iterdir()) == []


def test_names_of_files() -> None:
    names = Stems()
    ids = ["a/b.jpg", "a_b.png", "A/B", ".x", "??", "naïve 1.JPEG", "v1.2"]
    assert [names(name) for name in ids] == [
        "a_b", "a_b-2", "A_B-3", "x", "_", "naïve_1", "v1.2",
    ]  # fmt: skip


def test_where_an_export_goes(small: pa.Table, tmp_path: Path) -> None:
    assert set(FORMATS) == {
        "coco", "voc", "yolo", "kaggle-loc", "label-studio", "fiftyone", "wsol-npy",
        "overlays", "csv",
    }  # fmt: skip
    outputs = [default_output("runs/val.parquet", to).name for to in FORMATS]
    assert outputs == [
        "val.json", "val-voc", "val-yolo", "val-kaggle-loc.csv", "val-label-studio.json",
        "val-fiftyone", "val-wsol-npy", "val-overlays", "val.csv",
    ]  # fmt: skip
    assert default_output("out/", "coco") == Path("out.json")
    with pytest.raises(ValueError) as caught:
        export(small, to="csv")
    assert str(caught.value) == "export: expected `output` beside a table in memory, got None"
    path = predictions.write(small, tmp_path / "val.parquet")
    assert export(path, to="csv") == (tmp_path / "val.csv",)
