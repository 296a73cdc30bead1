"""What every set of images looks like to the rest of the package, and how a spec opens one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.coco import CocoSource, annotation_files
from casm_fast.data.decoders import DecoderName, choose_content_decoder, choose_decoder
from casm_fast.data.decoding import ContentDecoder, Decoder
from casm_fast.data.folder import FolderSource, PhotoSource
from casm_fast.data.imagenet import ImageNetSource, images_root
from casm_fast.data.listing import holds_image, is_image
from casm_fast.data.manifest import ManifestSource
from casm_fast.data.paths import STDIN, open_glob, open_list, open_url
from casm_fast.data.remote import has_magic, is_url
from casm_fast.data.synthetic import open_synthetic
from casm_fast.data.voc import VocSource, voc_folders
from casm_fast.data.webdataset import WebDatasetSource
from casm_fast.data.wsol import IDS, WsolSource, metadata_folders

_KINDS = ("imagenet", "imagenet-val", "imagenet-train", "folder")
_OF_SETS = ("coco", "voc", "wsol")
"""Kinds that may name a set of their own after a hyphen: "coco-val2014", "voc-test2007"."""

_LISTED = ("list", "parquet", "webdataset")
"""Kinds that have no splits: what they name is the set."""


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
class FileSource(ImageSource, Protocol):
    """A set whose images are files, which other programs can open, too."""

    def address(self, index: int) -> str:
        """Path or URL of the image file."""
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
    spec: str | Path | ImageSource,
    split: str = "val",
    *,
    decoder: DecoderName = "auto",
    draft: int | None = None,
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
    | "voc:DIR" | PASCAL VOC, the split asked for; (picture, class) pairs |
    | "voc-test2007:DIR", "voc-trainval2012:DIR", … | that set, whatever is asked for |
    | "wsol:METADATA", "wsol-test:METADATA", … | wsolevaluation's metadata files and images |
    | "wsol:METADATA,images=DIR", "wsol:METADATA,proxy" | with the images in DIR; the proxy set |
    | "folder:DIR" | class subfolders, or one flat folder; has no splits |
    | "list:FILE", "-" | a text file with a path or URL a line; standard input |
    | "parquet:FILE" | a Parquet file with the columns path, label and boxes (or only path) |
    | "webdataset:train-{0000..0146}.tar" | the images of WebDataset's tar files |
    | "photos/**/*.jpg" | the image files that a pattern names |
    | "s3://bucket/photos", "hf://…", … | image files behind a URL, or a pattern of URLs |
    | a picture file | that picture |
    | a path | by looking: COCO when it holds annotations/instances_*.json, VOC when JPEGImages
        (there, in VOC2007 or in VOCdevkit/VOC2007), wsolevaluation when image_ids.txt (there, in a
        split or in metadata/*/*), ImageNet when train or val folders, else a folder of images |
    | an `ImageSource` | itself |

    Every source says in a sentence what was found and what is missing: its attribute ``found``,
    which is logged as information.

    Args:
        spec: What to open.
        split: "train" or "val", for sets that have both.
        decoder: What decodes JPEG files, see `casm_fast.data.decoders`; an open source keeps its
            own.
        draft: Shorter side that pictures will be scaled down to: large JPEG files are decoded at a
            fraction of their size (`casm_fast.data.decoding.Reduced`); an open source is left as
            it is.

    Raises:
        FileNotFoundError: The path, or every image in it, is missing.
        ImportError: The decoder is not installed.
        ValueError: An unknown split or option, or a tree that contradicts itself.
    """
    if split not in ("train", "val"):
        raise ValueError(f'open_source: expected `split` "train" or "val", got {split!r}')
    if not isinstance(spec, (str, Path)):
        return spec
    reader = functools.partial(choose_decoder, decoder, draft)
    content_reader = functools.partial(choose_content_decoder, decoder, draft)
    kind, colon, rest = str(spec).partition(":")
    if kind == "synthetic":
        return open_synthetic(rest, split)
    if str(spec) == STDIN:
        kind, colon, rest = "list", ":", STDIN
    if colon and kind in _LISTED:
        return _open_listed(kind, rest, reader(), content_reader())
    family, _, part = kind.partition("-")
    if colon and (kind in (*_KINDS, *_OF_SETS) or (family in _OF_SETS and part)):
        if not rest:
            raise ValueError(f'open_source: expected a path after "{kind}:", got none')
        return _open(family, rest, part or split, reader())
    path = Path(spec)
    if is_url(str(spec)) or (has_magic(str(spec)) and not path.exists()):
        named = open_glob if has_magic(str(spec)) else open_url
        return named(str(spec), decoder=reader(), content_decoder=content_reader())
    if not path.exists():
        raise FileNotFoundError(
            f"open_source: there is no {path}; give an existing path, synthetic, imagenet:DIR, "
            "imagenet-val:DIR, coco:DIR, voc:DIR, wsol:DIR, folder:DIR, list:FILE, parquet:FILE or "
            "webdataset:TAR"
        )
    if path.is_file() and is_image(path.name):
        return PhotoSource(path, decoder=reader())
    return _open(_family(path), str(path), split, reader())


