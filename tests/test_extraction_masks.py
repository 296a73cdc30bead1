"""Maps beside the rows, the network's own, there before the rows are; masks in the rows."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from test_extraction_output import IMAGES, Watched, fail, run

import casm_fast
from casm_fast import ops
from casm_fast.data import parts, predictions
from casm_fast.data.geometry import geometry
from casm_fast.data.predictions import Convention
from casm_fast.extraction import ExtractConfig
from casm_fast.extraction.maps import picture_file
from casm_fast.extraction.masks import boxed, run_lengths

# pycocotools' own.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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
    with pytest.raises(ValueError, match=r"^masks: expected one of off, npy, png, rle, got 'gif'$"):
        ExtractConfig(masks="gif")  # type: ignore[arg-type]


# --- run lengths ----------------------------------------------------------------------------------


def tight(mask: np.ndarray) -> list[int]:
    """The extent of what is set."""
    if not mask.any():
        return [0, 0, 0, 0]
    y, x = np.nonzero(mask)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("component", ["largest", "all"])
@pytest.mark.parametrize(("rule", "alpha"), [
    ("mean", 1.0), ("mean", 1e9), ("area", 1.0), ("value", 0.5), ("value", 0.0), ("energy", 0.9),
])  # fmt: skip
def test_what_a_box_is_drawn_around(
    rule: str, alpha: float, component: str, connectivity: Literal[4, 8]
) -> None:
    """Few levels, so that many pixels are equal; not a number here and there; two of one size."""
    chance = torch.Generator().manual_seed(3)
    maps = (torch.rand(64, 1, 9, 7, generator=chance) * 5).round() / 5
    maps[::8, 0, 2] = torch.nan
    maps[1] = 0.25
    maps[2] = torch.nan
    maps[3], maps[3, 0, 1:3, 1:3], maps[3, 0, 5:7, 3:5] = 0, 1, 1
    convention = Convention(36, "crop", rule, alpha, component, connectivity)
    found = boxed(maps, convention)
    boxes, area = ops.mask_boxes(
        maps, rule=rule, alpha=alpha, component=component, connectivity=connectivity
    )
    assert [tight(one) for one in found[:, 0].numpy()] == boxes.tolist()
    assert found.sum((1, 2, 3)).tolist() == area.tolist()
    for one, kept in zip(found[:, 0].numpy(), maps[:, 0].numpy(), strict=True):
        if component == "largest":  # SciPy sees one component
            shape = np.ones((3, 3)) if connectivity == 8 else None
            assert ndimage.label(one, shape)[1] <= 1
        if one.any():  # and nothing that is higher was left out but other components
            lowest = kept[one].min()
            assert component == "largest" or not (kept[~one] >= lowest).any()


@pytest.mark.parametrize("policy", ["crop", "squash"])
def test_run_lengths_are_of_the_original_pixels(policy: Literal["crop", "squash"]) -> None:
    """Pixel by pixel: the cell at its centre, nothing beyond the crop; read by pycocotools."""
    codec = pytest.importorskip("pycocotools.mask", reason="needs casm_fast[eval]")
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 2, (3, 8, 8), np.uint8)
    places = [geometry(*size, 32, policy) for size in ((32, 32), (50, 37), (21, 90))]
    for counts, cells, where in zip(run_lengths(maps, places, 32), maps, places, strict=True):
        mask = codec.decode({"size": [where.height, where.width], "counts": counts})
        assert mask.shape == (where.height, where.width)
        for y, x in np.ndindex(*mask.shape):
            v = math.floor((y + 0.5) * where.scale_y - where.offset_y)
            u = math.floor((x + 0.5) * where.scale_x - where.offset_x)
            inside = 0 <= v < 32 and 0 <= u < 32
            assert mask[y, x] == (cells[v // 4, u // 4] if inside else 0)


@pytest.mark.parametrize("name", ["out", "boxes.parquet"])
def test_masks_in_the_rows(name: str, tmp_path: Path) -> None:
    codec = pytest.importorskip("pycocotools.mask", reason="needs casm_fast[eval]")
    plain = run(Watched(), None).table
    made = run(Watched(), tmp_path / name, masks="rle")
    assert made.table.drop_columns("rle").to_pylist() == plain.to_pylist()
    assert run(Watched(), None, masks="rle").table["rle"].equals(made.table["rle"])
    for row in made.table.to_pylist():
        assert (row["rle"] is None) == (row["error"] is not None)
        if row["rle"]:
            mask = codec.decode({"size": [row["height"], row["width"]], "counts": row["rle"]})
            assert tight(mask) == [row[corner] for corner in ("x0", "y0", "x1", "y1")]
            assert mask.sum() == row["area"]
    results = casm_fast.export(tmp_path / name, tmp_path / "results.json", to="coco")[0]
    exported = json.loads(results.read_text())
    masks = [row["rle"] for row in made.table.to_pylist() if row["rle"]]
    assert [one["segmentation"]["counts"] for one in exported] == masks
    coco = pytest.importorskip("pycocotools.coco")
    loaded = coco.COCO(tmp_path / "results.instances.json").loadRes(str(results))
    for one in loaded.dataset["annotations"]:
        x, y, width, height = one["bbox"]
        assert tight(loaded.annToMask(one)) == [x, y, x + width, y + height]


def test_shards_with_and_without_masks_do_not_mix(tmp_path: Path) -> None:
    run(Watched(), tmp_path / "boxes.parquet", masks="rle", shard="1/2")
    run(Watched(), tmp_path / "boxes.parquet", shard="2/2")
    message = "expected parts that agree, got some without masks"
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}.*: {message}$"):
        predictions.read(tmp_path / "boxes.parquet")


def test_without_pycocotools_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = (
        "masks: expected pycocotools, which encodes run lengths, but it is not installed: "
        "pip install 'casm_fast[eval]'"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        ExtractConfig(masks="rle")
