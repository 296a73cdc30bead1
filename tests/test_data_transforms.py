"""Pixels against torchvision, geometry against formulas, overlaps against a count of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as tv

from casm_fast.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    box_iou,
    centred_box,
    denormalize,
    geometry,
    iou,
    localisation_error,
    normalize,
    resize,
    transforms,
)
from casm_fast.data.localization import area
from casm_fast.data.transforms import crop_and_resize

SIDES = st.integers(1, 90)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height, width, 3), np.uint8
    )


@given(SIDES, SIDES, st.integers(1, 70))
def test_crop_equals_torchvision(height, width, size):
    image = noise(height, width)
    oracle = tv.Compose([tv.Resize(size), tv.CenterCrop(size)])(Image.fromarray(image))
    np.testing.assert_array_equal(resize(image, size, "crop"), np.asarray(oracle))


@given(SIDES, SIDES, st.integers(1, 70))
def test_squash_equals_torchvision(height, width, size):
    image = noise(height, width)
    oracle = tv.Resize((size, size))(Image.fromarray(image))
    np.testing.assert_array_equal(resize(image, size, "squash"), np.asarray(oracle))


def test_real_sizes_equal_torchvision():
    for height, width in ((375, 500), (500, 333), (224, 224), (225, 224), (1200, 70)):
        image = noise(height, width)
        oracle = tv.Compose([tv.Resize(224), tv.CenterCrop(224)])(Image.fromarray(image))
        np.testing.assert_array_equal(resize(image, 224), np.asarray(oracle))


def test_a_fitting_image_is_returned_as_it_is():
    image = noise(32, 32)
    assert resize(image, 32) is image


def test_crop_and_resize_equals_torchvision():
    image = noise(60, 80)
    oracle = tv.functional.resized_crop(Image.fromarray(image), 5, 9, 31, 44, [24, 24])
    np.testing.assert_array_equal(crop_and_resize(image, 5, 9, 31, 44, 24), np.asarray(oracle))


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_normalize_is_bitwise_torchvisions(layout):
    images = np.stack([noise(20, 21), noise(20, 21)[::-1]])
    to_tensor = tv.Compose([tv.ToTensor(), tv.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    oracle = torch.stack([to_tensor(Image.fromarray(image)) for image in images])
    given_images = torch.from_numpy(np.ascontiguousarray(images))
    if layout == "nchw":
        given_images = given_images.permute(0, 3, 1, 2)
    before = given_images.clone()
    got = normalize(given_images)
    assert got.is_contiguous()
    assert torch.equal(got, oracle)
    assert torch.equal(given_images, before)
    back = denormalize(got)
    pixels = before.permute(0, 3, 1, 2) if layout == "nhwc" else before
    torch.testing.assert_close(back * 255, pixels.float(), atol=1e-3, rtol=0)


def test_every_byte_is_divided_as_by_torchvision():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    whole = normalize(pixels, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert torch.equal(whole, pixels.float().div(255))
    exact = (torch.arange(256, dtype=torch.float64) / 255).float().view(1, 1, 16, 16)
    assert torch.equal(whole, exact.expand(1, 3, 16, 16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_normalizes_to_the_same_bits():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(normalize(pixels.cuda()).cpu(), normalize(pixels))


def test_normalize_takes_an_empty_batch():
    assert normalize(torch.zeros(0, 8, 8, 3, dtype=torch.uint8)).shape == (0, 3, 8, 8)


def test_normalize_refuses_other_tensors():
    with pytest.raises(TypeError) as wrong_type:
        normalize(torch.zeros(1, 3, 4, 4))
    assert str(wrong_type.value) == "normalize: expected `images` of uint8, got torch.float32"
    with pytest.raises(ValueError) as wrong_shape:
        normalize(torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert str(wrong_shape.value) == (
        "normalize: expected `images` of shape [B, H, W, 3] or [B, 3, H, W], got [3, 4, 4]"
    )


# --- geometry -------------------------------------------------------------------------------------


def test_boxes_by_hand():
    # 375 x 500, shorter side to 224: scale 224/375, excess 500*224/375 - 224 = 74.667, half of it
    # cut.
    g = geometry(375, 500, 224)
    box = g.to_network(np.array([[10, 20, 400, 300]]))
    # 10*.597333-37.3333 = -31.36; 20*.597333 = 11.947; 400*.597333-37.3333 = 201.6; 179.2
    np.testing.assert_array_equal(box, [[-31, 11, 201, 179]])
    # Back from the whole square: the 375 x 375 centre, rounded outwards from 62.5 and 437.5.
    np.testing.assert_array_equal(g.to_original(np.array([[0, 0, 224, 224]])), [[62, 0, 438, 375]])
    tall = geometry(500, 375, 224)
    np.testing.assert_array_equal(
        tall.to_network(np.array([[20, 10, 300, 400]])), [[11, -31, 179, 201]]
    )
    squashed = geometry(375, 500, 224, "squash")
    np.testing.assert_array_equal(squashed.to_network([[10, 20, 400, 300]]), [[4, 11, 179, 179]])


def test_truncation_is_towards_zero_on_both_sides():
    g = geometry(100, 300, 50)  # scale 1/2, offset 50
    np.testing.assert_array_equal(g.to_network([[97, 0, 103, 1]]), [[-1, 0, 1, 0]])


@given(SIDES, SIDES, st.integers(1, 64), st.sampled_from(["crop", "squash"]), st.data())
def test_round_trip_covers_the_box(height, width, size, policy, data):
    g = geometry(height, width, size, policy)
    x0, x1 = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    y0, y1 = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    box = np.array([[x0, y0, x1, y1]])
    original = g.to_original(box)
    if x0 == x1 or y0 == y1:
        np.testing.assert_array_equal(original, np.zeros((1, 4)))
        return
    assert (original[:, :2] < original[:, 2:]).all()
    assert (original >= 0).all()
    assert (original <= [[width, height, width, height]]).all()
    # In real numbers the original box holds the network's; a crop can be a hair wider than the
    # picture.
    scale, offset = np.array([g.scale_x, g.scale_y] * 2), np.array([g.offset_x, g.offset_y] * 2)
    landed = original * scale - offset
    assert (landed[:, :2] <= box[:, :2] + 1e-4).all()
    assert (landed[:, 2:] >= box[:, 2:] - 1e-4).all()
    # And never by a whole original pixel more.
    assert (landed[:, :2] > box[:, :2] - scale[:2] - 1e-4).all()
    assert (landed[:, 2:] < box[:, 2:] + scale[2:] + 1e-4).all()


@given(st.integers(1, 64), st.lists(st.tuples(*[st.integers(0, 64)] * 4), max_size=4))
def test_a_square_of_the_right_size_changes_nothing(size, boxes):
    table = np.array(boxes, np.int64).reshape(-1, 4)
    for policy in ("crop", "squash"):
        got = geometry(size, size, size, policy).to_network(table)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, table)


def test_pixels_land_where_the_geometry_says():
    # A bright rectangle, resized by Pillow: its extent at half brightness against the boxes' map.
    for height, width in ((300, 420), (260, 200), (128, 128)):
        image = np.zeros((height, width, 3), np.uint8)
        image[60:150, 80:170] = 255
        for policy in ("crop", "squash"):
            square = resize(image, 64, policy)[..., 0] >= 128
            ys, xs = np.flatnonzero(square.any(1)), np.flatnonzero(square.any(0))
            seen = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])
            expected = geometry(height, width, 64, policy).to_network([[80, 60, 170, 150]])[0]
            assert np.abs(seen - np.clip(expected, 0, 64)).max() <= 1


def test_geometry_refuses():
    with pytest.raises(ValueError) as policy:
        geometry(4, 4, 4, "stretch")
    assert str(policy.value) == 'expected resize policy "crop" or "squash", got \'stretch\''
    with pytest.raises(ValueError) as size:
        geometry(4, 0, 4)
    assert str(size.value) == (
        "geometry: expected `height`, `width` and `size` of at least 1, got 4, 0 and 4"
    )


# --- overlap --------------------------------------------------------------------------------------

BOX = st.tuples(*[st.integers(-12, 24)] * 4)


def count(box: tuple[int, ...]) -> np.ndarray:
    grid = np.zeros((36, 36), bool)
    x0, y0, x1, y1 = (v + 12 for v in box)
    grid[y0:y1, x0:x1] = True
    return grid


@given(BOX, BOX)
def test_iou_counts_pixels(first, second):
    a, b = count(first), count(second)
    union = (a | b).sum()
    expected = (a & b).sum() / union if union else 0.0
    assert box_iou(first, second) == pytest.approx(expected, abs=1e-12)
    assert area(first) == a.sum()


def test_ground_truth_keeps_the_area_outside_of_the_picture():
    # Half of the truth lies left of the picture; a prediction that covers all that can be seen
    # gets 1/2.
    assert box_iou([0, 0, 10, 10], [-10, 0, 10, 10]) == 0.5


def test_best_overlap_per_image():
    truth = [np.array([[0, 0, 10, 10], [5, 5, 15, 15]]), np.zeros((0, 4), np.int32), [[0, 0, 2, 1]]]
    predicted = np.array([[5, 5, 15, 15], [0, 0, 4, 4], [0, 0, 1, 1]])
    overlap = iou(predicted, truth)
    np.testing.assert_allclose(overlap, [1.0, np.nan, 0.5])
    assert localisation_error(overlap) == pytest.approx(2 / 3)  # exactly one half is not enough


def test_overlap_refuses():
    with pytest.raises(ValueError) as caught:
        iou(np.zeros((2, 4)), [np.zeros((0, 4))])
    assert str(caught.value) == "iou: expected `truth` for 2 predicted boxes, got 1 lists"
    with pytest.raises(ValueError) as empty:
        localisation_error(np.zeros(0))
    assert str(empty.value) == "localisation_error: expected at least one image, got none"
    assert iou(np.zeros((0, 4)), []).shape == (0,)


def test_centred_box_is_the_authors():
    np.testing.assert_array_equal(centred_box(224), [33, 33, 191, 191])
    assert area(centred_box(224)) / 224**2 == pytest.approx(0.497, abs=1e-3)


@pytest.mark.parametrize("shape", [(7, 160), (300, 9), (1, 400), (50, 901)])
def test_the_middle_of_a_strip_is_that_of_the_whole(shape, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for size in (5, 32):
        alone = resize(image, size)
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "ELONGATED", 10**9)
            whole = resize(image, size)
        assert alone.shape == whole.shape
        assert np.abs(alone.astype(int) - whole).max() <= 1


def test_a_very_long_strip_takes_no_memory_worth_naming():
    assert (resize(np.full((1, 60_000, 3), 9, np.uint8), 224) == 9).all()
