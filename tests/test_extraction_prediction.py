"""One photo gets the box of its row, and a picture that shows where."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_extraction import Painted, pictures

from casm_fast.data.decoding import DecodeError
from casm_fast.extraction import extract, predict
from casm_fast.models import checkpoint, fingerprint
from casm_fast.models.saliency import build_model


def photo(height: int = 40, width: int = 60) -> np.ndarray:
    """Dark, with one bright rectangle: x 24 to 40, y 10 to 30."""
    image = np.zeros((height, width, 3), np.uint8)
    image[10:30, 24:40] = (200, 90, 10)
    return image


@pytest.mark.parametrize("policy", ["crop", "squash"])
def test_the_box_and_the_classes_are_those_of_the_row(tmp_path: Path, policy: str) -> None:
    model = build_model("compact", classes=("cat", "dog", "owl"), input_size=32)
    before = fingerprint(model)
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    found = predict(model, tmp_path / "photo.png", resize_policy=policy, rule="area")
    (row,) = extract(
        model, str(tmp_path / "photo.png"), resize_policy=policy, rule="area"
    ).table.to_pylist()
    assert list(found.box) == [row[name] for name in ("x0", "y0", "x1", "y1")]
    assert [name for name, _ in found.classes] == [model.classes[k] for k in row["top5"]]
    assert found.classes[0][1] == pytest.approx(row["score"], abs=1e-6)
    assert sum(score for _, score in found.classes) == pytest.approx(1, abs=1e-6)
    assert found.saliency.mean() == pytest.approx(row["mean_saliency"], abs=1e-6)
    assert model.training
    assert fingerprint(model) == before
    file = checkpoint.save(model, tmp_path / "model.safetensors")
    again = predict(file, found.image, resize_policy=policy, rule="area", device="cpu")
    assert again.box == found.box


def test_every_pixel_has_the_saliency_of_the_cell_that_it_lies_in() -> None:
    found = predict(Painted(cell=4), photo(64, 96), resize_policy="crop")  # scaled by 1 / 2
    whole = found.full_saliency()
    assert whole.shape == (64, 96)
    for y in range(0, 64, 5):
        for x in range(96):
            if 16 <= x < 80:  # the square begins at 16 / 2 = 8 network pixels
                assert whole[y, x] == found.saliency[y // 8, (x - 16) // 8]
            else:
                assert np.isnan(whole[y, x])


def test_the_picture_shows_box_saliency_and_what_was_not_seen(tmp_path: Path) -> None:
    found = predict(Painted(cell=1), photo(32, 64), rule="value", alpha=0.5)
    assert found.box == (24, 10, 40, 30)
    path = found.save(tmp_path / "new" / "overlay.png")
    assert os.listdir(path.parent) == ["overlay.png"]
    drawn = np.asarray(Image.open(path))
    np.testing.assert_array_equal(drawn, found.overlay())
    assert drawn.shape == (32, 64, 3)
    edge = np.zeros((32, 64), bool)
    edge[10:30, 24:40] = True
    edge[11:29, 25:39] = False
    assert (drawn[edge] == (255, 157, 46)).all()
    assert not (drawn[~edge] == (255, 157, 46)).all(1).any()
    assert (drawn[:, :16] == 0).all()  # 0.35 of black
    # Inside, a quarter and half of 200/255 are inferno's colour there, the rest is the photo's.
    share = 0.25 + 0.5 * 200 / 255
    from matplotlib import colormaps

    colour = np.array(colormaps["inferno"](np.float32(200 / 255))[:3]) * 255
    expected = np.array([200, 90, 10]) * (1 - share) + colour * share
    np.testing.assert_allclose(drawn[20, 32], expected, atol=0.51)


def test_it_says_what_it_found() -> None:
    found = predict(Painted(cell=1), photo(32, 64), rule="value", alpha=0.5)
    assert re.fullmatch(
        r"photo: 64 x 32, box x 24 to 40, y 10 to 30 \(16% of the picture\); "
        r"a 37\.5%, b 32\.8%, c 29\.7%",
        str(found),
    )


def test_what_is_no_photo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DecodeError, match="it is empty"):
        predict(Painted(), tmp_path / "a.jpg")
    for wrong, got in (
        (pictures(2), "[2, 32, 32, 3] uint8"),
        (np.zeros((3, 3, 3)), "[3, 3, 3] float64"),
    ):
        with pytest.raises(ValueError) as caught:
            predict(Painted(), wrong)
        assert str(caught.value) == f"photo: expected a picture [H, W, 3] uint8, got {got}"
    with pytest.raises(ValueError, match="unknown file extension"):
        predict(Painted(), photo()).save(tmp_path / "x.unknown")
    assert os.listdir(tmp_path) == ["a.jpg"]
