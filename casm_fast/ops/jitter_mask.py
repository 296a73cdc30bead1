"""Images under masks: `jitter_mask` is the perturbation step of meaningful perturbation.

Fong & Vedaldi (2017), section 4, learn a small mask m [h, w], enlarge it smoothly to M [H, W], and
show it to the classifier over a randomly shifted image::

    M[y, x]   = sum_{i,j} A_y[y, i] m[i, j] A_x[x, j]
    A[v, u]   = exp(-(u - t)^2 / (2 sigma^2)) / sum_k exp(-(k - t)^2 / (2 sigma^2))
    t         = (v + 0.5) * cells / pixels - 0.5          (pixel centres aligned, in cells)
    out[y, x] = M[y, x] * image[y + oy, x + ox] + (1 - M[y, x]) * reference[y + oy, x + ox]

With sigma = 0, pixel (y, x) takes cell ``(y * h // H, x * w // W)`` instead, which for integer
scales is `F.interpolate(mode="nearest")`. `upsample_mask` is M alone, and `blend` the last line
alone, without shift and with a mask of any resolution read by the rule of sigma = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from casm_fast.ops import library  # noqa: F401  (loads the kernels)
from casm_fast.ops.checks import check_like, check_number, check_tensor, shape_of
from casm_fast.ops.registry import light, refuse_double_backward, specified_by

# Training under autocast blends bfloat16 images on the CPU too.
ALSO_ON_CPU = (torch.bfloat16,)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """What values of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _nearest(mask: Tensor, H: int, W: int) -> Tensor:
    """The mask ``[B, 1, h, w]`` at image size ``[B, 1, H, W]``: cell ``y * h // H``."""
    rows = torch.arange(H, device=mask.device) * mask.shape[2] // H
    columns = torch.arange(W, device=mask.device) * mask.shape[3] // W
    return mask[:, :, rows][..., columns]


def axis_weights(cells: int, pixels: int, sigma: float, mask: Tensor) -> Tensor:
    """A ``[pixels, cells]`` of the module's formula, in the dtype and on the device of `mask`."""
    v = torch.arange(pixels, device=mask.device)[:, None]
    u = torch.arange(cells, device=mask.device)
    # u - t in integers: exact before the one division, also where two cells are equally near.
    distance = ((2 * u + 1) * pixels - (2 * v + 1) * cells).double() / (2 * pixels)
    square = distance**2
    # The nearest cell is taken out of the exponent: no sigma is so small that all weights vanish.
    excess = square - square.amin(dim=1, keepdim=True)
    return torch.softmax(-excess / (2 * sigma**2 + 1e-30), dim=1).to(mask.dtype)


