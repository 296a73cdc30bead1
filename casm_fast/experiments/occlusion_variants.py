"""Supplement, section 4.1: is it the shape of the occluder that makes occlusion weaker than masks?

Occlusion hides hard squares of 35 pixels in the mean colour; blur occlusion blurs soft discs of the
same size; variable occlusion blurs soft discs whose size and place are drawn from those of COCO's
objects, and points at the smallest of the most suppressive ones. All of them show the network as
many variants of an image, and play the pointing game.
"""

from __future__ import annotations

from casm_fast.experiments.examining import Entry, entry
from casm_fast.experiments.findings import SUPPLEMENT, Findings
from casm_fast.experiments.pointing_game import notes, play, table
from casm_fast.experiments.study import Experiment, Study

METHODS: tuple[Entry, ...] = (
    entry("centre"),
    entry("occlusion"),
    entry("blur_occlusion"),
    entry("variable_occlusion"),
    entry("meaningful_perturbation", "Mask, default settings"),
)


def run(study: Study) -> Findings:
    """Play with every variant."""
    played = play(study, METHODS)
    hard, soft, variable, mask = (100 * (row.ours["all"] or 0) for row in played.rows[1:])
    return Findings(
        f"Hard squares point at the object in {hard:.1f} % of the images, soft blurred discs in "
        f"{soft:.1f} %, discs of varying size in {variable:.1f} %, learned masks in {mask:.1f} %.",
        [table("occlusion_variants", "Accuracy of pointing by occlusion", played)],
        notes=notes(study),
    )


EXPERIMENT = Experiment(
    "occlusion_variants",
    "hard, soft and variable occluders in the pointing game (supplement, 4.1)",
    run,
    paper=SUPPLEMENT,
)
