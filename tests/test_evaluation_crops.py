"""The saliency metric: crops by torch and OpenCV one by one, the score by its formula."""

from __future__ import annotations

import math
import re

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from torch import nn
from torch.nn import functional as F

from casm_fast.evaluation import crop_metric, join, saliency_metric
from casm_fast.evaluation.crops import crop


def net() -> nn.Module:
    torch.manual_seed(3)
    features = (nn.Conv2d(3, 6, 5, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(24, 5)).double().train()


def inputs(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 20, 16, generator=generator, dtype=torch.float64)
    return images, torch.rand(n, 1, 10, 8, generator=generator, dtype=torch.float64) ** 8


corners = st.tuples(*[st.integers(0, 15)] * 4).map(
    lambda c: (min(c[0], c[2]), min(c[1], c[3]), max(c[0], c[2]) + 1, max(c[1], c[3]) + 1)
)


@given(st.lists(corners, min_size=1, max_size=4), st.sampled_from(["bicubic", "bilinear"]))
@settings(max_examples=40, deadline=None)
def test_crops_are_those_of_torch_one_by_one(boxes, mode):
    images = inputs(len(boxes))[0]
    found = crop(images, torch.tensor(boxes), mode)
    for image, (x0, y0, x1, y1), ours in zip(images, boxes, found, strict=True):
        part = image[None, :, y0:y1, x0:x1]
        theirs = F.interpolate(part, (20, 16), mode=mode, align_corners=False)[0]
        # Measured worst difference of 600 crops 1.5e-14.
        assert torch.allclose(ours, theirs, atol=1e-12, rtol=0)


def test_crops_are_those_of_opencv():
    images = inputs(1)[0].float()
    x0, y0, x1, y1 = 3, 2, 12, 15
    found = crop(images, torch.tensor([[x0, y0, x1, y1]]))[0].permute(1, 2, 0).numpy()
    part = np.ascontiguousarray(images[0, :, y0:y1, x0:x1].permute(1, 2, 0).numpy())
    theirs = cv2.resize(part, (16, 20), interpolation=cv2.INTER_CUBIC)
    # Measured worst difference of 300 crops 3.8e-6 in float32.
    assert found == pytest.approx(theirs, abs=2e-5)


def test_agrees_with_a_loop():
    classifier, (images, maps) = net(), inputs()
    targets = [0, 3, 1, 4]
    found = saliency_metric(classifier, images, maps, targets, batch_size=3)
    assert all(module.training for module in classifier.modules())
    classifier.eval()
    for b in range(4):
        rows, columns = np.nonzero(maps[b, 0].numpy() >= maps[b].mean().item())
        x0, x1 = 2 * columns.min(), 2 * columns.max() + 2
        y0, y1 = 2 * rows.min(), 2 * rows.max() + 2
        assert found.boxes[b].tolist() == [x0, y0, x1, y1]
        part = images[b : b + 1, :, y0:y1, x0:x1]
        with torch.no_grad():
            seen = F.interpolate(part, (20, 16), mode="bicubic", align_corners=False)
            p = classifier(seen).softmax(1)[0]
        area = (x1 - x0) * (y1 - y0) / 320
        expected = math.log(max(area, 0.05)) - math.log(p[targets[b]])
        assert found.area[b] == pytest.approx(area)
        assert found.scores[b] == pytest.approx(expected, abs=1e-10)
        assert found.right[b] == (p.argmax() == targets[b])


def test_small_crops_count_as_a_twentieth():
    images = inputs(2)[0]
    boxes = [[4, 4, 5, 5], [0, 0, 16, 1]]  # 1 and 16 pixels of 320
    found = crop_metric(net(), images, boxes, 0)
    assert (found.scores + found.log_probability).tolist() == pytest.approx([math.log(0.05)] * 2)
    larger = crop_metric(net(), images, boxes, 0, least_area=0.001)
    assert (larger.scores + larger.log_probability).tolist() == pytest.approx(
        [math.log(1 / 320), math.log(0.05)]
    )


def test_the_whole_image_gives_its_own_probability():
    images = inputs()[0]
    classifier = net()
    boxes = [[0, 0, 16, 20], [-9, -9, 99, 99], [5, 5, 5, 9], [20, 3, 30, 9]]
    found = crop_metric(classifier, images, boxes)
    with torch.no_grad():
        best = classifier.eval()(images).log_softmax(1).amax(1)
    assert found.scores == pytest.approx(-best.numpy(), abs=1e-12)
    assert found.right.all()
    assert found.area.tolist() == [1, 1, 1, 1]


def test_a_map_of_nothing_gives_the_whole_image():
    images = inputs(1)[0]
    maps = np.zeros((1, 10, 8))
    maps[0, 4, 4] = 1
    assert saliency_metric(net(), images, maps, 0, alpha=200).boxes.tolist() == [[0, 0, 16, 20]]
    assert saliency_metric(net(), images, maps, 0).boxes.tolist() == [[8, 8, 10, 10]]


def test_largest_component_is_an_option():
    maps = np.zeros((1, 10, 8))
    maps[0, 1, 1], maps[0, 5:8, 5] = 1, 1
    images = inputs(1)[0]
    assert saliency_metric(net(), images, maps, 0).boxes.tolist() == [[2, 2, 12, 16]]
    largest = saliency_metric(net(), images, maps, 0, component="largest")
    assert largest.boxes.tolist() == [[10, 10, 12, 16]]


def test_a_crop_of_the_object_is_better_than_one_beside_it():
    def classifier(images: torch.Tensor) -> torch.Tensor:
        bright = images.mean(dim=(1, 2, 3))
        return torch.stack([8 * bright, torch.ones_like(bright)], dim=1)

    images = torch.zeros(1, 3, 20, 20)
    images[:, :, 4:10, 4:10] = 1
    on = crop_metric(classifier, images, [[4, 4, 10, 10]], 0)
    off = crop_metric(classifier, images, [[12, 12, 18, 18]], 0)
    whole = crop_metric(classifier, images, [[0, 0, 20, 20]], 0)
    assert on.scores[0] < min(whole.scores[0], off.scores[0])
    assert off.log_probability[0] < whole.log_probability[0] < on.log_probability[0]


def test_neither_batches_nor_order_matter():
    classifier, (images, maps) = net(), inputs()
    whole = saliency_metric(classifier, images, maps, 2)
    order = [2, 0, 3, 1]
    parts = join(
        saliency_metric(classifier, images[order[k : k + 3]], maps[order[k : k + 3]], 2)
        for k in (0, 3)
    )
    assert parts.scores == pytest.approx(whole.scores[order], abs=1e-12)
    assert parts.interval().value == pytest.approx(whole.interval().value)


def test_prints_score_and_convention():
    text = str(saliency_metric(net(), *inputs(), 0, alpha=0.5))
    assert re.match(
        r"Saliency metric \(lower is better\): \S+ \(\S+\.\.\S+\) over 4 images\n", text
    )
    text = " ".join(text.split())
    assert "tight box of every kept pixel, threshold by rule mean, alpha 0.5" in text
    assert "log(max(area, 0.05)) - log(p) in nats" in text


def test_bad_input_is_one_sentence():
    classifier, (images, maps) = net(), inputs()
    with refuses(ValueError, "maps: expected sides that divide 20 x 16, got 3 x 8"):
        saliency_metric(classifier, images, maps[:, :, :3], 0)
    with refuses(ValueError, "interpolation: expected bicubic or bilinear, got 'nearest'"):
        saliency_metric(classifier, images, maps, 0, interpolation="nearest")
    with refuses(ValueError, "least_area: expected a share in (0, 1], got 5"):
        saliency_metric(classifier, images, maps, 0, least_area=5)
    with refuses(ValueError, "boxes: expected [4, 4], got [1, 4]"):
        crop_metric(classifier, images, [[0, 0, 2, 2]], 0)
    with refuses(ValueError, "targets: expected one class for each image, got 2 for some"):
        crop_metric(classifier, images, [[0, 0, 2, 2]] * 4, [[0, 1]] * 4)
