"""TorchCodec against Pillow: the same pixels, the same rules, the same errors; and the choice."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casm_fast.data import DecodeError, decode, decode_bytes, decoders, open_source
from casm_fast.data.decoders import choose_decoder, decode_with_torchcodec, describe_decoder

ABSENT = decoders._why_not_loaded()
needs_torchcodec = pytest.mark.skipif(bool(ABSENT), reason=ABSENT)


def fast_bytes(data: bytes) -> np.ndarray:
    return decode_bytes(data, "x", decoders._decode_jpeg)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Colours that change within a few pixels: chroma up-sampling shows in every one of them."""
    noise = np.random.default_rng(seed).integers(0, 256, (-(-height // 3), -(-width // 3), 3))
    coarse = Image.fromarray(noise.astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def never(monkeypatch):
    """TorchCodec must not be asked."""

    def refuse(data: bytes) -> np.ndarray:
        raise AssertionError("TorchCodec was asked for a file that is Pillow's")

    monkeypatch.setattr(decoders, "_decode_jpeg", refuse)


@needs_torchcodec
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [10, 75, 92, 100])
def test_pixels_are_those_of_pillow(subsampling, quality):
    # Not a pixel of 15 million differed in the builds that were compared; none may.
    for k, size in enumerate([(375, 500), (64, 64), (17, 31), (1, 1), (3, 200), (129, 7)]):
        data = encoded(picture(*size, seed=k), quality=quality, subsampling=subsampling)
        got = decoders._decode_jpeg(data)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, decode_bytes(data, "x"))


@needs_torchcodec
@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1},
                {"keep_rgb": True}, {"dpi": (300, 300)}], ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_every_kind_of_jpeg(options):
    data = encoded(picture(90, 70), **options)
    np.testing.assert_array_equal(decoders._decode_jpeg(data), decode_bytes(data, "x"))


@needs_torchcodec
def test_grey_is_repeated():
    data = encoded(picture(33, 20).convert("L"))
    got = decoders._decode_jpeg(data)
    np.testing.assert_array_equal(got, decode_bytes(data, "x"))
    np.testing.assert_array_equal(got[..., 0], got[..., 2])


@needs_torchcodec
def test_the_first_picture_of_several():
    data = encoded(picture(20, 30), "MPO", save_all=True, append_images=[picture(20, 30, seed=1)])
    np.testing.assert_array_equal(fast_bytes(data), decode_bytes(data, "x"))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_turned_files_are_pillow_s(orientation, never):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(40, 24), exif=exif)
    expected = decode_bytes(data, "x")
    assert expected.shape[:2] == ((24, 40) if orientation > 4 else (40, 24))
    np.testing.assert_array_equal(fast_bytes(data), expected)


def test_a_turn_that_only_xmp_tells_is_pillow_s(never):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(picture(40, 24), xmp=xmp)
    assert fast_bytes(data).shape == (24, 40, 3)


def test_cmyk_is_pillow_s(never):
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), quality=100)
    np.testing.assert_allclose(fast_bytes(data)[0, 0].astype(int), [0, 255, 255], atol=2)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_other_formats_are_pillow_s(kind, never):
    data = encoded(picture(12, 9), kind)
    np.testing.assert_array_equal(fast_bytes(data), decode_bytes(data, "x"))


@needs_torchcodec
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_give_the_same_picture_or_the_same_error():
    # Flipped, missing and cut bytes; measured on 12,000 such files: no difference.
    rng = np.random.default_rng(1)
    whole = [encoded(picture(40, 50), **o) for o in ({}, {"progressive": True}, {"subsampling": 0})]
    outcomes = {"picture": 0, "error": 0}
    for k in range(600):
        data = bytearray(whole[k % 3])
        if k % 4 == 0:
            data = data[: rng.integers(2, len(data))]
        elif k % 4 == 1:
            start = rng.integers(300, len(data) - 20)
            del data[start : start + rng.integers(1, 20)]
        else:
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(0, 256)
        try:
            expected, error = decode_bytes(bytes(data), "x"), ""
        except DecodeError as caught:
            expected, error = None, str(caught)
        if expected is None:
            with pytest.raises(DecodeError) as refused:
                fast_bytes(bytes(data))
            assert str(refused.value) == error
            outcomes["error"] += 1
        else:
            np.testing.assert_array_equal(fast_bytes(bytes(data)), expected)
            outcomes["picture"] += 1
    assert min(outcomes.values()) > 100


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_torchcodec_sees_them(monkeypatch, never):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DecodeError, match=r"^cannot decode x: it has 1200 pixels"):
        fast_bytes(encoded(picture(30, 40)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DecodeError) as caught:
        decode_with_torchcodec(tmp_path / "none.jpg")
    assert str(caught.value) == f"cannot read {tmp_path / 'none.jpg'}: No such file or directory"


# --- the choice -----------------------------------------------------------------------------------


@needs_torchcodec
def test_auto_is_torchcodec_where_it_agrees():
    assert decoders.why_not_torchcodec() == ""
    assert choose_decoder("auto") is decode_with_torchcodec
    assert describe_decoder("auto").startswith("torchcodec 0.")
    assert choose_decoder("pillow") is decode
    assert describe_decoder("pillow").startswith("pillow ")


@needs_torchcodec
def test_auto_stays_with_pillow_where_one_value_differs(monkeypatch):
    honest = decoders._decode_jpeg

    def other(data: bytes) -> np.ndarray:
        pixels = honest(data).copy()
        pixels[-1, -1, 2] ^= 1
        return pixels

    monkeypatch.setattr(decoders, "_decode_jpeg", other)
    monkeypatch.setattr(decoders, "why_not_torchcodec", decoders.why_not_torchcodec.__wrapped__)
    assert decoders.why_not_torchcodec() == "TorchCodec's pixels are not those of Pillow"
    assert choose_decoder("auto") is decode
    assert choose_decoder("torchcodec") is decode_with_torchcodec  # asked for by name


@needs_torchcodec
def test_sources_use_what_was_chosen(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(picture(20, 30)))
    expected = decode(path)
    asked = []
    honest = decoders._decode_jpeg
    monkeypatch.setattr(decoders, "_decode_jpeg", lambda data: asked.append(1) or honest(data))
    for decoder, times in (("pillow", 0), ("torchcodec", 1), ("auto", 2)):
        source = open_source(f"folder:{tmp_path}", decoder=decoder)
        np.testing.assert_array_equal(source.image(0), expected)
        assert len(asked) == times


def test_without_torchcodec(tmp_path: Path):
    """Pillow decodes; asking for TorchCodec by name is refused with what to install."""
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    program = (
        "import sys; sys.modules['torchcodec'] = None\n"
        "from casm_fast.data import choose_decoder, decode, open_source\n"
        "from casm_fast.data.decoders import why_not_torchcodec\n"
        "assert choose_decoder('auto') is decode\n"
        f"assert open_source({str(tmp_path)!r}).image(0).shape == (3, 4, 3)\n"
        "print(why_not_torchcodec())\n"
        "try: choose_decoder('torchcodec')\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "TorchCodec is not installed",
        "decoder: TorchCodec is not installed: pip install 'casm_fast[fast-io]', "
        "or choose the decoder pillow",
    ], run.stderr


def test_unknown_names_are_refused():
    with pytest.raises(ValueError) as caught:
        choose_decoder("turbo")  # type: ignore[arg-type]
    assert str(caught.value) == "decoder: expected one of auto, pillow, torchcodec, got 'turbo'"
