"""What extraction costs for a million and a billion images: a model on paper and a simulation.

``python benchmarks/scale.py`` prints the tables of docs/scale.md. Every number that goes in is a
field below with its origin; nothing here was run on the machines that it speaks of.

Two parts. *Capacities*: what each stage could do alone, in images per second; the lowest one is the
bottleneck, and no order of work is faster. *Simulation*, seeded: what is lost to bounded queues
when the times of stages vary (`line`), and to machines that fail, restart and finish at different
times (`campaign`).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

FILE = 110e3
"""Bytes of a JPEG: ImageNet's mean (138 GB, 1.28 million)."""

PIXELS = 224 * 224 * 3
"""Bytes of a decoded square."""

ROW = 106
"""Bytes of a row in Parquet, measured (300 rows; longer files pack better)."""

DECODE, RESIZE = 1.1e-3, 1.3e-3
"""Seconds of one core for a JPEG of 500 x 375 and 108 kB, by TorchCodec, and for its square by
Pillow; measured on a busy AMD EPYC, best of 60."""

CPU_NETWORK = 81e-3
"""Seconds of one core for CASM on ResNet-50 at 224, float32; measured by bench_extract.py on an
idle AMD EPYC."""

GPU_NETWORK = 12_000 * 8.18 / 8.39
"""Images per second of CASM on ResNet-50 on an H100: the published rate of ResNet-50 by
torch.compile with mixed precision on a card of that class, times the share of the classifier in
CASM's operations (8.18 of 8.39 GFLOP by torch's counter)."""

GPU_DECODE = 6_500
"""JPEGs per second of an H100's decoder: published 5,000 to 8,000."""

HOST = 46e-6
"""Seconds of one thread per image for rows, Parquet and annotation; measured by bench_extract.py
there."""

PCIE, DISK = 25e9, 0.5e9
"""Bytes per second to a GPU and to the disk of the table; assumed."""

BATCH, QUEUE = 64, 3
"""Images of a batch, and batches between two stages."""

VARIATION = {"read": 0.5, "decode": 0.2, "copy": 0.1, "network": 0.02, "rows": 0.1, "write": 0.5}
"""Standard deviation of a batch's time in each stage as a share of its mean; assumed."""

PART, PART_SECONDS = 10_000, 60.0
"""Images of a part, and seconds after which it is written all the same: what a crash can lose. The
defaults of extraction."""

RESTART, MTBF = 120.0, 24 * 3600.0
"""Seconds to begin again, and mean seconds between failures of a machine, which is one that may be
taken away (once a day); assumed."""

GET, STORED = 0.4e-6, 0.023
"""Dollars of a request to an object store, and of a gigabyte and month in it; list prices, as
remembered."""


@dataclass(frozen=True)
class Machine:
    """A kind of machine.

    Attributes:
        name: What it is.
        gpus: H100s.
        cores: Of its processor.
        storage: Bytes per second that files come at; assumed.
        price: Dollars per hour; assumed.
        gpu_decode: Whether the GPUs decode and resize.
    """

    name: str
    gpus: int
    cores: int
    storage: float
    price: float
    gpu_decode: bool = False

    def capacities(self) -> dict[str, float]:
        """Images per second of each stage alone, in the order of the pipeline."""
        reading = DECODE + RESIZE
        if self.gpus:
            decode = self.gpus * GPU_DECODE if self.gpu_decode else self.cores / reading
            network = self.gpus * GPU_NETWORK
        else:  # the cores do both, divided so that neither waits
            decode = network = self.cores / (reading + CPU_NETWORK)
        return {
            "read": self.storage / FILE,
            "decode": decode,
            "copy": max(self.gpus, 1) * PCIE / PIXELS,
            "network": network,
            "rows": max(self.gpus, 1) / HOST,
            "write": DISK / ROW,
        }

    @property
    def bottleneck(self) -> str:
        """The slowest stage."""
        capacities = self.capacities()
        name = min(capacities, key=lambda stage: capacities[stage])
        return "processor" if not self.gpus and name == "decode" else name


