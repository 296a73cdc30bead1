"""Deletion and insertion curves against a loop that changes the image pixel after pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refusals import refuses
from scipy.ndimage import convolve, gaussian_filter
from sklearn import metrics
from torch import nn

from casm_fast.evaluation import join, perturbation_curves
from casm_fast.evaluation.curves import rise_kernel


def net() -> nn.Module:
    torch.manual_seed(3)
    features = (nn.Conv2d(3, 6, 5, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(24, 5)).double().train()


def inputs(n: int = 3, levels: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 18, 14, generator=generator, dtype=torch.float64)
    maps = torch.randint(0, levels, (n, 1, 18, 14), generator=generator).double()
    return images, maps


def probability(classifier: nn.Module, picture: np.ndarray, target: int) -> float:
    with torch.no_grad():
        return float(classifier(torch.from_numpy(picture)[None]).softmax(1)[0, target])


def blurred(image: np.ndarray) -> np.ndarray:
    """RISE's `gkern` and its convolution."""
    pulse = np.zeros((11, 11))
    pulse[5, 5] = 1
    kernel = gaussian_filter(pulse, 5)
    return np.stack([convolve(plane, kernel, mode="constant") for plane in image])


@pytest.mark.parametrize("kind", ["deletion", "insertion"])
@pytest.mark.parametrize("step", [40, 252, 63])
def test_agrees_with_a_loop_over_pixels(kind, step):
    classifier, (images, maps) = net(), inputs()
    targets = [1, 0, 4]
    found = perturbation_curves(
        classifier, images, maps, targets, kind=kind, step=step, batch_size=4
    )
    assert all(module.training for module in classifier.modules())
    classifier.eval()
    steps = -(-252 // step)
    for b in range(3):
        image = images[b].numpy()
        start = image.copy() if kind == "deletion" else blurred(image)
        finish = np.zeros_like(image) if kind == "deletion" else image
        # Raster order among equal pixels: sorted() is stable.
        falling = (-maps[b].flatten()).tolist()
        order = sorted(range(252), key=falling.__getitem__)
        scores = [probability(classifier, start, targets[b])]
        for i in range(steps):
            for p in order[i * step : (i + 1) * step]:
                start[:, p // 14, p % 14] = finish[:, p // 14, p % 14]
            scores.append(probability(classifier, start, targets[b]))
        # Measured worst difference 2e-16.
        assert found.scores[b] == pytest.approx(scores, abs=1e-12)
        expected = (sum(scores) - scores[0] / 2 - scores[-1] / 2) / steps
        assert found.auc[b] == pytest.approx(expected)
        even = np.linspace(0, 1, steps + 1)
        assert found.auc[b] == pytest.approx(metrics.auc(even, scores))
    assert found.shares.tolist() == [min(i * step, 252) / 252 for i in range(steps + 1)]


def test_kernel_is_that_of_rise():
    for side, sigma in ((11, 5.0), (7, 3.0), (3, 4.0)):
        pulse = np.zeros((side, side))
        pulse[side // 2, side // 2] = 1
        taps = rise_kernel(side, sigma).numpy()
        assert np.outer(taps, taps) == pytest.approx(gaussian_filter(pulse, sigma), abs=1e-15)


def test_fills():
    classifier, (images, maps) = net(), inputs()
    given = torch.full_like(images, 0.5)
    ends = {
        name: perturbation_curves(classifier, images, maps, 2, fill=fill, steps=1).scores[:, -1]
        for name, fill in (("zero", "zero"), ("mean", "mean"), ("blur", "blur"), ("own", given))
    }
    classifier.eval()
    for b, image in enumerate(images.numpy()):
        pictures = {
            "zero": np.zeros_like(image),
            "mean": np.broadcast_to(image.mean(axis=(1, 2))[:, None, None], image.shape).copy(),
            "blur": blurred(image),
            "own": given[b].numpy(),
        }
        for name, picture in pictures.items():
            assert ends[name][b] == pytest.approx(probability(classifier, picture, 2), abs=1e-12)


def test_ends_are_the_image_and_what_it_becomes():
    classifier, (images, maps) = net(), inputs()
    deleted = perturbation_curves(classifier, images, maps, kind="deletion", fill="blur", steps=7)
    inserted = perturbation_curves(classifier, images, maps, kind="insertion", steps=7)
    assert deleted.scores[:, 0] == pytest.approx(inserted.scores[:, -1])
    assert deleted.scores[:, -1] == pytest.approx(inserted.scores[:, 0])
    assert deleted.scores.shape == (3, 8)


def test_a_map_that_knows_beats_one_that_does_not():
    """The class reads one corner: deleting it first takes the score at once."""

    def classifier(images: torch.Tensor) -> torch.Tensor:
        corner = images[:, :, :4, :4].mean(dim=(1, 2, 3))
        return torch.stack([10 * corner, torch.zeros_like(corner)], dim=1)

    images = torch.ones(2, 3, 16, 16)
    good = torch.zeros(2, 1, 16, 16)
    good[:, :, :4, :4] = 1
    for kind, better in (("deletion", -1), ("insertion", 1)):
        told = {"kind": kind, "step": 16, "fill": "zero", "score": "logit"}
        knows = perturbation_curves(classifier, images, good, 0, **told)
        not_ = perturbation_curves(classifier, images, -good, 0, **told)
        assert better * (knows.auc - not_.auc).min() > 0
        if kind == "insertion":
            assert knows.scores[0, 1:] == pytest.approx(10)
            assert knows.scores[0, 0] == 0


def test_neither_batches_nor_order_matter():
    classifier, (images, maps) = net(), inputs(5)
    whole = perturbation_curves(classifier, images, maps, step=50)
    small = perturbation_curves(classifier, images, maps, step=50, batch_size=3)
    assert small.scores == pytest.approx(whole.scores, abs=1e-14)
    order = [3, 0, 4, 2, 1]
    parts = join(
        perturbation_curves(classifier, images[order[k : k + 2]], maps[order[k : k + 2]], step=50)
        for k in range(0, 5, 2)
    )
    assert parts.scores == pytest.approx(whole.scores[order], abs=1e-14)


def test_prints_score_and_convention():
    found = perturbation_curves(net(), *inputs(), 0, step=100)
    head, convention = str(found).split("\n\n")
    assert head == (
        "Deletion, area under the curve (lower is better): "
        f"{found.interval().show('.3f')} over 3 images"
    )
    assert " ".join(convention.split()) == (
        "3 steps of 100 pixels, most salient first, equal ones in raster order; deleted to 0 in "
        "the normalised input, the mean colour of training; softmax of the given class; "
        "trapezoidal rule, mean over the images"
    )
    assert max(map(len, convention.splitlines())) <= 98


def test_bad_input_is_one_sentence():
    classifier, (images, maps) = net(), inputs()
    with refuses(ValueError, "kind: expected deletion or insertion, got 'removal'"):
        perturbation_curves(classifier, images, maps, kind="removal")
    with refuses(ValueError, "score: expected one of softmax, logit, log_softmax, got 'margin'"):
        perturbation_curves(classifier, images, maps, score="margin")
    with refuses(ValueError, "maps: expected [3, 1, 18, 14], got [3, 9, 7]"):
        perturbation_curves(classifier, images, maps[:, :, ::2, ::2])
    with refuses(ValueError, "steps: expected one of `step` and `steps`, got 3 and 4"):
        perturbation_curves(classifier, images, maps, step=3, steps=4)
    with refuses(ValueError, "step: expected from 1 to the 252 pixels, got 253"):
        perturbation_curves(classifier, images, maps, step=253)
    with refuses(ValueError, "steps: expected from 1 to the 252 pixels, got 0"):
        perturbation_curves(classifier, images, maps, steps=0)
    with refuses(ValueError, "fill: expected zero, mean, blur or images [B, C, H, W], got 'noise'"):
        perturbation_curves(classifier, images, maps, fill="noise")
    with refuses(ValueError, "fill: expected [3, 3, 18, 14], got [1, 3, 18, 14]"):
        perturbation_curves(classifier, images, maps, fill=images[:1])
    with refuses(ValueError, "batch_size: expected a number above 0, got 0"):
        perturbation_curves(classifier, images, maps, batch_size=0)
    with refuses(ValueError, "targets: expected classes in 0 ... 4, got 5 for image 1"):
        perturbation_curves(classifier, images, maps, [0, 5, 0])
