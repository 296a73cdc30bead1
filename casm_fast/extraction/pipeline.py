"""Boxes and saliency statistics of a whole set of images, as a table.

An extraction is rows from an engine (`local`, `cluster`) into parts of a folder (`writer`). A
single file is the same: its parts lie in a hidden folder beside it until they are merged.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import multiprocessing
import platform
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import casm_fast
from casm_fast.data import parts, predictions
from casm_fast.data.decoders import describe_decoder
from casm_fast.data.decoding import DecodeError
from casm_fast.data.predictions import Convention, Description
from casm_fast.data.signals import StopRequest, obey, stop_requests
from casm_fast.data.source import ImageSource, open_source
from casm_fast.extraction import local, processes
from casm_fast.extraction.config import ExtractConfig
from casm_fast.extraction.maps import PER_ROW
from casm_fast.extraction.writer import Rows, Writer, writing
from casm_fast.models import checkpoint
from casm_fast.models.placement import choose_device
from casm_fast.models.saliency import SaliencyModel

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

SAMPLED_IDS = 10_000
"""Ids, evenly spaced, by which a source is recognised: one file more or less moves most of them."""


@dataclass(frozen=True)
class Extraction:
    """What :func:`extract` made.

    Attributes:
        path: The Parquet file or folder, if one was asked for.
        images: Number of rows.
        made: Rows that this run made; an interrupted one before it may have made the others.
        errors: Rows of images that could not be read.
        seconds: Wall time of this run.
    """

    path: Path | None
    images: int
    made: int
    errors: int
    seconds: float
    _read: Callable[[], pa.Table] = field(repr=False)

    @functools.cached_property
    def table(self) -> pa.Table:
        """One row per image, in the order of the source; read when first asked for."""
        return self._read()

    @property
    def description(self) -> Description:
        """Which model made the boxes, from which images, by which conventions."""
        return predictions.description_of(self.table)

    def __str__(self) -> str:
        where = f" -> {self.path}" if self.path else ""
        failed = f", {self.errors:,} unreadable" if self.errors else ""
        before = self.images - self.made
        resumed = f", {before:,} of them from before" if before else ""
        return (
            f"{self.images:,} images{resumed}{failed} in {self.seconds:.1f} s "
            f"({self.made / max(self.seconds, 1e-9):,.0f} images/s){where}"
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
    as it was found. Rows are written as they come: after any interruption the same call goes on
    where it stopped, and no image is lost or counted twice.

    Args:
        model: A model, its checkpoint, or the folder of a training run.
        source: Images: ``"imagenet-val:DIR"``, ``"folder:DIR"``, ``"synthetic"``, a path, or an
            open source.
        output: A folder, which fills with Parquet files as rows come; or a Parquet file (a name
            that ends with .parquet), which appears when it is complete and whose rows lie in a
            hidden folder beside it until then. With ``shard`` the file gets the number of the part.
        config: Options; the conventions of the CASM paper when not given.
        **overrides: Fields of :class:`ExtractConfig` by name.

    Returns:
        The table, and where it was written.

    Raises:
        FileNotFoundError: If the checkpoint or the images are not there.
        ImportError: If the engine or the decoder asked for is not installed.
        KeyboardInterrupt: On Ctrl-C, with all rows written that were made.
        OSError: If the rows cannot be written, such as on a full disk.
        SystemExit: On SIGTERM, with status 143 and all rows written.
        ValueError: If an option is out of range, the source is empty, the output belongs to another
            extraction or to one that is running, or with ``strict`` if an image cannot be read.
    """
    config = dataclasses.replace(config or ExtractConfig(), **overrides)
    started = time.perf_counter()
    made = 0
    if config.processes > 1:
        made = _by_processes(model, source, output, config)
        config = dataclasses.replace(config, processes=1)
    here = "cpu" if config.engine == "ray" else config.device  # Ray's workers have their own
    file = None
    if not isinstance(model, SaliencyModel):
        file = Path(model)
        model = checkpoint.load(file, device=choose_device(here))
    convention = convention_of(model, config)
    images = _images(source, convention, config)
    span = config.span(len(images))
    home = next(model.parameters()).device
    device = home if here == "auto" else choose_device(here)
    path = folder = None
    if output is not None and parts.is_folder(output):
        path = folder = Path(output)
    elif output is not None:
        path = predictions.part_path(Path(output), *config.part)
        folder = parts.working_folder(path)
    if config.masks in PER_ROW and (folder is None or folder != path):
        raise ValueError(f"masks: expected a folder as output to keep them in, got {output}")
    total = min(len(images), config.limit or len(images))
    weights = checkpoint.fingerprint(model)

    with ExitStack() as stack:
        stack.enter_context(borrowed(model, device))
        fitting = config.batch_size or local.batch_size(model, convention.size, device, total)
        notes, stop = {"batch_size": fitting}, StopRequest()
        if folder is not None:
            settings = _settings(images, total, weights, convention, config)
            notes = stack.enter_context(parts.claimed(folder, span, settings, notes))
            if folder != path:
                stack.callback(_remove_if_empty, folder)
            # Ctrl-C reaches a process and its children, who hear of it again from the process.
            child = multiprocessing.parent_process() is not None
            stop = stack.enter_context(stop_requests(patient=child))
        if config.batch_size is None:
            config = dataclasses.replace(config, batch_size=notes["batch_size"])

        def describe(size: tuple[int, int], place: str, seconds: float) -> Description:
            return Description(
                source=images.name,
                convention=convention,
                saliency_size=size,
                classes=tuple(model.classes),
                checkpoint=None if file is None else str(file),
                model=weights,
                config=dataclasses.asdict(config),
                device=place,
                seconds=seconds,
                versions=_versions(config),
            )

        missing, errors = _missing(folder, span, config.strict)
        writer = Writer(folder, describe, config.part_images, config.part_seconds, config.masks)
        if config.engine == "ray":
            from casm_fast.extraction import cluster

            engine = cluster.rows(model, convention, images, missing, config)
        else:
            extractor = local.extractor(model, convention, device, config)
            engine = local.rows(extractor, images, missing, config)
        errors += _run(engine, writer, len(span), missing, stop, config)
        if stop.signal is not None:
            done = len(span) - sum(map(len, missing)) + writer.written
            message = f"{done:,} of {len(span):,} images are done; the same command goes on there"
            logger.warning("stopped: %s", message)
            obey(stop.signal, message)
        if folder is None or path is None:
            read = functools.partial(_itself, writer.take())
        elif folder == path:
            read = functools.partial(_table, predictions.read_places, folder, span)
        else:
            with writing(path):
                predictions.merge(folder, span, path)
            parts.remove(folder)
            read = functools.partial(_table, predictions.read, path)

    if errors:
        logger.warning("%d of %d images could not be read; their rows say why", errors, len(span))
    seconds = time.perf_counter() - started
    made += sum(map(len, missing))
    return Extraction(path, len(span), made, errors, seconds, read)


