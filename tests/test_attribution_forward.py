"""Methods that need scores alone, and those that learn, beside scalar loops and captum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import captum.attr
import numpy as np
import pytest
import scipy.ndimage
import skimage.transform
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import casm_fast
from casm_fast.attribution import Problem, occlusion, rise
from casm_fast.attribution.layers import find_layer
from casm_fast.models import build_model, save
from casm_fast.models.targets import Targets

SIZE = (24, 20)


class Scorer(nn.Module):
    """Not linear, so that overlapping occluders matter; every image alone."""

    def __init__(self, size: tuple[int, int] = SIZE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * size[0] * size[1], 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(images)).flatten(1))


class Patch(nn.Module):
    """The mean of a patch: linear, with its evidence at a known place."""

    def __init__(self, top: int, left: int, side: int) -> None:
        super().__init__()
        self.patch = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        read = images[self.patch].mean(dim=(1, 2, 3))
        return torch.stack([read, -read], dim=1)


def some_images(count: int = 2, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)).double()


def scores(net: nn.Module, images: np.ndarray, target: int) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(images))[:, target].numpy()


def weighted_mean(net: nn.Module, image: np.ndarray, masks: list[np.ndarray], filled: np.ndarray):
    """Each pixel's mean drop over the masks (1 hides), one mask at a time."""
    before = scores(net, image[None], 1)[0]
    total, number = np.zeros(image.shape[1:]), np.zeros(image.shape[1:])
    for mask in masks:
        drop = before - scores(net, (image * (1 - mask) + filled * mask)[None], 1)[0]
        total += mask * drop
        number += mask
    return np.divide(total, number, out=np.zeros_like(total), where=number > 0)


# --- squares


def squares(size: tuple[int, int], side: int, stride: int) -> list[np.ndarray]:
    masks = []
    for top in range(0, size[0], stride):
        for left in range(0, size[1], stride):
            mask = np.zeros(size)
            mask[top : top + side, left : left + side] = 1
            masks.append(mask)
    return masks


@pytest.mark.parametrize(("side", "stride"), [(7, 3), (4, 4), (3, 5), (1, 1)])
def test_occlusion_is_the_mean_drop_over_the_squares_that_cover_a_pixel(
    side: int, stride: int
) -> None:
    net, images = Scorer().double(), some_images()
    made = casm_fast.attribute("occlusion", net, images, 1, size=side, stride=stride)
    for image, map_ in zip(images.numpy(), made[:, 0].numpy(), strict=True):
        expected = weighted_mean(net, image, squares(SIZE, side, stride), np.zeros_like(image))
        assert np.abs(map_ - expected).max() < 1e-12  # 1e-15 measured


@pytest.mark.parametrize(("side", "stride", "seen"), [(4, 4, SIZE), (7, 3, (18, 15))])
def test_occlusion_is_captum_s(side: int, stride: int, seen: tuple[int, int]) -> None:
    """Beyond `seen` captum has no squares that are cut off, and the mean has fewer terms."""
    net, images = Scorer().double().eval(), some_images()
    expected = captum.attr.Occlusion(net).attribute(
        images, (3, side, side), strides=(3, stride, stride), target=1
    )
    made = casm_fast.attribute("occlusion", net, images, 1, size=side, stride=stride)
    inside = (slice(None), slice(None), slice(seen[0]), slice(seen[1]))
    difference = (made[inside] - expected[:, :1][inside]).abs().max()
    assert difference < 1e-7  # captum sums in float32; 7e-9 measured


def test_occlusion_has_the_paper_s_784_squares() -> None:
    shown = []

    def classifier(images: torch.Tensor) -> torch.Tensor:
        shown.append(images)
        return images.mean(dim=(1, 2, 3))[:, None].expand(-1, 2)

    images = torch.ones(1, 1, 224, 224)
    casm_fast.attribute("occlusion", classifier, images, 0, batch_size=98)
    occluded = torch.cat(shown[2:])  # the first pass counts classes, the second scores the image
    assert len(occluded) == 784
    hidden = (occluded == 0)[:, 0]
    assert hidden[0, :35, :35].all()
    assert hidden[0].sum() == 35 * 35
    assert hidden[28 + 2, 8:43, 16:51].all()
    assert hidden[30].sum() == 35 * 35
    assert hidden[-1, 216:, 216:].all()
    assert hidden[-1].sum() == 8 * 8
    covered = hidden.sum(dim=0)
    assert covered.min() == 1
    assert covered.max() == 25


