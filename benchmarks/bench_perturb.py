"""Steps of meaningful perturbation: ours beside the best that ordinary torch ops give.

A call is `STEPS` steps of the default settings (blur, shifts, softmax, beta 3, Adam, clamp) from
one first mask; 300 steps of B images take 60 calls. Rivals, on the same network and batch:

* "torch, batched": two matrix products with ready weights for the up-sampling, cropped views, the
  norms in plain torch, one autograd pass, torch's Adam with foreach kernels;
* "torch, compiled": the same, with everything but the network compiled, gradients included;
* both once more on images in channels_last, which `perturb` chooses by itself and no port does;
* "torch, one by one": the same for one image after another, as all public ports do it;
* "network alone": one forward pass and the gradient to its input, per step, in the faster of both
  layouts, which no method can go below. It computes no mask: timed, not ranked.

With each case: `network_share`, of our time, and `limit`, the ratio to the best rival that a method
would have that costs nothing beside the network. "probe" is a classifier of one convolution, the
smallest that is one; "compact" that of the embedded set.

`test_resampling` races what the authors' code does in Python loops at each step: the mask up to 224
pixels by nearest, and the gradient down again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from casm_fast import ops
from casm_fast.models import build_encoder
from casm_fast.models.targets import Targets
from casm_fast.ops.jitter_mask import axis_weights
from casm_fast.perturbation import PerturbConfig
from casm_fast.perturbation.descent import descend
from casm_fast.perturbation.judging import judging
from casm_fast.perturbation.showing import pictures, shifts

STEPS = 5
SIZES = {
    "probe": (64, (32, 1, 8, 128)),
    "compact": (64, (32, 1, 8, 128)),
    "googlenet": (224, (8, 1, 32)),
}
CASES = [
    pytest.param(network, side, batch, id=f"{network}-{batch}x{side}", marks=pytest.mark.long)
    for network, (side, batches) in SIZES.items()
    for batch in batches
]


class Probe(nn.Module):
    """One convolution, mean features, one layer of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 7, stride=4, padding=3)
        self.head = nn.Linear(8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).relu_().mean(dim=(2, 3)))


def build(network: str) -> nn.Module:
    torch.manual_seed(0)
    if network == "probe":
        return Probe()
    if network == "compact":
        return build_encoder("compact", classes=8).backbone
    return torchvision.models.get_model(
        network, weights=None, num_classes=1000, aux_logits=False, init_weights=True
    )


