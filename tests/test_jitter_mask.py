"""blend, upsample_mask, jitter_mask: reference, outside oracles, gradients, registration, layouts,
errors, determinism, compilation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch.library import opcheck

from casm_fast.ops import blend, jitter_mask, upsample_mask

OPS = torch.ops.casm_fast


def rand(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def images(size, B=2, C=3, dtype=torch.float64, device="cpu"):
    """An image and a reference, ``[B, C, *size]``, of both signs."""
    return tuple(2 * rand(B, C, *size, dtype=dtype, device=device, seed=s) - 1 for s in (0, 1))


def gradients(function, inputs, weight):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)


def laid_out(tensor, layout):
    """The same values with other strides."""
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    B, C, H, W = tensor.shape
    if layout == "cropped":
        wide = tensor.new_zeros(B, C + 1, H + 3, W + 5)
        view = wide[:, 1:, 2 : 2 + H, 3 : 3 + W]
    elif layout == "cropped channels_last":
        wide = tensor.new_zeros(B, C, H + 3, W + 5).contiguous(memory_format=torch.channels_last)
        view = wide[:, :, 2 : 2 + H, 3 : 3 + W]
    else:
        wide = tensor.new_zeros(2 * B, C, H, 2 * W)
        view = wide[1::2, :, :, ::2]
    view.copy_(tensor)
    return view


LAYOUTS = ["transposed", "channels_last", "expanded", "cropped", "cropped channels_last", "strided"]

# ---------------------------------------------------------------- blend

BLEND_SIZES = [  # image, mask
    ((1, 1), (1, 1)),
    ((8, 8), (8, 8)),
    ((28, 28), (7, 7)),
    ((33, 65), (5, 9)),
    ((17, 131), (17, 1)),
    ((13, 11), (1, 1)),
    ((227, 40), (30, 30)),
    ((40, 70), (40, 35)),
]
# Worst error measured over these sizes, values and gradients, as a share of the largest value:
# 2.5e-7 (float32), 5.4e-16 (float64); bfloat16 rounds by up to 3.9e-3.
BLEND_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize(("size", "small"), BLEND_SIZES)
def test_blend_equals_reference(size, small, with_reference, dtype, device):
    image, reference = images(size, dtype=dtype, device=device)
    mask = rand(2, 1, *small, dtype=dtype, device=device)
    weight = rand(2, 3, *size, dtype=dtype, device=device, seed=7) - 0.5
    if with_reference:
        inputs, run = [image, reference, mask], lambda f: f
    else:
        inputs, run = [image, mask], lambda f: lambda i, m: f(i, None, m)
    got = gradients(run(blend), inputs, weight)
    expected = gradients(run(blend.reference), inputs, weight)
    for value, want in zip(got, expected, strict=True):
        scale = want.abs().max().item()
        torch.testing.assert_close(value, want, rtol=0, atol=BLEND_TOLERANCE[dtype] * scale)


@pytest.mark.parametrize(
    ("size", "small"), [((8, 12), (8, 12)), ((8, 12), (4, 3)), ((7, 9), (3, 4))]
)
def test_blend_equals_scalar_loop(size, small, device):
    image, reference = images(size, device=device)
    mask = rand(2, 1, *small, device=device)
    (H, W), (h, w) = size, small
    expected = np.zeros((2, 3, H, W))
    for b, c, y, x in np.ndindex(expected.shape):
        m = float(mask[b, 0, y * h // H, x * w // W])
        expected[b, c, y, x] = float(image[b, c, y, x]) * m + float(reference[b, c, y, x]) * (1 - m)
    np.testing.assert_allclose(
        blend(image, reference, mask).cpu(), expected, rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_blend_equals_interpolated_lerp(scale, device):
    image, reference = images((56, 40), device=device)
    mask = rand(2, 1, 56 // scale, 40 // scale, device=device)
    large = F.interpolate(mask, size=(56, 40), mode="nearest")
    expected = torch.lerp(reference, image, large)
    torch.testing.assert_close(blend(image, reference, mask), expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(blend(image, None, mask), image * large, rtol=0, atol=0)


def test_blend_ends_are_exact(device):
    image, reference = images((20, 30), dtype=torch.float32, device=device)
    one = torch.ones(2, 1, 5, 6, device=device)
    assert torch.equal(blend(image, reference, one), image)
    assert torch.equal(blend(image, reference, 0 * one), reference)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("small", [(12, 10), (4, 5)])
def test_blend_any_number_of_channels(channels, small, device):
    image, reference = images((12, 10), C=channels, device=device)
    mask = rand(2, 1, *small, device=device)
    for layout in ("contiguous", "channels_last"):
        i, r = (t if layout == "contiguous" else laid_out(t, layout) for t in (image, reference))
        weight = rand(2, channels, 12, 10, device=device)
        got = gradients(blend, [i, r, mask], weight)
        expected = gradients(blend.reference, [image, reference, mask], weight)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("small", [(24, 20), (6, 5), (7, 9)])
def test_blend_bfloat16(small, mask_dtype, device):
    image, reference = images((24, 20), dtype=torch.bfloat16, device=device)
    mask = rand(2, 1, *small, dtype=mask_dtype, device=device)
    weight = rand(2, 3, 24, 20, dtype=torch.bfloat16, device=device, seed=7)
    got = gradients(blend, [image, reference, mask], weight)
    wide = [t.double() for t in (image, reference, mask)]
    expected = gradients(blend.reference, wide, weight.double())
    assert got[0].dtype == got[1].dtype == torch.bfloat16
    assert got[3].dtype == mask_dtype
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(
            value.double(), want, rtol=BLEND_TOLERANCE[torch.bfloat16], atol=1e-3
        )


def test_blend_takes_16_bit_masks_beside_float32_images(device):
    image, reference = images((8, 8), dtype=torch.float32, device=device)
    mask = rand(2, 1, 4, 4, dtype=torch.bfloat16, device=device).requires_grad_()
    out = blend(image, reference, mask)
    assert torch.equal(out, blend(image, reference, mask.float()))
    out.sum().backward()
    assert mask.grad.dtype == torch.bfloat16


def test_blend_bfloat16_keeps_nan_and_infinity(device):
    image = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38]).bfloat16().to(device)
    out = blend(image.view(1, 1, 1, 4), None, torch.ones(1, 1, 1, 4, device=device).bfloat16())
    assert out.flatten()[0].isnan()
    assert torch.equal(out.flatten()[1:], image[1:])


def test_blend_empty_batch(device):
    image, reference = (t.requires_grad_() for t in images((6, 6), B=0, device=device))
    mask = rand(0, 1, 3, 3, device=device).requires_grad_()
    out = blend(image, reference, mask)
    out.sum().backward()
    assert out.shape == (0, 3, 6, 6)
    assert mask.grad.shape == mask.shape


def test_blend_computes_the_needed_gradients_alone(device):
    image, reference = images((8, 8), device=device)
    mask = rand(2, 1, 4, 4, device=device).requires_grad_()
    out = blend(image, reference, mask)
    with torch.profiler.profile() as profile:
        out.sum().backward()
    names = {event.key.rpartition("::")[2] for event in profile.key_averages()}
    assert "blend_backward_mask" in names
    assert "blend_backward_image" not in names


@pytest.mark.parametrize("small", [(4, 5), (2, 2)])
def test_blend_gradcheck(small, device):
    image, reference = (t.requires_grad_() for t in images((4, 5), C=2, device=device))
    mask = rand(2, 1, *small, device=device).requires_grad_()
    assert torch.autograd.gradcheck(blend, (image, reference, mask))
    assert torch.autograd.gradcheck(lambda i, m: blend(i, None, m), (image, mask))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blend_opcheck(layout, device):
    image, reference = images((6, 5), device=device)
    if layout == "channels_last":
        image = laid_out(image, layout)
    mask = rand(2, 1, 3, 2, device=device)
    grad = torch.ones_like(image)
    opcheck(OPS.blend_backward_mask.default, (grad, image, reference, mask))
    opcheck(OPS.blend_backward_image.default, (grad, mask, True))
    for tensor in (image, reference, mask):
        tensor.requires_grad_()
    opcheck(OPS.blend.default, (image, reference, mask))
    opcheck(OPS.blend.default, (image, None, mask))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["image", "reference", "mask", "all"])
def test_blend_layouts(which, layout, device):
    image, reference = images((12, 10), device=device)
    mask = rand(2, 1, 6, 5, device=device)
    packed = {"image": image, "reference": reference, "mask": mask}
    strided = {
        name: laid_out(tensor, layout) if which in (name, "all") else tensor
        for name, tensor in packed.items()
    }
    packed = [t.clone(memory_format=torch.contiguous_format) for t in strided.values()]
    weight = rand(2, 3, 12, 10, device=device, seed=5)

    def run(inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = blend(*inputs)
        return out, *torch.autograd.grad((out * weight).sum(), inputs)

    torch.testing.assert_close(run(strided.values()), run(packed), rtol=1e-14, atol=1e-15)


def test_blend_keeps_the_memory_format(device):
    image, reference = images((12, 10), device=device)
    mask = rand(2, 1, 6, 5, device=device)
    last = laid_out(image, "channels_last")
    assert blend(image, reference, mask).is_contiguous()
    assert blend(last, reference, mask).is_contiguous(memory_format=torch.channels_last)


BLEND_IMAGE = torch.zeros(2, 3, 8, 6)
BLEND_MASK = torch.zeros(2, 1, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([1.0], None, BLEND_MASK),
            TypeError,
            "blend: expected `image` to be a tensor, got list",
        ),
        (
            (BLEND_IMAGE[0], None, BLEND_MASK),
            ValueError,
            "blend: expected `image` of shape [B, C, H, W], got [3, 8, 6]",
        ),
        (
            (BLEND_IMAGE[..., :0], None, BLEND_MASK),
            ValueError,
            "blend: expected `image` to have pixels, got [2, 3, 8, 0]",
        ),
        (
            (BLEND_IMAGE.int(), None, BLEND_MASK),
            TypeError,
            "blend: expected `image` in one of float32, float64, bfloat16 on cpu, got int32",
        ),
        (
            (BLEND_IMAGE, 0.5, BLEND_MASK),
            TypeError,
            "blend: expected `reference` to be a tensor, got float",
        ),
        (
            (BLEND_IMAGE, BLEND_IMAGE[:1], BLEND_MASK),
            ValueError,
            "blend: expected `reference` in the shape of `image` [2, 3, 8, 6], got [1, 3, 8, 6]",
        ),
        (
            (BLEND_IMAGE, BLEND_IMAGE.double(), BLEND_MASK),
            TypeError,
            "blend: expected `reference` in the dtype of `image` (float32), got float64",
        ),
        (
            (BLEND_IMAGE, None, BLEND_MASK[0]),
            ValueError,
            "blend: expected `mask` of shape [B, 1, h, w], got [1, 4, 3]",
        ),
        (
            (BLEND_IMAGE, None, BLEND_IMAGE),
            ValueError,
            "blend: expected `mask` of shape [B, 1, h, w], got [2, 3, 8, 6]",
        ),
        (
            (BLEND_IMAGE, None, BLEND_MASK[:1]),
            ValueError,
            "blend: expected `mask` with the batch of `image` (2), got [1, 1, 4, 3]",
        ),
        (
            (BLEND_IMAGE, None, torch.zeros(2, 1, 4, 7)),
            ValueError,
            "blend: expected `mask` no larger than `image` [2, 3, 8, 6], got [2, 1, 4, 7]",
        ),
        (
            (BLEND_IMAGE, None, BLEND_MASK.double()),
            TypeError,
            "blend: expected `mask` in the dtype of `image` (float32), got float64",
        ),
        (
            (BLEND_IMAGE.double(), None, BLEND_MASK.bfloat16()),
            TypeError,
            "blend: expected `mask` in the dtype of `image` (float64), got bfloat16",
        ),
        (
            (BLEND_IMAGE, BLEND_IMAGE.to("meta"), BLEND_MASK),
            ValueError,
            "blend: expected `reference` on the device of `image` (cpu), got meta",
        ),
    ],
)
def test_blend_errors(arguments, error, message):
    with pytest.raises(error) as caught:
        blend(*arguments)
    assert str(caught.value) == message


def test_blend_double_backward_is_refused(device):
    image, reference = (t.requires_grad_() for t in images((4, 4), device=device))
    mask = rand(2, 1, 2, 2, device=device).requires_grad_()
    out = blend(image, reference, mask).sum()
    for tensor in (image, reference, mask):
        (grad,) = torch.autograd.grad(out, tensor, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^blend: expected a first derivative"):
            grad.sum().backward(retain_graph=True)


def over_threads(run):
    """The results of `run` with one, two and three threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    return results


