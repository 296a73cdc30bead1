"""The engine of one process: threads read, the network runs, and rows are made one batch behind."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from casm_fast.data.loading import ImageBatch, evaluation_batches
from casm_fast.data.predictions import Convention
from casm_fast.data.source import ImageSource
from casm_fast.extraction.config import ExtractConfig, Masks
from casm_fast.extraction.extractor import Extractor, Launched, device_name
from casm_fast.extraction.maps import PER_ROW, spread
from casm_fast.extraction.masks import run_lengths
from casm_fast.extraction.rows import (
    Naming,
    Truth,
    batch_table,
    label_numbers,
    segmented,
    true_boxes,
)
from casm_fast.extraction.writer import Rows
from casm_fast.models.folding import folded
from casm_fast.models.memory import budget, footprint
from casm_fast.models.saliency import SaliencyModel

IN_FLIGHT = 3
"""Batches that a GPU has ordered while the rows of an earlier one are made. It never waits for a
row then, and a batch of results is 0.1 kB an image."""

LARGEST = {"cuda": 256}
LARGEST_ELSEWHERE = 64
"""Images of a batch at most: larger ones are no faster."""

FEW = 16


def extractor(
    model: SaliencyModel, convention: Convention, device: torch.device, config: ExtractConfig
) -> Extractor:
    """The extractor of a model that is in eval mode and on the device."""
    last = channels_last(device, config)
    network: Any = model
    if config.fold:
        side = convention.size
        images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        network = folded(model, images.to(device))
    if last:
        network.to(memory_format=torch.channels_last)
    static = config.batch_size if config.compile else None
    if config.compile:
        network = torch.compile(network, dynamic=False)
    return Extractor(network, convention, device, config.amp, last, static, masks=config.masks)


def channels_last(device: torch.device, config: ExtractConfig) -> bool:
    """Whether images lie with their channels last: as asked for, else where that is faster."""
    if config.channels_last is not None:
        return config.channels_last
    return device.type == "cpu" or config.amp != "off"


def batch_size(model: SaliencyModel, size: int, device: torch.device, images: int) -> int:
    """Images of a batch that fits into the memory: a power of two, so that it seldom changes.

    What autograd would keep of an image is an estimate on the safe side: a pass without it holds a
    part of that at a time.

    Args:
        model: In eval mode, on the device.
        size: Side of the images in pixels.
        device: It.
        images: That there are; for a few nothing is tried.
    """
    most = LARGEST.get(device.type, LARGEST_ELSEWHERE)
    if images <= FEW:
        return FEW
    image = torch.zeros(1, 3, size, size, device=device, requires_grad=True)

    def run() -> object:
        with torch.inference_mode(False), torch.enable_grad():
            return model(image)

    each = max(1, footprint(run, model.parameters()) // 2)
    while most > 1 and most * each > budget(device):
        most //= 2
    return most


def rows(
    extractor: Extractor, source: ImageSource, spans: list[range], config: ExtractConfig
) -> Generator[Rows, None, None]:
    """The rows of some places, batch by batch and in order.

    Args:
        extractor: Measures the images.
        source: Where they come from.
        spans: Their places.
        config: Options, the batch size among them.

    Yields:
        The rows of a batch, when the next batches are ordered on a GPU already.
    """
    naming = Naming(
        source,
        extractor.model.classes,
        label_numbers(source.classes, extractor.model.classes),
        extractor.convention.rule,
    )
    waiting: deque[_Ordered] = deque()
    behind = IN_FLIGHT if extractor.device.type == "cuda" else 0
    for batch in itertools.chain.from_iterable(
        evaluation_batches(
            source,
            size=extractor.convention.size,
            batch_size=config.batch_size or LARGEST_ELSEWHERE,
            workers=config.workers,
            policy=extractor.convention.policy,
            start=span.start,
            stop=span.stop,
            pin_memory=extractor.device.type == "cuda",
            boxes=source.has_boxes,
        )
        for span in spans
    ):
        waiting.append(_ordered(extractor, batch))
        if len(waiting) > behind:
            yield waiting.popleft().rows(naming)
    while waiting:
        yield waiting.popleft().rows(naming)


def measured(extractor: Extractor, naming: Naming, batch: ImageBatch) -> Rows:
    """The rows of one batch, waited for."""
    return _ordered(extractor, batch).rows(naming)


def _ordered(extractor: Extractor, batch: ImageBatch) -> _Ordered:
    truth, launched = true_boxes(batch), None
    if batch.indices:
        launched = extractor.launch(batch.images, truth.network, truth.owners)
    return _Ordered(
        batch, truth, launched, device_name(extractor.device),
        extractor.masks, extractor.convention.size,
    )  # fmt: skip


@dataclass(frozen=True)
class _Ordered:
    """A batch whose work is ordered; `launched` is None when no image could be read."""

    batch: ImageBatch
    truth: Truth
    launched: Launched | None
    device: str
    masks: Masks
    size: int

    def rows(self, naming: Naming) -> Rows:
        found = None if self.launched is None else self.launched.measurements()
        first = min([*self.batch.indices[:1], *(index for index, _ in self.batch.errors[:1])])
        table = batch_table(naming, self.batch, found, self.truth)
        places = [index - first for index in self.batch.indices]
        kept = None if self.launched is None else self.launched.maps
        maps = None if kept is None else kept.numpy()
        if self.masks == "rle":
            encoded = [] if maps is None else run_lengths(maps, self.batch.geometries, self.size)
            table = segmented(table, dict(zip(places, encoded, strict=True)))
        return Rows(
            first,
            table,
            found.saliency_size if found else (0, 0),
            self.device,
            spread(maps, places, len(table)) if self.masks in PER_ROW else None,
        )
