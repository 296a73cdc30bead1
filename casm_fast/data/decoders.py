"""What decodes JPEG files: Pillow, or TorchCodec (extra ``fast-io``) where the pixels are the same.

Both are built on libjpeg-turbo, and in the builds that were compared not a pixel differs;
TorchCodec is faster around it. That equality is not taken for granted: "auto" decodes a few
pictures with both, once a process, and stays with Pillow where they differ.

TorchCodec only ever decodes what needs nothing but decoding: grey and RGB JPEG files that lie
upright. Pillow reads the header of every file first, decodes every other kind (turned by EXIF,
CMYK, PNG, …), and decides about all that TorchCodec refuses, so that the rules and the errors of
`casm_fast.data.decoding` hold for both. (On a damaged file that is still readable libjpeg prints a
warning to the error stream when TorchCodec calls it.)
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from casm_fast.data import decoding
from casm_fast.data.decoding import ContentDecoder, Decoder

DecoderName = Literal["auto", "pillow", "torchcodec"]
"""What decodes JPEG files; "auto" is TorchCodec where it is installed and gives Pillow's pixels."""


def choose_decoder(name: DecoderName = "auto", draft: int | None = None) -> Decoder:
    """The function that reads image files.

    Args:
        name: "auto", "pillow" or "torchcodec".
        draft: Shorter side that pictures will be scaled down to, see `decoding.decode_bytes`.

    Returns:
        A function of a path, safe to call from several threads and to pickle.

    Raises:
        ImportError: TorchCodec is asked for and cannot be loaded.
        ValueError: Another name.
    """
    if draft is not None:
        return functools.partial(_read, choose_content_decoder(name, draft))
    return decode_with_torchcodec if _torchcodec_chosen(name) else decoding.decode


def _read(decoder: ContentDecoder, path: Path) -> NDArray[np.uint8]:
    return decoder(decoding.read_file(path), str(path))


def choose_content_decoder(name: DecoderName = "auto", draft: int | None = None) -> ContentDecoder:
    """The same for the content of image files that is in memory already.

    Args:
        name: As `choose_decoder`.
        draft: As `choose_decoder`.

    Returns:
        A function of the content and of what an error calls it.

    Raises:
        ImportError: TorchCodec is asked for and cannot be loaded.
        ValueError: Another name.
    """
    jpeg = _decode_jpeg if _torchcodec_chosen(name) else None
    return functools.partial(decoding.decode_bytes, jpeg=jpeg, draft=draft)


def describe_decoder(name: DecoderName = "auto") -> str:
    """What `choose_decoder` chooses, with its version, such as "torchcodec 0.17.0".

    Raises:
        ImportError: TorchCodec is asked for and cannot be loaded.
        ValueError: Another name.
    """
    chosen = "torchcodec" if _torchcodec_chosen(name) else "pillow"
    return f"{chosen} {importlib.metadata.version(chosen)}"


def decode_with_torchcodec(path: Path) -> NDArray[np.uint8]:
    """Reads an image file as `casm_fast.data.decode` does, plain JPEG files by TorchCodec.

    Args:
        path: The file.

    Returns:
        ``[H, W, 3]`` uint8 RGB.

    Raises:
        DecodeError: The file is missing, truncated, too large or no image.
    """
    return decoding.decode_bytes(decoding.read_file(path), str(path), _decode_jpeg)


@functools.cache
def why_not_torchcodec() -> str:
    """Why "auto" means Pillow on this machine, as a half-sentence; empty where it is TorchCodec."""
    reason = _why_not_loaded()
    if reason:
        return reason
    for data in _trial_pictures():
        expected = decoding.decode_bytes(data, "the trial picture")
        if not np.array_equal(_decode_jpeg(data), expected):
            return "TorchCodec's pixels are not those of Pillow"
    return ""


@functools.cache
def _why_not_loaded() -> str:
    if importlib.util.find_spec("torchcodec") is None:
        return "TorchCodec is not installed"
    try:
        import torchcodec.decoders
    except (ImportError, OSError, RuntimeError) as error:  # a library that does not fit this torch
        return f"TorchCodec cannot be loaded ({str(error).strip().partition(chr(10))[0]})"
    if not hasattr(torchcodec.decoders, "decode_jpeg"):
        version = importlib.metadata.version("torchcodec")
        return f"TorchCodec {version} does not decode images (0.16 and later do)"
    return ""


def _torchcodec_chosen(name: str) -> bool:
    if name not in get_args(DecoderName):
        known = ", ".join(get_args(DecoderName))
        raise ValueError(f"decoder: expected one of {known}, got {name!r}")
    if name == "torchcodec" and _why_not_loaded():
        raise ImportError(
            f"decoder: {_why_not_loaded()}: pip install 'casm_fast[fast-io]', "
            "or choose the decoder pillow"
        )
    return name == "torchcodec" or (name == "auto" and not why_not_torchcodec())


def _decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    from torchcodec.decoders import decode_jpeg

    # [3, H, W] is a view of rows of RGB pixels, so that nothing is copied here.
    pixels: NDArray[np.uint8] = decode_jpeg(data).permute(1, 2, 0).numpy()
    return pixels


def _trial_pictures() -> list[bytes]:
    """JPEG files with each way of storing colour, with sides that are no whole blocks."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    picture = coarse.resize((75, 53), Image.Resampling.BICUBIC)
    kinds: list[tuple[Image.Image, dict[str, Any]]] = [
        *((picture, {"quality": q, "subsampling": s}) for q in (60, 92) for s in (0, 1, 2)),
        (picture, {"progressive": True}),
        (picture.convert("L"), {}),
    ]
    files = []
    for image, options in kinds:
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
        files.append(file.getvalue())
    return files
