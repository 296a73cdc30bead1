"""Millions of names that need no memory to speak of: lines of a file, looked up where they lie.

A Python string of a path takes some 100 bytes; here a name takes four, the place of its line (eight
where the text is longer than 4 GiB), and the text stays on the disk, in pages that the system drops
when it needs the memory.
"""

from __future__ import annotations

import mmap
import operator
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

_PIECE = 1 << 20  # bytes that are searched for line ends at a time
_FEED, _RETURN = b"\n\r"


class Lines:
    """The lines of a text file by number, without the empty ones.

    Lines end with a line feed, or with a carriage return before it; bytes that are no UTF-8 are
    kept as file names keep them. Safe in several threads; pickled with the text.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        """Finds the lines.

        Args:
            stream: An open file; it may be closed afterwards, but must not change.
        """
        size = os.fstat(stream.fileno()).st_size
        self._text: mmap.mmap | bytes = b""
        if size:
            self._text = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._starts = _starts(self._text)

    @classmethod
    def of_file(cls, path: Path) -> Lines:
        """The lines of a file."""
        with path.open("rb") as stream:
            return cls(stream)

    @classmethod
    def spooled(cls, names: Iterable[str]) -> Lines:
        """Names, written to a file that is deleted when they are no longer used.

        Raises:
            ValueError: A name is empty or has a line feed in it.
        """
        with tempfile.TemporaryFile() as stream:
            for name in names:
                if not name or "\n" in name:
                    raise ValueError(f"expected names of files of one line each, got {name!r}")
                stream.write(os.fsencode(name) + b"\n")
            stream.flush()
            return cls(stream)

    @classmethod
    def copied(cls, stream: Iterable[bytes]) -> Lines:
        """What a stream holds that cannot be read twice."""
        with tempfile.TemporaryFile() as copy:
            copy.writelines(stream)
            copy.flush()
            return cls(copy)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        line = self._text[int(self._starts[index]) : int(self._starts[index + 1])]
        return os.fsdecode(line.rstrip(b"\r\n"))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same names, be it lines or a list."""
        if not isinstance(other, (Lines, list)):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[object, tuple[list[bytes]]]:
        return Lines.copied, ([bytes(self._text)],)


def stored(names: list[str]) -> Lines | list[str]:
    """Names of files as lines; as they are where one has a line feed in it, as Unix allows."""
    return names if any("\n" in name for name in names) else Lines.spooled(names)


def _starts(text: mmap.mmap | bytes) -> NDArray[np.unsignedinteger]:
    """Where the lines begin that are not empty, and the end of the text, ``[n + 1]``."""
    size = len(text)
    kind = np.uint32 if size < 2**32 else np.uint64
    view = np.frombuffer(text, np.uint8)
    pieces = [np.zeros(min(size, 1), kind)]
    for offset in range(0, size, _PIECE):
        ends = np.flatnonzero(view[offset : offset + _PIECE] == _FEED)
        pieces.append((ends + (offset + 1)).astype(kind))
    begins = np.concatenate(pieces)
    begins = begins[begins < size]
    following = view[np.minimum(begins + kind(1), max(size - 1, 0))]
    bare = (view[begins] == _RETURN) & ((following == _FEED) | (begins == size - 1))
    solid = begins[(view[begins] != _FEED) & ~bare]
    return np.append(solid, kind(size))
