"""Extremal perturbations: the smooth max, the ranked area, the paper's loop, and independence."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

import casm_fast
from casm_fast.models.targets import Targets
from casm_fast.perturbation import Extremal, ExtremalConfig, extremal, ranking
from casm_fast.perturbation.extremes import _rewarded, _Veil
from casm_fast.perturbation.judging import judging
from casm_fast.perturbation.ranking import ranked_area
from casm_fast.perturbation.smooth_max import SmoothMax

CLASSES = 5
CONFIG = casm_fast.PerturbConfig(score="logit")


def small_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(54, CLASSES),
    )
    with torch.no_grad():
        net[5].weight.mul_(20)
    return net.to(dtype).eval()


def some_images(
    count: int, height: int = 11, width: int = 14, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    return 1.5 * F.interpolate(coarse, size=(height, width), mode="bicubic").to(dtype)


SMALL = {"cell": 3, "sigma": 4.0, "max_blur": 3.0, "levels": 4}


# ---------------------------------------------------------------- the parts


def slow_smooth_max(
    parameters: torch.Tensor, size: tuple[int, int], cell: int, sigma: float, coldness: float
) -> torch.Tensor:
    """The definition, pixel by pixel; ``[h, w]`` -> ``[H, W]``, differentiable."""
    radius = 1 + math.ceil(sigma / cell)
    around = F.pad(parameters, (radius,) * 4)
    side, rows = 2 * radius + 1, []
    for y in range(size[0]):
        row = []
        for x in range(size[1]):
            i, j = y // cell, x // cell
            kernel = []
            for v in range(i - radius, i + radius + 1):
                for u in range(j - radius, j + radius + 1):
                    dy, dx = (y + 0.5) - (v + 0.5) * cell, (x + 0.5) - (u + 0.5) * cell
                    kernel.append(math.exp(-2 * max(math.hypot(dy, dx) / sigma - 0.5, 0) ** 2))
            seen = around[i : i + side, j : j + side].flatten()
            f = seen * torch.tensor(kernel, dtype=seen.dtype)
            e = (coldness * f).exp()
            row.append((f * e).sum() / e.sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("size", "cell", "sigma", "coldness"),
    [
        ((11, 14), 3, 4.0, 20.0),
        ((6, 5), 2, 5.0, 3.0),
        ((4, 7), 1, 0.7, 20.0),
        ((5, 5), 7, 9.0, 0.1),
    ],
)
def test_the_smooth_max_is_its_definition(
    size: tuple[int, int], cell: int, sigma: float, coldness: float
) -> None:
    """Measured: 7e-15 forward, 5e-14 backward."""
    smooth_max = SmoothMax(size, cell, sigma, coldness, torch.zeros((), dtype=torch.float64))
    h, w = smooth_max.grid
    assert (h, w) == (math.ceil(size[0] / cell), math.ceil(size[1] / cell))
    generator = torch.Generator().manual_seed(1)
    parameters = torch.rand(2, 1, h, w, generator=generator, dtype=torch.float64)
    gradient = torch.randn(2, 1, *size, generator=generator, dtype=torch.float64)
    masks, sums = smooth_max.masks(parameters)
    pulled = smooth_max.pull(parameters, masks, sums, gradient)
    assert masks.shape == (2, 1, *size)
    for number in range(2):
        leaf = parameters[number, 0].clone().requires_grad_()
        expected = slow_smooth_max(leaf, size, cell, sigma, coldness)
        assert (masks[number, 0] - expected).abs().max() < 1e-12
        expected.backward(gradient[number, 0])
        assert (pulled[number, 0] - leaf.grad).abs().max() < 1e-11


def test_one_parameter_shows_a_disc() -> None:
    """The promise of the kernel: at least a disc of radius sigma / 2, and nothing far away."""
    smooth_max = SmoothMax((49, 49), 7, 14.0, 20.0, torch.zeros((), dtype=torch.float64))
    parameters = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    parameters[0, 0, 3, 3] = 1
    mask = smooth_max.masks(parameters)[0][0, 0].numpy()
    away = np.hypot(*(np.indices((49, 49)) - 24))
    assert mask[away <= 7].min() > 0.999
    assert mask[away > 24].max() < 0.1
    assert 0 <= mask.min() <= mask.max() <= 1


class Ranked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, masks, areas):
        loss, gradient = ranked_area(masks, areas)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[:, :, None, None], None


def test_the_ranked_area_is_the_sorted_difference() -> None:
    areas = (0.1, 0.33, 1.0)
    order = torch.stack(
        [torch.randperm(35, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    )
    masks = ((order.double() + 0.5) / 35).view(2, 3, 5, 7).requires_grad_()
    loss, _ = ranked_area(masks.detach(), areas)
    for b in range(2):
        for a, area in enumerate(areas):
            values = np.sort(masks[b, a].detach().numpy().flatten())
            step = np.arange(35) >= math.floor(35 * (1 - area))
            assert loss[b, a].item() == pytest.approx(((values - step) ** 2).mean(), abs=1e-14)
    assert torch.autograd.gradcheck(Ranked.apply, (masks, areas))


def test_the_numbers_of_ones_are_brought_to_the_device_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each copy to a GPU would wait for it, and each step asks for the same."""
    made: list[object] = []
    original = torch.tensor

    def counted(*args: object, **options: object) -> torch.Tensor:
        made.append(args)
        return original(*args, **options)

    masks = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    ranking._column.cache_clear()
    monkeypatch.setattr(torch, "tensor", counted)
    first, again = ranked_area(masks, (0.1, 0.3, 0.7)), ranked_area(masks, [0.1, 0.3, 0.7])
    assert len(made) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    ranked_area(masks, (0.1, 0.3, 0.8))
    assert len(made) == 2


