"""Gradient: how fast the score changes with each pixel.

The map is the maximum over the colours of the absolute gradient of the score (Simonyan, Vedaldi &
Zisserman 2014, section 3.1; supplement of Fong & Vedaldi 2017, section 3)::

    casm_fast.attribute("gradient", classifier, images, targets)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from casm_fast.attribution.problem import Method, Problem


@dataclass(frozen=True)
class Options:
    """The gradient has none."""


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]``, not negative."""
    del options
    return strongest(image_gradient(problem))


def image_gradient(problem: Problem) -> Tensor:
    """The gradient of each image's score for its own pixels, ``[B, C, H, W]``."""
    with torch.enable_grad():
        leaf = problem.images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.scores(leaf.clone()).sum(), leaf)
    return gradient


def strongest(values: Tensor) -> Tensor:
    """The maximum over the colours of absolute values, ``[B, C, H, W]`` -> ``[B, 1, H, W]``."""
    return values.abs().amax(dim=1, keepdim=True)


METHODS = (Method("gradient", "Gradient", "Simonyan et al. 2014", maps, Options),)
