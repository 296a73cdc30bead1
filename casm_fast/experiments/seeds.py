"""Section 6.3: how much the localisation error of CASM changes from run to run.

"For ten separate training runs with random initialization the worst scores 36.3 and the best 36.0
with the average of 36.1." The classifier starts from the same weights in every run; the decoder's
initial weights, the order of the images, their augmentation and the draws from the history differ.
"""

from __future__ import annotations

from casm_fast.evaluation import published
from casm_fast.experiments import columns, drawing
from casm_fast.experiments.findings import Chart, Findings, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.experiments.table1 import CASM


def run(study: Study) -> Findings:
    """Train CASM with several seeds."""
    count = study.repeats(full=10, quick=3, smoke=2)
    runs = []
    for seed in range(count):
        study.progress(f"run {seed + 1} of {count}")
        trained = study.train(strategy=CASM, seed=seed)
        runs.append(Row(f"seed {seed}", columns.localisation(study.scores(trained))))
    summary = [
        Row(
            name,
            {key: reduce([row.ours[key] or 0.0 for row in runs]) for key in runs[0].ours},
            {"le": published.SEEDS[name]},
            kind="ours",
        )
        for name, reduce in (("min", min), ("mean", _mean), ("max", max))
    ]
    table = Table(
        "seeds",
        f"{count} runs of CASM",
        (columns.LE, columns.OM, columns.F1, columns.VOLUME),
        [*runs, *summary],
        source="Section 6.3, ten runs",
        note="Least, mean and largest are taken for each column by itself.",
    )
    low, middle, high = (100 * (row.ours["le"] or 0) for row in summary)
    return Findings(
        f"{count} runs of CASM miss the object in {low:.1f} to {high:.1f} % of the images, "
        f"{middle:.1f} % on average.",
        [table],
        [
            Chart(
                "seeds",
                "Localisation error by run",
                drawing.RINGS,
                drawing.dots([*runs, *summary], columns.LE),
                (7.0, drawing.height([*runs, *summary])),
            )
        ],
        notes=[
            "All runs start from the same pre-trained classifier, as the paper's do.",
            *study.remarks,
        ],
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


EXPERIMENT = Experiment("seeds", "localisation error of several runs of CASM: min, mean, max", run)
