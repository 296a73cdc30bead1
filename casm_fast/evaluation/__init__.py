"""Scores of predicted boxes and saliency maps, and the convention behind them."""

from casm_fast.evaluation.scores import Counts, Localisation, Saliency, Scores, evaluate

__all__ = ["Counts", "Localisation", "Saliency", "Scores", "evaluate"]