def test_tied_pixels_share_their_places() -> None:
    """The mean over all orders of the ties, each of them sorted and compared by NumPy."""
    masks = torch.tensor([0.2, 0.5, 0.5, 0.5, 0.5, 0.9], dtype=torch.float64).view(1, 1, 2, 3)
    loss, gradient = ranked_area(masks, (0.5,))  # three ones: the largest and two of four
    assert loss.item() == pytest.approx((0.2**2 + 4 * 0.25 + 0.1**2) / 6, abs=1e-15)
    expected = [0.4, 0, 0, 0, 0, -0.2]  # half the orders pull a tied pixel up, half down
    assert np.allclose(gradient.flatten().numpy(), np.array(expected) / 6, atol=1e-15)
    full, gradient = ranked_area(torch.ones(1, 1, 4, 4), (0.25,))
    assert full.item() == pytest.approx(0.75)
    assert torch.allclose(gradient, torch.full((1, 1, 4, 4), 2 / 16 * 0.75))


@pytest.mark.parametrize("variant", ["preserve", "delete", "dual"])
@pytest.mark.parametrize("reward", ["simple", "contrastive"])
def test_gradients_of_the_reward(variant: str, reward: str) -> None:
    net, images = small_net(), some_images(2)
    net[0] = nn.Identity()  # numerical differences must not step over kinks
    config = ExtremalConfig(variant=variant, reward=reward, **SMALL)
    generator = torch.Generator().manual_seed(2)
    masks = 0.1 + 0.2 * torch.rand(2, 2, 11, 14, generator=generator, dtype=torch.float64)
    with judging(net, CONFIG) as judge:
        veil = _Veil.over(images, config)
        targets = Targets(torch.tensor([[1, 2], [1, 2], [3, -1], [3, -1]]))
        reward_of, gradient = _rewarded(judge, veil, targets, masks, config, True)
        for place in [(0, 0, 3, 4), (0, 1, 10, 13), (1, 0, 0, 0), (1, 1, 5, 6)]:
            step = torch.zeros_like(masks)
            step[place] = 1e-6
            above, _ = _rewarded(judge, veil, targets, masks + step, config, True)
            below, _ = _rewarded(judge, veil, targets, masks - step, config, True)
            slope = ((above - below) / 2e-6).view(2, 2)
            assert slope[place[:2]].item() == pytest.approx(gradient[place].item(), abs=1e-7)
            slope[place[:2]] = 0
            assert (slope == 0).all()
    assert reward_of.shape == (4,)


