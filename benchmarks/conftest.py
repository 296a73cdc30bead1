"""The harness: `race` checks every competitor, then times all of them in turn, in one process.

One race is one op on one input. Its rules:

* every competitor's result is compared with `expected` before anything is timed, and the largest
  error is written beside its time;
* all competitors run with the same number of threads, in turn (A B C A B C ...), so that a load
  from outside slows all of them; the median and the 10th and 90th percentile are kept;
* a turn begins with untimed calls of the same competitor, until the threads of the one before have
  stopped to spin and its own are awake (`SETTLE`);
* the threads that a competitor keeps busy are bound to one CPU each while the race lasts
  (`placed`, on Linux);
* traffic is set against a copy that is measured in the same process.

`make bench` keeps freed blocks in the allocator for everybody (MALLOC_* in the Makefile): without
that, large outputs are given back to the system and faulted in again, and eager peers look up to
six times slower than they are.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Competitor = Callable[[], Any]

KEEP = 5  # rounds that are run however long they take
SETTLE = 0.02  # seconds of untimed calls: GNU OpenMP spins for 5 to 13 ms after its work
BUSY = 2e5  # nanoseconds that a thread runs in that time if it takes part
TURN = 0.01  # seconds of timed calls in a turn, at least one
FAR_BEHIND = 20  # a rival this many times slower than we are is out after a
SHARE = 0.25  # of the time for the race and
FEW = 2  # calls: more would measure the same loss for minutes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=2.0, help="time for each race")
    parser.addoption("--short", action="store_true", help="only the cases marked for a quick look")
    parser.addoption(
        "--compiled", action="store_true", help="compiled training steps, on a CPU too"
    )
    parser.addoption("--threads", type=int, default=0, help="CPU threads (default: torch's own)")
    parser.addoption("--on", default="cpu", choices=["cpu", "cuda"], help="device to measure")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: left out of the short mode")
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--short"):
        skip = pytest.mark.skip(reason="not in the short mode")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    for private in ("node", "release"):  # a host's name and kernel are nobody's business
        machine_info.pop(private, None)
    import casm_fast
    from casm_fast.ops import library

    cuda = config.getoption("--on") == "cuda"
    machine_info["casm_fast"] = {
        "version": casm_fast.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else machine_info["cpu"]["brand_raw"],
        "instruction_set": library.status().instruction_set,
        "cuda": library.status().cuda_reason,
    }


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that this run measures (`--on`)."""
    return torch.device(request.config.getoption("--on"))


