"""What every set of images looks like to the rest of the package, and how a spec opens one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.coco import CocoSource, annotation_files
from casm_fast.data.decoders import DecoderName, choose_decoder
from casm_fast.data.folder import FolderSource, PhotoSource
from casm_fast.data.imagenet import ImageNetSource, images_root
from casm_fast.data.listing import is_image
from casm_fast.data.synthetic import open_synthetic

_KINDS = ("imagenet", "imagenet-val", "imagenet-train", "coco", "folder")


@runtime_checkable
class ImageSource(Protocol):
    """A set of images; any object with these members will do.

    Methods may be called from several threads at once.
    """

    @property
    def name(self) -> str:
        """The spec that opens the set again, such as "imagenet-val:/data/ILSVRC"."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Class names by label; () when unknown."""
        ...

    @property
    def has_boxes(self) -> bool:
        """Whether images come with ground-truth boxes."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def image_id(self, index: int) -> str:
        """Unique and stable: the file's stem for ImageNet val, "139/62" for COCO, else a path."""
        ...

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB, upright; raises `casm_fast.data.DecodeError`."""
        ...

    def label(self, index: int) -> int:
        """The class, -1 when unknown."""
        ...

    def boxes(self, index: int) -> NDArray[np.int32]:
        """``[n, 4]`` (x0, y0, x1, y1) half-open, in pixels of the image; n may be 0."""
        ...


@runtime_checkable
class ArraySource(ImageSource, Protocol):
    """A set that lies in memory at one size: loading takes slices instead of single images."""

    @property
    def images(self) -> NDArray[np.uint8]:
        """``[N, S, S, 3]`` uint8 RGB."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """``[N]``."""
        ...


def open_source(
    spec: str | Path | ImageSource, split: str = "val", *, decoder: DecoderName = "auto"
) -> ImageSource:
    """Opens a set of images.

    | spec | what |
    |---|---|
    | "synthetic", "synthetic:seed=3,images=400,size=64,classes=8" | the embedded set |
    | "synthetic:emblem=100" | the same with a second, small cue to the class on every object |
    | "imagenet:DIR" | ImageNet in any layout, the split asked for |
    | "imagenet-val:DIR", "imagenet-train:DIR" | that split, whatever is asked for |
    | "coco:DIR" | COCO, the split asked for; (picture, category) pairs |
    | "coco-val2014:DIR", "coco-train2017:DIR", … | that set, whatever is asked for |
    | "folder:DIR" | class subfolders, or one flat folder; has no splits |
    | a picture file | that picture |
    | a path | COCO when it holds annotations/instances_*.json, ImageNet when it holds train or val
        folders, else a folder |
    | an `ImageSource` | itself |

    Args:
        spec: What to open.
        split: "train" or "val", for sets that have both.
        decoder: What decodes JPEG files, see `casm_fast.data.decoders`; an open source keeps its
            own.

    Raises:
        FileNotFoundError: The path, or every image in it, is missing.
        ImportError: The decoder is not installed.
        ValueError: An unknown split or option, or a tree that contradicts itself.
    """
    if split not in ("train", "val"):
        raise ValueError(f'open_source: expected `split` "train" or "val", got {split!r}')
    if not isinstance(spec, (str, Path)):
        return spec
    kind, colon, rest = str(spec).partition(":")
    if kind == "synthetic":
        return open_synthetic(rest, split)
    family, _, part = kind.partition("-")
    if colon and (kind in _KINDS or (family == "coco" and part)):
        if not rest:
            raise ValueError(f'open_source: expected a path after "{kind}:", got none')
        path = Path(rest)
    else:
        path = Path(spec)
        if not path.exists():
            raise FileNotFoundError(
                f"open_source: there is no {path}; give an existing path, synthetic, "
                "imagenet:DIR, imagenet-val:DIR, coco:DIR or folder:DIR"
            )
        family, part = _family(path), ""
    reader = choose_decoder(decoder)
    if not colon and path.is_file() and is_image(path.name):
        return PhotoSource(path, decoder=reader)
    if family == "folder":
        return FolderSource(path, decoder=reader)
    if family == "coco":
        return CocoSource(path, part or split, decoder=reader)
    return ImageNetSource(path, part or split, decoder=reader)


def _family(path: Path) -> str:
    """The kind of source that a path holds, by looking."""
    if annotation_files(path):
        return "coco"
    return "folder" if images_root(path) is None else "imagenet"