def test_blend_is_deterministic_for_any_number_of_threads(device):
    inputs = [*images((224, 224), dtype=torch.float32, device=device)]
    inputs.append(rand(2, 1, 28, 28, dtype=torch.float32, device=device))
    first, *others = over_threads(lambda: gradients(blend, inputs, inputs[0]))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blend_compiles_to_one_graph(layout, device):
    image, reference = images((8, 8), dtype=torch.float32, device=device)
    if layout == "channels_last":
        image = laid_out(image, layout)
    mask = rand(2, 1, 4, 4, dtype=torch.float32, device=device).requires_grad_()

    def step(mask):
        return (blend(image, reference, 2 * mask) + blend(image, None, 1 - mask)).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(mask), mask)
    (expected,) = torch.autograd.grad(step(mask), mask)
    torch.testing.assert_close(grad, expected)


sizes = st.integers(1, 40)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_blend_mask_gradient_adds_up_to_the_slopes(data):
    """Every pixel belongs to one cell: the gradient of all cells together the sum of pixels."""
    H, W, C = data.draw(sizes), data.draw(sizes), data.draw(st.integers(1, 4))
    h, w = data.draw(st.integers(1, H)), data.draw(st.integers(1, W))
    image, reference = images((H, W), C=C)
    mask = rand(2, 1, h, w).requires_grad_()
    blend(image, reference, mask).sum().backward()
    expected = (image - reference).sum(dim=(1, 2, 3))
    torch.testing.assert_close(mask.grad.sum(dim=(1, 2, 3)), expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- upsample_mask

CASES = [  # mask, size, sigma
    ((1, 1), (1, 1), 0.625),
    ((1, 1), (5, 4), 0.625),
    ((5, 4), (1, 1), 0.7),
    ((28, 28), (224, 224), 0.625),
    ((30, 30), (227, 227), 5 / 7.56),
    ((7, 5), (33, 65), 1.5),
    ((5, 7), (17, 131), 0.05),
    ((9, 9), (9, 9), 50.0),
    ((12, 10), (3, 4), 0.8),
    ((28, 28), (56, 112), 0.0),
    ((30, 20), (227, 33), 0.0),
    ((4, 4), (32, 32), 1e-9),
]
# Worst error measured over CASES, values and gradients, as a share of the largest value:
# float32 3.0e-6 (sigma 50: 81 slopes of both signs under equal weights), float64 5e-15.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-14}


def assert_near(got, expected, dtype):
    for value, want in zip(got, expected, strict=True):
        scale = max(want.abs().max().item(), 1e-30) if want.numel() else 1
        torch.testing.assert_close(
            value.double(), want.double(), rtol=0, atol=TOLERANCE[dtype] * scale
        )


def weights_by_loop(cells, pixels, sigma):
    """A [pixels, cells], weight by weight."""
    A = np.zeros((pixels, cells))
    for v in range(pixels):
        for u in range(cells):
            t = (v + 0.5) * cells / pixels - 0.5
            A[v, u] = np.exp(-((u - t) ** 2) / (2 * sigma**2))
        A[v] /= A[v].sum()
    return A


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("small", "size", "sigma"), CASES)
def test_upsample_equals_reference(small, size, sigma, dtype, device):
    mask = rand(2, 1, *small, dtype=dtype, device=device)
    weight = rand(2, 1, *size, dtype=dtype, device=device, seed=7) - 0.5
    got = gradients(lambda m: upsample_mask(m, size, sigma), [mask], weight)
    expected = gradients(
        lambda m: upsample_mask.reference(m, size, sigma), [mask.double()], weight.double()
    )
    assert got[0].dtype == got[1].dtype == dtype
    assert_near(got, expected, dtype)


