"""Runs the benchmark suite and keeps its JSON: `make bench`, `make bench-short`.

One file a device under benchmarks/results/, named after the processor or the GPU. The short mode
leaves the long cases out, takes about two minutes and writes to build/, so that it never replaces
kept results. A part of the suite (`--only`) replaces its own results in the file and leaves the
others, each with the day it was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent


def slug(name: str) -> str:
    """A file name from a device's name: 'NVIDIA H100 80GB' -> 'nvidia-h100-80gb'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")


def device_name(device: str) -> str:
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    from cpuinfo import get_cpu_info

    return slug(f"{get_cpu_info()['brand_raw']} {torch.get_num_threads()} threads")


def merged(kept: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """Results with those that were measured again in the place of the old ones."""
    for benchmark in fresh["benchmarks"]:
        benchmark["extra_info"]["measured"] = fresh["datetime"][:10]
    rows = {row["fullname"]: row for row in kept.get("benchmarks", [])}
    rows.update({row["fullname"]: row for row in fresh["benchmarks"]})
    return {**fresh, "benchmarks": [rows[name] for name in sorted(rows)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="the quick cases only, two minutes")
    parser.add_argument("--only", default="", help="pytest -k expression: a part of the suite")
    parser.add_argument("--on", choices=["cpu", "cuda", "all"], default="all")
    parser.add_argument("--seconds", type=float, help="time for each race")
    options = parser.parse_args()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    if options.on != "all":
        devices = [options.on]
    target = ROOT / "build" / "bench" if options.short else FOLDER / "results"
    target.mkdir(parents=True, exist_ok=True)
    seconds = options.seconds or (0.3 if options.short else 2.0)
    worst = 0
    for device in devices:
        result = target / f"{device_name(device)}.json"
        fresh = result.with_suffix(".tmp")
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--benchmark-only"),
            *sorted(str(path) for path in FOLDER.glob("bench_*.py")),
            *("--on", device, "--seconds", str(seconds), f"--benchmark-json={fresh}"),
            *(("--short",) if options.short else ()),
            *(("-k", options.only) if options.only else ()),
        ]
        worst = max(worst, subprocess.run(command, cwd=ROOT).returncode)
        if not fresh.exists():
            continue
        kept = json.loads(result.read_text()) if options.only and result.exists() else {}
        result.write_text(json.dumps(merged(kept, json.loads(fresh.read_text())), indent=4) + "\n")
        fresh.unlink()
        print(f"wrote {result.relative_to(ROOT)}; `make bench-report` renders kept results")
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
