"""Several processes against one: the same losses, weights, histories and scores."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_engine import CLASSES, batches, tiny_model
from torch import Tensor, nn

from casm_fast.training.config import TrainConfig
from casm_fast.training.distributed import World, alone, joined, synchronize_batchnorm
from casm_fast.training.engine import Engine

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _rank(rank: int, size: int, port: int, folder: Path, work: Any, arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    with joined("cpu") as world:
        torch.save(work(world, *arguments), folder / f"{rank}.pt")


def on_ranks(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(world, *arguments)` returns on each of `size` processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["casm_fast.training"])
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, folder, work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


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
