"""Many classifiers: do maps of no single classifier hold what every classifier needs?

CASM, section 6.2 and figure 3: the accuracy of many classifiers on masked-in images (only what the
map marks is left), on masked-out images (it is gone), and on masked-out images whose holes are
filled from their surroundings. A good map keeps the first high, and the others low for all of them.

What a map marks are the cells of at least its mean (eq. 9), every one of them; removed pixels are
black, as in the authors' evaluation, or the mean colour of training (0 in the normalised input).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from casm_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from casm_fast.evaluation.asking import ask, passes
from casm_fast.evaluation.intervals import Interval, bootstrap
from casm_fast.evaluation.maps import Maps, as_maps, check_cells
from casm_fast.evaluation.outcomes import PER_IMAGE_LAST, paragraph
from casm_fast.models.borrowing import Classifies, as_images, borrowed

Removed = Literal["black", "mean"]

FORMS = ("whole", "masked-in", "masked-out")
"""What classifiers are shown; and "inpainted", where such images are given."""


@dataclass(frozen=True, eq=False)
class ManyClassifiers:
    """Which classifiers are right about which images. ``str(many)`` is the printed table.

    Attributes:
        right: ``[classifiers, forms, B]``.
        classifiers: Their names.
        forms: What they were shown.
        convention: How the images were made.
    """

    right: NDArray[np.bool_] = field(metadata=PER_IMAGE_LAST)
    classifiers: tuple[str, ...]
    forms: tuple[str, ...]
    convention: str

    def interval(self, form: str, classifier: str | None = None, **told: Any) -> Interval:
        """The accuracy on a form of the images with its bootstrap interval.

        Args:
            form: One of ``forms``.
            classifier: One of them; None: the mean over all, each image with what they make of it.
            **told: Options of `casm_fast.evaluation.bootstrap`.
        """
        known = (("form", form, self.forms), ("classifier", classifier, self.classifiers))
        for name, value, names in known:
            if value is not None and value not in names:
                raise ValueError(f"{name}: expected one of {', '.join(names)}, got {value!r}")
        right = self.right[:, self.forms.index(form)].astype(np.float64)
        if classifier is not None:
            return bootstrap(right[self.classifiers.index(classifier)], **told)
        return bootstrap(right.mean(axis=0), **told)

    def __str__(self) -> str:
        names = (*self.classifiers, "mean")
        width = max(map(len, names))
        lines = [f"Accuracy in percent over {self.right.shape[2]:,} images", ""]
        lines.append("  ".join([" " * (width + 2), *(f"{form:>18}" for form in self.forms)]))
        for name in names:
            one = None if name == "mean" else name
            cells = [self.interval(form, one).show(scale=100) for form in self.forms]
            lines.append("  ".join([f"  {name:<{width}}", *(f"{cell:>18}" for cell in cells)]))
        return "\n".join([*lines, "", paragraph(self.convention)])


def many_classifiers(
    classifiers: Mapping[str, Classifies],
    images: Tensor | Sequence[Tensor],
    maps: Maps,
    labels: ArrayLike,
    *,
    inpainted: Tensor | None = None,
    alpha: float = 1.0,
    removed: Removed = "black",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    batch_size: int | None = None,
    memory_budget: float | None = None,
) -> ManyClassifiers:
    """Ask many classifiers about what maps mark and about what is left.

    Args:
        classifiers: By name; they are given back exactly as they were.
        images: ``[B, 3, H, W]``, normalised for all of them.
        maps: ``[B, 1, h, w]`` or ``[B, h, w]``, 1 = salient; H and W are multiples of h and w.
        labels: ``[B]``.
        inpainted: The masked-out images with their holes filled, ``[B, 3, H, W]``.
        alpha: Cells of at least so many times the mean of the map are marked.
        removed: What removed pixels become.
        mean: Of the normalisation, which says what black is.
        std: Of the normalisation.
        batch_size: Images in one pass; None: as many as memory_budget holds.
        memory_budget: GiB for one pass; None: half of what is free, on the CPU at most 4.

    Returns:
        The answers about each image, for `join` over the batches of a data set.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: No classifier, or what is given for the images does not fit them.
    """
    if removed not in get_args(Removed):
        raise ValueError(f"removed: expected black or mean, got {removed!r}")
    if not classifiers:
        raise ValueError("classifiers: expected at least one, got none")
    forms = FORMS if inpainted is None else (*FORMS, "inpainted")
    rows = []
    for classifier in classifiers.values():
        with torch.inference_mode(False), torch.no_grad(), borrowed(classifier) as lent:
            batch = as_images(classifier, images)
            truth = torch.as_tensor(np.asarray(labels), device=batch.device)
            if truth.shape != batch.shape[:1]:
                raise ValueError(f"labels: expected {[len(batch)]}, got {list(truth.shape)}")
            hole = torch.zeros(1, 1, 1, 1).to(batch)
            if removed == "black":
                hole = (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1).to(batch)
            kept = marked(maps, (batch.shape[2], batch.shape[3]), alpha).to(batch.device)
            views = {
                "whole": batch,
                "masked-in": torch.where(kept, batch, hole),
                "masked-out": torch.where(kept, hole, batch),
            }
            if inpainted is not None:
                if inpainted.shape != batch.shape:
                    raise ValueError(
                        f"inpainted: expected {list(batch.shape)}, got {list(inpainted.shape)}"
                    )
                views["inpainted"] = inpainted.detach().to(batch)
            size = passes(lent, batch, batch_size, memory_budget)

            def right(values: Tensor, part: slice, truth: Tensor = truth) -> Tensor:
                return values.argmax(dim=1) == truth[part]

            rows.append(
                torch.stack(
                    [
                        ask(lent, len(batch), views[form].__getitem__, right, size, batch.device)
                        for form in forms
                    ]
                ).cpu()
            )
    gone = {"black": "black", "mean": "the mean colour of training"}[removed]
    return ManyClassifiers(
        right=torch.stack(rows).numpy(),
        classifiers=tuple(classifiers),
        forms=forms,
        convention=(
            f"marked: cells of at least {alpha:g} times the mean of the map, all of them; removed "
            f"pixels are {gone}; the first guess counts"
        ),
    )


def marked(maps: Maps, size: tuple[int, int], alpha: float = 1.0) -> Tensor:
    """What maps mark at full size: the cells of at least alpha times their mean (CASM, eq. 9).

    Args:
        maps: ``[B, 1, h, w]`` or ``[B, h, w]``.
        size: ``(H, W)``, multiples of h and w.
        alpha: Factor.

    Returns:
        ``[B, 1, H, W]`` bool.

    Raises:
        ValueError: Sides that are no multiples.
    """
    values = as_maps("many_classifiers", maps).double()
    (H, W), (h, w) = size, values.shape[1:]
    check_cells(values, (H, W))
    level = values.mean(dim=(1, 2), keepdim=True)
    # Rounding must not lift the mean of a constant map above the map.
    level = level.minimum(values.amax(dim=(1, 2), keepdim=True))
    kept = values >= alpha * level
    return kept.repeat_interleave(H // h, 1).repeat_interleave(W // w, 2)[:, None]
