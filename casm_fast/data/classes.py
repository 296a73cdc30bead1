"""The images of some classes of a set, as a set of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.source import ArraySource, ImageSource
from casm_fast.data.subset import Subset


class ClassSubset(Subset):
    """The images of some classes, in their order; labels count these classes alone.

    Args:
        source: The whole set.
        labels: Labels to keep, in any order.

    Raises:
        ValueError: A label is unknown or stands twice, or no image has one of them.
    """

    def __init__(self, source: ImageSource, labels: Sequence[int]) -> None:
        self._chosen = np.sort(np.asarray(labels, np.int64))
        known = np.arange(len(source.classes))
        if len(np.intersect1d(self._chosen, known)) < len(self._chosen):
            raise ValueError(
                f"of_classes: expected different labels from 0 to {len(known) - 1}, "
                f"got {list(labels)}"
            )
        every = labels_of(source)
        places = np.flatnonzero(np.isin(every, self._chosen))
        if not len(places):
            raise ValueError(
                f"of_classes: expected images of the classes {list(labels)} in {source.name}, "
                "got none"
            )
        super().__init__(source, places)
        self._labels: NDArray[np.int64] = np.searchsorted(self._chosen, every[places])

    @property
    def name(self) -> str:
        """Of the whole set, and which classes; unlike other names it opens nothing."""
        return f"{super().name} (classes {','.join(map(str, self._chosen))})"

    @property
    def classes(self) -> Sequence[str]:
        """Names of the chosen classes by their new labels."""
        return tuple(self._source.classes[label] for label in self._chosen)

    def label(self, index: int) -> int:
        """The class, by its place among the chosen ones."""
        return int(self._labels[index])


class ArrayClassSubset(ClassSubset):
    """The same of a set that lies in memory: loading takes slices of it, too."""

    def __init__(self, source: ArraySource, labels: Sequence[int]) -> None:
        super().__init__(source, labels)
        self.images = source.images[self._indices]  # [n, S, S, 3]
        self.labels = self._labels


def of_classes(source: ImageSource, labels: Sequence[int]) -> ClassSubset:
    """The images of some classes of a set.

    Args:
        source: A labelled set.
        labels: Labels to keep. The new labels count them from 0, in ascending order.

    Raises:
        ValueError: A label is unknown or stands twice, or no image has one of them.
    """
    if isinstance(source, ArraySource):
        return ArrayClassSubset(source, labels)
    return ClassSubset(source, labels)


def labels_of(source: ImageSource) -> NDArray[np.int64]:
    """The label of every image, ``[N]``."""
    return np.array([source.label(index) for index in range(len(source))], np.int64)
