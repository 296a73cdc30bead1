"""Supplement, section 7: are eyes more salient than feet? Figure 11 and Table 2.

Masks delete each animal's class; the mean intensity of the mask around every foot and eye keypoint
says how salient it is, low is more. A ratio feet to eyes above 1 means that the eyes matter more.

Keypoints are read from DIR/keypoints.csv (image_id,class,part,x,y; parts "eye" and "foot"), groups
of classes from DIR/groups.csv (class,group) where it exists. On the embedded set, whose objects
have no eyes, the emblem that names the class stands for the eye, and the point of the object that
is farthest from it for the foot.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from casm_fast.data.source import ImageSource
from casm_fast.data.synthetic import SyntheticSource
from casm_fast.evaluation import (
    Intensities,
    Keypoint,
    PartRatios,
    part_intensities,
    part_ratios,
    read_keypoints,
)
from casm_fast.evaluation.parts import PUBLISHED, Ratio
from casm_fast.experiments import learning
from casm_fast.experiments.examining import Examples, entry, explained, records
from casm_fast.experiments.findings import SUPPLEMENT, Chart, Column, Findings, Row, Table
from casm_fast.experiments.study import Experiment, Study
from casm_fast.models.classifier import Classifier
from casm_fast.report.charts import Draw, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES = {"full": 4000, "quick": 160, "smoke": 12}
LEAST = {"full": 10, "quick": 5, "smoke": 1}
"""Images with both parts that a class needs."""

MASK = entry("meaningful_perturbation")

RATIO = Column("ratio", "feet:eyes ↑", ".2f")
COLUMNS = (
    RATIO,
    Column("error", "± SE", ".2f"),
    Column("classes", "classes", ".0f"),
)


def run(study: Study) -> Findings:
    """Learn the masks of all images with keypoints, and compare the parts."""
    source = study.validation
    keypoints, groups = _keypoints(study)
    named = {one.image_id for one in keypoints}
    indices = [index for index in range(study.limit) if source.image_id(index) in named]
    indices = indices[: IMAGES[study.scale.name]]
    classifier = explained(study)
    method = MASK.at(study.scale.name)
    found = records(
        study,
        "parts",
        classifier,
        source,
        indices,
        partial(_around, method, classifier, keypoints),
        options={name: str(value) for name, value in method.options.items()},
        keypoints=len(keypoints),
    )
    told = [part for record in found for part in record["parts"]]
    intensities = Intensities(
        values=np.array([one["value"] for one in told], np.float64),
        image_ids=np.array([one["image_id"] for one in told], np.str_),
        labels=np.array([one["label"] for one in told], np.str_),
        parts=np.array([one["part"] for one in told], np.str_),
        left_out=np.array([record["left_out"] for record in found], np.int64),
        convention=found[0]["convention"],
    )
    ratios = part_ratios(intensities, groups, least_images=LEAST[study.scale.name])
    rows = [
        Row(
            name,
            _measured(ratio),
            _published(name),
        )
        for name, ratio in ratios.groups.items()
    ]
    rows += [Row(name, {}, _published(name)) for name in PUBLISHED if name not in ratios.groups]
    whole = ratios.overall
    rows.append(
        Row(
            "all classes",
            _measured(whole),
            kind="ours",
        )
    )
    above = sum(one.ratio > 1 for one in ratios.classes)
    eye = "emblem" if study.embedded else "eye"
    return Findings(
        f"The {eye} is more salient than the {'far end' if study.embedded else 'foot'} in {above} "
        f"of {len(ratios.classes)} classes; the mean ratio is {whole.mean:.2f}.",
        [
            Table(
                "animal_parts",
                "Ratio of the mask's intensity around feet and eyes",
                COLUMNS,
                rows,
                source="Table 2",
                paper=SUPPLEMENT,
                note=f"{ratios.convention[0].upper()}{ratios.convention[1:]}.",
            )
        ],
        [
            Chart(
                "animal_parts",
                "Mean intensity around each part, by class",
                "Low is salient. One line per class, groups in falling order of their ratio.",
                _parts(ratios),
                (6.0, 1.2 + 0.16 * len(ratios.classes)),
            )
        ],
        notes=[
            *(
                [
                    "Objects of the embedded set have no eyes: the emblem, whose hue names the "
                    "class, stands for the eye, the point of the object farthest from it for the "
                    "foot; groups are textures. Pictures of one object are used."
                ]
                if study.embedded
                else []
            ),
            *learning.remarks(study),
        ],
    )


def _around(
    method: Any, classifier: Classifier, keypoints: Sequence[Keypoint], some: Examples
) -> list[dict[str, Any]]:
    """What lies around the keypoints of each image of a batch."""
    ids = [some.source.image_id(index) for index in some.indices]
    found = part_intensities(
        some.maps(method, classifier).cpu(), ids, keypoints, geometries=some.geometries
    )
    made: list[dict[str, Any]] = [
        {"parts": [], "left_out": int(count), "convention": found.convention}
        for count in found.left_out
    ]
    place = {name: number for number, name in enumerate(ids)}
    for value, name, label, part in zip(
        found.values, found.image_ids, found.labels, found.parts, strict=True
    ):
        made[place[str(name)]]["parts"].append(
            {"value": float(value), "image_id": str(name), "label": str(label), "part": str(part)}
        )
    return made


def _keypoints(study: Study) -> tuple[list[Keypoint], dict[str, str]]:
    """Keypoints, and the group of each class.

    Raises:
        FileNotFoundError: There is no keypoint file.
    """
    source = study.validation
    if isinstance(source, SyntheticSource):
        groups = {name: name.partition(" ")[0] for name in source.classes}
        return embedded_keypoints(source, study.limit), groups
    root = _root(source)
    files = [root / name for name in ("keypoints.csv", "keypoints.jsonl")]
    there = [file for file in files if file.exists()]
    if not there:
        raise FileNotFoundError(
            f"animal_parts: expected {files[0]} or {files[1].name} beside the images, got neither; "
            "write a line image_id,class,part,x,y for each visible eye and foot"
        )
    table = root / "groups.csv"
    if not table.exists():
        return read_keypoints(there[0]), {}
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"class", "group"} <= set(reader.fieldnames or ()):
            raise ValueError(
                f"{table}, line 1: expected the head class,group, "
                f"got {','.join(reader.fieldnames or ()) or 'nothing'}"
            )
        return read_keypoints(there[0]), {row["class"]: row["group"] for row in reader}


def _root(source: ImageSource) -> Path:
    """The folder that a data set was opened from."""
    return Path(getattr(source, "root", source.name.partition(":")[2]))


def embedded_keypoints(source: SyntheticSource, images: int) -> list[Keypoint]:
    """The emblem and the far end of the object, of pictures with one object.

    Args:
        source: With emblems.
        images: How many pictures are looked at, from the first on.
    """
    made = []
    for index in range(images):
        emblem, region = source.emblem_masks[index], source.mask(index)
        if len(source.boxes(index)) != 1 or not emblem.any():
            continue
        centre = np.argwhere(emblem).mean(axis=0)
        pixels = np.argwhere(region)
        far = pixels[np.square(pixels - centre).sum(axis=1).argmax()]
        label = source.classes[source.label(index)]
        for part, (y, x) in (("eye", centre), ("foot", far)):
            made.append(Keypoint(source.image_id(index), label, part, float(x), float(y)))
    return made


def _measured(ratio: Ratio) -> dict[str, float | None]:
    error = ratio.error if ratio.classes > 1 else None  # one class has no spread
    return {"ratio": ratio.mean, "error": error, "classes": float(ratio.classes)}


def _published(name: str) -> Mapping[str, float | None]:
    known = PUBLISHED.get(name)
    if known is None:
        return {}
    return {"ratio": known.mean, "error": known.error, "classes": float(known.classes)}


def _parts(ratios: PartRatios) -> Draw:
    def draw(axes: Axes, palette: Palette) -> None:
        ratios.draw(axes, palette.first, palette.second)

    return draw


EXPERIMENT = Experiment(
    "animal_parts",
    "are eyes more salient than feet (supplement, Figure 11 and Table 2)",
    run,
    embedded="emblem=100",
    needs_boxes=False,
    paper=SUPPLEMENT,
)
