"""Intervals of every score: scipy.stats.bootstrap of the protocol itself, called for each draw."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from refusals import refuses
from scipy import stats

from casm_fast import evaluation
from casm_fast.evaluation import Interval, bootstrap, intervals, max_box_acc
from casm_fast.evaluation.intervals import bootstrap_means, bootstrap_sums, means

N, SIDE, DRAWS = 14, 12, 60
RNG = np.random.default_rng(11)
SIZES = np.full((N, 2), SIDE)


def bump(box: np.ndarray) -> np.ndarray:
    """A map that is high near a box, for some boxes more so than for others."""
    y, x = np.mgrid[:SIDE, :SIDE]
    x0, x1 = box[[0, 2]] + RNG.normal(0, 2.4, 2)
    y0, y1 = box[[1, 3]] + RNG.normal(0, 2.4, 2)
    distance = ((x + 0.5 - (x0 + x1) / 2) / 3) ** 2 + ((y + 0.5 - (y0 + y1) / 2) / 3) ** 2
    noisy = np.exp(-distance) + RNG.uniform(0, 0.4) * RNG.random((SIDE, SIDE))
    return noisy / noisy.max()


CORNERS = RNG.integers(0, 7, (N, 2))
BOXES = np.concatenate([CORNERS, CORNERS + RNG.integers(3, 6, (N, 2))], axis=1)
TRUTH = [box[None] for box in BOXES]
MAPS = np.stack([bump(box) for box in BOXES])
MASKS = np.zeros((N, SIDE, SIDE), np.uint8)
for mask, (x0, y0, x1, y1) in zip(MASKS, BOXES, strict=True):
    mask[y0:y1, x0:x1] = 1
MASKS[:2, :3] = 255


def by_scipy(score: Callable[[np.ndarray], float], method: str, n: int = N) -> tuple[float, float]:
    """The interval of a score of images, given by their places, that is computed for each draw.

    It is rounded, so that scipy sees which draws equal the score of the images.
    """
    found = stats.bootstrap(
        (np.arange(n),),
        lambda places: round(score(np.asarray(places, int)), 12),
        vectorized=False,
        n_resamples=DRAWS,
        method=method,
        rng=np.random.default_rng(4),
    ).confidence_interval
    return found.low, found.high


def taken(items: list[np.ndarray], places: np.ndarray) -> list[np.ndarray]:
    return [items[place] for place in places]


GUESSES = RNG.integers(0, 3, (N, 6))
LABELS = RNG.integers(0, 3, N)
FOUND = RNG.random(N) < 0.6
RIGHT = RNG.random(N) < 0.7


def localised(places: np.ndarray) -> Any:
    return evaluation.localise(
        MAPS[places], taken(TRUTH, places), size=SIDE, alpha=1.6, right=RIGHT[places]
    )


def weakly(places: np.ndarray) -> Any:
    return evaluation.weak_localisation(
        MAPS[places], taken(TRUTH, places), SIZES[places], rule="value", alpha=0.2
    )


def classified(places: np.ndarray) -> Any:
    return evaluation.class_localisation(FOUND[places], GUESSES[places], LABELS[places])


def boxed(version: int) -> Callable[[np.ndarray], Any]:
    return lambda places: max_box_acc(MAPS[places], taken(TRUTH, places), version=version)


def pixels(places: np.ndarray) -> Any:
    return evaluation.pixel_ap(MAPS[places], MASKS[places])


def figure(result: Any, name: str) -> float:
    if hasattr(result, "heads"):
        return result.figures[result.heads.index(name)]
    return getattr(result.localisation, name)


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize(
    ("protocol", "names"),
    [
        (localised, ("le", "om", "f1", "f1_mean", "iou", "coverage")),
        (weakly, ("error (less)",)),
        (classified, ("GT-known", "top-1 LOC", "top-5 LOC")),
        (boxed(1), ("MaxBoxAcc V1",)),
        (boxed(2), ("MaxBoxAcc V2", "IoU >= 0.3", "IoU >= 0.5", "IoU >= 0.7")),
        (pixels, ("PxAP",)),
    ],
    ids=["localise", "weak", "class", "V1", "V2", "PxAP"],
)
def test_every_protocol_agrees_with_a_call_for_each_draw(protocol, names, method):
    result = protocol(np.arange(N))
    assert tuple(result.intervals) == names
    for name in names:
        ours = result.interval(name, method=method, resamples=DRAWS, seed=4)
        expected = by_scipy(lambda places, name=name: figure(protocol(places), name), method)
        assert ours.value == pytest.approx(figure(result, name), abs=1e-12)
        # The same draws, rounded by scipy's side: the worst of 32 intervals is off by 5.2e-13.
        assert (ours.low, ours.high) == pytest.approx(expected, abs=2e-12)
        assert ours.low < ours.high


finite = st.floats(-8, 8, width=32)


@given(arrays.arrays(np.float64, st.integers(4, 12), elements=finite), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_means_and_spreads_agree_with_scipy(scores, seed):
    scores = scores + np.linspace(0, 1, len(scores)) ** 2  # not all equal
    found = bootstrap_means(
        {"a": scores}, {"b": scores}, method="percentile", resamples=50, seed=seed
    )
    for name, theirs in (("a", np.mean), ("b", lambda x, axis: np.std(x, axis, ddof=1))):
        expected = stats.bootstrap(
            (scores,), theirs, n_resamples=50, method="percentile", rng=np.random.default_rng(seed)
        ).confidence_interval
        # Measured over 2,000 examples: at most 3e-15 for means, 1.2e-13 for spreads.
        assert (found[name].low, found[name].high) == pytest.approx(
            (expected.low, expected.high), abs=1e-11
        )


@given(arrays.arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 6))), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_the_best_of_every_draw_is_that_of_a_loop(correct, seed):
    n = len(correct)

    def best(sums: np.ndarray, images: int) -> np.ndarray:
        return sums.max(axis=1, keepdims=True) / max(images, 1)

    (found,) = bootstrap_sums(correct, best, method="percentile", resamples=40, seed=seed)
    draws = []
    for places in np.random.default_rng(seed).integers(0, n, (40, n)):
        draws.append(
            max(
                sum(correct[place][t] for place in places) / n for t in range(6)[: correct.shape[1]]
            )
        )
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert found.value == correct.sum(0).max() / n


def test_one_set_of_draws_serves_all_means():
    a, b, short = RNG.normal(size=50), RNG.random(50) < 0.3, RNG.normal(size=7)
    found = bootstrap_means({"a": a, "short": short, "b": b}, {"std": a}, seed=2, level=0.8)
    assert list(found) == ["a", "short", "b", "std"]
    for name, alone in (
        ("a", bootstrap(a, seed=2, level=0.8)),
        ("b", bootstrap(b, seed=2, level=0.8)),
        ("short", bootstrap(short, seed=2, level=0.8)),
        ("std", bootstrap(a, "std", seed=2, level=0.8)),
    ):
        assert found[name].images == alone.images
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx(
            (alone.value, alone.low, alone.high), abs=1e-12
        )


def test_small_parts_sum_to_the_same(monkeypatch):
    terms = RNG.random((40, 3)) < 0.5
    whole = bootstrap_sums(terms, means, resamples=90)
    monkeypatch.setattr(intervals, "_CHUNK", 50)
    assert bootstrap_sums(terms, means, resamples=90) == whole


def test_equal_scores_leave_no_doubt():
    found = bootstrap_means({"a": [0.1] * 9, "b": [0.0] * 9}, {"c": [0.1] * 9})
    assert all(each.low == each.high == pytest.approx(each.value) for each in found.values())
    (lonely,) = bootstrap_sums(np.ones((1, 1), bool), means)
    assert (lonely.low, lonely.high) == (1, 1)


def test_thresholds_that_cannot_win_change_nothing(monkeypatch):
    n = 300
    maps, truth = np.tile(MAPS, (n // N + 1, 1, 1))[:n], (TRUTH * (n // N + 1))[:n]
    some = max_box_acc(maps, truth)
    monkeypatch.setattr(sys.modules[max_box_acc.__module__], "_NEVER", np.inf)
    every = max_box_acc(maps, truth)
    assert sum(some.rivals) < sum(every.rivals)
    assert some.interval("MaxBoxAcc V2", resamples=99) == every.interval(
        "MaxBoxAcc V2", resamples=99
    )


def test_a_draw_without_object_pixels_is_passed_over():
    masks = MASKS[2:4].copy()
    masks[1] = 0
    found = evaluation.pixel_ap(MAPS[2:4], masks, thresholds=[0.0, 0.5]).interval("PxAP")
    assert 0 < found.low < found.high <= 1


def test_histograms_are_narrow_where_they_may_be():
    assert evaluation.pixel_ap(MAPS, MASKS).terms.dtype == np.uint16
    wide = np.ones((1, 256, 256), np.float32)
    result = evaluation.pixel_ap(wide, np.ones((1, 256, 256)))
    assert result.terms.sum() == 1 << 16
    assert result.interval("PxAP").value == result.score


def test_intervals_are_printed_and_saved_by_one_form():
    result = weakly(np.arange(N))
    found = result.interval("error (less)")
    assert isinstance(found, Interval)
    ends = f"{100 * found.low:.1f}..{100 * found.high:.1f} %"
    assert f"  intervals  95 % bootstrap over the images: error {ends}" in str(result).splitlines()
    saved = json.loads(json.dumps(result.to_dict()))
    assert saved["intervals"]["error (less)"] == {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "level": 0.95,
        "method": "bca",
        "images": N,
    }
    text = str(localised(np.arange(N)))
    assert "  intervals  95 % bootstrap over the images: LE " in text
    assert "mean IoU 0." in text


def test_bad_input_is_one_sentence():
    with refuses(ValueError, "name: expected one of error (less), got 'error'"):
        weakly(np.arange(N)).interval("error")
    with refuses(ValueError, "terms: expected at least one image, got none"):
        bootstrap_sums(np.zeros((0, 2)), means)
    with refuses(ValueError, "level: expected a confidence in (0, 1), got 95"):
        weakly(np.arange(N)).interval("error (less)", level=95)
    with refuses(
        ValueError, "a: expected finite scores, got inf for image 1; leave such images out"
    ):
        bootstrap_means({"a": [0.0, np.inf]})