def upsample_mask_reference(mask: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """`upsample_mask` in plain PyTorch: the specification."""
    (h, w), (H, W) = mask.shape[2:], size
    if sigma == 0:
        return _nearest(mask, H, W)
    wide = mask.to(_arithmetic(mask.dtype))
    rows, columns = axis_weights(h, H, sigma, wide), axis_weights(w, W, sigma, wide)
    return (rows @ wide @ columns.T).to(mask.dtype)


def _windows(image: Tensor, offset: Tensor, size: tuple[int, int]) -> Tensor:
    """What is seen of each image from its offset on, clamped so that the window fits."""
    (Hi, Wi), (H, W) = image.shape[2:], size
    y = offset[:, 0].clamp(0, Hi - H).long()[:, None] + torch.arange(H, device=image.device)
    x = offset[:, 1].clamp(0, Wi - W).long()[:, None] + torch.arange(W, device=image.device)
    b = torch.arange(image.shape[0], device=image.device)
    return image[b[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def reference(
    image: Tensor,
    reference: Tensor | None,
    mask: Tensor,
    offset: Tensor,
    size: tuple[int, int],
    sigma: float,
) -> Tensor:
    """`jitter_mask` in plain PyTorch: the specification, and the fallback for double backward."""
    wide = mask.to(_arithmetic(image.dtype))
    below = None if reference is None else _windows(reference, offset, size)
    large = upsample_mask_reference(wide, size, sigma)
    return blend_reference(_windows(image, offset, size), below, large)


def blend_reference(image: Tensor, reference: Tensor | None, mask: Tensor) -> Tensor:
    """`blend` in plain PyTorch: the specification, and the fallback for double backward."""
    wide = _arithmetic(image.dtype)
    keep = _nearest(mask.to(wide), image.shape[2], image.shape[3])
    out = image.to(wide) * keep
    if reference is not None:
        out = out + reference.to(wide) * (1 - keep)
    return out.to(image.dtype)


@specified_by(blend_reference)
def blend(image: Tensor, reference: Tensor | None, mask: Tensor) -> Tensor:
    """Keeps the image where the mask is 1 and shows the reference where it is 0.

    ``out = image * mask + reference * (1 - mask)``, eq. 4 of Zolna et al. (2020) with
    ``mask = 1 - saliency`` and no reference, and the perturbation of Fong & Vedaldi (2017).

    Args:
        image: Images, ``[B, C, H, W]``.
        reference: What replaces them, ``[B, C, H, W]``, such as a blurred copy; None stands for
            zeros, the mean colour of normalised images.
        mask: ``[B, 1, h, w]``, 1 keeps, 0 replaces, with ``h <= H`` and ``w <= W``. A smaller
            mask is read at cell ``(y * h // H, x * w // W)`` and never enlarged in memory.

    Returns:
        The blended images, ``[B, C, H, W]``, in the dtype and memory format of `image`.

    Raises:
        TypeError: An argument is no tensor, or dtypes do not fit together.
        ValueError: Shapes or devices do not fit together.

    Images are float32 or float64, and bfloat16 (on CUDA float16 too) with float32 arithmetic. The
    mask has the dtype of the image or, beside a 16-bit image, float32; a 16-bit mask beside a
    float32 image is taken as float32, which is exact. Differentiable once in image, reference and
    mask; only the gradients that are needed are computed. The gradient of a small mask is summed
    over its block and the channels in a fixed order. Contiguous and channels_last images, crops of
    them and expanded tensors are read in place; other strides are copied first.
    """
    try:
        out: Tensor = _blend(image, reference, _beside(image, mask))
    except (RuntimeError, AttributeError):
        _check_blend(image, reference, mask)
        raise
    return out


@specified_by(upsample_mask_reference)
def upsample_mask(mask: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Enlarges masks smoothly: every pixel takes a Gaussian average of the cells around it.

    ``M = A_y m A_x^T`` as in this module's docstring (Fong & Vedaldi 2017, section 4.3: a mask of
    28x28 at 224x224, smoothed by a Gaussian of 5 pixels, which is 0.625 cells).

    Args:
        mask: ``[B, 1, h, w]``, any values.
        size: The size (H, W) of the result; smaller than the mask is allowed.
        sigma: Standard deviation of the Gaussian in cells of the mask, at least 0; 0 takes the
            cell that a pixel belongs to.

    Returns:
        ``[B, 1, H, W]`` in the dtype of the mask, contiguous.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: A shape, the size or sigma is out of range.

    At the border the weights of the cells that exist are normalised: a constant mask stays
    constant, and a mask of ones stays exactly one. The sum goes over all cells whose weight
    differs from zero in the arithmetic used: weights are rounded to multiples of 2^-24 (float32 and
    16-bit masks, computed in float32) or 2^-53 (float64). Differentiable once in `mask`.
    """
    H, W = _check_size("upsample_mask", size)
    sigma = check_number("upsample_mask", "sigma", sigma, at_least=0)
    try:
        large: Tensor = _upsample_mask(mask, H, W, sigma)
    except RuntimeError:
        _check_single(mask)
        raise
    return large


@specified_by(reference)
def jitter_mask(
    image: Tensor,
    reference: Tensor | None,
    mask: Tensor,
    offset: Tensor,
    size: tuple[int, int],
    sigma: float,
) -> Tensor:
    """Shows shifted images through a small mask that stays: one step of meaningful perturbation.

    ``out[y, x] = M[y, x] * image[y + oy, x + ox] + (1 - M[y, x]) * reference[y + oy, x + ox]`` with
    ``M = upsample_mask(mask, size, sigma)``, in one pass: M and the crops are never stored. The
    image moves under the mask, ``x0(. - tau)`` in eq. 6 of Fong & Vedaldi (2017).

    Args:
        image: Images, ``[B, C, Hi, Wi]``, larger than the window by the largest shift.
        reference: What replaces them, ``[B, C, Hi, Wi]``, such as a blurred copy; None stands for
            zeros.
        mask: ``[B, 1, h, w]``, 1 keeps, 0 replaces.
        offset: Where each window begins, (y, x) in pixels, ``[B, 2]`` int32 on the device of the
            image. Offsets that do not fit are clamped to ``0 <= oy <= Hi - H`` and
            ``0 <= ox <= Wi - W``, where they are used: nothing is read outside, and the host does
            not wait for their values.
        size: The window (H, W), ``H <= Hi`` and ``W <= Wi``.
        sigma: As in `upsample_mask`, in cells.

    Returns:
        ``[B, C, H, W]``, in the dtype and memory format of `image`.

    Raises:
        TypeError: An argument has the wrong type, or dtypes do not fit together.
        ValueError: Shapes, devices, the size or sigma do not fit together.

    Dtypes and strides as in `blend`. Differentiable once in mask, image and reference; only the
    gradients that are needed are computed, that of the mask without any intermediate of image size.
    Deterministic.
    """
    H, W = _check_size("jitter_mask", size)
    sigma = check_number("jitter_mask", "sigma", sigma, at_least=0)
    try:
        out: Tensor = _jitter_mask(image, reference, _beside(image, mask), offset, H, W, sigma)
    except (RuntimeError, AttributeError):
        _check_jitter(image, reference, mask, offset, H, W)
        raise
    return out


def _beside(image: Tensor, mask: Tensor) -> Tensor:
    """The mask in a dtype that the kernels take beside the image."""
    narrow = mask.dtype != image.dtype and mask.dtype in (torch.float16, torch.bfloat16)
    return mask.float() if narrow and image.dtype == torch.float32 else mask


# ---------------------------------------------------------------- checks


def _check_blend(image: Tensor, reference: Tensor | None, mask: Tensor) -> None:
    check_tensor("blend", "image", image, "[B, C, H, W]", also_on_cpu=ALSO_ON_CPU)
    _check_reference("blend", reference, image)
    _check_mask("blend", mask, image)
    if mask.shape[2] > image.shape[2] or mask.shape[3] > image.shape[3]:
        raise ValueError(
            f"blend: expected `mask` no larger than `image` {shape_of(image)}, got {shape_of(mask)}"
        )


def _check_single(mask: object) -> None:
    check_tensor("upsample_mask", "mask", mask, "[B, 1, h, w]", 1, also_on_cpu=ALSO_ON_CPU)


def _check_jitter(
    image: Tensor, reference: Tensor | None, mask: Tensor, offset: Tensor, H: int, W: int
) -> None:
    op = "jitter_mask"
    check_tensor(op, "image", image, "[B, C, Hi, Wi]", also_on_cpu=ALSO_ON_CPU)
    _check_reference(op, reference, image)
    _check_mask(op, mask, image)
    _check_offset(op, offset, image)
    if image.shape[2] < H or image.shape[3] < W:
        raise ValueError(
            f"{op}: expected `size` no larger than `image` {shape_of(image)}, got {(H, W)}"
        )


def _check_size(op: str, size: object) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or not all(_is_integer(n) for n in pair):
        raise TypeError(f"{op}: expected `size` to be two integers (H, W), got {size!r}")
    H, W = pair
    if H < 1 or W < 1:
        raise ValueError(f"{op}: expected `size` to be positive, got {(H, W)}")
    return H, W


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _check_offset(op: str, offset: object, image: Tensor) -> None:
    if not isinstance(offset, Tensor):
        raise TypeError(f"{op}: expected `offset` to be a tensor, got {type(offset).__name__}")
    if offset.dtype != torch.int32:
        got = str(offset.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: expected `offset` in int32, got {got}")
    if offset.dim() != 2 or offset.shape[0] != image.shape[0] or offset.shape[1] != 2:
        raise ValueError(
            f"{op}: expected `offset` of shape [{image.shape[0]}, 2], got {shape_of(offset)}"
        )
    check_like(op, "offset", offset, "image", image, any_dtype=True)


def _check_reference(op: str, reference: Tensor | None, image: Tensor) -> None:
    if reference is None:
        return
    check_tensor(op, "reference", reference, "[B, C, H, W]", also_on_cpu=ALSO_ON_CPU)
    check_like(op, "reference", reference, "image", image)
    if reference.shape != image.shape:
        raise ValueError(
            f"{op}: expected `reference` in the shape of `image` {shape_of(image)}, "
            f"got {shape_of(reference)}"
        )


def _check_mask(op: str, mask: Tensor, image: Tensor) -> None:
    check_tensor(op, "mask", mask, "[B, 1, h, w]", channels=1, also_on_cpu=ALSO_ON_CPU)
    if mask.shape[0] != image.shape[0]:
        raise ValueError(
            f"{op}: expected `mask` with the batch of `image` ({image.shape[0]}), "
            f"got {shape_of(mask)}"
        )
    mask = _beside(image, mask)
    kept_wide = mask.dtype == torch.float32 and image.dtype in (torch.float16, torch.bfloat16)
    check_like(op, "mask", mask, "image", image, any_dtype=kept_wide)


# ---------------------------------------------------------------- fakes


def _empty_image(like: Tensor, H: int, W: int) -> Tensor:
    """An image batch in the layout that the kernels choose: that of `like`."""
    B, C = like.shape[:2]
    interleaved = C > 1 and like.stride(1) == 1 and like.stride(3) == C
    layout = torch.channels_last if interleaved else torch.contiguous_format
    return torch.empty((B, C, H, W), dtype=like.dtype, device=like.device, memory_format=layout)


def _blend_fake(image: Tensor, reference: Tensor | None, mask: Tensor) -> Tensor:
    _check_blend(image, reference, mask)
    return _empty_image(image, image.shape[2], image.shape[3])


def _blend_backward_mask_fake(
    grad_out: Tensor, image: Tensor, reference: Tensor | None, mask: Tensor
) -> Tensor:
    return mask.new_empty(mask.shape)


def _blend_backward_image_fake(grad_out: Tensor, mask: Tensor, complement: bool) -> Tensor:
    return _empty_image(grad_out, grad_out.shape[2], grad_out.shape[3])


def _upsample_mask_fake(mask: Tensor, H: int, W: int, sigma: float) -> Tensor:
    _check_single(mask)
    return mask.new_empty((mask.shape[0], 1, H, W))


def _jitter_mask_fake(
    image: Tensor,
    reference: Tensor | None,
    mask: Tensor,
    offset: Tensor,
    H: int,
    W: int,
    sigma: float,
) -> Tensor:
    _check_jitter(image, reference, mask, offset, H, W)
    return _empty_image(image, H, W)


def _jitter_mask_backward_mask_fake(
    grad_out: Tensor,
    image: Tensor,
    reference: Tensor | None,
    mask: Tensor,
    offset: Tensor,
    sigma: float,
) -> Tensor:
    return mask.new_empty(mask.shape)


def _jitter_mask_backward_image_fake(
    grad_out: Tensor,
    mask: Tensor,
    offset: Tensor,
    Hi: int,
    Wi: int,
    sigma: float,
    complement: bool,
) -> Tensor:
    return _empty_image(grad_out, Hi, Wi)


# ---------------------------------------------------------------- gradients


def _images_to_keep(
    ctx: Any, image: Tensor, reference: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The images, where the gradient of the mask, the third input, will ask for them."""
    return (image, reference) if ctx.needs_input_grad[2] else (None, None)


def _blend_setup(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    image, reference, mask = inputs
    ctx.save_for_backward(*_images_to_keep(ctx, image, reference), mask)


def _blend_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    image, reference, mask = ctx.saved_tensors
    for_image, for_reference, for_mask = ctx.needs_input_grad
    return (
        _blend_image_gradient(grad_out, mask, False) if for_image else None,
        _blend_image_gradient(grad_out, mask, True) if for_reference else None,
        _blend_mask_gradient(grad_out, image, reference, mask) if for_mask else None,
    )


def _upsample_mask_setup(ctx: Any, inputs: tuple[Tensor, int, int, float], output: Tensor) -> None:
    mask, _, _, ctx.sigma = inputs
    ctx.small = mask.shape[2:]


def _upsample_mask_backward(ctx: Any, grad_large: Tensor) -> tuple[Tensor | None, ...]:
    h, w = ctx.small
    return _upsample_mask_gradient(grad_large, h, w, ctx.sigma), None, None, None


def _jitter_mask_setup(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor, Tensor, int, int, float],
    output: Tensor,
) -> None:
    image, reference, mask, offset, _, _, ctx.sigma = inputs
    ctx.large = image.shape[2:]
    ctx.save_for_backward(*_images_to_keep(ctx, image, reference), mask, offset)


def _jitter_mask_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    image, reference, mask, offset = ctx.saved_tensors
    for_image, for_reference, for_mask = ctx.needs_input_grad[:3]
    images = (grad_out, mask, offset, *ctx.large, ctx.sigma)
    masks = (grad_out, image, reference, mask, offset, ctx.sigma)
    return (
        _jitter_image_gradient(*images, False) if for_image else None,
        _jitter_image_gradient(*images, True) if for_reference else None,
        _jitter_mask_gradient(*masks) if for_mask else None,
        *(None, None, None, None),
    )


FAKES: dict[str, Callable[..., Any]] = {
    "blend": _blend_fake,
    "blend_backward_mask": _blend_backward_mask_fake,
    "blend_backward_image": _blend_backward_image_fake,
    "upsample_mask": _upsample_mask_fake,
    "upsample_mask_backward": _upsample_mask_fake,  # a mask of the other size
    "jitter_mask": _jitter_mask_fake,
    "jitter_mask_backward_mask": _jitter_mask_backward_mask_fake,
    "jitter_mask_backward_image": _jitter_mask_backward_image_fake,
}
GRADIENTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "blend": (_blend_backward, _blend_setup),
    "upsample_mask": (_upsample_mask_backward, _upsample_mask_setup),
    "jitter_mask": (_jitter_mask_backward, _jitter_mask_setup),
}

_blend = light("blend", _blend_setup, _blend_backward)
_blend_mask_gradient = light("blend_backward_mask")
_blend_image_gradient = light("blend_backward_image")
_upsample_mask = light("upsample_mask", _upsample_mask_setup, _upsample_mask_backward)
_upsample_mask_gradient = light("upsample_mask_backward")
_jitter_mask = light("jitter_mask", _jitter_mask_setup, _jitter_mask_backward)
_jitter_mask_gradient = light("jitter_mask_backward_mask")
_jitter_image_gradient = light("jitter_mask_backward_image")


def register(namespace: str) -> None:
    """Gives the operators in `namespace` their fakes and gradients."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
        if name in GRADIENTS:
            backward, setup = GRADIENTS[name]
            torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup)
        else:
            refuse_double_backward(f"{namespace}::{name}")


register("casm_fast")
