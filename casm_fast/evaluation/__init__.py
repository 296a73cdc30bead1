"""Scores of predicted boxes and saliency maps, and the convention behind them."""

from casm_fast.evaluation.scores import Counts, Localization, Saliency, Scores, evaluate

__all__ = ["Counts", "Localization", "Saliency", "Scores", "evaluate"]
