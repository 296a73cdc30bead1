"""The claim under changed conditions: one change at a time, pairs from the same classifier."""

from __future__ import annotations

import json
from typing import Any

import pytest

from casm_fast.experiments import SMOKE, conditions, reproduce
from casm_fast.experiments.reproduction import Reproduction


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    folder = tmp_path_factory.mktemp("conditions")
    return reproduce("conditions", scale=SMOKE, output=folder, workers=0, device="cpu")


def trainings(result: Reproduction) -> dict[str, dict[str, Any]]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in (result.folder.parent / "runs").glob("*/finished.json")
    }


def test_every_run_is_told_and_means_are_means(result: Reproduction) -> None:
    means, runs = result.findings.tables
    names = ["reference", "pre-trained three times as long", "10 layers", "16 classes"]
    assert [row.name for row in means.rows if row.name.endswith(": L")] == [
        f"{name}: L" for name in names
    ]
    assert [row.name for row in runs.rows] == [f"{row.name}, seed 0" for row in means.rows]
    for mean, run in zip(means.rows, runs.rows, strict=True):
        assert mean.ours == pytest.approx(run.ours)
    body = {row.name: row.ours["body"] or 0.0 for row in means.rows}
    ahead = sum(body[f"{name}: L"] > body[f"{name}: F, Baseline"] for name in names)
    assert result.findings.verdict.startswith(f"In {ahead} of 4 pairs with the same classifier L ")
    assert (result.folder / "conditions.png").stat().st_size > 5000


def test_strategies_start_from_the_same_classifier_with_the_same_lambda(
    result: Reproduction,
) -> None:
    runs = trainings(result)
    learned = [run for run in runs.values() if run["epochs"]]
    assert len(learned) == 9  # F and L four times, L100 once
    assert {run["lambda_r"] for run in learned} == {conditions.LAMBDA_R}
    assert {run["pretrain_epochs"] for run in learned} == {0}
    starts: dict[str, set[str]] = {}
    for run in learned:
        starts.setdefault(run["weights"], set()).add(run["strategy"])
    assert sorted(map(sorted, starts.values())) == [*[["F", "L"]] * 3, ["F", "L", "L1"]]
    assert sorted(runs[name]["pretrain_epochs"] for name in starts) == [1, 1, 1, 3]
    assert sorted(runs[name]["backbone"] for name in starts) == [*["compact"] * 3, "compact10"]


def test_a_condition_changes_one_thing() -> None:
    reference = conditions.CONDITIONS[0]
    for condition in conditions.CONDITIONS[1:]:
        changed = [
            name
            for name in ("options", "pretraining", "casm", "training")
            if getattr(condition, name) != getattr(reference, name)
        ]
        assert len(changed) == 1, condition.name
    assert len({condition.name for condition in conditions.CONDITIONS}) == len(
        conditions.CONDITIONS
    )


def test_the_command_goes_on_where_it_stopped(
    result: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished part was done again")

    monkeypatch.setattr("casm_fast.experiments.study.train", refuse)
    monkeypatch.setattr("casm_fast.experiments.claims.measure", refuse)
    again = reproduce(
        "conditions", scale=SMOKE, output=result.folder.parent, workers=0, device="cpu"
    )
    assert again.findings.tables[1].rows == result.findings.tables[1].rows
