"""Real-time saliency: a network that was trained to mask the evidence of a class in one pass.

Dabkowski & Gal, "Real time image saliency for black box classifiers" (NeurIPS 2017), and the
authors' code. The encoder is a frozen classifier with taps. A selector, one embedding e_k for each
class, gates its coarsest tap, so that only places that look like the class go on::

    a[y, x] = sum_c e_k[c] tap[c, y, x],   gated = tap * sigmoid(a - confidence)

A U-Net goes from there to a quarter of the image's side. Each of its steps enlarges by a sub-pixel
convolution, takes the tap of that resolution beside it, and ends in a residual bottleneck. Of the
last two channels p and q the mask is |p| / (|p| + |q|), enlarged bilinearly to the image. The mean
of a over the places is the logit of "this class is in the image".

`casm_fast.attribution.realtime_training` trains it; the selector before the rest. A trained model
is asked by its classes; the classifier is not asked. Of several classes each pixel takes the
highest mask::

    model = train_real_time(classifier, "imagenet:/data/ILSVRC").checkpoint
    casm_fast.attribute("real_time", classifier, images, targets, model=model)
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from casm_fast.attribution.problem import Method, Problem
from casm_fast.attribution.trained import Opened, asked
from casm_fast.models.checkpoint import write_atomic
from casm_fast.models.encoder import Encoder, build_encoder, state_dict_problem

FORMAT = 1
METADATA_KEY = "casm_fast_real_time"
FILE_NAME = "real_time.safetensors"

FINEST_STRIDE = 4
"""The mask has a quarter of the image's side."""
WIDTH = 64
"""Channels at that resolution; twice as many at each coarser one."""
CONFIDENCE = 6.0
"""What the authors subtract from the selector's answer when they ask the trained network."""


class Selector(nn.Module):
    """Which places look like a class.

    Args:
        classes: K.
        channels: Of the tap that is gated.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, channels)
        nn.init.normal_(self.embedding.weight, std=channels**-0.5)

    def forward(self, tap: Tensor, classes: Tensor) -> Tensor:
        """Tap ``[B, C, h, w]`` and classes ``[B]`` -> how each place looks, ``[B, 1, h, w]``."""
        return torch.einsum("bchw,bc->bhw", tap, self.embedding(classes))[:, None]


class Step(nn.Module):
    """Twice the resolution, with the tap that has it.

    Args:
        channels: That come from below.
        tap_channels: Of the tap.
        width: Channels that go on.
    """

    def __init__(self, channels: int, tap_channels: int, width: int) -> None:
        super().__init__()
        self.enlarge = nn.Sequential(
            nn.Conv2d(channels, 4 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(inplace=True),
            nn.PixelShuffle(2),
        )
        joined, narrow = width + tap_channels, max(1, width // 4)
        self.bottleneck = nn.Sequential(
            nn.Conv2d(joined, narrow, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, narrow, 3, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Conv2d(joined, width, 1)

    def forward(self, below: Tensor, tap: Tensor) -> Tensor:
        """``[B, C, h, w]`` and the tap ``[B, T, H, W]`` -> ``[B, width, H, W]``."""
        large = self.enlarge(below)
        if large.shape[2:] != tap.shape[2:]:  # sides that are no multiple of the stride
            large = F.interpolate(large, tap.shape[2:], mode="bilinear", align_corners=False)
        joined = torch.cat([large, tap], dim=1)
        return F.relu(self.bottleneck(joined) + self.shortcut(joined))


class RealTimeModel(nn.Module):
    """The masking network; see the module.

    Args:
        encoder: Gives the taps; a copy is kept, frozen and always in eval mode.
        width: Channels at the finest resolution.
        input_size: Side of the images it is trained on, in pixels.

    Attributes:
        taps: Which of the encoder's taps are read, coarsest first: of each resolution from a
            quarter of the image's side on the last.
        selector: Gates the coarsest.
        steps: One for each other tap.
        last: Gives the two channels of the mask.
    """

    def __init__(self, encoder: Encoder, *, width: int = WIDTH, input_size: int = 224) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"RealTimeModel: expected width of at least 1, got {width}")
        strides = encoder.tap_strides
        last = {stride: index for index, stride in enumerate(strides) if stride >= FINEST_STRIDE}
        self.taps = tuple(last[stride] for stride in sorted(last, reverse=True))
        if len(self.taps) < 2:
            raise ValueError(
                f"RealTimeModel: expected an encoder with taps of two strides or more from "
                f"{FINEST_STRIDE} on, got strides {list(strides)}"
            )
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.width, self.input_size = width, input_size
        channels = encoder.tap_channels[self.taps[0]]
        self.selector = Selector(encoder.classes, channels)
        steps = []
        for index in self.taps[1:]:
            level = round(math.log2(strides[index] / min(strides[tap] for tap in self.taps)))
            steps.append(Step(channels, encoder.tap_channels[index], width * 2**level))
            channels = width * 2**level
        self.steps = nn.ModuleList(steps)
        self.last = nn.Conv2d(channels, 2, 1)

    def train(self, mode: bool = True) -> RealTimeModel:
        """Train mode for what is learned; the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """What is learned behind the selector."""
        yield from self.steps.parameters()
        yield from self.last.parameters()

    def read(self, images: Tensor) -> list[Tensor]:
        """The taps that are needed of images ``[B, 3, H, W]``, coarsest first, without a graph."""
        with torch.no_grad():
            _, taps = self.encoder(images)
        return [taps[index] for index in self.taps]

    def forward(
        self, taps: Sequence[Tensor], classes: Tensor, confidence: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Masks of classes.

        Args:
            taps: What `read` gave.
            classes: One for each image, ``[B]`` int64.
            confidence: Subtracted from the selector's answer; higher lets less through.

        Returns:
            Masks ``[B, 1, h, w]`` in [0, 1] at the finest tap's resolution, 1 salient, and the
            logits of "the class is in the image", ``[B]``.
        """
        present = self.selector(taps[0], classes)
        flow = taps[0] * torch.sigmoid(present - confidence)
        for step, tap in zip(self.steps, taps[1:], strict=True):
            flow = step(flow, tap)
        kept, dropped = self.last(flow).abs().split(1, dim=1)
        # Both may be 0; then nothing is salient.
        tiny = torch.finfo(kept.dtype).tiny
        return kept / (kept + dropped).clamp(min=tiny), present.mean(dim=(1, 2, 3))

    def description(self) -> dict[str, Any]:
        """What `load_real_time` needs to build the model again, as JSON values."""
        return {
            "format": FORMAT,
            "encoder": self.encoder.description(),
            "width": self.width,
            "input_size": self.input_size,
        }


def save_real_time(model: RealTimeModel, path: str | Path) -> Path:
    """Write a model with its encoder to one safetensors file, whole or not at all.

    Raises:
        ValueError: The suffix is another one, or the encoder is not one of `build_encoder`, which
            is needed to build it again.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_real_time: expected path to end on .safetensors, got {path}")
    if not model.encoder.name:
        raise ValueError(
            "save_real_time: expected an encoder from build_encoder, which can be built again, "
            f"got a {type(model.encoder.backbone).__name__} of the caller's own"
        )
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    write_atomic(path, serialize(tensors, metadata={METADATA_KEY: json.dumps(model.description())}))
    return path


def load_real_time(path: str | Path) -> RealTimeModel:
    """Read a model that `save_real_time` wrote, in eval mode on the CPU; nothing in it is run.

    Args:
        path: The file, or the run folder that holds ``real_time.safetensors``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no such file, of a newer format, or its weights do not fit.
    """
    file = Path(path)
    file = file / FILE_NAME if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(
            f"load_real_time: expected a model of train_real_time, got {file}, which does not exist"
        )
    try:
        with safe_open(file, framework="pt") as handle:
            text = (handle.metadata() or {}).get(METADATA_KEY)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        description = json.loads(text or "")
        version, encoder = int(description["format"]), description["encoder"]
        options = {name: description[name] for name in ("width", "input_size")}
        named = {name: encoder[name] for name in ("name", "classes", "finest_stride")}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_real_time: expected a model of train_real_time, got another or damaged file in "
            f"{file}"
        ) from error
    if version > FORMAT:
        raise ValueError(
            f"load_real_time: expected format {FORMAT} or older, got {version} in {file}; "
            "upgrade casm_fast"
        )
    # Building draws random weights, which are overwritten: no caller shall notice.
    with torch.random.fork_rng(devices=[]):
        model = RealTimeModel(build_encoder(**named), **options)
    if encoder.get("transform_input"):
        model.encoder.backbone.transform_input = True  # type: ignore[assignment]
    problem = state_dict_problem(model.state_dict(), tensors)
    if problem:
        raise ValueError(
            f"load_real_time: expected the weights of a {named['name']} model, got {problem} in "
            f"{file}"
        )
    model.load_state_dict(tensors)
    return model.eval()


