"""Saliency maps by the name of a method: the comparison methods of both papers, batched."""

from casm_fast.attribution.figure import comparison, shade
from casm_fast.attribution.folder import AttributedSet, attribute_set
from casm_fast.attribution.methods import METHODS
from casm_fast.attribution.pipeline import attribute, find, listing
from casm_fast.attribution.problem import Method, Problem, Score
from casm_fast.attribution.realtime import RealTimeModel, load_real_time
from casm_fast.attribution.realtime_config import RealTimeConfig
from casm_fast.attribution.realtime_training import train_real_time

__all__ = [
    "METHODS",
    "AttributedSet",
    "Method",
    "Problem",
    "RealTimeConfig",
    "RealTimeModel",
    "Score",
    "attribute",
    "attribute_set",
    "comparison",
    "find",
    "listing",
    "load_real_time",
    "shade",
    "train_real_time",
]