@pytest.mark.parametrize("method", ["occlusion", "blur_occlusion", "rise"])
def test_the_maximum_lies_in_the_patch_that_is_read(method: str) -> None:
    size = (40, 48)
    images = some_images(3, size).abs() + 1
    images[..., 10:16, 30:36] += 3  # a blur changes it
    options: dict[str, Any] = {"masks": 400} if method == "rise" else {"stride": 2}
    options |= {"size": 6} if method == "occlusion" else {}
    options |= {"diameter": 6, "softening": 1} if method == "blur_occlusion" else {}
    made = casm_fast.attribute(method, Patch(10, 30, 6), images, 0, **options)
    for map_ in made[:, 0]:
        y, x = divmod(int(map_.argmax()), size[1])
        assert 10 <= y < 16
        assert 30 <= x < 36


def test_an_occluder_that_changes_nothing_gets_nothing() -> None:
    made = casm_fast.attribute("occlusion", Patch(0, 0, 4), some_images(), 0, size=3, stride=3)
    assert made[..., 6:, :].abs().max() == 0
    assert made[..., 6:].abs().max() == 0


def test_pixels_between_the_squares_get_nothing() -> None:
    made = casm_fast.attribute("occlusion", Scorer().double(), some_images(), 0, size=2, stride=5)
    between = [row for row in range(SIZE[0]) if row % 5 >= 2]
    assert made[:, :, between].abs().max() == 0
    assert made[:, :, ::5, ::5].abs().min() > 0


@settings(max_examples=15, deadline=None)
@given(
    st.integers(5, 12), st.integers(5, 12), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9)
)
def test_a_score_that_hiding_cannot_change_gives_zeros(
    height: int, width: int, side: int, stride: int, batch: int
) -> None:
    def constant(images: torch.Tensor) -> torch.Tensor:
        return images.new_tensor([[2.0, 1.0]]).expand(len(images), -1)

    images = some_images(2, (height, width))
    made = casm_fast.attribute(
        "occlusion", constant, images, 0, size=side, stride=stride, batch_size=batch
    )
    assert made.shape == (2, 1, height, width)
    assert (made == 0).all()


# --- discs


def soft_disc(size: tuple[int, int], y: float, x: float, radius: float, sigma: float) -> np.ndarray:
    mask = np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            mask[row, column] = (row - y) ** 2 + (column - x) ** 2 < radius**2
    return scipy.ndimage.gaussian_filter(mask, sigma, mode="mirror")


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(image, (0, sigma, sigma), mode="mirror")


def test_blur_occlusion_is_the_weighted_mean_of_the_drops() -> None:
    net, images = Scorer().double(), some_images()
    options: dict[str, Any] = {"diameter": 7, "stride": 4, "softening": 1.5, "blur_sigma": 2.0}
    made = casm_fast.attribute("blur_occlusion", net, images, 1, **options)
    masks = [
        soft_disc(SIZE, top + 3, left + 3, 3.5, 1.5)
        for top in range(0, SIZE[0], 4)
        for left in range(0, SIZE[1], 4)
    ]
    for image, map_ in zip(images.numpy(), made[:, 0].numpy(), strict=True):
        expected = weighted_mean(net, image, masks, blur(image, 2.0))
        assert np.abs(map_ - expected).max() < 1e-12  # 1e-15 measured


def test_variable_occlusion_is_the_smallest_of_the_most_suppressive_tenth() -> None:
    net, images = Scorer().double(), some_images(2)
    options = occlusion.VariableOptions(count=60, softening=1.0, blur_sigma=2.0)
    made = casm_fast.attribute(
        "variable_occlusion", net, images, 1, count=60, softening=1.0, blur_sigma=2.0, seed=3
    )
    centres, radii = (drawn.numpy() for drawn in occlusion.draw(3, SIZE, options))
    for image, map_ in zip(images.numpy(), made[:, 0].numpy(), strict=True):
        blurred = blur(image, 2.0)
        left = []
        for (y, x), radius in zip(centres, radii, strict=True):
            mask = soft_disc(SIZE, y - 0.5, x - 0.5, radius, 1.0)
            left.append(scores(net, (image * (1 - mask) + blurred * mask)[None], 1)[0])
        best = sorted(np.argsort(left)[:6], key=lambda n: radii[n])
        expected = np.zeros(SIZE)
        for row in range(SIZE[0]):
            for column in range(SIZE[1]):
                for rank, n in enumerate(best):
                    y = min(max(math.floor(centres[n, 0]), 0), SIZE[0] - 1)
                    x = min(max(math.floor(centres[n, 1]), 0), SIZE[1] - 1)
                    distance = math.hypot(row - y, column - x)
                    if distance < radii[n] or distance == 0:
                        expected[row, column] = (6 - rank - distance / radii[n]) / 6
                        break  # the smallest wins
        assert np.abs(map_ - expected).max() < 1e-12  # 6e-16 measured
        # The paper's point: the centre of the smallest.
        y, x = divmod(int(map_.argmax()), SIZE[1])
        assert (y, x) == tuple(np.clip(np.floor(centres[best[0]]), 0, np.array(SIZE) - 1))


