"""Memory that a process keeps for its next batch, counted by the system's page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from casm_fast.models.memory import keep_freed

if sys.argv[1] == "kept":
    assert keep_freed()
for repeat in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.full(2**24, 1.0)  # 128 MiB
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_batch_takes_the_memory_of_the_one_before() -> None:
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", PROGRAM, how], text=True))
        for how in ("kept", "left alone")
    }
    assert faults["kept"] < 16
    assert faults["left alone"] >= 2**27 // 2**21  # as many as there are large pages, at least
