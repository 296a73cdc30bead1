"""Scores of predicted boxes and saliency maps, and the convention behind them."""

from casm_fast.evaluation.casm import CasmLocalisation, localise, localise_boxes
from casm_fast.evaluation.class_localisation import (
    ClassLocalisation,
    class_localisation,
    gt_known,
    top_loc,
)
from casm_fast.evaluation.crops import SaliencyMetric, crop_metric, saliency_metric
from casm_fast.evaluation.curves import Curves, perturbation_curves
from casm_fast.evaluation.distributions import Distributions, object_distributions
from casm_fast.evaluation.intervals import Interval, bootstrap, paired_bootstrap
from casm_fast.evaluation.maps import read_maps
from casm_fast.evaluation.masked_accuracy import ManyClassifiers, many_classifiers
from casm_fast.evaluation.masks import MaskStatistics, mask_statistics
from casm_fast.evaluation.max_box_acc import MaxBoxAcc, max_box_acc
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
from casm_fast.evaluation.pixel_ap import PixelAP, object_mask, pixel_ap
from casm_fast.evaluation.pointing import (
    Pointing,
    PointingConfig,
    Points,
    first_per_class,
    maxima,
    pointing_game,
    shares_picture,
)
from casm_fast.evaluation.result import Result
from casm_fast.evaluation.sanity import SanityCheck, data_randomisation, parameter_randomisation
from casm_fast.evaluation.scores import Counts, Localisation, Saliency, Scores, evaluate
from casm_fast.evaluation.weak_localisation import (
    Tuning,
    WeakLocalisation,
    read_blacklist,
    threshold_boxes,
    tune,
    weak_localisation,
)

__all__ = [
    "CasmLocalisation",
    "ClassLocalisation",
    "Counts",
    "Curves",
    "Distributions",
    "Intensities",
    "Interval",
    "Keypoint",
    "Localisation",
    "ManyClassifiers",
    "MaskStatistics",
    "MaxBoxAcc",
    "PartRatios",
    "PixelAP",
    "Pointing",
    "PointingConfig",
    "Points",
    "Result",
    "Saliency",
    "SaliencyMetric",
    "SanityCheck",
    "Scores",
    "Tuning",
    "WeakLocalisation",
    "bootstrap",
    "class_localisation",
    "crop_metric",
    "data_randomisation",
    "evaluate",
    "first_per_class",
    "gt_known",
    "join",
    "localise",
    "localise_boxes",
    "many_classifiers",
    "mask_statistics",
    "max_box_acc",
    "maxima",
    "object_distributions",
    "object_mask",
    "paired_bootstrap",
    "parameter_randomisation",
    "part_intensities",
    "part_ratios",
    "perturbation_curves",
    "pixel_ap",
    "pointing_game",
    "read_blacklist",
    "read_keypoints",
    "read_maps",
    "saliency_metric",
    "shares_picture",
    "similarity",
    "threshold_boxes",
    "top_loc",
    "tune",
    "weak_localisation",
]
