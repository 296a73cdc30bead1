"""Perturbations that are learned for each image, as saliency maps.

``meaningful_perturbation`` (Fong & Vedaldi 2017) is :func:`casm_fast.perturb`: the map is what the
mask hides, or with ``game="preservation"`` what it keeps. Its options are the fields of
:class:`casm_fast.PerturbConfig` and a preset::

    casm_fast.attribute("meaningful_perturbation", classifier, images, targets)
    casm_fast.attribute("meaningful_perturbation", classifier, images, preset="localization")
    casm_fast.attribute("meaningful_perturbation", vgg, images, targets, game="preservation")
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from casm_fast.attribution.problem import Method, Problem, Score
from casm_fast.perturbation import PerturbConfig, perturb
from casm_fast.perturbation.config import Preset


@dataclass(frozen=True)
class Options(PerturbConfig):
    """The fields of `PerturbConfig`, a preset, and the objective.

    `score`, `seed`, `batch_size` and `memory_budget` are said to `attribute`.
    """

    preset: Preset = "default"  # type: ignore[assignment]  # options have its name, no call
    """An experiment of the paper, see `PerturbConfig.preset`; it sets every field that has the
    default's value."""

    objective: Score = "softmax"
    """What is lowered or kept, whatever `score` is: the paper's weights belong to probabilities."""

    def config(self, problem: Problem) -> PerturbConfig:
        """What `perturb` is told about a problem."""
        default, preset = PerturbConfig(), PerturbConfig.preset(self.preset)
        names = [option.name for option in dataclasses.fields(PerturbConfig)]
        changed = {name: getattr(self, name) for name in names}
        changed = {
            name: value for name, value in changed.items() if value != getattr(default, name)
        }
        changed |= {
            "score": self.objective,
            "seed": problem.seed,
            "batch_size": len(problem.images),
        }
        return dataclasses.replace(preset, **changed)


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]`` in [0, 1].

    With `top_k` above 1, as in the preset "localization", the best classes of each image are its
    targets, whatever `targets` are.
    """
    config = options.config(problem)
    targets = None if config.top_k > 1 else problem.targets.classes
    return perturb(problem.classifier, problem.images, targets, config).saliency


METHODS = (
    Method(
        "meaningful_perturbation",
        "Meaningful perturbation",
        "Fong & Vedaldi 2017",
        maps,
        Options,
    ),
)
