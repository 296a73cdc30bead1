"""Loads the kernels and tells what was loaded.

`casm_fast._C` brings the schemas and the CPU kernels and must be there. `casm_fast/_cuda.so` brings
the CUDA kernels and may be absent: the machine that built the package may have had no toolkit, or
torch may be a CPU build here. Then CUDA tensors meet torch's own "no kernel" error, and `status()`
says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

try:
    from casm_fast import _C
except ImportError as error:
    raise ImportError(
        f"casm_fast: expected the built kernels beside the package, got: {error}; "
        "build them with: pip install -e . (or pip install casm_fast)"
    ) from error


@dataclass(frozen=True)
class Status:
    """Which kernels this process has.

    Attributes:
        build: What the build was: compiler, flags, instruction sets, CUDA (strings by name).
        instruction_set: The CPU kernels that were loaded: ``baseline``, ``avx2`` or ``avx512``.
        cuda: Whether the CUDA kernels are loaded.
        cuda_reason: Why they are not, or where they came from.
    """

    build: dict[str, str | list[str]]
    instruction_set: str
    cuda: bool
    cuda_reason: str


def _load_cuda(build: dict[str, str | list[str]]) -> tuple[bool, str]:
    library = Path(__file__).parent.parent / "_cuda.so"
    if not library.exists():
        return False, f"not built ({build['cuda']})"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return False, f"built, but it does not load here: {error}"
    return True, str(build["cuda"])


def _load() -> Status:
    build: dict[str, str | list[str]] = dict(_C.build_info())
    cuda, reason = _load_cuda(build)
    return Status(build, str(build["instruction_set"]), cuda, reason)


_STATUS = _load()


def status() -> Status:
    """What was built and what was loaded, for `casm-fast doctor` and bug reports."""
    return _STATUS
