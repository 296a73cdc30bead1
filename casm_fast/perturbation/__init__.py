"""Meaningful and extremal perturbation: masks of what a classifier's score needs."""

from casm_fast.perturbation.config import LAYERS, Layer, PerturbConfig
from casm_fast.perturbation.deletion import DeletionCurve, deletion_curve
from casm_fast.perturbation.extremal_config import ExtremalConfig
from casm_fast.perturbation.extremal_result import Extremal, ExtremalCurves
from casm_fast.perturbation.extremes import extremal
from casm_fast.perturbation.figure import grid, overlay, panels
from casm_fast.perturbation.folder import PerturbedSet, perturb_set
from casm_fast.perturbation.pipeline import perturb
from casm_fast.perturbation.result import Curves, Perturbation

__all__ = [
    "LAYERS",
    "Curves",
    "DeletionCurve",
    "Extremal",
    "ExtremalConfig",
    "ExtremalCurves",
    "Layer",
    "PerturbConfig",
    "Perturbation",
    "PerturbedSet",
    "deletion_curve",
    "extremal",
    "grid",
    "overlay",
    "panels",
    "perturb",
    "perturb_set",
]
