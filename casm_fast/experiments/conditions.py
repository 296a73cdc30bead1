"""Under which conditions does CASM mark more of the object than the Baseline does?

`claims` compares strategies on one set with one network. Here one thing at a time is changed: how
long the classifier is pre-trained, how deep it is, how large the pictures are, how many classes
there are (the more, the more shape and texture they share), how far the emblem can be trusted, and
how long CASM trains. Every condition compares F and L from the same pre-trained classifiers and
with the same lambda_R, at equal area: the most salient cells of each picture, as many as its
objects fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from casm_fast.experiments import claims
from casm_fast.experiments.findings import Chart, Column, Findings, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.report.charts import Draw, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAMBDA_R = 1.0
"""For all strategies, so that a difference between them is none of lambda_R."""


@dataclass(frozen=True)
class Condition:
    """What is changed, with everything else as in the first condition.

    Attributes:
        name: For people.
        options: Of the embedded set.
        pretraining: Epochs of the classifier, in those of the scale.
        casm: Epochs of CASM, likewise.
        training: Further fields of `TrainConfig`, for classifier and CASM.
        strategies: That are compared.
        quick: Whether it belongs to the quick form.
    """

    name: str
    options: str = ""
    pretraining: int = 1
    casm: int = 1
    training: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    strategies: tuple[str, ...] = ("F", "L")
    quick: bool = False


CONDITIONS = (
    Condition("reference", quick=True),
    Condition(
        "pre-trained three times as long", pretraining=3, strategies=("F", "L", "L100"), quick=True
    ),
    Condition("10 layers", training={"backbone": "compact10"}, quick=True),
    Condition("34 layers", training={"backbone": "compact34"}),
    Condition("16 classes", options="classes=16", quick=True),
    Condition("32 classes", options="classes=32"),
    Condition("pictures of 48x48", options="size=48"),
    Condition("pictures of 64x64", options="size=64"),
    Condition("emblem right in 50 %", options="emblem=50"),
    Condition("emblem of random hue", options="emblem=0"),
    Condition("CASM three times as long", casm=3),
)

COLUMNS = (
    claims.BODY,
    claims.EMBLEM,
    claims.LE,
    Column("accuracy", "own classifier %"),
    Column("mean_saliency", "mean saliency", ".3f"),
)
_BODY = claims.BODY.key


def run(study: Study) -> Findings:
    """Train F and L under every condition, and measure what they cover."""
    claims.with_emblems(study)
    chosen = [c for c in CONDITIONS if study.scale.name == "full" or c.quick]
    count = study.repeats(full=3, quick=1, smoke=1)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    # Seeds outside: a run that is stopped has told something about every condition.
    for seed in range(count):
        for condition in chosen:
            for strategy, value in _compare(study, condition, seed).items():
                found.setdefault((condition.name, strategy), []).append(value)

    means, each = [], []
    for (name, strategy), values in found.items():
        label = f"{name}: {claims.STRATEGIES[strategy]}{study.instead(strategy)}"
        mean = {c.key: float(np.mean([value[c.key] for value in values])) for c in COLUMNS}
        means.append(Row(label, mean, kind="ours" if strategy == "L" else ""))
        each += [
            Row(f"{label}, seed {seed}", {c.key: value[c.key] for c in COLUMNS})
            for seed, value in enumerate(values)
        ]
    pairs = [
        (one[_BODY], other[_BODY])
        for condition in chosen
        for one, other in zip(found[condition.name, "F"], found[condition.name, "L"], strict=True)
    ]
    ahead = sum(other > one for one, other in pairs)
    return Findings(
        f"In {ahead} of {len(pairs)} pairs with the same classifier L covers more of the object "
        f"without its emblem than F; on average {_percent(pairs, 1)} % against "
        f"{_percent(pairs, 0)} %.",
        [
            Table(
                "conditions",
                "What masks as large as the object cover; means of the runs",
                COLUMNS,
                means,
                note="The first three columns are at equal area: the most salient cells of each "
                "picture, as many as its objects fill. Every condition changes the reference in "
                "one thing.",
            ),
            Table("runs", "Every run", COLUMNS, each, note="Nothing is left out."),
        ],
        [
            Chart(
                "conditions",
                "Coverage of the object without its emblem, at equal area",
                "One dot per run; a line joins the two runs from the same classifier.",
                _dots(chosen, found),
                (7.0, 1.2 + 0.36 * len(chosen)),
            )
        ],
        notes=[
            "The reference: 32x32 pictures of 8 classes, emblems that are always right, the "
            "compact network of 18 layers, pre-training and CASM as long as the preset's.",
            f"lambda_R is {LAMBDA_R:g} everywhere.",
            *study.remarks,
        ],
    )


def _compare(study: Study, condition: Condition, seed: int) -> dict[str, dict[str, Any]]:
    """The measures of one seed, by strategy."""
    slug = condition.name.replace(" ", "-").replace("%", "percent")
    own = Study(
        f"{study.name}/{slug}",
        study.output,
        data=",".join(filter(None, (study.data, condition.options))),
        scale=study.scale,
        device=study.device,
        workers=study.workers,
        settings=study.settings,
    )
    preset = own.config(strategy="F")
    assert preset.pretrain_epochs is not None
    assert preset.epochs is not None
    assert preset.schedule_epochs is not None
    classifier = {
        **condition.training,
        "pretrain_epochs": preset.pretrain_epochs * condition.pretraining,
    }
    casm = {
        "lambda_r": LAMBDA_R,
        "epochs": preset.epochs * condition.casm,
        "schedule_epochs": preset.schedule_epochs * condition.casm,
    }
    found = {}
    for strategy in condition.strategies:
        study.progress(f"{condition.name}, strategy {strategy}, seed {seed}")
        trained = claims.train(own, strategy, seed, classifier=classifier, **casm)
        found[strategy] = own.cell(
            f"{strategy}-{seed}",
            partial(claims.measure, own, trained),
            model=trained.folder.name,
        )
    return found


def _percent(pairs: Sequence[tuple[float, float]], place: int) -> str:
    return f"{100 * np.mean([pair[place] for pair in pairs]):.0f}"


def _dots(
    conditions: Sequence[Condition], found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
) -> Draw:
    """One line per condition, one dot per run."""

    def draw(axes: Axes, palette: Palette) -> None:
        colours = {"F": palette.second, "L": palette.first, "L100": palette.quiet}
        named: set[str] = set()
        for place, condition in enumerate(conditions):
            shares = {
                strategy: [100 * value[_BODY] for value in found[condition.name, strategy]]
                for strategy in condition.strategies
            }
            height = place + 0.18 * (np.arange(len(shares["F"])) - (len(shares["F"]) - 1) / 2)
            axes.hlines(height, shares["F"], shares["L"], color=palette.line, zorder=1)
            for strategy, values in shares.items():
                label = None if strategy in named else claims.STRATEGIES[strategy]
                axes.plot(values, height, "o", color=colours[strategy], markersize=5, label=label)
                named.add(strategy)
        axes.set_yticks(range(len(conditions)), [condition.name for condition in conditions])
        axes.set_ylim(len(conditions) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", labelcolor=palette.ink)
        axes.set_xlabel("object less emblem covered, %")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    return draw


EXPERIMENT = Experiment(
    "conditions",
    "when CASM covers more than the Baseline: pre-training, depth, resolution, classes, emblems",
    run,
    embedded="emblem=100,size=32",
)
