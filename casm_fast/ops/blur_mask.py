"""Gaussian blur with mirrored borders, and the blend of an image with its own blur under a mask.

With taps ``g_k = exp(-k^2 / (2 sigma^2)) / sum``, ``|k| <= radius = int(truncate * sigma + 0.5)``::

    gaussian_blur(x)[y, x] = sum_{k,l} g_k g_l x[mirror(y + k), mirror(x + l)]
    blur_mask(x, m)        = x * m + gaussian_blur(x) * (1 - m)

The border mirrors about the outermost pixel (d c b | a b c d | c b a), again and again where the
radius passes the side: `torch.nn.functional.pad` calls it "reflect", SciPy "mirror". The blur is
the reference image of Fong & Vedaldi (2017), eq. 2, where the perturbed image is the blend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from casm_fast.ops import library  # noqa: F401  (loads the kernels)
from casm_fast.ops.checks import check_like, check_number, check_tensor, shape_of
from casm_fast.ops.registry import light, refuse_double_backward, specified_by

# More taps than any image has pixels; the kernels hold them in memory.
LARGEST_RADIUS = 2**20


def gaussian_blur_reference(image: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """The same blur in plain PyTorch: the specification, and the fallback for double backward."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return image.clone()
    offsets = torch.arange(-radius, radius + 1, device=image.device)
    taps = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    taps = (taps / taps.sum()).to(image.dtype)
    for dim in (2, 3):
        n = image.shape[dim]
        period = max(2 * (n - 1), 1)
        rows = torch.arange(n, device=image.device)[:, None] + offsets  # [n, taps]
        folded = rows.remainder(period)
        mirrored = torch.minimum(folded, (period - folded) if n > 1 else folded)
        picked = image.movedim(dim, -1)[..., mirrored]  # [..., n, taps]
        image = (picked @ taps).movedim(-1, dim)
    return image


