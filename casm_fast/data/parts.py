"""A folder that a table is written into part by part, by one run or by several, with any breaks.

The table has one row per place 0, 1, ... of a list that never changes. A part is a file of the rows
of ``[start, stop)``, named after them: what is there says what is missing, so that a run begins by
looking, and nothing else has to be remembered. A claim file holds the settings that all rows share
(which model, which images, which conventions), and keeps rows by others out. A run locks the places
that it fills; the lock ends with the process, however that ends, and runs that fill other places of
the same folder do not disturb each other.

| file | what |
|---|---|
| `extraction.json` | the claim: settings that all rows share, and notes of the first run |
| `part-000000000-000008192.parquet` | rows of these places |
| `masks-000000000-000008192.npy` | their saliency maps, when they are kept; written first |
| `.part-...tmp` | a part that is being written, or was when a run was killed |
| `.merged.tmp` | of the working folder of a single file: the file that is being written |
| `.lock` | nothing; byte k of it is locked by the run that fills place k |
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

CLAIM, LOCK = "extraction.json", ".lock"

FORMAT = 1
"""Version of the folder; raised when an older casm_fast would misread it."""

_NAME = re.compile(r"part-(\d+)-(\d+)\.parquet")
_MASKS = re.compile(r"masks-(\d+)-(\d+)\.npy")
_UNFINISHED = re.compile(r"\.(?:part|masks)-(\d+)-\d+\.\w+\.\d+\.tmp")
_MISSING = object()


@dataclass(frozen=True)
class Part:
    """A file with the rows of some places.

    Attributes:
        path: It.
        start: First place.
        stop: Place behind the last.
    """

    path: Path
    start: int
    stop: int


def part_file(folder: Path, start: int, stop: int) -> Path:
    """The file of the rows of ``[start, stop)``."""
    return folder / f"part-{start:09d}-{stop:09d}.parquet"


def masks_file(folder: Path, start: int, stop: int) -> Path:
    """The file of the saliency maps of these rows, when they are kept."""
    return folder / f"masks-{start:09d}-{stop:09d}.npy"


@contextmanager
def unfinished(path: Path, other: Path | None = None) -> Iterator[IO[bytes]]:
    """A file under another name that takes its own when all of it is on the disk.

    Args:
        path: Its own name; the folder is made.
        other: The name until then, on the same file system; None for one beside it that no other
            process uses, and that stays there when this one is killed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    other = other or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with other.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        other.replace(path)
    finally:
        other.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_folder(path: str | Path) -> bool:
    """Whether an output means a folder of parts: it is one, or its name is no Parquet file's."""
    return Path(path).is_dir() or Path(path).suffix not in (".parquet", ".pq")


def working_folder(file: Path) -> Path:
    """Where the parts of a single file lie until it is complete: hidden, beside it."""
    return file.with_name(f".{file.name}.parts")


def merged_file(folder: Path) -> Path:
    """Where the rows of a working folder are put together: what a kill leaves goes with it."""
    return folder / ".merged.tmp"


def remove(folder: Path) -> None:
    """Removes a folder of parts, its claim last: what a kill leaves can be claimed again."""
    for name in os.listdir(folder):
        if name != CLAIM:
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder)


def listed(folder: Path) -> list[Part]:
    """The parts that are there, in order of their places."""
    found = []
    for name in os.listdir(folder):
        match = _NAME.fullmatch(name)
        if match:
            found.append(Part(folder / name, int(match[1]), int(match[2])))
    return sorted(found, key=lambda part: part.start)


def gaps(parts: list[Part], span: range) -> list[range]:
    """The places of a span that no part holds.

    Args:
        parts: In order; they do not overlap.
        span: Consecutive places.

    Returns:
        Ranges in order, none of them empty.
    """
    missing, place = [], span.start
    for part in parts:
        if part.stop <= place:
            continue
        if part.start >= span.stop:
            break
        if part.start > place:
            missing.append(range(place, part.start))
        place = part.stop
    if place < span.stop:
        missing.append(range(place, span.stop))
    return missing


