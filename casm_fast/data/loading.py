"""Batches for training and for evaluation.

What a batch holds depends on its arguments alone: the order of an epoch on (seed, epoch), the
augmentation of an image on (seed, epoch, its index). So the stream is the same for any number of
workers, and a run that stopped goes on at batch k without reading the batches before it.

Workers are threads: Pillow lets go of the interpreter lock while it decodes and resizes, and
nothing has to be pickled or shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.data.decoding import DecodeError, size_of
from casm_fast.data.geometry import Geometry, Policy, check_policy, geometry
from casm_fast.data.source import ArraySource, ImageSource
from casm_fast.data.transforms import crop_and_resize, resize

Augment = Literal["imagenet", "flip", "none"]
"""What training does to an image: "imagenet" is torchvision's RandomResizedCrop (8 to 100 % of the
area, aspect 3/4 to 4/3) and a horizontal flip; "flip" is resize and flip; "none" is resize."""

_T = TypeVar("_T")
_J = TypeVar("_J")

_CROP_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many
_AHEAD = 3  # batches in the making while one is in use


@dataclass(frozen=True)
class TrainingBatch:
    """Images to learn from.

    Attributes:
        images: ``[B, S, S, 3]`` uint8 RGB, in host memory (pinned when asked for): a quarter of
            what `normalize` makes of them on the device.
        labels: ``[B]`` int64.
        skipped: One message per image that could not be read and is missing from the batch.
    """

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class ImageBatch:
    """Images to look at, in the order of the source.

    Attributes:
        images: ``[B, S, S, 3]`` uint8 RGB, in host memory (pinned when asked for).
        indices: Place of each image in the source.
        geometries: Where each image's pixels went.
        errors: (index, message) of each image that could not be read; these are not in ``images``.
        truth: ``[n, 4]`` true boxes of each image, in its own pixels; () unless asked for.
    """

    images: Tensor
    indices: list[int]
    geometries: list[Geometry]
    errors: list[tuple[int, str]]
    truth: Sequence[NDArray[np.int32]] = ()


def batches_per_epoch(
    source: ImageSource, batch_size: int, fraction: float, drop_last: bool = True
) -> int:
    """How many batches `training_batches` yields for a whole epoch.

    Args:
        source: The training set.
        batch_size: Images per batch, 1 or more.
        fraction: Share of the set per epoch, above 0 and at most 1.
        drop_last: Whether an incomplete last batch is left out.

    Raises:
        ValueError: An argument is out of its range, or not one batch would be left.
    """
    if batch_size < 1:
        raise ValueError(f"expected `batch_size` of at least 1, got {batch_size}")
    if not 0 < fraction <= 1:
        raise ValueError(f"expected `fraction` above 0 and at most 1, got {fraction}")
    images = _epoch_images(source, fraction)
    batches = images // batch_size if drop_last else -(-images // batch_size)
    if batches < 1:
        raise ValueError(
            f"expected at least one batch of {batch_size} images per epoch, got {images} images "
            f"({fraction:g} of {len(source)}); lower `batch_size` or raise `fraction`"
        )
    return batches


def training_batches(
    source: ImageSource,
    *,
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    fraction: float = 1.0,
    first_batch: int = 0,
    workers: int = 0,
    augment: Augment = "imagenet",
    drop_last: bool = True,
    pin_memory: bool = False,
    resize_policy: Policy = "crop",
    strict: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[TrainingBatch]:
    """One epoch of a training set: a fresh random share of it, in random order.

    Several processes that pass the shards (0, n), (1, n), ... get the parts of one and the same
    stream, for every n: their batches, one after the other, are the batch of a single process.

    Args:
        source: The training set; every image needs a label.
        size: Side of the square images, in pixels.
        batch_size: Images per batch.
        seed: Of order and augmentation, 0 or more.
        epoch: 0 or more; every epoch has its own order, share and augmentation.
        fraction: Share of the set, drawn anew each epoch.
        first_batch: Batches to pass over; their images are not read.
        workers: Threads that read ahead; 0 reads when a batch is asked for. A set in memory needs
            none.
        augment: "imagenet", "flip" or "none", see `Augment`.
        drop_last: Whether an incomplete last batch is left out.
        pin_memory: Whether the images lie in pinned memory; needs an accelerator.
        resize_policy: How "flip" and "none" make squares, "crop" or "squash".
        strict: Whether an image that cannot be read stops the epoch, instead of being skipped and
            named.
        shard: (k, n): of each batch the k-th of n consecutive parts, k from 0, equal where n
            divides the batch. Other images are not read.

    Yields:
        The batches ``first_batch``, ``first_batch + 1``, … of the epoch.

    Raises:
        ValueError: An argument is out of its range (before the first batch).
        DecodeError: With ``strict`` an image cannot be read; without it, not one of a batch can. A
            part of which not one can be read is yielded empty.
    """
    batches = batches_per_epoch(source, batch_size, fraction, drop_last)
    check_policy(resize_policy)
    if augment not in ("imagenet", "flip", "none"):
        raise ValueError(f'expected `augment` "imagenet", "flip" or "none", got {augment!r}')
    for argument, value in (("seed", seed), ("epoch", epoch), ("workers", workers)):
        if value < 0:
            raise ValueError(f"expected `{argument}` of at least 0, got {value}")
    if size < 1:
        raise ValueError(f"expected `size` of at least 1, got {size}")
    if not 0 <= first_batch <= batches:
        raise ValueError(f"expected `first_batch` from 0 to {batches}, got {first_batch}")
    part, parts = shard
    if not 0 <= part < parts:
        raise ValueError(f"expected `shard` (k, n) with 0 <= k < n, got {shard}")
    _check_pinning(pin_memory)

    order = np.random.default_rng([seed, epoch]).permutation(len(source))
    order = order[: _epoch_images(source, fraction)]
    chunks = [order[k * batch_size : (k + 1) * batch_size] for k in range(first_batch, batches)]
    chunks = [c[len(c) * part // parts : len(c) * (part + 1) // parts] for c in chunks]
    draws = 1 + 2 * _CROP_TRIES + 2 if augment == "imagenet" else 1

    if augment != "imagenet" and isinstance(source, ArraySource) and _fits(source, size):
        return _array_batches(source, chunks, seed, epoch, augment == "flip", pin_memory)

    def load(index: int) -> NDArray[np.uint8]:
        image = source.image(index)
        chance = uniforms(seed, epoch, np.array([index]), draws)[0]
        if augment == "imagenet":
            box = random_crop(image.shape[0], image.shape[1], chance[1:])
            square = crop_and_resize(image, *box, size)
        else:
            square = resize(image, size, resize_policy)
        return square[:, ::-1] if augment != "none" and chance[0] < 0.5 else square

    return _file_batches(source, chunks, size, load, workers, pin_memory, strict, parts > 1)


def evaluation_batches(
    source: ImageSource,
    *,
    size: int,
    batch_size: int,
    workers: int = 0,
    policy: Policy = "crop",
    start: int = 0,
    stop: int | None = None,
    pin_memory: bool = False,
    boxes: bool = False,
) -> Iterator[ImageBatch]:
    """The images of a set in order, as squares, with the geometry that leads back.

    Images are decoded into the batch that is yielded, by whichever thread is free; of a long set
    nothing is kept but the few batches in the making.

    Args:
        source: The set.
        size: Side of the square images, in pixels.
        batch_size: Images per batch; a batch with errors holds fewer.
        workers: Threads that read ahead; 0 reads when a batch is asked for.
        policy: "crop" or "squash".
        start: First image.
        stop: Image to stop before; None is the end.
        pin_memory: Whether the images lie in pinned memory; needs an accelerator.
        boxes: Whether to read the true boxes too. An image whose boxes cannot be read is one that
            cannot be read.

    Yields:
        Batches; the last may be smaller.

    Raises:
        ValueError: An argument is out of its range (before the first batch).
    """
    check_policy(policy)
    for argument, value, least in (
        ("size", size, 1),
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
    ):
        if value < least:
            raise ValueError(f"expected `{argument}` of at least {least}, got {value}")
    stop = len(source) if stop is None else stop
    if not 0 <= start <= stop <= len(source):
        raise ValueError(
            f"expected 0 <= `start` <= `stop` <= {len(source)}, got start {start} and stop {stop}"
        )
    _check_pinning(pin_memory)

    def begin() -> Iterator[list[_Slot]]:
        for first in range(start, stop, batch_size):
            count = min(batch_size, stop - first)
            pixels = torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=pin_memory)
            yield [_Slot(first + k, k, pixels) for k in range(count)]

    def load(slot: _Slot) -> tuple[Geometry, NDArray[np.int32] | None]:
        image = source.image(slot.image)
        slot.pixels[slot.place].numpy()[...] = resize(image, size, policy)
        where = geometry(*size_of(image), size, policy)
        return where, _true_boxes(source, slot.image) if boxes else None

    return _image_batches(begin(), load, workers)


class _Slot(NamedTuple):
    """Where an image of a batch is to be written."""

    image: int
    place: int
    pixels: Tensor


def _true_boxes(source: ImageSource, index: int) -> NDArray[np.int32]:
    try:
        return source.boxes(index)
    except DecodeError:
        raise
    except ValueError as error:
        raise DecodeError(str(error)) from error


# --- chance ---------------------------------------------------------------------------------------


def uniforms(
    seed: int, epoch: int, indices: NDArray[np.integer], count: int
) -> NDArray[np.float64]:
    """Random numbers that belong to images, not to the order of the calls.

    A counter-based generator: SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", 2014) over (seed, epoch, index, k).

    Args:
        seed: 0 or more.
        epoch: 0 or more.
        indices: ``[n]`` image indices.
        count: Numbers per image.

    Returns:
        ``[n, count]`` in [0, 1).
    """
    key = _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))
    key = _mix(key + indices.astype(np.uint64))
    bits = _mix(key[:, None] + np.arange(count, dtype=np.uint64))
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53, np.float64)


def _mix(x: NDArray[Any]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)


def random_crop(height: int, width: int, chance: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """The rectangle of torchvision's RandomResizedCrop, from given random numbers.

    Up to ten draws of an area (8 to 100 %) and an aspect (3/4 to 4/3, log-uniform); the first
    that fits is placed at random. When none fits, the centre, as large as the aspect allows.

    Args:
        height: Of the image.
        width: Of the image.
        chance: ``[22]`` uniforms: area and aspect ten times, then top and left.

    Returns:
        top, left, height, width.
    """
    low, high = np.log(3 / 4), np.log(4 / 3)
    for k in range(_CROP_TRIES):
        pixels = height * width * (0.08 + 0.92 * chance[2 * k])
        aspect = np.exp(low + (high - low) * chance[2 * k + 1])
        w, h = round(float(np.sqrt(pixels * aspect))), round(float(np.sqrt(pixels / aspect)))
        if 0 < w <= width and 0 < h <= height:
            top = int(chance[-2] * (height - h + 1))
            left = int(chance[-1] * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = min(height, max(1, round(width / (3 / 4))))
    elif width / height > 4 / 3:
        w = min(width, max(1, round(height * (4 / 3))))
    return (height - h) // 2, (width - w) // 2, h, w


# --- batches --------------------------------------------------------------------------------------


def _epoch_images(source: ImageSource, fraction: float) -> int:
    return round(len(source) * fraction)


def _fits(source: ArraySource, size: int) -> bool:
    return source.images.shape[1:] == (size, size, 3)


def _check_pinning(pin_memory: bool) -> None:
    if pin_memory and not torch.accelerator.is_available():
        raise ValueError(
            "expected an accelerator for `pin_memory`, got none; pass pin_memory=False"
        )


def _pinned(tensor: Tensor, pin_memory: bool) -> Tensor:
    return tensor.pin_memory() if pin_memory else tensor


def _array_batches(
    source: ArraySource,
    chunks: list[NDArray[np.int64]],
    seed: int,
    epoch: int,
    flip: bool,
    pin_memory: bool,
) -> Iterator[TrainingBatch]:
    for chunk in chunks:
        pictures = source.images[chunk]
        if flip:
            mirrored = uniforms(seed, epoch, chunk, 1)[:, 0] < 0.5
            pictures[mirrored] = pictures[mirrored, :, ::-1]
        labels = source.labels[chunk]
        _check_labels(source, chunk.tolist(), labels.tolist())
        images = _pinned(torch.from_numpy(pictures), pin_memory)
        yield TrainingBatch(images, torch.from_numpy(labels), ())


def _file_batches(
    source: ImageSource,
    chunks: list[NDArray[np.int64]],
    size: int,
    load: Callable[[int], NDArray[np.uint8]],
    workers: int,
    pin_memory: bool,
    strict: bool,
    may_be_empty: bool,
) -> Iterator[TrainingBatch]:
    for chunk, results in _ahead([chunk.tolist() for chunk in chunks], load, workers):
        squares, labels, errors = [], [], []
        for index, result in zip(chunk, results, strict=True):
            if isinstance(result, DecodeError):
                errors.append(result)
            else:
                squares.append(result)
                labels.append(source.label(index))
        if errors and (strict or not (squares or may_be_empty)):
            raise errors[0]
        _check_labels(source, chunk, [source.label(index) for index in chunk])
        pixels = np.stack(squares) if squares else np.empty((0, size, size, 3), np.uint8)
        yield TrainingBatch(
            _pinned(torch.from_numpy(pixels), pin_memory),
            torch.tensor(labels, dtype=torch.int64),
            tuple(map(str, errors)),
        )


def _check_labels(source: ImageSource, indices: list[int], labels: list[int]) -> None:
    """Refuses a label that the classifier has no logit for."""
    classes = len(source.classes) or max(labels, default=0) + 1  # unknown names refuse no label
    for index, label in zip(indices, labels, strict=True):
        if label < 0:
            raise ValueError(
                f"expected a label for every training image of {source.name}, got none for "
                f"{source.image_id(index)}; put the images into class folders"
            )
        if label >= classes:
            raise ValueError(
                f"expected labels from 0 to {classes - 1}, one for each class of {source.name}, "
                f"got {label} for {source.image_id(index)}; name every class in `classes`"
            )


def _image_batches(
    slots: Iterator[list[_Slot]],
    load: Callable[[_Slot], tuple[Geometry, NDArray[np.int32] | None]],
    workers: int,
) -> Iterator[ImageBatch]:
    for batch, results in _ahead(slots, load, workers):
        read, geometries, truth, errors = [], [], [], []
        for slot, result in zip(batch, results, strict=True):
            if isinstance(result, DecodeError):
                errors.append((slot.image, str(result)))
            else:
                read.append(slot)
                geometries.append(result[0])
                if result[1] is not None:
                    truth.append(result[1])
        pixels = batch[0].pixels
        if errors:
            kept = pixels[[slot.place for slot in read]]
            pixels = _pinned(kept, pixels.is_pinned())
        yield ImageBatch(pixels, [slot.image for slot in read], geometries, errors, truth)


def _ahead(
    chunks: Iterable[list[_J]], load: Callable[[_J], _T], workers: int
) -> Iterator[tuple[list[_J], list[_T | DecodeError]]]:
    """Loads chunks in order, ``_AHEAD`` of them in the making; closing it drops what is left."""

    def attempt(job: _J) -> _T | DecodeError:
        try:
            return load(job)
        except DecodeError as error:
            return error

    if workers == 0:
        for chunk in chunks:
            yield chunk, [attempt(job) for job in chunk]
        return
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="casm-fast-loading")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        pending: deque[tuple[list[_J], list[Future[_T | DecodeError]]]] = deque()
        waiting = iter(chunks)
        for chunk in waiting:
            pending.append((chunk, [pool.submit(attempt, job) for job in chunk]))
            if len(pending) > _AHEAD:
                break
        while pending:
            chunk, futures = pending.popleft()
            yield chunk, [future.result() for future in futures]
            upcoming = next(waiting, None)
            if upcoming is not None:
                pending.append((upcoming, [pool.submit(attempt, job) for job in upcoming]))