def reference(image: Tensor, mask: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """The same blend in plain PyTorch: the specification, and the fallback for double backward."""
    blurred = gaussian_blur_reference(image, sigma, truncate)
    return image * mask + blurred * (1 - mask)


def _check_sigma(op: str, sigma: object, truncate: object) -> tuple[float, float]:
    sigma = check_number(op, "sigma", sigma, at_least=0)
    truncate = check_number(op, "truncate", truncate, at_least=0)
    if sigma * truncate > LARGEST_RADIUS:
        raise ValueError(
            f"{op}: expected `sigma` * `truncate` to be at most {LARGEST_RADIUS}, "
            f"got {sigma!r} * {truncate!r}"
        )
    return sigma, truncate


@specified_by(gaussian_blur_reference)
def gaussian_blur(image: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Blurs every plane of a batch; equals ``scipy.ndimage.gaussian_filter(mode="mirror")``.

    Args:
        image: ``[B, C, H, W]``, any strides.
        sigma: Standard deviation in pixels, at least 0; it may pass the size of the image.
            A radius of 0 (sigma below ``0.5 / truncate``) returns a copy of the image.
        truncate: Standard deviations at which the taps end, at least 0.

    Returns:
        The blurred image, ``[B, C, H, W]``, contiguous, in the dtype of the image. Sums are taken
        in float32 (float64 for float64). A pixel that is not finite spoils the pixels around it,
        up to the radius and a few more.

    Raises:
        TypeError: `image` is no tensor or has a dtype without kernels; a number is none.
        ValueError: `image` is not ``[B, C, H, W]`` with pixels; `sigma` or `truncate` is negative
            or not finite, or their product passes 2^20.

    Differentiable in `image`, once; the gradient is the transpose of the blur, which differs from
    the blur near the border. Deterministic.
    """
    sigma, truncate = _check_sigma("gaussian_blur", sigma, truncate)
    try:
        blurred: Tensor = _blur(image, sigma, truncate)
    except RuntimeError:
        _check_image("gaussian_blur", image)
        raise
    return blurred


@specified_by(reference)
def blur_mask(image: Tensor, mask: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Keeps the image where the mask is 1 and replaces it by its blur where the mask is 0.

    ``image * mask + gaussian_blur(image) * (1 - mask)`` in one go: the blurred image is written to
    memory only when the gradient of the mask will need it.

    Args:
        image: ``[B, C, H, W]``, any strides.
        mask: ``[B, 1, H, W]``, any strides; usually in [0, 1].
        sigma: Standard deviation of the blur in pixels, at least 0.
        truncate: Standard deviations at which the taps end, at least 0.

    Returns:
        The blend, ``[B, C, H, W]``, contiguous, in the dtype of the image. Where the mask is
        exactly 1 it equals the image exactly, if that is finite.

    Raises:
        TypeError: No tensor, a dtype without kernels, dtypes that differ; a number is none.
        ValueError: Shapes or devices that do not fit; `sigma` or `truncate` is negative or not
            finite, or their product passes 2^20.

    Differentiable in `image` and `mask`, once. Deterministic.
    """
    sigma, truncate = _check_sigma("blur_mask", sigma, truncate)
    output: Tensor
    try:
        if mask.requires_grad and torch.is_grad_enabled():
            output, _ = _blend_and_blur(image, mask, sigma, truncate)
        else:
            output = _blend(image, mask, sigma, truncate)
    except (RuntimeError, AttributeError):
        _check_blend(image, mask)
        raise
    return output


def _check_image(op: str, image: object) -> None:
    check_tensor(op, "image", image, "[B, C, H, W]")


def _check_blend(image: Tensor, mask: Tensor) -> None:
    _check_image("blur_mask", image)
    check_tensor("blur_mask", "mask", mask, "[B, 1, H, W]", channels=1)
    check_like("blur_mask", "mask", mask, "image", image)
    B, _, H, W = image.shape
    if mask.shape != (B, 1, H, W):
        raise ValueError(
            f"blur_mask: expected `mask` of shape {[B, 1, H, W]} for an image {shape_of(image)}, "
            f"got {shape_of(mask)}"
        )


# ---------------------------------------------------------------- fakes


def _fake_like(image: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(image, memory_format=torch.contiguous_format)


def _fake_blur(image: Tensor, sigma: float, truncate: float) -> Tensor:
    _check_image("gaussian_blur", image)
    return _fake_like(image)


def _fake_blend(image: Tensor, mask: Tensor, sigma: float, truncate: float) -> Tensor:
    _check_blend(image, mask)
    return _fake_like(image)


def _fake_blend_and_blur(
    image: Tensor, mask: Tensor, sigma: float, truncate: float
) -> tuple[Tensor, Tensor]:
    return _fake_blend(image, mask, sigma, truncate), _fake_like(image)


def _fake_mask_gradient(grad_output: Tensor, image: Tensor, blurred: Tensor) -> Tensor:
    B, _, H, W = image.shape
    return image.new_empty(B, 1, H, W)


# ---------------------------------------------------------------- gradients


def _blur_setup(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
    _, ctx.sigma, ctx.truncate = inputs


def _blur_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
    return _blur_gradient(grad_output, ctx.sigma, ctx.truncate), None, None


def _blend_setup(ctx: Any, inputs: tuple[Tensor, Tensor, float, float], output: Tensor) -> None:
    image, mask, ctx.sigma, ctx.truncate = inputs
    ctx.save_for_backward(image, mask)


def _blend_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    image, mask = ctx.saved_tensors
    blurred = _blur(image, ctx.sigma, ctx.truncate) if ctx.needs_input_grad[1] else None
    return _blend_gradients(ctx, grad_output, image, mask, blurred)


def _blend_and_blur_setup(
    ctx: Any, inputs: tuple[Tensor, Tensor, float, float], output: tuple[Tensor, Tensor]
) -> None:
    image, mask, ctx.sigma, ctx.truncate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(image, mask, output[1])


def _blend_and_blur_backward(
    ctx: Any, grad_output: Tensor, grad_blurred: object
) -> tuple[Tensor | None, ...]:
    return _blend_gradients(ctx, grad_output, *ctx.saved_tensors)


def _blend_gradients(
    ctx: Any, grad_output: Tensor, image: Tensor, mask: Tensor, blurred: Tensor | None
) -> tuple[Tensor | None, ...]:
    for_image, for_mask = ctx.needs_input_grad[:2]
    return (
        _image_gradient(grad_output, mask, ctx.sigma, ctx.truncate) if for_image else None,
        _mask_gradient(grad_output, image, blurred) if for_mask else None,
        *(None, None),
    )


_blur = light("gaussian_blur", _blur_setup, _blur_backward)
_blur_gradient = light("gaussian_blur_backward")
_blend = light("blur_mask", _blend_setup, _blend_backward)
_blend_and_blur = light("blur_mask_and_blur", _blend_and_blur_setup, _blend_and_blur_backward)
_image_gradient = light("blur_mask_backward_image")
_mask_gradient = light("blur_mask_backward_mask")


def register(namespace: str) -> None:
    """Gives the operators in `namespace` their fakes and gradients."""
    fakes: dict[str, Callable[..., Any]] = {
        "gaussian_blur": _fake_blur,
        "gaussian_blur_backward": _fake_like,
        "blur_mask": _fake_blend,
        "blur_mask_and_blur": _fake_blend_and_blur,
        "blur_mask_backward_image": _fake_like,
        "blur_mask_backward_mask": _fake_mask_gradient,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    gradients: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "gaussian_blur": (_blur_backward, _blur_setup),
        "blur_mask": (_blend_backward, _blend_setup),
        "blur_mask_and_blur": (_blend_and_blur_backward, _blend_and_blur_setup),
    }
    for name, (backward, setup) in gradients.items():
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup)
    for name in ("gaussian_blur_backward", "blur_mask_backward_image", "blur_mask_backward_mask"):
        refuse_double_backward(f"{namespace}::{name}")


register("casm_fast")
