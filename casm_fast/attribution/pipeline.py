"""`attribute`: saliency maps of a batch of images by the name of a method."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from casm_fast.attribution.methods import METHODS
from casm_fast.attribution.problem import Method, Problem, Score
from casm_fast.models.borrowing import Classifies, as_images, borrowed
from casm_fast.models.memory import budget, footprint, in_parts
from casm_fast.models.targets import Targets, as_targets


def attribute(
    method: str,
    classifier: Classifies,
    images: Tensor | Sequence[Tensor],
    targets: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    *,
    score: Score | None = None,
    batch_size: int | None = None,
    memory_budget: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """Make a saliency map for each image: what its score owes to which pixel.

    Args:
        method: A name of `METHODS`, such as "grad_cam"; `casm_fast.attribution.listing` tells all.
        classifier: Any module or function from images to logits ``[B, K]`` (of a tuple, the first
            counts). It runs in eval mode and is given back exactly as it was, also after an
            exception: modes, requires_grad, hooks, buffers, gradients.
        images: ``[B, C, H, W]``, normalised for the classifier, floating point, on its device; or a
            list of ``[C, H, W]`` of one size. Any size, square or not.
        targets: Classes: one for all, one per image (``[B]``), or several per image (``[B, n]``, or
            lists; -1 fills up), whose scores are summed. None: each image's best class.
        score: What is explained: the class's logit, its probability, or its log-probability. None:
            what the method's paper explains, mostly the logit (supplement, section 3).
        batch_size: Images in one pass of the classifier; None: as many as memory_budget holds.
            Halved when memory runs out.
        memory_budget: GiB for one batch; None: half of what is free, on the CPU at most 4.
        seed: Of random numbers, for methods that draw any.
        **options: Those of the method; see ``METHODS[method].options``.

    Returns:
        ``[B, 1, H, W]`` in the dtype of the images (float32 for 16-bit ones), on their device;
        higher is more salient. Scale and sign are the method's own.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: There is no such method, option, layer or class; an image is not finite; sizes
            differ; or the classifier gives no logits.
        torch.OutOfMemoryError: Not even one image fits into memory.
    """
    chosen = find(method)
    told = _options(chosen, options)
    judged = chosen.score if score is None else score
    if judged not in get_args(Score):
        known = ", ".join(get_args(Score))
        raise ValueError(f"score: expected one of {known}, got {score!r}")
    for name, value in (("batch_size", batch_size), ("memory_budget", memory_budget)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")
    with torch.inference_mode(False), torch.no_grad():
        batch = as_images(classifier, images)
        with borrowed(classifier) as lent:
            first = Problem(lent, batch[:1], Targets(torch.zeros(1, 1)), judged)
            classes = first.logits(batch[:1]).shape[1]
            given = as_targets(targets, len(batch), classes)
            size = batch_size or _fitting(first, memory_budget)

            def work(part: slice) -> Tensor:
                some = batch[part]
                problem = dataclasses.replace(
                    first,
                    images=some,
                    batch_size=size,
                    asked=given is not None,
                    seed=seed,
                    lender=classifier,
                )
                if given is None:
                    best = problem.logits(some).argmax(dim=1, keepdim=True)
                else:
                    best = given[part].to(some.device)
                problem = dataclasses.replace(problem, targets=Targets(best))
                made = chosen.maps(problem, told)
                if made.shape != (len(some), 1, *some.shape[2:]):
                    raise RuntimeError(
                        f"{method}: expected maps {[len(some), 1, *some.shape[2:]]}, "
                        f"got {list(made.shape)}"
                    )
                return made.detach().to(some.dtype)

            return torch.cat([made for made, _ in in_parts(len(batch), size, work, batch.device)])


def find(method: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: There is none; the message names the closest.
    """
    if method in METHODS:
        return METHODS[method]
    close = difflib.get_close_matches(str(method), METHODS, n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(close)}?" if close else ", ".join(METHODS)
    raise ValueError(f"method: expected the name of a method, got {method!r}: {known}")


def listing() -> str:
    """Every method with its paper, for a terminal."""
    width = max(map(len, METHODS))
    return "\n".join(f"  {name:<{width}}  {m.title} ({m.paper})" for name, m in METHODS.items())


def _options(method: Method, given: dict[str, Any]) -> Any:
    known = [option.name for option in dataclasses.fields(method.options)]
    for name in given:
        if name not in known:
            raise ValueError(
                f"{method.name}: expected an option out of {', '.join(known) or 'none'}, "
                f"got {name!r}"
            )
    return method.options(**given)


def _fitting(problem: Problem, gibibytes: float | None) -> int:
    """How many images one pass may hold."""
    module = problem.classifier

    def run() -> None:
        with torch.enable_grad():
            problem.logits(problem.images.detach().requires_grad_())

    kept = footprint(run, module.parameters() if isinstance(module, nn.Module) else ())
    one = kept + 8 * problem.images.nbytes
    return max(1, int(budget(problem.images.device, gibibytes) / one))
