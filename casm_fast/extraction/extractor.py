"""From a batch of images to boxes and numbers: the part of an extraction that runs on the device.

Boxes are computed at the saliency map's own resolution, where thresholds and components are
identical to those of the enlarged map, and scaled to the network's pixels by integer arithmetic
(exact: x4 for 56 x 56 cells of a 224 x 224 image). Everything that the host needs of a batch is one
table of numbers: on a GPU `Extractor.launch` orders all work and the copy of that table, and
returns; who asks for the numbers later waits for no more than is left.
"""

from __future__ import annotations

import functools
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast import ops
from casm_fast.data import localization
from casm_fast.data.predictions import Convention
from casm_fast.data.transforms import normalize
from casm_fast.extraction.config import Masks, Precision
from casm_fast.extraction.maps import stored
from casm_fast.models.memory import in_parts, is_out_of_memory
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
class Launched:
    """A batch on its way: all work on it is ordered, its numbers arrive.

    Attributes:
        numbers: Host memory: the table ``[B, 10 + k]`` (box in cells, area, top k, score, mean, TV,
            entropies) and the saliency inside of every true box, float64.
        arrived: What to wait for; None where the numbers are there.
        images: B.
        truth: ``[n, 4]`` true boxes.
        owners: ``[n]`` the image of each.
        rows: Pixel rows of the cells of the saliency map.
        columns: Pixel columns of the cells.
        maps: ``[B, h, w]`` saliency in host memory, as it is kept, or None; there when the numbers
            are.
    """

    numbers: Tensor
    arrived: torch.cuda.Event | None
    images: int
    truth: NDArray[np.int64]
    owners: NDArray[np.int64]
    rows: Cells
    columns: Cells
    maps: Tensor | None = None

    def measurements(self) -> Measurements:
        """The numbers as what they mean; waits for their arrival."""
        if self.arrived is not None:
            self.arrived.synchronize()
        host = self.numbers.numpy()
        held = host[len(host) - len(self.truth) :]
        table = host[: len(host) - len(self.truth)].reshape(self.images, -1)
        cells, area = table[:, :4].astype(np.int64), table[:, 4]
        score, mean, tv, entropy, entropy_full = table[:, -5:].T
        pixels = self.rows.pixels * self.columns.pixels
        height, width = len(self.rows.edges) - 1, len(self.columns.edges) - 1
        down, across = self.rows.edges.numpy(), self.columns.edges.numpy()
        f1 = localization.f1(held, (mean * pixels)[self.owners], localization.area(self.truth))
        return Measurements(
            boxes=np.stack([(across, down)[axis % 2][cells[:, axis]] for axis in range(4)], axis=1),
            area=np.rint(area * pixels / (height * width)).astype(np.int64),
            top=table[:, 5:-5].astype(np.int64),
            score=score,
            mean=mean,
            tv=tv,
            entropy=entropy,
            entropy_full=entropy_full,
            f1=localization.best(f1, self.owners, self.images),
            f1_mean=localization.mean(f1, self.owners, self.images),
            saliency_size=(height, width),
        )


