"""The fused operators. Each module is one room: what it computes, its door, its specification.

Polarity everywhere: **1 keeps the image, 0 replaces it**. Pixels are (y, x), sizes (H, W), boxes
``(x0, y0, x1, y1)``, half-open. Every op is pure: no random numbers, no global state, no host
synchronisation, output shapes that depend on input shapes alone.
"""

from casm_fast.ops.blur_mask import blur_mask, gaussian_blur
from casm_fast.ops.contour_boxes import contour_boxes, contour_overlap
from casm_fast.ops.jitter_mask import blend, jitter_mask, upsample_mask
from casm_fast.ops.mask_boxes import connected_components, mask_boxes
from casm_fast.ops.tv_norm import tv_norm, tv_norm_with_gradient

__all__ = [
    "blend",
    "blur_mask",
    "connected_components",
    "contour_boxes",
    "contour_overlap",
    "gaussian_blur",
    "jitter_mask",
    "mask_boxes",
    "tv_norm",
    "tv_norm_with_gradient",
    "upsample_mask",
]
