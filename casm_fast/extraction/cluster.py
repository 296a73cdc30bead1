"""The same extraction on a Ray cluster (extra ``dist``): what ``engine="ray"`` means.

Ray Data runs three stages side by side: *read*, processes of one CPU that decode and resize;
*network*, processes that hold the :class:`Extractor` of the local engine, one per GPU or, where
there is none, one per four CPUs; and the driver, which collects the rows in order and writes the
Parquet file. The batches are those of the local engine, so that the rows are too.

Every machine of the cluster needs casm_fast and the images, under the same paths.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import pickle
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from casm_fast.data import predictions
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.predictions import Convention
from casm_fast.data.source import ImageSource
from casm_fast.extraction import local
from casm_fast.extraction.config import ExtractConfig, Masks
from casm_fast.extraction.maps import PER_ROW
from casm_fast.extraction.rows import Naming, label_numbers
from casm_fast.extraction.writer import Rows
from casm_fast.models.memory import keep_freed
from casm_fast.models.saliency import SaliencyModel

if TYPE_CHECKING:
    import pyarrow as pa

_BESIDE = ("start", "saliency_height", "saliency_width", "device_name")
"""Columns that come with rows."""

_MAP = "saliency"
"""Column of the bytes of the maps, when they are kept."""

_READER, _PATIENCE = "iter_threaded", 10.0
"""The name of the threads by which Ray Data reads ahead, and seconds to wait for one."""

CPUS_PER_ACTOR = 4
"""CPUs behind every actor where there is no GPU: one of them reads, the others run the network."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the network is spread over a cluster.

    Attributes:
        actors: Processes that hold the model.
        gpus: GPUs of each.
        cpus: CPUs of each, which are its threads where there is no GPU.
        readers: Processes of one CPU that read images, at most.
    """

    actors: int
    gpus: int
    cpus: int
    readers: int


def plan(gpus: float, cpus: float, device: str) -> Plan:
    """One actor per GPU, or per ``CPUS_PER_ACTOR`` CPUs; at least one CPU is left for reading.

    Args:
        gpus: GPUs of the cluster.
        cpus: CPUs of the cluster.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: A single GPU is named, or the cluster is too small.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            "device: expected 'auto', 'cpu' or 'cuda' with the engine ray, which takes all GPUs of "
            f"the cluster, got {device!r}"
        )
    if device == "cuda" and gpus < 1:
        raise ValueError("device: expected a GPU in the Ray cluster, got none; choose 'auto'")
    if cpus < 2:
        raise ValueError(
            f"engine: expected a Ray cluster of at least 2 CPUs, one to read and one for the "
            f"network, got {cpus:g}"
        )
    if device != "cpu" and gpus >= 1:
        actors, each = min(int(gpus), int(cpus) - 1), 1
    else:
        actors = max(1, int(cpus) // CPUS_PER_ACTOR)
        each = max(1, int(cpus) // actors - 1)
    return Plan(actors, int(device != "cpu" and gpus >= 1), each, int(cpus) - actors * each)


def rows(
    model: SaliencyModel,
    convention: Convention,
    source: ImageSource,
    spans: list[range],
    config: ExtractConfig,
) -> Generator[Rows, None, None]:
    """The rows of some places, batch by batch and in order, made on the cluster.

    Args:
        model: In eval mode, on the CPU.
        convention: Geometry and box rule.
        source: The images; it is sent to every worker, so it must be possible to pickle it.
        spans: Places of the images.
        config: Options, the batch size among them.

    Yields:
        The rows of a batch.

    Raises:
        ImportError: Ray is not installed.
        ValueError: The cluster cannot serve the device, or the source cannot be sent.
    """
    size = config.batch_size or 1
    starts = [
        {"start": start, "stop": min(start + size, span.stop)}
        for span in spans
        for start in range(span.start, span.stop, size)
    ]
    if not starts:
        return
    with _cluster() as ray:
        resources = ray.cluster_resources()
        spread = plan(resources.get("GPU", 0), resources.get("CPU", 0), config.device)
        job = _Job(convention, config, label_numbers(source.classes, model.classes))
        try:
            images, network = ray.put(source), ray.put(model)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(
                f"engine: expected images and a model that can be sent to Ray's workers, got one "
                f"that cannot: {error}"
            ) from error

        batches = ray.data.from_items(starts)
        batches.context.enable_progress_bars = False  # one bar, ours, tells of the rows
        batches.context.execution_options.preserve_order = True  # a part is rows in a row
        # Actors also for reading: Ray would run tasks inside of the network's actors, one after
        # the other, where both ask for one CPU.
        read = batches.map(
            _Read,
            fn_constructor_args=(images, job),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=spread.readers),
            num_cpus=1,
        )
        found = read.map_batches(
            _Network,
            fn_constructor_args=(network, images, job, spread.cpus),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=spread.actors),
            num_cpus=spread.cpus,
            num_gpus=spread.gpus,
        )
        names = predictions.schema(segmented=config.masks == "rle").names
        made = iter(found.iter_batches(batch_size=None, batch_format="pyarrow"))
        with _reading_ended(), closing(made):
            for table in made:
                start, height, width, device = (table[name][0].as_py() for name in _BESIDE)
                yield Rows(
                    start,
                    table.select(names),
                    (height, width),
                    f"{spread.actors} x {device}, by Ray {ray.__version__}",
                    _maps(table, (height, width), config.masks),
                )


