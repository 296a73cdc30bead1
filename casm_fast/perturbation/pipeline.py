"""Masks for a batch of images, from the caller's classifier."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from casm_fast import ops
from casm_fast.models.saliency import SaliencyModel
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.descent import Descent, descend, evaluate
from casm_fast.perturbation.judging import Judge, Targets, borrowed, token_grid
from casm_fast.perturbation.result import Curves, Perturbation
from casm_fast.perturbation.showing import pictures, shifts
from casm_fast.perturbation.start import first_masks

logger = logging.getLogger(__name__)

MASK_SIZE = (28, 28)
"""The paper's mask, 224 pixels at scale 8."""

FREE_SHARE = 0.5
"""Of the free memory that one batch may take."""

HOST_MOST = 4 * 2**30
"""Bytes that it takes on the CPU at most: there larger batches are no faster."""

ROSE = 0.1
"""Share of the first objective's size (at least of 1) by which it may rise."""


def perturb(
    classifier: nn.Module | Callable[[Tensor], Any],
    images: Tensor | Sequence[Tensor],
    targets: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    config: PerturbConfig | None = None,
    **overrides: Any,
) -> Perturbation:
    """Learn for each image which region the classifier's score needs.

    Meaningful perturbation (Fong & Vedaldi 2017), for a batch of independent problems at once: an
    image gets the mask that it would get alone, up to rounding.

    Args:
        classifier: Any module or function from images to logits ``[B, K]`` (of a tuple, the first
            counts). It runs in eval mode and is given back exactly as it was, also after an
            exception: modes, requires_grad, hooks, buffers, gradients.
        images: ``[B, C, H, W]``, normalised for the classifier, floating point, on its device; or a
            list of ``[C, H, W]`` of one size. Any size, square or not.
        targets: Classes: one for all, one per image (``[B]``), or several per image (``[B, n]``, or
            lists; -1 fills up), whose scores are summed. None: each image's `top_k` best classes.
        config: Options; the paper's when not given.
        **overrides: Fields of :class:`PerturbConfig` by name.

    Returns:
        Masks, perturbed images, scores before and after, and curves.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: An image is not finite, sizes differ, a target is no class, the classifier gives
            no logits, a layer does not exist, or an option is out of range.
        torch.OutOfMemoryError: Not even one image fits into memory.
    """
    config = dataclasses.replace(config or PerturbConfig(), **overrides)
    if config.layer is not None and (
        config.perturbation != "constant" or config.colour is not None
    ):
        raise ValueError(
            "perturbation: expected 'constant' without a colour beside a layer, whose "
            f"activation is dropped out, got {config.perturbation!r}; "
            "start from PerturbConfig.preset('layers')"
        )
    if isinstance(classifier, SaliencyModel):
        classifier = classifier.classifier
    with torch.inference_mode(False), torch.no_grad():
        batch = as_images(classifier, images)
        with borrowed(classifier, config) as judge:
            return _Solver(judge, batch, targets).solve()


