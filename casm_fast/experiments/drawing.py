"""Charts that several experiments draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from casm_fast.experiments.findings import Column, Row
from casm_fast.report.charts import Draw, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def height(rows: Sequence[Row]) -> float:
    """Inches that `dots` needs for its rows."""
    return 0.75 + 0.27 * len(rows)


def dots(rows: Sequence[Row], column: Column) -> Draw:
    """One line per row: a dot for our value, a ring for the published one.

    Args:
        rows: From top to bottom.
        column: What is drawn, a share in [0, 1].
    """

    def draw(axes: Axes, palette: Palette) -> None:
        for place, row in enumerate(rows):
            ours, paper = row.ours.get(column.key), row.published.get(column.key)
            if ours is not None and paper is not None:
                axes.plot([100 * paper, 100 * ours], [place, place], color=palette.line, zorder=1)
            if paper is not None:
                axes.plot(
                    100 * paper, place, "o", markersize=6, color="none", mec=palette.second, mew=1.5
                )
            if ours is not None:
                axes.plot(100 * ours, place, "o", markersize=6.5, color=palette.first)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", labelcolor=palette.ink)
        axes.set_xlabel(column.name)

    return draw


RINGS = "Dots are ours, rings the published values."
"""How to read `dots`."""
