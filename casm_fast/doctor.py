"""What ``casm-fast doctor`` finds: versions, kernels, GPUs, packages, and what to do about each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import casm_fast

State = Literal["ok", "note", "problem"]

OPTIONAL = {
    "cv2": ("opencv-python-headless", "inpainted pictures in reports", "casm_fast[inpaint]"),
    "torchcodec": ("torchcodec", "faster decoding of JPEG files", "casm_fast[fast-io]"),
    "pycocotools": ("pycocotools", "masks of COCO", "casm_fast[eval]"),
    "ray": ("ray", "extraction on a cluster", "casm_fast[dist]"),
    "timm": ("timm", "timm's backbones", "casm_fast[timm]"),
    "tensorboard": ("tensorboard", "TensorBoard logs of training runs", "casm_fast[track]"),
    "tyro": ("tyro", "the verbs of this command line", "tyro"),
}
"""Importable name -> distribution, what it is for, what to install."""

REQUIRED = (
    "torchvision",
    "numpy",
    "pillow",
    "pyarrow",
    "safetensors",
    "tqdm",
    "matplotlib",
    "jinja2",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        state: Fine, worth knowing, or in the way.
        text: What was found.
        advice: What to do; empty when nothing needs doing.
    """

    name: str
    state: State
    text: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything that casm_fast depends on.

    Returns:
        The findings, in the order in which one would look.
    """
    findings = []
    for look in (_system, _torch, _kernels, _self_test, _gpu, _packages, _optional, _decoder):
        findings += _guarded(look)
    return findings


def render(findings: list[Finding]) -> str:
    """Findings as text for a terminal."""
    width = max(len(finding.name) for finding in findings)
    marks = {"ok": "ok  ", "note": "note", "problem": "FAIL"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]}  {finding.name:<{width}}  {finding.text}")
        if finding.advice:
            lines.append(f"{'':<{width + 8}}-> {finding.advice}")
    problems = sum(finding.state == "problem" for finding in findings)
    lines += ["", f"{problems} to repair" if problems else "everything that is needed works"]
    return "\n".join(lines)


def _guarded(look: Callable[[], list[Finding]]) -> list[Finding]:
    """One look whose failure is a finding, so that the others still take place."""
    try:
        return look()
    except Exception as error:  # a doctor reports whatever is broken
        name = look.__name__.strip("_").replace("_", " ")
        return [Finding(name, "problem", f"{type(error).__name__}: {error}")]


def _system() -> list[Finding]:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("casm_fast", "ok", casm_fast.__version__),
        Finding("python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Finding("machine", "ok", f"{platform.system()} {platform.machine()}, {threads} CPUs"),
    ]


def _torch() -> list[Finding]:
    import torch

    threads = torch.get_num_threads()
    return [Finding("torch", "ok", f"{torch.__version__}, {threads} threads")]


def _kernels() -> list[Finding]:
    from casm_fast.ops import library

    status = library.status()
    sets = status.build.get("instruction_sets", [])
    built = f" of {', '.join(sets)}" if isinstance(sets, list) and sets else ""
    compiler = status.build.get("compiler", "an unknown compiler")
    findings = [
        Finding("cpu kernels", "ok", f"{status.instruction_set}{built}, built with {compiler}")
    ]
    if status.cuda:
        findings.append(Finding("cuda kernels", "ok", f"loaded ({status.cuda_reason})"))
    else:
        findings.append(Finding("cuda kernels", "note", status.cuda_reason))
    return findings


def _self_test() -> list[Finding]:
    import torch

    from casm_fast import ops

    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1
    found = float(ops.tv_norm(step, 1.0))
    if found != 4:
        return [
            Finding(
                "self-test",
                "problem",
                f"the total variation of a step of height 4 is 4, the kernel says {found}",
                "build again: pip install --force-reinstall --no-deps -e .",
            )
        ]
    return [Finding("self-test", "ok", "a kernel ran and gave the right number")]


def _gpu() -> list[Finding]:
    import torch

    from casm_fast.ops import library

    if not torch.cuda.is_available():
        if torch.version.cuda is not None or not Path("/dev/nvidia0").exists():
            return [Finding("gpu", "note", "none is visible: everything runs on the CPU")]
        return [
            Finding(
                "gpu",
                "problem",
                "there is one, but this torch is a build for CPUs",
                "install torch with CUDA (see pytorch.org), then build again: pip install -e .",
            )
        ]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        text = f"{properties.name}, {memory:.0f} GiB, capability {capability}"
        findings.append(Finding(f"gpu {index}", "ok", text))
    if not library.status().cuda:
        findings.append(
            Finding(
                "gpu kernels",
                "problem",
                "there is a GPU, but the CUDA kernels are not loaded",
                f"install a CUDA {torch.version.cuda} toolkit and build again: "
                "CASM_FAST_CUDA=on pip install -e .",
            )
        )
    return findings


def _packages() -> list[Finding]:
    versions, missing = [], []
    for name in REQUIRED:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    findings = [Finding("packages", "ok", ", ".join(versions))]
    if missing:
        names = " ".join(missing)
        findings.append(Finding("packages", "problem", f"missing: {names}", f"pip install {names}"))
    return findings


def _optional() -> list[Finding]:
    findings = []
    for module, (distribution, purpose, extra) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            advice = f"pip install '{extra}'"
            findings.append(Finding(distribution, "note", f"absent: no {purpose}", advice))
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:  # another distribution of the same module
            version = "present"
        findings.append(Finding(distribution, "ok", f"{version}, for {purpose}"))
    return findings


def _decoder() -> list[Finding]:
    from casm_fast.data.decoders import describe_decoder, why_not_torchcodec

    pillow, reason = describe_decoder("pillow"), why_not_torchcodec()
    if not reason:
        text = f"{describe_decoder('auto')}, with the pixels of {pillow}"
        return [Finding("jpeg decoder", "ok", text)]
    return [Finding("jpeg decoder", "ok", f"{pillow}, because {reason}")]
