"""Published figures, and when they may stand beside ours.

Zolna, Geras and Cho, Classifier-agnostic saliency map extraction, Tables 1 to 3, sections 6.1 and
6.3, supplement: ImageNet validation set, all 50,000 images, shorter side 224 and centre crop,
largest 4-connected component, no knowledge of the class. The paper thresholds at the mean (eq. 9
with alpha 1), its code at the quantile that keeps the mask's mean area; either is taken as its
convention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from casm_fast.data.predictions import Convention

IMAGES = 50_000
"""Images of the ImageNet validation set."""


@dataclass(frozen=True)
class Published:
    """One published result; shares in [0, 1], None where the paper gives no figure.

    Attributes:
        name: Method and strategy.
        le: Localisation error.
        om: Official metric, top-1.
        f1: Best F1 over the true boxes.
    """

    name: str
    le: float
    om: float | None
    f1: float | None


TABLE_2: dict[str, Published] = {
    "a": Published("entropy, shared, F", 0.535, 0.627, 0.490),
    "b": Published("entropy, shared, L", 0.365, 0.490, 0.617),
    "c": Published("entropy, shared, FL", 0.413, 0.527, 0.572),
    "d": Published("entropy, shared, L1000", 0.362, 0.487, 0.616),
    "e": Published("entropy, shared, L100", 0.361, 0.486, 0.614),
    "f": Published("classification, shared, F", 0.759, 0.808, 0.425),
    "g": Published("classification, shared, L", 0.370, 0.495, 0.622),
    "h": Published("classification, shared, L100", 0.373, 0.497, 0.621),
    "i": Published("entropy, separate, F", 0.555, None, None),
    "j": Published("entropy, separate, L", 0.472, None, None),
    "k": Published("entropy, separate, L100", 0.468, None, None),
}
"""Table 2 by row: score function, encoder, thinning strategy. Baseline is row a, CASM row e."""

TABLE_1: dict[str, Published] = {
    "Baseline": Published("Baseline", 0.535, 0.627, None),
    "CASM": Published("CASM", 0.361, 0.486, None),
    "Fan": Published("Fan et al. (2017)", 0.435, 0.545, None),
    "Bach": Published("Bach et al. (2015)", 0.578, None, None),
    "Zeiler": Published("Zeiler and Fergus (2014)", 0.486, None, None),
    "Zhou": Published("Zhou et al. (2016)", 0.481, None, None),
    "Selvaraju": Published("Selvaraju et al. (2017)", 0.475, 0.564, None),
    "Fong": Published("Fong and Vedaldi (2017)", 0.431, None, None),
    "Mahendran": Published("Mahendran and Vedaldi (2016)", 0.420, None, None),
    "Simonyan": Published("Simonyan et al. (2013)", 0.417, None, None),
    "Cao": Published("Cao et al. (2015)", 0.388, None, None),
    "Zhang": Published("Zhang et al. (2016)", 0.387, None, None),
    "Du": Published("Du et al. (2018)", 0.382, None, None),
    "Dabkowski": Published("Dabkowski and Gal (2017)", 0.367, None, None),
    "VGG": Published("Simonyan and Zisserman (2014), supervised", 0.343, None, None),
}
"""Table 1: each method's own figure, or that of Fong and Vedaldi (2017) where it is better."""

TABLE_3: dict[str, dict[str, float]] = {
    training: dict(zip(("A", "B", "C", "D", "E", "F", "all"), errors, strict=True))
    for training, errors in (
        ("F", (0.465, 0.464, 0.481, 0.450, 0.457, 0.413, 0.449)),
        ("EF", (0.395, 0.412, 0.431, 0.403, 0.395, 0.387, 0.400)),
        ("DEF", (0.379, 0.393, 0.400, 0.380, 0.380, 0.374, 0.381)),
        ("CDEF", (0.382, 0.385, 0.399, 0.379, 0.379, 0.378, 0.381)),
        ("BCDEF", (0.367, 0.368, 0.399, 0.374, 0.370, 0.370, 0.374)),
        ("ABCDEF", (0.356, 0.361, 0.390, 0.370, 0.366, 0.367, 0.369)),
    )
}
"""Table 3: LE by training subset and test subset of the classes, strategy L."""

SEEDS = {"min": 0.360, "mean": 0.361, "max": 0.363}
"""LE of ten runs of CASM with random initialisation, section 6.3."""

STATISTICS: dict[str, dict[str, float]] = {
    "CASM": {"tv": 2.5e3, "entropy": 0.05, "std": 0.19},
    "Baseline": {"tv": 7.0e3, "entropy": 0.21, "std": 0.14},
}
"""Section 6.1: sum of squared differences per image of 224 x 224, one-sided entropy in bits,
standard deviation of the masked volume."""

RESIZING_DIFFERENCE = 0.006
"""Difference in LE of CASM between the two resize policies, supplement."""

CASM = (
    replace(TABLE_2["e"], name="CASM, strategy L100 (paper)"),
    replace(TABLE_2["b"], name="CASM, strategy L (paper)"),
    replace(TABLE_2["a"], name="Baseline, strategy F (paper)"),
)
"""Rows of Table 2 with the entropy score and the shared encoder."""


