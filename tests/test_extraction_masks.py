"""Saliency maps beside the rows: the network's own, one per row, there before the rows are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_extraction_output import IMAGES, Watched, fail, run

from casm_fast.data import parts
from casm_fast.extraction import ExtractConfig
from casm_fast.extraction.masks import picture_file


def expected(source: Watched) -> np.ndarray:
    """The red channel in cells, NaN for the image that cannot be read."""
    maps = source.pictures[:, ::4, ::4, 0].astype(np.float32) / 255
    maps[list(source.broken)] = np.nan
    return maps


def arrays(folder: Path) -> list[np.ndarray]:
    names = sorted(path.name for path in folder.glob("masks-*.npy"))
    assert names == [
        part.path.name.replace("part-", "masks-").replace(".parquet", ".npy")
        for part in parts.listed(folder)
    ]
    return [np.load(folder / name, mmap_mode="r") for name in names]


def test_an_array_per_part(tmp_path: Path) -> None:
    run(Watched(), tmp_path / "out", masks="npy")
    loaded = arrays(tmp_path / "out")
    assert [len(one) for one in loaded] == [4, 4, 4, 4, 4, 3]
    assert all(isinstance(one, np.memmap) and one.dtype == np.float16 for one in loaded)
    np.testing.assert_array_equal(np.concatenate(loaded), expected(Watched()).astype(np.float16))


def test_a_picture_per_image(tmp_path: Path) -> None:
    source = Watched(broken=(6, 7))  # all of a batch
    run(source, tmp_path / "out", masks="png")
    whole = expected(source)
    for place in range(IMAGES):
        path = picture_file(tmp_path / "out", place)
        assert path.exists() == (place not in (6, 7))
        if path.exists():
            drawn = np.asarray(Image.open(path))
            np.testing.assert_array_equal(drawn, np.rint(whole[place] * 255))
    assert picture_file(Path("out"), 12345) == Path("out/masks/000012/000012345.png")


def test_maps_of_nothing_but_errors_are_there_too(tmp_path: Path) -> None:
    run(Watched(broken=range(IMAGES)), tmp_path / "none", masks="npy")
    assert arrays(tmp_path / "none")[0].shape == (4, 0, 0)
    run(Watched(broken=(0, 1)), tmp_path / "some", masks="npy")
    first = arrays(tmp_path / "some")[0]
    assert np.isnan(first[:2]).all()
    assert np.isfinite(first[2:]).all()


def test_maps_survive_what_rows_survive(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        run(Watched(13, fail), out, masks="npy")
    lonely = parts.masks_file(out, 12, 14)  # killed between the two files
    lonely.write_bytes(b"maps of a part that was not to be")
    parts.listed(out)[1].path.write_bytes(b"damaged")
    run(Watched(), out, masks="npy", part_images=3)
    whole = np.concatenate(arrays(out))
    np.testing.assert_array_equal(whole, expected(Watched()).astype(np.float16))
    with pytest.raises(ValueError, match="with masks 'npy' instead of 'off'; give another output"):
        run(Watched(), out)


def test_where_maps_cannot_be_kept(tmp_path: Path) -> None:
    for output, got in ((None, "None"), (tmp_path / "a.parquet", str(tmp_path / "a.parquet"))):
        with pytest.raises(ValueError) as caught:
            run(Watched(), output, masks="npy")
        assert str(caught.value) == (
            f"masks: expected a folder as output to keep them in, got {got}"
        )
    message = "masks: expected off with the engine ray, which brings back rows alone, got 'png'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExtractConfig(masks="png", engine="ray")
    with pytest.raises(ValueError, match=r"^masks: expected one of off, npy, png, got 'gif'$"):
        ExtractConfig(masks="gif")  # type: ignore[arg-type]
