"""Fixtures that every room uses: the devices, and the shapes that break kernels."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator

import emulator
import hypothesis
import pytest
import torch

from casm_fast.ops import checks

# The same examples in every run, so that a change is what makes a test fail. Other ones, to search:
# CASM_FAST_TEST_EXPLORE=1 make test
hypothesis.settings.register_profile(
    "chosen", derandomize="CASM_FAST_TEST_EXPLORE" not in os.environ, database=None
)
hypothesis.settings.load_profile("chosen")

# Parallel test processes share the cores; more threads than cores slow all of them several times.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

# A GPU's convolutions take TF32 by default, which rounds coarser than most tolerances.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """The level of the package's log, which the command line sets, ends with the test."""
    log = logging.getLogger("casm_fast")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def emulated_kernels() -> None:
    """The CUDA kernels as C++, in the namespace ``casm_fast_emulated``."""
    reason = emulator.why_not()
    if reason:
        pytest.skip(reason)
    # tests/emulator/sanitize.py runs the tests again on the library with sanitizers.
    emulator.load(emulator.build(os.environ.get("CASM_FAST_TEST_SANITIZE", "")))


def _device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    if request.param != "emulated":
        return torch.device(request.param)

    request.getfixturevalue("emulated_kernels")
    monkeypatch = request.getfixturevalue("monkeypatch")
    # The doors call torch.ops.casm_fast: for this test that is the emulated GPU, on host
    # tensors, in a GPU's dtypes.
    monkeypatch.setattr(torch.ops, "casm_fast", torch.ops.casm_fast_emulated)
    monkeypatch.setattr(checks, "CPU_DTYPES", checks.CUDA_DTYPES)
    # Each test has its own order of threads, the same in every run.
    monkeypatch.setenv("CASM_FAST_EMULATOR_SEED", str(zlib.crc32(request.node.name.encode())))
    return torch.device("cpu")


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that has kernels."""
    return _device(request)


@pytest.fixture(params=["emulated", "cuda"])
def gpu_device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that runs the CUDA sources, for what CPU kernels do not have (16-bit storage)."""
    return _device(request)