class _Solver:
    """The images on their way through the steps, in chunks that fit into memory."""

    def __init__(self, judge: Judge, images: Tensor, targets: Any) -> None:
        self.judge, self.config = judge, judge.config
        self.images = images
        self.still = torch.zeros(2, dtype=torch.int32, device=images.device)
        self.shifts = shifts(self.config).to(images.device)
        logits = judge.logits(pictures(images[:1], self.config), None, self.still)
        self.classes = logits.shape[1]
        self.targets = as_targets(targets, len(images), self.classes, self.config)
        self.mask_size = self._mask_size()

    def solve(self) -> Perturbation:
        parts: list[Perturbation] = []
        start, size = 0, min(self._fitting(), len(self.images))
        while start < len(self.images):
            part = slice(start, start + size)
            try:
                solved = self._part(part, size)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not _out_of_memory(error):
                    raise
                solved = None
            if solved is None:  # the failed batch is forgotten by now
                size = (size + 1) // 2
                logger.info("out of memory: going on with %d images at once", size)
                if self.images.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            parts.append(solved)
            start += size
        return _joined(parts, size)

    def _part(self, part: slice, size: int) -> Perturbation:
        """The masks of some images at once."""
        judge, config = self.judge, self.config
        still = pictures(self.images[part], config)
        logits = judge.logits(still, None, self.still)
        if self.targets is None:
            classes = logits.topk(config.top_k, dim=1).indices
        else:
            classes = self.targets[part].to(logits.device)
        targets = Targets(classes)
        before = judge.scores(still, None, self.still, targets)
        first = first_masks(judge, still, targets, before, self.mask_size, config, size)
        room = config.jitter if config.jitter > 1 else 0
        made = descend(judge, still.enlarged(room), targets, first, self.shifts)
        diverged = made.broken | _rose(made)
        masks = torch.where(diverged[:, None, None, None], made.best, made.masks)
        inner = config.layer is not None
        full = ops.upsample_mask(masks, still.size, 0.0 if inner else config.mask_sigma)
        return Perturbation(
            masks=masks,
            masks_full=full,
            perturbed=None if inner else still.shown(masks, self.still),
            targets=classes,
            score_before=before,
            score_after=judge.scores(still, masks, self.still, targets),
            score_hidden=judge.scores(still, torch.zeros_like(masks), self.still, targets),
            diverged=diverged,
            steps=made.steps,
            first_masks=first,
            curves=Curves(*made.history.unbind(dim=1)),
            config=config,
            batch_size=size,
        )

    def _mask_size(self) -> tuple[int, int]:
        config, judge = self.config, self.judge
        if config.mask_size is not None:
            return config.mask_size
        if config.layer is not None:
            if judge.visits != 1:
                raise ValueError(
                    "layer: expected a module that runs once for an image, "
                    f"got {config.layer!r}, which runs {judge.visits} times; name its parent or "
                    "a neighbour"
                )
            if len(judge.activation) == 4:
                return judge.activation[2], judge.activation[3]
            return token_grid(judge.activation, config.layer)[1:]
        if config.mask_scale is not None:
            H, W = (max(1, round(side / config.mask_scale)) for side in self.images.shape[2:])
            return H, W
        return MASK_SIZE

    def _fitting(self) -> int:
        """How many images one batch may hold."""
        if self.config.batch_size is not None:
            return self.config.batch_size
        if len(self.images) == 1:
            return 1
        budget = (
            _free(self.images.device) * FREE_SHARE
            if self.config.memory_budget is None
            else self.config.memory_budget * 2**30
        )
        return max(1, int(budget / self._footprint()))

    def _footprint(self) -> int:
        """Bytes that one image takes: twice what autograd keeps for a step, for the work on it."""
        kept: dict[int, int] = {}
        own = (
            {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
            if isinstance(module := self.judge.classifier, nn.Module)
            else set()
        )

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        still = pictures(self.images[:1], self.config)
        targets = Targets(torch.zeros(1, 1, dtype=torch.int64, device=self.images.device))
        mask = self.images.new_full((1, 1, *self.mask_size), 0.5)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            evaluate(self.judge, still, targets, mask, self.still)
        return 2 * sum(kept.values()) + 8 * self.images[:1].nbytes


def _rose(made: Descent) -> Tensor:
    """Which objectives ended above where they began, ``[B]``."""
    objective = made.history[:, 0]
    begin = objective[:, 0]
    place = torch.arange(objective.shape[1], device=objective.device)
    late = (place >= made.steps[:, None] * 9 // 10) & (place < made.steps[:, None])
    end = objective.masked_fill(~late, 0).sum(dim=1) / late.sum(dim=1)
    rose: Tensor = end > begin + ROSE * begin.abs().clamp(min=1)
    return rose


def _joined(parts: list[Perturbation], size: int) -> Perturbation:
    def join(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        if isinstance(values[0], Curves):
            columns = zip(*(vars(curves).values() for curves in values), strict=True)
            return Curves(*(torch.cat(column) for column in columns))
        return values[0]

    names = [field.name for field in dataclasses.fields(Perturbation)]
    joined = {name: join([getattr(part, name) for part in parts]) for name in names}
    return Perturbation(**{**joined, "batch_size": size})


# ---------------------------------------------------------------- memory


def _free(device: torch.device) -> float:
    """Bytes."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return min(float(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")), HOST_MOST / FREE_SHARE)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error)  # torch's CPU allocator has no class of its own


# ---------------------------------------------------------------- checks


def as_images(classifier: Any, images: Any) -> Tensor:
    """The images as ``[B, C, H, W]``, float32 or float64, apart from the caller's graph."""
    if isinstance(images, (list, tuple)) and images and all(_is_tensor(one) for one in images):
        sizes = sorted({tuple(one.shape) for one in images})
        if len(sizes) > 1:
            raise ValueError(
                f"images: expected images of one size in a call, got {len(sizes)} sizes such as "
                f"{list(sizes[0])} and {list(sizes[1])}; call once for each size, or resize them"
            )
        images = torch.stack(list(images))
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor [B, C, H, W], got {type(images).__name__}")
    if not images.is_floating_point():
        got = str(images.dtype).removeprefix("torch.")
        raise TypeError(
            f"images: expected floating point, normalised for the classifier, got {got}"
        )
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(
            f"images: expected at least one image [B, C, H, W], got {list(images.shape)}"
        )
    _check_device(classifier, images)
    batch: Tensor = images.detach()
    batch = batch.clone() if batch.is_inference() else batch
    batch = batch.to(torch.float64 if batch.dtype == torch.float64 else torch.float32)
    bad = torch.nonzero(~batch.isfinite().flatten(1).all(dim=1))[:, 0].tolist()
    if bad:
        raise ValueError(f"images: expected finite values, got NaN or infinity in image {bad[0]}")
    return batch


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _check_device(classifier: Any, images: Tensor) -> None:
    if isinstance(classifier, nn.Module):
        for parameter in classifier.parameters():
            if parameter.device != images.device:
                raise ValueError(
                    f"images: expected on the device of the classifier ({parameter.device}), "
                    f"got {images.device}"
                )


def as_targets(targets: Any, count: int, classes: int, config: PerturbConfig) -> Tensor | None:
    """``[B, n]`` int64 on the host, filled up with -1; None for the best classes of each."""
    if targets is None:
        if config.top_k > classes:
            raise ValueError(f"top_k: expected at most {classes}, the classes, got {config.top_k}")
        return None
    if config.top_k != 1:
        raise ValueError(
            f"targets: expected None beside top_k = {config.top_k}, which takes each image's best "
            "classes, got targets; give one of the two"
        )
    given = targets.tolist() if isinstance(targets, Tensor) else targets
    each = [given] * count if type(given) is int else given
    rows: list[list[int]] = []
    if isinstance(each, (list, tuple)):
        rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in each]
    if not rows or any(type(one) is not int for row in rows for one in row):
        raise TypeError(
            "targets: expected classes as integers, one or several for each image, "
            f"got {type(targets).__name__}"
        )
    if len(rows) != count:
        raise ValueError(f"targets: expected classes for {count} images, got {len(rows)}")
    for number, row in enumerate(rows):
        bad = [one for one in row if not -1 <= one < classes]
        if bad or not any(one >= 0 for one in row):
            got = bad[0] if bad else "none"
            raise ValueError(
                f"targets: expected classes in 0 ... {classes - 1}, got {got} for image {number}"
            )
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64)
