"""What an extraction is told."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from typing import Literal, get_args

from casm_fast.data.decoders import DecoderName
from casm_fast.data.geometry import Policy

Rule = Literal["mean", "area", "value", "energy"]
Component = Literal["largest", "all"]
Precision = Literal["off", "bf16", "fp16"]
Engine = Literal["local", "ray"]
Masks = Literal["off", "npy", "png", "rle"]

CHOICES: dict[str, tuple[object, ...]] = {
    "resize_policy": ("crop", "squash", None),
    "rule": ("mean", "area", "value", "energy"),
    "component": ("largest", "all"),
    "connectivity": (4, 8),
    "amp": ("off", "bf16", "fp16"),
    "decoder": get_args(DecoderName),
    "engine": get_args(Engine),
    "masks": get_args(Masks),
}
LEAST = {
    "input_size": 1,
    "batch_size": 1,
    "workers": 0,
    "limit": 1,
    "processes": 1,
    "part_images": 1,
    "part_seconds": 0,
}


@dataclass(frozen=True)
class ExtractConfig:
    """How images become boxes. The defaults are the conventions of the CASM paper."""

    input_size: int | None = None
    """Side of the square that the network sees, in pixels; else the model's training size."""

    resize_policy: Policy | None = None
    """Shorter side to the input size and centre crop, or squash both sides; else as in training."""

    rule: Rule = "mean"
    """Threshold of the saliency m. mean: m >= alpha * mean(m). area: the pixels with the highest m,
    as many as a share of alpha * mean(m). value: alpha of the way from min to max. energy: the
    highest m that hold alpha of the mass."""

    alpha: float = 1.0
    """Parameter of the rule."""

    component: Component = "largest"
    """Box of the largest connected component, or of all kept pixels."""

    connectivity: Literal[4, 8] = 4
    """Neighbours of a pixel."""

    batch_size: int | None = None
    """Images per forward pass; else as many as fit into half of the free memory, at most 64 on a
    CPU and 256 on a GPU. Halved when memory runs out all the same."""

    workers: int = 4
    """Threads that decode images beside the network; 0 decodes in between. The boxes do not depend
    on it, and a set in memory needs none."""

    decoder: DecoderName = "auto"
    """What decodes JPEG files: torchcodec (extra fast-io), pillow, or auto: torchcodec where it is
    installed and gives pillow's pixels. A set that is open already keeps its own."""

    draft: bool = False
    """Decode JPEG files at 1/2, 1/4 or 1/8 of their size where that leaves twice the pixels that
    the network sees: large photos several times as fast, boxes within a pixel or two of the map."""

    device: str = "auto"
    """"auto" (for a model from a file: a GPU when there is one), "cpu", "cuda", "cuda:1" ..."""

    amp: Precision = "off"
    """Mixed precision of the network's forward pass; everything after it is float32 or better."""

    channels_last: bool | None = None
    """Images with their channels last in memory; else on a CPU, and on a GPU with amp, where
    convolutions are faster so. The same boxes but for rounding."""

    fold: bool = True
    """Fold batch norms into the convolutions before them: faster, the same boxes but for
    rounding."""

    compile: bool = False
    """Compile the network: minutes at first, then faster; the same boxes but for rounding."""

    limit: int | None = None
    """Only the first so many images; else all."""

    shard: str | None = None
    """"2/4" takes the second of four equal parts. In a folder, runs with other parts may write at
    the same time; a file gets a name of its own, boxes.2-of-4.parquet, and all four together are
    read under the name of OUTPUT."""

    processes: int = 1
    """Processes of this machine, each with a shard: one for each of so many GPUs."""

    strict: bool = False
    """Stop at the first image that cannot be read; else it becomes a row with its error."""

    masks: Masks = "off"
    """Keep the saliency maps in the folder of the rows. npy: an array [rows, h, w] of float16 for
    each part. png: a grey picture for each image. rle: instead, a column rle of the table with the
    pixels behind the box as COCO's run lengths (extra eval)."""

    part_images: int = 10_000
    """Rows that are written at once, at most: what a power failure can cost."""

    part_seconds: float = 60.0
    """Time after which rows are written all the same."""

    engine: Engine = "local"
    """local: this process. ray: a Ray cluster (extra dist), the one that RAY_ADDRESS names or that
    runs here, else one of this machine's CPUs and GPUs; the boxes are the same."""

    progress: bool = True
    """Show a progress bar when the error stream is a terminal."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            ImportError: Without what an option needs.
            ValueError: Naming the field, what was expected and what came.
        """
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.processes > 1 and self.engine == "ray":
            raise ValueError(
                f"processes: expected 1 with the engine ray, which has its own, "
                f"got {self.processes}"
            )
        if self.masks == "rle" and importlib.util.find_spec("pycocotools") is None:
            raise ImportError(
                "masks: expected pycocotools, which encodes run lengths, but it is not installed: "
                "pip install 'casm_fast[eval]'"
            )
        if not self.alpha >= 0:
            raise ValueError(f"alpha: expected a number >= 0, got {self.alpha}")
        if self.shard is not None:
            part, parts = _fraction(self.shard)
            if not 1 <= part <= parts:
                raise ValueError(f'shard: expected "i/n" with i from 1 to n, got {self.shard!r}')

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many parts, counted from 1."""
        return (1, 1) if self.shard is None else _fraction(self.shard)

    def span(self, images: int) -> range:
        """The places of the images that are asked for.

        Args:
            images: How many the source has.

        Raises:
            ValueError: There are fewer images than parts.
        """
        total = min(images, self.limit or images)
        part, parts = self.part
        if parts > total:
            raise ValueError(
                f"shard: expected at most {total} parts of {total} images, got {parts}"
            )
        return range((part - 1) * total // parts, part * total // parts)


def _fraction(text: str) -> tuple[int, int]:
    """The numbers of "2/4"; zeros where it is none."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)
