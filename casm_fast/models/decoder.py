"""The mask decoder: from the encoder's taps to a saliency map."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from casm_fast.models.compact import init_convolution

# "a 1x1 convolution with 64 filters" (CASM, supplement).
PAPER_WIDTH = 64


class Decoder(nn.Module):
    """Maps the encoder's taps to a saliency map (CASM, Figure 1 and supplement).

    Every tap goes through a 1x1 convolution without bias, batch norm and ReLU, and is brought to
    the size of the finest tap by bilinear interpolation (align_corners=False). All are
    concatenated, and one 3x3 convolution with bias and a sigmoid give the saliency. As in the
    authors' code, tap 0 (the stem of the ResNet) is concatenated raw; the paper's text, with a 1x1
    convolution on every tap, is ``tap0_projection=True``. For ResNet-50's taps the defaults have
    249,153 parameters.

    The 3x3 convolution has one output, and nothing but interpolation, which treats all channels
    alike, lies between it and a tap. It is therefore taken apart: at each tap's own resolution a
    1x1 convolution gives the nine products that the places of the kernel want; those are
    interpolated, added up over the taps, and moved to their places in the end. That is the same sum
    in another order, for a seventh of the time on a CPU: no wide maps at the finest resolution, and
    no convolution with a single output, which fills one of sixteen lanes.

    The saliency stays at the finest tap's resolution: the paper's last step, nearest upsampling to
    the image, adds no information. `casm_fast.ops.blend` takes it as it is, and
    `casm_fast.models.full_size` makes it where a picture is wanted.

    Args:
        tap_channels: channels of all taps of the encoder, coarse last.
        width: filters of the 1x1 convolutions.
        tap0_projection: project tap 0 like the others.
        tap_indices: which taps are read, -1 being the coarsest; None for all. ``(3, 4)`` is the
            choice of Phang et al. (2020). The saliency has the resolution of the encoder's tap 0
            whichever are read.

    Attributes:
        projections: the 1x1 convolutions by tap index, as strings.
        final: the 3x3 convolution.
        places: ``[1, 9, 3, 3]``, the place in its kernel of each of the nine planes.
    """

    places: Tensor

    def __init__(
        self,
        tap_channels: Sequence[int],
        *,
        width: int = PAPER_WIDTH,
        tap0_projection: bool = False,
        tap_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        count = len(tap_channels)
        asked = tuple(range(count)) if tap_indices is None else tuple(tap_indices)
        indices = tuple(index + count if index < 0 else index for index in asked)
        valid = all(0 <= index < count for index in indices)
        if not indices or not valid or list(indices) != sorted(set(indices)):
            raise ValueError(
                f"Decoder: expected `tap_indices` to be rising indices of {count} taps "
                f"(0 to {count - 1}), got {list(asked)}"
            )
        if width < 1:
            raise ValueError(f"Decoder: expected `width` of at least 1, got {width}")
        self.tap_channels = tuple(tap_channels)
        self.width = width
        self.tap0_projection = tap0_projection
        self.tap_indices = indices
        self.projections = nn.ModuleDict()
        channels = 0
        for index in indices:
            if index == 0 and not tap0_projection:
                channels += tap_channels[0]
                continue
            self.projections[str(index)] = nn.Sequential(
                nn.Conv2d(tap_channels[index], width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            channels += width
        self.final = nn.Conv2d(channels, 1, 3, padding=1)
        # Plane k of nine goes to place k of the kernel.
        self.register_buffer("places", torch.eye(9).view(1, 9, 3, 3), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Computes the saliency; 1 is salient.

        Args:
            taps: all taps of the encoder, ``[B, C_i, h_i, w_i]``, finest first, of any size.
                Gradients flow into them; `SaliencyModel` detaches those of a shared encoder.

        Returns:
            Saliency ``[B, 1, h_0, w_0]`` in (0, 1).
        """
        if len(taps) != len(self.tap_channels):
            raise ValueError(f"Decoder: expected {len(self.tap_channels)} taps, got {len(taps)}")
        size = taps[0].shape[-2:]
        kernel = self.final.weight[0].flatten(1).t()[..., None, None]  # [9, C, 1, 1]
        planes = []
        first = 0
        for index in self.tap_indices:
            feature = taps[index]  # [B, C_i, h_i, w_i]
            if str(index) in self.projections:
                feature = self.projections[str(index)](feature)  # [B, width, h_i, w_i]
            last = first + feature.shape[1]
            products = F.conv2d(feature, kernel[:, first:last])  # [B, 9, h_i, w_i]
            first = last
            if products.shape[-2:] != size:
                products = F.interpolate(products, size, mode="bilinear", align_corners=False)
            planes.append(products)
        saliency = F.conv2d(reduce(torch.add, planes), self.places, self.final.bias, padding=1)
        return torch.sigmoid(saliency)

    def description(self) -> dict[str, Any]:
        """The arguments that make this decoder again, as JSON values."""
        return {
            "tap_channels": list(self.tap_channels),
            "width": self.width,
            "tap0_projection": self.tap0_projection,
            "tap_indices": list(self.tap_indices),
        }
