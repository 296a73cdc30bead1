"""Files and folders that are whole or absent, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def new_file(path: Path) -> Iterator[IO[str]]:
    """A text file under another name, which takes its own when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder under another name, which takes its own when it is complete.

    Raises:
        FileExistsError: There is a file of this name, or a folder that is not empty.
    """
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise FileExistsError(
            f"export: expected a new or empty folder, got {path}; remove it or give another"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir()
        yield unfinished
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    with new_file(path) as stream:
        json.dump(content, stream)
