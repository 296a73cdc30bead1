"""The checkpoint format of the CASM authors' code, read and written.

Their files (``<name>.chk``) are pickles by ``torch.save`` with the keys ``epoch``,
``state_dict_classifier``, ``state_dict_decoder``, ``optimizer_classifier``,
``optimizer_decoder`` and ``args``, an `argparse.Namespace`. The code of Phang et al. (2020) calls
the decoder ``state_dict_masker``. They are opened by PyTorch's restricted unpickler, which knows
tensors, plain containers and the namespace, and refuses everything else without running it.
"""

from __future__ import annotations

import argparse
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from casm_fast.models.checkpoint import write_atomic
from casm_fast.models.decoder import PAPER_WIDTH, Decoder
from casm_fast.models.encoder import ResNetEncoder, build_encoder, without_data_parallel
from casm_fast.models.encoder import state_dict_problem as find_problem
from casm_fast.models.saliency import SaliencyModel

_DECODER_KEYS = ("state_dict_decoder", "state_dict_masker")

# (bottleneck, blocks per stage) of the ResNets that share the authors' layout.
_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def import_casme(path: str | Path) -> SaliencyModel:
    """Reads a checkpoint of the CASM authors' code, or one of Phang et al. in the same layout.

    DataParallel's ``module.`` is removed. Masker variants with other inputs (class embedding,
    target size) or another output (Gumbel) have no counterpart here and are refused.

    Args:
        path: the ``.chk`` file.

    Returns:
        The model in eval mode on the CPU; ``extra`` has the epoch and the arguments.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, contents that would run code, or another layout.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"import_casme: expected a checkpoint file, got {path}, which does not exist"
        )
    content = _read(path)
    decoder_key = next((key for key in _DECODER_KEYS if key in content), None)
    if decoder_key is None or "state_dict_classifier" not in content:
        raise ValueError(
            f"import_casme: expected the keys state_dict_classifier and state_dict_decoder (or "
            f"state_dict_masker), got {', '.join(map(str, content)) or 'none'} in {path}"
        )
    classifier_state = _tensors(content["state_dict_classifier"], path)
    decoder_state = {
        _own_name(key): value for key, value in _tensors(content[decoder_key], path).items()
    }
    name = _resnet_name(classifier_state)
    head = classifier_state.get("fc.weight")
    if name is None or head is None or head.ndim != 2:
        raise ValueError(
            f"import_casme: expected the classifier to be a ResNet-18, 34, 50, 101 or 152, got "
            f"another network in {path}"
        )
    with torch.random.fork_rng(devices=[]):
        classifier = build_encoder(name, classes=head.shape[0])
        decoder = Decoder(classifier.tap_channels, tap_indices=_tap_indices(decoder_state))
    for part, module, state in (
        ("classifier", classifier.backbone, classifier_state),
        ("decoder", decoder, decoder_state),
    ):
        problem = find_problem(module.state_dict(), state)
        if problem:
            raise ValueError(
                f"import_casme: expected the authors' {part} for {name}, got {problem} in {path}"
            )
        module.load_state_dict(state)
    arguments = content.get("args", {})
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    extra = {
        "imported": "casme",
        "epoch": content.get("epoch"),
        "args": {str(key): _as_json(value) for key, value in dict(arguments).items()},
    }
    return SaliencyModel(classifier, decoder, extra=extra).eval()


def export_casme(model: SaliencyModel, path: str | Path) -> Path:
    """Writes a checkpoint that the CASM authors' code loads.

    Their code knows ResNet-50 with 1,000 classes; other ResNets are written in the same layout, for
    readers that were adapted. The optimisers' states are empty. `save` remains the format to keep a
    model in: class names and geometry have no place here.

    Args:
        model: a shared ResNet-18 to 152 with the default decoder.
        path: the file; written atomically.

    Returns:
        The path.

    Raises:
        ValueError: a model without counterpart in that format.
    """
    path = Path(path)
    decoder = model.decoder
    standard = (
        model.shared
        and isinstance(model.classifier, ResNetEncoder)
        and _resnet_name(model.classifier.backbone.state_dict()) == model.classifier.name
        and decoder.width == PAPER_WIDTH
        and not decoder.tap0_projection
        and decoder.tap_indices == tuple(range(5))
    )
    if not standard:
        raise ValueError(
            f"export_casme: expected a shared ResNet-18 to 152 with the default decoder, got "
            f"{model.classifier.name or 'a network of the caller'} with {decoder.description()}, "
            f"{'shared' if model.shared else 'separate'} encoder; use save"
        )
    content = {
        "epoch": int(model.extra.get("epoch") or 0),
        "state_dict_classifier": _copies(model.classifier.backbone.state_dict()),
        "state_dict_decoder": {
            _authors_name(key): value for key, value in _copies(decoder.state_dict()).items()
        },
        "optimizer_classifier": {"state": {}, "param_groups": []},
        "optimizer_decoder": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(upsample="nearest", name=path.stem),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())
    return path


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"import_casme: expected tensors, plain values and an argparse.Namespace, got other "
            f"contents in {path}; nothing in it was run"
        ) from error
    except Exception as error:  # torch.load raises a dozen types for damaged and foreign files
        raise ValueError(
            f"import_casme: expected a file written by torch.save, got a damaged, truncated or "
            f"foreign one in {path}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"import_casme: expected a dictionary, got {type(content).__name__} in {path}"
        )
    return content


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"import_casme: expected the state dicts to hold tensors, got other contents in {path}"
        )
    return without_data_parallel(state)


def _resnet_name(state: Mapping[str, Tensor]) -> str | None:
    blocks = {tuple(key.split(".")[:2]) for key in state if key.startswith("layer")}
    one, two, three, four = (sum(stage == f"layer{i}" for stage, *_ in blocks) for i in range(1, 5))
    return _RESNETS.get(("layer1.0.conv3.weight" in state, (one, two, three, four)))


def _tap_indices(decoder_state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The taps that a decoder reads: those that it projects, and tap 0 if channels are left."""
    projected = {
        int(key.split(".")[1])
        for key in decoder_state
        if key.startswith("projections.") and key.split(".")[1].isdigit()
    }
    final = decoder_state.get("final.weight")
    channels = 0 if final is None or final.ndim != 4 else final.shape[1]
    reads_stem = not projected or channels > PAPER_WIDTH * len(projected)
    return tuple(sorted(({0} if reads_stem else set()) | (projected & set(range(5)))))


def _own_name(key: str) -> str:
    """``conv1x1_3.1.bias`` -> ``projections.3.1.bias``; ``final.0.bias`` -> ``final.bias``."""
    if key.startswith("conv1x1_"):
        return "projections." + key.removeprefix("conv1x1_")
    if key.startswith("final.0."):
        return "final." + key.removeprefix("final.0.")
    return key


def _authors_name(key: str) -> str:
    """The inverse of `_own_name`."""
    if key.startswith("projections."):
        return "conv1x1_" + key.removeprefix("projections.")
    return "final.0." + key.removeprefix("final.")


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in state.items()}


def _as_json(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
