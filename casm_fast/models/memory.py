"""Batches that fit into memory: a budget to begin with, halves when it was too large.

And memory that stays: see `keep_freed`.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")

FREE_SHARE = 0.5
"""Of the free memory that one batch may take."""

HOST_MOST = 4 * 2**30
"""Bytes that it takes on the CPU at most: there larger batches are no faster."""


def budget(device: torch.device, gibibytes: float | None = None) -> float:
    """Bytes for one batch: as asked for, else half of what is free, on the CPU at most 4 GiB."""
    if gibibytes is not None:
        return gibibytes * 2**30
    if device.type == "cuda":
        return FREE_SHARE * free_on_gpu(device)
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return min(FREE_SHARE * os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE"), HOST_MOST)


def free_on_gpu(device: torch.device) -> int:
    """Bytes that torch can still take, those included that it has freed but not returned."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def footprint(run: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for `run`, doubled for the work on them.

    Args:
        run: A pass over one image, as a batch will be passed over.
        own: Tensors that are there anyway, such as the parameters of the network.
    """
    kept: dict[int, int] = {}
    there = {tensor.untyped_storage().data_ptr() for tensor in own}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return 2 * sum(kept.values())


def slices(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count` places."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def in_parts(
    count: int, size: int, work: Callable[[slice], T], device: torch.device
) -> Iterator[tuple[T, int]]:
    """Work through `count` places, `size` at once, and half as many when memory runs out.

    Args:
        count: Number of places.
        size: Places of a part at first.
        work: Does one part; done again in halves if it ran out of memory.
        device: Where it works.

    Yields:
        Each part's result, and the size of parts that it was done with.
    """
    start, size = 0, max(1, min(size, count))
    while start < count:
        try:
            made = work(slice(start, min(start + size, count)))
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            made = None
        if made is None:  # the failed part is forgotten by now
            size = (size + 1) // 2
            logger.info("out of memory: going on with %d images at once", size)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        yield made, size
        start += size


_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch's allocator on the CPU
    "out of memory",  # CUDA, where it is asked for memory beside torch's allocator
    "ALLOC_FAILED",  # cuBLAS
    "ALLOCATION_FAILED",  # cuDNN
)
"""Of RuntimeErrors that have no class of their own."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(message in str(error) for message in _OUT_OF_MEMORY)


# M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD: blocks of up to a gibibyte are cut from the
# heap, which grows by a quarter of one and never shrinks.
_MALLOC_OPTIONS = {-3: 2**30, -1: 2**31 - 1, -2: 2**28}


def keep_freed() -> bool:
    """Makes glibc keep what this process frees, for processes that compute one batch after another.

    Left alone, it returns every block above 32 MiB to the system at once, and the system hands out
    new, zeroed pages for the next batch: up to two fifths of a network's pass on a CPU. The
    resident set then stays at its peak. The programs of this package call it; a library's call
    leaves the allocator of its process alone.

    Returns:
        Whether there is a glibc that does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return all(mallopt(option, value) for option, value in _MALLOC_OPTIONS.items())
