"""Telea's inpainting for batches of images.

One image takes 14 to 25 ms at 224 x 224, so that the 50,000 of ImageNet's validation set take a
quarter of an hour and more one after the other. OpenCV lets go of the interpreter lock while it
works: a pool of threads does as many at once as there are cores, and faster than processes, which
would have to copy every image twice (measured on 4 cores: 3.1 against 2.1 times one thread).
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from casm_fast.report.pictures import INPAINT_RADIUS, inpaint


class Inpainter:
    """Fills holes; use it as a context.

    Args:
        workers: Images at once; as many as there are processors by default.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(workers or _processors(), "casm-fast-inpainting")

    def __enter__(self) -> Inpainter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(
        self, images: NDArray[np.uint8], removed: NDArray[np.bool_]
    ) -> list[Future[NDArray[np.uint8]]]:
        """Begin to fill the holes of a batch; nothing waits.

        Args:
            images: ``[B, S, S, 3]``.
            removed: ``[B, S, S]``.

        Returns:
            One ``[S, S, 3]`` per image, in time.
        """
        return [
            self._pool.submit(_fill, image, hole)
            for image, hole in zip(images, removed, strict=True)
        ]


def _fill(image: NDArray[np.uint8], hole: NDArray[np.bool_]) -> NDArray[np.uint8]:
    filled = inpaint(image, hole, INPAINT_RADIUS)
    if filled is None:
        raise ModuleNotFoundError("expected OpenCV: pip install 'casm_fast[inpaint]'")
    return filled


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
