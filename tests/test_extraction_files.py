"""A tree with every kind of file, whole and broken: each is a row by its rule in data/decoding.py.

The model's saliency is the red channel, so that a row's mean saliency tells how its file was read.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_extraction import Painted

from casm_fast.extraction import Extraction, extract

SIDES = (40, 30)  # width, height
SIZE = 32

Expected = tuple[int, int, float]  # height, width, red of 0 to 255


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def solid(mode: str, colour: Any, size: tuple[int, int] = SIDES) -> Image.Image:
    return Image.new(mode, size, colour)


def halves(left: int, right: int) -> Image.Image:
    """A red picture, darker on one side."""
    pixels = np.zeros((SIDES[1], SIDES[0], 3), np.uint8)
    pixels[:, : SIDES[0] // 2, 0] = left
    pixels[:, SIDES[0] // 2 :, 0] = right
    return Image.fromarray(pixels)


def palette(**options: Any) -> bytes:
    image = Image.new("P", SIDES, 1)
    image.putpalette([0, 0, 0, 120, 5, 5])
    return encoded(image, **options)


def turned() -> bytes:
    """Stored lying; its upright form is 40 pixels high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(solid("RGB", (90, 0, 0)), "JPEG", quality=95, exif=exif)


def whole_files() -> dict[str, tuple[bytes, Expected]]:
    w, h = SIDES
    sixteen = Image.fromarray(np.full((h, w), 25700, np.uint16))  # 100 * 257
    frames = [solid("RGB", (200, 0, 0)), solid("RGB", (10, 0, 0))]
    return {
        "alpha.png": (encoded(solid("RGBA", (0, 0, 0, 0))), (h, w, 255)),
        "animated.gif": (
            encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), (h, w, 200),
        ),
        "animated.webp": (
            encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
            (h, w, 200),
        ),
        "cmyk.jpg": (encoded(solid("CMYK", (255, 0, 0, 0)), "JPEG", quality=95), (h, w, 0)),
        "exif.jpg": (turned(), (w, h, 90)),
        "grey.jpg": (encoded(solid("L", 100), "JPEG", quality=95), (h, w, 100)),
        "grey-alpha.png": (encoded(solid("LA", (0, 128))), (h, w, 127)),
        "one-bit.png": (encoded(solid("1", 1)), (h, w, 255)),
        "one-pixel.png": (encoded(solid("RGB", (77, 0, 0), (1, 1))), (1, 1, 77)),
        "pages.tiff": (
            encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), (h, w, 200),
        ),
        "palette.png": (palette(), (h, w, 120)),
        "palette-transparent.png": (palette(transparency=1), (h, w, 255)),
        "plain.bmp": (encoded(solid("RGB", (60, 0, 0)), "BMP"), (h, w, 60)),
        "sixteen.png": (encoded(sixteen), (h, w, 100)),
        "strip.png": (encoded(solid("RGB", (50, 0, 0), (9000, 1))), (1, 9000, 50)),
        "wrong-name.png": (encoded(solid("RGB", (30, 0, 0)), "JPEG", quality=95), (h, w, 30)),
    }  # fmt: skip


def broken_files() -> dict[str, tuple[bytes, str]]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise)
    return {
        "empty.jpg": (b"", "it is empty"),
        "text.jpg": (b"<html>404 not found</html>", "it is not an image of a known format"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "image file is truncated"),
        "truncated.png": (png[: len(png) // 2], "image file is truncated"),
        "header.jpg": (jpeg[:30], ""),
        "huge.png": (encoded(solid("L", 1, (401, 401))), "it has 160801 pixels, more than"),
    }  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 400)
    folder = tmp_path / "tree"
    folder.mkdir()
    for name, (content, _) in {**whole_files(), **broken_files()}.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return folder


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decoder", ["pillow", "auto"])
@pytest.mark.parametrize("workers", [0, 3])
def test_every_kind_of_file_is_a_row(
    tree: Path, decoder: str, workers: int, tmp_path: Path
) -> None:
    made: Extraction = extract(
        Painted(), f"folder:{tree}", tmp_path / "out",
        decoder=decoder, workers=workers, batch_size=5, part_images=5,
    )  # fmt: skip
    rows = {Path(row["image_id"]).name: row for row in made.table.to_pylist()}
    whole, broken = whole_files(), broken_files()
    assert set(rows) >= set(whole) | set(broken)
    for name, (_, (height, width, red)) in whole.items():
        row = rows[name]
        assert row["error"] is None, name
        assert (row["height"], row["width"]) == (height, width), name
        # JPEG at quality 95 is off by 2 at most here, everything else is exact.
        assert row["mean_saliency"] * 255 == pytest.approx(
            red, abs=2.1 if ".jpg" in name else 1e-3
        ), name
        assert [row[c] for c in ("net_x0", "net_y0", "net_x1", "net_y1")] == [0, 0, SIZE, SIZE]
    for name, (_, reason) in broken.items():
        error = rows[name]["error"]
        assert error.startswith(f"cannot decode {tree / name}: "), error
        assert reason in error
        assert rows[name]["height"] is None
    strangers = set(rows) - set(whole) - set(broken)
    assert all(rows[name]["error"].startswith("cannot read") for name in strangers)
    assert made.errors == len(broken) + len(strangers)


def test_an_upright_box_of_a_turned_file(tmp_path: Path) -> None:
    """The box of the bright half lies where the picture is seen, not where its bytes lie."""
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a.png").write_bytes(encoded(halves(200, 10), exif=exif))
    (tmp_path / "tree/b.png").write_bytes(encoded(halves(200, 10)))
    rows = extract(Painted(), f"folder:{tmp_path / 'tree'}", resize_policy="squash").table
    left, right = (row for row in reversed(rows.to_pylist()))
    assert (left["x0"], left["x1"]) == (0, 20)
    assert (right["x0"], right["x1"]) == (20, 40)
