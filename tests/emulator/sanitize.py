"""Runs the emulated tests again under AddressSanitizer and UndefinedBehaviorSanitizer.

``python tests/emulator/sanitize.py [pytest arguments]``. The kernels are compiled with the
sanitizers; Python is not, so their run times are loaded before it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import emulator

SANITIZERS = "address,undefined"


def environment() -> dict[str, str]:
    """The variables under which a plain Python can load a library with sanitizers.

    Raises:
        RuntimeError: The compiler has no run-time library of AddressSanitizer.
    """
    compiler = os.environ.get("CXX", "c++")
    preload = []
    # libstdc++ too: AddressSanitizer looks for its exceptions while the process starts.
    for library in ("libasan.so", "libstdc++.so"):
        asked = [compiler, f"-print-file-name={library}"]
        path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if not os.path.isabs(path):
            raise RuntimeError(f"{compiler} has no {library}: the sanitizers cannot run")
        preload.append(str(Path(path).resolve()))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "PYTHONMALLOC": "malloc",
        "CASM_FAST_TEST_SANITIZE": SANITIZERS,
    }


def main() -> int:
    reason = emulator.why_not()
    if reason:
        sys.exit(reason)
    emulator.build(SANITIZERS)
    emulator.build(SANITIZERS, "casm_fast_planted")
    arguments = sys.argv[1:] or ["tests", "-q", "-k", "emulated", "-n", "2"]
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, env=environment(), cwd=emulator.ROOT).returncode


if __name__ == "__main__":
    raise SystemExit(main())
