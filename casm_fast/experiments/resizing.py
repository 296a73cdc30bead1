"""Supplement, "Resizing": the localisation error of CASM under the two resize policies.

Crop: the shorter side becomes 224 pixels and the central square is taken, the policy of the paper's
tables. Squash: both sides become 224 pixels. "The difference in LE scores for different resizing
strategies should not be large. For CASM it is 0.6%." The embedded set is square, so that its
scenes are drawn anew as JPEG files of many sizes and aspect ratios.
"""

from __future__ import annotations

from casm_fast.data.source import ImageSource, open_source
from casm_fast.data.synthetic import SyntheticSource, write_tree
from casm_fast.evaluation import published
from casm_fast.experiments import columns
from casm_fast.experiments.findings import Findings, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.experiments.table1 import CASM

POLICIES = {
    "crop": "shorter side, then centre crop",
    "squash": "both sides",
}

DRAWN_ANEW = (
    "The scenes of the embedded set are square: they are drawn anew as JPEG files of 80 to 160 "
    "pixels with aspect ratios up to 1.6."
)


def run(study: Study) -> Findings:
    """Score the same model on the same images, resized in two ways."""
    trained = study.train(strategy=CASM)
    source = images(study)
    found = {}
    for policy in POLICIES:
        study.progress(policy)
        found[policy] = columns.localisation(study.scores(trained, source, resize_policy=policy))
    crop, squash = found["crop"], found["squash"]
    difference = {key: abs((crop[key] or 0.0) - (squash[key] or 0.0)) for key in ("le", "om", "f1")}
    table = Table(
        "resizing",
        "CASM under two resize policies",
        (columns.LE, columns.OM, columns.F1, columns.VOLUME),
        [
            Row(
                f"crop: {POLICIES['crop']}",
                crop,
                columns.published(published.TABLE_2["e"]),
                kind="ours",
            ),
            Row(f"squash: {POLICIES['squash']}", squash),
            Row("difference", difference, {"le": published.RESIZING_DIFFERENCE}),
        ],
        source="Table 2, row e, and the supplement",
        note="One model, the same images. The paper does not say which policy is better.",
    )
    le = 100 * difference["le"]
    better = "crop" if (crop["le"] or 0.0) <= (squash["le"] or 0.0) else "squash"
    return Findings(
        f"The resize policy changes the localisation error by {le:.1f} points; {better} is better."
        if le
        else "The resize policy does not change the localisation error.",
        [table],
        notes=([DRAWN_ANEW] if study.embedded else []) + study.remarks,
    )


def images(study: Study) -> ImageSource | None:
    """Images that are not square; None for the study's own."""
    own = study.validation
    if not isinstance(own, SyntheticSource):
        return None
    tree = study.folder / "jpegs"
    if not tree.exists():
        unfinished = study.folder / ".jpegs.unfinished"
        write_tree(unfinished, None, own, layout="flat")
        unfinished.rename(tree)
    return open_source(f"imagenet-val:{tree}")


EXPERIMENT = Experiment("resizing", "localisation error under the two resize policies", run)
