"""Scores against a scalar loop over pixels, hand-made cases, and properties that any localization
score has.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from scipy import stats

from casm_fast.data import localization, predictions
from casm_fast.data.predictions import Convention, Description
from casm_fast.evaluation import baselines, evaluate, published
from casm_fast.evaluation.scores import score

SIZE = 16
CONVENTION = Convention(SIZE, "crop", "mean", 1.0, "largest", 4)
DESCRIPTION = Description("synthetic:val", CONVENTION, (SIZE, SIZE))


def row(image_id: str, box: Any, truth: Any, **values: Any) -> dict[str, Any]:
    """One row of a table; what is not given is plausible."""
    names = ("x0", "y0", "x1", "y1")
    return {
        "image_id": image_id,
        "height": SIZE,
        "width": SIZE,
        "label": 0,
        "predicted": 0,
        "predicted_name": "",
        "score": 1.0,
        "top5": [0, 1, 2, 3, 4],
        **dict(zip(names, box, strict=True)),
        **{f"net_{name}": value for name, value in zip(names, box, strict=True)},
        "area": 1,
        "rule": "mean",
        "mean_saliency": 0.5,
        "tv": 1.0,
        "entropy": 0.1,
        "entropy_full": 0.2,
        "gt_boxes": truth,
        "gt_net_boxes": truth,
        "f1": 0.5 if truth else None,
        "f1_mean": 0.25 if truth else None,
        "error": None,
        **values,
    }


def table(rows: list[dict[str, Any]], description: Description = DESCRIPTION) -> pa.Table:
    return predictions.describe(
        pa.Table.from_pylist(rows, schema=predictions.schema()), description
    )


def pixels(box: Any) -> set[tuple[int, int]]:
    x0, y0, x1, y1 = box
    return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}


boxes_inside = st.tuples(*[st.integers(0, SIZE - 1)] * 2, *[st.integers(1, SIZE)] * 2).map(
    lambda c: (min(c[0], c[2] - 1), min(c[1], c[3] - 1), c[2], c[3])
)
boxes_anywhere = st.tuples(*[st.integers(-SIZE, SIZE)] * 2, *[st.integers(1, SIZE)] * 2).map(
    lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3])
)


@given(boxes_inside, boxes_anywhere)
def test_iou_is_the_count_of_shared_pixels(box: Any, truth: Any) -> None:
    shared, union = len(pixels(box) & pixels(truth)), len(pixels(box) | pixels(truth))
    assert localization.box_iou([box], [truth])[0] == shared / union


@settings(max_examples=50)
@given(boxes_anywhere, st.integers(0, 2**32 - 1))
def test_f1_is_the_formula_over_pixels(truth: Any, seed: int) -> None:
    saliency = np.random.default_rng(seed).random((SIZE, SIZE))
    total = inside = 0.0
    for y in range(SIZE):
        for x in range(SIZE):
            total += saliency[y, x]
            if (x, y) in pixels(truth):
                inside += saliency[y, x]
    precision, recall = inside / (total + 1e-6), inside / len(pixels(truth))
    expected = 2 * precision * recall / (precision + recall + 1e-6)
    area = localization.area([truth])
    assert localization.f1([inside], [total], area)[0] == pytest.approx(expected, abs=1e-12)


@given(boxes_inside, boxes_anywhere)
def test_f1_of_a_box_is_the_f1_of_its_indicator(box: Any, truth: Any) -> None:
    saliency = np.zeros((SIZE, SIZE))
    saliency[box[1] : box[3], box[0] : box[2]] = 1
    clipped = np.clip(truth, 0, SIZE)
    inside = saliency[clipped[1] : clipped[3], clipped[0] : clipped[2]].sum()
    expected = localization.f1([inside], [saliency.sum()], localization.area([truth]))
    assert localization.f1_of_boxes([box], [truth])[0] == expected[0]


@given(boxes_anywhere, boxes_anywhere)
def test_iou_is_symmetric_and_bounded(first: Any, second: Any) -> None:
    there, back = (
        localization.box_iou([first], [second])[0],
        localization.box_iou([second], [first])[0],
    )
    assert there == back
    assert 0 <= there <= 1
    assert localization.box_iou([first], [first])[0] == 1


def test_empty_boxes_share_nothing() -> None:
    assert localization.box_iou(
        [(0, 0, 0, 0), (0, 0, 0, 0)], [(0, 0, 0, 0), (0, 0, 4, 4)]
    ).tolist() == [0, 0]
    assert localization.area([(5, 5, 3, 9)])[0] == 0
    assert localization.f1([0.0], [0.0], [0.0])[0] == 0


def test_best_and_mean_over_the_true_boxes_of_each_image() -> None:
    truth = [[(0, 0, 4, 4), (0, 0, 2, 2)], [], [(8, 8, 12, 12)]]
    flat, owners = localization.pair(truth)
    assert owners.tolist() == [0, 0, 2]
    assert flat.shape == (3, 4)
    np.testing.assert_array_equal(
        localization.best([0.25, 0.5, 1.0], owners, 3), [0.5, np.nan, 1.0]
    )
    np.testing.assert_array_equal(
        localization.mean([0.25, 0.5, 1.0], owners, 3), [0.375, np.nan, 1.0]
    )
    np.testing.assert_array_equal(
        localization.iou([(0, 0, 2, 2), (0, 0, 1, 1), (0, 0, 1, 1)], truth), [1.0, np.nan, 0.0]
    )


def test_perfect_boxes_have_no_error_and_disjoint_boxes_nothing_else() -> None:
    box, away = (2, 2, 8, 8), (9, 9, 12, 12)
    perfect = evaluate(table([row(str(i), box, [box]) for i in range(5)]))
    disjoint = evaluate(table([row(str(i), away, [box]) for i in range(5)]))
    assert perfect.localisation is not None
    assert (perfect.localisation.le, perfect.localisation.om, perfect.localisation.iou) == (0, 0, 1)
    assert disjoint.localisation is not None
    assert (disjoint.localisation.le, disjoint.localisation.om, disjoint.localisation.iou) == (
        1,
        1,
        0,
    )


def test_an_iou_of_exactly_one_half_is_an_error() -> None:
    half, over = (0, 0, 8, 4), (0, 0, 9, 4)
    truth = [(0, 0, 16, 4)]
    assert localization.box_iou([half], truth)[0] == 0.5
    for box, le in ((half, 1), (over, 0)):
        scores = evaluate(table([row("a", box, truth)]))
        assert scores.localisation is not None
        assert scores.localisation.le == le


def test_the_part_of_a_true_box_beyond_the_crop_counts() -> None:
    seen, whole = (0, 0, 8, 8), (-8, 0, 8, 8)
    scores = evaluate(table([row("a", seen, [whole])]))
    assert scores.localisation is not None
    assert scores.localisation.iou == 0.5
    assert scores.localisation.le == 1


def test_the_official_metric_asks_for_the_class_too() -> None:
    box = (2, 2, 8, 8)
    rows = [
        row("right", box, [box]),
        row("wrong class", box, [box], predicted=3),
        row("wrong box", (9, 9, 12, 12), [box]),
        row("both wrong", (9, 9, 12, 12), [box], predicted=9, top5=[9, 8, 7, 6, 5]),
    ]
    scores = evaluate(table(rows))
    assert scores.localisation is not None
    assert (scores.localisation.le, scores.localisation.om) == (0.5, 0.75)
    assert (scores.top1, scores.top5) == (0.5, 0.75)
    whole = scores.baselines[1]
    assert (whole.name, whole.le, whole.om) == ("whole image", 1, 1)


def test_without_labels_there_is_no_official_metric() -> None:
    scores = evaluate(table([row("a", (0, 0, 4, 4), [(0, 0, 4, 4)], label=-1)]))
    assert scores.localisation is not None
    assert scores.localisation.om is None
    assert (scores.top1, scores.top5, scores.counts.labelled) == (None, None, 0)


def test_images_without_boxes_and_unreadable_images_are_named_and_left_out() -> None:
    box = (2, 2, 8, 8)
    broken = {"image_id": "broken", "label": 0, "error": "truncated"}
    scores = evaluate(table([row("a", box, [box]), row("b", box, []), broken]))
    assert (scores.counts.images, scores.counts.localized, scores.counts.unreadable) == (3, 1, 1)
    assert scores.localisation is not None
    assert scores.localisation.le == 0
    assert "1 of 3 counted (1 unreadable, 1 without a true box)" in str(scores)


def test_no_true_box_at_all_still_gives_statistics() -> None:
    scores = evaluate(table([row("a", (0, 0, 4, 4), None), row("b", (0, 0, 4, 4), None)]))
    assert scores.localisation is None
    assert scores.baselines == ()
    assert scores.saliency.std == 0
    assert "no true boxes" in str(scores)


def test_only_errors_cannot_be_scored() -> None:
    with refuses(
        ValueError,
        "nothing to score: expected at least one readable image, got 1 rows, all of them errors",
    ):
        evaluate(table([{"image_id": "broken", "error": "truncated"}]))


def test_statistics_are_means_over_images() -> None:
    volumes = [0.2, 0.4, 0.9]
    rows = [row(str(v), (0, 0, 4, 4), [], mean_saliency=v, tv=480 * v) for v in volumes]
    statistics = evaluate(table(rows)).saliency
    assert statistics.mean == pytest.approx(0.5, abs=1e-7)
    assert statistics.std == pytest.approx(np.std(volumes, ddof=1), abs=1e-7)
    assert statistics.tv == pytest.approx(240, abs=1e-4)
    assert statistics.tv_mean == pytest.approx(240 / (SIZE * (SIZE - 1)), abs=1e-6)
    assert evaluate(table(rows[:1])).saliency.std is None


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(boxes_inside, st.lists(boxes_anywhere, max_size=3)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_scores_against_a_scalar_loop_in_any_order(cases: Any, order: Any) -> None:
    rows = [
        row(
            f"image {i}",
            box,
            truth,
            f1=i / 10 if truth else None,
            f1_mean=i / 20 if truth else None,
        )
        for i, (box, truth) in enumerate(cases)
    ]
    scores = evaluate(table(rows))
    errors, total = 0, 0
    for box, truth in cases:
        if not truth:
            continue
        total += 1
        best = 0.0
        for other in truth:
            shared = len(pixels(box) & pixels(other))
            best = max(best, shared / (len(pixels(box)) + len(pixels(other)) - shared))
        errors += not best > 0.5
    if total == 0:
        assert scores.localisation is None
    else:
        assert scores.localisation is not None
        assert scores.localisation.le == pytest.approx(errors / total, abs=1e-15)
    order.shuffle(rows)
    shuffled = evaluate(table(rows))
    assert shuffled == scores
    assert shuffled.bootstrap(resamples=20) == scores.bootstrap(resamples=20)


def test_the_centred_box_is_the_one_of_the_paper_at_224() -> None:
    assert localization.centred_box(224).tolist() == [33, 33, 191, 191]
    assert localization.centred_box(64).tolist() == [9, 9, 55, 55]
    assert baselines.whole(1, 64).tolist() == [[0, 0, 64, 64]]


def test_random_boxes_are_two_choices_of_borders() -> None:
    for size in (1, 2, SIZE, 224):
        for name in ("a", "n01440764/ILSVRC2012_val_00000293", "\u00fc"):
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
            rng = np.random.default_rng(seed)
            x, y = (np.sort(rng.choice(size + 1, 2, replace=False)) for _ in range(2))
            assert baselines.random([name], size).tolist() == [[x[0], y[0], x[1], y[1]]]


def test_random_boxes_depend_on_the_image_alone() -> None:
    ids = [f"image {i}" for i in range(400)]
    boxes = baselines.random(ids, SIZE)
    assert np.array_equal(baselines.random(ids[::-1], SIZE)[::-1], boxes)
    assert np.array_equal(baselines.random(ids[7:8], SIZE), boxes[7:8])
    assert (boxes >= 0).all()
    assert (boxes <= SIZE).all()
    assert (localization.area(boxes) > 0).all()
    # The mean side of a uniform pair of different borders is (size + 2) / 3; 400 draws leave a
    # standard error of 0.2 pixels.
    assert abs((boxes[:, 2] - boxes[:, 0]).mean() - (SIZE + 2) / 3) < 0.8


def test_published_figures_stand_only_beside_the_same_convention() -> None:
    paper = Convention(224, "crop", "mean", 1.0, "largest", 4)
    for source in (
        "imagenet-val:/data",
        "wsol:/data/metadata/ILSVRC/test",
        "wsol:ILSVRC/test,images=/data/val",
    ):
        assert published.comparable(source, 50_000, paper)[0].le == 0.361
    for source, images, other in (
        ("wsol:/data/metadata/ILSVRC/val", 50_000, paper),
        ("wsol:/data/metadata/CUB/test", 50_000, paper),
        ("voc-test2007:/data/ILSVRC/test", 50_000, paper),
        ("synthetic:val", 50_000, paper),
        ("imagenet-val:/data", 49_999, paper),
        ("imagenet-val:/data", 50_000, Convention(224, "squash", "mean", 1.0, "largest", 4)),
        ("imagenet-val:/data", 50_000, Convention(224, "crop", "mean", 0.5, "largest", 4)),
        ("imagenet-val:/data", 50_000, Convention(224, "crop", "value", 1.0, "largest", 4)),
        ("imagenet-val:/data", 50_000, Convention(224, "crop", "mean", 1.0, "all", 4)),
        ("imagenet-val:/data", 50_000, Convention(224, "crop", "mean", 1.0, "largest", 8)),
        ("imagenet-val:/data", 50_000, Convention(64, "crop", "mean", 1.0, "largest", 4)),
    ):
        assert published.comparable(source, images, other) == ()


def test_the_printed_table_names_its_convention(tmp_path: Any) -> None:
    scores = evaluate(table([row("a", (2, 2, 8, 8), [(2, 2, 8, 8)])]))
    text = str(scores)
    for part in (
        "Localisation on synthetic:val",
        "centred box",
        "random box",
        "shorter side to 16, centre crop 16 x 16",
        "m >= mean(m) (rule mean, alpha 1)",
        "largest 4-connected component",
        "IoU > 0.5 (strictly)",
        "1 of 1 counted, none left out",
    ):
        assert part in text
    assert "paper" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_file_gives_the_same_scores_as_the_table_and_json_on_request(tmp_path: Any) -> None:
    rows = table([row("a", (2, 2, 8, 8), [(2, 2, 9, 8)])])
    path = predictions.write(rows, tmp_path / "deep" / "boxes.parquet")
    assert [entry.name for entry in path.parent.iterdir()] == ["boxes.parquet"]
    scores = evaluate(path, json=tmp_path / "scores.json")
    assert scores == evaluate(rows) == score(*predictions.read(path))
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["localisation"]["iou"] == 36 / 42
    assert saved["convention"]["rule"] == "mean"
    assert not math.isnan(saved["saliency"]["mean"])
    assert saved["intervals"]["iou"] == {
        "value": 36 / 42,
        "low": 36 / 42,
        "high": 36 / 42,
        "level": 0.95,
        "method": "bca",
        "images": 1,
    }
    assert "per_image" not in json.dumps(saved)


def test_every_score_has_its_interval() -> None:
    rng = np.random.default_rng(2)
    corners = rng.integers(0, 8, (40, 2))
    boxes = np.concatenate([corners, corners + rng.integers(2, 8, (40, 2))], axis=1)
    rows = [
        row(
            f"image {i:02}",
            boxes[i],
            [boxes[i] + [2, 0, 2, 0]] if i % 4 else [],
            predicted=i % 3,
            label=-1 if i % 5 == 0 else 0,
            mean_saliency=rng.random(),
            tv=rng.random(),
            f1=rng.random() if i % 4 else None,
            f1_mean=rng.random() if i % 4 else None,
        )
        for i in range(40)
    ]
    scores = evaluate(table(rows))
    ours, statistics = scores.localisation, scores.saliency
    assert ours is not None
    known = {
        **{name: getattr(ours, name) for name in ("le", "f1", "f1_mean", "iou", "coverage")},
        **{name: getattr(scores, name) for name in ("top1", "top5")},
        **{name: getattr(statistics, name) for name in ("mean", "tv", "tv_mean", "std")},
        "entropy": statistics.entropy,
        "entropy_full": statistics.entropy_full,
    }
    assert set(scores.intervals) == set(known)  # OM is not known: some have no label
    assert set(ours.intervals) == {"le", "f1", "f1_mean", "iou", "coverage"}
    for name, value in known.items():
        found = scores.interval(name)
        # Rounding: measured at most 1.1e-16.
        assert found.value == pytest.approx(value, abs=1e-14)
        assert found.low <= found.value + 1e-14
        assert found.value <= found.high + 1e-14
        assert found.images == {"top1": 32, "top5": 32}.get(
            name, 30 if name in ours.intervals else 40
        )
    wrong = localization.box_iou(boxes, boxes + np.array([2, 0, 2, 0])) <= 0.5
    mine = scores.interval("le", level=0.9, seed=3)
    expected = stats.bootstrap(
        (np.array([w for i, w in enumerate(wrong) if i % 4], float),),
        np.mean,
        n_resamples=2000,
        confidence_level=0.9,
        batch=2000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert (mine.low, mine.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    for entry in scores.baselines:
        assert entry.interval("iou").value == pytest.approx(entry.iou, abs=1e-14)
    text = str(scores)
    assert "  intervals  95 % bootstrap over the images: LE " in text
    assert max(map(len, text.splitlines())) <= 120


def test_files_that_are_no_table_of_boxes_are_refused_in_one_sentence(tmp_path: Any) -> None:
    missing = tmp_path / "none.parquet"
    with refuses(
        FileNotFoundError,
        f"expected a Parquet file written by casm_fast.extract, got {missing}: no such file",
    ):
        evaluate(missing)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match=r"text.parquet is not a readable Parquet file: "):
        evaluate(tmp_path / "text.parquet")
    with refuses(
        ValueError,
        "the table has no casm_fast description in its metadata: "
        "expected a table written by casm_fast.extract",
    ):
        evaluate(pa.table({"x": [1]}))
    newer = pa.table({"x": [1]}).replace_schema_metadata({"casm_fast": '{"format": 99}'})
    with refuses(
        ValueError,
        "the table has format 99, this version of casm_fast reads format 1: "
        "extract the boxes again",
    ):
        evaluate(newer)


def test_a_description_survives_its_json() -> None:
    description = Description(
        "folder:/x",
        CONVENTION,
        (4, 5),
        ("cat", "dog"),
        "a.safetensors",
        "ab",
        {"rule": "mean"},
        "cpu",
        1.5,
    )
    assert Description.from_json(description.to_json()) == description
