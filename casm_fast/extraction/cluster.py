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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from casm_fast.data.loading import evaluation_batches
from casm_fast.data.predictions import Convention
from casm_fast.data.source import ImageSource
from casm_fast.extraction.config import ExtractConfig
from casm_fast.extraction.extractor import Extractor, device_name
from casm_fast.extraction.rows import batch_rows, label_numbers, to_table
from casm_fast.models.saliency import SaliencyModel

if TYPE_CHECKING:
    import pyarrow as pa

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


def run(
    model: SaliencyModel,
    convention: Convention,
    source: ImageSource,
    span: range,
    config: ExtractConfig,
) -> tuple[pa.Table, tuple[int, int], str]:
    """Extract a part of a source on the cluster.

    Args:
        model: In eval mode, on the CPU.
        convention: Geometry and box rule.
        source: The images; it is sent to every worker, so it must be possible to pickle it.
        span: Places of the images.
        config: Options.

    Returns:
        The rows in order, the size ``(h, w)`` of the saliency maps, and the name of the devices.

    Raises:
        ImportError: Ray is not installed.
        ValueError: The cluster cannot serve the device, or the source cannot be sent.
    """
    import pyarrow as pa
    from tqdm import tqdm

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

        starts = list(range(span.start, span.stop, config.batch_size))
        batches = ray.data.from_items([{"start": start} for start in starts])
        batches.context.enable_progress_bars = False  # one bar, ours, tells of the rows
        # Actors also for reading: Ray would run tasks inside of the network's actors, one after
        # the other, where both ask for one CPU.
        read = batches.map(
            _Read,
            fn_constructor_args=(images, span.stop, job),
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
        tables = []
        with tqdm(
            total=len(span), unit="img", desc="extract", disable=None if config.progress else True
        ) as bar:
            for table in found.iter_batches(batch_size=None, batch_format="pyarrow"):
                tables.append(table)
                bar.update(len(table))
    whole = pa.concat_tables(tables).sort_by("index").combine_chunks()
    sizes = (whole[f"saliency_{side}"].to_pylist() for side in ("height", "width"))
    device = f"{spread.actors} x {whole['device'][0].as_py()}, by Ray {ray.__version__}"
    return whole.select(to_table([]).column_names), max(zip(*sizes, strict=True)), device


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


@dataclasses.dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    convention: Convention
    config: ExtractConfig
    labels: dict[int, int] | None


class _Read:
    """Stage one: the place of a batch's first image -> the batch."""

    def __init__(self, images: Any, stop: int, job: _Job) -> None:
        import ray

        self._source: ImageSource = ray.get(images)
        self._stop = stop
        self._job = job

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        start, size = int(row["start"]), self._job.config.batch_size
        (batch,) = evaluation_batches(
            self._source,
            size=self._job.convention.size,
            batch_size=size,
            policy=self._job.convention.policy,
            start=start,
            stop=min(start + size, self._stop),
        )
        return {"batch": pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)}


class _Network:
    """Stage two: batches -> rows, with their places and what the description needs."""

    def __init__(self, network: Any, images: Any, job: _Job, threads: int) -> None:
        import ray

        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(threads)
        model = ray.get(network).to(device)
        self._extractor = Extractor(model, job.convention, device, job.config.amp)
        self._source: ImageSource = ray.get(images)
        self._labels = job.labels

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        import pyarrow as pa

        batch = pickle.loads(rows["batch"][0])  # written by _Read, in this cluster
        made, size = batch_rows(self._extractor, self._source, batch, self._labels)
        order = sorted(made)
        table = to_table([made[index] for index in order])
        name = device_name(self._extractor.device)
        for column, values in (
            ("index", pa.array(order, pa.int64())),
            ("saliency_height", pa.array([size[0]] * len(order), pa.int32())),
            ("saliency_width", pa.array([size[1]] * len(order), pa.int32())),
            ("device", pa.array([name] * len(order), pa.string())),
        ):
            table = table.append_column(column, values)
        return table
