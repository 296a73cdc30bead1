"""Decoding: every kind of file has its rule, every broken one its sentence."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from casm_fast.data import DecodeError, decode, decode_bytes
from casm_fast.data.decoding import Reduced, size_of
from casm_fast.data.transforms import resize


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)


def test_plain_png_is_exact(pixels, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    got = decode(path)
    assert got.dtype == np.uint8
    assert got.flags.writeable
    np.testing.assert_array_equal(got, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(pixels, orientation):
    # What each tag value says was done to the upright picture when it was stored (EXIF 2.3, 4.6.4
    # A).
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_bytes(data, "x"), pixels)


def test_grey_is_repeated(pixels):
    grey = pixels[..., 0]
    got = decode_bytes(encoded(Image.fromarray(grey), "PNG"), "x")
    np.testing.assert_array_equal(got, np.repeat(grey[..., None], 3, 2))


def test_one_bit():
    data = encoded(Image.fromarray(np.array([[True, False]])), "PNG")
    np.testing.assert_array_equal(decode_bytes(data, "x")[0, :, 0], [255, 0])


def test_palette():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    got = decode_bytes(encoded(image, "PNG"), "x")
    np.testing.assert_array_equal(got[0], [[10, 20, 30], [40, 50, 60], [70, 80, 90]])


def test_transparent_palette_entry_is_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    got = decode_bytes(encoded(image, "PNG", transparency=1), "x")
    np.testing.assert_array_equal(got[0], [[10, 20, 30], [255, 255, 255]])


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # pure cyan
    got = decode_bytes(encoded(image, "JPEG", quality=100), "x")
    np.testing.assert_allclose(got[0, 0].astype(int), [0, 255, 255], atol=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_range(kind):
    values = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    got = decode_bytes(encoded(Image.fromarray(values), kind), "x")
    np.testing.assert_array_equal(got[0, :, 0], np.rint(values[0] / 257))
    np.testing.assert_array_equal(got[..., 0], got[..., 2])


def test_sixteen_bit_grey_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(np.zeros((4, 9), np.uint16)), "PNG", exif=exif)
    assert decode_bytes(data, "x").shape == (9, 4, 3)


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 99.6, 300.0], [0, 100, 255])]
)
def test_floating_point(values, expected):
    data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    np.testing.assert_array_equal(decode_bytes(data, "x")[0, :, 1], expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode):
    levels = np.array([[0, 64, 128, 255]], np.uint8)
    colour = np.full_like(levels, 40)
    bands = [colour, colour, colour, levels] if mode == "RGBA" else [colour, levels]
    image = Image.merge(mode, [Image.fromarray(band) for band in bands])
    got = decode_bytes(encoded(image, "PNG"), "x")[0, :, 0]
    share = levels[0] / 255
    np.testing.assert_allclose(got, 40 * share + 255 * (1 - share), atol=1)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_several(kind):
    frames = [Image.new("RGB", (8, 6), c) for c in ((200, 0, 0), (0, 200, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    got = decode_bytes(data, "x")
    assert got.shape == (6, 8, 3)
    np.testing.assert_array_equal(got[0, 0], [200, 0, 0])


def test_one_pixel():
    assert decode_bytes(encoded(Image.new("RGB", (1, 1)), "JPEG"), "x").shape == (1, 1, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_truncated_files_are_named(kind, pixels, tmp_path):
    big = np.kron(pixels, np.ones((16, 16, 1), np.uint8))
    data = encoded(Image.fromarray(big), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    for share in (0.02, 0.3, 0.7):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DecodeError, match=r"cannot decode .*cut\.\w+: "):
            decode(path)


def test_messages(tmp_path):
    cases = {
        b"": "cannot decode f: it is empty",
        b"hello": "cannot decode f: it is not an image of a known format",
    }
    for data, message in cases.items():
        with pytest.raises(DecodeError) as caught:
            decode_bytes(data, "f")
        assert str(caught.value) == message
    with pytest.raises(DecodeError) as caught:
        decode(tmp_path / "none.jpg")
    assert str(caught.value) == f"cannot read {tmp_path / 'none.jpg'}: No such file or directory"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    data = encoded(Image.new("RGB", (40, 30)), "PNG")
    for limit, message in (
        (
            1000,
            "cannot decode f: it has 1200 pixels, more than PIL.Image.MAX_IMAGE_PIXELS (1000); "
            "raise that limit if the file is trusted",
        ),
        (
            500,  # less than half: Pillow itself refuses
            "cannot decode f: it has more than PIL.Image.MAX_IMAGE_PIXELS pixels (500); raise that "
            "limit if the file is trusted",
        ),
    ):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DecodeError) as caught:
            decode_bytes(data, "f")
        assert str(caught.value) == message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_bytes(data, "f").shape == (30, 40, 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_noise_never_escapes_as_another_error():
    # Flipped bytes in the middle of real files: either a picture or a DecodeError.
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    outcomes = set()
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        clean = encoded(picture, kind)
        for _ in range(60):
            data = bytearray(clean)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(0, 256)
            try:
                decode_bytes(bytes(data), "f")
                outcomes.add("picture")
            except DecodeError:
                outcomes.add("error")
    assert outcomes == {"picture", "error"}


# --- drafts ---------------------------------------------------------------------------------------


def photo(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (height // 50, width // 50, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("side", "fraction"), [(224, 1), (150, 2), (149, 2), (75, 4), (37, 8), (5, 8)]
)
def test_a_draft_leaves_twice_the_pixels_that_are_wanted(side: int, fraction: int) -> None:
    found = decode_bytes(encoded(photo(600, 801), "JPEG", quality=95), "photo", draft=side)
    assert found.shape == (-(-600 // fraction), -(-801 // fraction), 3)
    assert size_of(found) == (600, 801)
    assert isinstance(found, Reduced) == (fraction > 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(600, 800), (801, 600), (1203, 1200), (1207, 901)])
def test_a_draft_gives_the_square_of_the_whole(size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(*size), "JPEG", quality=95, exif=exif)
    whole, found = (decode_bytes(data, "photo", draft=draft) for draft in (None, 64))
    assert size_of(found) == whole.shape[:2]
    for policy in ("crop", "squash"):
        difference = np.abs(resize(whole, 64, policy).astype(int) - resize(found, 64, policy))
        # 0.47 and 3 measured; 2.4 and 15 where the last pixels count as whole ones.
        assert difference.mean() < 0.6
        assert difference.max() <= 4


def test_what_is_no_large_jpeg_is_decoded_whole() -> None:
    for data in (encoded(photo(600, 800), "PNG"), encoded(photo(200, 300), "JPEG", quality=95)):
        found = decode_bytes(data, "photo", draft=64)
        assert not isinstance(found, Reduced)
        np.testing.assert_array_equal(found, decode_bytes(data, "photo"))
    cmyk = decode_bytes(
        encoded(photo(600, 800).convert("CMYK"), "JPEG", quality=95), "photo", draft=64
    )
    assert cmyk.shape == (150, 200, 3)
    with pytest.raises(DecodeError, match=r"^cannot decode photo: .*truncated"):
        decode_bytes(encoded(photo(600, 800), "JPEG", quality=95)[:5000], "photo", draft=64)
