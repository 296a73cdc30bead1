"""Builds and loads the emulated CUDA kernels: the .cu files compiled as C++ (emulated_cuda.h)."""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
NAMESPACE = "casm_fast_emulated"


def _program(name: str) -> str | None:
    """cmake or ninja: beside this Python (a wheel) before the one on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def why_not() -> str | None:
    """Why the emulated kernels cannot be built here, or None."""
    for name in ("cmake", "ninja"):
        if _program(name) is None:
            return f"the emulated kernels need {name}"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "the emulated kernels need a C++ compiler"
    return None


@functools.cache
def build(sanitize: str = "", target: str = "casm_fast_emulated") -> Path:
    """Builds the library where its sources changed, one process at a time, and returns its path.

    Args:
        sanitize: Sanitizers to compile in, such as ``address,undefined``.
        target: ``casm_fast_emulated``, or the planted bugs of test_emulator.py.
    """
    folder = ROOT / "build" / ("emulated-" + sanitize.replace(",", "-") if sanitize else "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    cmake, ninja = _program("cmake"), _program("ninja")
    configure = [
        cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}", "-DCASM_FAST_CUDA=off",
        f"-DCASM_FAST_SANITIZE={sanitize}",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", folder, "--target", target, "-j", "2"]):
            done = subprocess.run(
                [str(part) for part in command], capture_output=True, text=True, env=environment
            )
            if done.returncode != 0:
                raise RuntimeError(
                    f"the emulated kernels did not compile:\n{done.stdout}{done.stderr}"
                )
    return folder / "tests" / "emulator" / f"{target}.so"


def load(library: Path) -> None:
    """Loads the emulated kernels and gives them the fakes and gradients of every room."""
    import casm_fast.ops

    torch.ops.load_library(str(library))
    for module in pkgutil.iter_modules(casm_fast.ops.__path__):
        room = importlib.import_module(f"casm_fast.ops.{module.name}")
        if hasattr(room, "register"):
            room.register(NAMESPACE)
