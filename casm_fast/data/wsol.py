"""Images as the metadata files of wsolevaluation list them: ImageNet, CUB, OpenImages.

The files are those of Choe et al. (2020), "Evaluating Weakly Supervised Object Localization Methods
Right"; one value follows the other after a comma.

| file in METADATA | a line |
|---|---|
| image_ids.txt | ID: the path of an image below the folder of images |
| class_labels.txt | ID, label |
| image_sizes.txt | ID, width, height; not everywhere |
| localization.txt | ID, x0, y0, x1, y1, or ID, mask, ignore mask; several an image; or no file |
| image_ids_proxy.txt | ID: a small part of the training images; not everywhere |

METADATA is the folder of these files, or one above it: of the splits (metadata/ILSVRC), or the
root that holds metadata/ and dataset/. The folder of images is dataset/ILSVRC beside
metadata/ILSVRC, or lies near the files. Splits are called by wsolevaluation's names: "train" has
labels alone, "val" are the images to tune on (ImageNetV2, CUBV2), and **"test" are the images that
ImageNet calls val**.

Boxes stand as they are in the file, in original pixels, and count as half-open. wsolevaluation's
own evaluator includes x1 and y1 in the box; a protocol of theirs takes the same four numbers. Those
of ImageNet's val are the numbers of its XML files, which `casm_fast.data.imagenet` reads as
half-open as well, so that a score does not depend on where the boxes come from.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.decoding import Decoder, decode
from casm_fast.data.listing import check_folder, missing_files

logger = logging.getLogger(__name__)

IDS = "image_ids.txt"
PROXY_IDS = "image_ids_proxy.txt"
LABELS = "class_labels.txt"
SIZES = "image_sizes.txt"
LOCALIZATION = "localization.txt"

_LOOKED_AT = 50  # ids by which a folder of images is known


_Row = tuple[int, str, list[str]]


def metadata_folders(root: Path, split: str = "*") -> list[Path]:
    """The folders with an image_ids.txt that a path leads to, see the module; [] where none is.

    Args:
        root: METADATA.
        split: Of the folders above the files, the split to look for; all when not given.
    """
    if (root / IDS).is_file():
        return [root]
    splits = ("train", "val", "test") if split == "*" else (split,)
    patterns = [f"{above}{name}/{IDS}" for above in ("", "*/", "metadata/*/") for name in splits]
    return [path.parent for pattern in patterns for path in sorted(root.glob(pattern))]


class WsolSource:
    """An `ImageSource` over one split of wsolevaluation's metadata.

    Attributes:
        name: "wsol:<folder of the files>", with ",images=<folder>" and ",proxy" where given.
        classes: (); the files number the classes and do not name them.
        has_boxes: Whether localization.txt holds boxes.
        has_masks: Whether it holds masks.
        metadata: The folder of the files.
        folder: The folder of the images.
        files: Paths relative to ``folder``.
    """

    classes: tuple[str, ...] = ()

    def __init__(
        self,
        root: str | Path,
        split: str = "val",
        *,
        images: str | Path | None = None,
        proxy: bool = False,
        decoder: Decoder = decode,
    ) -> None:
        """Reads the lists.

        Args:
            root: METADATA, see the module.
            split: "train", "val" or "test", where METADATA holds several.
            images: The folder of the images, where it is none of the usual ones.
            proxy: Whether to take the images of image_ids_proxy.txt alone.
            decoder: Reads one file.

        Raises:
            FileNotFoundError: There is no such metadata, or no folder of images.
            ValueError: Several sets have the split, or a file is not of its form.
        """
        check_folder(Path(root), "wsol")
        self.metadata = _find(Path(root), split)
        self._decoder = decoder
        self.files = _ids(self.metadata / (PROXY_IDS if proxy else IDS))
        self.name = f"wsol:{self.metadata}"
        if images is None:
            self.folder = _images(self.metadata, self.files)
        else:
            self.folder = Path(images)
            check_folder(self.folder, "wsol images")
            self.name += f",images={images}"
        self.name += ",proxy" * proxy
        self._place = {file: place for place, file in enumerate(self.files)}
        self._labels = self._read_labels()
        self._sizes = self._read_sizes()
        self._read_localization()
        self.has_boxes = len(self._boxes) > 0
        self.has_masks = bool(self._mask_files)
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", self.found)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def image_id(self, index: int) -> str:
        """The path in image_ids.txt, such as "val/ILSVRC2012_val_00000001.JPEG"."""
        return self.files[index]

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB; raises `DecodeError`."""
        return self._decoder(Path(self.address(index)))

    def address(self, index: int) -> str:
        """The path of the image file."""
        return str(self.folder / self.files[index])

    def label(self, index: int) -> int:
        """The class of the image, as the files number it."""
        return int(self._labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        """``[n, 4]`` (x0, y0, x1, y1) as they stand in the file; see the module."""
        index = range(len(self))[index]
        return self._boxes[self._starts[index] : self._starts[index + 1]]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the image, by image_sizes.txt, or of its pixels without that file.

        Raises:
            DecodeError: There is no such file and the image cannot be read.
        """
        if self._sizes is None:
            height, width, _ = self.image(index).shape
        else:
            width, height = map(int, self._sizes[index])
        return height, width

    def masks(self, index: int, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
        """The pixels of each object, ``[n, H, W]``.

        Args:
            index: Of the image.
            size: (H, W) to enlarge or shrink the masks to, by the nearest rule of OpenCV as
                wsolevaluation does; that of the files when not given.

        Raises:
            DecodeError: A file cannot be read.
            ValueError: The files differ in size and ``size`` is not given.
        """
        files = self._mask_files.get(range(len(self))[index], [])
        if not files:
            return np.zeros((0, *(size or self.size(index))), np.bool_)
        masks = [self._mask(file, size) for file in files]
        if len({mask.shape for mask in masks}) > 1:
            raise ValueError(
                f"wsol: expected masks of one size for {self.files[index]}, got "
                f"{', '.join(sorted({str(mask.shape) for mask in masks}))}; give `size`"
            )
        return np.stack(masks)

    def mask(self, index: int, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
        """The pixels of any object, ``[H, W]``; arguments and errors of `masks`."""
        covered: NDArray[np.bool_] = np.logical_or.reduce(self.masks(index, size))
        return covered

    def ignore(self, index: int, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
        """The pixels that PxAP leaves out: the ignore mask without the objects, ``[H, W]``.

        Arguments and errors are those of `masks`; without an ignore mask no pixel is left out.
        """
        objects = self.mask(index, size)
        file = self._ignore_files.get(range(len(self))[index])
        if file is None:
            return np.zeros_like(objects)
        region = self._mask(file, objects.shape)
        left_out: NDArray[np.bool_] = region & ~objects
        return left_out

    @cached_property
    def found(self) -> str:
        """A sentence about what was found, and what is missing."""
        text = f"wsol: {len(self):,} images in {self.folder} by {self.metadata}, "
        text += f"{len(np.unique(self._labels)):,} classes without names, "
        if self._mask_files:
            text += f"{sum(map(len, self._mask_files.values())):,} masks"
        else:
            text += f"{len(self._boxes):,} boxes"
        localised = (np.diff(self._starts) > 0).sum() or len(self._mask_files)
        if 0 < localised < len(self):
            text += f"; without either: {len(self) - localised:,} images"
        if self._others:
            text += f"; left out: {self._others:,} lines of {LOCALIZATION} about other images"
        missing = [SIZES] * (self._sizes is None) + [LOCALIZATION] * (not localised)
        if missing:
            text += f"; missing: {' and '.join(missing)}"
        return text + missing_files(self._absent(), ())

    # --- reading ----------------------------------------------------------------------------------

    def _absent(self) -> list[str]:
        """Listed images without a file."""
        listed: dict[str, set[str]] = {}
        for parent in {os.path.dirname(file) for file in self.files}:
            folder = self.folder / parent
            listed[parent] = set(os.listdir(folder)) if folder.is_dir() else set()
        return [f for f in self.files if os.path.basename(f) not in listed[os.path.dirname(f)]]

    def _read_labels(self) -> NDArray[np.int64]:
        path = self.metadata / LABELS
        if not path.is_file():
            raise FileNotFoundError(
                f"wsol: expected {LABELS} beside {IDS} in {self.metadata}, got none"
            )
        labels = np.full(len(self), -1, np.int64)
        for number, file, (label,) in _rows(path, 1, "ID,label"):
            place = self._place.get(file)
            if place is not None:
                labels[place] = _whole(path, number, [label], "ID,label", least=0)[0]
        unknown = np.flatnonzero(labels < 0)
        if len(unknown):
            raise ValueError(
                f"{path}: expected a label for every image, got none for "
                f"{self.files[unknown[0]]} and {len(unknown) - 1:,} others"
            )
        return labels

    def _read_sizes(self) -> NDArray[np.int32] | None:
        """(width, height) of each image."""
        path = self.metadata / SIZES
        if not path.is_file():
            return None
        sizes = np.zeros((len(self), 2), np.int32)
        for number, file, values in _rows(path, 2, "ID,width,height"):
            place = self._place.get(file)
            if place is not None:
                sizes[place] = _whole(path, number, values, "ID,width,height", least=1)
        unknown = np.flatnonzero(sizes[:, 0] == 0)
        if len(unknown):
            raise ValueError(
                f"{path}: expected a size for every image, got none for "
                f"{self.files[unknown[0]]} and {len(unknown) - 1:,} others"
            )
        return sizes

    def _read_localization(self) -> None:
        self._boxes = np.zeros((0, 4), np.int32)
        self._starts = np.zeros(len(self) + 1, np.int64)
        self._mask_files: dict[int, list[str]] = {}
        self._ignore_files: dict[int, str] = {}
        self._others = 0
        path = self.metadata / LOCALIZATION
        if not path.is_file():
            return
        with path.open(encoding="utf-8") as file:
            columns = file.readline().count(",")
        if columns == 2:
            self._read_masks(path)
        else:
            self._read_boxes(path)

    def _read_boxes(self, path: Path) -> None:
        places, boxes = [], []
        for number, file, values in _rows(path, 4, "ID,x0,y0,x1,y1"):
            place = self._place.get(file)
            if place is None:
                self._others += 1
                continue
            places.append(place)
            boxes.append(_whole(path, number, values, "ID,x0,y0,x1,y1"))
        order = np.argsort(places, kind="stable")
        self._boxes = np.array(boxes, np.int32).reshape(-1, 4)[order]
        self._starts = np.searchsorted(np.sort(places), np.arange(len(self) + 1))

    def _read_masks(self, path: Path) -> None:
        for number, file, (mask, ignore) in _rows(path, 2, "ID,mask,ignore mask"):
            place = self._place.get(file)
            if place is None:
                self._others += 1
                continue
            self._mask_files.setdefault(place, []).append(mask)
            if ignore and self._ignore_files.setdefault(place, ignore) != ignore:
                raise ValueError(
                    f"{path}, line {number}: expected one ignore mask for {file}, got "
                    f"{self._ignore_files[place]} and {ignore}"
                )

    def _mask(self, file: str, size: tuple[int, ...] | None) -> NDArray[np.bool_]:
        """A mask's file: what is not black, ``[H, W]``."""
        mask: NDArray[np.bool_] = decode(self.folder / file).max(axis=-1) > 0
        if size is None or mask.shape == size:
            return mask
        rows, columns = (_nearest(*axis) for axis in zip(mask.shape, size, strict=True))
        return mask[rows[:, None], columns]


def _find(root: Path, split: str) -> Path:
    """The folder of the files of a split."""
    folders = metadata_folders(root, split)
    if not folders:
        others = ", ".join(f"wsol:{folder}" for folder in metadata_folders(root))
        raise FileNotFoundError(
            f"wsol: expected {IDS} in {root}, {root}/{split}, {root}/*/{split} or "
            f"{root}/metadata/*/{split}, got none"
            + (f"; say {others}" if others else "; give the folder of the metadata files")
        )
    if len(folders) > 1:
        specs = " or ".join(f"wsol:{folder}" for folder in folders)
        raise ValueError(
            f"wsol: expected one set with a split {split} in {root}, got {len(folders)}; "
            f"say {specs}"
        )
    return folders[0]


def _images(metadata: Path, files: list[str]) -> Path:
    """The folder of the images, by looking for the first of them."""
    chain = [metadata, *metadata.absolute().parents[:3]]
    name = metadata.absolute().parent.name
    places = [place for up in chain for place in (up / "dataset" / name, up / "images", up)]
    for place in places:
        if any((place / file).is_file() for file in files[:_LOOKED_AT]):
            return place
    raise FileNotFoundError(
        f"wsol: expected the images of {metadata} ({files[0]}, …) in dataset/{name}/ beside "
        f"metadata/{name}/, or near the lists, got none; give wsol:{metadata},images=DIR"
    )


def _ids(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"wsol: there is no {path}")
    files = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not files:
        raise ValueError(f"{path}: expected the path of an image a line, got none")
    if len(set(files)) < len(files):
        twice, _ = Counter(files).most_common(1)[0]
        raise ValueError(f"{path}: expected every image once, got {twice} twice")
    return files


def _rows(path: Path, values: int, form: str) -> Iterator[_Row]:
    """(line number, ID, what follows) of every line; paths may hold commas, values may not."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            words = line.rstrip("\r\n").rsplit(",", values)
            if words == [""]:
                continue
            if len(words) != values + 1:
                raise ValueError(f"{path}, line {number}: expected `{form}`, got {line.rstrip()!r}")
            yield number, words[0], words[1:]


def _whole(
    path: Path, number: int, words: list[str], form: str, least: int = -(2**31)
) -> list[int]:
    """Whole numbers that an int32 holds."""
    try:
        values = [int(word) for word in words]
    except ValueError:
        values = [least - 1]
    if not all(least <= value < 2**31 for value in values):
        raise ValueError(f"{path}, line {number}: expected `{form}`, got {','.join(words)!r}")
    return values


def _nearest(source: int, target: int) -> NDArray[np.int64]:
    """The pixel of the source that each of the target's shows, OpenCV's INTER_NEAREST.

    OpenCV multiplies by the rounded ratio; a quotient of integers differs where the ratio is not
    exact.
    """
    places = np.floor(np.arange(target) * (1 / (target / source)))
    nearest: NDArray[np.int64] = np.minimum(places, source - 1).astype(np.int64)
    return nearest
