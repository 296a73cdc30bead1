"""Steps of meaningful perturbation: ours beside the best that ordinary torch ops give.

A call is `STEPS` steps of the default settings (blur, shifts, softmax, beta 3, Adam, clamp) from
one first mask; 300 steps of B images take 60 calls. Rivals, on the same network and batch:

* "torch, batched": two matrix products with ready weights for the up-sampling, cropped views, the
  norms in plain torch, one autograd pass, torch's Adam with foreach kernels;
* "torch, compiled": the same, with everything but the network compiled, gradients included;
* "torch, one by one": the same for one image after another, as all public ports do it;
* "network alone": one forward pass and the gradient to its input, per step, which no method can go
  below. It computes no mask: timed, not ranked. Ours over this is what the method costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
CASES = [
    pytest.param("compact", 64, 8, id="compact-8x64", marks=pytest.mark.long),
    pytest.param("compact", 64, 1, id="compact-1x64", marks=pytest.mark.long),
    pytest.param("compact", 64, 32, id="compact-32x64", marks=pytest.mark.long),
    pytest.param("compact", 64, 128, id="compact-128x64", marks=pytest.mark.long),
    pytest.param("googlenet", 224, 1, id="googlenet-1x224", marks=pytest.mark.long),
    pytest.param("googlenet", 224, 8, id="googlenet-8x224", marks=pytest.mark.long),
    pytest.param("googlenet", 224, 32, id="googlenet-32x224", marks=pytest.mark.long),
]


def build(network: str) -> nn.Module:
    torch.manual_seed(0)
    if network == "compact":
        return build_encoder("compact", classes=8).backbone
    return torchvision.models.get_model(
        network, weights=None, num_classes=1000, aux_logits=False, init_weights=True
    )


class TorchLoop:
    """The same steps by ordinary torch ops."""

    def __init__(
        self, network: nn.Module, images: Tensor, targets: Tensor, config: PerturbConfig
    ) -> None:
        self.network, self.targets, self.config = network, targets, config
        side = images.shape[-1]
        blurred = ops.gaussian_blur(images, config.blur_sigma)  # once, for all rivals
        room = side + config.jitter
        self.images, self.blurred = (
            interpolate(one, size=(room, room), mode="bilinear") for one in (images, blurred)
        )
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
        x = self.images[:, :, : self.side, : self.side].contiguous().requires_grad_()
        for _ in range(STEPS):
            score = self.network(x).softmax(1).gather(1, self.targets).sum()
            torch.autograd.grad(score, x)
        return first


@pytest.mark.parametrize(("network", "side", "batch"), CASES)
def test_steps(
    race: Callable[..., dict[str, Any]], device: torch.device, network: str, side: int, batch: int
) -> None:
    config = PerturbConfig(steps=STEPS)
    classifier = build(network).to(device)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, side, side, generator=generator).to(device)
    # Far enough from flat for gradients above rounding, which Adam would enlarge.
    first = (0.2 + 0.6 * torch.rand(batch, 1, 28, 28, generator=generator)).to(device)
    targets = (torch.arange(batch) % 8)[:, None].to(device)
    with judging(classifier, config) as judge:
        still = pictures(images, config)
        moving = still.enlarged(config.jitter)
        offsets = shifts(config).to(device)
        rival = TorchLoop(classifier, images, targets, config)
        show = torch.compile(TorchLoop.show, dynamic=False)
        penalties = torch.compile(TorchLoop.penalties, dynamic=False)
        peers = {
            "torch, batched": lambda: rival.run(first),
            "torch, compiled": lambda: rival.run(first, show=show, penalties=penalties),
            "network alone": lambda: rival.network_alone(first),
        }
        if batch > 1:
            peers["torch, one by one"] = lambda: torch.cat(
                [rival.run(first, slice(n, n + 1)) for n in range(batch)]
            )
        race(
            op="perturb",
            case=f"{network} {batch}x3x{side}x{side}, {STEPS} steps",
            ours=lambda: descend(judge, moving, Targets(targets), first, offsets).masks,
            peers=peers,
            expected=lambda: rival.run(first),
            tolerance=2e-2,  # of single cells whose gradient is near 0
            bytes=STEPS * 3 * images.nbytes,
            images=batch,
            inexact={"network alone": "computes no mask"},
        )
