"""``python -m casm_fast``, and the start of the ``casm-fast`` command.

A module of its own, so that kernels that are not built end in the one sentence that says how to
build them, instead of a traceback.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line and returns its exit code."""
    try:
        from casm_fast import cli
        from casm_fast.models.memory import keep_freed
    except ImportError as error:
        if not str(error).startswith("casm_fast: "):
            raise
        sys.stderr.write(f"{error}\n")
        return 1
    keep_freed()
    return cli.main()


if __name__ == "__main__":
    raise SystemExit(main())
