"""Checkpoints: safetensors weights that carry a JSON description of the model in their header.

The file ends on .safetensors and any safetensors reader opens it. The header's metadata has one
key, ``casm_fast``, whose value is the JSON description: backbone, classes, decoder options, input
size, normalisation and a free part, ``extra``. Nothing in it is ever unpickled or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from casm_fast.models.decoder import Decoder
from casm_fast.models.encoder import Encoder, build_encoder, state_dict_problem
from casm_fast.models.saliency import SaliencyModel

# Raised by one whenever an older reader could not read, or would misread, the new files.
FORMAT_VERSION = 1
METADATA_KEY = "casm_fast"
FILE_NAME = "model.safetensors"


def save(model: SaliencyModel, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Writes a model to one file, atomically: a reader sees the old file or the new one.

    The weights of a shared encoder are stored once. Weights keep their dtype and are written from
    the CPU.

    Args:
        model: its encoders must come from `build_encoder`, so that `load` can make them again.
        path: a file whose name ends on .safetensors, or an existing folder, which gets
            ``model.safetensors``. Missing folders are made.
        extra: JSON values to keep beside the model; None keeps ``model.extra``.

    Returns:
        The path of the file.

    Raises:
        ValueError: the suffix is another one, or an encoder has no name.
        TypeError: ``extra`` holds something that JSON cannot.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE_NAME
    if path.suffix != ".safetensors":
        raise ValueError(f"save: expected `path` to end on .safetensors, got {path}")
    for encoder in _encoders(model):
        if not encoder.name:
            raise ValueError(
                f"save: expected encoders from build_encoder, which load can build again, got a "
                f"{type(encoder.backbone).__name__} of the caller's own; save its state dict "
                f"instead"
            )
    description = describe(model)
    description["extra"] = dict(model.extra if extra is None else extra)
    try:
        text = json.dumps(description)
    except TypeError as error:
        raise TypeError(
            f"save: expected `extra` of JSON values, got one that is not: {error}"
        ) from None
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    write_atomic(path, serialize(tensors, metadata={METADATA_KEY: text}))
    return path


def load(path: str | Path, *, device: str | torch.device = "cpu") -> SaliencyModel:
    """Reads a model that `save` wrote.

    The global random state is left as it was.

    Args:
        path: the file, or the folder of a training run that holds ``model.safetensors``.
        device: where the model goes.

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: no such file, or a folder without a model.
        ValueError: a damaged or foreign file, a newer format, or weights that do not fit the
            description.
    """
    file = _find(Path(path))
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load: expected a checkpoint in the safetensors format, got a damaged, truncated or "
            f"foreign file in {file} ({error}); a .chk file of the CASM authors is read by "
            f"import_casme"
        ) from error
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"load: expected a checkpoint of casm_fast, got a safetensors file of another origin "
            f"in {file}; the weights of a classifier alone are read by build_encoder(weights=…)"
        )
    try:
        description = json.loads(metadata[METADATA_KEY])
        version = int(description["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_description(file) from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"load: expected a checkpoint of format {FORMAT_VERSION} or older, got format "
            f"{version} in {file}; upgrade casm_fast"
        )
    try:
        classifier, encoder = description["classifier"], description["separate_encoder"]
        decoder = dict(description["decoder"])
        options = {
            key: description[key]
            for key in ("classes", "input_size", "resize_policy", "mean", "std", "extra")
        }
        # Building draws random weights, which are overwritten: no caller shall notice.
        with torch.random.fork_rng(devices=[]):
            model = SaliencyModel(
                _build(classifier, file),
                Decoder(decoder.pop("tap_channels"), **decoder),
                None if encoder is None else _build(encoder, file),
                **options,
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged_description(file) from error
    problem = state_dict_problem(model.state_dict(), tensors)
    if problem:
        raise ValueError(
            f"load: expected the weights of the {classifier['name']} model that the file "
            f"describes, got {problem} in {file}"
        )
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(tensors)
    return model.to(device).eval()


def describe(model: SaliencyModel) -> dict[str, Any]:
    """What a model is, apart from its weights and its `extra`, as JSON values."""
    separate = model.separate_encoder
    return {
        "format": FORMAT_VERSION,
        "classifier": model.classifier.description(),
        "separate_encoder": None if separate is None else separate.description(),
        "decoder": model.decoder.description(),
        "classes": list(model.classes),
        "input_size": model.input_size,
        "resize_policy": model.resize_policy,
        "mean": list(model.mean),
        "std": list(model.std),
    }


def fingerprint(model: SaliencyModel) -> str:
    """SHA-256 of a model's description and weights, for the provenance of results.

    It does not depend on the device, on the path, on ``extra`` or on the train/eval mode. It
    copies the weights to the host.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(describe(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a crash at any moment leaves the old content or the new one.

    The content goes to a new file in the same folder, is flushed to the disk, takes the name, and
    the folder is flushed too. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _encoders(model: SaliencyModel) -> list[Encoder]:
    separate = model.separate_encoder
    return [model.classifier] if separate is None else [model.classifier, separate]


def _find(path: Path) -> Path:
    if path.is_dir():
        if not (path / FILE_NAME).is_file():
            raise FileNotFoundError(
                f"load: expected the folder of a training run with {FILE_NAME}, got {path}, which "
                f"has none"
            )
        return path / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"load: expected a checkpoint file or the folder of a training run, got {path}, which "
            f"does not exist"
        )
    return path


def _build(description: Mapping[str, Any], file: Path) -> Encoder:
    encoder = build_encoder(
        description["name"],
        classes=description["classes"],
        finest_stride=description["finest_stride"],
    )
    if description["transform_input"]:
        encoder.backbone.transform_input = True  # type: ignore[assignment]
    if list(encoder.tap_channels) != description["tap_channels"]:
        raise ValueError(
            f"load: expected taps of {description['tap_channels']} channels in "
            f"{description['name']}, got {list(encoder.tap_channels)} from the installed library "
            f"for {file}; install the version of it that the model was trained with"
        )
    return encoder


def _damaged_description(file: Path) -> ValueError:
    return ValueError(
        f"load: expected a complete description of a model in the header, got a damaged one in "
        f"{file}"
    )