@pytest.fixture(scope="session")
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and write counted."""
    source = torch.ones(64 << 20, device=device)  # 256 MiB: larger than any cache here
    target = torch.empty_like(source)
    with placed({"copy": lambda: target.copy_(source)}, device):
        times = [_seconds(lambda: target.copy_(source), 1, device) for _ in range(9)]
    return 2 * source.nbytes / statistics.median(times)


def synchronized(device: torch.device) -> None:
    """Waits for a GPU's work; a CPU has none left."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Competitor, repeats: int, device: torch.device) -> float:
    """Seconds of one call: the mean of `repeats`, by events on a GPU."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def settle(call: Competitor, device: torch.device) -> float:
    """Calls for `SETTLE` seconds, at least once, and tells the seconds of the quickest call."""
    start = time.perf_counter()
    quickest = _seconds(call, 1, device)
    while time.perf_counter() - start < SETTLE:
        quickest = min(quickest, _seconds(call, 1, device))
    return max(quickest, 1e-7)


def _busy_nanoseconds() -> Counter[int]:
    """How long each thread of this process has run, by its id."""
    busy: Counter[int] = Counter()
    for task in Path("/proc/self/task").iterdir():
        try:
            busy[int(task.name)] = int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue  # a thread that has just ended, or a kernel that does not count
    return busy


@contextmanager
def placed(field: Mapping[str, Competitor], device: torch.device) -> Iterator[dict[str, float]]:
    """Binds the threads that a competitor keeps busy to one CPU each; yields seconds of one call.

    Left alone, some schedulers (those of virtual machines above all) wake two threads of a team on
    one CPU while another idles, and leave them there for a second. Whoever waits for the second
    thread by spinning, as GNU OpenMP does, then keeps it from running: a call of 0.1 ms takes 8.
    Who is struck changes from run to run, so the threads of all competitors are placed.
    """
    linux = device.type == "cpu" and sys.platform == "linux"
    everywhere = os.sched_getaffinity(0) if linux else set()
    place = {threading.get_native_id(): min(everywhere)} if everywhere else {}
    quickest = {}
    for name, call in field.items():
        before = _busy_nanoseconds() if everywhere else Counter()
        quickest[name] = settle(call, device)
        # What remains of a subtraction of counters is positive: threads that have run.
        spent = _busy_nanoseconds() - before if everywhere else Counter()
        team = sorted(thread for thread, ran in spent.items() if ran > BUSY)
        load = Counter(place[thread] for thread in team if thread in place)
        for thread in team:
            if thread not in place:
                place[thread] = min(sorted(everywhere), key=load.__getitem__)
                load[place[thread]] += 1
    for thread, cpu in place.items():
        _bind(thread, {cpu})
    try:
        yield quickest
    finally:
        for thread in place:
            _bind(thread, everywhere)


def _bind(thread: int, cpus: set[int]) -> None:
    with suppress(ProcessLookupError):  # a pool that was made inside a call has ended
        os.sched_setaffinity(thread, cpus)


def _arrays(result: Any) -> list[np.ndarray]:
    if isinstance(result, torch.Tensor):
        return [result.detach().double().cpu().numpy()]
    if isinstance(result, np.ndarray):
        return [result.astype(np.float64)]
    return [array for part in result for array in _arrays(part)]


def _error(result: Any, expected: Any) -> float:
    pairs = zip(_arrays(result), _arrays(expected), strict=True)
    return max((float(np.abs(a - b).max()) if a.size else 0.0 for a, b in pairs), default=0.0)


@pytest.fixture
def race(
    benchmark: Any, request: pytest.FixtureRequest, device: torch.device, copy_bandwidth: float
) -> Callable[..., dict[str, Any]]:
    """Checks and times one op on one input; the figures go into the benchmark's JSON."""
    limit = request.config.getoption("--seconds")

    def run(
        *,
        op: str,
        case: str,
        ours: Competitor,
        peers: Mapping[str, Competitor],
        expected: Any,
        tolerance: float | Mapping[str, float],
        bytes: int,
        images: int,
        inexact: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Runs one race.

        Args:
            op: Name of the op.
            case: What distinguishes the input, such as ``32x3x224x224, sigma 10``.
            ours: Calls the op and returns its result.
            peers: Calls of the rivals by name; each returns the same thing as `ours`.
            expected: The right result (tensor, array, or a sequence of them), or a callable.
            tolerance: Largest absolute error, for all or by name ("ours" or the peer's).
            bytes: Compulsory traffic: every input read once, every output written once.
            images: Images that one call handles.
            inexact: Peers that do not compute the same thing, with the reason; timed, not ranked.
        """
        right = expected() if callable(expected) else expected
        field: dict[str, Competitor] = {"ours": ours, **peers}
        inexact = inexact or {}
        errors = {}
        for name, call in field.items():
            errors[name] = _error(call(), right)  # the first call also compiles
            allowed = tolerance if isinstance(tolerance, float) else tolerance[name]
            if name not in inexact:
                assert errors[name] <= allowed, f"{op} {case}: {name} is off by {errors[name]:.3g}"
        seconds: dict[str, list[float]] = {name: [] for name in field}
        rounds = 0
        with placed(field, device) as quickest:
            repeats = {name: max(1, int(2e-4 / once)) for name, once in quickest.items()}
            start = time.perf_counter()
            while rounds < KEEP or time.perf_counter() - start < limit:
                rounds += 1
                for name, call in field.items():
                    far = quickest[name] > FAR_BEHIND * quickest["ours"]
                    if far and len(seconds[name]) >= FEW and sum(seconds[name]) > SHARE * limit:
                        continue
                    settle(call, device)
                    turn = time.perf_counter()
                    while time.perf_counter() - turn < TURN:
                        seconds[name].append(_seconds(call, repeats[name], device))
            benchmark.pedantic(ours, rounds=3, iterations=repeats["ours"])

        def row(name: str) -> dict[str, Any]:
            p10, median, p90 = (np.percentile(seconds[name], [10, 50, 90]) * 1e3).tolist()
            return {
                "median_ms": median,
                "p10_ms": p10,
                "p90_ms": p90,
                "error": errors[name],
                "inexact": inexact.get(name),
            }

        rows = {name: row(name) for name in field}
        exact = [name for name in peers if name not in inexact]
        best = min(exact, key=lambda name: rows[name]["median_ms"], default=None)
        median = rows["ours"]["median_ms"] / 1e3
        result = {
            "op": op,
            "case": case,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "images": images,
            "bytes": bytes,
            "rounds": rounds,
            "competitors": rows,
            "best_peer": best,
            "ratio": rows[best]["median_ms"] / rows["ours"]["median_ms"] if best else None,
            "gigabytes_per_second": bytes / median / 1e9,
            "copy_share": bytes / median / copy_bandwidth,
            "copy_gigabytes_per_second": copy_bandwidth / 1e9,
            "images_per_second": images / median,
        }
        benchmark.group = op
        benchmark.extra_info.update(result)
        return result

    return run
