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

import torch

import casm_fast
from casm_fast.data import predictions
from casm_fast.data.decoders import describe_decoder
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.predictions import Convention, Description
from casm_fast.data.source import ImageSource, open_source
from casm_fast.extraction.config import ExtractConfig
from casm_fast.extraction.extractor import Extractor, device_name
from casm_fast.extraction.rows import Row, batch_rows, label_numbers, to_table
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
        output: Parquet file to write; it appears only when it is complete. With ``shard`` its name
            gets the number of the part.
        config: Options; the conventions of the CASM paper when not given.
        **overrides: Fields of :class:`ExtractConfig` by name.

    Returns:
        The table, and where it was written.

    Raises:
        FileNotFoundError: If the checkpoint or the images are not there.
        ImportError: If the engine or the decoder asked for is not installed.
        ValueError: If an option is out of range, or the source is empty.
    """
    config = dataclasses.replace(config or ExtractConfig(), **overrides)
    started = time.perf_counter()
    here = "cpu" if config.engine == "ray" else config.device  # Ray's workers have their own
    file = None
    if not isinstance(model, SaliencyModel):
        file = Path(model)
        model = checkpoint.load(file, device=choose_device(here))
    images = open_source(source, split="val", decoder=config.decoder)
    if len(images) == 0:
        raise ValueError(f"{images.name}: expected at least one image, got none")
    span = config.span(len(images))
    convention = Convention(
        size=config.input_size or model.input_size,
        policy=config.resize_policy or model.resize_policy,
        rule=config.rule,
        alpha=config.alpha,
        component=config.component,
        connectivity=config.connectivity,
    )
    home = next(model.parameters()).device
    device = home if here == "auto" else choose_device(here)
    with _borrowed(model, device):
        if config.engine == "ray":
            from casm_fast.extraction import cluster

            table, saliency_size, place = cluster.run(model, convention, images, span, config)
        else:
            extractor = Extractor(model, convention, device, config.amp)
            table, saliency_size = _run(extractor, images, span, config)
            place = device_name(device)

    seconds = time.perf_counter() - started
    description = Description(
        source=images.name,
        convention=convention,
        saliency_size=saliency_size,
        classes=tuple(model.classes),
        checkpoint=None if file is None else str(file),
        model=checkpoint.fingerprint(model),
        config=dataclasses.asdict(config),
        device=place,
        seconds=seconds,
        versions=_versions(config),
    )
    table = predictions.describe(table, description)
    path = None
    if output is not None:
        path = predictions.write(table, predictions.part_path(Path(output), *config.part))
    errors = len(table) - int(table["error"].null_count)
    if errors:
        logger.warning("%d of %d images could not be read; their rows say why", errors, len(table))
    return Extraction(table, path, len(table), errors, seconds)


def _run(
    extractor: Extractor, source: ImageSource, span: range, config: ExtractConfig
) -> tuple[pa.Table, tuple[int, int]]:
    """The rows of a part of the source, and the size of the saliency maps."""
    from tqdm import tqdm

    labels = label_numbers(source.classes, extractor.model.classes)
    rows: dict[int, Row] = {}
    saliency_size = (0, 0)
    failed = 0
    with tqdm(
        total=len(span), unit="img", desc="extract", disable=None if config.progress else True
    ) as bar:
        for batch in evaluation_batches(
            source,
            size=extractor.convention.size,
            batch_size=config.batch_size,
            workers=config.workers,
            policy=extractor.convention.policy,
            start=span.start,
            stop=span.stop,
            pin_memory=extractor.device.type == "cuda",
        ):
            made, size = batch_rows(extractor, source, batch, labels)
            rows.update(made)
            saliency_size = max(saliency_size, size)
            failed += len(batch.errors)
            if failed:
                bar.set_postfix(errors=failed, refresh=False)
            bar.update(len(made))
    return to_table([rows[index] for index in span]), saliency_size


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


def _versions(config: ExtractConfig) -> dict[str, str]:
    return {
        "casm_fast": casm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "decoder": describe_decoder(config.decoder),
    }