@dataclass(frozen=True)
class Options:
    """Of real-time saliency."""

    model: RealTimeModel | Opened[RealTimeModel] | str | Path | None = None
    """The trained model, its file, or the folder of its training."""

    confidence: float = CONFIDENCE
    """Subtracted from the selector's answer: higher shows less."""

    def __post_init__(self) -> None:
        """Read the model, once for all batches."""
        if isinstance(self.model, (str, Path)):
            object.__setattr__(self, "model", Opened(load_real_time(self.model)))
        if not isinstance(self.model, (RealTimeModel, Opened)):
            raise ValueError(
                "real_time: expected model= a RealTimeModel or its file, "
                f"got {type(self.model).__name__}; train one by train_real_time"
            )


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]`` in [0, 1]."""
    classes = problem.targets.classes  # [B, n], filled up with -1

    def masks(model: RealTimeModel, images: Tensor) -> Tensor:
        known = model.encoder.classes
        if int(classes.max()) >= known:
            raise ValueError(
                f"real_time: expected targets in 0 ... {known - 1}, the classes of the model, "
                f"got {int(classes.max())}"
            )
        taps = model.read(images)
        of_class = torch.stack(
            [model(taps, some.clamp(min=0), options.confidence)[0] for some in classes.unbind(1)]
        )  # [n, B, 1, h, w]
        absent = (classes < 0).T[..., None, None, None]
        highest = of_class.masked_fill(absent, 0).amax(dim=0)
        return F.interpolate(highest, images.shape[2:], mode="bilinear", align_corners=False)

    if not isinstance(options.model, (RealTimeModel, Opened)):
        raise RuntimeError("expected a model that was read")
    return asked(options.model, problem.images, masks)


METHODS = (
    Method(
        "real_time", "Real-time saliency", "Dabkowski & Gal 2017", maps, Options, uses="nothing"
    ),
)
