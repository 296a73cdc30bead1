"""Scores of predicted boxes and saliency maps, and the convention behind them."""

from casm_fast.evaluation.crops import SaliencyMetric, crop_metric, saliency_metric
from casm_fast.evaluation.curves import Curves, perturbation_curves
from casm_fast.evaluation.distributions import Distributions, object_distributions
from casm_fast.evaluation.intervals import Interval, bootstrap, paired_bootstrap
from casm_fast.evaluation.masked_accuracy import ManyClassifiers, many_classifiers
from casm_fast.evaluation.masks import MaskStatistics, mask_statistics
from casm_fast.evaluation.measures import similarity
from casm_fast.evaluation.outcomes import join
from casm_fast.evaluation.parts import (
    Intensities,
    Keypoint,
    PartRatios,
    part_intensities,
    part_ratios,
    read_keypoints,
)
from casm_fast.evaluation.pointing import (
    Pointing,
    PointingConfig,
    Points,
    first_per_class,
    maxima,
    pointing_game,
    shares_picture,
)
from casm_fast.evaluation.sanity import SanityCheck, data_randomisation, parameter_randomisation
from casm_fast.evaluation.scores import Counts, Localisation, Saliency, Scores, evaluate

__all__ = [
    "Counts",
    "Curves",
    "Distributions",
    "Intensities",
    "Interval",
    "Keypoint",
    "Localisation",
    "ManyClassifiers",
    "MaskStatistics",
    "PartRatios",
    "Pointing",
    "PointingConfig",
    "Points",
    "Saliency",
    "SaliencyMetric",
    "SanityCheck",
    "Scores",
    "bootstrap",
    "crop_metric",
    "data_randomisation",
    "evaluate",
    "first_per_class",
    "join",
    "many_classifiers",
    "mask_statistics",
    "maxima",
    "object_distributions",
    "paired_bootstrap",
    "parameter_randomisation",
    "part_intensities",
    "part_ratios",
    "perturbation_curves",
    "pointing_game",
    "read_keypoints",
    "saliency_metric",
    "shares_picture",
    "similarity",
]
