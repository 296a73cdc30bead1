"""The printed table of scores, and the sentences that name its convention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from casm_fast.data.predictions import Convention
    from casm_fast.evaluation.published import Published
    from casm_fast.evaluation.scores import Counts, Localisation, Scores


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
