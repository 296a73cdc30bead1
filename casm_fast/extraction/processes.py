"""Several processes of one machine, one per GPU: the shards of an extraction, side by side.

Every process is an extraction of its own with a shard of the images, into the same folder. What
they leave is a complete folder, or one that the next run goes on with.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import pickle
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from casm_fast.data import parts
from casm_fast.data.signals import obey, stop_requests
from casm_fast.extraction.config import ExtractConfig
from casm_fast.models.memory import keep_freed

logger = logging.getLogger(__name__)

LOOK = 0.5
"""Seconds between two looks at the processes."""


def shares(config: ExtractConfig) -> list[ExtractConfig]:
    """What each process is told: its shard of this run's, and its device.

    Raises:
        ValueError: There are fewer GPUs than processes, or one device is named for all.
    """
    count, (part, parts_in_all) = config.processes, config.part
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    if config.device == "cuda" or gpus:
        if gpus < count:
            raise ValueError(
                f"processes: expected at most one for each of the {gpus} GPUs of this machine, "
                f"got {count}"
            )
        devices = [f"cuda:{number}" for number in range(count)]
    elif config.device in ("auto", "cpu"):
        devices = ["cpu"] * count
    else:
        raise ValueError(
            f"device: expected 'auto', 'cpu' or 'cuda' with several processes, got "
            f"{config.device!r}"
        )
    return [
        dataclasses.replace(
            config,
            processes=1,
            progress=False,
            device=device,
            shard=f"{(part - 1) * count + number + 1}/{parts_in_all * count}",
        )
        for number, device in enumerate(devices)
    ]


def run(model: Any, source: Any, folder: Path, span: range, config: ExtractConfig) -> int:
    """Fill a folder with the rows of a span, by ``config.processes`` processes.

    Args:
        model: As `casm_fast.extract` takes it.
        source: As `casm_fast.extract` takes it; sent to the processes, as the model is.
        folder: Of parts.
        span: The places of this run.
        config: Options.

    Returns:
        Rows that were made.

    Raises:
        ChildProcessError: A process was killed.
        Exception: What a process raised first.
        KeyboardInterrupt: On Ctrl-C, with everything written.
        SystemExit: On SIGTERM, with everything written.
    """
    from tqdm import tqdm

    told = shares(config)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in told]
    threads = max(1, torch.get_num_threads() // len(told))
    workers: list[BaseProcess] = [
        context.Process(target=_work, args=(model, source, folder, own, threads, errors))
        for own, (_, errors) in zip(told, pipes, strict=True)
    ]

    def done() -> int:
        missing = parts.gaps(parts.listed(folder), span) if folder.is_dir() else [span]
        return len(span) - sum(map(len, missing))

    before = done()
    with (
        stop_requests() as stop,
        tqdm(
            total=len(span),
            initial=before,
            unit="img",
            desc="extract",
            disable=None if config.progress else True,
        ) as bar,
    ):
        try:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                if stop.signal is not None or any(worker.exitcode for worker in workers):
                    break
                workers[0].join(LOOK)
                bar.update(done() - bar.n)
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.terminate()  # it ends its batch, writes, and goes
            for worker in workers:
                if worker.pid is not None:
                    worker.join()
    if stop.signal is not None:
        message = f"{done():,} of {len(span):,} images are done; the same command goes on there"
        logger.warning("stopped: %s", message)
        obey(stop.signal, message)
    for receiver, _ in pipes:
        if receiver.poll():
            error: Exception = receiver.recv()
            raise error
    for number, worker in enumerate(workers):
        if worker.exitcode:
            raise ChildProcessError(
                f"processes: expected process {number + 1} of {len(workers)} to end well, got "
                f"status {worker.exitcode}; what is done is saved, and the same command goes on"
            )
    return done() - before


def _work(
    model: Any,
    source: Any,
    folder: Path,
    config: ExtractConfig,
    threads: int,
    errors: Connection,
) -> None:
    """One process."""
    from casm_fast.extraction.pipeline import extract

    torch.set_num_threads(threads)
    keep_freed()
    logging.getLogger("casm_fast").setLevel(logging.ERROR)  # the first process tells of all images
    try:
        extract(model, source, folder, config)
    except Exception as error:
        with suppress(BrokenPipeError):
            errors.send(_sendable(error))
        raise SystemExit(1) from None


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception of another package does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