@contextmanager
def _reading_ended() -> Iterator[None]:
    """Waits, in the end, for the threads by which Ray Data reads ahead.

    They end soon after their iterator is closed. One that asked for a batch after the cluster was
    shut down would end the whole process, with status 1.
    """
    before = set(threading.enumerate())
    try:
        yield
    finally:
        for thread in set(threading.enumerate()) - before:
            if thread.name == _READER:
                thread.join(_PATIENCE)


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected; what was started here is stopped again."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError(
            "engine: expected Ray for the engine ray, but it is not installed: "
            "pip install 'casm_fast[dist]'"
        )
    # Ray would report its use over the network; an own setting wins.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    started = not ray.is_initialized()
    if started:
        with _own_handler(signal.SIGTERM):
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
    talk = logging.getLogger("ray.data")
    level = talk.level
    talk.setLevel(logging.ERROR)  # it tells each step of every plan
    try:
        yield ray
    finally:
        talk.setLevel(level)
        if started:
            ray.shutdown()


@contextmanager
def _own_handler(number: signal.Signals) -> Iterator[None]:
    """Keeps what this process does at a signal: Ray would exit at once, with its number."""
    before = signal.getsignal(number)
    yield
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(number, before)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    convention: Convention
    config: ExtractConfig
    labels: dict[int, int] | None


class _Read:
    """Stage one: the places of a batch -> the batch."""

    def __init__(self, images: Any, job: _Job) -> None:
        import ray

        self._source: ImageSource = ray.get(images)
        self._job = job

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        start, stop = int(row["start"]), int(row["stop"])
        (batch,) = evaluation_batches(
            self._source,
            size=self._job.convention.size,
            batch_size=stop - start,
            policy=self._job.convention.policy,
            start=start,
            stop=stop,
            boxes=self._source.has_boxes,
        )
        return {"batch": pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)}


class _Network:
    """Stage two: batches -> rows, with their first place and what the description needs."""

    def __init__(self, network: Any, images: Any, job: _Job, threads: int) -> None:
        import ray

        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(threads)
            keep_freed()
        model = ray.get(network).to(device)
        self._extractor = local.extractor(model, job.convention, device, job.config)
        self._naming = Naming(ray.get(images), model.classes, job.labels, job.convention.rule)

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        import pyarrow as pa

        batch = pickle.loads(rows["batch"][0])  # written by _Read, in this cluster
        made = local.measured(self._extractor, self._naming, batch)
        table = made.table
        for name, value in zip(
            _BESIDE, (made.start, *made.saliency_size, made.device), strict=True
        ):
            table = table.append_column(name, pa.array([value] * len(table)))
        if made.maps is not None:
            pixels = pa.array([one.tobytes() for one in made.maps], pa.binary())
            table = table.append_column(_MAP, pixels)
        return table


def _maps(table: pa.Table, size: tuple[int, int], kind: Masks) -> NDArray[Any] | None:
    """The maps that came with rows, ``[rows, h, w]``."""
    if kind not in PER_ROW:
        return None
    dtype = np.uint8 if kind == "png" and 0 not in size else np.float16
    pixels = np.frombuffer(b"".join(table[_MAP].to_pylist()), dtype)
    return pixels.reshape(len(table), *size)