@dataclass
class Extractor:
    """Maps images and their true boxes to :class:`Measurements`.

    Attributes:
        model: In eval mode, on ``device``.
        convention: Geometry and box rule.
        device: Where the network runs.
        amp: Mixed precision of the network.
        channels_last: Whether images lie with their channels last.
        static: Images of a pass of a compiled network, smaller ones being filled up; None: as they
            come.
        at_once: Images of a pass; halves when memory runs out. None: a whole batch.
        masks: How saliency maps are kept.
    """

    model: SaliencyModel
    convention: Convention
    device: torch.device
    amp: Precision = "off"
    channels_last: bool = False
    static: int | None = None
    at_once: int | None = None
    masks: Masks = "off"

    def __call__(self, images: Tensor, truth: list[NDArray[np.int32]]) -> Measurements:
        """Find the boxes of a batch, and wait for them.

        Args:
            images: ``[B, 3, S, S]`` or ``[B, S, S, 3]`` uint8, B >= 1.
            truth: B lists ``[k_i, 4]`` of true boxes in network pixels, not clipped.
        """
        return self.launch(images, *localization.pair(truth)).measurements()

    def launch(
        self, images: Tensor, truth: NDArray[np.integer], owners: NDArray[np.int64]
    ) -> Launched:
        """Order all work on a batch; on a GPU nothing is waited for.

        Args:
            images: ``[B, 3, S, S]`` or ``[B, S, S, 3]`` uint8, B >= 1; pinned for a GPU.
            truth: ``[n, 4]`` true boxes in network pixels, not clipped.
            owners: ``[n]`` the image of each, from `casm_fast.data.localization.pair`.
        """
        with torch.inference_mode():
            saliency, logits = self.forward(images)
            return self.measure(saliency, logits, int(images.shape[-2]), truth, owners)

    def measure(
        self,
        saliency: Tensor,
        logits: Tensor,
        size: int,
        truth: NDArray[np.integer],
        owners: NDArray[np.int64],
    ) -> Launched:
        """Order what follows the network.

        Args:
            saliency: ``[B, 1, h, w]`` float32 on the device.
            logits: ``[B, K]`` float32 on the device.
            size: Side of the network's square, in pixels.
            truth: ``[n, 4]`` true boxes in network pixels, not clipped.
            owners: ``[n]`` the image of each.
        """
        cuda = self.device.type == "cuda"
        known = torch.from_numpy(np.column_stack([truth, owners]).astype(np.int64))
        known = (known.pin_memory() if cuda else known).to(self.device, non_blocking=True)
        shape = (int(saliency.shape[2]), int(saliency.shape[3]), size)
        rows, columns = _cells(*shape, self.device)
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
        held = inside(saliency, known[:, :4], known[:, 4], rows, columns)
        numbers = self._to_host(torch.cat([table.flatten(), held]))
        maps = (
            None
            if self.masks == "off"
            else self._to_host(stored(saliency, self.masks, self.convention))
        )
        arrived = None
        if cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(self.device))
        rows, columns = _cells(*shape, torch.device("cpu"))
        return Launched(
            numbers, arrived, len(saliency), truth.astype(np.int64), owners, rows, columns, maps
        )

    def _to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory, from a GPU on its way."""
        if self.device.type != "cuda":
            return tensor.cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Saliency maps and logits of uint8 images, half as many at once when memory runs out.

        Args:
            images: ``[B, 3, S, S]`` or ``[B, S, S, 3]`` uint8.

        Returns:
            Saliency ``[B, 1, h, w]`` and logits ``[B, K]``, both float32.
        """
        count = len(images)
        there = images.to(self.device, non_blocking=True)
        wished = min(self.at_once or count, count)

        def work(part: slice) -> tuple[Tensor, Tensor]:
            try:
                return self._network(there[part])
            except (RuntimeError, MemoryError) as error:
                if self.static is not None and is_out_of_memory(error):
                    self.static = (self.static + 1) // 2
                raise

        made, sizes = zip(*in_parts(count, wished, work, self.device), strict=True)
        if min(sizes) < wished:
            self.at_once = min(sizes)
        saliency, logits = zip(*made, strict=True)
        return torch.cat(saliency), torch.cat(logits)

    def _network(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch = normalize(images, self.model.mean, self.model.std)
        count = len(batch)
        if self.static is not None and count < self.static:
            batch = torch.cat([batch, batch.new_zeros(self.static - count, *batch.shape[1:])])
        if self.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        frozen = self.static is not None and self.device.type == "cpu"
        with (
            torch.autocast(self.device.type, dtype=dtype, enabled=self.amp != "off"),
            _frozen() if frozen else nullcontext(),
        ):
            saliency, logits = self.model(batch)
        return saliency[:count].float(), logits[:count].float()


def _frozen() -> AbstractContextManager[None]:
    """What is compiled meanwhile takes weights as constants, laid out for oneDNN's kernels once."""
    from torch._inductor import config  # seconds

    patch: AbstractContextManager[None] = config.patch(freezing=True)
    return patch


@functools.lru_cache
@torch.inference_mode(False)
def _cells(height: int, width: int, size: int, device: torch.device) -> tuple[Cells, Cells]:
    """Rows and columns of a saliency map ``[height, width]`` for images of ``size`` pixels."""
    return Cells.of(height, size).to(device), Cells.of(width, size).to(device)


def device_name(device: torch.device) -> str:
    """What a table says about the device that its boxes were computed on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
