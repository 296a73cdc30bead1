"""The deletion game, against a loop over thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from casm_fast.perturbation import deletion_curve


def net() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    return nn.Sequential(layers, nn.Linear(24, 5)).double().eval()


def images_and_maps() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 24, 30, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 24, 30, generator=generator, dtype=torch.float64)
    maps = torch.stack([torch.from_numpy(ndimage.gaussian_filter(one, 3)) for one in noise])
    return images, maps[:, None]


def test_agrees_with_a_loop_over_thresholds() -> None:
    classifier, (images, maps) = net(), images_and_maps()
    targets = [0, 1, 2, 3]
    curve = deletion_curve(classifier, images, maps, targets, blur_sigma=4.0, batch_size=5)
    assert curve.thresholds.shape == (101,)
    assert curve.boxes.shape == (4, 101, 4)
    smallest = np.ones(4)
    for b, target in enumerate(targets):
        image, m = images[b].numpy(), maps[b, 0].numpy()
        blurred = np.stack([ndimage.gaussian_filter(p, 4.0, mode="mirror") for p in image])
        stretched = (m - m.min()) / (m.max() - m.min())

        def score(picture: np.ndarray, target: int = target) -> float:
            with torch.no_grad():
                logits = classifier(torch.from_numpy(picture)[None])
            return float(logits.softmax(1)[0, target])

        shown, hidden = score(image), score(blurred)
        for t in range(0, 101, 4):
            rows, columns = np.nonzero(stretched >= np.float64(curve.thresholds[t]))
            y0, y1, x0, x1 = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
            assert curve.boxes[b, t].tolist() == [x0, y0, x1, y1]
            picture = image.copy()
            picture[:, y0:y1, x0:x1] = blurred[:, y0:y1, x0:x1]
            left = (score(picture) - hidden) / (shown - hidden)
            assert curve.areas[b, t].item() == pytest.approx((y1 - y0) * (x1 - x0) / 720)
            if shown > hidden:
                assert curve.left[b, t].item() == pytest.approx(left, abs=1e-9)
            else:
                assert curve.left[b, t].isnan()
        ok = (curve.left[b] <= 0.5).numpy()
        if ok.any():
            smallest[b] = curve.areas[b].numpy()[ok].min()
    assert curve.smallest(0.5).tolist() == pytest.approx(smallest.tolist())
    assert (curve.smallest(0.5) < 1).any()
    assert (curve.smallest(-10.0) == 1).all()  # no box does


def test_a_constant_map_spans_the_image() -> None:
    classifier, (images, maps) = net(), images_and_maps()
    curve = deletion_curve(classifier, images, torch.full_like(maps, 0.3))
    assert (curve.boxes == torch.tensor([0, 0, 30, 24])).all()
    shown = curve.left[~curve.left.isnan()]
    assert shown.abs().max() < 1e-12


def test_bad_maps() -> None:
    classifier, (images, maps) = net(), images_and_maps()
    for bad, text in (
        (maps[:, :, :5], "saliency: expected a tensor [4, 1, 24, 30], got [4, 1, 5, 30]"),
        (maps / 0, "saliency: expected finite values, got NaN or infinity"),
        (maps.numpy(), "saliency: expected a tensor [4, 1, 24, 30], got ndarray"),
    ):
        with pytest.raises(ValueError) as caught:
            deletion_curve(classifier, images, bad)
        assert str(caught.value) == text
    with pytest.raises(ValueError) as caught:
        deletion_curve(classifier, images, maps, perturbation="constant", layer="0")
    assert str(caught.value) == "layer: expected None for boxes in images, got '0'"