# wsolevaluation calls ImageNet's validation images "test"; the boxes are the same numbers.
_IMAGENET = re.compile(r"imagenet|wsol:(.*/)?ILSVRC/test(,|$)")


def comparable(source: str, images: int, convention: Convention) -> tuple[Published, ...]:
    """The published results that were obtained by the same convention on the same images.

    Args:
        source: Canonical name of the images.
        images: Images that were counted.
        convention: Geometry and box rule.

    Returns:
        The results, or an empty tuple where the comparison would not be fair.
    """
    same = (
        _IMAGENET.match(source) is not None
        and images == IMAGES
        and convention.size == 224
        and convention.policy == "crop"
        and convention.rule in ("mean", "area")
        and convention.alpha == 1
        and convention.component == "largest"
        and convention.connectivity == 4
    )
    return CASM if same else ()


CHOE: dict[str, tuple[tuple[str, float], ...]] = {
    "imagenet": (
        ("CAM, VGG-16", 0.600),
        ("CAM, Inception-V3", 0.634),
        ("CAM, ResNet-50", 0.637),
        ("CAM, mean", 0.624),
        ("best weakly supervised, mean", 0.626),
        ("few-shot learning, mean", 0.640),
        ("centre", 0.525),
    ),
    "cub": (
        ("CAM, VGG-16", 0.637),
        ("CAM, Inception-V3", 0.567),
        ("CAM, ResNet-50", 0.630),
        ("centre", 0.597),
    ),
    "openimages": (
        ("CAM, VGG-16", 0.583),
        ("CAM, Inception-V3", 0.632),
        ("CAM, ResNet-50", 0.585),
        ("CAM, mean", 0.600),
        ("few-shot learning, mean", 0.715),
        ("centre", 0.458),
    ),
}
"""Choe et al. 2020, the table of their evaluation code, test sets: MaxBoxAcc V2 on ImageNet and
CUB, PxAP on OpenImages30k."""

CHOE_IMAGES = {"imagenet": IMAGES, "cub": 5_794, "openimages": 5_000}
"""Images of these test sets."""

WEAK_LOCALISATION: dict[str, dict[str, tuple[float, float]]] = {
    "mask, default settings": {"value": (0.25, 0.484), "energy": (0.90, 0.461), "mean": (1, 0.460)},
    "mask, top-5 settings": {"value": (0.10, 0.440), "energy": (0.95, 0.431), "mean": (0.5, 0.432)},
    "gradient": {"value": (0.25, 0.460), "energy": (0.10, 0.439), "mean": (5, 0.417)},
    "guided backprop": {"value": (0.05, 0.502), "energy": (0.30, 0.470), "mean": (4.5, 0.420)},
    "excitation backprop": {"value": (0.15, 0.461), "energy": (0.60, 0.387), "mean": (1.5, 0.390)},
    "occlusion": {"value": (0.30, 0.512), "energy": (0.55, 0.494), "mean": (1, 0.486)},
    "Grad-CAM": {"value": (0.35, 0.530), "energy": (0.65, 0.539), "mean": (1.5, 0.533)},
}
"""Fong and Vedaldi 2017, GoogLeNet: alpha and localisation error by threshold rule, on the 48,238
validation images that are not on the list. Default settings: supplement, Table 1."""

WEAK_LOCALISATION_IMAGES = 48_238
"""Images of the ImageNet validation set without the 1,762 of the list."""


def choe(
    source: str, images: int, shape: tuple[int, int], metric: str, usual: bool
) -> tuple[tuple[str, float], ...]:
    """Results of Choe et al. 2020 by the same convention on the same images.

    Args:
        source: Name of the images, such as "imagenet-val", "cub-test", "openimages-test".
        images: Images that were counted.
        shape: (h, w) of the maps.
        metric: "MaxBoxAcc V1", "MaxBoxAcc V2" or "PxAP".
        usual: Whether the thresholds are 0, 0.001, ... 0.999.

    Returns:
        Names and shares, or an empty tuple where the comparison would not be fair.
    """
    name = next((name for name in CHOE if source.lower().startswith(name)), None)
    if name is None or images != CHOE_IMAGES[name] or shape != (224, 224) or not usual:
        return ()
    if metric != ("PxAP" if name == "openimages" else "MaxBoxAcc V2"):
        return ()
    return tuple((f"{method} (Choe et al. 2020)", share) for method, share in CHOE[name])


def weak_localisation(source: str, images: int, rule: str) -> tuple[tuple[str, float], ...]:
    """Published errors of weak localisation by the same rule on the same images.

    Each method has its own alpha, tuned on held-out images (`casm_fast.evaluation.tune`).

    Args:
        source: Name of the images.
        images: Images that were counted.
        rule: Threshold rule.

    Returns:
        Names and errors, or an empty tuple where the comparison would not be fair.
    """
    if not source.startswith("imagenet") or images != WEAK_LOCALISATION_IMAGES:
        return ()
    return tuple(
        (f"{method}, alpha {alpha:g} (Fong & Vedaldi 2017, GoogLeNet)", error)
        for method, rules in WEAK_LOCALISATION.items()
        for alpha, error in (rules[rule],)
    )