# ---------------------------------------------------------------- the method


class Quadrant(nn.Module):
    """Reads the mean of the upper right quadrant of the images, and nothing else."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        H, W = images.shape[2:]
        mean = 30 * images[:, :, : H // 2, W // 2 :].mean(dim=(1, 2, 3))
        return torch.stack([mean, -mean], dim=1)


@pytest.mark.parametrize("variant", ["preserve", "delete", "dual"])
def test_a_reader_of_one_quadrant_is_found_out(variant: str) -> None:
    """Measured: IoU 0.996 (dual: 0.959); masks of a tenth lie inside."""
    generator = torch.Generator().manual_seed(3)
    images = 1 + 0.1 * torch.randn(2, 3, 48, 64, generator=generator)
    made = extremal(
        Quadrant(),
        images,
        0,
        areas=(0.25, 0.1),
        variant=variant,
        perturbation="fade",
        flip=False,
        cell=4,
        sigma=6.0,
        steps=200,
    )
    quadrant = torch.zeros(48, 64, dtype=torch.bool)
    quadrant[:24, 32:] = True
    salient = made.masks > 0.5
    both, either = (salient & quadrant).sum(dim=(2, 3)), (salient | quadrant).sum(dim=(2, 3))
    assert (both / either)[:, 0].min() > (0.9 if variant == "dual" else 0.99)
    assert (both / salient.sum(dim=(2, 3)))[:, 1].min() > 0.98
    assert (made.reached - made.areas).abs().max() < 0.06
    assert not made.diverged.any()
    left = made.score_after[:, 0] / made.score_before
    assert left.max() < 0.1 if variant == "delete" else left.min() > 0.9


def slow_extremal(
    net: nn.Module, image: torch.Tensor, label: int, area: float, config: ExtremalConfig
) -> torch.Tensor:
    """The paper's optimisation of one image and one area: loops, autograd, torch's SGD."""
    (H, W), last = image.shape[1:], config.levels - 1
    levels = [image]
    if config.perturbation == "blur":
        levels = [
            torch.from_numpy(
                np.stack(
                    [
                        ndimage.gaussian_filter(
                            plane, config.max_blur * (1 - n / last), mode="mirror"
                        )
                        if n < last
                        else plane
                        for plane in image.numpy()
                    ]
                )
            )
            for n in range(config.levels)
        ]

    def shown(mask: torch.Tensor) -> torch.Tensor:
        if config.perturbation == "fade":
            return mask * image
        return sum(
            (1 - (mask * last - number).abs()).clamp(min=0) * level
            for number, level in enumerate(levels)
        )

    def reward_of(mask: torch.Tensor, mirror: bool) -> torch.Tensor:
        seen = shown(mask)
        logits = net((seen.flip(2) if mirror else seen)[None])[0]
        if config.reward == "simple":
            return logits[label]
        return logits[label] - max(logits[k] for k in range(CLASSES) if k != label)

    zeros = math.floor(H * W * (1 - area))
    grid = (math.ceil(H / config.cell), math.ceil(W / config.cell))
    parameters = torch.ones(grid, dtype=image.dtype, requires_grad=True)
    sgd = torch.optim.SGD([parameters], config.learning_rate, config.momentum, config.dampening)
    weight = config.area_weight
    for step in range(config.steps):
        mask = slow_smooth_max(parameters, (H, W), config.cell, config.sigma, config.coldness)
        values = mask.detach().flatten().tolist()
        border = sorted(values)[zeros]
        more = sum(value > border + 1e-5 for value in values)
        tied = sum(abs(value - border) <= 1e-5 for value in values)
        share = (len(values) - zeros - more) / tied
        area_loss = 0
        for value, pixel in zip(values, mask.flatten(), strict=True):
            up = 1.0 if value > border + 1e-5 else share if value >= border - 1e-5 else 0.0
            area_loss = area_loss + up * (pixel - 1) ** 2 + (1 - up) * pixel**2
        area_loss = area_loss / len(values)
        mirror = config.flip and step % 2 == 0
        reward = 0
        if config.variant in ("preserve", "dual"):
            reward = reward + reward_of(mask, mirror)
        if config.variant in ("delete", "dual"):
            reward = reward - reward_of(1 - mask, mirror)
        sgd.zero_grad()
        (weight * area_loss - reward).backward()
        sgd.step()
        with torch.no_grad():
            parameters.clamp_(0, 1)
        weight *= config.area_growth
    return parameters.detach()


@pytest.mark.parametrize(
    ("variant", "reward", "perturbation"),
    [
        ("preserve", "simple", "blur"),
        ("delete", "contrastive", "blur"),
        ("dual", "simple", "fade"),
    ],
)
def test_agrees_with_the_papers_loop(variant: str, reward: str, perturbation: str) -> None:
    """Measured after 8 steps, two images and areas at once: 1e-12 at most."""
    net, images = small_net(), some_images(2, 8, 10)
    config = ExtremalConfig(
        areas=(0.2, 0.5),
        variant=variant,
        reward=reward,
        perturbation=perturbation,
        steps=8,
        area_weight=30.0,
        learning_rate=0.1,
        **SMALL,
    )
    made = extremal(net, images, [2, 4], config)
    for number, label in enumerate((2, 4)):
        for place, area in enumerate(config.areas):
            expected = slow_extremal(net, images[number], label, area, config)
            found = made.parameters[number, place]
            assert (found - expected).abs().max() < 1e-9
            assert (found - 1).abs().max() > 0.2  # it has gone somewhere


def test_areas_are_reached() -> None:
    """Measured: within 0.015 of each area. The paper's settings, but for sizes in pixels."""
    net, images = small_net(torch.float32), some_images(2, 40, 48, torch.float32)
    areas = (0.1, 0.2, 0.5)
    made = extremal(net, images, None, areas=areas, steps=250, cell=4, sigma=6.0, max_blur=4.0)
    assert (made.reached - made.areas).abs().max() < 0.03
    assert torch.equal(made.reached, made.masks.mean(dim=(2, 3)))
    assert (made.curves.area_loss[..., -1] < 0.2 * made.curves.area_loss[..., 0]).all()
    assert not made.diverged.any()


