"""Images by their paths: a pattern, a list, a folder behind a URL.

The paths lie in a file (`casm_fast.data.lines`), not in memory, so that a set may have millions.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from casm_fast.data import remote
from casm_fast.data.decoding import ContentDecoder, Decoder, decode, decode_bytes
from casm_fast.data.lines import Lines
from casm_fast.data.listing import is_image

logger = logging.getLogger(__name__)

STDIN = "-"

_NO_BOXES = np.zeros((0, 4), np.int32)


class PathSource:
    """An `ImageSource` of files that are named one by one.

    Attributes:
        name: The spec that opens it again.
        classes: Class names by label; () when unknown.
        has_boxes: Whether images come with boxes.
        files: Paths or URLs; where they are relative, to ``base``.
        base: A folder or URL; "" for the current folder.
        found: A sentence about what was found, and what is missing.
    """

    has_boxes = False

    def __init__(
        self,
        name: str,
        files: Lines,
        base: str = "",
        *,
        found: str,
        classes: Sequence[str] = (),
        labels: NDArray[np.int32] | None = None,
        decoder: Decoder = decode,
        content_decoder: ContentDecoder = decode_bytes,
    ) -> None:
        """Takes what was listed.

        Args:
            name: See the class.
            files: See the class.
            base: See the class.
            found: See the class.
            classes: See the class.
            labels: ``[n]``, -1 where unknown; None: all are.
            decoder: Reads one file.
            content_decoder: Reads what a URL gave.
        """
        self.name, self.files, self.base, self.found = name, files, base, found
        self.classes = tuple(classes)
        self._labels = labels
        self._decoder, self._content_decoder = decoder, content_decoder
        logger.info("%s", found)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def image_id(self, index: int) -> str:
        """The path as it was listed."""
        return self.files[index]

    def address(self, index: int) -> str:
        """Path or URL of the file."""
        file = self.files[index]
        if not self.base or remote.is_url(file) or file.startswith("/"):
            return file
        return f"{self.base}/{file}"

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB; raises `DecodeError`."""
        address = self.address(index)
        if remote.is_url(address):
            return self._content_decoder(remote.read(address), address)
        return self._decoder(Path(address))

    def label(self, index: int) -> int:
        """The class, -1 when unknown."""
        return -1 if self._labels is None else int(self._labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        """No boxes, ``[0, 4]``."""
        del index
        return _NO_BOXES


def open_glob(
    pattern: str, *, decoder: Decoder = decode, content_decoder: ContentDecoder = decode_bytes
) -> PathSource:
    """Image files that a pattern names, in the order of their paths, without classes.

    Args:
        pattern: ``*``, ``?`` and ``[…]`` within a name, ``**`` for any folders; a path or a URL.
        decoder: Reads one file.
        content_decoder: Reads what a URL gave.

    Raises:
        FileNotFoundError: It names no image file.
    """
    # Paths are told from the folder that all of them share.
    fixed = pattern[: min(pattern.index(sign) for sign in "*?[" if sign in pattern)]
    base, slash, _ = fixed.rpartition("/")
    if remote.is_url(pattern):
        base = remote.canonical(base)
        names = sorted(url.removeprefix(f"{base}/") for url in remote.image_urls(pattern))
    else:
        root = base + slash
        every = glob.iglob(pattern, recursive=True)
        names = sorted(
            path[len(root) :]
            for path in every
            if is_image(os.path.basename(path)) and os.path.isfile(path)
        )
        base = base or slash
    if not names:
        raise FileNotFoundError(
            f"open_source: expected image files that {pattern} names, got none; quote the pattern "
            "for the shell, and write ** for any folders"
        )
    found = f"glob: {len(names):,} images that {pattern} names; missing: labels and boxes"
    return PathSource(
        pattern,
        Lines.spooled(names),
        base,
        found=found,
        decoder=decoder,
        content_decoder=content_decoder,
    )


def open_list(
    file: str, *, decoder: Decoder = decode, content_decoder: ContentDecoder = decode_bytes
) -> PathSource:
    """Images that a text file lists, a path or URL a line, in this order.

    A path that is relative starts at the folder of the list; on standard input, at the current one.
    Nothing is looked at before it is read: a path that leads nowhere becomes the error of its
    image.

    Args:
        file: The list, a path or URL; "-" for standard input, which is read once.
        decoder: Reads one file.
        content_decoder: Reads what a URL gave.

    Raises:
        FileNotFoundError: There is no such list.
        ValueError: It names nothing.
    """
    if file == STDIN:
        files, base, what = Lines.copied(sys.stdin.buffer), "", "standard input"
    elif remote.is_url(file):
        files, base, what = Lines.copied([remote.read(file)]), remote.parent(file), file
    elif Path(file).is_file():
        files, base, what = Lines.of_file(Path(file)), os.path.dirname(file), file
    else:
        raise FileNotFoundError(
            f"open_source: there is no list {file}; give a text file with a path a line, or - for "
            "standard input"
        )
    if not len(files):
        raise ValueError(f"list: expected a path a line in {what}, got none")
    found = f"list: {len(files):,} paths in {what}; missing: labels and boxes"
    return PathSource(
        f"list:{file}", files, base, found=found, decoder=decoder, content_decoder=content_decoder
    )


def open_url(
    url: str, *, decoder: Decoder = decode, content_decoder: ContentDecoder = decode_bytes
) -> PathSource:
    """Images behind a URL: a file, or a folder as `FolderSource` takes one.

    Subfolders are classes, unless images lie in the folder itself.

    Args:
        url: Such as "s3://bucket/photos" or "hf://datasets/owner/name/data".
        decoder: Reads one file.
        content_decoder: Reads what a URL gave.

    Raises:
        FileNotFoundError: There is nothing, or no image.
        ImportError: fsspec, or what it needs for the protocol, is not installed.
    """
    url = url.rstrip("/")
    root = remote.canonical(url)
    single = remote.is_file(url)
    if single:
        root = remote.parent(root)
    names = sorted(
        [url.rpartition("/")[2]]
        if single
        else (image.removeprefix(f"{root}/") for image in remote.image_urls(url))
    )
    if not names:
        raise FileNotFoundError(f"open_source: expected image files in {url}, got none")
    labels, classes = None, ()
    flat = any("/" not in name for name in names)
    if not flat:
        tops = [name.partition("/")[0] for name in names]
        known, numbers = np.unique(tops, return_inverse=True)
        classes, labels = tuple(known.tolist()), numbers.astype(np.int32)
    kind = "without classes" if flat else f"of {len(classes):,} classes in folders"
    missing = "labels and boxes" if flat else "boxes"
    found = f"url: {len(names):,} images in {url}, {kind}; missing: {missing}"
    return PathSource(
        url,
        Lines.spooled(names),
        root,
        found=found,
        classes=classes,
        labels=labels,
        decoder=decoder,
        content_decoder=content_decoder,
    )
