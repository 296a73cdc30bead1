"""Models for other programs: torch.export programs, AOTInductor packages, ONNX.

What is written takes images ``[B, 3, S, S]`` float32, RGB in [0, 1], squares of the model's input
size, in batches of any size; it normalises them itself. It gives

| output | what |
|---|---|
| saliency | ``[B, 1, h, w]`` in (0, 1) at the decoder's resolution |
| logits | ``[B, K]`` |
| boxes | ``[B, 4]`` int32 (x0, y0, x1, y1) half-open, in cells of the map; when asked for |
| area | ``[B]`` int32, kept cells; with the boxes |

Boxes need casm_fast's own operator, which torch knows after ``import casm_fast``; ONNX has no
connected components, so that its programs give no boxes. A JSON description lies in each file:
classes, input size, resize policy, and the fingerprint of the model.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import casm_fast
from casm_fast import ops
from casm_fast.models.checkpoint import describe, fingerprint, write_atomic
from casm_fast.models.modes import evaluating
from casm_fast.models.saliency import SaliencyModel

DESCRIPTION = "casm_fast.json"
"""Name of the description inside of a program; in ONNX it is metadata of the key "casm_fast"."""

OUTPUTS = ("saliency", "logits", "boxes", "area")


class Program(nn.Module):
    """What is exported: normalisation, the model and, when asked for, the boxes.

    Args:
        model: It is used, not copied.
        boxes: Whether to find boxes as `casm_fast.ops.mask_boxes` does by default: pixels above the
            mean, the largest component.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: SaliencyModel, boxes: bool = False) -> None:
        super().__init__()
        self.model = model
        self.boxes = boxes
        device = next(model.parameters()).device
        for name in ("mean", "std"):
            values = torch.tensor(getattr(model, name), device=device).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes the outputs.

        Args:
            images: ``[B, 3, S, S]`` in [0, 1].
        """
        saliency, logits = self.model((images - self.mean) / self.std)
        if not self.boxes:
            return saliency, logits
        return saliency, logits, *ops.mask_boxes(saliency)


def export_program(model: SaliencyModel, path: str | Path, *, boxes: bool = False) -> Path:
    """Write a torch.export program: ``torch.export.load(path).module()(images)``.

    Args:
        model: It is left as it was.
        path: A file that ends on .pt2.
        boxes: Whether the program gives boxes and areas, too.

    Returns:
        ``path``.

    Raises:
        ValueError: Another suffix.
    """
    path = _checked(path, ".pt2", "export_program")
    stream = io.BytesIO()
    with _exported(model, boxes) as program:
        torch.export.save(program, stream, extra_files={DESCRIPTION: _description(model, boxes)})
    write_atomic(path, stream.getvalue())
    return path


def compile_program(model: SaliencyModel, path: str | Path, *, boxes: bool = False) -> Path:
    """Compile the model ahead of time by AOTInductor, for the device that it is on.

    ``torch._inductor.aoti_load_package(path)(images)`` runs the result in Python,
    ``torch::inductor::AOTIModelPackageLoader`` in C++, which needs no Python. Compiling takes a
    minute or so and a C++ compiler; the result runs on machines of the same kind.

    Args:
        model: It is left as it was.
        path: A file that ends on .pt2.
        boxes: Whether the program gives boxes and areas, too.

    Returns:
        ``path``.

    Raises:
        ValueError: Another suffix.
    """
    import torch._inductor

    path = _checked(path, ".pt2", "compile_program")
    with tempfile.TemporaryDirectory() as folder, _exported(model, boxes) as program:
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=os.path.join(folder, "model.pt2")
        )
        content = Path(package).read_bytes()
    write_atomic(path, content)
    return path


def export_onnx(model: SaliencyModel, path: str | Path) -> Path:
    """Write an ONNX model with the input "images" and the outputs "saliency" and "logits".

    Args:
        model: It is left as it was.
        path: A file that ends on .onnx.

    Returns:
        ``path``.

    Raises:
        ImportError: ONNX is not installed (extra ``onnx``).
        ValueError: Another suffix.
    """
    path = _checked(path, ".onnx", "export_onnx")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"export_onnx: expected the package {missing[0]}, but it is not installed: "
            "pip install 'casm_fast[onnx]'"
        )
    with _exported(model, boxes=False) as program:
        made = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images"],
            output_names=list(OUTPUTS[:2]),
            verbose=False,
        )
    if made is None:
        raise TypeError("export_onnx: expected a program from torch.onnx.export, got none")
    made.model.metadata_props["casm_fast"] = _description(model, boxes=False)
    write_atomic(path, made.model_proto.SerializeToString())
    return path


@contextmanager
def _exported(model: SaliencyModel, boxes: bool) -> Iterator[torch.export.ExportedProgram]:
    """The traced program of a model, which is in eval mode meanwhile."""
    weight = next(model.parameters())
    # A batch of two: torch takes a dimension of one for a constant.
    side = model.input_size
    images = torch.zeros(2, 3, side, side, dtype=weight.dtype, device=weight.device)
    with evaluating(model), torch.no_grad():
        sizes = {"images": {0: torch.export.Dim("batch")}}
        yield torch.export.export(Program(model, boxes).eval(), (images,), dynamic_shapes=sizes)


def _checked(path: str | Path, suffix: str, what: str) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{what}: expected `path` to end on {suffix}, got {path}")
    return path


def _description(model: SaliencyModel, boxes: bool) -> str:
    content: dict[str, Any] = {
        "version": casm_fast.__version__,
        "fingerprint": fingerprint(model),
        "input": "RGB in [0, 1], float32 [B, 3, S, S]",
        "outputs": list(OUTPUTS if boxes else OUTPUTS[:2]),
        **describe(model),
    }
    return json.dumps(content)
