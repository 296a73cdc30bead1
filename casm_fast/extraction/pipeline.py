"""Boxes and saliency statistics of a whole set of images, as a table."""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

import casm_fast
from casm_fast.data import predictions
from casm_fast.data.loading import ImageBatch, evaluation_batches
from casm_fast.data.predictions import Convention, Description
from casm_fast.data.source import ImageSource, open_source
from casm_fast.extraction.config import ExtractConfig
from casm_fast.extraction.extractor import Extractor
from casm_fast.extraction.rows import Row, error_row, label_numbers, measured_rows, to_table
from casm_fast.models import checkpoint
from casm_fast.models.placement import choose_device
from casm_fast.models.saliency import SaliencyModel

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """What :func:`extract` made.

    Attributes:
        table: One row per image, in the order of the source.
        path: The Parquet file, if one was asked for.
        images: Number of rows.
        errors: Rows of images that could not be read.
        seconds: Wall time.
    """

    table: pa.Table
    path: Path | None
    images: int
    errors: int
    seconds: float

    @property
    def description(self) -> Description:
        """Which model made the boxes, from which images, by which conventions."""
        return predictions.description_of(self.table)

    def __str__(self) -> str:
        where = f" -> {self.path}" if self.path else ""
        failed = f", {self.errors:,} unreadable" if self.errors else ""
        return (
            f"{self.images:,} images{failed} in {self.seconds:.1f} s "
            f"({self.images / max(self.seconds, 1e-9):,.0f} images/s){where}"
        )


def extract(
    model: SaliencyModel | str | Path,
    source: ImageSource | str | Path,
    output: str | Path | None = None,
    config: ExtractConfig | None = None,
    **overrides: Any,
) -> Extraction:
    """Find one box per image, and measure its saliency map.

    An image that cannot be read becomes a row with its error; it stops nothing. The model is left
    as it was found.

    Args:
        model: A model, its checkpoint, or the folder of a training run.
        source: Images: ``"imagenet-val:DIR"``, ``"folder:DIR"``, ``"synthetic"``, a path, or an
            open source.
        output: Parquet file to write; it appears only when it is complete.
        config: Options; the conventions of the CASM paper when not given.
        **overrides: Fields of :class:`ExtractConfig` by name.

    Returns:
        The table, and where it was written.

    Raises:
        FileNotFoundError: If the checkpoint or the images are not there.
        ValueError: If an option is out of range, or the source is empty.
    """
    config = dataclasses.replace(config or ExtractConfig(), **overrides)
    started = time.perf_counter()
    file = None
    if not isinstance(model, SaliencyModel):
        file = Path(model)
        model = checkpoint.load(file, device=choose_device(config.device))
    images = open_source(source, split="val")
    if len(images) == 0:
        raise ValueError(f"{images.name}: expected at least one image, got none")
    convention = Convention(
        size=config.input_size or model.input_size,
        policy=config.resize_policy or model.resize_policy,
        rule=config.rule,
        alpha=config.alpha,
        component=config.component,
        connectivity=config.connectivity,
    )
    home = next(model.parameters()).device
    device = home if config.device == "auto" else choose_device(config.device)
    with _borrowed(model, device):
        extractor = Extractor(model, convention, device, config.amp)
        rows, saliency_size = _run(extractor, images, config)

    seconds = time.perf_counter() - started
    description = Description(
        source=images.name,
        convention=convention,
        saliency_size=saliency_size,
        classes=tuple(model.classes),
        checkpoint=None if file is None else str(file),
        model=checkpoint.fingerprint(model),
        config=dataclasses.asdict(config),
        device=_device_name(device),
        seconds=seconds,
        versions=_versions(),
    )
    table = predictions.describe(to_table(rows), description)
    path = None if output is None else predictions.write(table, output)
    errors = sum(row["error"] is not None for row in rows)
    if errors:
        logger.warning("%d of %d images could not be read; their rows say why", errors, len(rows))
    return Extraction(table, path, len(rows), errors, seconds)


def _run(
    extractor: Extractor, source: ImageSource, config: ExtractConfig
) -> tuple[list[Row], tuple[int, int]]:
    """Every row of the source, and the size of the saliency maps."""
    from tqdm import tqdm

    convention = extractor.convention
    stop = min(len(source), config.limit or len(source))
    labels = label_numbers(source.classes, extractor.model.classes)
    rows: dict[int, Row] = {}
    saliency_size = (0, 0)
    failed = 0
    with tqdm(
        total=stop, unit="img", desc="extract", disable=None if config.progress else True
    ) as bar:
        for batch in evaluation_batches(
            source,
            size=convention.size,
            batch_size=config.batch_size,
            workers=config.workers,
            policy=convention.policy,
            stop=stop,
            pin_memory=extractor.device.type == "cuda",
        ):
            for index, error in batch.errors:
                rows[index] = error_row(source, index, error, labels)
            if batch.indices:
                truth, net_truth = _true_boxes(source, batch)
                measurements = extractor(batch.images, net_truth)
                saliency_size = measurements.saliency_size
                made = measured_rows(
                    measurements,
                    source,
                    batch.indices,
                    batch.geometries,
                    truth,
                    net_truth,
                    classes=extractor.model.classes,
                    labels=labels,
                    rule=convention.rule,
                )
                rows.update(zip(batch.indices, made, strict=True))
            failed += len(batch.errors)
            if failed:
                bar.set_postfix(errors=failed, refresh=False)
            bar.update(len(batch.indices) + len(batch.errors))
    return [rows[index] for index in sorted(rows)], saliency_size


def _true_boxes(
    source: ImageSource, batch: ImageBatch
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
    """The true boxes of a batch in original and in network pixels."""
    if not source.has_boxes:
        none = [np.zeros((0, 4), np.int32)] * len(batch.indices)
        return none, none
    truth = [source.boxes(index) for index in batch.indices]
    moved = [
        geometry.to_network(boxes) for geometry, boxes in zip(batch.geometries, truth, strict=True)
    ]
    return truth, moved


@contextmanager
def _borrowed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode on ``device``; afterwards as it was."""
    home = next(model.parameters()).device
    training = [module for module in model.modules() if module.training]
    try:
        model.eval().to(device)
        yield
    finally:
        model.to(home)
        for module in training:
            module.training = True


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def _versions() -> dict[str, str]:
    return {
        "casm_fast": casm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
