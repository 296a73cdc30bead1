"""Scores of predicted boxes and saliency maps, and the convention behind them."""

from casm_fast.evaluation.intervals import Interval, bootstrap, paired_bootstrap
from casm_fast.evaluation.outcomes import join
from casm_fast.evaluation.scores import Counts, Localisation, Saliency, Scores, evaluate

__all__ = [
    "Counts",
    "Interval",
    "Localisation",
    "Saliency",
    "Scores",
    "bootstrap",
    "evaluate",
    "join",
    "paired_bootstrap",
]