@pytest.mark.parametrize(
    ("small", "size", "sigma"),
    [((4, 3), (8, 9), 0.625), ((5, 7), (12, 10), 1.3), ((3, 3), (7, 22), 0.3)],
)
def test_upsample_equals_scalar_loop(small, size, sigma, device):
    mask = rand(2, 1, *small, device=device)
    rows = weights_by_loop(small[0], size[0], sigma)
    columns = weights_by_loop(small[1], size[1], sigma)
    expected = np.einsum("yi,bcij,xj->bcyx", rows, mask.cpu().numpy(), columns)
    np.testing.assert_allclose(upsample_mask(mask, size, sigma).cpu(), expected, rtol=1e-13)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_upsample_by_sigma_zero_is_nearest(scale, device):
    mask = rand(2, 1, 7, 5, device=device)
    expected = F.interpolate(mask, scale_factor=scale, mode="nearest")
    assert torch.equal(upsample_mask(mask, (7 * scale, 5 * scale), 0), expected)


def test_upsample_equals_scipy_far_from_the_border(device):
    """At odd scales every cell centre is a pixel centre: there, M is SciPy's filter of the cells
    spread out with zeros, up to the normalisation that the zeros take away."""
    scale, sigma = 5, 0.8
    mask = rand(1, 1, 20, 24, device=device)
    spread = np.zeros((100, 120))
    spread[scale // 2 :: scale, scale // 2 :: scale] = mask[0, 0].cpu().numpy()
    ones = np.zeros((100, 120))
    ones[scale // 2 :: scale, scale // 2 :: scale] = 1
    smooth, share = (
        gaussian_filter(a, sigma * scale, mode="constant", truncate=10) for a in (spread, ones)
    )
    got = upsample_mask(mask, (100, 120), sigma)[0, 0].cpu().numpy()
    np.testing.assert_allclose(got, smooth / share, rtol=1e-10)


def test_upsample_tends_to_the_nearest_cell(device):
    mask = rand(1, 1, 6, 6, device=device)
    torch.testing.assert_close(
        upsample_mask(mask, (48, 48), 1e-3), upsample_mask(mask, (48, 48), 0)
    )


def test_upsample_of_one_pixel_of_equal_cells(device):
    """A grid made by hand: scale 1, sigma so large that all weights are equal."""
    mask = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64, device=device)
    expected = torch.full((1, 1, 2, 2), 3.0, dtype=torch.float64, device=device)
    torch.testing.assert_close(upsample_mask(mask.view(1, 1, 2, 2), (2, 2), 1e6), expected)


shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))
windows = st.tuples(st.integers(1, 70), st.integers(1, 70))
sigmas = st.one_of(st.just(0.0), st.floats(1e-3, 30.0))


