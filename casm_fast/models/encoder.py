"""Classifiers whose intermediate activations ("taps") are handed out beside the logits."""

from __future__ import annotations

import abc
import difflib
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import ResNet

from casm_fast.models.compact import BLOCKS, CompactResNet
from casm_fast.models.stem import stem_convolution
from casm_fast.models.taps import PAPER_FINEST_STRIDE, TapRecorder, logits_layer, logits_of, survey

logger = logging.getLogger(__name__)

COMPACT = tuple(BLOCKS)
TIMM_PREFIX = "timm/"

# The weights of the paper: torchvision's first ImageNet release (76.1 % top-1 for ResNet-50).
PAPER_WEIGHTS = "IMAGENET1K_V1"

# Networks with auxiliary heads, which CASM has no use for, and whose published weights expect
# images that the network itself renormalises (`transform_input`).
_INCEPTIONS = ("googlenet", "inception_v3")
_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")


class Encoder(nn.Module, abc.ABC):
    """A classifier that returns its logits and the taps for the mask decoder from one forward pass.

    Use `build_encoder` for a network by name and `TracedEncoder` for a network of your own.

    Attributes:
        backbone: the network itself; its state dict has the names of the library it comes from.
        name: what `build_encoder` made it from; empty for a network of the caller's.
        classes: number of logits.
        tap_channels: channels of every tap, coarse last.
        tap_strides: input side divided by the tap's side, rounded to a power of two.
        has_stem_tap: whether tap 0 is the stem of a ResNet, which the decoder reads raw.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        classes: int,
        tap_channels: tuple[int, ...],
        tap_strides: tuple[int, ...],
        has_stem_tap: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.name = name
        self.classes = classes
        self.tap_channels = tap_channels
        self.tap_strides = tap_strides
        self.has_stem_tap = has_stem_tap

    @abc.abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Classifies images and hands out the taps.

        Args:
            images: ``[B, 3, H, W]``, normalised, of any size that the backbone accepts.

        Returns:
            Logits ``[B, K]`` and the taps, each ``[B, C_i, h_i, w_i]``, coarse last. Both carry
            gradients.
        """

    def description(self) -> dict[str, Any]:
        """What `build_encoder` needs to make this encoder again, as JSON values."""
        return {
            "name": self.name,
            "classes": self.classes,
            "tap_channels": list(self.tap_channels),
            "finest_stride": min(self.tap_strides),
            "transform_input": bool(getattr(self.backbone, "transform_input", False)),
        }

    def extra_repr(self) -> str:
        """Name, classes and tap geometry for ``print(encoder)``."""
        taps = ", ".join(
            f"{c} at 1/{s}" for c, s in zip(self.tap_channels, self.tap_strides, strict=True)
        )
        return f"name={self.name!r}, classes={self.classes}, taps=({taps})"


