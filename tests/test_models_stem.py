"""The first convolution in its other form: the same outputs and gradients, where it is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from casm_fast.models import build_encoder
from casm_fast.models.encoder import ResNetEncoder
from casm_fast.models.stem import stem_convolution


def outcome(output: Tensor, images: Tensor, convolution: nn.Conv2d) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    inputs = [images, *convolution.parameters()]
    return [output.detach(), *torch.autograd.grad(output, inputs, weights)]


@pytest.mark.parametrize("kernel", [5, 7])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(12, 11), (13, 14), (15, 16), (16, 7)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_outputs_and_gradients_are_those_of_the_convolution(
    kernel: int, padding: int, size: tuple[int, int], order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, kernel, 2, padding, bias=padding == 1)
    images = torch.randn(2, 3, *size).contiguous(memory_format=order).requires_grad_()
    got = stem_convolution(convolution, images)
    assert "Convolution" in type(got.grad_fn).__name__
    # Twelve channels: it was not simply called.
    assert got.grad_fn._saved_input.shape[1] == 12  # type: ignore[union-attr]
    found = outcome(got, images, convolution)
    for ours, theirs in zip(found, outcome(convolution(images), images, convolution), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # worst measured: 8e-7


@pytest.mark.parametrize(
    "change",
    [
        {"kernel_size": 3},
        {"stride": 1},
        {"dilation": 2},
        {"groups": 3, "out_channels": 6},
        {"padding_mode": "circular"},
        {"padding": "valid"},
    ],
)
def test_other_convolutions_are_called(change: dict[str, object]) -> None:
    options = {"out_channels": 4, "kernel_size": 5, "stride": 2, "padding": 2, **change}
    convolution = nn.Conv2d(3, **options)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 12, 12, requires_grad=True)
    assert torch.equal(stem_convolution(convolution, images), convolution(images))


def test_hooks_see_the_convolution_called() -> None:
    convolution = nn.Conv2d(3, 4, 7, 2, 3)
    seen: list[torch.Size] = []
    convolution.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    stem_convolution(convolution, torch.randn(2, 3, 12, 12, requires_grad=True))
    assert seen == [(2, 4, 6, 6)]


def test_a_resnet_has_the_same_gradients_for_its_images() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", classes=5).eval()
    assert isinstance(encoder, ResNetEncoder)
    images = torch.randn(2, 3, 45, 64, requires_grad=True)
    assert torch.equal(encoder(images)[0], encoder(images.detach())[0])
    encoder.by_blocks = True
    (ours,) = torch.autograd.grad(encoder(images)[0][:, 1].sum(), images)
    (theirs,) = torch.autograd.grad(encoder.backbone(images)[:, 1].sum(), images)
    assert ours.abs().max() > 1e-3
    # Worst measured: 2e-7 of the largest.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
