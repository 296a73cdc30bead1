"""A folder of images, with class subfolders or flat; a single picture."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.decoding import Decoder, decode
from casm_fast.data.lines import stored
from casm_fast.data.listing import check_folder, class_listing, image_names, subfolders

logger = logging.getLogger(__name__)


class FolderSource:
    """An `ImageSource` over any folder.

    Subfolders are classes, labelled in the order of their names, and may hold further folders. When
    images lie in the folder itself the set is flat: no classes, every label -1, and images of
    subfolders belong to it too.

    Attributes:
        name: "folder:<path>".
        classes: Names of the class folders; () for a flat set.
        has_boxes: Always false.
        root: The folder.
        files: Paths relative to ``root``, see `casm_fast.data.lines`.
        found: A sentence about what was found, and what is missing.
    """

    has_boxes = False

    def __init__(self, root: str | Path, *, decoder: Decoder = decode) -> None:
        """Lists the folder.

        Args:
            root: The folder.
            decoder: Reads one file.

        Raises:
            FileNotFoundError: There is no such folder, or no image in it.
            NotADirectoryError: It is a file.
            ValueError: A class folder holds no image.
        """
        self.root = Path(root)
        check_folder(self.root, "folder")
        self._decoder = decoder
        self.name = f"folder:{self.root}"
        if image_names(self.root):
            self.classes: tuple[str, ...] = ()
            files = image_names(self.root, recursive=True)
            labels = [-1] * len(files)
        else:
            self.classes = tuple(subfolders(self.root))
            if not image_names(self.root, recursive=True):
                raise FileNotFoundError(
                    f"folder: expected image files in {self.root}, got none; give a folder of "
                    "images or one that holds a folder per class"
                )
            files, labels = class_listing(self.root, list(self.classes))
        self.files = stored(files)
        self._labels = np.array(labels, np.int64)
        kind = f"of {len(self.classes):,} classes in folders" if self.classes else "without classes"
        missing = "boxes" if self.classes else "labels and boxes"
        self.found = f"folder: {len(self):,} images in {root}, {kind}; missing: {missing}"
        logger.info("%s", self.found)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.files)

    def image_id(self, index: int) -> str:
        """The path relative to the folder."""
        return self.files[index]

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB; raises `DecodeError`."""
        return self._decoder(Path(self.address(index)))

    def address(self, index: int) -> str:
        """The path of the image file."""
        return str(self.root / self.files[index])

    def label(self, index: int) -> int:
        """The class of the image, -1 in a flat folder."""
        return int(self._labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        """No boxes, ``[0, 4]``."""
        del index
        return np.zeros((0, 4), np.int32)


class PhotoSource:
    """An `ImageSource` of a single picture file.

    Attributes:
        name: The path.
        classes: ().
        has_boxes: Always false.
        path: The file.
        found: A sentence about what was found, and what is missing.
    """

    classes: tuple[str, ...] = ()
    has_boxes = False

    def __init__(self, path: str | Path, *, decoder: Decoder = decode) -> None:
        self.path, self.name, self._decoder = Path(path), str(path), decoder
        self.found = f"picture: {path}; missing: its label and boxes"
        logger.info("%s", self.found)

    def __len__(self) -> int:
        """1."""
        return 1

    def image_id(self, index: int) -> str:
        """The name of the file."""
        del index
        return self.path.name

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB; raises `DecodeError`."""
        return self._decoder(Path(self.address(index)))

    def address(self, index: int) -> str:
        """The path of the image file."""
        del index
        return str(self.path)

    def label(self, index: int) -> int:
        """-1."""
        del index
        return -1

    def boxes(self, index: int) -> NDArray[np.int32]:
        """No boxes, ``[0, 4]``."""
        del index
        return np.zeros((0, 4), np.int32)
