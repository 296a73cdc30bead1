"""The command line as a person meets it: help, exit codes, refusals, and the demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from casm_fast import cli, doctor
from casm_fast.data import predictions
from casm_fast.data.synthetic import generate, write_tree
from casm_fast.models import checkpoint
from casm_fast.models.saliency import build_model


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tree of pictures and an untrained model."""
    folder = tmp_path_factory.mktemp("cli")
    val = generate(16, size=32, classes=3, seed=4)
    write_tree(folder / "tree", None, val, layout="flat")
    model = build_model("compact", classes=val.classes, input_size=32)
    checkpoint.save(model, folder / "model.safetensors")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Example: casm-fast {verb}" in out
    assert "--verbose" in out


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        code, out, _ = run(capsys, *words)
        assert code == 0
        for verb in cli.VERBS:
            assert f"• {verb}" in out
        assert "Start with: casm-fast demo" in out


def test_options_are_the_fields_of_the_python_api(capsys: pytest.CaptureFixture[str]) -> None:
    _, train, _ = run(capsys, "train", "--help")
    _, extract, _ = run(capsys, "extract", "--help")
    for name in cli.TrainConfig.__dataclass_fields__:
        assert name.replace("_", "-") in train
    for name in cli.ExtractConfig.__dataclass_fields__:
        assert name.replace("_", "-") in extract


@pytest.mark.parametrize(
    "words",
    [["bogus"], ["extract"], ["train", "--bogus", "1"], ["train", "--epochs", "many"]],
    ids=" ".join,
)
def test_words_that_are_not_understood(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "Traceback" not in err


def test_extract_evaluate_report(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes, page = workplace / "boxes.parquet", workplace / "page.html"
    source = f"imagenet-val:{workplace / 'tree'}"
    code, out, _ = run(
        capsys, "extract", workplace / "model.safetensors", source, "-o", boxes,
        "--rule", "value", "--alpha", "0.5", "--batch-size", "5",
    )  # fmt: skip
    assert code == 0
    assert "16 images" in out
    assert f"next: casm-fast evaluate {boxes}" in out
    convention = predictions.read(boxes)[1].convention
    assert (convention.rule, convention.alpha, convention.size) == ("value", 0.5, 32)

    code, out, _ = run(capsys, "evaluate", boxes, "--json", workplace / "scores.json")
    assert code == 0
    assert "centred box" in out
    assert "m >= min + 0.5 * (max - min)" in out
    assert json.loads((workplace / "scores.json").read_text())["counts"]["images"] == 16

    code, out, _ = run(capsys, "report", boxes, "--output", page, "--columns", "4")
    assert (code, out) == (0, f"report: {page}\n")
    assert page.read_text().startswith("<!doctype html>")


def test_refusals_are_one_sentence_without_traceback(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = tmp_path / "none"
    for words, sentence in (
        (
            ("evaluate", nothing),
            f"expected a Parquet file written by casm_fast.extract, got {nothing}: no such file",
        ),
        (("extract", workplace / "model.safetensors", nothing), f"there is no {nothing}"),
        (("extract", nothing, f"imagenet-val:{workplace / 'tree'}"), str(nothing)),
        (("train", "--data", f"folder:{nothing}"), str(nothing)),
    ):
        code, out, err = run(capsys, *words)
        assert (code, out) == (1, "")
        assert err.startswith("casm-fast: ")
        assert sentence in err
        assert len(err.strip().splitlines()) == 1
    code, _, err = run(capsys, "evaluate", nothing, "--verbose")
    assert code == 1
    assert "Traceback" in err


def test_what_goes_wrong_becomes_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    for error, code, sentence in (
        (KeyboardInterrupt("The state is saved"), 130, "interrupted. The state is saved"),
        (SystemExit(143), 143, ""),
        (OSError(28, "No space left on device", "x"), 1, "No space left on device: x"),
        (FloatingPointError("step 7: the loss is nan"), 1, "step 7: the loss is nan"),
        (torch.OutOfMemoryError("…"), 1, "the GPU has too little memory: lower --batch-size"),
        (KeyError("x"), 70, "KeyError: 'x' (a defect of casm_fast; --verbose shows where)"),
    ):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(cli, "evaluate", fail)
        found, _, err = run(capsys, "evaluate", "x")
        assert found == code
        assert err == (f"casm-fast: {sentence}\n" if sentence else "")


def test_doctor_finds_this_machine_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0, out
    for part in ("casm_fast", "torch", "cpu kernels", "self-test", "opencv"):
        assert part in out
    assert out.endswith("everything that is needed works\n")


def test_doctor_reports_what_is_broken_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[doctor.Finding]:
        raise RuntimeError("no such symbol")

    monkeypatch.setattr(doctor, "_kernels", broken)
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy", "no-such-package"))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_module": ("nothing", "no purpose", "x[y]")})
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "RuntimeError: no such symbol" in out
    assert "-> pip install no-such-package" in out
    assert "absent: no no purpose" in out
    assert "-> pip install 'x[y]'" in out
    assert out.endswith("2 to repair\n")


def test_without_tyro_there_is_one_sentence_and_a_doctor() -> None:
    script = (
        "import sys; sys.modules['tyro'] = None\n"
        "from casm_fast.cli import main\n"
        "print('codes', main(['train']), main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.endswith("codes 1 0\n")
    assert done.stderr.splitlines()[0] == (
        "casm-fast: expected tyro, which reads the command line, but it is not installed: "
        "pip install tyro (in Python, casm_fast.train, extract and evaluate work without it)"
    )
    assert "-> pip install 'tyro'" in done.stdout


def test_a_reader_that_goes_away_is_no_error(workplace: Path) -> None:
    command = [sys.executable, "-m", "casm_fast.cli", "train", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=120) == 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of a few steps: everything it does, too little training to be good."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "QUICK_IMAGES", 96)
        patch.setattr(cli, "QUICK_PRETRAIN_EPOCHS", 1)
        patch.setattr(cli, "QUICK_EPOCHS", 2)
        patch.setattr(cli, "DEMO_IMAGES", 48)
        assert cli.main(["demo", "--quick", "--output", str(folder), "--device", "cpu"]) == 0
    return folder


def test_the_demo_leaves_everything_behind(demo: Path) -> None:
    assert {entry.name for entry in demo.iterdir()} == {
        "boxes.parquet", "report.html", "run-quick", "scores.json", "synthetic-jpegs",
    }  # fmt: skip
    table, description = predictions.read(demo / "boxes.parquet")
    assert len(table) == 48
    assert table["error"].null_count == 48
    assert description.source.startswith("imagenet-val:")
    scores = json.loads((demo / "scores.json").read_text())
    assert 0 <= scores["localisation"]["le"] <= 1
    assert scores["top1"] is not None
    page = (demo / "report.html").read_text()
    assert "Against boxes that look at nothing" in page
    assert "Entropy on masked-out images" in page


def test_a_second_demo_goes_on_where_the_first_stopped(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (demo / "run-quick" / "model.safetensors").read_bytes()
    os.unlink(demo / "report.html")
    monkeypatch.setattr(cli, "QUICK_IMAGES", 96)
    monkeypatch.setattr(cli, "QUICK_PRETRAIN_EPOCHS", 1)
    monkeypatch.setattr(cli, "QUICK_EPOCHS", 2)
    code, out, _ = run(capsys, "demo", "--quick", "--output", demo, "--device", "cpu")
    assert code == 0
    assert "random box" in out
    assert f"report: {demo / 'report.html'}" in out
    assert (demo / "report.html").exists()
    assert (demo / "run-quick" / "model.safetensors").read_bytes() == weights
