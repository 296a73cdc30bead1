"""Distribution fits: SciPy's fits, pycocotools' annotations, and a set drawn from known ones."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from refusals import refuses
from scipy import stats

from casm_fast.data import CocoSource, generate, write_coco
from casm_fast.evaluation import object_distributions
from casm_fast.evaluation.distributions import PUBLISHED


def written(path: Path, pictures: int, seed: int = 0) -> Path:
    """Annotations whose areas and centres follow the published distributions in the frame."""
    rng = np.random.default_rng(seed)
    images, notes = [], []
    for number in range(1, pictures + 1):
        width, height = int(rng.integers(200, 640)), int(rng.integers(200, 640))
        images.append({"id": number, "width": width, "height": height, "file_name": "x.jpg"})
        area = rng.lognormal(*PUBLISHED["area"]) * width * height / 224**2
        x, y = rng.uniform(0, 224) * width / 224, rng.normal(*PUBLISHED["y"]) * height / 224
        notes.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1 + number % 3,
                "iscrowd": 0,
                "area": area,
                "bbox": [x - 10, y - 10, 20, 20],
            }
        )
    content = {"images": images, "annotations": notes, "categories": []}
    path.write_text(json.dumps(content))
    return path


def test_finds_what_the_objects_were_drawn_from(tmp_path: Path):
    found = object_distributions(written(tmp_path / "a.json", 3000))
    # Standard errors of 3,000 draws: sigma / sqrt(3000) for mu, and 1 / sqrt(2) of that for sigma.
    for key in ("area", "y"):
        mu, sigma = PUBLISHED[key]
        fit = found.fits[key]
        assert fit.parameters[0] == pytest.approx(mu, abs=4 * sigma / 3000**0.5)
        assert fit.parameters[1] == pytest.approx(sigma, abs=4 * sigma / 6000**0.5)
        assert fit.published == PUBLISHED[key]
        assert fit.distance < 0.03
        assert fit.published_distance < 0.03
        assert fit.p_value > 0.01
    assert found.fits["x"].parameters == (0, 224)
    assert found.fits["x"].distance < 0.03


def test_agrees_with_pycocotools_and_scipy(tmp_path: Path):
    coco = pytest.importorskip("pycocotools.coco")
    write_coco(tmp_path, None, generate(12, size=48, classes=3), sides=(40, 90))
    source = CocoSource(tmp_path)
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        oracle = coco.COCO(str(source.annotations))
    areas, centres = [], []
    for category in oracle.getCatIds():
        for picture in sorted(oracle.getImgIds(catIds=category)):
            one = oracle.loadImgs(picture)[0]
            scale_x, scale_y = 100 / one["width"], 100 / one["height"]
            notes = oracle.loadAnns(oracle.getAnnIds(picture, category, iscrowd=False))
            areas.append(np.mean([note["area"] * scale_x * scale_y for note in notes]))
            for note in notes:
                x, y, w, h = note["bbox"]
                centres.append(((x + w / 2) * scale_x, (y + h / 2) * scale_y))
    found = object_distributions(source, size=100)
    assert found.areas == pytest.approx(areas)
    ours, theirs = np.sort(found.centres, axis=0), np.sort(np.array(centres), axis=0)
    assert ours == pytest.approx(theirs)
    shape, place, scale = stats.lognorm.fit(areas, floc=0)
    assert place == 0
    fit = found.fits["area"]
    assert fit.parameters == pytest.approx((np.log(scale), shape), rel=1e-9)
    expected = stats.kstest(areas, stats.lognorm(shape, 0, scale).cdf)
    assert (fit.distance, fit.p_value) == pytest.approx((expected.statistic, expected.pvalue))
    y = np.array(centres)[:, 1]
    assert found.fits["y"].parameters == pytest.approx(stats.norm.fit(y))
    assert found.fits["x"].distance == pytest.approx(
        stats.kstest(np.array(centres)[:, 0], "uniform", args=(0, 100)).statistic
    )


def test_pairs_crowds_and_first_pictures(tmp_path: Path):
    note = {"iscrowd": 0, "bbox": [0, 0, 112, 56]}
    content = {
        "images": [{"id": k, "width": 224, "height": 112} for k in (1, 2, 3)],
        "annotations": [
            {**note, "image_id": 2, "category_id": 5, "area": 10},
            {**note, "image_id": 2, "category_id": 5, "area": 30},
            {**note, "image_id": 1, "category_id": 5, "area": 7},
            {**note, "image_id": 1, "category_id": 4, "area": 8},
            {**note, "image_id": 3, "category_id": 5, "area": 9},
            {**note, "image_id": 1, "category_id": 5, "area": 999, "iscrowd": 1},
            {**note, "image_id": 1, "category_id": 5, "area": 0},
        ],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    found = object_distributions(path)
    assert found.areas.tolist() == [16, 14, 40, 18]  # twice as high in the frame
    assert found.centres.tolist() == [[56, 56]] * 5
    assert object_distributions(path, per_class=2).areas.tolist() == [16, 14, 40]
    assert object_distributions(path, per_class=1).areas.tolist() == [16, 14]
    assert len(object_distributions(path, per_class=1).centres) == 2


def test_prints_the_published_values_beside(tmp_path: Path):
    text = str(object_distributions(written(tmp_path / "a.json", 50), per_class=4))
    assert "7.5060, 1.2848" in text
    assert "116.0759, 47.5054" in text
    assert "0.0000, 224.0000" in text
    assert "the first 4 pictures of each class, squashed to 224 x 224" in text


def test_bad_input_is_one_sentence(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")
    with refuses(ValueError, f"coco: cannot read {path}: no 'images'"):
        object_distributions(path)
    path.write_text('{"images": [], "annotations": []}')
    with refuses(ValueError, f"coco: expected at least two objects in {path}, got 0"):
        object_distributions(path)
    with refuses(ValueError, "per_class: expected at least 1, got 0"):
        object_distributions(path, per_class=0)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with refuses(
        ImportError,
        "object_distributions: expected SciPy, which fits distributions, but it is not "
        "installed: pip install 'casm_fast[eval]'",
    ):
        object_distributions(path)
