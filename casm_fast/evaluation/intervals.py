r"""Bootstrap confidence intervals: how far a score would move with other images.

The images are drawn again with replacement, as many as there are, and the score is taken of every
draw. "percentile" reads the interval off the scores of the draws; "bca" (Efron 1987, bias-corrected
and accelerated, the default) reads it off at levels that are corrected for the bias z and for the
skewness a of the score:

.. math::
    \Phi\Big(z + \frac{z + \Phi^{-1}(\beta)}{1 - a (z + \Phi^{-1}(\beta))}\Big),
    \quad \beta \in \{(1 - l) / 2, (1 + l) / 2\}

z is the normal quantile of the share of draws below the score (equal ones count half; what rounding
makes of equal ones is equal), and a comes from the jackknife. Draws, levels and quantiles are those
of `scipy.stats.bootstrap` with a single batch and the generator of the same seed.

A score that is made of sums over the images (a mean, the best of many means, a score of pooled
histograms) needs but how often a draw holds each image: `bootstrap_sums` has the sums of all draws
by products of matrices, and all scores of the same images share one set of draws.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

Method = Literal["bca", "percentile"]
Figures = Callable[[Floats, int], Floats]
"""From sums ``[R, c]`` over so many images to scores ``[R, k]``; NaN where one is not defined."""
Statistic = Literal["mean", "class-mean", "std"] | Callable[[Floats], Floats]
"""What is made of the images' scores: their mean; the mean over the classes of each class's mean;
their standard deviation (unbiased); or a function from ``[R, n]`` to ``[R]``."""

RESAMPLES = 2000

_CHUNK = 1 << 22  # numbers that are drawn at once: 32 MiB
_SAME = 1e-12  # relative difference of scores that is rounding
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """A score and its confidence interval.

    Attributes:
        value: The score of the images.
        low: Lower end.
        high: Upper end.
        level: Confidence, in (0, 1).
        method: "bca" or "percentile".
        images: How many there are.
    """

    value: float
    low: float
    high: float
    level: float
    method: Method
    images: int

    def __str__(self) -> str:
        return self.show(".3g")

    def show(self, form: str = ".1f", scale: float = 1.0) -> str:
        """The interval for people, such as "84.2 (82.9..85.5)" with a scale of 100.

        Args:
            form: Format specification of each number.
            scale: What the numbers are multiplied by.
        """
        value, low, high = (f"{scale * x:{form}}" for x in (self.value, self.low, self.high))
        return f"{value} ({low}..{high})"


class HasIntervals(ABC):
    """A result whose scores have bootstrap intervals over the images."""

    @abstractmethod
    def bootstrap(self, **told: Any) -> dict[str, Interval]:
        """Every score with its interval, by name; options of `casm_fast.evaluation.bootstrap`."""

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Every score with its 95 % interval, by name."""
        return self.bootstrap()

    def interval(self, name: str, **told: Any) -> Interval:
        """One score with its interval.

        Args:
            name: The score, one of the keys of `intervals`.
            **told: Options of `casm_fast.evaluation.bootstrap`: method, level, resamples, seed.

        Raises:
            ValueError: There is no such score, or a wrong option.
        """
        found = self.bootstrap(**told) if told else self.intervals
        if name not in found:
            raise ValueError(f"name: expected one of {', '.join(found)}, got {name!r}")
        return found[name]


