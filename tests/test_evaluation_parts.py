"""Animal parts against a loop over pixels, and keypoint files with every fault they can have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from refusals import refuses
from scipy import stats

from casm_fast.data import geometry
from casm_fast.evaluation import Keypoint, join, part_intensities, part_ratios, read_keypoints

mpl.use("agg")


CSV = "image_id,class,part,x,y\na,dog,eye,3,4.5\na,dog,foot,10,12\nb,hen,eye,1,2\n"
JSONL = (
    '{"image_id": "a", "class": "dog", "part": "eye", "x": 3, "y": 4.5}\n\n'
    '{"image_id": "a", "class": "dog", "part": "foot", "x": 10, "y": 12}\n'
    '{"image_id": "b", "class": "hen", "part": "eye", "x": 1, "y": 2}\n'
)


def test_both_formats_say_the_same(tmp_path: Path):
    (tmp_path / "k.csv").write_text(CSV)
    (tmp_path / "k.jsonl").write_text(JSONL)
    expected = [
        Keypoint("a", "dog", "eye", 3, 4.5),
        Keypoint("a", "dog", "foot", 10, 12),
        Keypoint("b", "hen", "eye", 1, 2),
    ]
    assert read_keypoints(tmp_path / "k.csv") == expected
    assert read_keypoints(tmp_path / "k.jsonl") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("k.csv", "id,x,y\n", "{}, line 1: expected the head image_id,class,part,x,y, got id,x,y"),
        ("k.csv", "", "{}, line 1: expected the head image_id,class,part,x,y, got nothing"),
        ("k.csv", CSV + "b,hen\n", "{}, line 5: expected `part`, got none"),
        (
            "k.csv",
            CSV + "b,hen,eye,left,3\n",
            "{}, line 5: expected x and y as numbers, got 'left' and '3'",
        ),
        ("k.csv", CSV[:24], "keypoints: expected at least one keypoint in {}, got none"),
        ("k.jsonl", '{"image_id": "a"}', "{}, line 1: expected `class`, got none"),
        ("k.jsonl", "[1]", "{}, line 1: expected `image_id`, got none"),
        (
            "k.jsonl",
            "\n{a}",
            "{}, line 2: expected JSON, got Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        ("k.txt", CSV, "keypoints: expected a file .csv or .jsonl, got {}"),
    ],
)
def test_faulty_files_are_one_sentence(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with refuses(ValueError, message.format(tmp_path / name)):
        read_keypoints(tmp_path / name)


def test_no_file():
    with refuses(FileNotFoundError, "keypoints: there is no nowhere.csv"):
        read_keypoints("nowhere.csv")


def window_mean(values: np.ndarray, x: int, y: int, window: int) -> float:
    h, w = values.shape
    half = window // 2
    inside = [
        values[v, u]
        for v in range(y - half, y + half + 1)
        for u in range(x - half, x + half + 1)
        if 0 <= v < h and 0 <= u < w
    ]
    return float(np.mean(inside))


@pytest.mark.parametrize("window", [1, 3, 5])
def test_windows_agree_with_a_loop(window):
    rng = np.random.default_rng(0)
    maps = rng.random((3, 14, 18))
    points = [
        Keypoint("bca"[k % 3], "dog", "eye", float(rng.uniform(-0.4, 17.4)), float(y))
        for k, y in enumerate(rng.uniform(-0.4, 13.4, 30))
    ]
    points.append(Keypoint("elsewhere", "dog", "eye", 1, 1))
    found = part_intensities(maps, ["a", "b", "c"], points, window=window, salient="low")
    expected = [
        window_mean(maps["abc".index(p.image_id)], round(p.x), round(p.y), window)
        for p in points[:-1]
    ]
    assert found.values == pytest.approx(expected, abs=1e-12)
    high = part_intensities(1 - maps, ["a", "b", "c"], points, window=window)
    assert high.values == pytest.approx(found.values, abs=1e-12)


def test_keypoints_move_into_the_network_square():
    """A picture of 40 x 80: its middle is the square of 20, twice as coarse; 10 cells a side."""
    g = geometry(40, 80, 20)
    maps = torch.rand(1, 1, 10, 10, dtype=torch.float64)
    # Pixel (x, y) lies in cell ((x - 20) // 4, y // 4).
    points = [
        Keypoint("a", "dog", "eye", x, y)
        for x, y in [(20, 0), (23, 3), (24, 4), (59, 39), (43, 17)]
    ]
    cut = [Keypoint("a", "dog", "foot", x, y) for x, y in [(19, 5), (60, 5)]]
    found = part_intensities(maps, ["a"], points + cut, geometries=[g], window=1, salient="low")
    cells = [(0, 0), (0, 0), (1, 1), (9, 9), (5, 4)]
    assert found.values.tolist() == [float(maps[0, 0, y, x]) for x, y in cells]
    assert found.left_out.tolist() == [2]


def synthetic(classes: dict[str, tuple[float, float, int]]) -> Any:
    """Maps with one intensity around an eye at (3, 3), another around a foot at (12, 12)."""
    maps, ids, points = [], [], []
    for label, (eye, foot, images) in classes.items():
        for k in range(images):
            one = np.full((16, 16), 0.5)
            one[1:6, 1:6], one[10:15, 10:15] = eye, foot
            maps.append(one)
            ids.append(f"{label}{k}")
            points += [
                Keypoint(ids[-1], label, "eye", 3, 3),
                Keypoint(ids[-1], label, "foot", 12, 12),
            ]
    return np.stack(maps), ids, points


CLASSES = {
    "dog": (0.2, 0.8, 10),
    "fox": (0.2, 0.4, 11),
    "hen": (0.25, 0.75, 10),
    "owl": (0.1, 0.5, 3),
    "eel": (0.5, 0.25, 10),
}


def test_ratios_of_classes_and_groups():
    maps, ids, points = synthetic(CLASSES)
    groups = {"dog": "mammals", "fox": "mammals", "hen": "birds", "owl": "birds"}
    found = part_ratios(part_intensities(maps, ids, points, salient="low"), groups)
    assert {one.label: one.ratio for one in found.classes} == pytest.approx(
        {"dog": 4, "fox": 2, "hen": 3, "eel": 0.5}
    )
    assert [one.label for one in found.classes] == ["hen", "dog", "fox", "eel"]
    assert found.few == ("owl",)
    mammals = found.groups["mammals"]
    assert (mammals.classes, mammals.mean) == (2, pytest.approx(3))
    assert mammals.error == pytest.approx(stats.sem([4, 2]))
    assert math.isnan(found.groups["birds"].error)
    assert found.overall.mean == pytest.approx(np.mean([4, 2, 3, 0.5]))


def test_batches_join():
    maps, ids, points = synthetic(CLASSES)
    whole = part_intensities(maps, ids, points)
    parts = join(
        part_intensities(maps[k : k + 7], ids[k : k + 7], points) for k in range(0, len(ids), 7)
    )
    assert parts.values.tolist() == whole.values.tolist()
    assert str(part_ratios(parts)) == str(part_ratios(whole))


def test_prints_the_published_values_beside():
    maps, ids, points = synthetic(CLASSES)
    groups = {"dog": "dogs", "fox": "dogs", "hen": "birds"}
    text = str(part_ratios(part_intensities(maps, ids, points, salient="low"), groups))
    lines = text.splitlines()
    assert lines[0] == "Ratio foot:eye of the intensity; above 1 the eye is more salient"
    assert "  dogs               2   3.00 ± 1.00  3.70 ± 0.50 (8)" in lines
    assert "  all classes        4   2.38 ± 0.75  -" in lines
    assert "  (classes left out, too few images: owl)" in lines
    assert "5 x 5 window of map cells" in " ".join(text.split())


def test_draws_both_parts_of_every_class():
    maps, ids, points = synthetic(CLASSES)
    axes = Figure().add_subplot()
    part_ratios(part_intensities(maps, ids, points)).draw(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "eel", "fox", "hen"]
    dots = [line for line in axes.lines if line.get_label() in ("foot", "eye")]
    assert [len(line.get_xdata()) for line in dots] == [4, 4]


def test_bad_input_is_one_sentence():
    maps, ids, points = synthetic({"dog": (0.2, 0.8, 2)})
    with refuses(
        ValueError,
        "part_ratios: expected a class with at least 10 images that show foot and eye, "
        "got none of 1",
    ):
        part_ratios(part_intensities(maps, ids, points))
    with refuses(ValueError, "maps: expected numbers in [0, 1], got -0.8 to -0.2"):
        part_intensities(-maps, ids, points)
    with refuses(ValueError, "image_ids: expected one for each of 2 maps, got 1"):
        part_intensities(maps, ids[:1], points)
    with refuses(ValueError, "window: expected an odd number of cells, got 4"):
        part_intensities(maps, ids, points, window=4)
    with refuses(ValueError, "salient: expected high or low, got 'dark'"):
        part_intensities(maps, ids, points, salient="dark")