def _open_listed(
    kind: str, rest: str, decoder: Decoder, content_decoder: ContentDecoder
) -> ImageSource:
    if not rest:
        raise ValueError(f'open_source: expected a path after "{kind}:", got none')
    if kind == "webdataset":
        return WebDatasetSource(rest, decoder=content_decoder)
    if kind == "parquet":
        return ManifestSource(rest, decoder=decoder, content_decoder=content_decoder)
    return open_list(rest, decoder=decoder, content_decoder=content_decoder)


def locate(source: ImageSource, image_ids: Sequence[str]) -> list[int]:
    """The places of images in a set.

    Args:
        source: The set.
        image_ids: Ids; when they are those of the first images in order, no other is looked at.

    Raises:
        ValueError: An image is not in the set.
    """
    if len(image_ids) <= len(source) and all(
        source.image_id(place) == name for place, name in enumerate(image_ids)
    ):
        return list(range(len(image_ids)))
    place_of = {source.image_id(place): place for place in range(len(source))}
    strangers = [name for name in image_ids if name not in place_of]
    if strangers:
        raise ValueError(
            f"{source.name}: expected an image {strangers[0]}, got none of this id "
            f"({len(strangers):,} of {len(image_ids):,} are missing); give the set that the table "
            "was made of"
        )
    return [place_of[name] for name in image_ids]


def _open(family: str, path: str, split: str, decoder: Decoder) -> ImageSource:
    if family == "folder":
        return FolderSource(path, decoder=decoder)
    if family == "coco":
        return CocoSource(path, split, decoder=decoder)
    if family == "voc":
        return VocSource(path, split, decoder=decoder)
    if family == "wsol":
        lists, given, images = path.removesuffix(",proxy").partition(",images=")
        proxy = path.endswith(",proxy")
        return WsolSource(
            lists, split, images=images if given else None, proxy=proxy, decoder=decoder
        )
    return ImageNetSource(path, split, decoder=decoder)


def _family(path: Path) -> str:
    """The kind of source that a path holds, by looking.

    Folders called train or val are the weakest sign: other layouts may hold them, too.

    Raises:
        FileNotFoundError: There is nothing like a set of images.
        ValueError: There are several kinds.
    """
    if not path.is_dir():
        return "folder"
    signs = {
        "coco": [str(file) for file in annotation_files(path).values()],
        "voc": [f"{folder / 'JPEGImages'}" for folder in voc_folders(path)],
        "wsol": [f"{folder / IDS}" for folder in metadata_folders(path)],
    }
    seen = [family for family, files in signs.items() if files]
    if len(seen) > 1:
        what = " and ".join(f"{family} ({signs[family][0]})" for family in seen)
        specs = " or ".join(f"{family}:{path}" for family in seen)
        raise ValueError(f"open_source: expected one layout in {path}, got {what}; say {specs}")
    if seen:
        return seen[0]
    if images_root(path) is not None:
        return "imagenet"
    if not holds_image(path):
        raise FileNotFoundError(
            f"open_source: expected images in {path}: train/ or val/ (ImageNet), annotations/"
            "instances_*.json (COCO), JPEGImages/ (VOC), image_ids.txt (wsolevaluation), or a "
            "folder of image files, got none of these; give the folder that holds one"
        )
    return "folder"
