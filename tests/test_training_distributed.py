"""Several processes against one: the same losses, weights, histories and scores."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_training_loop as runs
import torch
from numpy.typing import NDArray
from test_training_engine import CLASSES, batches, tiny_model
from torch import Tensor, nn

from casm_fast.data.decoding import DecodeError
from casm_fast.data.synthetic import generate
from casm_fast.models.checkpoint import load
from casm_fast.models.saliency import build_model
from casm_fast.training import TrainConfig, TrainResult, distributed, train
from casm_fast.training.distributed import World, alone, joined, synchronize_batchnorm
from casm_fast.training.engine import Engine
from casm_fast.training.progress import RunLog
from casm_fast.training.validation import validate

CPU = torch.device("cpu")


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _process(rank: int, size: int, port: int, folder: Path, work: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(environment(rank, size, port))
    torch.save(work(*arguments), folder / f"{rank}.pt")


def processes(
    size: int, folder: Path, work: Callable[..., Any], *arguments: Any
) -> tuple[list[int | None], list[Any]]:
    """Exit codes of `size` processes, and what `work(*arguments)` returns where it returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["casm_fast.training"])
    port = free_port()
    started = [
        context.Process(target=_process, args=(rank, size, port, folder, work, arguments))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    codes = [process.exitcode for process in started]
    return codes, [
        torch.load(folder / f"{rank}.pt") for rank, code in enumerate(codes) if code == 0
    ]


def _joined(work: Callable[..., Any], arguments: Any) -> Any:
    with joined("cpu") as world:
        return work(world, *arguments)


def on_ranks(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(world, *arguments)` returns on each of `size` ranks."""
    codes, results = processes(size, folder, _joined, work, arguments)
    assert codes == [0] * size
    return results


def freeze_statistics(model: nn.Module) -> None:
    """Batch normalisation by running statistics that never move."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]


CASES = [
    {"strategy": "F"},
    {"strategy": "L", "score": "classification", "shared_encoder": False},
    {"strategy": "FL", "classifier_update": "alternating"},
    {"strategy": "L1", "lambda_r": "auto"},
    {"strategy": "L2", "shared_encoder": False, "classifier_update": "alternating"},
    {"strategy": "L2", "infill": "noise", "clip_gradient": 0.05},
    {"strategy": "L1", "objective": "masked_in_out"},
]


def train_case(world: World, fields: dict[str, Any], normalisation: str) -> dict[str, Any]:
    """Two steps of pre-training and five of CASM with this process's part of each batch."""
    settings = TrainConfig(
        **{
            "classifier_lr": 0.1,
            "decoder_lr": 0.01,
            "lambda_r": 1.5,
            "history_size": 2,
            "masked_statistics": True,
            "batch_size": 24,
            "seed": 4,
            **fields,
        }
    )
    torch.manual_seed(0)
    model = tiny_model(settings.shared_encoder)
    if normalisation == "frozen":
        freeze_statistics(model)
    else:
        synchronize_batchnorm(model, world)
    engine = Engine(model, settings, classes=CLASSES, device=CPU, world=world)
    torch.manual_seed(0)
    means = []
    for index, (images, labels) in enumerate(batches(7)):
        if index == 2:
            engine.begin("casm")
        start, stop = world.part(len(images))
        part = (images[start:stop], labels[start:stop])
        if index in (1, 4):  # an image that could not be read
            part = tuple(t[:-1] if world.rank == world.size - 1 else t for t in part)
        engine.step(*part, index - 2 * (index > 1), 7, 0)
        means.append(engine.statistics())
    return {
        "model": model.state_dict(),
        "means": means,
        "steps": engine.history.steps,
        "snapshots": engine.history.snapshots,
        "lambda_r": engine.lambda_r,
        "digest": engine.digest(),
    }


def train_cases(world: World, normalisation: str) -> list[dict[str, Any]]:
    return [train_case(world, fields, normalisation) for fields in CASES]


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize(("size", "normalisation"), [(2, "frozen"), (3, "synchronised")])
def test_processes_do_what_one_does_with_the_whole_batch(
    size: int, normalisation: str, tmp_path: Path
) -> None:
    expected = train_cases(alone(CPU), normalisation)
    found = on_ranks(size, tmp_path, train_cases, normalisation)
    for fields, one, *ranks in zip(CASES, expected, *found, strict=True):
        # lambda_R answers a float32 mean: measured 7e-10, otherwise 2e-14; 1e-6 is required.
        tolerance = 1e-8 if "lambda_r" in fields else 1e-12
        for rank in ranks:
            assert rank["steps"] == one["steps"]
            assert difference(rank["model"], one["model"]) < tolerance
            assert float((rank["lambda_r"] - one["lambda_r"]).abs()) < 1e-6
            for found_means, means in zip(rank["means"], one["means"], strict=True):
                assert found_means == pytest.approx(means, abs=1e-6)  # measured 2e-7: float32 sums
            # The ranks are equal in every bit.
            assert rank["digest"] == ranks[0]["digest"]
            assert difference(rank["model"], ranks[0]["model"]) == 0
            for found_one, expected_one, leading in zip(
                rank["snapshots"], one["snapshots"], ranks[0]["snapshots"], strict=True
            ):
                assert difference(found_one, leading) == 0
                assert difference(found_one, expected_one) < 1e-12


class Broken:
    """A set of which some images cannot be read."""

    def __init__(self, images: int, broken: set[int]) -> None:
        self.source = generate(images, size=32, classes=4, split="val", workers=1)
        self.broken = broken
        self.name, self.classes, self.has_boxes = f"broken-{images}", self.source.classes, True

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        if name in ("image_id", "label", "boxes"):  # not `images`: this is no set in memory
            return getattr(self.source, name)
        raise AttributeError(name)

    def image(self, index: int) -> NDArray[np.uint8]:
        if index in self.broken:
            raise DecodeError(f"image {index} is broken")
        return self.source.image(index)


def validation_cases(world: World) -> list[dict[str, float]]:
    scores = []
    for images, broken, fields in (
        (31, set(), {}),
        (31, {0, 17}, {"infill": "noise"}),
        (2, {0}, {"batch_size": 6}),  # more ranks than images
    ):
        torch.manual_seed(0)
        model = build_model("compact", classes=4, width=16, input_size=32)
        settings = TrainConfig(**{"input_size": 32, "batch_size": 12, **fields})
        engine = Engine(model, settings, classes=4, device=CPU, world=world)
        engine.begin("casm")
        scores.append(validate(engine, Broken(images, broken)))
    return scores


@pytest.mark.parametrize("size", [2, 3])
def test_validation_is_sharded_exactly(size: int, tmp_path: Path) -> None:
    expected = validation_cases(alone(CPU))
    ranks = on_ranks(size, tmp_path, validation_cases)
    assert len({json.dumps(scores) for scores in ranks}) == 1
    assert [scores.keys() for scores in ranks[0]] == [scores.keys() for scores in expected]
    assert "localisation_error" in expected[0]
    for found, one in zip(ranks[0], expected, strict=True):
        assert found == pytest.approx(one, abs=1e-6)  # measured 4e-7: batches of another size
        for name in ("accuracy", "masked_accuracy", "localisation_error"):
            assert found[name] == one[name]


def disagreements(world: World) -> list[str]:
    """What the ranks say when one of them has met something that the others have not."""
    said = []
    engine = Engine(
        tiny_model(), TrainConfig(strategy="L"), classes=CLASSES, device=CPU, world=world
    )
    engine.begin("casm")
    for index, (images, labels) in enumerate(batches(3)):
        if index == 1 and world.rank == 1:
            images[0, 0, 0, 0] = torch.nan
        engine.step(images, labels, index, 3, 0)
    with pytest.raises(FloatingPointError) as not_finite:
        engine.check_finite()
    said.append(str(not_finite.value))
    with pytest.raises(ValueError, match="expected") as unequal:
        world.check_equal("the same hat", str(min(world.rank, 1)))
    said.append(str(unequal.value))
    return said


def test_all_ranks_say_what_one_has_met(tmp_path: Path) -> None:
    ranks = on_ranks(3, tmp_path, disagreements)
    assert ranks[0] == ranks[1] == ranks[2]
    assert ranks[0][0].startswith("the loss is not a finite number from step 1 of the casm phase")
    assert ranks[0][1] == (
        "3 processes: expected all of them to have the same hat; got another one on rank 1, 2 "
        "than on rank 0"
    )


def fail_on_one(rank: int) -> None:
    with joined("cpu") as world:
        if world.rank == rank:
            raise ValueError("told once")
        world.wait()


def lose_one() -> None:
    with joined("cpu") as world:
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.wait()


def test_an_error_on_one_rank_ends_all_and_is_told_once(
    tmp_path: Path,
) -> None:
    codes, _ = processes(3, tmp_path, fail_on_one, 2)
    assert codes == [1, 1, 1]
    told = [(tmp_path / f"{rank}.err").read_text() for rank in range(3)]
    assert [text.count("Traceback") for text in told] == [0, 0, 1]
    assert told[2].count("ValueError: told once") == 1
    codes, _ = processes(2, tmp_path, lose_one)
    assert codes == [1, -signal.SIGKILL]
    last = (tmp_path / "0.err").read_text().splitlines()[-1]
    assert re.fullmatch(
        r"ConnectionError: rank 0 of 2 lost the connection to another process \(.*[Cc]onnection .*"
        r"\); if that one has ended, start all again with resume=True to go on from the last saved "
        r"state",
        last,
    )


# A fixed classifier: training one in float32 multiplies any rounding difference, such as that
# of another memory format, by 1e4 in each of its first steps.
FIXED: dict[str, Any] = {
    "strategy": "F",
    "pretrain_epochs": 0,
    "epochs": 4,
    "decoder_lr": 1e-3,
    "sync_batchnorm": True,
}


def run(
    output: Path, fields: dict[str, Any], terminated: int | None = None, sources: Any = None
) -> TrainResult:
    """A whole run; `terminated`: rank 1 gets SIGTERM in that step, counted from 1."""
    advance, steps = RunLog.advance, 0

    def counted(self: RunLog) -> None:
        nonlocal steps
        steps += 1
        if steps == terminated and os.environ.get("RANK") == "1":
            signal.raise_signal(signal.SIGTERM)
        advance(self)

    RunLog.advance = counted  # type: ignore[method-assign]
    try:
        return train(runs.tiny(output, **fields), sources=sources or runs.sources())
    finally:
        RunLog.advance = advance  # type: ignore[method-assign]


def run_folder(*arguments: Any) -> str:
    return str(run(*arguments).folder)


def test_a_stop_on_one_rank_stops_all_and_another_number_of_processes_goes_on(
    tmp_path: Path,
) -> None:
    sources = (Broken(64, {3, 30, 31}), Broken(31, {4}))
    one = run(tmp_path / "one", FIXED, None, sources)
    fields = {**FIXED, "save_interval": 1000}
    codes, _ = processes(2, tmp_path, run_folder, tmp_path / "two", fields, 4, sources)
    assert codes == [143, 143]
    saved = torch.load(tmp_path / "two" / "state" / "state.pt", weights_only=True)
    where = {name: saved["position"][name] for name in ("phase", "epoch", "batch", "step")}
    assert where == {"phase": "casm", "epoch": 1, "batch": 2, "step": 5}
    again = run(tmp_path / "two", {**fields, "resume": True}, None, sources)
    # Measured 4e-5 (Adam makes much of small gradients) and 3e-7.
    assert difference(load(one.folder).state_dict(), load(again.folder).state_dict()) < 2e-4
    unread = []
    for expected, found in zip(runs.records(one), runs.records(again), strict=True):
        unread += found.get("skipped_images", [])
        assert found.pop("skipped_images", []) == expected.pop("skipped_images", [])
        assert found == pytest.approx(expected, abs=1e-6)
    # Each of the four epochs shows 48 of the 64 images, of which 3 are broken.
    assert 3 <= len(unread) <= 12
    assert (tmp_path / "0.err").read_text().count("image") > 0
    assert (tmp_path / "1.err").read_text().count("image") == 0


WORKER = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import test_training_loop as runs
import torch
from casm_fast.training import train
from casm_fast.training.progress import RunLog

torch.set_num_threads(1)
advance, steps = RunLog.advance, 0

def counted(self):
    global steps
    steps += 1
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], steps) == ("1", "0", 12):
        os.kill(os.getpid(), signal.SIGKILL)
    advance(self)

RunLog.advance = counted
train(runs.tiny(Path(sys.argv[2]), resume=True), sources=runs.sources())
Path(sys.argv[2], f"steps-{os.environ['RANK']}").write_text(str(steps))
"""


def test_torchrun_restarts_killed_processes_and_they_end_with_equal_bits(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    here = Path(__file__).parent
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--max-restarts=1", "--monitor-interval=0.1"),
            *(worker, here, tmp_path / "killed"),
        ],
        check=True,
        cwd=here.parent,
        env={**os.environ, "PYTHONPATH": str(here.parent)},
        capture_output=True,
        timeout=300,
    )
    # 8 steps of pre-training and 4 of CASM, then from the state after 2 + 3 on: 17 in all.
    for rank in range(2):
        assert (tmp_path / "killed" / f"steps-{rank}").read_text() == str(17 - 11)
    codes, _ = processes(2, tmp_path, run_folder, tmp_path / "whole", {})
    assert codes == [0, 0]
    killed, whole = (
        TrainResult(folder, folder / "model.safetensors", folder / "log.jsonl", {})
        for folder in (tmp_path / "killed", tmp_path / "whole")
    )
    assert runs.same_weights(killed, whole)
    assert runs.records(killed) == runs.records(whole)


def test_a_batch_that_cannot_be_shared_is_one_sentence(tmp_path: Path) -> None:
    """On the command line, from one of three processes."""
    port = free_port()
    command = [sys.executable, "-m", "casm_fast", "train", "--output", str(tmp_path / "run")]
    started = [
        subprocess.Popen(
            [*command, "--batch-size", "16", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment(rank, 3, port)},
            cwd=Path(__file__).parent.parent,
        )
        for rank in range(3)
    ]
    told = ["".join(process.communicate(timeout=300)) for process in started]
    assert [process.returncode for process in started] == [1, 1, 1]
    assert "".join(told) == (
        "casm-fast: batch_size: expected a multiple of the 3 processes, with 2 images or more for "
        "each, got 16; pass 15 or 18, or start another number of processes\n"
    )


@pytest.mark.parametrize(
    ("size", "batch_size", "advice"), [(4, 6, "8"), (8, 8, "16"), (3, 16, "15 or 18")]
)
def test_batches_are_shared_or_refused(size: int, batch_size: int, advice: str) -> None:
    expected = (
        f"batch_size: expected a multiple of the {size} processes, with 2 images or more for "
        f"each, got {batch_size}; pass {advice}, or start another number of processes"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        distributed.check_batch_size(World(0, size, CPU), batch_size)
    distributed.check_batch_size(World(0, size, CPU), 6 * size)
    distributed.check_batch_size(alone(CPU), 7)


def test_an_incomplete_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    expected = (
        "WORLD_SIZE is 2: expected RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT in the "
        "environment, got none for LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start the processes with "
        "torchrun"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        train(runs.tiny(tmp_path / "run"))
    assert not distributed.leads()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.leads()


def test_compiled_passes_are_not_synchronised() -> None:
    expected = (
        "sync_batchnorm: expected compile=False, whose graphs cannot hold what processes tell one "
        "another, got compile=True"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        TrainConfig(compile=True, sync_batchnorm=True)


def test_layers_that_are_more_than_batch_normalisation_are_not_synchronised() -> None:
    class Activated(nn.BatchNorm2d):
        pass

    expected = (
        "sync_batchnorm: expected torch.nn.BatchNorm2d layers alone, got a Activated in the "
        "network; pass sync_batchnorm=False"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        synchronize_batchnorm(nn.Sequential(Activated(3)), World(0, 2, CPU))