def bootstrap(
    scores: ArrayLike,
    statistic: Statistic = "mean",
    *,
    classes: ArrayLike | None = None,
    method: Method = "bca",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A score with its bootstrap confidence interval.

    Args:
        scores: ``[n]``, one for each image, finite.
        statistic: What is made of them. The class mean of a draw is over the classes that the draw
            holds.
        classes: ``[n]`` integers, for the class mean.
        method: "bca" or "percentile".
        level: Confidence, in (0, 1).
        resamples: Draws.
        seed: Of the draws.

    Returns:
        The interval; as wide as nothing where all draws give the same score.

    Raises:
        ValueError: No image, scores that are not finite, classes that are not one for each, another
            statistic or method, or a level outside (0, 1).
    """
    values = _scores("scores", scores)
    measure = _measure(statistic, values, classes)
    return _interval(
        measure,
        _left_out(statistic, values, classes),
        len(values),
        **_told(method, level, resamples, seed),
    )


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Statistic = "mean",
    *,
    classes: ArrayLike | None = None,
    method: Method = "bca",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """How much better the first method is than the second on the same images.

    Both methods are judged on the same draws, so what makes an image hard for both cancels. They
    differ beyond chance, at this level, where the interval does not hold 0.

    Args:
        first: ``[n]`` scores of the first method.
        second: ``[n]`` scores of the second, image by image.
        statistic: As for `bootstrap`.
        classes: As for `bootstrap`.
        method: As for `bootstrap`.
        level: As for `bootstrap`.
        resamples: As for `bootstrap`.
        seed: As for `bootstrap`.

    Returns:
        The difference of the two statistics, first minus second, and its interval.

    Raises:
        ValueError: As `bootstrap`, or numbers of images that differ.
    """
    a, b = _scores("first", first), _scores("second", second)
    if len(a) != len(b):
        raise ValueError(
            f"second: expected a score for each of {len(a)} images of `first`, got {len(b)}"
        )
    measures = [_measure(statistic, values, classes) for values in (a, b)]
    without = [_left_out(statistic, values, classes) for values in (a, b)]
    return _interval(
        lambda places: measures[0](places) - measures[1](places),
        lambda: without[0]() - without[1](),
        len(a),
        **_told(method, level, resamples, seed),
    )


def bootstrap_sums(
    terms: NDArray[Any],
    figures: Figures,
    *,
    method: Method = "bca",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Interval, ...]:
    """Intervals of scores that are made of sums over the images, all from the same draws.

    Args:
        terms: ``[n, c]`` what each image adds to the sums: bool, integers or floating numbers.
        figures: The scores of sums. Draws for which a score is not defined (NaN) are passed over.
        method: As for `bootstrap`.
        level: As for `bootstrap`.
        resamples: As for `bootstrap`.
        seed: As for `bootstrap`.

    Returns:
        k intervals.

    Raises:
        ValueError: No image, or a wrong option.
    """
    _told(method, level, resamples, seed)
    n = len(terms)
    if n == 0:
        raise ValueError("terms: expected at least one image, got none")
    # Counts of images are whole in single precision, up to 2 ** 24 of them.
    dtype = np.float32 if terms.dtype == np.bool_ and n < 1 << 24 else np.float64
    generator = np.random.default_rng(seed)
    whole = _sums(np.ones((1, n), dtype), terms)
    values = figures(whole, n)[0]
    rows = max(1, _CHUNK // n)
    drawn = []
    for start in range(0, resamples, rows):
        places = generator.integers(0, n, (min(rows, resamples - start), n))
        times = np.stack([np.bincount(row, minlength=n) for row in places]).astype(dtype)
        drawn.append(figures(_sums(times, terms), n))
    scores = np.concatenate(drawn)
    without = None
    if method == "bca":
        rows = max(1, _CHUNK // terms.shape[1])
        parts = [terms[start : start + rows] for start in range(0, n, rows)]
        without = np.concatenate([figures(whole - part, n - 1) for part in parts])
    found = []
    for k, value in enumerate(map(float, values)):
        left = None if without is None else _defined(without[:, k])
        ends = _ends(value, _defined(scores[:, k]), left, level)
        found.append(Interval(value, *ends, level, method, n))
    return tuple(found)


def bootstrap_means(
    scores: Mapping[str, ArrayLike], spreads: Mapping[str, ArrayLike] | None = None, **told: Any
) -> dict[str, Interval]:
    """Intervals of many means and standard deviations; those of as many images share their draws.

    Args:
        scores: ``[n]`` by name, one for each image, finite; n may differ.
        spreads: The same, for the unbiased standard deviation.
        **told: Options of `bootstrap`.

    Returns:
        By name what `bootstrap` gives, but for rounding.

    Raises:
        ValueError: As `bootstrap`.
    """
    columns = {name: _scores(name, values) for name, values in scores.items()}
    wide = {name: _scores(name, values) for name, values in (spreads or {}).items()}
    found: dict[str, Interval] = {}
    for n in sorted({len(column) for column in (*columns.values(), *wide.values())}):
        plain = {name: column for name, column in columns.items() if len(column) == n}
        off = {name: x - x.mean() for name, x in wide.items() if len(x) == n}
        table = [*plain.values(), *off.values(), *(x**2 for x in off.values())]
        count = len(plain)

        def figures(sums: Floats, images: int, count: int = count) -> Floats:
            first, second = np.split(sums[:, count:], 2, axis=1)
            squares = np.maximum(second - first**2 / max(images, 1), 0)
            deviations = np.sqrt(squares / max(images - 1, 1))
            return np.concatenate([means(sums[:, :count], images), deviations], axis=1)

        made = bootstrap_sums(np.stack(table, axis=1), figures, **told)
        found |= zip((*plain, *off), made, strict=True)
    return {name: found[name] for name in (*columns, *wide)}


def means(sums: Floats, images: int) -> Floats:
    """The `Figures` of plain means."""
    return sums / max(images, 1)


# --- intervals ------------------------------------------------------------------------------------


def _interval(
    measure: Callable[[Integers], Floats],
    left_out: Callable[[], Floats],
    n: int,
    method: Method,
    level: float,
    resamples: int,
    seed: int,
) -> Interval:
    """The interval of a measure of places ``[R, n]``, given what it is without each image."""
    value = float(measure(np.arange(n)[None])[0])
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n)
    drawn = np.concatenate(
        [
            measure(generator.integers(0, n, (min(rows, resamples - start), n)))
            for start in range(0, resamples, rows)
        ]
    )
    return Interval(
        value,
        *_ends(value, drawn, left_out() if method == "bca" else None, level),
        level,
        method,
        n,
    )


def _ends(value: float, drawn: Floats, without: Floats | None, level: float) -> tuple[float, float]:
    """The ends of an interval from the scores of draws and, for BCa, those without each image."""
    if math.isclose(drawn.min(), drawn.max(), rel_tol=_SAME):
        return float(drawn[0]), float(drawn[0])
    levels = [(1 - level) / 2, (1 + level) / 2]
    if without is not None:
        # The same images in another order give the same score but for rounding.
        off = drawn - value
        off[np.abs(off) <= _SAME * abs(value)] = 0
        below = (np.count_nonzero(off < 0) + np.count_nonzero(off <= 0)) / 2
        share = min(max(below, 0.5), len(drawn) - 0.5) / len(drawn)
        bias, skewness = _NORMAL.inv_cdf(share), _acceleration(without)
        levels = [_corrected(each, bias, skewness) for each in levels]
    low, high = map(float, np.quantile(drawn, levels))
    return low, high


def _defined(scores: Floats) -> Floats:
    return scores[~np.isnan(scores)]


def _sums(times: NDArray[Any], terms: NDArray[Any]) -> Floats:
    """Sums over the images of draws ``[R, n]``, how often each holds an image: ``[R, c]``."""
    step = max(1, _CHUNK // terms.shape[1])
    return np.asarray(
        sum(
            times[:, start : start + step] @ terms[start : start + step].astype(times.dtype)
            for start in range(0, len(terms), step)
        ),
        np.float64,
    )


def _acceleration(without: Floats) -> float:
    """The skewness of a statistic from its values without each image ``[n]``."""
    influence = without.mean() - without
    spread = float((influence**2).sum()) ** 1.5
    return float((influence**3).sum()) / (6 * spread) if spread > 0 else 0.0


def _corrected(level: float, bias: float, skewness: float) -> float:
    moved = bias + _NORMAL.inv_cdf(level)
    return _NORMAL.cdf(bias + moved / (1 - skewness * moved))


# --- statistics -----------------------------------------------------------------------------------


def _measure(
    statistic: Statistic, values: Floats, classes: ArrayLike | None
) -> Callable[[Integers], Floats]:
    """The statistic of draws, given by places ``[R, n]``: ``[R]``."""
    if statistic == "mean":
        return lambda places: values[places].mean(axis=1)
    if statistic == "std":
        return lambda places: _std(values[places])
    if statistic == "class-mean":
        labels, count = _labels(classes, len(values))

        def class_mean(places: Integers) -> Floats:
            rows = np.arange(len(places))[:, None] * count
            bins = (rows + labels[places]).ravel()
            sizes = np.bincount(bins, minlength=len(places) * count).reshape(-1, count)
            sums = np.bincount(bins, values[places].ravel(), minlength=sizes.size)
            means = sums.reshape(sizes.shape) / np.maximum(sizes, 1)
            return np.asarray(means.sum(axis=1) / (sizes > 0).sum(axis=1))

        return class_mean
    if not callable(statistic):
        raise ValueError(
            "statistic: expected mean, class-mean, std or a function from [R, n] to [R], "
            f"got {statistic!r}"
        )
    function = statistic
    return lambda places: np.asarray(function(values[places]), np.float64)


def _left_out(
    statistic: Statistic, values: Floats, classes: ArrayLike | None
) -> Callable[[], Floats]:
    """The statistic without each image in turn, ``[n]``; in one pass where there is a formula."""
    n = len(values)
    if statistic == "mean":
        return lambda: (values.sum() - values) / max(n - 1, 1)
    if statistic == "std":

        def std() -> Floats:
            deviations = values - values.mean()
            # Without one image the sum of squares falls by n / (n - 1) of its squared deviation.
            squares = (deviations**2).sum() - deviations**2 * n / max(n - 1, 1)
            return np.asarray(np.sqrt(np.maximum(squares, 0) / max(n - 2, 1)))

        return std
    if statistic == "class-mean":
        labels, count = _labels(classes, n)

        def class_mean() -> Floats:
            sizes = np.bincount(labels, minlength=count)
            sums = np.bincount(labels, values, minlength=count)
            means = sums / np.maximum(sizes, 1)
            present, total = int((sizes > 0).sum()), float(means.sum())
            left = sizes[labels] - 1
            others = (sums[labels] - values) / np.maximum(left, 1)
            # A class that had this image alone is no longer there.
            remaining = np.where(left > 0, present, max(present - 1, 1))
            return np.asarray((total - means[labels] + np.where(left > 0, others, 0)) / remaining)

        return class_mean

    measure = _measure(statistic, values, classes)

    def one_by_one() -> Floats:
        if n < 2:
            return np.zeros(n)
        shorter = np.arange(n - 1)
        rows = max(1, _CHUNK // n)
        found = []
        for start in range(0, n, rows):
            removed = np.arange(start, min(start + rows, n))[:, None]
            found.append(measure(shorter + (shorter >= removed)))
        return np.concatenate(found)

    return one_by_one


def _std(values: Floats) -> Floats:
    """The unbiased standard deviation of ``[R, n]``, 0 for n = 1."""
    n = values.shape[1]
    return np.asarray(values.std(axis=1) * math.sqrt(n / max(n - 1, 1)))


def _labels(classes: ArrayLike | None, n: int) -> tuple[Integers, int]:
    """Classes numbered from 0, and how many there are."""
    if classes is None:
        raise ValueError("classes: expected a class for each image beside class-mean, got none")
    given = np.asarray(classes)
    if given.shape != (n,):
        raise ValueError(f"classes: expected a class for each of {n} images, got {given.shape}")
    names, labels = np.unique(given, return_inverse=True)
    return labels.astype(np.int64), len(names)


def _scores(name: str, scores: ArrayLike) -> Floats:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"{name}: expected a score for each of at least one image, got {list(values.shape)}"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{name}: expected finite scores, got {values[bad[0]]} for image {bad[0]}; "
            "leave such images out"
        )
    return values


def _told(method: Method, level: float, resamples: int, seed: int) -> dict[str, Any]:
    if method not in get_args(Method):
        raise ValueError(f"method: expected bca or percentile, got {method!r}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a confidence in (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least one draw, got {resamples}")
    return {"method": method, "level": level, "resamples": resamples, "seed": seed}