def _images(
    source: ImageSource | str | Path, convention: Convention, config: ExtractConfig
) -> ImageSource:
    """The images, at least one."""
    if config.draft and not isinstance(source, (str, Path)):
        raise ValueError(
            f"draft: expected images by name, to be opened with it, got {source.name}, which is "
            "open already"
        )
    draft = convention.size if config.draft else None
    images = open_source(source, split="val", decoder=config.decoder, draft=draft)
    if len(images) == 0:
        raise ValueError(f"{images.name}: expected at least one image, got none")
    return images


def convention_of(model: SaliencyModel, config: ExtractConfig) -> Convention:
    """Geometry and box rule: those that are asked for, else those of the model."""
    return Convention(
        size=config.input_size or model.input_size,
        policy=config.resize_policy or model.resize_policy,
        rule=config.rule,
        alpha=config.alpha,
        component=config.component,
        connectivity=config.connectivity,
    )


def _by_processes(
    model: SaliencyModel | str | Path,
    source: ImageSource | str | Path,
    output: str | Path | None,
    config: ExtractConfig,
) -> int:
    """Leave nothing for this process to do but to read or merge the parts; the rows made."""
    if output is None:
        raise ValueError("processes: expected an output with several processes, got none")
    images = open_source(source, split="val", decoder=config.decoder)
    folder = Path(output)
    if not parts.is_folder(output):
        folder = parts.working_folder(predictions.part_path(folder, *config.part))
    return processes.run(model, source, folder, config.span(len(images)), config)