def test_results_fit_together() -> None:
    net, images = small_net(), some_images(2)
    for variant in ("preserve", "delete"):
        made = extremal(
            net, images, [[1, 3], [2]], areas=(0.3, 0.6), variant=variant, steps=3, **SMALL
        )
        assert made.masks.shape == (2, 2, 11, 14)
        assert made.parameters.shape == (2, 2, 4, 5)
        assert made.curves.reward.shape == (2, 2, 3)
        assert made.targets.tolist() == [[1, 3], [2, -1]]
        assert made.areas.tolist() == pytest.approx([0.3, 0.6])
        logits = net(images.clone())
        expected = torch.stack([logits[0, 1] + logits[0, 3], logits[1, 2]])
        assert torch.allclose(made.score_before, expected)
        total = made.masks.sum(dim=1).numpy()
        for number in range(2):
            smooth = ndimage.gaussian_filter(total[number], 0.09 * 11, mode="mirror")
            assert np.abs(made.saliency[number, 0].numpy() - smooth).max() < 1e-12
        keep = made.masks if variant == "preserve" else 1 - made.masks
        with judging(net, CONFIG) as judge, torch.no_grad():
            veil = _Veil.over(images, made.config)
            shown = judge.ask(veil.shown(keep)).view(2, 2, CLASSES)
            hidden = judge.ask(casm_fast.ops.gaussian_blur(images, 3.0))
        assert torch.allclose(made.score_after[1], shown[1, :, 2])
        assert torch.allclose(made.score_hidden[1], hidden[1, 2])
        objective = made.curves.reward[..., 1] - 300 * 1.0035 * made.curves.area_loss[..., 1]
        assert torch.allclose(made.curves.objective[..., 1], objective)
        assert len(made) == 2
        assert str(made).startswith("2 images: logit ")
    best = extremal(net, images, steps=1, **SMALL)
    assert torch.equal(best.targets[:, 0], net(images.clone()).argmax(dim=1))


