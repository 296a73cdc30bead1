"""The printed table of scores, and the sentences that name its convention."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from casm_fast.data.predictions import Convention
    from casm_fast.evaluation.intervals import Interval
    from casm_fast.evaluation.published import Published
    from casm_fast.evaluation.scores import Counts, Localisation, Scores

TITLES = {
    "le": ("LE", ""),
    "om": ("OM", ""),
    "f1": ("F1", ""),
    "f1_mean": ("F1a", ""),
    "iou": ("mean IoU", ".3f"),
    "coverage": ("box area", ""),
    "top1": ("top-1", ""),
    "top5": ("top-5", ""),
    "mean": ("mean saliency", ".3f"),
    "tv": ("TV", ".4g"),
    "tv_mean": ("TV mean form", ".4f"),
    "entropy": ("entropy", ".3f"),
    "entropy_full": ("entropy full", ".3f"),
    "std": ("std of the volume", ".3f"),
}
"""Names and formats of CASM's scores; percentages where the format is empty."""

_TIED = "\u00a0"  # a space at which no line is broken


class Described(Protocol):
    """Scores by CASM's convention."""

    @property
    def convention(self) -> Convention:
        """Geometry and box rule."""

    @property
    def counts(self) -> Counts:
        """Which images were counted."""


def percent(share: float | None) -> str:
    """``0.0935`` as ``"9.3 %"``; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def convention_lines(scores: Described) -> tuple[tuple[str, str], ...]:
    """The convention of the scores as pairs of a short name and a sentence."""
    rule, counts = scores.convention, scores.counts
    box = "tight box of every kept pixel"
    if rule.component == "largest":
        box = f"tight box of the largest {rule.connectivity}-connected component"
    left_out = []
    if counts.unreadable:
        left_out.append(f"{counts.unreadable:,} unreadable")
    without_box = counts.images - counts.unreadable - counts.localized
    if without_box:
        left_out.append(f"{without_box:,} without a true box")
    return (
        (
            "images",
            f"{counts.localized:,} of {counts.images:,} counted"
            + (f" ({', '.join(left_out)})" if left_out else ", none left out"),
        ),
        ("geometry", rule.geometry),
        ("threshold", f"{rule.threshold} (rule {rule.rule}, alpha {rule.alpha:g})"),
        ("box", box),
        (
            "correct",
            "IoU > 0.5 (strictly) with the best true box, whose whole area counts, cropped or not",
        ),
        ("class", "not known to the model; OM also asks for its first guess (top-1)"),
    )


def render(scores: Scores) -> str:
    """The scores as a table for a terminal."""
    lines = [f"Localisation on {scores.source}", ""]
    if scores.localisation is None:
        lines += ["  no true boxes: nothing to localize against", ""]
    else:
        entries = (scores.localisation, *scores.baselines)
        lines += [*localisation_table(entries, scores.published), ""]
    statistics = scores.saliency
    spread = "-" if statistics.std is None else f"{statistics.std:.2f}"
    explained = [
        *interval_lines(scores.intervals, TITLES),
        ("classes", f"top-1 {percent(scores.top1)}, top-5 {percent(scores.top5)}"),
        (
            "saliency",
            f"mean {statistics.mean:.2f}, std of the volume {spread}, TV {statistics.tv:.3g} "
            f"(mean form {statistics.tv_mean:.4f}), "
            f"entropy {statistics.entropy:.3f} bits one-sided ({statistics.entropy_full:.3f} full)",
        ),
        *convention_lines(scores),
    ]
    return "\n".join([*lines, *notes(explained)])


def localisation_table(
    entries: Sequence[Localisation], published: Sequence[Published]
) -> list[str]:
    """The rows of CASM's localisation scores, and published ones below."""
    rows = [_row(entry) for entry in entries]
    rows += [
        (entry.name, percent(entry.le), percent(entry.om), percent(entry.f1), "-", "-", "-")
        for entry in published
    ]
    heads = ("", "LE (less)", "OM (less)", "F1 (more)", "F1a (more)", "mean IoU", "box area")
    return columns(heads, rows)


def _row(entry: Localisation) -> tuple[str, ...]:
    return (
        entry.name,
        percent(entry.le),
        percent(entry.om),
        percent(entry.f1),
        percent(entry.f1_mean),
        f"{entry.iou:.2f}",
        percent(entry.coverage),
    )


def interval_lines(
    intervals: Mapping[str, Interval], titles: Mapping[str, tuple[str, str]] | None = None
) -> tuple[tuple[str, str], ...]:
    """The bootstrap intervals that stand below every table, as pairs like the convention's.

    Args:
        intervals: By name, all of one level.
        titles: What a name is called, and its format; None: percentages by name.
    """
    shown = []
    for name, found in intervals.items():
        title, form = (titles or {}).get(name, (name.split(" (")[0], ""))
        ends = f"{found.low:{form}}..{found.high:{form}}"
        if not form:
            ends = f"{100 * found.low:.1f}..{100 * found.high:.1f} %"
        shown.append(f"{title} {ends}".replace(" ", _TIED))
    level = next(iter(intervals.values())).level
    text = f"{100 * level:g}{_TIED}% bootstrap over the images: {', '.join(shown)}"
    lines = [line.replace(_TIED, " ") for line in textwrap.wrap(text, 100)]
    return tuple(zip(("intervals", *[""] * len(lines)), lines, strict=False))


def notes(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Short names and their sentences, one a line."""
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in pairs]


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows below their heads: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    rule = "  " + "  ".join("-" * width for width in widths)
    return [lines[0], rule, *lines[1:]]
