"""Blends of images under masks: the perturbation of both methods.

::

    blend:          out[y, x] = m[y, x] * image[y, x] + (1 - m[y, x]) * reference[y, x]

A mask may be smaller than the image; then pixel (y, x) belongs to its cell
``(y * h // H, x * w // W)``, which for integer scales is `F.interpolate(mode="nearest")`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from casm_fast.ops import library  # noqa: F401  (loads the kernels)
from casm_fast.ops.checks import CPU_DTYPES, check_like, check_tensor, shape_of
from casm_fast.ops.registry import refuse_double_backward, specified_by

# Training under autocast blends bfloat16 images on the CPU too.
IMAGE_CPU_DTYPES = (*CPU_DTYPES, torch.bfloat16)


def _nearest(mask: Tensor, H: int, W: int) -> Tensor:
    """The mask ``[B, 1, h, w]`` at image size ``[B, 1, H, W]``: cell ``y * h // H``."""
    rows = torch.arange(H, device=mask.device) * mask.shape[2] // H
    columns = torch.arange(W, device=mask.device) * mask.shape[3] // W
    return mask[:, :, rows][..., columns]


def blend_reference(image: Tensor, reference: Tensor | None, mask: Tensor) -> Tensor:
    """`blend` in plain PyTorch: the specification, and the fallback for double backward."""
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
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
    check_tensor("blend", "image", image, "[B, C, H, W]", cpu_dtypes=IMAGE_CPU_DTYPES)
    _check_reference("blend", reference, image)
    mask = _check_mask("blend", mask, image)
    if mask.shape[2] > image.shape[2] or mask.shape[3] > image.shape[3]:
        raise ValueError(
            f"blend: expected `mask` no larger than `image` {shape_of(image)}, got {shape_of(mask)}"
        )
    out: Tensor = torch.ops.casm_fast.blend(image, reference, mask)
    return out


def _check_reference(op: str, reference: Tensor | None, image: Tensor) -> None:
    if reference is None:
        return
    check_tensor(op, "reference", reference, "[B, C, H, W]", cpu_dtypes=IMAGE_CPU_DTYPES)
    check_like(op, "reference", reference, "image", image)
    if reference.shape != image.shape:
        raise ValueError(
            f"{op}: expected `reference` in the shape of `image` {shape_of(image)}, "
            f"got {shape_of(reference)}"
        )


def _check_mask(op: str, mask: Tensor, image: Tensor) -> Tensor:
    """Checks that the mask goes with the image and returns it in a dtype that the kernels take."""
    check_tensor(op, "mask", mask, "[B, 1, h, w]", channels=1, cpu_dtypes=IMAGE_CPU_DTYPES)
    if mask.shape[0] != image.shape[0]:
        raise ValueError(
            f"{op}: expected `mask` with the batch of `image` ({image.shape[0]}), "
            f"got {shape_of(mask)}"
        )
    sixteen_bit = (torch.float16, torch.bfloat16)
    if mask.dtype in sixteen_bit and image.dtype == torch.float32:
        mask = mask.float()
    kept_wide = mask.dtype == torch.float32 and image.dtype in sixteen_bit
    check_like(op, "mask", mask, "image", image, any_dtype=kept_wide)
    return mask


# ---------------------------------------------------------------- fakes


def _empty_image(like: Tensor, H: int, W: int) -> Tensor:
    """An image batch in the layout that the kernels choose: that of `like`."""
    B, C = like.shape[:2]
    interleaved = C > 1 and like.stride(1) == 1 and like.stride(3) == C
    layout = torch.channels_last if interleaved else torch.contiguous_format
    return torch.empty((B, C, H, W), dtype=like.dtype, device=like.device, memory_format=layout)


def _blend_fake(image: Tensor, reference: Tensor | None, mask: Tensor) -> Tensor:
    return _empty_image(image, image.shape[2], image.shape[3])


def _blend_backward_mask_fake(
    grad_out: Tensor, image: Tensor, reference: Tensor | None, mask: Tensor
) -> Tensor:
    return mask.new_empty(mask.shape)


def _blend_backward_image_fake(grad_out: Tensor, mask: Tensor, complement: bool) -> Tensor:
    return _empty_image(grad_out, grad_out.shape[2], grad_out.shape[3])


# ---------------------------------------------------------------- gradients


def _blend_setup(
    ctx: Any, inputs: tuple[Tensor | None, Tensor | None, Tensor], output: Tensor
) -> None:
    image, reference, mask = inputs
    if not ctx.needs_input_grad[2]:  # the images are needed for the mask's gradient alone
        image, reference = None, None
    ctx.save_for_backward(image, reference, mask)


def _blend_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    image, reference, mask = ctx.saved_tensors
    for_image, for_reference, for_mask = ctx.needs_input_grad
    ops = torch.ops.casm_fast
    return (
        ops.blend_backward_image(grad_out, mask, False) if for_image else None,
        ops.blend_backward_image(grad_out, mask, True) if for_reference else None,
        ops.blend_backward_mask(grad_out, image, reference, mask) if for_mask else None,
    )


def register(namespace: str) -> None:
    """Gives the operators in `namespace` their fakes and gradients."""
    torch.library.register_fake(f"{namespace}::blend", _blend_fake)
    torch.library.register_fake(f"{namespace}::blend_backward_mask", _blend_backward_mask_fake)
    torch.library.register_fake(f"{namespace}::blend_backward_image", _blend_backward_image_fake)
    torch.library.register_autograd(
        f"{namespace}::blend", _blend_backward, setup_context=_blend_setup
    )
    refuse_double_backward(f"{namespace}::blend_backward_mask")
    refuse_double_backward(f"{namespace}::blend_backward_image")


register("casm_fast")
