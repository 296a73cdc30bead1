"""Section 6.1: total variation, entropy and spread of the masks of CASM and Baseline.

"The masks extracted by CASM exhibit lower total variation (2.5e3 vs. 7.0e3) [...] The entropy of
mask pixel intensities is much smaller for CASM (0.05 vs. 0.21) [...] the standard deviation of the
masked out volume is larger with CASM (0.19 vs. 0.14)".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from casm_fast.evaluation import published
from casm_fast.experiments import columns
from casm_fast.experiments.findings import Chart, Column, Findings, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.experiments.table1 import BASELINE, CASM
from casm_fast.report.charts import Draw, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    Column("tv", "TV", ",.0f"),
    Column("entropy", "entropy, bits", ".2f"),
    Column("std", "std of volume", ".2f"),
    Column("tv_mean", "TV, mean form", ".4f"),
    Column("entropy_full", "full entropy, bits", ".2f"),
    columns.VOLUME,
)
CLAIMED = {"tv": "total variation", "entropy": "entropy", "std": "spread of the volume"}


def run(study: Study) -> Findings:
    """Measure both models' masks over the validation images."""
    rows = []
    for name, strategy in (("CASM", CASM), ("Baseline", BASELINE)):
        study.progress(name)
        scores = study.scores(study.train(strategy=strategy))
        ours = {**scores["saliency"], **columns.volume(scores)}
        rows.append(Row(name, {c.key: ours[c.key] for c in COLUMNS}, published.STATISTICS[name]))
    table = Table(
        "statistics",
        "Statistics of the masks",
        COLUMNS,
        rows,
        source="Section 6.1",
        note="TV: sum of squared differences per image, at the network's resolution. Entropy: mean "
        "of -m log2 m; the full one adds the term of 1 - m. Volume: mean of the mask.",
    )
    measured = {row.name: row.ours for row in rows}
    ratios = {key: (_ratio(measured, key), _ratio(published.STATISTICS, key)) for key in CLAIMED}
    agree = [CLAIMED[key] for key, (new, old) in ratios.items() if (new < 1) == (old < 1)]
    verdict = f"CASM and Baseline stand in the paper's order in {len(agree)} of {len(CLAIMED)}"
    return Findings(
        f"{verdict} statistics" + (f": {', '.join(agree)}." if agree else "."),
        [table],
        [
            Chart(
                "statistics",
                "CASM divided by Baseline",
                "Ratio of the two models' values, which does not depend on the size of the images. "
                "Dots are ours, rings the paper's.",
                _ratios({CLAIMED[key]: pair for key, pair in ratios.items()}),
                (7.0, 1.9),
            )
        ],
        notes=[
            "The paper's TV is that of 224 x 224 pixels; a sum over fewer pixels is smaller.",
            *study.remarks,
        ],
    )


def _ratio(values: Mapping[str, Mapping[str, float | None]], key: str) -> float:
    """CASM's value divided by Baseline's; infinite where that is 0."""
    casm, baseline = values["CASM"][key] or 0.0, values["Baseline"][key] or 0.0
    return casm / baseline if baseline else math.inf


def _ratios(pairs: dict[str, tuple[float, float]]) -> Draw:
    """One line per statistic: a dot for our ratio, a ring for the published one."""

    def draw(axes: Axes, palette: Palette) -> None:
        axes.axvline(1, color=palette.quiet, linewidth=0.9, linestyle=(0, (3, 3)))
        for place, (ours, paper) in enumerate(pairs.values()):
            axes.plot([ours, paper], [place, place], color=palette.line, zorder=1)
            axes.plot(paper, place, "o", markersize=6, color="none", mec=palette.second, mew=1.5)
            axes.plot(ours, place, "o", markersize=6.5, color=palette.first)
        axes.set_yticks(range(len(pairs)), list(pairs))
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", labelcolor=palette.ink)
        axes.set_xlabel("CASM / Baseline")

    return draw


EXPERIMENT = Experiment(
    "statistics",
    "total variation, entropy and spread of the masks, CASM and Baseline",
    run,
    needs_boxes=False,
)
