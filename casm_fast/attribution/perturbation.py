"""Perturbations that are learned for each image, as saliency maps.

``meaningful_perturbation`` (Fong & Vedaldi 2017) is :func:`casm_fast.perturb`: the map is what the
mask hides, or with ``game="preservation"`` what it keeps. Its options are the fields of
:class:`casm_fast.PerturbConfig` and a preset; it lowers probabilities unless `score` says
otherwise::

    casm_fast.attribute("meaningful_perturbation", classifier, images, targets)
    casm_fast.attribute("meaningful_perturbation", classifier, images, preset="localization")
    casm_fast.attribute("meaningful_perturbation", vgg, images, targets, game="preservation")

``extremal_perturbation`` (Fong, Patrick & Vedaldi 2019) is
:func:`casm_fast.perturbation.extremal`: its masks of all areas, summed and smoothed. Its options
are the fields of :class:`casm_fast.perturbation.ExtremalConfig`; it explains logits::

    casm_fast.attribute("extremal_perturbation", vgg, images, targets, areas=(0.05, 0.1, 0.2))
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from casm_fast.attribution.problem import Method, Problem
from casm_fast.perturbation import ExtremalConfig, PerturbConfig, extremal, perturb
from casm_fast.perturbation.config import Preset


@dataclass(frozen=True)
class Options(PerturbConfig):
    """The fields of `PerturbConfig`, and a preset.

    `score`, `seed`, `batch_size` and `memory_budget` are said to `attribute`.
    """

    preset: Preset = "default"  # type: ignore[assignment]  # options have its name, no call
    """An experiment of the paper, see `PerturbConfig.preset`; it sets every field that has the
    default's value."""

    def config(self, problem: Problem) -> PerturbConfig:
        """What `perturb` is told about a problem."""
        default, preset = PerturbConfig(), PerturbConfig.preset(self.preset)
        names = [option.name for option in dataclasses.fields(PerturbConfig)]
        changed = {name: getattr(self, name) for name in names}
        changed = {
            name: value for name, value in changed.items() if value != getattr(default, name)
        }
        changed |= {
            "score": problem.score,
            "seed": problem.seed,
            "batch_size": len(problem.images),
        }
        return dataclasses.replace(preset, **changed)


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]`` in [0, 1]."""
    config = options.config(problem)
    best = config.top_k > 1 and not problem.asked
    targets = None if best else problem.targets.classes
    return perturb(problem.classifier, problem.images, targets, config).saliency


def extremal_maps(problem: Problem, options: ExtremalConfig) -> Tensor:
    """See the module; ``[B, 1, H, W]``, not negative."""
    told = dataclasses.replace(options, batch_size=len(problem.images) * len(options.areas))
    return extremal(problem.classifier, problem.images, problem.targets.classes, told).saliency


METHODS = (
    Method(
        "meaningful_perturbation",
        "Meaningful perturbation",
        "Fong & Vedaldi 2017",
        maps,
        Options,
        score="softmax",
    ),
    Method(
        "extremal_perturbation",
        "Extremal perturbation",
        "Fong et al. 2019",
        extremal_maps,
        ExtremalConfig,
    ),
)