MACHINES = (
    Machine("2 cores", 0, 2, 1e9, 0.08),
    Machine("64 cores", 0, 64, 2e9, 2.56),
    Machine("1 H100, 16 cores", 1, 16, 2e9, 3.0),
    Machine("1 H100, GPU decodes", 1, 16, 2e9, 3.0, gpu_decode=True),
    Machine("8 H100, 128 cores", 8, 128, 6e9, 24.0),
    Machine("8 H100, GPUs decode", 8, 128, 6e9, 24.0, gpu_decode=True),
)


def line(
    capacities: Mapping[str, float],
    variation: Mapping[str, float],
    batches: int = 4000,
    queue: int = QUEUE,
    seed: int = 0,
) -> float:
    """Images per second of stages in a line with room for `queue` batches between two of them.

    Times are log-normal. A batch leaves a stage when the next one has room for it.

    Args:
        capacities: Images per second of each stage.
        variation: Standard deviation of a batch's time as a share of its mean.
        batches: How many pass; the first tenth is not counted.
        queue: Places between two stages.
        seed: Of the times.
    """
    rng = np.random.default_rng(seed)
    count = len(capacities)
    times = np.empty((batches, count))
    for stage, (name, rate) in enumerate(capacities.items()):
        spread = np.sqrt(np.log1p(variation[name] ** 2))
        times[:, stage] = BATCH / rate * rng.lognormal(-(spread**2) / 2, spread, batches)
    left = np.zeros((batches, count))
    for batch in range(batches):
        arrived = 0.0
        for stage in range(count):
            free = left[batch - 1, stage] if batch else 0.0
            done = max(arrived, free) + times[batch, stage]
            if stage + 1 < count and batch > queue:
                done = max(done, left[batch - queue - 1, stage + 1])
            left[batch, stage] = arrived = done
    first = batches // 10
    return BATCH * (batches - 1 - first) / (left[-1, -1] - left[first, -1])


@dataclass(frozen=True)
class Campaign:
    """Many machines at work on one set.

    Attributes:
        seconds: Until the last one is done.
        machine_seconds: Of all machines together, failures included.
        redone: Images that were extracted more than once, as a share of all.
        failures: Of machines.
    """

    seconds: float
    machine_seconds: float
    redone: float
    failures: int


def campaign(
    images: float,
    machines: int,
    rate: float,
    *,
    shards: int = 16,
    mtbf: float = MTBF,
    spread: float = 0.05,
    seed: int = 0,
) -> Campaign:
    """Shards of a set on machines that differ and fail; each takes the next shard when it is free.

    A failure loses the part that was not written, on average half of one, and the machine begins
    again where the last part ended.

    Args:
        images: Of the set.
        machines: That work at once.
        rate: Images per second of one.
        shards: For each machine.
        mtbf: Mean seconds between failures of a machine.
        spread: Standard deviation of the machines' speeds, as a share.
        seed: Of speeds and failures.
    """
    rng = np.random.default_rng(seed)
    speeds = rate * np.exp(rng.normal(-(spread**2) / 2, spread, machines))
    free = [(RESTART, machine) for machine in range(machines)]
    heapq.heapify(free)
    busy = machines * RESTART
    size = images / (machines * shards)
    part = min(PART, PART_SECONDS * rate)
    lost, failures = 0.0, 0
    for _ in range(machines * shards):
        now, machine = heapq.heappop(free)
        begun = now
        left = size
        while True:
            work, fails = left / speeds[machine], rng.exponential(mtbf)
            if fails >= work:
                now += work
                break
            done = fails * speeds[machine]
            kept = done - done % part
            lost, failures, left = lost + done - kept, failures + 1, left - kept
            now += fails + RESTART
        busy += now - begun
        heapq.heappush(free, (now, machine))
    return Campaign(max(time for time, _ in free), busy, lost / images, failures)


