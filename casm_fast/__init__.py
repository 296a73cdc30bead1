"""casm_fast: fast saliency-map training and mask extraction.

* `train` trains classifier-agnostic saliency maps (CASM) and returns where the results are,
* `load` opens a trained model: images -> (saliency, logits),
* `extract` turns image sets into boxes and mask statistics, `predict` a single photo,
* `evaluate` scores them by the paper's conventions,
* `perturb` finds what a classifier's score needs, by meaningful perturbation,
* `attribute` makes saliency maps by the comparison methods of both papers,
* `reproduce` makes a table or figure of the paper again,
* `ops` holds the fused operators.

All of them are imported when they are first used, so that ``import casm_fast`` costs nothing and
the command line can explain a build that is not there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from casm_fast import ops
    from casm_fast.attribution import attribute
    from casm_fast.evaluation import Scores, evaluate
    from casm_fast.experiments import reproduce
    from casm_fast.extraction import ExtractConfig, Extraction, Prediction, export, extract, predict
    from casm_fast.models import SaliencyModel, load
    from casm_fast.perturbation import Perturbation, PerturbConfig, perturb
    from casm_fast.training import TrainConfig, TrainResult, train

__version__ = "0.1.0"

_HOMES = {
    "ExtractConfig": "extraction",
    "Extraction": "extraction",
    "PerturbConfig": "perturbation",
    "Prediction": "extraction",
    "Perturbation": "perturbation",
    "SaliencyModel": "models",
    "Scores": "evaluation",
    "TrainConfig": "training",
    "TrainResult": "training",
    "attribute": "attribution",
    "evaluate": "evaluation",
    "export": "extraction",
    "extract": "extraction",
    "load": "models",
    "perturb": "perturbation",
    "predict": "extraction",
    "reproduce": "experiments",
    "train": "training",
}

_PARTS = {"ops", "experiments", "report", *_HOMES.values(), "data"}
"""Packages that are there as attributes without an import of their own."""

__all__ = [
    "ExtractConfig",
    "Extraction",
    "PerturbConfig",
    "Perturbation",
    "Prediction",
    "SaliencyModel",
    "Scores",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "attribute",
    "evaluate",
    "export",
    "extract",
    "load",
    "ops",
    "perturb",
    "predict",
    "reproduce",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"casm_fast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'casm_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"casm_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
