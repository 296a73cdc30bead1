"""Files behind URLs such as s3://, gs://, hf:// and memory://, by fsspec (extra ``remote``).

fsspec knows the protocols and names the package that each needs: s3fs for s3://, gcsfs for gs://;
hf:// comes with huggingface_hub. Credentials are those that these packages find.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

from casm_fast.data.decoding import DecodeError
from casm_fast.data.listing import is_image

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(text: str) -> bool:
    """Whether a text begins as "s3://" does."""
    return _URL.match(text) is not None


def canonical(url: str) -> str:
    """A URL as the file system writes it, so that what it lists begins with it; without a slash."""
    filesystem, path = open_filesystem(url)
    return str(filesystem.unstrip_protocol(path)).rstrip("/")


def parent(url: str) -> str:
    """The folder that a URL lies in."""
    return url.rpartition("/")[0]


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it.

    Raises:
        ImportError: fsspec, or what it needs for the protocol, is not installed.
        ValueError: An unknown protocol.
    """
    if importlib.util.find_spec("fsspec") is None:
        raise ImportError(
            f"{url}: expected fsspec to read URLs, but it is not installed: "
            "pip install 'casm_fast[remote]'"
        )
    try:
        filesystem, path = importlib.import_module("fsspec.core").url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url}: cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url}: expected a protocol that fsspec knows: {error}") from error
    return filesystem, path


def read(url: str) -> bytes:
    """The content of a file.

    Raises:
        DecodeError: It cannot be read, for whatever reason the protocol has.
    """
    filesystem, path = open_filesystem(url)
    try:
        content: bytes = filesystem.cat_file(path)
    except Exception as error:  # each protocol has its own
        reason = str(error) or type(error).__name__
        raise DecodeError(f"cannot read {url}: {reason}") from error
    return content


def image_urls(url: str) -> Iterator[str]:
    """URLs of the image files in a folder and below it, or that a pattern names; in no order.

    Args:
        url: A folder, or a pattern with ``*``, ``?`` or ``[``; ``**`` stands for any folders.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    filesystem, path = open_filesystem(url)
    names = filesystem.glob(path) if has_magic(url) else filesystem.find(path)
    for name in names:
        if is_image(name.rpartition("/")[2]):
            yield filesystem.unstrip_protocol(name)


def is_file(url: str) -> bool:
    """Whether a URL names a file and no folder."""
    filesystem, path = open_filesystem(url)
    return bool(filesystem.isfile(path))


def has_magic(pattern: str) -> bool:
    """Whether a pattern stands for several names."""
    return any(sign in pattern for sign in "*?[")
