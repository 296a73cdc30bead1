"""Sanity checks: does a saliency map change when what it explains is destroyed?

Adebayo et al. 2018 (Sanity checks for saliency maps). The parameters of the classifier are
randomised from the output towards the input, cascading (each layer and all above it) or
independently (each layer alone), and the maps are compared with those of the trained classifier; or
the maps of two classifiers are compared, one trained on true labels and one on random ones. Maps
that stay alike do not depend on what was learnt.

* Layers are the modules that own parameters, in the order in which they begin to run on an image,
  last one first; modules that do not run, such as auxiliary heads, are none. To a layer belongs all
  within it that is no layer of its own.
* "reset" draws a layer anew by its own ``reset_parameters``, as PyTorch initialises it (batch
  normalisation goes back to the identity). Parameters of a module that has no such method, such as
  the class token of a transformer, are permuted. "permute" shuffles the values of every parameter.
* The classes that are explained stay those of the trained classifier.
* The caller's model is copied; it stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from casm_fast.evaluation.asking import logits
from casm_fast.evaluation.intervals import Interval, bootstrap
from casm_fast.evaluation.measures import MEASURES, similarity
from casm_fast.evaluation.outcomes import PER_IMAGE_LAST, paragraph
from casm_fast.models.borrowing import as_images, borrowed, find_module

Order = Literal["cascading", "independent"]
How = Literal["reset", "permute"]

MakeMaps = Callable[[nn.Module, Tensor, Any], Tensor]
"""Makes maps ``[B, 1, H, W]`` from a classifier, images and classes, such as
``functools.partial(casm_fast.attribute, "gradient")``."""

ROOT = "(itself)"
"""The step of parameters that the classifier itself owns, outside all its modules."""

TITLES = {
    "spearman": "rank correlation",
    "spearman_abs": "of absolutes",
    "ssim": "SSIM",
    "hog": "HOG",
}


@dataclass(frozen=True, eq=False)
class SanityCheck:
    """How alike maps are to those of the trained classifier. ``str(check)`` is the printed table.

    Attributes:
        values: ``[steps, measures, B]``; NaN where a measure is not defined.
        steps: What was randomised, by step.
        measures: Names of the measures.
        convention: How it was done.
    """

    values: NDArray[np.float64] = field(metadata=PER_IMAGE_LAST)
    steps: tuple[str, ...]
    measures: tuple[str, ...]
    convention: str

    def interval(self, step: str, measure: str, **told: Any) -> Interval:
        """The mean of a measure over the images where it is defined; options of `bootstrap`.

        Raises:
            ValueError: There is no such step or measure, or it is defined for no image.
        """
        for name, one, known in (("step", step, self.steps), ("measure", measure, self.measures)):
            if one not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {one!r}")
        values = self.values[self.steps.index(step), self.measures.index(measure)]
        return bootstrap(values[np.isfinite(values)], **told)

    def __str__(self) -> str:
        width = max(map(len, self.steps))
        lines = ["Similarity to the maps of the trained classifier, 1 = the same", ""]
        lines.append("  ".join([" " * (width + 2), *(f"{TITLES[m]:>20}" for m in self.measures)]))
        for row, step in enumerate(self.steps):
            cells = [
                self.interval(step, m).show(".2f") if np.isfinite(values).any() else "undefined"
                for m, values in zip(self.measures, self.values[row], strict=True)
            ]
            lines.append("  ".join([f"  {step:<{width}}", *(f"{cell:>20}" for cell in cells)]))
        undefined = int((~np.isfinite(self.values)).sum())
        if undefined:
            lines.append(f"  ({undefined} values undefined: a map is constant)")
        return "\n".join([*lines, "", paragraph(self.convention)])


def parameter_randomisation(
    classifier: nn.Module,
    images: Tensor,
    targets: Any,
    maps: MakeMaps,
    *,
    order: Order = "cascading",
    layers: Sequence[str] | None = None,
    depth: int | None = None,
    how: How = "reset",
    measures: tuple[str, ...] = MEASURES,
    seed: int = 0,
) -> SanityCheck:
    """Randomise a classifier's layers from the output down, and compare its maps at each step.

    Args:
        classifier: A trained module; it is copied.
        images: ``[B, C, H, W]``, normalised for it.
        targets: The classes to explain, in whatever form `maps` takes; None: the best class of each
            image by the trained classifier.
        maps: The method.
        order: "cascading" or "independent".
        layers: Names of modules from top to bottom; None: those that own parameters.
        depth: Layers that agree in so many parts of their name make one step: "layer4.1.conv1"
            and "layer4.1.bn1" at 2. None: each its own step.
        how: "reset" or "permute".
        measures: Out of `casm_fast.evaluation.measures.MEASURES`.
        seed: Of the random parameters; a layer gets the same ones in both orders.

    Returns:
        The measures at each step, for `join` over the batches of a data set.

    Raises:
        TypeError: The classifier is no module, or the images are no floating-point tensor.
        ValueError: An unknown order, way or layer; or as `similarity`.
    """
    for name, value, kind in (("order", order, Order), ("how", how, How)):
        if value not in get_args(kind):
            raise ValueError(f"{name}: expected {' or '.join(get_args(kind))}, got {value!r}")
    if not isinstance(classifier, nn.Module):
        raise TypeError(
            f"classifier: expected a module to randomise, got {type(classifier).__name__}"
        )
    if depth is not None and depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}")
    classes = _classes(classifier, images, targets)
    for layer in layers or ():
        find_module(classifier, layer)
    names = list(layers) if layers is not None else layers_from_top(classifier, images)
    steps: dict[str, list[str]] = {}
    for layer in names:
        steps.setdefault(".".join(layer.split(".")[:depth]) or ROOT, []).append(layer)
    trained = maps(classifier, images, classes)
    found, permuted = [], set()
    current = copy.deepcopy(classifier)
    for members in steps.values():
        if order == "independent":
            current = copy.deepcopy(classifier)
        for member in members:
            permuted.update(randomise(current, member, how, seed, without=names))
        measured = similarity(trained, maps(current, images, classes), measures)
        found.append(np.stack([measured[name] for name in measures]))
    ways = {"reset": "drawn anew by reset_parameters", "permute": "permuted"}
    also = f" (permuted: {', '.join(sorted(permuted))})" if permuted and how == "reset" else ""
    return SanityCheck(
        values=np.stack(found),
        steps=tuple(steps),
        measures=measures,
        convention=(
            f"{order} randomisation from the output down, parameters {ways[how]}{also}, seed "
            f"{seed}; {'given' if targets is not None else 'predicted'} classes of the trained "
            f"classifier; {_MEASURED}"
        ),
    )


def data_randomisation(
    classifier: nn.Module,
    other: nn.Module,
    images: Tensor,
    targets: Any,
    maps: MakeMaps,
    *,
    measures: tuple[str, ...] = MEASURES,
) -> SanityCheck:
    """Compare the maps of a classifier with those of one that was trained on random labels.

    Args:
        classifier: Trained on the true labels.
        other: The same network, trained on permuted labels.
        images: ``[B, C, H, W]``, normalised for both.
        targets: As for `parameter_randomisation`.
        maps: The method.
        measures: Out of `casm_fast.evaluation.measures.MEASURES`.

    Returns:
        The measures in one step.

    Raises:
        ValueError: As `similarity`.
    """
    classes = _classes(classifier, images, targets)
    found = similarity(maps(classifier, images, classes), maps(other, images, classes), measures)
    return SanityCheck(
        values=np.stack([found[name] for name in measures])[None],
        steps=("random labels",),
        measures=measures,
        convention=(
            "the same network trained on random labels; "
            f"{'given' if targets is not None else 'predicted'} classes of the classifier with "
            f"true labels; {_MEASURED}"
        ),
    )


_MEASURED = (
    "SSIM in 5 x 5 windows and HOG in cells of 16 x 16 of maps scaled to [-1, 1]; mean over the "
    "images where defined"
)


def layers_from_top(classifier: nn.Module, images: Tensor) -> list[str]:
    """Names of the modules that own parameters, in the order in which they begin, last one first.

    Args:
        classifier: A copy of it is run on the first image.
        images: ``[B, C, H, W]``.

    Returns:
        Names; "" for the parameters of the classifier itself, such as the class token of a
        transformer.

    Raises:
        ValueError: No module with parameters runs.
    """
    probe = copy.deepcopy(classifier).eval()
    begun: dict[str, None] = {}
    for name, module in probe.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_note(begun, name))
    with torch.no_grad():
        probe(as_images(classifier, images)[:1])
    if not begun:
        raise ValueError("classifier: expected a module with parameters that runs, got none")
    return list(begun)[::-1]


def _note(begun: dict[str, None], name: str) -> Callable[..., None]:
    def hook(*_: object) -> None:
        begun.setdefault(name)

    return hook


def randomise(
    model: nn.Module, layer: str, how: How = "reset", seed: int = 0, without: Sequence[str] = ()
) -> list[str]:
    """Randomise the parameters of a layer in place, and of all within it.

    Args:
        model: Holds it.
        layer: Its name.
        how: "reset" or "permute".
        seed: Of the random numbers, which depend on the name, too; torch's own generators stay as
            they were.
        without: Names of modules that stay, with all within them, where they lie in the layer.

    Returns:
        Names of the parameters that were permuted.
    """
    module = model.get_submodule(layer)
    inside = f"{layer}." if layer else ""
    kept = [f"{name}." for name in without if name and name.startswith(inside) and name != layer]
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.is_cuda})
    permuted = []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(_seed(seed, layer))
        for name, part in module.named_modules(prefix=layer):
            own = list(part.named_parameters(recurse=False))
            if not own or any(f"{name}.".startswith(other) for other in kept):
                continue
            reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
            if how == "reset" and callable(reset):
                reset()
                continue
            for parameter, values in own:
                order = torch.randperm(values.numel()).to(values.device)
                values.copy_(values.flatten()[order].view_as(values))
                permuted.append(f"{name}.{parameter}".lstrip("."))
    return permuted


def _seed(seed: int, layer: str) -> int:
    """A seed that differs from layer to layer and is the same in every process."""
    return int(np.random.SeedSequence([seed, *layer.encode()]).generate_state(1)[0])


def _classes(classifier: nn.Module, images: Tensor, targets: Any) -> Any:
    """The given classes, or the best ones of the trained classifier, ``[B]``."""
    if targets is not None:
        return targets
    with torch.no_grad(), borrowed(classifier) as lent:
        return logits(lent, as_images(classifier, images)).argmax(dim=1)
