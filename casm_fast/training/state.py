"""The saved state of a run: enough to continue it bit by bit, whole after a kill at any moment.

``state/state.pt`` holds the networks, optimisers, random number generators, counters, the position
in the data, and the configuration it belongs to. The history's snapshots lie beside it, one file
each, named by the step at which they were taken: a snapshot never changes, so that a save writes
only those that are new. Order of a save: new snapshots, then state.pt, then the removal of
snapshots that state.pt no longer names. Every file is written under another name, flushed to the
disk and renamed. Nothing is unpickled that could run code: state.pt is opened with
``weights_only=True``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from casm_fast.training.config import FREE_FIELDS
from casm_fast.training.engine import Engine
from casm_fast.training.history import Snapshot

FORMAT = 2


@dataclass
class Position:
    """Where a run stands: the next thing to do.

    Attributes:
        phase: ``"pretrain"``, ``"casm"``, or ``"done"``.
        epoch: Epoch within the phase.
        batch: Next batch within the epoch.
        step: Next step within the phase.
        skipped: Images that could not be read so far, in both phases.
        unread: Messages about those that the log does not name yet.
    """

    phase: str = "pretrain"
    epoch: int = 0
    batch: int = 0
    step: int = 0
    skipped: int = 0
    unread: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """What `load` found."""

    position: Position
    scores: dict[str, float]
    log_sizes: dict[str, int]


def save(
    folder: Path,
    engine: Engine,
    position: Position,
    *,
    fingerprint: Mapping[str, Any],
    scores: Mapping[str, float],
    log_sizes: Mapping[str, int],
) -> None:
    """Write the state; after a kill at any moment `folder` holds this one or the one before.

    All processes call it. Rank 0 writes; the others go on when the state is on the disk.

    Args:
        folder: The run's ``state`` folder.
        engine: What to save.
        position: The next thing to do.
        fingerprint: What the run depends on, compared by `load`.
        scores: Latest validation scores.
        log_sizes: Bytes of each log file at this moment, to cut off what a killed run logged later.

    Raises:
        ValueError: When the processes have drifted apart.
    """
    engine.check_finite()
    # Collectives too, and so on every rank.
    saved = engine.state()
    engine.world.check_equal(
        "the same position, draws and weights (the same options, data and versions of casm_fast "
        "and torch give them)",
        repr((position, engine.digest())),
    )
    if engine.world.leads:
        _write(folder, engine, saved, position, fingerprint, scores, log_sizes)
    engine.world.wait()


def _write(
    folder: Path,
    engine: Engine,
    saved: Mapping[str, Any],
    position: Position,
    fingerprint: Mapping[str, Any],
    scores: Mapping[str, float],
    log_sizes: Mapping[str, int],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = [_snapshot_name(step) for step in engine.history.steps]
    for name, snapshot in zip(names, engine.history.snapshots, strict=True):
        if not (folder / name).exists():
            write_atomically(folder / name, partial(torch.save, snapshot))
    content = {
        "format": FORMAT,
        "position": asdict(position),
        "fingerprint": dict(fingerprint),
        "scores": dict(scores),
        "log_sizes": dict(log_sizes),
        "engine": saved,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(engine.device)
        if engine.device.type == "cuda"
        else None,
    }
    write_atomically(folder / "state.pt", partial(torch.save, content))
    for path in folder.glob("history-*.pt"):
        if path.name not in names:
            path.unlink()


def load(folder: Path, engine: Engine, *, fingerprint: Mapping[str, Any]) -> Saved | None:
    """Put `engine` and the global random number generators where `save` found them.

    Args:
        folder: The run's ``state`` folder.
        engine: Built from the same configuration.
        fingerprint: What this run depends on.

    Returns:
        The rest of what was saved, or `None` when there is no saved state.

    Raises:
        ValueError: When the state belongs to another configuration or data set, or cannot be read.
    """
    path = folder / "state.pt"
    content = _read(path) if path.exists() else None
    named = (
        []
        if content is None
        else [_snapshot_name(step) for step in content["engine"]["history_steps"]]
    )
    # A kill between the snapshots and state.pt leaves snapshots that no state names.
    for stray in folder.glob("history-*") if engine.world.leads else ():
        if stray.name not in named:
            stray.unlink()
    engine.world.check_equal(
        f"the same saved state in {folder} (machines need a file system that they share)",
        "none" if content is None else repr(content["position"]),
    )
    if content is None:
        return None
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a saved state of format {FORMAT}, got {content.get('format')!r}; "
            "start a new run"
        )
    compare(content["fingerprint"], fingerprint, path)
    snapshots: list[Snapshot] = [_read(folder / name) for name in named]
    engine.restore(content["engine"], snapshots)
    torch.set_rng_state(content["random"])
    if engine.device.type == "cuda" and content["random_cuda"] is not None:
        torch.cuda.set_rng_state(content["random_cuda"], engine.device)
    return Saved(Position(**content["position"]), content["scores"], content["log_sizes"])


def compare(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run with another configuration.

    Raises:
        ValueError: Naming every field that differs, with both values.
    """
    names = [
        name for name in current if name not in FREE_FIELDS and saved.get(name) != current[name]
    ]
    if names:
        differences = "; ".join(
            f"{name} was {saved.get(name)!r}, now {current[name]!r}" for name in names
        )
        raise ValueError(
            f"{path}: the run was started with other settings ({differences}): "
            "expected the same ones to resume it; set them back, or choose another output folder"
        )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, flush it to the disk, and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")  # one name: the next try replaces a killed one's
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _snapshot_name(step: int) -> str:
    return f"history-{step}.pt"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: expected a state written by a training run, got an unreadable file ({error})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a state written by a training run, got a {type(content).__name__}"
        )
    return content