def test_the_discs_of_variable_occlusion_follow_the_paper_s_distributions() -> None:
    options = occlusion.VariableOptions(count=20000)
    centres, radii = (drawn.numpy() for drawn in occlusion.draw(0, (224, 224), options))
    logarithm = np.log(np.pi * radii**2)
    # Standard errors are 0.009, 0.34, 0.46; five of them.
    assert abs(logarithm.mean() - 7.5060) < 0.05
    assert abs(logarithm.std() - 1.2848) < 0.04
    assert abs(centres[:, 0].mean() - 116.0759) < 1.7
    assert abs(centres[:, 0].std() - 47.5054) < 1.2
    assert abs(centres[:, 1].mean() - 112) < 2.3
    assert 0 <= centres[:, 1].min() < 1
    assert 223 < centres[:, 1].max() <= 224
    smaller, narrower = (drawn.numpy() for drawn in occlusion.draw(0, (112, 56), options))
    np.testing.assert_allclose(smaller, centres * [0.5, 0.25], rtol=1e-12)
    np.testing.assert_allclose(narrower, radii * math.sqrt(0.5 * 0.25), rtol=1e-12)


# --- RISE


def test_rise_is_the_mean_of_the_masks_weighed_by_their_scores() -> None:
    net, images = Scorer().double(), some_images(2)
    options = rise.Options(masks=50, cells=3, probability=0.3)
    made = casm_fast.attribute("rise", net, images, 1, masks=50, cells=3, probability=0.3, seed=2)
    drawn = rise.Masks.draw(2, images, options)
    cell = (8, 7)  # ceil of 24 / 3 and 20 / 3
    expected = np.zeros((2, *SIZE))
    for grid, (down, right) in zip(drawn.grids.numpy(), drawn.shifts.tolist(), strict=True):
        large = skimage.transform.resize(
            grid, (4 * cell[0], 4 * cell[1]), order=1, mode="edge", anti_aliasing=False
        )
        mask = large[down : down + SIZE[0], right : right + SIZE[1]]
        assert 0 <= down < cell[0]
        assert 0 <= right < cell[1]
        expected += scores(net, images.numpy() * mask, 1)[:, None, None] * mask
    expected /= 0.3 * 50
    assert np.abs(made[:, 0].numpy() - expected).max() < 1e-12  # 7e-16 measured


def test_rise_draws_cells_by_their_probability_and_all_shifts() -> None:
    images = torch.zeros(1, 3, 21, 28)
    drawn = rise.Masks.draw(0, images, rise.Options(masks=4000, probability=0.3))
    assert abs(float(drawn.grids.mean()) - 0.3) < 0.006  # five standard errors
    assert drawn.shifts[:, 0].unique().tolist() == list(range(3))
    assert drawn.shifts[:, 1].unique().tolist() == list(range(4))
    again = rise.Masks.draw(0, images, rise.Options(masks=4000, probability=0.3))
    assert torch.equal(drawn.grids, again.grids)
    assert torch.equal(drawn.shifts, again.shifts)
    assert not torch.equal(rise.Masks.draw(1, images, rise.Options(4000)).grids, drawn.grids)


def test_no_mask_outlives_its_batch() -> None:
    """Masks of 2,000 x 48 x 48 would be 18 MB in float32; what is held at once is a batch's."""
    largest = []

    def classifier(images: torch.Tensor) -> torch.Tensor:
        largest.append(len(images))
        return images.mean(dim=(2, 3))

    casm_fast.attribute("rise", classifier, torch.ones(3, 3, 48, 48), 0, masks=100, batch_size=16)
    assert max(largest) == 16
    assert sum(largest[1:]) == 100 * 3
    assert largest[1:].count(16) == 18  # full ones, over the borders of images; then 12 are left


