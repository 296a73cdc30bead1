"""Finds the activations of any classifier that the mask decoder reads, and records them.

The paper's decoder reads "all hidden layers of the encoder which are directly followed by a
downscaling operation" (CASM, supplement, "Classifier f and mapping m"). For a network of which
nothing is known they are found by running it once on a blank image and watching its modules:

1. Every call of a module is noted, as a tree, with the shapes that went in and came out.
2. The *trunk* is cut out of the tree: a `Sequential` and any module that hides a level (it lowers
   the resolution more than twofold, or returns something else than a feature map) is opened;
   every other module is taken as a whole. A residual block is thus one step of the trunk, and its
   inner activations and its shortcut are none. The trunk ends before the layer that gives the
   logits, also where that is a convolution.
3. Per octave of stride, from the finest one wanted on, the last feature map of the trunk is a tap.

On torchvision's ResNets this gives layer1 to layer4, the paper's own choice. Modules are watched
through forward hooks, not through a symbolic trace, because hooks see every network that runs:
also one whose control flow no tracer can follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# The paper's decoder works at a quarter of the input's side (56 of 224).
PAPER_FINEST_STRIDE = 4

# The second probe: not square, other sides than any usual input, divisible by 32.
_SECOND_PROBE = (160, 192)

_FIXED_SIZE_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Tap:
    """Where one activation is found.

    Attributes:
        module: qualified name of the module whose output it is.
        call: which call of that module within one forward pass, from 0.
        channels: number of channels.
        stride: input side divided by the activation's side, as a power of two.
        channels_last: whether the module's output is ``[B, h, w, C]`` instead of ``[B, C, h, w]``.
    """

    module: str
    call: int
    channels: int
    stride: int
    channels_last: bool


class TapRecorder:
    """Keeps the outputs of the tapped modules during one forward pass of their network.

    The hooks stay registered for the life of the network and do nothing outside
    `start` … `finish`. They are plain objects without closures, so a deep copy of the network
    together with its recorder is independent of the original.

    Args:
        backbone: the network.
        taps: what to record, as `discover_taps` returned it.
    """

    def __init__(self, backbone: nn.Module, taps: Sequence[Tap]) -> None:
        self.taps = tuple(taps)
        self.recording = False
        self.calls: dict[str, int] = {}
        self.maps: dict[tuple[str, int], Tensor] = {}
        for name in dict.fromkeys(tap.module for tap in taps):
            backbone.get_submodule(name).register_forward_hook(_RecordingHook(self, name))

    def start(self) -> None:
        """Begins a forward pass."""
        self.calls = {}
        self.maps = {}
        self.recording = True

    def finish(self) -> tuple[Tensor, ...]:
        """Ends the forward pass and returns the taps ``[B, C, h, w]``, coarse last."""
        self.recording = False
        found = self.maps
        self.maps = {}  # the next pass must not keep this one's activations alive
        ordered = []
        for tap in self.taps:
            activation = found[(tap.module, tap.call)]
            ordered.append(activation.permute(0, 3, 1, 2) if tap.channels_last else activation)
        return tuple(ordered)

    def cancel(self) -> None:
        """Drops what an interrupted forward pass left behind."""
        self.recording = False
        self.maps = {}


class _RecordingHook:
    """A forward hook that hands the output of one module to the recorder."""

    def __init__(self, recorder: TapRecorder, name: str) -> None:
        self.recorder = recorder
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        recorder = self.recorder
        if recorder.recording:
            call = recorder.calls.get(self.name, 0)
            recorder.calls[self.name] = call + 1
            recorder.maps[(self.name, call)] = output


@dataclass(frozen=True)
class Survey:
    """What running a classifier on a blank image tells about it.

    Attributes:
        taps: the activations for the mask decoder, in order of rising stride.
        classes: number of logits.
    """

    taps: tuple[Tap, ...]
    classes: int


def discover_taps(
    backbone: nn.Module,
    input_size: int = 224,
    *,
    finest_stride: int = PAPER_FINEST_STRIDE,
    name: str = "this network",
) -> tuple[Tap, ...]:
    """Finds the last feature map of every octave of resolution in a classifier.

    The network runs twice in eval mode on blank images, at ``input_size`` and, where it accepts
    that, at another size: what does not change with the image is no spatial axis. Its mode, its
    weights and its statistics are left as they were.

    Args:
        backbone: the classifier, ``[B, 3, H, W]`` -> logits.
        input_size: side of a square image that the network accepts, in pixels.
        finest_stride: taps of a smaller stride are left out. The default, 4, is the paper's
            (56x56 for 224x224); 2 gives small images a finer saliency.
        name: what errors call the network.

    Returns:
        The taps in order of rising stride, two at least.

    Raises:
        ValueError: the network does not run at ``input_size``, gives no logits ``[B, K]``, or has
            fewer than two feature maps of different resolutions (a plain vision transformer).
    """
    return survey(backbone, input_size, finest_stride=finest_stride, name=name).taps


def survey(backbone: nn.Module, input_size: int, *, finest_stride: int, name: str) -> Survey:
    """Finds taps and the number of classes; see `discover_taps`."""
    root = _watch(backbone, (input_size, input_size), name)
    second = _watch_if_accepted(backbone, _SECOND_PROBE, name)
    if second is None or not _same_calls(root, second):
        second = None
    _describe_maps(root, second, backbone)
    if root.output_shape is None or len(root.output_shape) != 2:
        raise ValueError(
            f"discover_taps: expected {name} to give logits [B, K], got an output of shape "
            f"{None if root.output_shape is None else list(root.output_shape)}"
        )

    by_octave: dict[int, Tap] = {}
    finest_octave = round(math.log2(finest_stride))
    head = logits_layer(backbone, [call.module for call in _leaves(root)])
    for call in _trunk(root, backbone):
        if call.module == head:
            break
        assert call.map is not None
        octave = round(math.log2(input_size / call.map.side))
        if octave >= finest_octave:
            by_octave[octave] = Tap(
                module=call.module,
                call=call.index,
                channels=call.map.channels,
                stride=2**octave,
                channels_last=call.map.channels_last,
            )
    if len(by_octave) < 2:
        raise ValueError(
            f"discover_taps: expected a network with feature maps of two resolutions or more at "
            f"stride {finest_stride} and above, got {len(by_octave)} in {name}; choose a "
            f"convolutional or hierarchical network such as resnet50, convnext_tiny or swin_t"
        )
    return Survey(
        taps=tuple(by_octave[octave] for octave in sorted(by_octave)),
        classes=root.output_shape[1],
    )


def logits_of(output: Any) -> Any:
    """The logits in a network's output: itself, or the main head's beside auxiliary ones."""
    return output.logits if hasattr(output, "logits") else output


@dataclass(frozen=True)
class _Map:
    """The geometry of a feature map."""

    side: int  # height at the first probe, whose image is square
    channels: int
    channels_last: bool


@dataclass
class _Call:
    """One call of a module: a node of the tree that a probe records."""

    module: str
    index: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None = None
    children: list[_Call] = field(default_factory=list)
    input_map: _Map | None = None
    map: _Map | None = None


def _watch(backbone: nn.Module, size: tuple[int, int], name: str) -> _Call:
    """Runs the network on one blank image in eval mode and returns the tree of its calls."""
    parameter = next(backbone.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    root = _Call(module="", index=0, input_shape=None)
    stack = [root]
    counts: dict[str, int] = {}

    def enter(module_name: str, args: tuple[Any, ...]) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        index = counts.get(module_name, 0)
        counts[module_name] = index + 1
        call = _Call(module_name, index, tuple(tensors[0].shape) if tensors else None)
        stack[-1].children.append(call)
        stack.append(call)

    def leave(output: Any) -> None:
        call = stack.pop()
        if isinstance(output, Tensor):
            call.output_shape = tuple(output.shape)

    handles = []
    modes = {module: module.training for module in backbone.modules()}
    for module_name, module in backbone.named_modules():
        if module_name:
            handles.append(
                module.register_forward_pre_hook(lambda _, args, n=module_name: enter(n, args))
            )
            handles.append(module.register_forward_hook(lambda _, __, output: leave(output)))
    try:
        backbone.eval()
        with torch.no_grad():
            logits = logits_of(backbone(torch.zeros(1, 3, *size, device=device, dtype=dtype)))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        raise ValueError(
            f"discover_taps: expected {name} to classify images of {size[0]}x{size[1]}, "
            f"got {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    root.output_shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    return root


def _watch_if_accepted(backbone: nn.Module, size: tuple[int, int], name: str) -> _Call | None:
    """The second probe; None for a network of one fixed input size."""
    try:
        return _watch(backbone, size, name)
    except ValueError:
        return None


def _same_calls(a: _Call, b: _Call) -> bool:
    return (
        (a.module, a.index, len(a.children)) == (b.module, b.index, len(b.children))
        and (a.output_shape is None) == (b.output_shape is None)
        and all(_same_calls(x, y) for x, y in zip(a.children, b.children, strict=True))
    )


def _describe_maps(call: _Call, second: _Call | None, backbone: nn.Module) -> None:
    """Fills in `map` and `input_map` over the whole tree."""
    for position, child in enumerate(call.children):
        other = None if second is None else second.children[position]
        fixed = isinstance(backbone.get_submodule(child.module), _FIXED_SIZE_MODULES)
        child.input_map = _as_map(child.input_shape, other.input_shape if other else None)
        if not fixed:
            child.map = _as_map(child.output_shape, other.output_shape if other else None)
        _describe_maps(child, other, backbone)


def _as_map(shape: tuple[int, ...] | None, other: tuple[int, ...] | None) -> _Map | None:
    """Reads a shape as a feature map; None where it is none (or is as small as 1x1)."""
    if shape is None or len(shape) != 4 or shape[0] != 1:
        return None
    if other is not None:
        if len(other) != 4:
            return None
        spatial = [axis for axis in (1, 2, 3) if shape[axis] != other[axis]]
    else:
        spatial = next((axes for axes in ([2, 3], [1, 2]) if shape[axes[0]] == shape[axes[1]]), [])
    if spatial not in ([2, 3], [1, 2]) or shape[2] <= 1:
        return None
    channels_last = spatial == [1, 2]
    return _Map(shape[2], shape[3] if channels_last else shape[1], channels_last)


def _trunk(call: _Call, backbone: nn.Module) -> Iterator[_Call]:
    """The calls that make up the trunk below `call`, in order of completion, all with a map."""
    for child in call.children:
        if child.children and _hides_levels(child, backbone):
            yield from _trunk(child, backbone)
        if child.map is not None:
            yield child


def logits_layer(backbone: nn.Module, names: Iterable[str] | None = None) -> str:
    """Name of the last linear or convolutional layer: the one that gives the logits.

    Args:
        backbone: a classifier.
        names: its modules in order of execution; in order of registration when absent.
    """
    ordered = [name for name, _ in backbone.named_modules()] if names is None else list(names)
    layers = [n for n in ordered if isinstance(backbone.get_submodule(n), (nn.Linear, nn.Conv2d))]
    return layers[-1] if layers else ""


def _leaves(call: _Call) -> Iterator[_Call]:
    if not call.children:
        yield call
    for child in call.children:
        yield from _leaves(child)


def _hides_levels(call: _Call, backbone: nn.Module) -> bool:
    if call.map is None or call.input_map is None:
        return True
    if isinstance(backbone.get_submodule(call.module), nn.Sequential):
        return True
    # 2.5 lies between a twofold step with its rounding (12 -> 5 is 2.4) and a fourfold one.
    return call.input_map.side / call.map.side > 2.5
