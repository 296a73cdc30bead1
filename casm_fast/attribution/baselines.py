"""Maps that look at no image: what a method is worth is what it has beyond them.

``centre`` falls off from the middle of the picture, 1 - d / d_corner with d the distance to the
centre; its highest point is the centre, as in the pointing game's baseline (Zhang et al. 2016), and
its boxes are centred. ``random`` is uniform noise, drawn from the image's own bytes: another for
every image, the same for the same one whatever its batch::

    casm_fast.attribute("centre", classifier, images)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from casm_fast.attribution.problem import Method, Problem


@dataclass(frozen=True)
class Options:
    """The baselines have none."""


def centre(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]`` in [0, 1]."""
    del options
    images = problem.images
    rows, columns = (
        torch.arange(side, dtype=torch.float64, device=images.device) - (side - 1) / 2
        for side in images.shape[2:]
    )
    distance = torch.hypot(rows[:, None], columns[None, :])
    falling = 1 - distance / distance.max().clamp(min=1)
    return falling.to(images.dtype).expand(len(images), 1, -1, -1).clone()


def random(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]`` in [0, 1)."""
    del options
    made = []
    for image in problem.images:
        digest = hashlib.blake2b(image.cpu().numpy().tobytes(), digest_size=7).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(digest, "little") + problem.seed)
        made.append(torch.rand(image.shape[1:], generator=stream))
    return torch.stack(made)[:, None].to(problem.images)


METHODS = (
    Method("centre", "Centre", "baseline", centre, Options, uses="nothing"),
    Method("random", "Random", "baseline", random, Options, uses="nothing"),
)