def test_together_equals_apart() -> None:
    """Measured: 2e-14; the sums of a pass depend on its size."""
    net, images = small_net(), some_images(3)
    options = {"areas": (0.2, 0.5, 0.7), "steps": 20, **SMALL}
    together = extremal(net, images, None, **options)
    assert together.batch_size == 9
    for batch_size, used in ((1, 1), (2, 2), (6, 6)):
        chunked = extremal(net, images, None, batch_size=batch_size, **options)
        assert (together.parameters - chunked.parameters).abs().max() < 1e-9
        assert chunked.batch_size == used
    for number in range(3):
        for place, area in enumerate(options["areas"]):
            apart = extremal(
                net, images[number : number + 1], None, **{**options, "areas": (area,)}
            )
            assert (together.masks[number, place] - apart.masks[0, 0]).abs().max() < 1e-9
            assert torch.allclose(
                together.curves.objective[number, place], apart.curves.objective[0, 0]
            )


class Needy(nn.Module):
    """Runs out of memory with more than `most` images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.net, self.most = small_net(), most

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.net(images)


def test_out_of_memory_halves_the_batch() -> None:
    images = some_images(4)
    options = {"areas": (0.2, 0.5), "steps": 2, **SMALL}
    whole = extremal(Needy(99), images, 1, **options)
    made = extremal(Needy(3), images, 1, **options)
    assert made.batch_size == 2
    assert (made.masks - whole.masks).abs().max() < 1e-9
    assert extremal(Needy(1), images, 1, **options).batch_size == 1
    assert extremal(Needy(9), images, 1, memory_budget=1e-9, **options).batch_size == 1
    with pytest.raises(torch.OutOfMemoryError):
        extremal(Needy(0), images, 1, **options)


class Brittle(nn.Module):
    """Not finite once an image of positive mean has lost much of it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean(dim=(1, 2, 3))
        value = torch.where((mean > 0) & (mean < 0.7), torch.nan, mean)
        return torch.stack([value, -value], dim=1)


def test_divergence_is_told_and_stays_alone() -> None:
    images = torch.ones(2, 3, 12, 12)
    images[1] = -1
    options = {"areas": (0.3,), "perturbation": "fade", "steps": 60, "cell": 3, "sigma": 4.0}
    made = extremal(Brittle(), images, 0, **options)
    assert made.diverged.tolist() == [[True], [False]]
    assert made.masks.isfinite().all()
    assert made.curves.objective[0, 0].isnan().any()
    assert 0.5 < made.reached[0, 0] < 0.9  # where it was before it broke
    alone = extremal(Brittle(), images[1:], 0, **options)
    assert torch.allclose(made.masks[1], alone.masks[0], atol=1e-6)
    assert str(made).endswith(", 1 masks diverged")
    # Nothing holds this mask to its area: the reward alone shows all of the image.
    free = extremal(Quadrant(), images[:1], 0, areas=(0.3,), area_weight=0.0, steps=3)
    assert not free.diverged.any()


def test_the_callers_model_is_left_as_it_was() -> None:
    net, images = small_net(torch.float32), some_images(2, dtype=torch.float32)
    net.append(nn.BatchNorm1d(CLASSES))
    net.train()
    before, pixels = copy.deepcopy(net.state_dict()), images.clone()
    extremal(net, images, 1, steps=2, **SMALL)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(images, pixels)  # the first layer works in place
    with torch.inference_mode():
        assert extremal(net, images.clone(), 1, steps=2, **SMALL).masks.isfinite().all()


