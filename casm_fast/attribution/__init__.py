"""Saliency maps by the name of a method: the comparison methods of both papers, batched."""

from casm_fast.attribution.figure import comparison, shade
from casm_fast.attribution.folder import AttributedSet, attribute_set
from casm_fast.attribution.methods import METHODS
from casm_fast.attribution.pipeline import attribute, find, listing
from casm_fast.attribution.problem import Method, Problem, Score

__all__ = [
    "METHODS",
    "AttributedSet",
    "Method",
    "Problem",
    "Score",
    "attribute",
    "attribute_set",
    "comparison",
    "find",
    "listing",
    "shade",
]