class ResNetEncoder(Encoder):
    """A ResNet with exactly the paper's taps: the stem's output and layer1 to layer4.

    For ResNet-50 and 224x224 images: 64 at 56x56, 256 at 56x56, 512 at 28x28, 1024 at 14x14 and
    2048 at 7x7 (CASM, supplement, and the authors' code).

    Args:
        backbone: a torchvision ResNet (ResNeXt, Wide ResNet) or a `CompactResNet`.
        name: what `build_encoder` made it from.

    Attributes:
        by_blocks: take the first convolution by `stem_convolution`, whose gradient for images is
            cheap on a CPU; the outputs are the same up to rounding.
    """

    backbone: ResNet | CompactResNet
    by_blocks: bool = False

    def __init__(self, backbone: ResNet | CompactResNet, *, name: str = "") -> None:
        channels = [backbone.conv1.out_channels]
        for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            block: Any = stage[-1]
            channels.append((block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels)
        stem_stride = 2 if isinstance(backbone.maxpool, nn.Identity) else 4
        super().__init__(
            backbone,
            name=name,
            classes=backbone.fc.out_features,
            tap_channels=tuple(channels),
            tap_strides=tuple(stem_stride * factor for factor in (1, 1, 2, 4, 8)),
            has_stem_tap=True,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Encoder.forward`."""
        _check_images(images)
        net = self.backbone
        first = stem_convolution(net.conv1, images) if self.by_blocks else net.conv1(images)
        stem = net.maxpool(net.relu(net.bn1(first)))  # [B, 64, H/4, W/4]
        layer1 = net.layer1(stem)
        layer2 = net.layer2(layer1)
        layer3 = net.layer3(layer2)
        layer4 = net.layer4(layer3)  # [B, 2048, H/32, W/32]
        logits: Tensor = net.fc(net.avgpool(layer4).flatten(1))
        return logits, (stem, layer1, layer2, layer3, layer4)


class TracedEncoder(Encoder):
    """Any classifier, with the taps that `discover_taps` finds in it.

    The network runs once per forward pass; hooks that are active only meanwhile record the taps.
    One encoder must not be run by two threads at the same time.

    Args:
        backbone: the classifier, ``[B, 3, H, W]`` -> logits ``[B, K]`` (or, as torchvision's
            Inception networks in train mode, a named tuple with ``logits``: auxiliary heads are
            ignored).
        name: what `build_encoder` made it from.
        input_size: side of a square image that the network accepts, in pixels.
        finest_stride: see `discover_taps`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str = "",
        input_size: int = 224,
        finest_stride: int = PAPER_FINEST_STRIDE,
    ) -> None:
        found = survey(
            backbone,
            input_size,
            finest_stride=finest_stride,
            name=name or type(backbone).__name__,
        )
        super().__init__(
            backbone,
            name=name,
            classes=found.classes,
            tap_channels=tuple(tap.channels for tap in found.taps),
            tap_strides=tuple(tap.stride for tap in found.taps),
            has_stem_tap=False,
        )
        self.recorder = TapRecorder(backbone, found.taps)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Encoder.forward`."""
        _check_images(images)
        self.recorder.start()
        logits: Tensor = logits_of(self.backbone(images))
        return logits, self.recorder.finish()


def build_encoder(
    name: str = "resnet50",
    *,
    classes: int = 1000,
    weights: str | Path | None = None,
    finest_stride: int = PAPER_FINEST_STRIDE,
) -> Encoder:
    """Builds a classifier with taps from the name of its architecture.

    Args:
        name: ``"resnet18"`` … ``"resnet152"`` (and torchvision's ResNeXt and Wide ResNet): the
            taps of the paper. ``"compact"``: a quarter-width ResNet-18 for 64x64 images;
            ``"compact10"`` and ``"compact34"``: shallower and deeper ones. Any other
            classifier of torchvision, and ``"timm/<name>"`` for one of timm: the taps are found
            by `discover_taps`.
        classes: number of logits.
        weights: None for a random initialisation; ``"imagenet"`` for torchvision's IMAGENET1K_V1
            (the paper's) or timm's default; another name of torchvision's weights of this network,
            e.g. ``"IMAGENET1K_V2"``; or the path of a file (see `read_state_dict`). A head for
            another number of classes is left at its random initialisation, with a warning in the
            log.
        finest_stride: smallest stride of the taps that are looked for; the ResNets have fixed ones.

    Returns:
        The encoder, in train mode.

    Raises:
        ValueError: unknown name, no suitable taps, or weights of another architecture.
        FileNotFoundError: the weights are neither a known name nor a file.
        ModuleNotFoundError: a timm name without timm.
    """
    if classes < 1:
        raise ValueError(f"build_encoder: expected `classes` of at least 1, got {classes}")
    if finest_stride < 1 or finest_stride & (finest_stride - 1):
        raise ValueError(
            f"build_encoder: expected `finest_stride` to be a power of two, got {finest_stride}"
        )
    backbone, input_size = _build_backbone(name, classes)
    if weights is not None:
        _load_weights(backbone, name, weights)
    if isinstance(backbone, (ResNet, CompactResNet)):
        return ResNetEncoder(backbone, name=name)
    return TracedEncoder(backbone, name=name, input_size=input_size, finest_stride=finest_stride)


def _build_backbone(name: str, classes: int) -> tuple[nn.Module, int]:
    """The network and the side of the images that it was made for."""
    if name in COMPACT:
        return CompactResNet(classes, BLOCKS[name]), 64
    if name.startswith(TIMM_PREFIX):
        backbone = _create_timm(name, pretrained=False, num_classes=classes)
        return backbone, int(backbone.pretrained_cfg["input_size"][-1])
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, [*COMPACT, *known], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "resnet50 is the paper's"
        raise ValueError(
            f"build_encoder: expected `name` to be 'compact', a classifier of torchvision or "
            f"'timm/<name>', got '{name}': {hint}"
        )
    options: dict[str, Any] = {}
    if name in _INCEPTIONS:
        options = {"aux_logits": False, "init_weights": True}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **options), 224


def _create_timm(name: str, **options: Any) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"build_encoder: expected timm for '{name}', got an environment without it; "
            f"pip install timm"
        ) from error
    try:
        return timm.create_model(name.removeprefix(TIMM_PREFIX), **options)
    except RuntimeError as error:
        raise ValueError(
            f"build_encoder: expected `name` to be a network of timm {timm.__version__}, "
            f"got '{name}': {error}"
        ) from error


def _load_weights(backbone: nn.Module, name: str, weights: str | Path) -> None:
    state = _read_library_weights(name, weights) if isinstance(weights, str) else None
    if state is None:
        state = read_state_dict(Path(weights))
    if name in _INCEPTIONS:
        # As torchvision's builders: its published weights of these two networks expect it.
        backbone.transform_input = True  # type: ignore[assignment]
    expected = backbone.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if key in expected or not key.startswith(_AUXILIARY_HEADS)
    }
    head = logits_layer(backbone)
    for key in (f"{head}.weight", f"{head}.bias"):
        if key not in state or key not in expected or state[key].shape == expected[key].shape:
            continue
        logger.warning(
            "%s: %s has %s entries in the weights and %s here; it keeps its random initialisation",
            name,
            key,
            len(state[key]),
            len(expected[key]),
        )
        state[key] = expected[key]
    problem = state_dict_problem(expected, state)
    if problem:
        raise ValueError(
            f"build_encoder: expected weights of {name}, got {problem} in {weights}; "
            f"choose the network that they were saved from"
        )
    backbone.load_state_dict(state)


def _read_library_weights(name: str, weights: str) -> dict[str, Tensor] | None:
    """The state dict of weights that the library knows by name; None when it knows none such."""
    if name in COMPACT:
        return None
    if name.startswith(TIMM_PREFIX):
        if weights != "imagenet":
            return None
        source: Any = None
    else:
        members = torchvision.models.get_model_weights(name).__members__
        label = PAPER_WEIGHTS if weights == "imagenet" else weights
        if label not in members:
            if weights == "imagenet":
                raise ValueError(
                    f"build_encoder: expected {PAPER_WEIGHTS} weights for '{name}', got "
                    f"{', '.join(members) or 'none'} from torchvision; name one of those"
                )
            return None
        source = members[label]
    try:
        if source is None:
            network = _create_timm(name, pretrained=True)
        else:
            network = torchvision.models.get_model(name, weights=source, progress=False)
    except OSError as error:
        raise FileNotFoundError(
            f"build_encoder: expected the weights '{weights}' of {name} in the cache or from the "
            f"network, got {type(error).__name__}: {error}; download them elsewhere and pass the "
            f"path of the file"
        ) from error
    state: dict[str, Tensor] = network.state_dict()
    return state


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a classifier from a file, without running any code in it.

    Understood are a plain state dict, the checkpoints of PyTorch's ImageNet example
    (``{"state_dict": …}``, with DataParallel's ``module.``), and casm_fast's own (its classifier).

    Args:
        path: ``.safetensors``, or anything that ``torch.save`` wrote.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"build_encoder: expected `weights` to be 'imagenet', a name of torchvision's weights "
            f"or the path of a file, got '{path}', which does not exist"
        )
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise a dozen types for damaged files
        reason = (
            "contents other than tensors, which were not run"
            if isinstance(error, pickle.UnpicklingError)
            else "a damaged or foreign file"
        )
        raise ValueError(
            f"build_encoder: expected `weights` to be a state dict, got {reason} in {path}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(
            f"build_encoder: expected `weights` to be a state dict, got {type(loaded).__name__} "
            f"with other contents in {path}"
        )
    own = "classifier.backbone."
    if any(key.startswith(own) for key in loaded):
        return {k.removeprefix(own): v for k, v in loaded.items() if k.startswith(own)}
    return without_data_parallel(loaded)


def without_data_parallel(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefix ``module.`` that DataParallel puts before every name."""
    return {key.removeprefix("module."): value for key, value in state.items()}


def state_dict_problem(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """Tells in words how two state dicts differ in names and shapes; empty when they agree.

    Batch norm's step counters may be absent: checkpoints from before PyTorch 0.4.1 have none.
    """
    missing = [k for k in expected if k not in got and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in got if k not in expected]
    reshaped = [k for k in expected if k in got and expected[k].shape != got[k].shape]
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors missing (first: {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unknown (first: {unexpected[0]})")
    if reshaped:
        key = reshaped[0]
        parts.append(
            f"{len(reshaped)} of another shape (first: {key}, {list(got[key].shape)} instead of "
            f"{list(expected[key].shape)})"
        )
    return " and ".join(parts)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"Encoder: expected `images` of shape [B, 3, H, W], got {list(images.shape)}"
        )
