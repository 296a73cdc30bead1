"""Bootstrap intervals: scipy.stats.bootstrap as the oracle, draw for draw."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from scipy import stats

from casm_fast.evaluation import Interval, bootstrap, intervals, join, paired_bootstrap
from casm_fast.evaluation.outcomes import PER_IMAGE, PER_IMAGE_LAST

RNG = np.random.default_rng(5)
SCORES = RNG.exponential(size=40)
HITS = (RNG.random(60) < 0.8).astype(float)
LABELS = RNG.integers(0, 4, 40)


def median(values: np.ndarray) -> np.ndarray:
    return np.median(values, axis=-1)


def class_mean(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([scores[labels == k].mean() for k in np.unique(labels)]))


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize(
    ("statistic", "theirs"),
    [
        ("mean", lambda x, axis: x.mean(axis)),
        # Rounded, so that scipy sees which draws equal the score of the images.
        ("std", lambda x, axis: x.std(axis, ddof=1).round(13)),
        (median, lambda x, axis: np.median(x, axis)),
    ],
)
@pytest.mark.parametrize("scores", [SCORES, HITS[:39]])
def test_agrees_with_scipy(method, statistic, theirs, scores):
    if statistic is median and len(scores) < 40:
        scores = scores + SCORES[:39]
    ours = bootstrap(scores, statistic, method=method, resamples=500, seed=3)
    expected = stats.bootstrap(
        (scores,), theirs, n_resamples=500, method=method, rng=np.random.default_rng(3)
    ).confidence_interval
    # The same draws: measured difference of 240 intervals at most 4.4e-15.
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert ours.value == pytest.approx(theirs(scores, 0))


@pytest.mark.parametrize("lonely", [False, True], ids=["classes", "a class of one"])
@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_class_mean_agrees_with_scipy(method, lonely):
    labels = LABELS.copy()
    labels[7] = 9 if lonely else labels[7]
    ours = bootstrap(SCORES, "class-mean", classes=labels, method=method, resamples=300, level=0.9)
    expected = stats.bootstrap(
        (SCORES, labels),
        class_mean,
        paired=True,
        vectorized=False,
        n_resamples=300,
        confidence_level=0.9,
        method=method,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert ours.value == pytest.approx(class_mean(SCORES, labels))


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_differences_agree_with_scipy(method):
    better = SCORES + RNG.normal(0.3, 0.2, 40)
    ours = paired_bootstrap(better, SCORES, median, method=method, resamples=300, seed=1)
    expected = stats.bootstrap(
        (better, SCORES),
        lambda a, b, axis: np.median(a, axis) - np.median(b, axis),
        paired=True,
        n_resamples=300,
        method=method,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_pairs_are_sharper_than_two_intervals():
    hard = RNG.normal(size=200)
    a, b = hard + 0.1 + RNG.normal(0, 0.1, 200), hard
    difference = paired_bootstrap(a, b)
    assert difference.low > 0
    assert bootstrap(a).low < bootstrap(b).high


def test_chunks_draw_the_same(monkeypatch):
    whole = bootstrap(SCORES, median, resamples=300)
    monkeypatch.setattr(intervals, "_CHUNK", 700)
    assert bootstrap(SCORES, median, resamples=300) == whole


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_intervals_lie_among_the_scores(scores, seed):
    found = bootstrap(scores, resamples=50, seed=seed)
    slack = 1e-9
    assert min(scores) - slack <= found.low <= found.high <= max(scores) + slack
    assert found == bootstrap(scores, resamples=50, seed=seed)


def test_equal_scores_leave_no_doubt():
    for statistic in ("mean", "std"):
        found = bootstrap([0.5] * 7, statistic)
        assert found.low == found.high == pytest.approx(found.value)
    lonely = bootstrap([1.0, 0.0], "class-mean", classes=[3, 9], resamples=99)
    assert lonely.value == 0.5


def test_reads_well():
    interval = Interval(0.842, 0.829, 0.855, 0.95, "bca", 5000)
    assert interval.show(scale=100) == "84.2 (82.9..85.5)"
    assert str(interval) == "0.842 (0.829..0.855)"


def test_bad_input_is_one_sentence():
    with refuses(ValueError, "scores: expected a score for each of at least one image, got [0]"):
        bootstrap([])
    with refuses(
        ValueError,
        "scores: expected finite scores, got nan for image 1; leave such images out",
    ):
        bootstrap([1.0, float("nan")])
    with refuses(ValueError, "second: expected a score for each of 2 images of `first`, got 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with refuses(
        ValueError, "classes: expected a class for each image beside class-mean, got none"
    ):
        bootstrap([1.0], "class-mean")
    with refuses(ValueError, "classes: expected a class for each of 1 images, got (2,)"):
        bootstrap([1.0], "class-mean", classes=[1, 2])
    with refuses(
        ValueError,
        "statistic: expected mean, class-mean, std or a function from [R, n] to [R], got 'mode'",
    ):
        bootstrap([1.0], "mode")
    with refuses(ValueError, "method: expected bca or percentile, got 'basic'"):
        bootstrap([1.0], method="basic")
    with refuses(ValueError, "level: expected a confidence in (0, 1), got 95"):
        bootstrap([1.0], level=95)
    with refuses(ValueError, "resamples: expected at least one draw, got 0"):
        bootstrap([1.0], resamples=0)


@dataclass(frozen=True, eq=False)
class Example:
    hits: np.ndarray = field(metadata=PER_IMAGE)
    table: np.ndarray = field(metadata=PER_IMAGE_LAST)
    convention: str = ""


def test_parts_join_to_the_whole():
    parts = [Example(np.arange(n), np.full((2, n), n), "a") for n in (2, 0, 3)]
    whole = join(parts)
    assert whole.hits.tolist() == [0, 1, 0, 1, 2]
    assert whole.table.tolist() == [[2, 2, 3, 3, 3]] * 2
    assert whole.convention == "a"


def test_parts_that_do_not_fit_are_refused():
    one = Example(np.zeros(1), np.zeros((2, 1)), "a")
    with refuses(ValueError, "join: expected at least one result, got none"):
        join([])
    with refuses(ValueError, "join: expected results that agree in `convention`, got 'a' and 'b'"):
        join([one, Example(np.zeros(1), np.zeros((2, 1)), "b")])
    with refuses(TypeError, "join: expected results of one protocol, got Example, int"):
        join([one, 3])
