"""A part of a set of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.source import ArraySource, ImageSource


class Subset:
    """Some images of a set, an `ImageSource` itself.

    Args:
        source: The whole set.
        indices: ``[n]`` places of the images in it, in the order that they get here.

    Raises:
        ValueError: When an index lies outside the set.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int] | NDArray[np.integer]) -> None:
        self._source = source
        self._indices = np.asarray(indices, np.int64)
        outside = self._indices[(self._indices < 0) | (self._indices >= len(source))]
        if len(outside):
            raise ValueError(
                f"Subset: expected indices from 0 to {len(source) - 1}, got {outside[0]}"
            )

    @property
    def name(self) -> str:
        """The spec of the whole set."""
        return self._source.name

    @property
    def classes(self) -> Sequence[str]:
        """Class names of the whole set."""
        return self._source.classes

    @property
    def has_boxes(self) -> bool:
        """Whether images come with boxes."""
        return self._source.has_boxes

    def __len__(self) -> int:
        return len(self._indices)

    def image_id(self, index: int) -> str:
        """As in the whole set."""
        return self._source.image_id(int(self._indices[index]))

    def image(self, index: int) -> NDArray[np.uint8]:
        """``[H, W, 3]`` uint8 RGB."""
        return self._source.image(int(self._indices[index]))

    def label(self, index: int) -> int:
        """The class, -1 when unknown."""
        return self._source.label(int(self._indices[index]))

    def boxes(self, index: int) -> NDArray[np.int32]:
        """``[n, 4]`` half-open, in pixels."""
        return self._source.boxes(int(self._indices[index]))


class ArraySubset(Subset):
    """A part of a set that lies in memory: loading takes slices of it, too."""

    def __init__(self, source: ArraySource, indices: Sequence[int] | NDArray[np.integer]) -> None:
        super().__init__(source, indices)
        self.images = source.images[self._indices]  # [n, S, S, 3]
        self.labels = source.labels[self._indices]  # [n]


def subset(source: ImageSource, indices: Sequence[int] | NDArray[np.integer]) -> Subset:
    """The images at `indices` of a set, in that order.

    Args:
        source: The whole set.
        indices: ``[n]`` places in it.

    Raises:
        ValueError: When an index lies outside the set.
    """
    if isinstance(source, ArraySource):
        return ArraySubset(source, indices)
    return Subset(source, indices)