# --- the claim ------------------------------------------------------------------------------------


@contextmanager
def claimed(
    folder: Path, span: range, settings: Mapping[str, Any], notes: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Makes places of a folder one's own: no other run fills them, and no other settings.

    Args:
        folder: Made when it is not there.
        span: Places, at least one.
        settings: JSON values that every row depends on.
        notes: JSON values of the first run that later ones may keep, such as its batch size.

    Yields:
        The notes of the first run.

    Raises:
        ValueError: The folder holds something else, or rows of other settings; or a running
            process fills some of the places.
    """
    if folder.is_file():
        raise ValueError(
            f"output: expected a folder, or a file that ends with .parquet, got the file {folder}"
        )
    if folder.is_dir() and not (folder / CLAIM).exists():
        strangers = [name for name in os.listdir(folder) if not name.startswith(".")]
        if strangers and not (folder / CLAIM).exists():
            raise ValueError(
                f"output: expected a new folder or one of casm-fast extract, got {folder} with "
                f"{min(strangers)}; give another folder"
            )
    with _locked(folder, span):
        settings = json.loads(json.dumps(settings))
        if not (folder / CLAIM).exists():
            _write_once(
                folder / CLAIM, {"format": FORMAT, "settings": settings, "notes": dict(notes)}
            )
        content = read_claim(folder)
        before: dict[str, Any] = content["settings"]
        other = [
            f"{name} {before.get(name)!r} instead of {settings.get(name)!r}"
            for name in {**settings, **before}
            if before.get(name, _MISSING) != settings.get(name, _MISSING)
        ]
        if other:
            raise ValueError(
                f"output: expected rows of the same settings, got {folder} with "
                f"{' and '.join(other)}; give another output, or delete this folder to begin anew"
            )
        first: dict[str, Any] = content["notes"]
        yield first


def read_claim(folder: Path) -> dict[str, Any]:
    """The content of the claim file: "settings" and "notes".

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or of a newer casm_fast.
    """
    path = folder / CLAIM
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        number = content["format"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder}: expected a folder of casm-fast extract, got one without {CLAIM}"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: expected the settings of an extraction, got a file that cannot be read; "
            "delete the folder to begin anew"
        ) from error
    if number != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {number}; read it with the casm_fast that "
            "wrote it"
        )
    return content


def _write_once(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file whole, unless another run was quicker."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(unfinished, path)
        except FileExistsError:
            return
        except OSError:  # no hard links here: the last of several beginners wins
            unfinished.replace(path)
        sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the lock -------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: Path, span: range) -> Iterator[None]:
    """Keeps other runs from the places of a span, and sweeps up what a killed run left there.

    The lock is one of Linux's open file descriptions (F_OFD_SETLK): it ends when the file is
    closed, by the process or by its death, and two runs in one process refuse each other too.
    """
    with _opened(folder / LOCK) as file:
        # struct flock: type, whence, start, length, pid
        wish = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, span.start, len(span), 0)
        try:
            fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, wish)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"output: expected a folder that no other run fills, got {folder}, where a "
                    f"running one makes some of the images {span.start:,} to {span.stop - 1:,}; "
                    "wait for its end, or give another output"
                ) from None
            logger.warning(
                "%s: this file system has no locks (%s); see that no second run writes there",
                folder,
                error.strerror,
            )
        for name in os.listdir(folder):
            match = _UNFINISHED.fullmatch(name)
            maps = _MASKS.fullmatch(name)  # of a part that was not to be
            if maps and not part_file(folder, int(maps[1]), int(maps[2])).exists():
                match = maps
            if match and int(match[1]) in span:
                (folder / name).unlink(missing_ok=True)
        yield


def _opened(path: Path) -> IO[bytes]:
    """A file opened for writing that still has its name: a finished run may remove its folder."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            file = path.open("ab")
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
