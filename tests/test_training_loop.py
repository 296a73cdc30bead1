"""Whole runs on a tiny synthetic set: files, scores, exact resume after every kind of ending."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from casm_fast.data import DecodeError, write_tree
from casm_fast.data.source import ImageSource
from casm_fast.data.synthetic import generate
from casm_fast.models.checkpoint import load
from casm_fast.training import TrainConfig, TrainResult, train
from casm_fast.training import loop as loop_module
from casm_fast.training.progress import RunLog

TINY: dict[str, Any] = {
    "data": "synthetic:images=64,size=32,classes=4",
    "strategy": "L2",
    "history_size": 3,
    "input_size": 32,
    "batch_size": 16,
    "pretrain_epochs": 2,
    "epochs": 3,
    "epoch_fraction": 0.75,
    "log_interval": 2,
    "save_interval": 2,
    "device": "cpu",
    "progress": False,
    "tensorboard": False,
}


def tiny(output: Path, **fields: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "output": output, **fields})


def sources() -> tuple[ImageSource, ImageSource]:
    return (
        generate(64, size=32, classes=4, split="train", workers=1),
        generate(32, size=32, classes=4, split="val", workers=1),
    )


def records(run: TrainResult) -> list[dict[str, Any]]:
    """The log without its timings."""
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    timings = ("seconds", "images_per_second")
    return [{name: row[name] for name in row if name not in timings} for row in rows]


def same_weights(one: TrainResult, two: TrainResult) -> bool:
    first, second = (load(run.folder).state_dict() for run in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run from start to end in one go."""
    return train(tiny(tmp_path_factory.mktemp("runs") / "whole"), sources=sources())


