"""Charts as inline SVG.

Drawn by matplotlib, coloured by the page, so that they follow its light and dark themes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """The colours of a chart.

    Attributes:
        ink: Text.
        quiet: Labels, and what stands behind.
        line: Grid and axes.
        first: What the chart is about.
        second: What it is compared with.
    """

    ink: str
    quiet: str
    line: str
    first: str
    second: str


# Stand-ins that matplotlib accepts as colours; the page's own take their place in the SVG.
_STAND_INS = Palette("#010101", "#020202", "#030303", "#040404", "#050505")
_PAGE = Palette("var(--ink)", "var(--quiet)", "var(--line)", "var(--accent)", "var(--second)")
_INK, _QUIET, _LINE, _FIRST, _SECOND = dataclasses.astuple(_STAND_INS)
# On white: the light theme of the page.
_PRINT = Palette("#15181c", "#616973", "#e4e6e8", "#2458c5", "#c2630a")

Draw = Callable[["Axes", Palette], None]
"""Draws a chart on empty axes in the colours that it is told."""

_SIZE = (4.6, 2.5)  # inches


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: What it shows.
        caption: How to read it.
        svg: An ``<svg>`` element.
    """

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Line:
    """One line of a chart: ``y`` over ``x``, called ``name``."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a training log, one JSON object per line, but for a line cut short by a crash."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def training_charts(records: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """How a training run went, from its log.

    Args:
        records: Lines of the log: ``phase``, ``split``, ``step`` and what was measured.

    Returns:
        The charts that the log has numbers for.
    """
    records = list(records)
    casm = [record for record in records if record.get("phase") == "casm"]
    wanted = [
        (
            "Accuracy while the mask learns",
            "The classifier on whole validation images, and on the same images without their "
            "salient part. The lower the second line, the less evidence the mask leaves.",
            casm,
            "val",
            (("whole images", "accuracy"), ("masked-out images", "masked_accuracy")),
            (0.0, 1.0),
        ),
        (
            "Localisation error",
            "Share of validation images whose box has an IoU of at most 0.5 with every true box.",
            casm,
            "val",
            (("LE", "localisation_error"),),
            (0.0, 1.0),
        ),
        (
            "Size of the mask",
            "Mean saliency of the training images: the share of the picture that is marked.",
            casm,
            "train",
            (("mean saliency", "mean_saliency"),),
            (0.0, 1.0),
        ),
        (
            "Entropy on masked-out images",
            "In nats. The mask is paid for uncertainty: with the object gone, the classifier "
            "should not know what it saw.",
            casm,
            "train",
            (("entropy", "entropy"),),
            None,
        ),
    ]
    charts = []
    for title, caption, source, split, names, limits in wanted:
        lines = [_line(name, key, source, split) for name, key in names]
        lines = [line for line in lines if len(line.x) > 1]
        if lines:
            charts.append(Chart(title, caption, line_chart(lines, "step", limits)))
    return charts


def line_chart(
    lines: Sequence[Line], x_label: str, limits: tuple[float, float] | None = None
) -> str:
    """Lines with their names at their ends.

    Args:
        lines: At most two.
        x_label: What the horizontal axis counts.
        limits: Range of the vertical axis.

    Returns:
        An ``<svg>`` element.
    """
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Axes) -> None:
        for line, colour in zip(lines, (_FIRST, _SECOND), strict=False):
            marker = "o" if len(line.x) < 12 else None
            axes.plot(line.x, line.y, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
        if limits is not None:
            axes.set_ylim(limits[0], limits[1] * 1.02)
        else:
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, 0), high)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlabel(x_label)
        if len(lines) > 1:
            for line, colour in zip(lines, (_FIRST, _SECOND), strict=False):
                axes.annotate(
                    line.name,
                    (line.x[-1], line.y[-1]),
                    xytext=(0, 8 if line.y[-1] < 0.9 else -14),
                    textcoords="offset points",
                    ha="right",
                    color=colour,
                )

    return _svg(draw)


def iou_chart(model: NDArray[np.float64], baseline: NDArray[np.float64]) -> str:
    """Histogram of the best IoU per image, with that of a simple box as an outline.

    Args:
        model: ``[n]`` best IoU of the model's boxes.
        baseline: ``[n]`` best IoU of the simple boxes.

    Returns:
        An ``<svg>`` element.
    """
    bins = np.linspace(0, 1, 21).tolist()

    def draw(axes: Axes) -> None:
        weights = np.full(len(model), 1 / max(len(model), 1))
        axes.hist(model, bins, weights=weights, color=_FIRST, rwidth=0.88)
        counts, _ = np.histogram(baseline, bins, weights=np.full(len(baseline), 1 / len(baseline)))
        axes.stairs(counts, bins, color=_SECOND, linewidth=1.4)
        axes.axvline(0.5, color=_QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.set_xlim(0, 1)
        axes.set_xlabel("IoU with the best true box")
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")

    return _svg(draw)


def area_chart(model: NDArray[np.float64], truth: NDArray[np.float64]) -> str:
    """Histogram of the share of the picture inside the boxes, predicted and true.

    Args:
        model: ``[n]`` shares of the predicted boxes.
        truth: ``[m]`` shares of the true boxes.

    Returns:
        An ``<svg>`` element.
    """
    bins = np.linspace(0, 1, 21).tolist()

    def draw(axes: Axes) -> None:
        weights = np.full(len(model), 1 / len(model))
        axes.hist(model, bins, weights=weights, color=_FIRST, rwidth=0.88)
        weights = np.full(len(truth), 1 / len(truth))
        counts, _ = np.histogram(np.minimum(truth, 1), bins, weights=weights)
        axes.stairs(counts, bins, color=_SECOND, linewidth=1.4)
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the picture inside the box")
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")

    return _svg(draw)


def _line(name: str, key: str, records: Iterable[Mapping[str, Any]], split: str) -> Line:
    points = [
        (float(record["step"]), float(record[key]))
        for record in records
        if record.get("split") == split and record.get(key) is not None and "step" in record
    ]
    return Line(name, [x for x, _ in points], [y for _, y in points])


def themed_svg(draw: Draw, size: tuple[float, float] = _SIZE) -> str:
    """A chart as an ``<svg>`` element that follows the light and dark themes of the page.

    Args:
        draw: What is in it.
        size: Width and height in inches; the page keeps their proportion.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    with _drawn(draw, _STAND_INS, size) as figure:
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
            text, metadata={"Date": None, "Creator": None}
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in zip(
        dataclasses.astuple(_STAND_INS), dataclasses.astuple(_PAGE), strict=True
    ):
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # The page sets size and font; the view box keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r" font-family: [^;\"]*;", "", svg)


def picture(draw: Draw, path: Path, size: tuple[float, float] = _SIZE, dpi: int = 200) -> Path:
    """A chart as a picture file on white.

    Args:
        draw: What is in it.
        path: The file; its suffix names the format.
        size: Width and height in inches.
        dpi: Dots per inch.

    Returns:
        ``path``.
    """
    with _drawn(draw, _PRINT, size) as figure:
        figure.savefig(path, dpi=dpi)
    return path


def _svg(draw: Callable[[Axes], None]) -> str:
    """A chart that knows its colours."""
    return themed_svg(lambda axes, _: draw(axes))


@contextmanager
def _drawn(draw: Draw, palette: Palette, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure with a chart in it, while the style of the page holds."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "casm_fast",
        "font.size": 9,
        "axes.edgecolor": palette.line,
        "axes.labelcolor": palette.quiet,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": palette.line,
        "grid.linewidth": 0.7,
        "xtick.color": palette.quiet,
        "ytick.color": palette.quiet,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "text.color": palette.ink,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes, palette)
        if isinstance(axes.yaxis.get_major_locator(), MaxNLocator):
            axes.locator_params(axis="y", nbins=5)
        yield figure