# --- guided feature inversion


class Layered(nn.Module):
    """A spatial activation of 6x5, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(images)).flatten(1)) * 20


def inverted(net: Layered, image: torch.Tensor, target: int, steps: int) -> torch.Tensor:
    """One image, Adam and the objective written out."""
    blurred = torch.from_numpy(blur(image.numpy(), 1.5))
    activation = net.features(image[None]).detach()
    w = torch.full((4,), 0.1, dtype=torch.float64)
    mean, square = torch.zeros(4).double(), torch.zeros(4).double()

    def mask_of(w: torch.Tensor) -> torch.Tensor:
        summed = sum(w[c] * activation[:, c : c + 1] for c in range(4))
        large = nn.functional.interpolate(summed, SIZE, mode="bilinear", align_corners=True)
        return (large - large.min()) / (large.max() - large.min())

    for step in range(steps):
        w.requires_grad_()
        mask = mask_of(w)
        kept, hidden = (image * m + blurred * (1 - m) for m in (mask, 1 - mask))
        if step < 11:
            inner = net.features(kept)
            loss = ((inner - activation) ** 2).sum() / (activation**2).sum() + 5 * (w**2).sum()
        else:
            shown, left = (net(x).softmax(dim=1)[0, target] for x in (kept, hidden))
            loss = -shown + left + 2 * (w**2).sum()
        (gradient,) = torch.autograd.grad(loss, w)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        corrected = mean / (1 - 0.9 ** (step + 1))
        scale = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        w = (w.detach() - 1e-2 * 0.5 ** (step // 10) * corrected / scale).clamp(min=0)
    return mask_of(w)[0]


@pytest.mark.parametrize("steps", [5, 25])
def test_guided_inversion_is_the_descent_written_out(steps: int) -> None:
    net, images = Layered().double().eval(), some_images(3)
    made = casm_fast.attribute(
        "guided_inversion", net, images, [0, 2, 1], steps=steps, blur_sigma=1.5
    )
    for image, target, map_ in zip(images, [0, 2, 1], made, strict=True):
        expected = inverted(net, image, target, steps)
        assert (map_ - expected).abs().max() < 1e-12  # 8e-16 measured
    assert made.amin(dim=(1, 2, 3)).tolist() == [0] * 3
    assert made.amax(dim=(1, 2, 3)).tolist() == [1] * 3


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: torchvision.models.resnet18(), "layer4"),
        (lambda: torchvision.models.squeezenet1_1(), "classifier.2"),
        (lambda: torchvision.models.vgg11(num_classes=3), "features"),
        (
            lambda: torchvision.models.googlenet(aux_logits=False, init_weights=False),
            "inception5b",
        ),
        (lambda: Layered(), "features"),
    ],
)
def test_the_last_spatial_layer(build: Any, expected: str) -> None:
    net = build().eval()
    images = torch.zeros(1, 3, 64, 64)
    problem = Problem(net, images, Targets(torch.zeros(1, 1, dtype=torch.int64)))
    assert find_layer(problem, "x", max_pools=True) == expected
    assert not any(module._forward_hooks for module in net.modules())


def test_a_function_has_no_layers() -> None:
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("guided_inversion", lambda x: x.mean(dim=(2, 3)), some_images(), 0)
    assert str(caught.value) == (
        "guided_inversion: expected a classifier with modules, among which a layer is found, "
        "got function"
    )


# --- learned masks and learned models


def test_meaningful_perturbation_is_perturb_s_saliency() -> None:
    net, images = Layered().double(), some_images(2)
    fields: dict[str, Any] = {"steps": 3, "mask_size": (6, 5), "blur_sigma": 1.0}
    for game in ("deletion", "preservation"):
        made = casm_fast.attribute(
            "meaningful_perturbation", net, images, [1, 2], game=game, seed=3, **fields
        )
        expected = casm_fast.perturb(net, images, [1, 2], game=game, seed=3, **fields)
        assert torch.equal(made, expected.saliency)


def test_meaningful_perturbation_takes_presets() -> None:
    class Wide(Layered):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images).repeat(1, 2)

    net, images = Wide().double(), some_images(2)
    fields: dict[str, Any] = {"steps": 3, "mask_size": (6, 5), "blur_sigma": 1.0}
    made = casm_fast.attribute(
        "meaningful_perturbation", net, images, preset="localization", tv_beta=4.0, **fields
    )
    config = casm_fast.PerturbConfig.preset("localization", tv_beta=4.0, **fields)
    assert (config.top_k, config.lambda_l1) == (5, 1e-3)
    assert torch.equal(made, casm_fast.perturb(net, images, None, config).saliency)
    with pytest.raises(ValueError, match="targets: expected None beside top_k = 5"):
        casm_fast.attribute("meaningful_perturbation", net, images, 0, preset="localization")
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("meaningful_perturbation", net, images, 0, preset="deletion")
    assert str(caught.value) == (
        "preset: expected one of default, localization, layers, got 'deletion'"
    )


def test_casm_is_the_model_s_saliency_enlarged(tmp_path: Path) -> None:
    model = build_model("compact", classes=3, input_size=32)
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        saliency, _ = model.eval()(images)
    model.train()
    expected = saliency.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    path = save(model, tmp_path / "model.safetensors")
    for classifier, options in (
        (model, {}),
        (Patch(0, 0, 4), {"model": model}),
        (Patch(0, 0, 4), {"model": path}),
        (Patch(0, 0, 4), {"model": str(tmp_path)}),
    ):
        made = casm_fast.attribute("casm", classifier, images, 0, **options)
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("casm", Patch(0, 0, 4), images, 0)
    assert str(caught.value) == (
        "casm: expected a SaliencyModel as the classifier or as model=, got Patch; "
        "train one by casm_fast.train, or give its file"
    )


def test_a_model_on_another_device_is_refused() -> None:
    model = build_model("compact", classes=3).to("meta")
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("casm", Patch(0, 0, 4), torch.zeros(1, 3, 32, 32), 0, model=model)
    assert str(caught.value) == (
        "model: expected on the device of the images (cpu), got meta; move it there"
    )


# --- all of them


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("occlusion", {"size": 5, "stride": 3}),
        ("blur_occlusion", {"diameter": 5, "stride": 4, "softening": 1}),
        ("variable_occlusion", {"count": 40}),
        ("rise", {"masks": 40}),
    ],
)
def test_batches_change_nothing(method: str, options: dict[str, Any]) -> None:
    net, images = Scorer().double(), some_images(3)
    whole = casm_fast.attribute(method, net, images, [0, 1, 2], batch_size=1000, **options)
    for size in (1, 7):
        made = casm_fast.attribute(method, net, images, [0, 1, 2], batch_size=size, **options)
        torch.testing.assert_close(made, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("occlusion", {"size": 0}, "occlusion: expected size above 0, got 0"),
        ("occlusion", {"stride": -2}, "occlusion: expected stride above 0, got -2"),
        (
            "occlusion",
            {"size": 35},
            "occlusion: expected size of at most 20 pixels, the shorter side of the images, got 35",
        ),
        (
            "blur_occlusion",
            {"diameter": math.nan},
            "blur_occlusion: expected diameter above 0, got nan",
        ),
        (
            "blur_occlusion",
            {"softening": -1.0},
            "blur_occlusion: expected softening of at least 0, got -1.0",
        ),
        (
            "variable_occlusion",
            {"share": 0.0},
            "variable_occlusion: expected share above 0 and at most 1, got 0.0",
        ),
        ("variable_occlusion", {"count": 0}, "variable_occlusion: expected count above 0, got 0"),
        ("guided_inversion", {"steps": 0}, "guided_inversion: expected steps of at least 1, got 0"),
        (
            "guided_inversion",
            {"initial": 0.0},
            "guided_inversion: expected initial above 0, got 0.0",
        ),
        (
            "guided_inversion",
            {"blur_sigma": -1.0},
            "guided_inversion: expected blur_sigma of at least 0, got -1.0",
        ),
        ("rise", {"masks": 0}, "rise: expected masks of at least 1, got 0"),
        ("rise", {"cells": 0}, "rise: expected cells of at least 1, got 0"),
        (
            "rise",
            {"probability": 1.5},
            "rise: expected probability above 0 and at most 1, got 1.5",
        ),
    ],
)
def test_refusals(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute(method, Scorer().double(), some_images(), 0, **options)
    assert str(caught.value) == message
