"""The front door: the names that the README promises, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import casm_fast

HEAVY = ["torch", "tyro", "pyarrow", "matplotlib", "jinja2", "cv2", "torchvision", "timm"]


@pytest.mark.parametrize("name", casm_fast.__all__)
def test_every_public_name_is_there(name):
    assert getattr(casm_fast, name) is not None


def test_parts_need_no_import_of_their_own():
    parts = ["attribution", "data", "evaluation", "experiments", "models", "ops", "report"]
    program = f"import casm_fast; print([getattr(casm_fast, p).__name__ for p in {parts}])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == str([f"casm_fast.{part}" for part in parts]), run.stderr


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'casm_fast' has no attribute 'tarin'"):
        _ = casm_fast.tarin


def test_version_is_that_of_the_package():
    assert casm_fast.__version__ == version("casm_fast")


def test_import_is_light():
    program = f"import sys, casm_fast; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_works_without_tyro():
    """Only the command line needs it."""
    program = (
        "import sys; sys.modules['tyro'] = None\n"
        "import casm_fast; casm_fast.train, casm_fast.extract, casm_fast.evaluate, casm_fast.load"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("verb", ["doctor", "train"])
def test_missing_kernels_are_one_sentence(verb):
    program = (
        "import sys; sys.modules['casm_fast._C'] = None\n"
        f"sys.argv = ['casm-fast', '{verb}']\n"
        "from casm_fast.__main__ import main; raise SystemExit(main())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("casm_fast: expected the built kernels beside the package")
    assert "pip install -e ." in run.stderr
    assert "Traceback" not in run.stderr
