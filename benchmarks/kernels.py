"""Registers, spills and shared memory of every CUDA kernel, as a table.

    python benchmarks/kernels.py [--archs 80,90,100] [--all] [--strict] [ROOM ...]

Compiles the .cu files once more with the commands of the build (build/cmake/compile_commands.json)
and reads what ptxas says. A line is one kernel: the worst of its instantiations, or each of them
with --all. --strict exits with 1 where a kernel spills.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Use:
    """What one kernel uses on one architecture: registers a thread, the rest in bytes."""

    registers: int
    spilled: int
    stack: int
    shared: int

    def __or__(self, other: Use) -> Use:
        """The worse of two instantiations, each figure on its own."""
        pairs = zip(self.__dict__.values(), other.__dict__.values(), strict=True)
        return Use(*(max(a, b) for a, b in pairs))


def commands(build: Path, rooms: list[str]) -> dict[str, tuple[list[str], str]]:
    """The nvcc command and folder for each room that has CUDA kernels."""
    database = build / "compile_commands.json"
    if not database.exists():
        sys.exit(f"expected {database}; build the package first: pip install -e .")
    found = {}
    for entry in json.loads(database.read_text()):
        command = shlex.split(entry["command"])
        room = Path(entry["file"]).parent.name
        if Path(command[0]).name == "nvcc" and (not rooms or room in rooms):
            found[room] = (command, entry["directory"])
    if not found:
        sys.exit("expected a build with CUDA kernels, got none; see: casm-fast doctor")
    return found


def said_by_ptxas(command: list[str], folder: str, arch: str) -> str:
    """Compiles one file for one architecture and returns ptxas's report."""
    kept = [part for part in command if not part.startswith("--generate-code")]
    kept[kept.index("-o") + 1] = os.devnull
    kept[kept.index("-c")] = "-cubin"
    done = subprocess.run([*kept, f"-arch=sm_{arch}"], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr)
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    if warnings:
        print(*warnings, sep="\n", file=sys.stderr)
    return done.stderr


def uses(report: str) -> dict[str, Use]:
    """What each kernel of a report uses, by mangled name."""
    found = {}
    for entry in ENTRY.finditer(report):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        found[entry["name"]] = Use(
            int(entry["registers"]),
            int(entry["stores"]) + int(entry["loads"]),
            int(entry["stack"]),
            int(shared[1]) if shared else 0,
        )
    return found


def readable(names: list[str]) -> list[str]:
    """Kernel names with their template arguments, without namespaces and parameters."""
    demangled = subprocess.run(
        ["c++filt", "-p", *names], capture_output=True, text=True, check=True
    )
    plain = demangled.stdout.replace("casm_fast::", "").replace("(anonymous namespace)::", "")
    return [name.removeprefix("void ") for name in plain.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rooms", nargs="*", help="rooms to look at (default: all)")
    parser.add_argument("--archs", default="80,90,100", help="compute capabilities")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "cmake", help="build folder")
    parser.add_argument("--all", action="store_true", help="a line for each instantiation")
    parser.add_argument("--strict", action="store_true", help="fail where a kernel spills")
    options = parser.parse_args()
    archs = options.archs.split(",")
    found = commands(options.build, options.rooms)
    work = [(room, arch) for room in found for arch in archs]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        reports = list(pool.map(lambda job: said_by_ptxas(*found[job[0]], job[1]), work))

    table: dict[tuple[str, str], dict[str, Use]] = {}
    counts: dict[tuple[str, str], int] = {}
    for (room, arch), report in zip(work, reports, strict=True):
        of_report = uses(report)
        here: dict[tuple[str, str], int] = {}
        for name, use in zip(readable(list(of_report)), of_report.values(), strict=True):
            key = (room, name if options.all else name.partition("<")[0])
            here[key] = here.get(key, 0) + 1
            row = table.setdefault(key, {})
            row[arch] = row[arch] | use if arch in row else use
        counts |= here

    print("registers / bytes spilled / bytes of static shared memory\n")
    print("| room | kernel | variants | " + " | ".join(f"sm_{arch}" for arch in archs) + " |")
    print("|---|---|---|" + "---|" * len(archs))
    for (room, name), row in table.items():
        cells = [f"{u.registers} / {u.spilled} / {u.shared}" for u in row.values()]
        print(f"| {room} | {name} | {counts[room, name]} | " + " | ".join(cells) + " |")
    return int(
        options.strict and any(use.spilled for row in table.values() for use in row.values())
    )


if __name__ == "__main__":
    raise SystemExit(main())