def test_bf16_passes_stay_near() -> None:
    net, images = small_net(torch.float32), some_images(2, dtype=torch.float32)
    exact = extremal(net, images, 1, steps=5, **SMALL)
    rough = extremal(net, images, 1, steps=5, amp="bf16", **SMALL)
    assert rough.masks.dtype == torch.float32
    assert not torch.equal(rough.masks, exact.masks)
    assert (rough.masks - exact.masks).abs().max() < 0.05


def test_the_defaults_are_the_papers() -> None:
    config = ExtremalConfig()
    assert (config.areas, config.steps, config.learning_rate) == ((0.1,), 800, 0.01)
    assert (config.momentum, config.dampening) == (0.9, 0.9)
    assert (config.area_weight, config.area_growth) == (300.0, 1.0035)
    assert (config.cell, config.sigma, config.coldness) == (7, 21.0, 20.0)
    assert (config.levels, config.max_blur, config.smooth) == (8, 20.0, 0.09)
    assert (config.variant, config.reward, config.flip) == ("preserve", "simple", True)
    assert isinstance(extremal(small_net(), some_images(1), 1, steps=1), Extremal)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"areas": ()},
            "areas: expected shares of the image in (0, 1], one at least, got ()",
        ),
        (
            {"areas": (0.1, 10.0)},
            "areas: expected shares of the image in (0, 1], one at least, got (0.1, 10.0)",
        ),
        ({"steps": 0}, "steps: expected a number of at least 1, got 0"),
        ({"levels": 1}, "levels: expected a number of at least 2, got 1"),
        ({"cell": 0}, "cell: expected a number of at least 1, got 0"),
        ({"sigma": 0.0}, "sigma: expected a number above 0, got 0.0"),
        ({"area_weight": -1.0}, "area_weight: expected a number of at least 0, got -1.0"),
        ({"area_growth": 0.9}, "area_growth: expected a number of at least 1, got 0.9"),
        ({"learning_rate": math.nan}, "learning_rate: expected a number above 0, got nan"),
        ({"momentum": 1.0}, "momentum: expected a number in [0, 1), got 1.0"),
        ({"dampening": 1.5}, "dampening: expected a number in [0, 1], got 1.5"),
        ({"variant": "keep"}, "variant: expected one of preserve, delete, dual, got 'keep'"),
        ({"reward": "softmax"}, "reward: expected one of simple, contrastive, got 'softmax'"),
        ({"perturbation": "noise"}, "perturbation: expected one of blur, fade, got 'noise'"),
        ({"amp": "fp16"}, "amp: expected one of off, bf16, got 'fp16'"),
    ],
)
def test_bad_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        ExtremalConfig(**options)
    assert str(caught.value) == text


def test_bad_arguments() -> None:
    images = some_images(2, dtype=torch.float32)
    spoilt = images.clone()
    spoilt[1, 0, 3, 3] = torch.nan
    net = small_net(torch.float32)
    for arguments, options, kind, text in (
        (
            (net, spoilt, 1),
            {},
            ValueError,
            "images: expected finite values, got NaN or infinity in image 1",
        ),
        (
            (net, images, [0, 5]),
            {},
            ValueError,
            "targets: expected classes in 0 ... 4, got 5 for image 1",
        ),
        (
            ("net", images, 1),
            {},
            TypeError,
            "classifier: expected a module or function from images to logits, got str",
        ),
        (
            (net[:2], images, 1),
            {},
            ValueError,
            "classifier: expected logits of shape [1, classes] for the logit score, with 1 classes "
            "at least, got [1, 6, 6, 7]",
        ),
        (
            (net, images, [[0, 1, 2, 3, 4], [1]]),
            {"reward": "contrastive"},
            ValueError,
            "reward: expected a class beside the targets for 'contrastive', got 5 targets of 5 "
            "classes",
        ),
    ):
        with pytest.raises(kind) as caught:
            extremal(*arguments, steps=1, **options)
        assert str(caught.value) == text
