"""blend, upsample_mask, jitter_mask: reference, outside oracles, gradients, registration, layouts,
errors, determinism, compilation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from casm_fast.ops import blend

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
