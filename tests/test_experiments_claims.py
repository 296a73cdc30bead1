"""The claims experiment: areas are equal, coverage counts pixels, every run is told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casm_fast.data.synthetic import generate
from casm_fast.evaluation.coverage import coverage, most_salient
from casm_fast.experiments import SMOKE, claims, reproduce
from casm_fast.experiments.reproduction import Reproduction


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_most_salient_keeps_the_largest_cells(seed, height, width, ties):
    rng = np.random.default_rng(seed)
    saliency = rng.random((3, height, width)).astype(np.float32)
    if ties:
        saliency = np.round(saliency * 3) / 3
    share = rng.random(3)
    kept = most_salient(saliency, share)
    for one, own, wanted in zip(saliency, kept, share, strict=True):
        # An oracle that sorts (value, place) pairs one by one.
        cells = sorted(range(height * width), key=lambda c: (-one.flat[c], c))
        expected = np.zeros(height * width, bool)
        expected[cells[: round(wanted * height * width)]] = True
        np.testing.assert_array_equal(own.ravel(), expected)


def test_most_salient_refuses_shares_that_are_none():
    with pytest.raises(ValueError) as refusal:
        most_salient(np.zeros((1, 2, 2)), 1.5)
    assert str(refusal.value) == "most_salient: expected `share` in [0, 1], got 1.5"


@pytest.mark.parametrize(
    ("cells", "pixels"), [((4, 4), (8, 8)), ((3, 5), (7, 11)), ((6, 6), (6, 6))]
)
def test_coverage_equals_a_loop_over_pixels(cells, pixels):
    rng = np.random.default_rng(1)
    saliency = rng.random((4, *cells)).astype(np.float32)
    region = rng.random((4, *pixels)) < 0.3
    region[2] = False
    got = coverage(saliency, region)
    assert np.isnan(got[2])
    for index in (0, 1, 3):
        values = [
            float(saliency[index, y * cells[0] // pixels[0], x * cells[1] // pixels[1]])
            for y, x in zip(*np.nonzero(region[index]), strict=True)
        ]
        assert got[index] == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_equal_area_covers_the_object_exactly_when_the_saliency_is_the_object():
    source = generate(40, 32, split="val", emblem=100)

    class Same(torch.nn.Module):
        """Answers with the number of black (masked) pixels, modulo 8."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images):
            black = (images == 0).all(1).sum((1, 2)) % 8
            return torch.nn.functional.one_hot(black, 8), ()

    images = claims._images(source, 40)
    exact = claims._equal_area(source, source.masks.astype(np.float32), images, Same())
    assert exact["body"] == exact["emblem"] == 1
    # One box round the largest object: it fails only where several objects overlap in no box.
    assert exact["equal_le"] == 0
    black = source.masks.sum((1, 2)) % 8
    assert exact["referee"] == pytest.approx((black == source.labels).mean())
    emblem = claims._equal_area(source, source.emblem_masks.astype(np.float32), images, Same())
    assert emblem["emblem"] == 1
    assert emblem["body"] < 0.4  # what is left of the area goes to the top rows


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    return reproduce(
        "claims",
        scale=SMOKE,
        output=tmp_path_factory.mktemp("claims"),
        workers=0,
        device="cpu",
        seeds=2,
    )


def test_every_run_is_told_and_means_are_means(result: Reproduction) -> None:
    means, runs = result.findings.tables
    assert [row.name for row in runs.rows] == [
        f"{name}, seed {seed}"
        for name in ("F, Baseline", "L", "L100, CASM (here L1)")
        for seed in (0, 1)
    ]
    for index in range(3):
        for column in means.columns:
            pair = [row.ours[column.key] for row in runs.rows[2 * index : 2 * index + 2]]
            assert means.rows[index].ours[column.key] == pytest.approx(sum(pair) / 2)
    lines = list(csv.DictReader((result.folder / "runs.csv").open()))
    assert float(lines[3]["body"]) == runs.rows[3].ours["body"]
    assert {path.name for path in result.folder.glob("*.png")} == {
        "claims-body.png",
        "claims-emblem.png",
        "claims-pictures.png",
    }


def test_strategies_share_the_classifier_of_their_seed(result: Reproduction) -> None:
    trained = [
        json.loads(path.read_text())
        for path in (result.folder.parent / "runs").glob("*/finished.json")
    ]
    weights = {(t["seed"], t["weights"]) for t in trained if t["epochs"]}
    assert len(weights) == 2
    assert len({seed for seed, _ in weights}) == 2
    # Beside those two: the referee, which learned the same scenes without emblems.
    alone = sorted(t["data"] for t in trained if not t["epochs"])
    assert alone == [
        "synthetic:train,images=64,size=32,classes=4",
        *["synthetic:train,images=64,size=32,classes=4,emblem=100"] * 2,
    ]


def test_references_bound_the_table(result: Reproduction) -> None:
    rows = {row.name.partition(": ")[2]: row.ours for row in result.findings.tables[0].rows[3:]}
    assert rows["the objects"]["body"] == rows["the objects"]["emblem"] == 1
    assert rows["the objects"]["equal_le"] == 0
    assert rows["the emblems, then chance"]["emblem"] == 1
    assert 0.08 < rows["chance"]["body"] < 0.25


def test_a_set_without_emblems_is_refused(tmp_path: Path) -> None:
    from casm_fast.data.synthetic import write_tree

    sets = generate(16, 32, classes=2), generate(8, 32, classes=2, split="val")
    write_tree(tmp_path / "tree", *sets, sides=(32, 40))
    with pytest.raises(ValueError) as refusal:
        reproduce("claims", data=str(tmp_path / "tree"), scale=SMOKE, output=tmp_path / "out")
    assert str(refusal.value) == (
        "claims: expected the embedded set with emblems, where evidence is known pixel by pixel, "
        f"got imagenet-val:{tmp_path / 'tree'}; leave --data out, or give synthetic:emblem=N"
    )