class TorchLoop:
    """The same steps by ordinary torch ops."""

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        targets: Tensor,
        config: PerturbConfig,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.network, self.targets, self.config = network, targets, config
        side = images.shape[-1]
        blurred = ops.gaussian_blur(images, config.blur_sigma)  # once, for all rivals
        room = side + config.jitter
        self.images, self.blurred = (
            interpolate(one, size=(room, room), mode="bilinear").to(memory_format=layout)
            for one in (images, blurred)
        )
        self.plain = images.to(memory_format=layout)
        self.weights = axis_weights(28, side, config.mask_sigma, images)
        self.offsets = [(int(y), int(x)) for y, x in shifts(config)]
        self.side = side

    @staticmethod
    def show(mask: Tensor, weights: Tensor, image: Tensor, blurred: Tensor) -> Tensor:
        large = weights @ mask @ weights.T
        return blurred + large * (image - blurred)

    @staticmethod
    def penalties(mask: Tensor) -> Tensor:
        dx = pad(mask[..., :, 1:] - mask[..., :, :-1], (0, 1))
        dy = pad(mask[..., 1:, :] - mask[..., :-1, :], (0, 0, 0, 1))
        square = dx * dx + dy * dy
        tv = (square * (square + 1e-20).sqrt()).sum()
        return 1e-4 * (1 - mask).abs().sum() + 1e-2 * tv

    def run(
        self,
        first: Tensor,
        part: slice = slice(None),
        show: Callable[..., Tensor] | None = None,
        penalties: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        show, penalties = show or self.show, penalties or self.penalties
        mask = first[part].clone().requires_grad_()
        adam = torch.optim.Adam([mask], lr=0.1, foreach=True)
        for oy, ox in self.offsets:
            rows, columns = slice(oy, oy + self.side), slice(ox, ox + self.side)
            image = self.images[part, :, rows, columns]
            blurred = self.blurred[part, :, rows, columns]
            logits = self.network(show(mask, self.weights, image, blurred))
            score = logits.softmax(1).gather(1, self.targets[part]).sum()
            (mask.grad,) = torch.autograd.grad(score + penalties(mask), mask)
            adam.step()
            with torch.no_grad():
                mask.clamp_(0, 1)
        return mask.detach()

    def network_alone(self, first: Tensor) -> Tensor:
        x = self.plain.detach().requires_grad_()
        for _ in range(STEPS):
            score = self.network(x).softmax(1).gather(1, self.targets).sum()
            torch.autograd.grad(score, x)
        return first


@pytest.mark.parametrize(("network", "side", "batch"), CASES)
def test_steps(
    race: Callable[..., dict[str, Any]],
    benchmark: Any,
    device: torch.device,
    network: str,
    side: int,
    batch: int,
) -> None:
    config = PerturbConfig(steps=STEPS)
    classifier = build(network).to(device)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, side, side, generator=generator).to(device)
    # Far enough from flat for gradients above rounding, which Adam would enlarge.
    first = (0.2 + 0.6 * torch.rand(batch, 1, 28, 28, generator=generator)).to(device)
    targets = Targets((torch.arange(batch) % 8)[:, None].to(device))
    interleaved = device.type == "cpu"  # as perturb would choose
    layout = torch.channels_last if interleaved else torch.contiguous_format
    with judging(classifier, config) as judge:
        moving = pictures(images, config, layout).enlarged(config.jitter)
        offsets = shifts(config).to(device)
        show = torch.compile(TorchLoop.show, dynamic=False)
        penalties = torch.compile(TorchLoop.penalties, dynamic=False)
        peers: dict[str, Callable[[], Tensor]] = {}
        for kind, suffix in (
            (torch.contiguous_format, ""),
            (torch.channels_last, ", channels_last"),
        ):
            loop = TorchLoop(classifier, images, targets.classes, config, kind)
            peers[f"torch, batched{suffix}"] = partial(loop.run, first)
            peers[f"torch, compiled{suffix}"] = partial(
                loop.run, first, show=show, penalties=penalties
            )
            peers[f"network alone{suffix}"] = partial(loop.network_alone, first)
        rival = TorchLoop(classifier, images, targets.classes, config)
        if batch > 1:
            peers["torch, one by one"] = lambda: torch.cat(
                [rival.run(first, slice(n, n + 1)) for n in range(batch)]
            )
        alone = [name for name in peers if name.startswith("network alone")]

        def ours() -> Tensor:
            with torch.no_grad():
                return descend(judge, moving, targets, first, offsets).masks

        result = race(
            op="perturb",
            case=f"{network} {batch}x3x{side}x{side}, {STEPS} steps",
            ours=ours,
            peers=peers,
            expected=lambda: rival.run(first),
            tolerance=2e-2,  # of single cells whose gradient is near 0
            bytes=STEPS * 3 * images.nbytes,
            images=batch,
            inexact=dict.fromkeys(alone, "computes no mask"),
        )
    times = {name: row["median_ms"] for name, row in result["competitors"].items()}
    floor = min(times[name] for name in alone)
    extra = {"network_share": floor / times["ours"], "limit": times[result["best_peer"]] / floor}
    benchmark.extra_info.update(extra)
    print(
        f"\n{result['case']}: {times['ours'] / STEPS:.2f} ms a step, network "
        f"{100 * extra['network_share']:.1f} %; {result['ratio']:.2f}x {result['best_peer']}, "
        f"{extra['limit']:.2f}x at most"
    )


def python_loops(mask: np.ndarray, gradient: np.ndarray) -> tuple[Tensor, Tensor]:
    """The mask enlarged and the gradient brought down, number by number, flat."""
    h, w = mask.shape
    scale = len(gradient) // h
    large = np.zeros((h * scale, w * scale), np.float32)
    for y in range(h * scale):
        for x in range(w * scale):
            large[y, x] = mask[y // scale, x // scale]
    small = np.zeros((h, w), np.float32)
    for y in range(h):
        for x in range(w):
            for dy in range(scale):
                for dx in range(scale):
                    small[y, x] += gradient[y * scale + dy, x * scale + dx]
    return torch.from_numpy(large).flatten(), torch.from_numpy(small).flatten()


@pytest.mark.parametrize("batch", [1, 32])
def test_resampling(race: Callable[..., dict[str, Any]], device: torch.device, batch: int) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(batch, 1, 28, 28, generator=generator).to(device)
    gradient = torch.randn(batch, 1, 224, 224, generator=generator).to(device)
    numbers = [one[:, 0].cpu().numpy() for one in (mask, gradient)]

    def resample(enlarge: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = mask.detach().requires_grad_()
        large = enlarge(leaf)
        (small,) = torch.autograd.grad(large, leaf, gradient)
        return torch.cat([large.detach().flatten(), small.flatten()])

    def loops() -> Tensor:
        large, small = zip(*map(python_loops, *numbers), strict=True)
        return torch.cat([*large, *small])

    race(
        op="perturb",
        case=f"resampling of a step, {batch}x1x28x28 and 224x224",
        ours=lambda: resample(lambda leaf: ops.upsample_mask(leaf, (224, 224), 0.0)),
        peers={
            "torch": lambda: resample(lambda leaf: interpolate(leaf, scale_factor=8.0)),
            "Python loops": loops,
        },
        expected=lambda: resample(lambda leaf: interpolate(leaf, scale_factor=8.0)),
        tolerance=1e-4,
        bytes=2 * (mask.nbytes + gradient.nbytes),
        images=batch,
    )
