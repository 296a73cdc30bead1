"""From a batch of images to boxes and numbers: the part of an extraction that runs on the device.

Boxes are computed at the saliency map's own resolution, where thresholds and components are
identical to those of the enlarged map, and scaled to the network's pixels by integer arithmetic
(exact: x4 for 56 x 56 cells of a 224 x 224 image). Everything that the host needs crosses in one
copy per batch.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast import ops
from casm_fast.data import localization
from casm_fast.data.predictions import Convention
from casm_fast.data.transforms import normalize
from casm_fast.extraction.config import Precision
from casm_fast.models.saliency import SaliencyModel
from casm_fast.models.statistics import Cells, inside, measure

TOP = 5
"""Classes that a row lists."""


@dataclass(frozen=True)
class Measurements:
    """What was found in a batch of B images, on the host.

    Attributes:
        boxes: ``[B, 4]`` int64, network pixels; zeros where no pixel was kept.
        area: ``[B]`` int64, kept pixels of the network's square (rounded where a cell is no whole
            number of pixels).
        top: ``[B, k]`` int64, the k = min(5, classes) most likely classes, best first.
        score: ``[B]`` float64, softmax probability of the best class.
        mean: ``[B]`` float64, mean saliency.
        tv: ``[B]`` float64, sum of squared differences.
        entropy: ``[B]`` float64, one-sided, in bits.
        entropy_full: ``[B]`` float64, in bits.
        f1: ``[B]`` float64, best over the true boxes; NaN without any.
        f1_mean: ``[B]`` float64, mean over the true boxes; NaN without any.
        saliency_size: ``(h, w)`` of the saliency map.
    """

    boxes: NDArray[np.int64]
    area: NDArray[np.int64]
    top: NDArray[np.int64]
    score: NDArray[np.float64]
    mean: NDArray[np.float64]
    tv: NDArray[np.float64]
    entropy: NDArray[np.float64]
    entropy_full: NDArray[np.float64]
    f1: NDArray[np.float64]
    f1_mean: NDArray[np.float64]
    saliency_size: tuple[int, int]


@dataclass(frozen=True)
class Extractor:
    """Maps images and their true boxes to :class:`Measurements`.

    Attributes:
        model: In eval mode, on ``device``.
        convention: Geometry and box rule.
        device: Where the network runs.
        amp: Mixed precision of the network.
    """

    model: SaliencyModel
    convention: Convention
    device: torch.device
    amp: Precision = "off"

    def __call__(self, images: Tensor, truth: list[NDArray[np.int32]]) -> Measurements:
        """Find the boxes of a batch.

        Args:
            images: ``[B, 3, S, S]`` or ``[B, S, S, 3]`` uint8, B >= 1.
            truth: B lists ``[k_i, 4]`` of true boxes in network pixels, not clipped.

        Returns:
            The measurements, after the only synchronisation of the batch.
        """
        flat, owners = localization.pair(truth)
        with torch.inference_mode():
            saliency, logits = self.forward(images)
            size = int(images.shape[-2])
            rows, columns = Cells.of(saliency.shape[2], size), Cells.of(saliency.shape[3], size)
            boxes, area = ops.mask_boxes(
                saliency,
                rule=self.convention.rule,
                alpha=self.convention.alpha,
                connectivity=self.convention.connectivity,
                component=self.convention.component,
            )
            likely, top = logits.softmax(1).topk(min(TOP, logits.shape[1]), dim=1)
            # Integers below 2^53 pass through float64 unharmed, so that one copy brings everything.
            table = torch.cat(
                [boxes, area[:, None], top, likely[:, :1], measure(saliency, rows, columns)], dim=1
            ).double()
            held = inside(saliency, torch.from_numpy(flat), torch.from_numpy(owners), rows, columns)
            host = torch.cat([table.flatten(), held]).cpu().numpy()
        height, width = int(saliency.shape[2]), int(saliency.shape[3])
        table_host = host[: table.numel()].reshape(table.shape)
        k = int(top.shape[1])
        cells, area_cells = table_host[:, :4].astype(np.int64), table_host[:, 4]
        score, mean, tv, entropy, entropy_full = table_host[:, 5 + k :].T
        f1 = localization.f1(
            host[table.numel() :], (mean * size * size)[owners], localization.area(flat)
        )
        return Measurements(
            boxes=np.stack(
                [
                    (columns if axis % 2 == 0 else rows).edges.numpy()[cells[:, axis]]
                    for axis in range(4)
                ],
                axis=1,
            ),
            area=np.rint(area_cells * size * size / (height * width)).astype(np.int64),
            top=table_host[:, 5 : 5 + k].astype(np.int64),
            score=score,
            mean=mean,
            tv=tv,
            entropy=entropy,
            entropy_full=entropy_full,
            f1=localization.best(f1, owners, len(images)),
            f1_mean=localization.mean(f1, owners, len(images)),
            saliency_size=(height, width),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Saliency maps and logits of uint8 images.

        Args:
            images: ``[B, 3, S, S]`` or ``[B, S, S, 3]`` uint8.

        Returns:
            Saliency ``[B, 1, h, w]`` and logits ``[B, K]``, both float32.
        """
        batch = normalize(
            images.to(self.device, non_blocking=True), self.model.mean, self.model.std
        )
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype=dtype, enabled=self.amp != "off"):
            saliency, logits = self.model(batch)
        return saliency.float(), logits.float()


def device_name(device: torch.device) -> str:
    """What a table says about the device that its boxes were computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