@settings(max_examples=60, deadline=None)
@given(shapes, windows, sigmas, st.floats(-5, 5), st.sampled_from([torch.float32, torch.float64]))
def test_upsample_keeps_constants_and_adds_up(small, size, sigma, value, dtype):
    ones = torch.ones(1, 1, *small, dtype=dtype, requires_grad=True)
    large = upsample_mask(ones, size, sigma)
    assert torch.equal(large, torch.ones_like(large))  # weights add up to one exactly
    (grad,) = torch.autograd.grad(large.sum(), ones)
    assert (grad >= 0).all()
    torch.testing.assert_close(grad.sum(), large.sum(), rtol=1e-5, atol=0)
    constant = upsample_mask(value * ones.detach(), size, sigma)
    torch.testing.assert_close(constant, torch.full_like(constant, value), rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(shapes, windows, st.floats(0.05, 5))
def test_upsample_commutes_with_flips(small, size, sigma):
    mask = rand(1, 1, *small)
    for axis in (2, 3):
        flipped = upsample_mask(mask.flip(axis), size, sigma).flip(axis)
        torch.testing.assert_close(
            flipped, upsample_mask(mask, size, sigma), rtol=1e-12, atol=1e-13
        )


@settings(max_examples=40, deadline=None)
@given(shapes, windows, sigmas)
def test_upsample_gradient_is_the_transpose(small, size, sigma):
    mask, other = rand(1, 1, *small), rand(1, 1, *size, seed=3)
    back = OPS.upsample_mask_backward(other, *small, sigma)
    forward = upsample_mask(mask, size, sigma)
    torch.testing.assert_close((forward * other).sum(), (mask * back).sum(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- jitter_mask


def jitter_inputs(small, size, B=2, C=3, room=(4, 3), dtype=torch.float64, device="cpu"):
    """Image, reference, mask and offsets; the second offset does not fit on either side."""
    image, reference = images((size[0] + room[0], size[1] + room[1]), B, C, dtype, device)
    offset = torch.tensor([[1, 2], [-4, 99], [4, 0], [room[0], room[1]]], dtype=torch.int32)
    return image, reference, rand(B, 1, *small, dtype=dtype, device=device), offset[:B].to(device)


def jittered(op, offset, size, sigma):
    return lambda image, reference, mask: op(image, reference, mask, offset, size, sigma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize(("small", "size", "sigma"), CASES)
def test_jitter_equals_reference(small, size, sigma, with_reference, dtype, device):
    *inputs, offset = jitter_inputs(small, size, dtype=dtype, device=device)
    weight = rand(2, 3, *size, dtype=dtype, device=device, seed=7) - 0.5
    run, expect = (jittered(f, offset, size, sigma) for f in (jitter_mask, jitter_mask.reference))
    if not with_reference:
        del inputs[1]
        run, expect = (lambda image, mask, f=f: f(image, None, mask) for f in (run, expect))
    got = gradients(run, inputs, weight)
    expected = gradients(expect, [t.double() for t in inputs], weight.double())
    assert_near(got, expected, dtype)


@pytest.mark.parametrize("offsets", [[0, 0], [2, 1], [-7, 2], [1, 50], [2**31 - 1, -(2**31)]])
def test_jitter_equals_scalar_loop(offsets, device):
    (h, w), (H, W), sigma = (3, 4), (7, 9), 0.7
    image, reference, mask, _ = jitter_inputs((h, w), (H, W), B=1, room=(2, 1), device=device)
    offset = torch.tensor([offsets], dtype=torch.int32, device=device)
    oy, ox = min(max(offsets[0], 0), 2), min(max(offsets[1], 0), 1)
    rows, columns = weights_by_loop(h, H, sigma), weights_by_loop(w, W, sigma)
    expected = np.zeros((1, 3, H, W))
    for _, c, y, x in np.ndindex(expected.shape):
        M = sum(
            rows[y, i] * columns[x, j] * float(mask[0, 0, i, j]) for i in range(h) for j in range(w)
        )
        kept, shown = float(image[0, c, y + oy, x + ox]), float(reference[0, c, y + oy, x + ox])
        expected[0, c, y, x] = M * kept + (1 - M) * shown
    got = jitter_mask(image, reference, mask, offset, (H, W), sigma)
    np.testing.assert_allclose(got.cpu(), expected, rtol=1e-13, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(shapes, windows, sigmas, st.data())
def test_jitter_with_a_mask_of_ones_is_the_crop(small, size, sigma, data):
    room = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 5)))
    image, reference, mask, _ = jitter_inputs(small, size, room=room, dtype=torch.float32)
    offset = data.draw(st.lists(st.tuples(*[st.integers(-2, 7)] * 2), min_size=2, max_size=2))
    ends = {1: image, 0: reference}
    for value, source in ends.items():
        mask.fill_(value)
        got = jitter_mask(
            image, reference, mask, torch.tensor(offset, dtype=torch.int32), size, sigma
        )
        for b, (y, x) in enumerate(offset):
            y, x = min(max(y, 0), room[0]), min(max(x, 0), room[1])
            assert torch.equal(got[b], source[b, :, y : y + size[0], x : x + size[1]])


def test_jitter_by_sigma_zero_is_blend(device):
    image, reference, mask, _ = jitter_inputs((7, 5), (30, 31), room=(0, 0), device=device)
    offset = torch.zeros(2, 2, dtype=torch.int32, device=device)
    got = jitter_mask(image, reference, mask, offset, (30, 31), 0)
    torch.testing.assert_close(got, blend(image, reference, mask), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_jitter_any_number_of_channels(channels, layout, device):
    *inputs, offset = jitter_inputs((4, 5), (18, 21), C=channels, device=device)
    weight = rand(2, channels, 18, 21, device=device)
    expected = gradients(jittered(jitter_mask.reference, offset, (18, 21), 0.6), inputs, weight)
    if layout != "contiguous":
        inputs[:2] = [laid_out(t, layout) for t in inputs[:2]]
    got = gradients(jittered(jitter_mask, offset, (18, 21), 0.6), inputs, weight)
    assert_near(got, expected, torch.float64)


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float32])
def test_jitter_bfloat16(mask_dtype, device):
    *inputs, offset = jitter_inputs((7, 5), (33, 30), dtype=torch.bfloat16, device=device)
    inputs[2] = inputs[2].to(mask_dtype)
    weight = rand(2, 3, 33, 30, dtype=torch.bfloat16, device=device, seed=7)
    got = gradients(jittered(jitter_mask, offset, (33, 30), 0.6), inputs, weight)
    expected = gradients(
        jittered(jitter_mask.reference, offset, (33, 30), 0.6),
        [t.double() for t in inputs],
        weight.double(),
    )
    assert [t.dtype for t in got] == [torch.bfloat16] * 3 + [mask_dtype]
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value.double(), want, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("B", [1, 3])
def test_jitter_one_image_and_many_tasks(B, device):
    """A single image is cut into tasks whose sums meet again."""
    *inputs, offset = jitter_inputs((14, 9), (150, 90), B=B, device=device)
    weight = rand(B, 3, 150, 90, device=device)
    got = gradients(jittered(jitter_mask, offset, (150, 90), 0.9), inputs, weight)
    expected = gradients(jittered(jitter_mask.reference, offset, (150, 90), 0.9), inputs, weight)
    assert_near(got, expected, torch.float64)


def test_jitter_empty_batch(device):
    *inputs, offset = jitter_inputs((3, 3), (6, 6), B=0, device=device)
    mask = inputs[2].requires_grad_()
    out = jitter_mask(inputs[0], inputs[1], mask, offset, (6, 6), 0.6)
    out.sum().backward()
    assert out.shape == (0, 3, 6, 6)
    assert mask.grad.shape == mask.shape
    assert upsample_mask(mask, (9, 8), 0.6).shape == (0, 1, 9, 8)


@pytest.mark.parametrize("sigma", [0.0, 0.6])
def test_jitter_gradcheck(sigma, device):
    *inputs, offset = jitter_inputs((2, 3), (4, 5), C=2, room=(1, 2), device=device)
    inputs = [t.requires_grad_() for t in inputs]
    run = jittered(jitter_mask, offset, (4, 5), sigma)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(lambda i, m: run(i, None, m), (inputs[0], inputs[2]))
    assert torch.autograd.gradcheck(lambda m: upsample_mask(m, (4, 5), sigma), inputs[2])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_jitter_opcheck(layout, device):
    image, reference, mask, offset = jitter_inputs((2, 3), (6, 5), device=device)
    if layout == "channels_last":
        image = laid_out(image, layout)
    grad = rand(2, 3, 6, 5, device=device)
    opcheck(OPS.jitter_mask_backward_mask.default, (grad, image, reference, mask, offset, 0.6))
    opcheck(OPS.jitter_mask_backward_image.default, (grad, mask, offset, 10, 8, 0.6, True))
    opcheck(OPS.upsample_mask_backward.default, (grad[:, :1], 2, 3, 0.6))
    for tensor in (image, reference, mask):
        tensor.requires_grad_()
    opcheck(OPS.jitter_mask.default, (image, reference, mask, offset, 6, 5, 0.6))
    opcheck(OPS.jitter_mask.default, (image, None, mask, offset, 6, 5, 0.0))
    opcheck(OPS.upsample_mask.default, (mask, 6, 5, 0.6))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["image", "reference", "mask", "weight", "all"])
