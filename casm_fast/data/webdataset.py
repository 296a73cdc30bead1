"""WebDataset: images and labels as members of tar files, the shards.

Members whose names agree up to the first dot belong to one sample: ``n01/cat_7.jpg`` is the image,
``n01/cat_7.cls`` the number of its class. A sample has one image (the first member whose whole
ending is that of an image) or is left out; other members are not read.

Opening reads the headers of the tar files, 512 bytes a member, and keeps 12 bytes a sample and its
name on the disk (`casm_fast.data.lines`). After that every image is one read at a known place, in
any order and from any thread, without a file that is kept open.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from casm_fast.data import remote
from casm_fast.data.decoding import ContentDecoder, DecodeError, decode_bytes
from casm_fast.data.lines import Lines
from casm_fast.data.listing import EXTENSIONS
from casm_fast.data.tar import BLOCK, Member, members

logger = logging.getLogger(__name__)

_LABEL = "cls"


class _Sample(NamedTuple):
    """An image and its label, -1 when unknown."""

    image: Member
    label: int


class WebDatasetSource:
    """An `ImageSource` over the samples of WebDataset shards, shard by shard.

    Attributes:
        name: "webdataset:<spec>".
        classes: (); the shards number the classes and do not name them.
        has_boxes: Always false.
        shards: The tar files.
        found: A sentence about what was found, and what is missing.
    """

    classes: tuple[str, ...] = ()
    has_boxes = False

    def __init__(self, spec: str, *, decoder: ContentDecoder = decode_bytes) -> None:
        """Reads the headers.

        Args:
            spec: Tar files: a path, a folder, a pattern with ``*``, or numbers and alternatives in
                braces, ``train-{0000..0146}.tar``, ``{train,val}.tar``.
            decoder: Reads the content of an image file.

        Raises:
            FileNotFoundError: A shard is missing.
            ValueError: A shard is compressed or no tar file, or there is no image.
        """
        self.name = f"webdataset:{spec}"
        self.shards = _shards(spec)
        self._decoder = decoder
        places: list[NDArray[np.uint32]] = []
        labels: list[NDArray[np.int32]] = []
        counts = []

        def names() -> Iterator[str]:
            for shard in self.shards:
                samples = list(_samples(shard))
                counts.append(len(samples))
                rows = [(image.place // BLOCK, image.size) for image, _ in samples]
                places.append(np.array(rows, np.uint32).reshape(-1, 2))
                labels.append(np.array([label for _, label in samples], np.int32))
                yield from (f"{shard.name}/{image.name}" for image, _ in samples)

        self._names = Lines.spooled(names())
        if not len(self._names):
            raise ValueError(f"webdataset: expected images in {spec}, got none")
        self._places, self._labels = np.concatenate(places), np.concatenate(labels)
        self._ends = np.cumsum(counts)
        unknown = int((self._labels < 0).sum())
        self.found = f"webdataset: {len(self):,} images in {len(self.shards):,} shards of {spec}; "
        self.found += f"missing: {f'labels of {unknown:,}, ' if unknown else ''}boxes"
        logger.info("%s", self.found)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._names)

    def image_id(self, index: int) -> str:
        """Shard and member, such as "train-0000.tar/n01/cat_7.jpg"."""
        return self._names[index]

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB; raises `DecodeError`."""
        index = range(len(self))[index]
        shard = self.shards[int(np.searchsorted(self._ends, index, "right"))]
        block, size = map(int, self._places[index])
        name = self.image_id(index)
        try:
            with shard.open("rb", buffering=0) as stream:
                content = os.pread(stream.fileno(), size, block * BLOCK)
        except OSError as error:
            raise DecodeError(f"cannot read {name}: {error.strerror or error}") from error
        if len(content) < size:
            raise DecodeError(f"cannot read {name}: {shard} ends before the file does")
        return self._decoder(content, name)

    def label(self, index: int) -> int:
        """The class, -1 when unknown."""
        return int(self._labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        """No boxes, ``[0, 4]``."""
        del index
        return np.zeros((0, 4), np.int32)


def expand_braces(text: str) -> list[str]:
    """Every text that braces stand for, as the shell has it.

    "a-{08..10}.tar" is a-08.tar, a-09.tar and a-10.tar (numbers keep the leading zeros of the
    first), "{x,y}.tar" is x.tar and y.tar.
    """
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        low, high = int(span[1]), int(span[2])
        choices = [f"{k:0{len(span[1])}d}" for k in range(low, high + 1)]
    else:
        choices = found[1].split(",")
    start, end = text[: found.start()], text[found.end() :]
    return [inner for choice in choices for inner in expand_braces(f"{start}{choice}{end}")]


def _shards(spec: str) -> list[Path]:
    if remote.is_url(spec):
        raise ValueError(
            f"webdataset: expected tar files of this machine, got {spec}; copy the shards first"
        )
    if Path(spec).is_dir():
        spec = f"{spec}/*.tar"
    shards = []
    for name in expand_braces(spec):
        names = sorted(glob(name)) if remote.has_magic(name) else [name]
        missing = [name for name in names if not os.path.isfile(name)]
        if missing or not names:
            absent = missing[0] if names else name
            raise FileNotFoundError(f"webdataset: expected the shard {absent}, got no such file")
        shards += names
    return [Path(name) for name in shards]


def _samples(shard: Path) -> Iterator[_Sample]:
    """The samples of a shard that have an image."""
    key, image, label = "", None, -1
    for member in members(shard):
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not (stem and dot):
            continue
        if folder + slash + stem != key:
            if image is not None:
                yield _Sample(image, label)
            key, image, label = folder + slash + stem, None, -1
        if ending == _LABEL:
            label = _number(shard, member)
        elif image is None and f".{ending.lower()}" in EXTENSIONS:
            image = member
    if image is not None:
        yield _Sample(image, label)


def _number(shard: Path, member: Member) -> int:
    text = member.small.strip()
    if not re.fullmatch(rb"-?\d+", text):
        raise ValueError(
            f"webdataset: expected the number of a class in {member.name} of {shard}, got {text!r}"
        )
    return int(text)