def duration(seconds: float) -> str:
    """Seconds for people, with two digits."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return (
                f"{seconds / size:.2g} {unit}"
                if seconds < 100 * size
                else (f"{seconds / size:,.0f} {unit}")
            )
    return f"{seconds:.2g} s"


def dollars(amount: float) -> str:
    """Dollars for people."""
    if amount < 0.01:
        return "under $0.01"
    return f"${amount:,.2f}" if amount < 10 else f"${amount:,.0f}"


def capacity_table() -> str:
    """Images per second of each stage, the lowest in bold."""
    names = list(MACHINES[0].capacities())
    lines = [
        f"| machine | {' | '.join(names)} | together | bottleneck |",
        "|---|" + "---:|" * (len(names) + 1) + "---|",
    ]
    for machine in MACHINES:
        capacities = machine.capacities()
        least = min(capacities.values())
        cells = [f"**{r:,.0f}**" if r == least else f"{r:,.0f}" for r in capacities.values()]
        rate = line(capacities, VARIATION)
        cells.append(f"{rate:,.0f} ({rate / least:.0%})")
        lines.append(f"| {machine.name} | {' | '.join(cells)} | {machine.bottleneck} |")
    return "\n".join(lines)


def cost_table() -> str:
    """Time and cost of a million and a billion images."""
    lines = [
        "| machines | 1 M images | | 1 B images | | redone |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    one, eight = MACHINES[2:4], MACHINES[4:]
    kinds = [(1, m) for m in (*MACHINES[:2], *one)] + [(n, m) for m in eight for n in (1, 8)]
    for count, machine in kinds:
        rate = line(machine.capacities(), VARIATION)
        cells = []
        for images in (1e6, 1e9):
            made = campaign(images, count, rate)
            price = made.machine_seconds / 3600 * machine.price
            cells += [duration(made.seconds), dollars(price)]
        name = machine.name if count == 1 else f"{count} x {machine.name}"
        lines.append(f"| {name} | {' | '.join(cells)} | {made.redone:.2%} |")
    return "\n".join(lines)


def feeding_table() -> str:
    """What one GPU must be given so that the network is the bottleneck."""
    lines = ["| one H100 at the network's speed needs | |", "|---|---:|"]
    for name, value in (
        ("images per second", f"{GPU_NETWORK:,.0f}"),
        ("cores that decode and resize", f"{GPU_NETWORK * (DECODE + RESIZE):.0f}"),
        ("files, GB/s", f"{GPU_NETWORK * FILE / 1e9:.1f}"),
        ("squares over PCIe, GB/s", f"{GPU_NETWORK * PIXELS / 1e9:.1f}"),
        ("threads after the network", f"{GPU_NETWORK * HOST:.2f}"),
        ("table, MB/s", f"{GPU_NETWORK * ROW / 1e6:.1f}"),
    ):
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines)


def storage_table() -> str:
    """What lies and moves besides."""
    lines = ["| | 1 M images | 1 B images |", "|---|---:|---:|"]
    for name, value in (
        ("JPEG files, TB", lambda n: f"{n * FILE / 1e12:,.2f}"),
        ("stored for a month", lambda n: dollars(n * FILE / 1e9 * STORED)),
        ("requests, a file each", lambda n: dollars(n * GET)),
        ("requests, WebDataset shards of 10,000", lambda n: dollars(n / 1e4 * GET)),
        ("table, GB", lambda n: f"{n * ROW / 1e9:,.2f}"),
        ("parts of 10,000 rows", lambda n: f"{n / PART:,.0f}"),
    ):
        lines.append(f"| {name} | {value(1e6)} | {value(1e9)} |")
    return "\n".join(lines)


TABLES = {
    "capacities": capacity_table,
    "feeding": feeding_table,
    "costs": cost_table,
    "storage": storage_table,
}


if __name__ == "__main__":
    for title, table in TABLES.items():
        print(f"<!-- {title} -->\n{table()}\n<!-- /{title} -->\n")
