"""Learned masks in the supplement's experiments: settings by scale, and what masks came to."""

from __future__ import annotations

from typing import Any

from casm_fast.experiments import showing
from casm_fast.experiments.examining import CHEAPER, Examples
from casm_fast.experiments.findings import Column
from casm_fast.experiments.study import Study
from casm_fast.models.classifier import Classifier
from casm_fast.perturbation import Perturbation, PerturbConfig, perturb
from casm_fast.perturbation.config import Preset

BEFORE = Column("before", "score before", ".2f")
AFTER = Column("after", "score behind the mask", ".2f")
SALIENT = Column("salient", "salient % of the image")
INSIDE = Column("inside", "of it inside the true boxes %")
DIVERGED = Column("diverged", "did not converge %")
COLUMNS = (BEFORE, AFTER, SALIENT, INSIDE, DIVERGED)


def config(study: Study, preset: Preset = "default", **changes: Any) -> PerturbConfig:
    """The settings of a mask at this scale.

    Args:
        study: Tells the scale.
        preset: Of `PerturbConfig`.
        **changes: Fields that differ.
    """
    cheaper = CHEAPER.get(study.scale.name, {}).get("meaningful_perturbation", {})
    return PerturbConfig.preset(preset, **{**cheaper, **changes})


def learn(
    some: Examples, classifier: Classifier, told: PerturbConfig, own_class: bool = True
) -> Perturbation:
    """The masks of images.

    Args:
        some: The images.
        classifier: What is explained.
        told: How.
        own_class: Whether each image's own class is the target; else its best ones are.
    """
    return perturb(classifier.network, some.images, list(some.targets) if own_class else None, told)


def summary(some: Examples, made: Perturbation) -> dict[str, float | None]:
    """The columns, as means over the images."""
    return {
        BEFORE.key: showing.mean(made.score_before.tolist()),
        AFTER.key: showing.mean(made.score_after.tolist()),
        SALIENT.key: float(made.saliency.mean()),
        INSIDE.key: showing.mean(showing.inside(some, made.saliency)),
        DIVERGED.key: showing.mean([float(one) for one in made.diverged.tolist()]),
    }


def remarks(study: Study) -> list[str]:
    """What this scale changes, in sentences."""
    steps, usual = config(study).steps, PerturbConfig().steps
    told = [] if steps == usual else [f"A mask takes {steps} steps here instead of {usual}."]
    return [*told, *study.remarks]
