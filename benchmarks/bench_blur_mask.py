"""gaussian_blur and blur_mask, forward and through autograd.

Exact peers: two matrix products with ready matrices (G X G^T), OpenCV and SciPy plane by plane in a
thread pool, two 1-D convolutions of torch, kornia and torchvision. All of them mirror the border;
torch's own padding, and so the last three, cannot where the radius reaches the side: there they are
left out. The blend of a peer is its blur and torch.lerp. The expected result is ours in float64,
which the tests hold against SciPy; a peer that disagreed with it would stop the race.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import kornia
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from torch import Tensor
from torch.nn.functional import conv2d, pad
from torchvision.transforms.v2.functional import gaussian_blur as torchvision_blur

from casm_fast import ops

LONG = pytest.mark.long
CASES = [
    pytest.param(32, 3, 224, 10.0, id="32x3x224-sigma10"),
    pytest.param(32, 3, 224, 1.0, id="32x3x224-sigma1"),
    pytest.param(32, 3, 28, 2.5, id="32x3x28-sigma2.5"),
    pytest.param(1, 3, 224, 10.0, id="1x3x224-sigma10"),
    *(
        pytest.param(
            batch, channels, side, sigma, id=f"{batch}x{channels}x{side}-{sigma}", marks=LONG
        )
        for batch, channels, side in (
            (1, 3, 28),
            (256, 1, 28),
            (1, 3, 224),
            (32, 3, 224),
            (256, 3, 224),
            (1, 3, 1024),
        )
        for sigma in (0.5, 2.5, 20.0, 40.0)
    ),
]
# Worst error measured, of images in [0, 1]: 5e-7 ours, 1.3e-6 the peers (the convolutions).
TOLERANCE = 1e-5

Blur = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolutions as exact as the others; cuDNN's default is not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def images(batch: int, channels: int, side: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, channels, side, side), generator=generator).to(device)


def matrix_blur(side: int, sigma: float, device: torch.device) -> Blur:
    matrix = gaussian_filter1d(np.eye(side), sigma, axis=0, mode="mirror", truncate=4)
    rows = torch.from_numpy(matrix).float().to(device)
    columns = rows.t().contiguous()
    return lambda image: torch.matmul(torch.matmul(rows, image), columns)


def convolution_blur(sigma: float, device: torch.device) -> Blur:
    radius = int(4 * sigma + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=device) / sigma) ** 2)
    taps /= taps.sum()

    def blur(image: Tensor) -> Tensor:
        planes = image.flatten(0, 1).unsqueeze(1)
        planes = conv2d(pad(planes, (0, 0, radius, radius), mode="reflect"), taps.view(1, 1, -1, 1))
        planes = conv2d(pad(planes, (radius, radius, 0, 0), mode="reflect"), taps.view(1, 1, 1, -1))
        return planes.view(image.shape)

    return blur


def pooled_blur(blur_plane: Callable[[np.ndarray, np.ndarray], object]) -> Blur:
    """Plane after plane on a pool of as many threads as torch uses."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads)

    def blur(image: Tensor) -> Tensor:
        output = torch.empty_like(image)
        planes, results = (t.flatten(0, 1).numpy() for t in (image, output))

        def share(first: int) -> None:
            for i in range(first, len(planes), threads):
                blur_plane(planes[i], results[i])

        list(pool.map(share, range(threads)))
        return output

    return blur


def peers_of(side: int, sigma: float, device: torch.device) -> dict[str, Blur]:
    radius = int(4 * sigma + 0.5)
    size = (2 * radius + 1, 2 * radius + 1)
    peers: dict[str, Blur] = {"matrices": matrix_blur(side, sigma, device)}
    if device.type == "cpu":
        cv2.setNumThreads(1)
        peers["opencv"] = pooled_blur(
            lambda plane, out: cv2.GaussianBlur(
                plane, size, sigma, dst=out, borderType=cv2.BORDER_REFLECT_101
            )
        )
        peers["scipy"] = pooled_blur(
            lambda plane, out: gaussian_filter(plane, sigma, output=out, mode="mirror", truncate=4)
        )
    if radius < side:
        peers["torch convolutions"] = convolution_blur(sigma, device)
        peers["kornia"] = lambda image: kornia.filters.gaussian_blur2d(
            image, size, (sigma, sigma), border_type="reflect"
        )
        if side * radius <= 224 * 40:  # a 2-D kernel: minutes beyond
            peers["torchvision"] = lambda image: torchvision_blur(image, list(size), [sigma, sigma])
    return peers


def blend_with(blur: Blur) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda image, mask: torch.lerp(blur(image), image, mask)


def with_gradient(blend: Callable[[Tensor, Tensor], Tensor], image: Tensor, mask: Tensor) -> Tensor:
    leaf = mask.detach().requires_grad_()
    blend(image, leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize(("batch", "channels", "side", "sigma"), CASES)
def test_blur(batch, channels, side, sigma, race, device):
    image = images(batch, channels, side, device)
    peers = peers_of(side, sigma, device)
    race(
        op="gaussian_blur",
        case=f"{batch}x{channels}x{side}x{side} sigma {sigma:g}",
        ours=lambda: ops.gaussian_blur(image, sigma),
        peers={name: lambda blur=blur: blur(image) for name, blur in peers.items()},
        expected=lambda: ops.gaussian_blur(image.double(), sigma),
        tolerance=TOLERANCE,
        bytes=2 * image.nbytes,
        images=batch,
    )


@pytest.mark.parametrize(("batch", "channels", "side", "sigma"), CASES)
def test_blend(batch, channels, side, sigma, race, device):
    image, mask = images(batch, channels, side, device), images(batch, 1, side, device, seed=1)
    peers = {name: blend_with(blur) for name, blur in peers_of(side, sigma, device).items()}
    race(
        op="blur_mask",
        case=f"{batch}x{channels}x{side}x{side} sigma {sigma:g}",
        ours=lambda: ops.blur_mask(image, mask, sigma),
        peers={name: lambda blend=blend: blend(image, mask) for name, blend in peers.items()},
        expected=lambda: ops.blur_mask(image.double(), mask.double(), sigma),
        tolerance=TOLERANCE,
        bytes=2 * image.nbytes + mask.nbytes,
        images=batch,
    )


@pytest.mark.parametrize(
    ("batch", "channels", "side", "sigma"), [(32, 3, 224, 10.0), (32, 3, 28, 2.5)]
)
def test_gradient_of_the_mask(batch, channels, side, sigma, race, device):
    image, mask = images(batch, channels, side, device), images(batch, 1, side, device, seed=1)
    peers = {
        name: blend_with(blur)
        for name, blur in peers_of(side, sigma, device).items()
        if name in ("matrices", "torch convolutions", "kornia")
    }
    blurred = ops.gaussian_blur(image.double(), sigma)
    race(
        op="blur_mask forward + backward",
        case=f"{batch}x{channels}x{side}x{side} sigma {sigma:g}",
        ours=lambda: with_gradient(lambda i, m: ops.blur_mask(i, m, sigma), image, mask),
        peers={
            name: lambda blend=blend: with_gradient(blend, image, mask)
            for name, blend in peers.items()
        },
        expected=(image.double() - blurred).sum(1, keepdim=True),
        tolerance=TOLERANCE,
        bytes=4 * image.nbytes + 2 * mask.nbytes,
        images=batch,
    )