def test_jitter_layouts(which, layout, device):
    image, reference, mask, offset = jitter_inputs((6, 5), (12, 10), device=device)
    weight = rand(2, 3, 12, 10, device=device, seed=5)
    packed = {"image": image, "reference": reference, "mask": mask, "weight": weight}
    strided = {
        name: laid_out(tensor, layout) if which in (name, "all") else tensor
        for name, tensor in packed.items()
    }
    packed = [t.clone(memory_format=torch.contiguous_format) for t in strided.values()]

    def run(*inputs):
        inputs, weight = [t.detach().requires_grad_() for t in inputs[:3]], inputs[3]
        out = jitter_mask(*inputs, offset, (12, 10), 0.6)
        large = upsample_mask(inputs[2], (12, 10), 0.6)
        return out, large, *torch.autograd.grad(out, inputs, weight)

    got, expected = run(*strided.values()), run(*packed)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_jitter_keeps_the_memory_format(device):
    image, reference, mask, offset = jitter_inputs((6, 5), (12, 10), device=device)
    last = laid_out(image, "channels_last")
    out = jitter_mask(last, reference, mask, offset, (12, 10), 0.6)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_jitter_takes_strided_offsets(device):
    image, reference, mask, offset = jitter_inputs((6, 5), (12, 10), device=device)
    turned = offset.t().contiguous().t()
    expected = jitter_mask(image, reference, mask, offset, (12, 10), 0.6)
    assert torch.equal(jitter_mask(image, reference, mask, turned, (12, 10), 0.6), expected)