def test_a_run_leaves_what_it_promises(whole: TrainResult) -> None:
    names = {path.name for path in whole.folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "log.jsonl", "log.csv", "state"}
    assert json.loads((whole.folder / "config.json").read_text())["strategy"] == "L2"
    rows = records(whole)
    assert [r["phase"] for r in rows] == ["pretrain"] * 5 + ["casm"] * 9
    assert [(r["split"], r["epoch"], r["step"]) for r in rows[5:]] == [
        ("train", 0, 2),
        ("train", 0, 3),
        ("val", 1, 3),
        ("train", 1, 5),
        ("train", 1, 6),
        ("val", 2, 6),
        ("train", 2, 8),
        ("train", 2, 9),
        ("val", 3, 9),
    ]
    train_keys = {"loss", "entropy", "mean_saliency", "accuracy", "masked_accuracy"}
    assert train_keys <= rows[5].keys()
    assert train_keys | {"localisation_error", "std_saliency"} <= rows[-1].keys()
    with (whole.folder / "log.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert [row["step"] for row in table] == [str(row["step"]) for row in rows]
    assert float(table[-1]["mean_saliency"]) == rows[-1]["mean_saliency"]
    assert whole.scores["mean_saliency"] == rows[-1]["mean_saliency"]
    assert whole.scores["pretrained_accuracy"] == rows[4]["accuracy"]
    # The history: at most three of every second step of nine, and only those on the disk.
    snapshots = sorted((whole.folder / "state").glob("history-*.pt"))
    assert len(snapshots) == 3
    assert all(int(path.stem.removeprefix("history-")) % 2 == 0 for path in snapshots)


def test_validation_scores_are_those_of_the_saved_model(whole: TrainResult) -> None:
    """The scores again, from the checkpoint, image by image."""
    from casm_fast.data.transforms import normalize

    model, (_, val) = load(whole.folder), sources()
    found, hits, areas = 0, 0, []
    for index in range(len(val)):
        images = normalize(torch.from_numpy(np.array(val.image(index)))[None])
        with torch.no_grad():
            saliency, logits = model(images)
        hits += int(logits.argmax()) == val.label(index)
        areas.append(float(saliency.mean()))
        map_ = saliency[0, 0].double().numpy()
        kept = saliency[0, 0].numpy() >= np.float32(map_.mean())
        scale = 32 // kept.shape[0]
        x0, y0, x1, y1 = (scale * side for side in largest_component_box(kept))
        overlaps = []
        for bx0, by0, bx1, by1 in val.boxes(index).tolist():
            shared = max(0, min(x1, bx1) - max(x0, bx0)) * max(0, min(y1, by1) - max(y0, by0))
            union = (x1 - x0) * (y1 - y0) + (bx1 - bx0) * (by1 - by0) - shared
            overlaps.append(shared / union)
        found += max(overlaps) > 0.5
    assert whole.scores["accuracy"] == pytest.approx(hits / len(val))
    assert whole.scores["mean_saliency"] == pytest.approx(np.mean(areas), abs=1e-5)
    assert whole.scores["localisation_error"] == pytest.approx(1 - found / len(val))


def largest_component_box(kept: np.ndarray) -> tuple[int, int, int, int]:
    from scipy import ndimage

    labels, _ = ndimage.label(kept)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    rows, columns = np.where(labels == counts.argmax())
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_the_same_seed_gives_the_same_run_and_leaves_the_callers_generator_alone(
    whole: TrainResult, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    again = train(tiny(tmp_path / "again", workers=2), sources=sources())
    assert torch.equal(before, torch.get_rng_state())
    assert same_weights(whole, again)
    assert records(whole) == records(again)
    other = train(tiny(tmp_path / "other", seed=1, pretrain_epochs=1, epochs=0), sources=sources())
    assert records(other)[0]["loss"] != records(whole)[0]["loss"]


@pytest.mark.parametrize(
    ("number", "error", "after"),
    [(signal.SIGINT, KeyboardInterrupt, 3), (signal.SIGTERM, SystemExit, 11)],
)
def test_a_stop_request_saves_and_a_resume_ends_with_equal_bits(
    number: signal.Signals,
    error: type[BaseException],
    after: int,
    whole: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Signals in the middle of pre-training, and in the middle of a CASM epoch."""
    config, steps = tiny(tmp_path / "run", save_interval=1000), 0
    advance = RunLog.advance

    def counted(self: RunLog) -> None:
        nonlocal steps
        steps += 1
        if steps == after:
            signal.raise_signal(number)
        advance(self)

    monkeypatch.setattr(RunLog, "advance", counted)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error) as caught:
        train(config, sources=sources())
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    if error is SystemExit:
        assert caught.value.args == (143,)
    else:
        assert str(caught.value) == (
            "stopped after step 3 of the pretrain phase; to go on: "
            f"resume=True, output='{tmp_path}/run'"
        )
    assert steps == after
    resumed = train(config, resume=True, sources=sources())
    assert steps == 8 + 9  # no step was done twice
    assert same_weights(whole, resumed)
    assert records(whole) == records(resumed)
    assert whole.scores == resumed.scores


def doomed(output: str, renames: int | None, threads: int) -> None:
    """A run in its own process that SIGKILLs itself at a rename of a state file."""
    torch.set_num_threads(threads)  # another number of threads sums in another order
    replace = Path.replace
    count = 0

    def deadly(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == renames and renames % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        moved = replace(self, target)
        if count == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        return moved

    Path.replace = deadly  # type: ignore[method-assign]
    train(tiny(Path(output), resume=True), sources=sources())


def test_a_run_that_is_killed_again_and_again_ends_with_equal_bits(
    whole: TrainResult, tmp_path: Path
) -> None:
    """SIGKILL before a rename, after one, and at random times; then the run is left to finish."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["casm_fast.training"])
    moments = random.Random(7)
    output, killed = tmp_path / "run", 0
    for renames in (4, 7, None, 9):
        process = context.Process(
            target=doomed, args=(str(output), renames, torch.get_num_threads())
        )
        process.start()
        if renames is None:
            size = output / "log.jsonl"
            seen, until = size.stat().st_size, time.monotonic() + 30
            while process.is_alive() and size.stat().st_size == seen and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(0.2 * moments.random())
            process.kill()
        process.join(60)
        assert process.exitcode in (-signal.SIGKILL, 0)
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3  # the one at a random time may come too late
    finished = train(tiny(output, resume=True), sources=sources())
    assert same_weights(whole, finished)
    assert records(whole) == records(finished)
    assert not list((output / "state").glob("*.tmp"))


@pytest.mark.parametrize("fields", [{}, {"decoder_ema": 0.8, "shared_encoder": False}])
def test_a_finished_run_resumes_to_itself_and_can_be_prolonged(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    run = train(tiny(tmp_path / "a", epochs=1, **fields), sources=sources())
    written = run.checkpoint.stat().st_mtime_ns
    again = train(tiny(tmp_path / "a", epochs=1, resume=True, **fields), sources=sources())
    assert again == run
    assert run.checkpoint.stat().st_mtime_ns == written
    longer = train(tiny(tmp_path / "a", epochs=2, resume=True, **fields), sources=sources())
    straight = train(tiny(tmp_path / "b", epochs=2, **fields), sources=sources())
    assert same_weights(longer, straight)
    assert records(longer) == records(straight)


def test_another_configuration_is_not_resumed(whole: TrainResult) -> None:
    expected = (
        f"{whole.folder}/state/state.pt: the run was started with other settings (score was "
        "'entropy', now 'classification'; classifier_lr was 0.01, now 0.5): expected the same ones "
        "to resume it; set them back, or choose another output folder"
    )
    config = tiny(whole.folder, resume=True, score="classification", classifier_lr=0.5)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        train(config, sources=sources())
    data = (generate(48, size=32, classes=4), None)
    with pytest.raises(ValueError, match=r"\(images was 64, now 48\)"):
        train(tiny(whole.folder, resume=True), sources=data)


def test_a_folder_with_a_run_is_not_overwritten(whole: TrainResult) -> None:
    expected = (
        f"output: expected a new folder, got {whole.folder}, which holds a run; "
        "pass resume=True to continue that run, or choose another folder"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        train(tiny(whole.folder), sources=sources())


def test_a_damaged_state_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.pt").write_bytes(b"not a state")
    with pytest.raises(
        ValueError,
        match=r"state\.pt: expected a state written by a training run, got an unreadable",
    ):
        train(tiny(tmp_path, resume=True), sources=sources())


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_last_state(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", classifier_lr=1e6, strategy="L", epochs=6, epoch_fraction=1.0)
    with pytest.raises(FloatingPointError, match="not a finite number from step"):
        train(config, sources=sources())
    state = torch.load(tmp_path / "run" / "state" / "state.pt", weights_only=True)
    assert all(
        bool(torch.isfinite(tensor).all())
        for tensor in state["engine"]["model"].values()
        if tensor.is_floating_point()
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"strategy": "F", "pretrain_epochs": 0, "lambda_r": "auto"},
        {"strategy": "FL", "shared_encoder": False, "infill": "noise"},
        {"strategy": "L", "score": "classification", "classifier_update": "alternating"},
        {"strategy": "L2", "amp": "fp16", "accumulate": 3},
    ],
)
def test_other_configurations_run(fields: dict[str, Any], tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", epochs=1, **fields), sources=sources())
    assert 0 < run.scores["mean_saliency"] < 1
    model = load(run.checkpoint)
    assert model.shared == fields.get("shared_encoder", True)
    assert model.extra["training"]["strategy"] == fields["strategy"]


def test_the_masked_in_objective_trains_a_decoder_on_the_coarsest_taps(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "both", objective="masked_in_out", epochs=1), sources=sources())
    model = load(run.folder)
    assert model.decoder.tap_indices == tuple(range(len(model.decoder.tap_channels)))[-2:]
    steps = [row for row in records(run) if (row["phase"], row["split"]) == ("casm", "train")]
    assert all(0 <= row["masked_in_accuracy"] <= 1 for row in steps)


def test_images_that_cannot_be_read_are_skipped_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_tree(tmp_path / "tree", *sources(), sides=(32, 40))
    broken = sorted((root / "train").rglob("*.JPEG"))[5]
    broken.write_bytes(b"\xff\xd8 no more of it")
    # A whole epoch sees every image once: three epochs, the third of which is stopped and resumed.
    fields = {"data": f"imagenet:{root}", "epoch_fraction": 1.0, "epochs": 1, "log_interval": 4}
    fields |= {"backbone": "compact", "weights": "none", "decoder_width": 4, "decoder_lr": 1e-3}
    whole = train(tiny(tmp_path / "whole", **fields))
    named = [row["skipped_images"] for row in records(whole) if "skipped" in row]
    assert len(named) == 3
    assert all(len(messages) == 1 and broken.name in messages[0] for messages in named)
    assert "3 times an image could not be read and was skipped; log.jsonl names each" in caplog.text

    steps, advance = 0, RunLog.advance

    def counted(self: RunLog) -> None:
        nonlocal steps
        steps += 1
        if steps in (9, 10, 11):  # once after each but the last step of the CASM epoch
            signal.raise_signal(signal.SIGINT)
        advance(self)

    monkeypatch.setattr(RunLog, "advance", counted)
    config = tiny(tmp_path / "run", **fields)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(config, resume=True)
    assert records(train(config, resume=True)) == records(whole)

    with pytest.raises(DecodeError, match=broken.name):
        train(tiny(tmp_path / "strict", strict=True, **fields))


def test_without_validation_there_are_no_scores(tmp_path: Path) -> None:
    run = train(tiny(tmp_path / "run", epochs=1, pretrain_epochs=0), sources=(sources()[0], None))
    assert run.scores == {}
    assert {row["split"] for row in records(run)} == {"train"}


def test_defaults_name_a_folder_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = loop_module.prepare_folder(TrainConfig(data="folder:/a/b c"))
    second = loop_module.prepare_folder(TrainConfig(data="folder:/a/b c"))
    assert re.fullmatch(r"runs/\d{8}-\d{6}-folder--a-b-c-L100", str(first))
    assert first != second


def test_tensorboard_events_are_written_when_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = tiny(tmp_path / "run", epochs=0, pretrain_epochs=1, tensorboard=True)
    run = train(config, sources=sources())
    assert list((run.folder / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"device": "tpu9"},
            "device: expected 'auto', 'cpu' or a GPU of this machine, got 'tpu9'",
        ),
        ({"batch_size": 65}, "expected at least one batch of 65 images per epoch"),
    ],
)
def test_runs_refuse(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        train(tiny(tmp_path / "run", **fields), sources=sources())


def test_training_needs_classes(tmp_path: Path) -> None:
    class Unlabelled:
        name, classes, has_boxes = "folder:/pictures", (), False

        def __len__(self) -> int:
            return 3

    expected = (
        "data: expected at least 2 classes to train on, got 0 in folder:/pictures; "
        "a training set has one folder of images per class"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        train(tiny(tmp_path / "run"), sources=(Unlabelled(), None))  # type: ignore[arg-type]
