"""Image files to pixels: one rule for every kind of file, one clear error for every broken one.

| file | rule |
|---|---|
| EXIF orientation | applied: the array is the upright picture |
| grey, palette, CMYK, YCbCr, LAB, one bit | converted to RGB by Pillow, colour profiles ignored |
| 16 bits a channel | the upper 8 (grey rounded to nearest) |
| floating point | [0, 1] when no value exceeds 1, else [0, 255]; rounded, clipped |
| alpha, transparent palette entries | composited on white |
| animated, several pages | the first frame |
| truncated, unreadable, not an image, larger than `PIL.Image.MAX_IMAGE_PIXELS` | `DecodeError` |

Pillow is the reference and the fallback that always works. `casm_fast.data.decoders` has a faster
`Decoder` for JPEG files; sources take any function of that signature.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Decoder = Callable[[Path], NDArray[np.uint8]]
"""A file's path to ``[H, W, 3]`` uint8 RGB, upright; raises `DecodeError`."""

ContentDecoder = Callable[[bytes, str], NDArray[np.uint8]]
"""The same of a file's content, and of what an error calls it."""

# What Pillow's readers raise on bad data, besides its own DecompressionBomb classes.
_BAD_DATA = (
    OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError, OverflowError,
    MemoryError, RuntimeError, AttributeError, struct.error, zlib.error,
)  # fmt: skip

DRAFT_GAP = 2
"""Times the size that is wanted that a drafted picture has at least: the rest of the way down is
bilinear with antialiasing, like all of it without a draft."""

_ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


class DecodeError(ValueError):
    """A file is not a picture that can be read; the message names it and says why."""


class Reduced(np.ndarray[Any, np.dtype[np.uint8]]):
    """Pixels ``[h, w, 3]`` of a picture that was decoded at a fraction of its size.

    Attributes:
        full_size: (height, width) of the picture, upright.
        extent: (x0, y0, x1, y1) of the picture in these pixels: the last ones along a side may
            stand for less than the others.
    """

    full_size: tuple[int, int]
    extent: tuple[float, float, float, float]


def size_of(image: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width) of a picture, also where its pixels are fewer."""
    return image.full_size if isinstance(image, Reduced) else image.shape[:2]


def decode(path: Path) -> NDArray[np.uint8]:
    """Reads an image file; see the module for the rules.

    Args:
        path: The file.

    Returns:
        ``[H, W, 3]`` uint8 RGB.

    Raises:
        DecodeError: The file is missing, truncated, too large or no image.
    """
    return decode_bytes(read_file(path), str(path))


def read_file(path: Path) -> bytes:
    """The content of a file; raises `DecodeError` when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DecodeError(f"cannot read {path}: {error.strerror or error}") from error


def decode_bytes(
    data: bytes,
    name: str,
    jpeg: Callable[[bytes], NDArray[np.uint8]] | None = None,
    draft: int | None = None,
) -> NDArray[np.uint8]:
    """Decodes an image file that is already in memory.

    Args:
        data: The file's content.
        name: What an error calls it.
        jpeg: Decodes upright 8-bit grey or RGB JPEG files in Pillow's stead, ``[H, W, 3]``; Pillow
            decodes what it refuses with a RuntimeError, so that errors are Pillow's too.
        draft: Shorter side that the picture will be scaled down to. JPEG files at least
            2 `DRAFT_GAP` times as large are decoded at a fraction of their size, by Pillow.

    Returns:
        ``[H, W, 3]`` uint8 RGB; a `Reduced` one where fewer pixels were decoded.

    Raises:
        DecodeError: The data is truncated, too large or no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.width * image.height
            limit = Image.MAX_IMAGE_PIXELS
            if limit is None or pixels <= limit:
                least = 0 if draft is None else DRAFT_GAP * draft
                if least and image.format in ("JPEG", "MPO") and min(image.size) >= 2 * least:
                    return _reduced(image, least)
                if jpeg is not None and _is_plain_jpeg(image):
                    with contextlib.suppress(RuntimeError):
                        return jpeg(data)
                return _upright_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(
            f"cannot decode {name}: it has more than PIL.Image.MAX_IMAGE_PIXELS pixels "
            f"({Image.MAX_IMAGE_PIXELS}); raise that limit if the file is trusted"
        ) from error
    except UnidentifiedImageError as error:
        reason = "it is empty" if not data else "it is not an image of a known format"
        raise DecodeError(f"cannot decode {name}: {reason}") from error
    except _BAD_DATA as error:
        raise DecodeError(f"cannot decode {name}: {error or type(error).__name__}") from error
    raise DecodeError(
        f"cannot decode {name}: it has {pixels} pixels, more than PIL.Image.MAX_IMAGE_PIXELS "
        f"({limit}); raise that limit if the file is trusted"
    )


def _reduced(image: Image.Image, least: int) -> NDArray[np.uint8]:
    """A JPEG file at 1/2, 1/4 or 1/8 of its size, no side below `least`."""
    size, orientation = image.size, image.getexif().get(_ORIENTATION, 1)
    image.draft(None, (least, least))
    fraction = round(size[0] / image.width)
    pixels = _upright_rgb(image).view(Reduced)
    width, height = size[::-1] if orientation in (5, 6, 7, 8) else size
    w, h = width / fraction, height / fraction
    # What ended a row or column in the file begins it in a picture that is turned so.
    x = pixels.shape[1] - w if orientation in (2, 3, 6, 7) else 0.0
    y = pixels.shape[0] - h if orientation in (3, 4, 7, 8) else 0.0
    pixels.full_size, pixels.extent = (height, width), (x, y, x + w, y + h)
    return pixels


def _upright_rgb(image: Image.Image) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _eight_bits(image)
    if _is_turned(image):
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    # A conversion to the mode that it has would copy the picture.
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)


def _is_plain_jpeg(image: Image.Image) -> bool:
    """Whether decoding a file is all that there is to do; reads nothing but its header.

    CMYK is left to Pillow, which alone asks whether its values are inverted.
    """
    return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and not _is_turned(image)


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF or XMP say that the pixels lie otherwise than the picture is seen."""
    return image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of more than 8 bits, which Pillow's own conversion would clip at 255."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        scale = 255.0 if np.nanmax(values, initial=0.0) <= 1 else 1.0
        values = np.nan_to_num(values, nan=0.0) * scale
    else:
        values = values / 257  # 65535 -> 255
    grey = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key == "exif"}
    return grey