JITTER = {
    "image": torch.zeros(2, 3, 8, 6),
    "reference": None,
    "mask": torch.zeros(2, 1, 4, 3),
    "offset": torch.zeros(2, 2, dtype=torch.int32),
    "size": (8, 6),
    "sigma": 0.6,
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"image": None},
            TypeError,
            "jitter_mask: expected `image` to be a tensor, got NoneType",
        ),
        (
            {"image": torch.zeros(3, 8, 6)},
            ValueError,
            "jitter_mask: expected `image` of shape [B, C, Hi, Wi], got [3, 8, 6]",
        ),
        (
            {"reference": torch.zeros(2, 3, 8, 5)},
            ValueError,
            "jitter_mask: expected `reference` in the shape of `image` [2, 3, 8, 6], "
            "got [2, 3, 8, 5]",
        ),
        (
            {"mask": torch.zeros(1, 1, 4, 3)},
            ValueError,
            "jitter_mask: expected `mask` with the batch of `image` (2), got [1, 1, 4, 3]",
        ),
        (
            {"offset": [[0, 0], [0, 0]]},
            TypeError,
            "jitter_mask: expected `offset` to be a tensor, got list",
        ),
        (
            {"offset": torch.zeros(2, 2, dtype=torch.int64)},
            TypeError,
            "jitter_mask: expected `offset` in int32, got int64",
        ),
        (
            {"offset": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            "jitter_mask: expected `offset` of shape [2, 2], got [2]",
        ),
        (
            {"offset": torch.zeros(2, 2, dtype=torch.int32, device="meta")},
            ValueError,
            "jitter_mask: expected `offset` on the device of `image` (cpu), got meta",
        ),
        (
            {"size": 8},
            TypeError,
            "jitter_mask: expected `size` to be two integers (H, W), got 8",
        ),
        (
            {"size": (8, 6.0)},
            TypeError,
            "jitter_mask: expected `size` to be two integers (H, W), got (8, 6.0)",
        ),
        (
            {"size": (8, 0)},
            ValueError,
            "jitter_mask: expected `size` to be positive, got (8, 0)",
        ),
        (
            {"size": (9, 6)},
            ValueError,
            "jitter_mask: expected `size` no larger than `image` [2, 3, 8, 6], got (9, 6)",
        ),
        (
            {"sigma": -0.1},
            ValueError,
            "jitter_mask: expected `sigma` to be finite and at least 0, got -0.1",
        ),
        (
            {"sigma": "1"},
            TypeError,
            "jitter_mask: expected `sigma` to be a number, got str",
        ),
    ],
)
def test_jitter_errors(changed, error, message):
    with pytest.raises(error) as caught:
        jitter_mask(**{**JITTER, **changed})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(2, 3, 4, 4), (8, 8), 1),
            ValueError,
            "upsample_mask: expected `mask` of shape [B, 1, h, w], got [2, 3, 4, 4]",
        ),
        (
            (torch.zeros(2, 1, 4, 4).int(), (8, 8), 1),
            TypeError,
            "upsample_mask: expected `mask` in one of float32, float64, bfloat16 on cpu, got int32",
        ),
        (
            (torch.zeros(2, 1, 4, 4), (8, -8), 1),
            ValueError,
            "upsample_mask: expected `size` to be positive, got (8, -8)",
        ),
        (
            (torch.zeros(2, 1, 4, 4), (8, 8), float("inf")),
            ValueError,
            "upsample_mask: expected `sigma` to be finite and at least 0, got inf",
        ),
    ],
)
def test_upsample_errors(arguments, error, message):
    with pytest.raises(error) as caught:
        upsample_mask(*arguments)
    assert str(caught.value) == message


