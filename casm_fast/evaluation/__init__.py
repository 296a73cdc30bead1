"""Scores of predicted boxes and saliency maps, and the convention behind them."""

from casm_fast.evaluation.intervals import Interval, bootstrap, paired_bootstrap
from casm_fast.evaluation.outcomes import join
from casm_fast.evaluation.pointing import (
    Pointing,
    PointingConfig,
    first_per_class,
    maxima,
    pointing_game,
    shares_picture,
)
from casm_fast.evaluation.scores import Counts, Localisation, Saliency, Scores, evaluate

__all__ = [
    "Counts",
    "Interval",
    "Localisation",
    "Pointing",
    "PointingConfig",
    "Saliency",
    "Scores",
    "bootstrap",
    "evaluate",
    "first_per_class",
    "join",
    "maxima",
    "paired_bootstrap",
    "pointing_game",
    "shares_picture",
]
