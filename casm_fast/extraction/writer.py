"""Rows as they come, written as parts: an interruption costs what is not written yet."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from casm_fast.data import parts, predictions
from casm_fast.data.predictions import Description
from casm_fast.extraction.config import Masks
from casm_fast.extraction.maps import PER_ROW
from casm_fast.extraction.maps import write as write_masks

if TYPE_CHECKING:
    import pyarrow as pa

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says what to do where a disk is full.

    Raises:
        OSError: There is no room for a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(
            error.errno,
            f"output: expected room for {path.name} in {path.parent}, got {error.strerror!r}; "
            "make room, and the same command goes on where it stopped",
        ) from error


@dataclass(frozen=True)
class Rows:
    """Rows of consecutive places, fresh from an engine.

    Attributes:
        start: First place.
        table: The rows, without a description.
        saliency_size: ``(h, w)`` of the saliency maps; (0, 0) when no image could be read.
        device: Where the network ran.
        maps: ``[rows, h, w]`` saliency maps as they are kept; [rows, 0, 0] without.
    """

    start: int
    table: pa.Table
    saliency_size: tuple[int, int]
    device: str
    maps: NDArray[Any] | None = None

    @property
    def errors(self) -> int:
        """Rows of images that could not be read."""
        return len(self.table) - int(self.table["error"].null_count)


class Writer:
    """Collects rows, and writes them as parts of a folder.

    Attributes:
        written: Rows that were written.
    """

    def __init__(
        self,
        folder: Path | None,
        describe: Callable[[tuple[int, int], str, float], Description],
        images: int,
        seconds: float,
        masks: Masks = "off",
    ) -> None:
        """A writer without rows.

        Args:
            folder: Of the parts, claimed by the caller; None to keep all rows in memory.
            describe: The description of rows from their saliency size, device and time in seconds.
            images: Rows of a part, at most (by less than a batch more).
            seconds: Time between two parts, at most.
            masks: How saliency maps are kept.
        """
        self.written = 0
        self._folder, self._describe = folder, describe
        self._images, self._seconds, self._masks = images, seconds, masks
        self._rows: list[Rows] = []
        self._waiting = 0
        self._since = time.perf_counter()

    def add(self, rows: Rows) -> None:
        """Takes rows; writes a part when it is due.

        Raises:
            OSError: A part cannot be written.
        """
        if self._rows and rows.start != self._rows[0].start + self._waiting:
            self.flush()  # rows that were there lie in between
        self._rows.append(rows)
        self._waiting += len(rows.table)
        late = time.perf_counter() - self._since >= self._seconds
        if self._folder is not None and (self._waiting >= self._images or late):
            self.flush()

    def flush(self) -> None:
        """Writes the rows that wait, if there are any and a folder.

        Raises:
            OSError: They cannot be written; nothing is left of the part.
        """
        if self._folder is None or not self._rows:
            return
        start = self._rows[0].start
        path = parts.part_file(self._folder, start, start + self._waiting)
        maps = [rows.maps for rows in self._rows if rows.maps is not None]
        table = self.take()
        with writing(path):
            if self._masks in PER_ROW:
                errors = table["error"].to_pylist()
                write_masks(self._folder, start, maps, errors, self._masks)
            predictions.write(table, path)

    def take(self) -> pa.Table:
        """The rows that wait as a table with its description; then none wait.

        At least one was added.
        """
        import pyarrow as pa

        rows, self._rows = self._rows, []
        self.written += self._waiting
        self._waiting = 0
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        size = max(one.saliency_size for one in rows)
        table = pa.concat_tables([one.table for one in rows]).combine_chunks()
        return predictions.describe(table, self._describe(size, rows[0].device, seconds))
