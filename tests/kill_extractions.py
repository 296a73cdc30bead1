"""Kills extractions with SIGKILL at random moments until they are done all the same.

    python tests/kill_extractions.py --kills 30

First at the moments when a single file is put together and its parts are removed, one by one. Then
every extraction is begun and killed, and begun again with the same arguments, until it comes
through; then its table must be that of an uninterrupted run, row for row, and a part that was there
when a run began must be the same file when it ended. Folders and single files take turns. Runs are
forks of one process that has loaded everything and computed nothing, so that a kill costs no time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet  # loaded before the forks
import torch
import tqdm
from PIL import Image

from casm_fast.data import parts, predictions
from casm_fast.data.decoding import DecodeError
from casm_fast.extraction import extract
from casm_fast.models.saliency import SaliencyModel, build_model

IMAGES, BATCH, PART = 120, 4, 8
SLOWLY = 0.002  # seconds per image
LOADED = (importlib.metadata, pyarrow.parquet, tqdm, Image)


class Slow:
    """Pictures that take their time; every 17th cannot be read."""

    name = "slow"
    classes = ("a", "b", "c")
    has_boxes = True

    def __len__(self) -> int:
        return IMAGES

    def image_id(self, index: int) -> str:
        return f"picture {index}"

    def image(self, index: int) -> Any:
        time.sleep(SLOWLY)
        if index % 17 == 3:
            raise DecodeError(f"picture {index}: it is cut short")
        return np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)

    def label(self, index: int) -> int:
        return index % 3

    def boxes(self, index: int) -> Any:
        return np.array([[2, 2, 20, 20 + index % 9]] * (index % 3), np.int32).reshape(-1, 4)


def run(model: SaliencyModel, output: Path) -> None:
    torch.set_num_threads(1)
    extract(
        model, Slow(), output,
        batch_size=BATCH, part_images=PART, workers=2, progress=False, decoder="pillow",
    )  # fmt: skip


def killing(function: Any, call: int) -> Any:
    """The function, but its process dies at a call of it."""
    calls = 0

    def fatal(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return fatal


def forked(
    model: SaliencyModel, output: Path, life: float, moment: tuple[Any, str, int] | None = None
) -> bool:
    """Runs in a child for at most so many seconds; whether it came through."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if moment:
                owner, name, call = moment
                setattr(owner, name, killing(getattr(owner, name), call))
            run(model, output)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + life
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status not in (0, signal.SIGKILL):
                raise SystemExit(f"a run failed by itself, with status {status}")
            return not status
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


PARTS = IMAGES // PART
MOMENTS = (  # owner, function, call
    (Path, "unlink", 1),  # a part is there
    (Path, "unlink", PARTS),  # all are
    (pyarrow.parquet.ParquetWriter, "write_table", 2),  # the file has a part's rows
    (Path, "unlink", PARTS + 1),  # it is there
    (Path, "unlink", PARTS + 2),  # and its parts are, without one, without half of them, ...
    (Path, "unlink", PARTS + 3),
    (Path, "unlink", PARTS + PARTS // 2),
    (Path, "unlink", PARTS + PARTS + 2),
    (shutil, "rmtree", 1),  # ... the claim alone
)


def identities(folder: Path) -> dict[Path, tuple[int, int]]:
    """What tells a file from another one of the same name."""
    if not folder.is_dir():
        return {}
    return {
        part.path: (part.path.stat().st_ino, part.path.stat().st_mtime_ns)
        for part in parts.listed(folder)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("casm_fast").setLevel(logging.ERROR)
    chance = random.Random(options.seed)
    torch.manual_seed(0)
    model = build_model("compact", classes=3, input_size=32)
    tables, kills, extractions, unfinished = [], 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        started = time.monotonic()
        assert forked(model, Path(place, "whole"), math.inf)
        life = time.monotonic() - started
        whole = predictions.read(Path(place, "whole"))[0]
        for number, moment in enumerate(MOMENTS):
            output = Path(place, f"at {number}.parquet")
            assert not forked(model, output, math.inf, moment), moment
            assert forked(model, output, math.inf)
            tables.append(predictions.read(output)[0])
        assert not (hidden := [name for name in os.listdir(place) if name.startswith(".")]), hidden
        while kills < options.kills:
            single = extractions % 2 == 1
            output = Path(place, f"{extractions}.parquet" if single else f"{extractions}")
            folder = parts.working_folder(output) if single else output
            through, tries = False, 0
            while not through:
                tries += 1
                before = identities(folder)
                through = forked(model, output, chance.uniform(0, life))
                kills += not through
                after = identities(folder)
                unfinished += sum(name.suffix == ".tmp" for name in folder.glob(".*"))
                if not (single and output.exists()):  # a single file removes its parts
                    changed = [path.name for path in before if before[path] != after.get(path)]
                    assert not changed, f"made again: {changed}"
            life *= 0.8 if tries == 1 else 1.2 if tries > 5 else 1  # the machine is never the same
            leftovers = [name for name in os.listdir(place) if name.startswith(".")]
            assert not leftovers, leftovers
            tables.append(predictions.read(output)[0])
            extractions += 1
    for table in tables:
        assert table.to_pylist() == whole.to_pylist()
        assert table["image_id"].to_pylist() == [f"picture {index}" for index in range(IMAGES)]
    print(  # noqa: T201
        f"{kills} kills, {extractions} extractions of {IMAGES} images came through, equal to an "
        f"uninterrupted one; {unfinished} unfinished files were seen and swept up"
    )


if __name__ == "__main__":
    sys.exit(main())
