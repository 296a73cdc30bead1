"""gaussian_blur and blur_mask: reference, oracles, gradients, registration, layouts, errors."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from torch.library import opcheck

from casm_fast.ops import blur_mask, gaussian_blur

# Smaller and larger than a block (12 rows), a strip (32 columns) and a tile of the CUDA kernels,
# and no multiples of them.
SHAPES = [(1, 1), (1, 7), (2, 1), (2, 2), (3, 5), (12, 24), (31, 33), (65, 17), (37, 70)]
# Radii 1, 3, 10, 40, 160: from one tap per side to several times the side.
SIGMAS = [0.2, 0.7, 2.5, 10.0, 40.0]
# Worst error measured on images in [0, 1]: 6e-7 and 2e-15 (values), 2e-6 and 3e-15 (gradients).
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
DTYPES = [torch.float32, torch.float64]


def images(shape, batch=2, channels=3, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand((batch, channels, *shape), generator=generator, dtype=torch.float64)
    return image.to(device, dtype)


def image_and_mask(shape, dtype=torch.float64, device="cpu", batch=2):
    image = images(shape, batch, 3, dtype, device, seed=1)
    mask = images(shape, batch, 1, dtype, device, seed=2)
    return image, mask


def scipy_blur(image: torch.Tensor, sigma: float, truncate: float = 4.0) -> torch.Tensor:
    planes = image.detach().cpu().double().numpy()
    blurred = gaussian_filter(planes, (0, 0, sigma, sigma), mode="mirror", truncate=truncate)
    return torch.from_numpy(blurred)


def scipy_transpose(grad: torch.Tensor, sigma: float, truncate: float = 4.0) -> torch.Tensor:
    """The transposed blur, from the matrices of the two axes as SciPy gives them."""
    rows, columns = (
        gaussian_filter1d(np.eye(n), sigma, axis=0, mode="mirror", truncate=truncate)
        for n in grad.shape[2:]
    )
    return torch.from_numpy(rows.T @ grad.detach().cpu().double().numpy() @ columns)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.detach().cpu().double(), expected.detach().cpu().double(), rtol=0, atol=tolerance
    )


# ---------------------------------------------------------------- reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blur_equals_reference(shape, sigma, dtype, device):
    image = images(shape, dtype=dtype, device=device).requires_grad_()
    weight = images(shape, dtype=dtype, device=device, seed=3)
    value, expected = (f(image, sigma) for f in (gaussian_blur, gaussian_blur.reference))
    (grad,) = torch.autograd.grad(value, image, weight)
    (expected_grad,) = torch.autograd.grad(expected, image, weight)
    assert_near(value, expected, TOLERANCE[dtype])
    assert_near(grad, expected_grad, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_blend_equals_reference(shape, sigma, dtype, device):
    inputs = tuple(t.requires_grad_() for t in image_and_mask(shape, dtype, device))
    weight = images(shape, dtype=dtype, device=device, seed=3)
    value, expected = (f(*inputs, sigma) for f in (blur_mask, blur_mask.reference))
    assert_near(value, expected, TOLERANCE[dtype])
    for grad, expected_grad in zip(
        torch.autograd.grad(value, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        assert_near(grad, expected_grad, TOLERANCE[dtype])


@pytest.mark.parametrize("sigma", [1.0, 12.0, 60.0])
@pytest.mark.parametrize("shape", [(65, 130), (128, 20), (18, 129)])
def test_edges_of_tiles(shape, sigma, gpu_device):
    # Tiles of the CUDA kernels are 64 rows and 128 columns, over one plane after the other.
    image, mask = image_and_mask(shape, torch.float32, gpu_device)
    assert_near(gaussian_blur(image, sigma), scipy_blur(image, sigma), 5e-6)
    assert_near(blur_mask(image, mask, sigma), blur_mask.reference(image, mask, sigma), 5e-6)


# Largest value 2 (gradients of border pixels), rounded once: half a unit in the last place, and the
# float32 sums.
SIXTEEN_BIT = [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)]


@pytest.mark.parametrize(("dtype", "rounding"), SIXTEEN_BIT)
@pytest.mark.parametrize("sigma", [0.0, 1.0, 9.0])
@pytest.mark.parametrize("shape", [(1, 1), (9, 14), (20, 36)])
def test_sixteen_bit_storage(shape, sigma, dtype, rounding, gpu_device):
    inputs = image_and_mask(shape, dtype, gpu_device)
    weight = images(shape, dtype=dtype, device=gpu_device, seed=3)
    exact = tuple(t.double().requires_grad_() for t in inputs)
    for tensor in inputs:
        tensor.requires_grad_()
    value, expected = blur_mask(*inputs, sigma), blur_mask.reference(*exact, sigma)
    assert value.dtype == dtype
    assert_near(value, expected, rounding)
    grads = torch.autograd.grad(value, inputs, weight)
    expected_grads = torch.autograd.grad(expected, exact, weight.double())
    assert_near(grads[0], expected_grads[0], 2 * rounding)
    # The saved blur was rounded too: three channels of differences below 1.
    assert_near(grads[1], expected_grads[1], 6 * rounding)


@pytest.mark.parametrize("batch", [0, 1, 9])
def test_every_batch(batch, device):
    image, mask = image_and_mask((14, 11), torch.float32, device, batch)
    image.requires_grad_()
    mask.requires_grad_()
    value = blur_mask(image, mask, 1.5)
    value.sum().backward()
    assert_near(value, blur_mask.reference(image, mask, 1.5), 5e-6)
    assert image.grad.shape == image.shape
    assert mask.grad.shape == mask.shape
    assert gaussian_blur(image[:, :0], 1.5).shape == (batch, 0, 14, 11)


@pytest.mark.parametrize("needs", ["image", "mask", "none"])
def test_gradients_asked_for_alone(needs, device):
    image, mask = image_and_mask((9, 13), device=device)
    inputs = {"image": image, "mask": mask}
    if needs == "none":
        assert not blur_mask(image, mask, 2.0).requires_grad
        return
    wanted = inputs[needs].requires_grad_()
    (grad,) = torch.autograd.grad(blur_mask(image, mask, 2.0).square().sum(), wanted)
    (expected,) = torch.autograd.grad(blur_mask.reference(image, mask, 2.0).square().sum(), wanted)
    assert_near(grad, expected, 1e-13)


def test_operator_without_the_door_has_both_gradients(device):
    inputs = tuple(t.requires_grad_() for t in image_and_mask((9, 13), device=device))
    value = torch.ops.casm_fast.blur_mask(*inputs, 2.0, 4.0)
    expected = blur_mask(*inputs, 2.0)
    assert torch.equal(value, expected)
    for grad, other in zip(
        torch.autograd.grad(value.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        assert torch.equal(grad, other)


def test_sigma_zero_is_the_identity(device):
    image, mask = image_and_mask((9, 13), torch.float32, device)
    image.requires_grad_()
    for sigma in (0, 0.0, 0.1):
        blurred = gaussian_blur(image, sigma)
        assert torch.equal(blurred, image)
        assert blurred.data_ptr() != image.data_ptr()
        (grad,) = torch.autograd.grad(blurred, image, mask.expand_as(image))
        assert torch.equal(grad, mask.expand_as(image))
        assert_near(blur_mask(image, mask, sigma), image, 1e-6)


# ---------------------------------------------------------------- outside oracles


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("truncate", [2.0, 4.0])
@pytest.mark.parametrize("sigma", [0.5, 3.0, 25.0])
@pytest.mark.parametrize("shape", [(1, 9), (8, 3), (40, 53), (97, 130)])
def test_equals_scipy(shape, sigma, truncate, dtype, device):
    image, mask = image_and_mask(shape, dtype, device)
    image.requires_grad_()
    blurred = scipy_blur(image, sigma, truncate)
    value = gaussian_blur(image, sigma, truncate)
    assert_near(value, blurred, TOLERANCE[dtype])
    (grad,) = torch.autograd.grad(value, image, mask.expand_as(image))
    assert_near(grad, scipy_transpose(mask.expand_as(image), sigma, truncate), TOLERANCE[dtype])
    host_image, host_mask = (t.detach().cpu().double() for t in (image, mask))
    expected = host_image * host_mask + blurred * (1 - host_mask)
    assert_near(blur_mask(image, mask, sigma, truncate), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("sigma", [1.0, 10.0])
@pytest.mark.parametrize("shape", [(28, 28), (224, 224)])
def test_equals_opencv(shape, sigma, device):
    if device.type == "cpu" or shape != (224, 224):
        image = images(shape, 1, 1, torch.float32, device)
        radius = int(4 * sigma + 0.5)
        expected = cv2.GaussianBlur(
            image[0, 0].cpu().numpy(),
            (2 * radius + 1, 2 * radius + 1),
            sigma,
            borderType=cv2.BORDER_REFLECT_101,
        )
        assert_near(gaussian_blur(image, sigma)[0, 0], torch.from_numpy(expected), 5e-6)


def test_gradient_is_the_transpose_and_not_the_blur(device):
    image = images((20, 20), device=device).requires_grad_()
    weight = images((20, 20), device=device, seed=5)
    (grad,) = torch.autograd.grad(gaussian_blur(image, 3.0), image, weight)
    blur_of_weight = gaussian_blur(weight, 3.0)
    inner = (..., slice(13, -13), slice(13, -13))
    assert_near(grad[inner], blur_of_weight[inner], 1e-13)
    assert (grad - blur_of_weight).abs().max() > 0.01


# ---------------------------------------------------------------- gradcheck and opcheck


@pytest.mark.parametrize("sigma", [0.0, 0.6, 4.0])
@pytest.mark.parametrize("shape", [(4, 5), (1, 3)])
def test_gradcheck(shape, sigma, device):
    image, mask = (t[:1, :2].requires_grad_() for t in image_and_mask(shape, device=device))
    assert torch.autograd.gradcheck(lambda i: gaussian_blur(i, sigma), image)
    assert torch.autograd.gradcheck(lambda i, m: blur_mask(i, m, sigma), (image, mask))


def test_opcheck(device):
    image, mask = image_and_mask((6, 5), device=device)
    grad, blurred = torch.ones_like(image), gaussian_blur(image, 1.0)
    ops = torch.ops.casm_fast
    numbers = (1.0, 4.0)
    wanted = tuple(t.clone().requires_grad_() for t in (image, mask))
    opcheck(ops.gaussian_blur.default, (wanted[0], *numbers))
    opcheck(ops.blur_mask.default, (*wanted, *numbers))
    opcheck(ops.blur_mask_and_blur.default, (*wanted, *numbers))
    opcheck(ops.gaussian_blur_backward.default, (grad, *numbers))
    opcheck(ops.blur_mask_backward_image.default, (grad, mask, *numbers))
    opcheck(ops.blur_mask_backward_mask.default, (grad, image, blurred))


# ---------------------------------------------------------------- layouts


def strided(base: torch.Tensor, layout: str) -> torch.Tensor:
    return {
        "transposed": base.transpose(2, 3),
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "expanded": base[:1].expand(4, -1, -1, -1),
        "sliced": base[1::2, :, 1::3, ::2],
        "unaligned": base.flatten()[1 : 1 + base[:1, :, 1:].numel()].view(base[:1, :, 1:].shape),
    }[layout]


@pytest.mark.parametrize("sigma", [0.0, 0.7, 3.0])
@pytest.mark.parametrize(
    "layout", ["transposed", "channels_last", "expanded", "sliced", "unaligned"]
)
def test_layouts(layout, sigma, device):
    image = strided(images((24, 40), 4, 3, torch.float32, device), layout).detach()
    mask = strided(images((24, 40), 4, 1, torch.float32, device, seed=2), layout).detach()
    weight = strided(images((24, 40), 4, 3, torch.float32, device, seed=3), layout)
    plain = [t.clone(memory_format=torch.contiguous_format) for t in (image, mask, weight)]
    results = []
    for i, m, w in ((image, mask, weight), plain):
        i.requires_grad_()
        m.requires_grad_()
        blurred, blend = gaussian_blur(i, sigma), blur_mask(i, m, sigma)
        assert blend.is_contiguous()
        results.append(
            (
                blurred,
                blend,
                *torch.autograd.grad(blurred, i, w),
                *torch.autograd.grad(blend, (i, m), w),
            )
        )
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_channels_of_another_layout_than_the_mask(device):
    image, mask = image_and_mask((24, 40), torch.float32, device)
    expected = blur_mask(image, mask, 2.0)
    last = image.contiguous(memory_format=torch.channels_last)
    wide = mask.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)[:, 1:2]
    assert torch.equal(blur_mask(last, wide, 2.0), expected)


# ---------------------------------------------------------------- properties


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    sigma=st.floats(0, 60),
    truncate=st.floats(0, 6),
    seed=st.integers(0, 1000),
)
def test_properties(shape, sigma, truncate, seed):
    image = images(shape, 1, 2, torch.float64, seed=seed)
    other = images(shape, 1, 2, torch.float64, seed=seed + 1)
    mask = images(shape, 1, 1, torch.float64, seed=seed + 2)

    def blur(x):
        return gaussian_blur(x, sigma, truncate)

    blurred = blur(image)
    # A constant stays; extremes do not grow.
    assert_near(blur(torch.full_like(image, 3.0)), torch.full_like(image, 3.0), 1e-13)
    assert blurred.min() >= image.min() - 1e-13
    assert blurred.max() <= image.max() + 1e-13
    # Linear; commutes with flips and with swapping the axes.
    assert_near(blur(2 * image - 3 * other), 2 * blurred - 3 * blur(other), 1e-12)
    for dims in ((2,), (3,), (2, 3)):
        assert_near(blur(image.flip(dims)), blurred.flip(dims), 1e-13)
    assert_near(blur(image.transpose(2, 3)), blurred.transpose(2, 3), 1e-13)
    # Mask 1 keeps the image, mask 0 gives the blur, exactly; anything between lies between.
    assert torch.equal(blur_mask(image, torch.ones_like(mask), sigma, truncate), image)
    assert torch.equal(blur_mask(image, torch.zeros_like(mask), sigma, truncate), blurred)
    blend = blur_mask(image, mask, sigma, truncate)
    assert torch.all(blend <= torch.maximum(image, blurred) + 1e-13)
    assert torch.all(blend >= torch.minimum(image, blurred) - 1e-13)


def test_mask_of_one_keeps_every_float_exactly(device):
    image = images((21, 35), dtype=torch.float32, device=device) * 1e6
    ones = torch.ones(2, 1, 21, 35, device=device)
    assert torch.equal(blur_mask(image, ones, 5.0), image)
    assert torch.equal(blur_mask(image, 0 * ones, 5.0), gaussian_blur(image, 5.0))


# ---------------------------------------------------------------- errors

IMAGE, MASK = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gaussian_blur([1.0], 1.0),
            TypeError,
            "gaussian_blur: expected `image` to be a tensor, got list",
        ),
        (
            lambda: gaussian_blur(IMAGE[0], 1.0),
            ValueError,
            "gaussian_blur: expected `image` of shape [B, C, H, W], got [3, 4, 5]",
        ),
        (
            lambda: gaussian_blur(IMAGE[..., :0], 1.0),
            ValueError,
            "gaussian_blur: expected `image` to have pixels, got [2, 3, 4, 0]",
        ),
        (
            lambda: gaussian_blur(IMAGE.to(torch.uint8), 1.0),
            TypeError,
            "gaussian_blur: expected `image` in one of float32, float64 on cpu, got uint8",
        ),
        (
            lambda: gaussian_blur(IMAGE, -1.0),
            ValueError,
            "gaussian_blur: expected `sigma` to be finite and at least 0, got -1.0",
        ),
        (
            lambda: gaussian_blur(IMAGE, float("inf")),
            ValueError,
            "gaussian_blur: expected `sigma` to be finite and at least 0, got inf",
        ),
        (
            lambda: gaussian_blur(IMAGE, "1"),
            TypeError,
            "gaussian_blur: expected `sigma` to be a number, got str",
        ),
        (
            lambda: gaussian_blur(IMAGE, 1.0, truncate=-0.5),
            ValueError,
            "gaussian_blur: expected `truncate` to be finite and at least 0, got -0.5",
        ),
        (
            lambda: gaussian_blur(IMAGE, 1e9),
            ValueError,
            "gaussian_blur: expected `sigma` * `truncate` to be at most 1048576, "
            "got 1000000000.0 * 4.0",
        ),
        (
            lambda: blur_mask(IMAGE, 1.0, 1.0),
            TypeError,
            "blur_mask: expected `mask` to be a tensor, got float",
        ),
        (
            lambda: blur_mask(IMAGE[0], MASK, 1.0),
            ValueError,
            "blur_mask: expected `image` of shape [B, C, H, W], got [3, 4, 5]",
        ),
        (
            lambda: blur_mask(IMAGE, IMAGE, 1.0),
            ValueError,
            "blur_mask: expected `mask` of shape [B, 1, H, W], got [2, 3, 4, 5]",
        ),
        (
            lambda: blur_mask(IMAGE, MASK[:, :, 1:], 1.0),
            ValueError,
            "blur_mask: expected `mask` of shape [2, 1, 4, 5] for an image [2, 3, 4, 5], "
            "got [2, 1, 3, 5]",
        ),
        (
            lambda: blur_mask(IMAGE, MASK[:1], 1.0),
            ValueError,
            "blur_mask: expected `mask` of shape [2, 1, 4, 5] for an image [2, 3, 4, 5], "
            "got [1, 1, 4, 5]",
        ),
        (
            lambda: blur_mask(IMAGE, MASK.double(), 1.0),
            TypeError,
            "blur_mask: expected `mask` in the dtype of `image` (float32), got float64",
        ),
        (
            lambda: blur_mask(IMAGE, MASK, float("nan")),
            ValueError,
            "blur_mask: expected `sigma` to be finite and at least 0, got nan",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_operators_guard_memory_without_the_door():
    ops = torch.ops.casm_fast
    for call in (
        lambda: ops.gaussian_blur(IMAGE[0], 1.0, 4.0),
        lambda: ops.gaussian_blur(IMAGE, -1.0, 4.0),
        lambda: ops.gaussian_blur(IMAGE, float("nan"), 4.0),
        lambda: ops.blur_mask(IMAGE, MASK[..., :2], 1.0, 4.0),
        lambda: ops.blur_mask_and_blur(IMAGE, MASK[:1], 1.0, 4.0),
        lambda: ops.blur_mask_backward_image(IMAGE, MASK.double(), 1.0, 4.0),
        lambda: ops.blur_mask_backward_mask(IMAGE, IMAGE, IMAGE[:1]),
    ):
        with pytest.raises(RuntimeError):
            call()


# ---------------------------------------------------------------- determinism and the rest


@pytest.mark.parametrize("op", ["gaussian_blur", "image", "mask"])
def test_double_backward_is_refused(op, device):
    image, mask = image_and_mask((4, 4), device=device)
    wanted = (mask if op == "mask" else image).requires_grad_()
    value = gaussian_blur(image, 1.0) if op == "gaussian_blur" else blur_mask(image, mask, 1.0)
    (grad,) = torch.autograd.grad(value.square().sum(), wanted, create_graph=True)
    name = "gaussian_blur" if op == "gaussian_blur" else "blur_mask"
    with pytest.raises(RuntimeError, match=f"{name}: expected a first derivative"):
        grad.sum().backward()


def test_deterministic_for_any_number_of_threads(device):
    image, mask = image_and_mask((70, 90), torch.float32, device, batch=4)
    image.requires_grad_()
    mask.requires_grad_()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            blend = blur_mask(image, mask, 6.0)
            results.append((blend, *torch.autograd.grad(blend.square().sum(), (image, mask))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)


def test_compiles_to_one_graph(device):
    image, mask = image_and_mask((8, 9), torch.float32, device)
    mask.requires_grad_()

    def step(m):
        return (blur_mask(image, 2 * m, 2.0) + gaussian_blur(image * m, 1.0)).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(mask), mask)
    (expected,) = torch.autograd.grad(step(mask), mask)
    torch.testing.assert_close(grad, expected)
