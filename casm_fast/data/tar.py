"""Where the members of a tar file lie, without reading them.

The format is POSIX's ustar with its two ways of storing long names, GNU's and pax (IEEE Std 1003.1,
"pax - portable archive interchange", and the GNU tar manual, "Basic Tar Format"): headers of 512
bytes, each followed by the content of its member, filled up to whole blocks. Python's tarfile makes
an object of each header; this reads the three fields that are needed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
"""Bytes; headers and contents begin at multiples."""

_SMALL = 64

_REGULAR = (0x30, 0x00, 0x37)  # "0", what came before it, and "contiguous"
_LONG_NAME, _PAX = 0x4C, 0x78  # "L" and "x": the content names the next member
_GLOBAL_PAX, _SPARSE = 0x67, 0x53  # "g" and "S"


class Member(NamedTuple):
    """A regular file in a tar file.

    Attributes:
        name: Its path.
        place: Where its content begins, in bytes.
        size: Of the content, in bytes.
        small: The content, where it has at most 64 bytes; else nothing.
    """

    name: str
    place: int
    size: int
    small: bytes


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar file, in order.

    Args:
        path: Not compressed.

    Raises:
        ValueError: It is no tar file, ends within a header, or holds sparse files.
    """
    with path.open("rb") as stream:
        end = os.fstat(stream.fileno()).st_size
        if end < BLOCK:
            raise _bad(path, f"one of {end} bytes")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield from _members(content, end, path)


def _members(content: mmap.mmap, end: int, path: Path) -> Iterator[Member]:
    place, name, size = 0, "", -1
    while place < end:
        header = content[place : place + BLOCK]
        if not header[0] and not any(header):  # two blocks of zeros end a tar file
            return
        length = _number(header[124:136])
        if len(header) < BLOCK or length < 0 or _sum(header) != _number(header[148:156]):
            raise _bad(path, f"something else at byte {place:,}")
        kind, place = header[156], place + BLOCK
        if kind == _LONG_NAME:
            name = _text(content[place : place + length])
        elif kind == _PAX:
            for key, value in _records(content[place : place + length], path):
                if key == b"path":
                    name = _text(value)
                elif key == b"size":
                    size = int(value)
        elif kind == _SPARSE:
            raise _bad(path, f"a sparse file at byte {place - BLOCK:,}")
        elif kind != _GLOBAL_PAX:
            length = length if size < 0 else size
            if kind in _REGULAR:
                small = content[place : place + length] if length <= _SMALL else b""
                yield Member(name or _name(header), place, length, small)
            name, size = "", -1
        place += -(-length // BLOCK) * BLOCK


def _sum(header: bytes) -> int:
    """The checksum: that of all bytes, with blanks for its own eight."""
    return sum(header) - sum(header[148:156]) + 8 * 0x20


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return os.fsdecode(field.partition(b"\0")[0])


def _number(field: bytes) -> int:
    """Octal digits, or, where those do not suffice, a binary number with its first bit set.

    -1 where it is neither.
    """
    if field[:1] >= b"\x80":
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.partition(b"\0")[0] or b"0", 8)
    except ValueError:
        return -1


def _records(content: bytes, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """pax: lines of "length key=value", where the length is that of the whole line."""
    while content:
        length = content.partition(b" ")[0]
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise _bad(path, "a damaged pax header")
        line, content = content[: int(length)], content[int(length) :]
        key, _, value = line[len(length) + 1 : -1].partition(b"=")
        yield key, value


def _bad(path: Path, what: str) -> ValueError:
    return ValueError(f"webdataset: expected an uncompressed tar file, got {path} with {what}")
