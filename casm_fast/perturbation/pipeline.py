"""Masks for a batch of images, from the caller's classifier."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from casm_fast import ops
from casm_fast.models.borrowing import Classifies, as_images, token_grid
from casm_fast.models.memory import budget, footprint, in_parts
from casm_fast.models.targets import Targets, as_targets
from casm_fast.perturbation.config import PerturbConfig
from casm_fast.perturbation.descent import Descent, descend, evaluate
from casm_fast.perturbation.judging import Judge, judging
from casm_fast.perturbation.result import Curves, Perturbation
from casm_fast.perturbation.showing import pictures, shifts
from casm_fast.perturbation.start import first_masks

logger = logging.getLogger(__name__)

MASK_SIZE = (28, 28)
"""The paper's mask, 224 pixels at scale 8."""

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

ROSE = 0.1
"""Share of the first objective's size (at least of 1) by which it may rise."""


def perturb(
    classifier: Classifies,
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
    with torch.inference_mode(False), torch.no_grad():
        batch = as_images(classifier, images)
        if config.cuda_graph and batch.device.type != "cuda":
            raise ValueError(
                f"cuda_graph: expected images on a CUDA device, got {batch.device.type}; "
                "leave cuda_graph off"
            )
        with judging(classifier, config) as judge:
            return _Solver(judge, batch, targets).solve()


class _Solver:
    """The images on their way through the steps, in chunks that fit into memory."""

    def __init__(self, judge: Judge, images: Tensor, targets: Any) -> None:
        self.judge, self.config = judge, (config := judge.config)
        self.images = images
        self.still = torch.zeros(2, dtype=torch.int32, device=images.device)
        self.shifts = shifts(config).to(images.device)
        logits = judge.logits(pictures(images[:1], config), None, self.still)
        self.classes = logits.shape[1]
        self.targets = as_targets(targets, len(images), self.classes, config.top_k)
        self.mask_size = self._mask_size()
        self.layout = torch.preserve_format

    def solve(self) -> Perturbation:
        parts: list[Perturbation] = []
        size = self._fitting()
        self.layout = self._layout()
        for solved, used in in_parts(len(self.images), size, self._part, self.images.device):
            parts.append(solved)
            size = used
        return _joined(parts, size)

    def _part(self, part: slice) -> Perturbation:
        """The masks of some images at once."""
        judge, config, size = self.judge, self.config, part.stop - part.start
        still = pictures(self.images[part], config, self.layout)
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
        room = budget(self.images.device, self.config.memory_budget)
        return max(1, int(room / self._footprint()))

    def _layout(self) -> torch.memory_format:
        """How the images lie in memory.

        On a CPU with their channels last: AlexNet, GoogLeNet, ResNet-50 and VGG-16 are faster so
        with any number of images, networks of few layers no slower. On a GPU in mixed precision:
        there a convolution of contiguous images turns them, and turns the result back.
        """
        if self.config.layout != "auto":
            return LAYOUTS[self.config.layout]
        images = self.images
        faster = images.device.type == "cpu" or self.config.amp != "off"
        if faster and images.dtype == torch.float32:
            try:
                self._trial(LAYOUTS["channels_last"])
            except RuntimeError as error:  # such as a view of activations
                logger.info("the classifier takes no channels_last images: %s", error)
            else:
                return LAYOUTS["channels_last"]
        return torch.preserve_format

    def _footprint(self) -> int:
        """Bytes that one image takes in a step."""
        module = self.judge.classifier
        own = module.parameters() if isinstance(module, nn.Module) else ()
        return footprint(self._trial, own) + 8 * self.images[:1].nbytes

    def _trial(self, layout: torch.memory_format = torch.preserve_format) -> None:
        """A step of one image, without consequences."""
        still = pictures(self.images[:1], self.config, layout)
        targets = Targets(torch.zeros(1, 1, dtype=torch.int64, device=self.images.device))
        mask = self.images.new_full((1, 1, *self.mask_size), 0.5)
        evaluate(self.judge, still, targets, mask, self.still)


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
