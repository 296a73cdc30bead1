"""Published figures, and when they may stand beside ours.

Zolna, Geras and Cho, Classifier-agnostic saliency map extraction, Tables 1 and 2 and section 6.1:
ImageNet validation set, all 50,000 images, shorter side 224 and centre crop, largest 4-connected
component, no knowledge of the class. The paper thresholds at the mean (eq. 9 with alpha 1), its
code at the quantile that keeps the mask's mean area; either is taken as its convention.
"""

from __future__ import annotations

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

CASM = (
    replace(TABLE_2["e"], name="CASM, strategy L100 (paper)"),
    replace(TABLE_2["b"], name="CASM, strategy L (paper)"),
    replace(TABLE_2["a"], name="Baseline, strategy F (paper)"),
)
"""Rows of Table 2 with the entropy score and the shared encoder."""


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
        source.startswith("imagenet")
        and images == IMAGES
        and convention.size == 224
        and convention.policy == "crop"
        and convention.rule in ("mean", "area")
        and convention.alpha == 1
        and convention.component == "largest"
        and convention.connectivity == 4
    )
    return CASM if same else ()