def test_jitter_double_backward_is_refused(device):
    *inputs, offset = jitter_inputs((2, 3), (6, 5), device=device)
    inputs = [t.requires_grad_() for t in inputs]
    out = jitter_mask(*inputs, offset, (6, 5), 0.6).sum()
    for tensor in inputs:
        (grad,) = torch.autograd.grad(out, tensor, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^jitter_mask: expected a first derivative"):
            grad.sum().backward(retain_graph=True)
    large = upsample_mask(inputs[2], (6, 5), 0.6).square().sum()
    (grad,) = torch.autograd.grad(large, inputs[2], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^upsample_mask: expected a first derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("B", [1, 3])
def test_jitter_is_deterministic_for_any_number_of_threads(B, device):
    *inputs, offset = jitter_inputs((28, 28), (224, 224), B=B, dtype=torch.float32, device=device)
    weight = rand(B, 3, 224, 224, dtype=torch.float32, device=device)
    run = jittered(jitter_mask, offset, (224, 224), 0.625)
    first, *others = over_threads(lambda: gradients(run, inputs, weight))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_jitter_compiles_to_one_graph(device):
    image, reference, mask, offset = jitter_inputs((4, 4), (16, 12), device=device)
    mask.requires_grad_()

    def step(mask, offset):
        shown = jitter_mask(image, reference, mask.clamp(0, 1), offset + 1, (16, 12), 0.6)
        return shown.square().sum() + upsample_mask(mask, (16, 12), 0.6).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(mask, offset), mask)
    (expected,) = torch.autograd.grad(step(mask, offset), mask)
    torch.testing.assert_close(grad, expected)


# ---------------------------------------------------------------- what CUDA alone has


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide_mask", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [40, 37])  # rows of whole packs, and not
def test_16_bit_storage(width, layout, wide_mask, dtype, gpu_device):
    size = (35, width)
    *inputs, offset = jitter_inputs((5, 6), size, room=(2, 4), dtype=dtype, device=gpu_device)
    if layout != "contiguous":
        inputs[:2] = [laid_out(t, layout) for t in inputs[:2]]
    if wide_mask:
        inputs[2] = inputs[2].float()
    weight = rand(2, 3, *size, dtype=dtype, device=gpu_device, seed=7)
    got = gradients(jittered(jitter_mask, offset, size, 0.6), inputs, weight)
    wide = [t.double() for t in inputs]
    expected = gradients(jittered(jitter_mask.reference, offset, size, 0.6), wide, weight.double())
    assert [t.dtype for t in got] == [dtype] * 3 + [inputs[2].dtype]
    crops = [t[:, :, : size[0], : size[1]] for t in inputs[:2]]
    got += gradients(blend, [*crops, inputs[2]], weight)
    expected += gradients(
        blend.reference, [t.double() for t in (*crops, inputs[2])], weight.double()
    )
    large = upsample_mask(inputs[2], size, 0.6)
    got += (large,)
    expected += (upsample_mask.reference(inputs[2].double(), size, 0.6),)
    for value, want in zip(got, expected, strict=True):
        torch.testing.assert_close(value.double(), want, rtol=8e-3, atol=2e-3)


def test_tiles_shrink_where_sigma_reaches_over_many_cells(gpu_device):
    """700 weights per pixel of a tile of 32 x 128 do not fit into shared memory.

    A weight is one of 700 and is known to 2^-53 of their sum: to 1e-13 of itself, and the gradient
    of a cell too.
    """
    mask = rand(1, 1, 700, 40, device=gpu_device)
    weight = rand(1, 1, 9, 33, device=gpu_device)
    got = gradients(lambda m: upsample_mask(m, (9, 33), 120.0), [mask], weight)
    expected = gradients(lambda m: upsample_mask.reference(m, (9, 33), 120.0), [mask], weight)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("op", ["blend", "jitter_mask", "upsample_mask"])
def test_captures_into_a_cuda_graph_without_synchronising(op):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    *inputs, offset = jitter_inputs((7, 7), (56, 56), dtype=torch.float32, device="cuda")
    mask = inputs[2].requires_grad_()

    def step():
        if op == "blend":
            out = blend(inputs[0], inputs[1], mask)
        elif op == "jitter_mask":
            out = jitter_mask(*inputs, offset, (56, 56), 0.6)
        else:
            out = upsample_mask(mask, (56, 56), 0.6)
        return out, *torch.autograd.grad(out.square().sum(), mask)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)
