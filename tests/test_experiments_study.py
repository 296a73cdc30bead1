"""What every recipe stands on: work is done once, survives a kill, and is never taken for other."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import casm_fast
from casm_fast import cli
from casm_fast.experiments import EXPERIMENTS, SMOKE, reproduce, study
from casm_fast.experiments.findings import Column, Row, Table
from casm_fast.experiments.reproduction import Reproduction
from casm_fast.experiments.study import FULL, QUICK, Scale, Study

# Rows of Table 2 as they are printed in the paper: S, Shr, Thin, OM, LE, F1.
PRINTED = """
(a) E Y F 62.7 53.5 49.0
(b) E Y L 49.0 36.5 61.7
(c) E Y FL 52.7 41.3 57.2
(d) E Y L1000 48.7 36.2 61.6
(e) E Y L100 48.6 36.1 61.4
(f) C Y F 80.8 75.9 42.5
(g) C Y L 49.5 37.0 62.2
(h) C Y L100 49.7 37.3 62.1
(i) E N F - 55.5 -
(j) E N L - 47.2 -
(k) E N L100 - 46.8 -
"""


def smoke(name: str, output: Path, **options: Any) -> Reproduction:
    return reproduce(name, scale=SMOKE, output=output, workers=0, device="cpu", **options)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("finished work was done again")


@pytest.fixture(scope="module")
def table2(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    return smoke("table2", tmp_path_factory.mktemp("reproduce"))


def test_table2_trains_what_the_paper_lists(table2: Reproduction) -> None:
    trained = [
        json.loads(path.read_text())
        for path in (table2.folder.parent / "runs").glob("*/finished.json")
    ]
    settings = {(t["score"], t["shared_encoder"], t["strategy"]) for t in trained if t["epochs"]}
    instead = {"L100": "L1", "L1000": "L2"}  # at this scale
    expected = set()
    for line in PRINTED.split("\n")[1:-1]:
        _, score, shared, thinning, *_ = line.split()
        word = {"E": "entropy", "C": "classification"}[score]
        expected.add((word, shared == "Y", instead.get(thinning, thinning)))
    assert len(expected) == 11
    assert settings == expected
    # One classifier, trained first, serves all eleven.
    assert sum(t["epochs"] == 0 for t in trained) == 1
    assert len({t["weights"] for t in trained if t["epochs"]}) == 1


def test_published_values_are_those_of_the_paper(table2: Reproduction) -> None:
    rows = table2.findings.tables[0].rows
    for row, line in zip(rows, PRINTED.split("\n")[1:-1], strict=True):
        name, _, _, _, om, le, f1 = line.split()
        assert row.name.startswith(name)
        for key, printed in (("om", om), ("le", le), ("f1", f1)):
            value = row.published[key]
            assert (value is None) == (printed == "-")
            assert value is None or f"{100 * value:.1f}" == printed
    assert [row.ours["om"] is None for row in rows] == [False] * 8 + [True] * 3


def test_files_say_the_same(table2: Reproduction) -> None:
    table = table2.findings.tables[0]
    results = json.loads((table2.folder / "results.json").read_text())
    assert [row["ours"] for row in results["tables"][0]["rows"]] == [r.ours for r in table.rows]
    assert results["tables"][0]["source"].startswith("Table 2, Zolna, Geras and Cho")
    with (table2.folder / "table2.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert float(lines[0]["le"]) == table.rows[0].ours["le"]
    assert float(lines[0]["le_published"]) == 0.535
    assert lines[8]["om"] == lines[8]["om_published"] == ""
    assert "mean_saliency_published" not in lines[0]  # the paper has none
    assert (table2.folder / "table2.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_is_whole_and_says_what_it_is_not(table2: Reproduction) -> None:
    html = table2.page.read_text()
    notice = "mbedded synthetic set, 4 classes, not ImageNet: compare directions, not numbers"
    assert notice in html
    assert notice in str(table2)
    assert "<small>53.5</small>" in html
    assert "http" not in html.replace("http://www.w3.org/", "")
    assert html.count("<tr") == 12


def test_finished_work_is_read_not_done(
    table2: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "train", refuse)
    monkeypatch.setattr(study, "extract", refuse)
    again = smoke("table2", table2.folder.parent)
    assert str(again) == str(table2)


def test_a_kill_in_the_middle_changes_nothing(table2: Reproduction, tmp_path: Path) -> None:
    """SIGKILL while the fourth row trains; the next call gives the table of an unbroken one."""
    program = (
        f"import logging, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "logging.basicConfig(format='%(message)s', level=20)\n"
        "from casm_fast.experiments import SMOKE, reproduce\n"
        f"reproduce('table2', scale=SMOKE, output={str(tmp_path)!r}, workers=0, device='cpu')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("training L2-"):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    done = {path.parent.name for path in (tmp_path / "runs").glob("*/finished.json")}
    assert len(done) == 4  # the classifier and the rows a, b, c
    assert str(smoke("table2", tmp_path)) == str(table2)


def test_processes_share_the_trainings_and_rank_0_does_the_rest(tmp_path: Path) -> None:
    """Two processes of torchrun leave what one reads as finished."""
    script = tmp_path / "recipe.py"
    script.write_text(
        "import torch; torch.set_num_threads(1)\n"
        "from casm_fast.experiments import SMOKE, reproduce\n"
        f"reproduce('figure2', scale=SMOKE, output={str(tmp_path)!r}, workers=0, device='cpu')"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = {**os.environ, "PYTHONPATH": str(Path(casm_fast.__file__).parents[1])}
    done = subprocess.run(
        [*launch, str(script)], capture_output=True, text=True, timeout=300, env=here
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure2" / "figure2.png").exists()
    assert len(list((tmp_path / "runs").glob("*/finished.json"))) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train", refuse)
        patch.setattr(study, "extract", refuse)
        smoke("figure2", tmp_path)


def test_other_settings_are_refused(table2: Reproduction) -> None:
    output = table2.folder.parent
    with pytest.raises(ValueError) as refusal:
        smoke("table2", output, data="synthetic:images=40", decoder_lr=0.1)
    assert str(refusal.value) == (
        f"{table2.folder / 'settings.json'}: the run was started with other settings (data was "
        "'synthetic:images=64,size=32,classes=4', now "
        "'synthetic:images=64,size=32,classes=4,images=40'; training_images was 64, now 40; "
        "settings was {}, now {'decoder_lr': 0.1}): expected the same ones to resume it; set them "
        "back, or choose another output folder"
    )


def test_a_cell_is_computed_once(tmp_path: Path) -> None:
    made = Study("trial", tmp_path, scale=SMOKE)
    calls: list[int] = []

    def count(value: int) -> Callable[[], dict[str, Any]]:
        return lambda: {"calls": calls.append(value) or len(calls), "pair": (value, None)}

    assert made.cell("one", count(1), of=[1]) == {"calls": 1, "pair": [1, None]}
    assert made.cell("one", count(1), of=[1]) == {"calls": 1, "pair": [1, None]}
    assert made.cell("one", count(2), of=[2]) == {"calls": 2, "pair": [2, None]}
    assert calls == [1, 2]
    assert not list((tmp_path / "trial" / "cells").glob("*.tmp"))


def test_runs_are_shared_exactly_when_they_are_the_same(tmp_path: Path) -> None:
    first = Study("one", tmp_path, scale=SMOKE).train(strategy="L")
    other = Study("two", tmp_path, scale=SMOKE)
    assert other.train(strategy="L").folder == first.folder
    assert other.train(strategy="L", seed=1).folder != first.folder
    assert other.train(strategy="L", score="classification").folder != first.folder
    assert Study("three", tmp_path, scale=SMOKE, device="cpu", workers=1).train(
        strategy="L"
    ).folder == (first.folder)
    longer = Study("four", tmp_path, scale=SMOKE, settings={"epochs": 2}).train(strategy="L")
    assert longer.folder != first.folder
    assert longer.config.epochs == 2


def test_notices(tmp_path: Path) -> None:
    full = Study("one", tmp_path / "a", data="synthetic:images=8")
    assert full.notice == (
        "embedded synthetic set, 8 classes, not ImageNet: compare directions, not numbers"
    )

    class ImageNet:
        name = "imagenet-val:/data"
        classes = tuple(map(str, range(1000)))
        has_boxes = True

        def __len__(self) -> int:
            return 50_000

    full.embedded = False
    full.validation = ImageNet()  # type: ignore[assignment]
    assert full.is_papers
    assert full.notice == ""
    full.scale = QUICK
    assert full.notice == (
        "imagenet-val:/data, 1,000 images, not the paper's settings: "
        "compare directions, not numbers"
    )
    full.scale = FULL
    full.settings = {"epochs": 2}
    assert not full.is_papers


def test_numbers_of_a_table_for_a_terminal() -> None:
    table = Table(
        "t",
        "Title",
        (Column("le", "LE"), Column("tv", "TV", ",.0f")),
        [
            Row("first", {"le": 0.1234, "tv": 2500.4}, {"le": 0.5}, frozenset({"le"})),
            Row("second", {"tv": 1.0}),
        ],
        source="Table 9",
        mark="unseen",
    )
    assert str(table).splitlines() == [
        "Title",
        "",
        "                    LE     TV",
        "  ------  ------------  -----",
        "  first   12.3* (50.0)  2,500",
        "  second     –              1",
        "  (Table 9 of the paper)",
        "  * unseen",
    ]


def test_every_scale_but_the_full_is_for_the_embedded_set_and_others() -> None:
    names = set(casm_fast.TrainConfig.__dataclass_fields__)
    for scale in (FULL, QUICK, SMOKE):
        assert set(scale.training) | set(scale.elsewhere) <= names
        for old, new in scale.strategies.items():
            assert old in ("L100", "L1000")
            assert new[1:].isdigit()
    assert Scale("full") == FULL


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_lists_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "reproduce")
    assert code == 0
    lines = out.splitlines()
    for name, experiment in EXPERIMENTS.items():
        assert any(line.split()[0] == name and experiment.summary in line for line in lines[:-2])
    assert lines[-1] == "next: casm-fast reproduce NAME --quick"


def test_an_unknown_name_gets_close_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(capsys, "reproduce", "tabel2", "--output", str(tmp_path))
    assert (code, out) == (1, "")
    assert err.strip() == (
        "casm-fast: reproduce: expected the name of an experiment, got 'tabel2': did you mean "
        "table2 or table3 or table1?"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--seeds", "0"), "seeds: expected a whole number of runs of at least 1, got 0"),
        (("--data", "nowhere"), "open_source: there is no nowhere"),
        (("--device", "warp"), "device: expected 'auto', 'cpu' or a GPU of this machine"),
    ],
)
def test_refusals_are_one_sentence(
    words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = run(capsys, "reproduce", "table2", "--output", str(tmp_path), *words)
    assert code == 1
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