def _itself(table: pa.Table) -> pa.Table:
    return table


def _table(read: Callable[..., tuple[pa.Table, Description]], *arguments: Any) -> pa.Table:
    return read(*arguments)[0]


def _run(
    engine: Generator[Rows, None, None],
    writer: Writer,
    total: int,
    missing: list[range],
    stop: StopRequest,
    config: ExtractConfig,
) -> int:
    """Write what the engine makes, until it ends or somebody asks to stop; the errors in it."""
    from tqdm import tqdm

    errors = 0
    with (
        closing(engine),
        tqdm(
            total=total,
            initial=total - sum(map(len, missing)),
            unit="img",
            desc="extract",
            disable=None if config.progress else True,
        ) as bar,
    ):
        try:
            for rows in engine:
                if rows.errors and config.strict:
                    raise _strict_error(next(filter(None, rows.table["error"].to_pylist())))
                writer.add(rows)
                errors += rows.errors
                if errors:
                    bar.set_postfix(errors=errors, refresh=False)
                bar.update(len(rows.table))
                if stop.signal is not None:
                    break
        finally:
            writer.flush()
    return errors


def _missing(folder: Path | None, span: range, strict: bool) -> tuple[list[range], int]:
    """The places without a row, and the number of errors in those that have one."""
    if folder is None:
        return [span], 0
    found = []
    for part in parts.listed(folder):
        if part.stop > span.start and part.start < span.stop and not predictions.is_whole(part):
            logger.warning("%s is damaged, and made again", part.path)
            part.path.unlink()
            parts.masks_file(folder, part.start, part.stop).unlink(missing_ok=True)
        else:
            found.append(part)
    errors = predictions.errors_of(folder, span)
    if errors and strict:
        raise _strict_error(errors[0][1])
    return parts.gaps(found, span), len(errors)


def _strict_error(error: str) -> DecodeError:
    return DecodeError(f"{error} (strict stops at the first; without it, a row says so)")


def _settings(
    images: ImageSource,
    total: int,
    weights: str,
    convention: Convention,
    config: ExtractConfig,
) -> dict[str, Any]:
    """What every row depends on; rounding aside, nothing else does."""
    step = -(-total // SAMPLED_IDS)
    ids = hashlib.sha256()
    for index in range(0, total, step):
        ids.update(images.image_id(index).encode() + b"\0")
    return {
        "source": images.name,
        "images": total,
        "ids": ids.hexdigest()[:16],
        "model": weights[:16],
        **dataclasses.asdict(convention),
        "amp": config.amp,
        "masks": config.masks,
        **({"draft": True} if config.draft else {}),
    }


def _remove_if_empty(folder: Path) -> None:
    """Removes the working folder of a file when no part of it was written."""
    if folder.is_dir() and not parts.listed(folder):
        parts.remove(folder)


@contextmanager
def borrowed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode on ``device``; afterwards it has its own tensors and modes again."""
    training = [module for module in model.modules() if module.training]
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        model.eval().to(device)
        yield
    finally:
        for parameter, own in weights:
            parameter.data = own
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        for module in training:
            module.training = True


def _versions(config: ExtractConfig) -> dict[str, str]:
    return {
        "casm_fast": casm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "decoder": describe_decoder(config.decoder),
    }
