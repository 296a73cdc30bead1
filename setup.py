"""Drives CMakeLists.txt, which describes the build; pyproject.toml describes the package."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_is_here() -> bool:
    """Whether the interpreter's own environment (not only the build's) has torch."""
    probe = [sys.executable, "-I", "-c", "import torch"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def tool(name: str) -> str:
    """The path of cmake or ninja: the wheel of the build environment before the one on PATH."""
    folder_of = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}
    if importlib.util.find_spec(name):
        program = Path(getattr(importlib.import_module(name), folder_of[name])) / name
        if program.exists():
            return str(program)
    return shutil.which(name) or name


def jobs() -> int:
    """MAX_JOBS, or as many compilers as cores and memory allow (nvcc takes up to 2 GiB)."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 4 << 30
    return max(1, min(os.cpu_count() or 1, free // (2 << 30)))


class CMakeBuild(build_ext):
    """Builds every library of the package by CMake and puts them beside the Python files."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        folder = ROOT / "build" / "cmake"
        default_archs = "native" if self.inplace else "release"
        configure = [
            tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCASM_FAST_VERSION={self.distribution.get_version()}",
            f"-DCASM_FAST_CUDA={os.environ.get('CASM_FAST_CUDA', 'auto')}",
            f"-DCASM_FAST_ARCHS={os.environ.get('CASM_FAST_ARCHS', default_archs)}",
            f"-DCUDA_HOME={os.environ.get('CUDA_HOME', '')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(folder), "-j", str(jobs())], check=True)
        install = [tool("cmake"), "--install", str(folder), "--prefix", str(package / "casm_fast")]
        subprocess.run(install, check=True)

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(p) for p in Path(self.build_lib).rglob("*.so")]


setup(
    ext_modules=[Extension("casm_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=[] if torch_is_here() else ["torch>=2.11"],
)
