"""The paper's claim on pictures whose evidence is redundant: does CASM mark more than the Baseline?

Section 3.1: a mask that confuses one fixed classifier needs to cover only "the subset of input
pixels" that this classifier uses; section 3.2: a mask that confuses all classifiers must cover
every piece of evidence. ImageNet does not say which pixels are evidence. The embedded set with
emblems does: shape and texture of the whole object name the class, and so does a small emblem on
it. What a mask covers can therefore be measured, for object and emblem apart.

Masks of different strategies have different sizes, and a larger mask covers more. They are
compared at equal area: of each picture the most salient cells, as many as its objects fill. A mask
is then right when it covers the object, and the rest of the object, without its emblem, is what an
adversarial mask leaves uncovered.

A referee, a classifier that learned the same pictures without emblems and was never met in
training, says how much evidence a mask has left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.data.localization import iou, localisation_error
from casm_fast.data.source import open_source
from casm_fast.data.synthetic import SyntheticSource
from casm_fast.data.transforms import normalize
from casm_fast.evaluation.coverage import coverage, most_salient
from casm_fast.experiments import columns
from casm_fast.experiments.findings import Chart, Column, Findings, Gallery, Line, Row, Table
from casm_fast.experiments.study import Experiment, Run, Study
from casm_fast.models.encoder import Encoder
from casm_fast.models.saliency import full_size
from casm_fast.ops import blend, mask_boxes
from casm_fast.report.charts import Draw, Palette
from casm_fast.report.pictures import enlarge

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRATEGIES = {"F": "F, Baseline", "L": "L", "L100": "L100, CASM"}
SHARES = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
"""Areas of the curve, as shares of the picture."""

BODY = Column("body", "object less emblem ↑ %")
EMBLEM = Column("emblem", "emblem %")
LE = Column("equal_le", "LE ↓ %")
REFEREE = Column("referee", "referee ↓ %")
MASKED = Column("masked_accuracy", "own classifier, masked out ↓ %")
COLUMNS = (
    BODY,
    EMBLEM,
    LE,
    REFEREE,
    Column("le", "LE of m ≥ mean ↓ %"),
    columns.F1,
    MASKED,
    Column("accuracy", "own classifier %"),
    Column("mean_saliency", "mean saliency", ".3f"),
)
_BATCH = 250
_SHOWN, _TILE = 8, 128
_GREY = (124, 116, 104)  # ImageNet's mean colour, which replaces what is masked out


def run(study: Study) -> Findings:
    """Train every strategy from the same pre-trained classifiers, and measure what it covers."""
    source = with_emblems(study)
    study.progress("the referee, on the pictures without emblems")
    # Same seed, same scenes: what the referee learns differs from the set in the emblems alone.
    spec = study.training.name.replace(f",emblem={source.emblem}", "")
    referee_run = study.classifier(
        training=open_source(spec, "train"), input_size=source.images.shape[1]
    )
    referee = referee_run.model().classifier
    seeds = range(study.repeats(full=3, quick=1, smoke=1))
    found: dict[str, list[dict[str, Any]]] = {}
    first: dict[str, Run] = {}
    for name in STRATEGIES:
        for seed in seeds:
            study.progress(f"strategy {name}, seed {seed}")
            trained = train(study, name, seed)
            value = study.cell(
                f"{name}-{seed}",
                partial(measure, study, trained, referee),
                model=trained.folder.name,
                referee=referee_run.folder.name,
            )
            found.setdefault(name, []).append(value)
            first.setdefault(name, trained)
    known = study.cell(
        "references", lambda: references(study, referee), referee=referee_run.folder.name
    )

    label = {key: f"{name}{study.instead(key)}" for key, name in STRATEGIES.items()}
    means = [Row(label[key], _means(values), kind="ours") for key, values in found.items()]
    limits = [Row(f"cells chosen by: {name}", values) for name, values in known.items()]
    each = [
        Row(f"{label[key]}, seed {seed}", {c.key: value[c.key] for c in COLUMNS})
        for key, values in found.items()
        for seed, value in zip(seeds, values, strict=True)
    ]
    return Findings(
        _verdict(found, label),
        [
            Table(
                "claims",
                f"Means of {len(seeds)} run{'s' * (len(seeds) > 1)}: what a mask covers "
                "when it is as large as the object",
                COLUMNS,
                [*means, *limits],
                note="The first four columns are at equal area: the most salient cells of each "
                "picture, as many as its objects fill. Referee: accuracy of a classifier that "
                "never saw an emblem, with these cells masked out. The other columns are of the "
                "saliency as it is.",
            ),
            Table("runs", "Every run", COLUMNS, each, note="Nothing is left out."),
        ],
        [
            Chart(
                f"claims-{key}",
                title,
                "The most salient cells of each picture, kept up to the area on the horizontal "
                "axis. Lines are means over the runs, bands their range. The dotted line is what "
                "cells at random would cover.",
                _curves(found, label, key),
                (4.6, 3.2),
            )
            for key, title in (
                ("body", "Coverage of the object without its emblem"),
                ("emblem", "Coverage of the emblem"),
            )
        ],
        [_gallery(study, {label[key]: trained for key, trained in first.items()})],
        notes=[
            "Every seed has a pre-trained classifier of its own, which its three strategies share.",
            "lambda_R is the authors' for each strategy, in units of ln(classes).",
            *study.remarks,
        ],
    )


def train(
    study: Study,
    strategy: str,
    seed: int,
    *,
    classifier: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """One training, from the classifier of its seed.

    Args:
        study: Whose training images are learned from, at their own size.
        strategy: Of the history.
        seed: Of classifier and training.
        classifier: Fields of `TrainConfig` for classifier and training alike, such as
            ``backbone`` and ``pretrain_epochs``.
        **settings: The same for the training alone.
    """
    shared = {"input_size": study.training.images.shape[1], **(classifier or {})}  # type: ignore[attr-defined]
    start = study.classifier(seed=seed, **shared)
    weights = str(start.checkpoint.resolve())
    return study.train(strategy=strategy, seed=seed, weights=weights, **shared, **settings)


@torch.no_grad()
def measure(study: Study, trained: Run, referee: Encoder | None = None) -> dict[str, Any]:
    """The columns of the table, and the curves, of one model.

    Args:
        study: Whose validation images are looked at.
        trained: The model.
        referee: Classifier that judges what is left; None: nobody does.

    Returns:
        Shares in [0, 1] by the keys of `COLUMNS` (without a referee all but its own), and
        ``"curve"``: coverage by region and share.
    """
    source, model = with_emblems(study), trained.model()
    device = next(model.parameters()).device
    images, labels = _images(source, study.limit), source.labels[: study.limit]
    maps, clean, masked = [], [], []
    for part in torch.split(images, _BATCH):
        saliency, logits = model(part.to(device))
        maps.append(saliency[:, 0].float().cpu().numpy())
        clean.append(logits.argmax(1).cpu().numpy())
        masked.append(_answers(model.classifier, part, saliency[:, 0]))
    saliency = np.concatenate(maps)
    scores = study.scores(trained)
    return {
        **_equal_area(source, saliency, images, referee),
        "le": scores["localisation"]["le"],
        "f1": scores["localisation"]["f1"],
        "accuracy": _share(np.concatenate(clean) == labels),
        "masked_accuracy": _share(np.concatenate(masked) == labels),
        "mean_saliency": _share(saliency),
        "curve": {
            key: [_share(coverage(most_salient(saliency, s), region)) for s in SHARES]
            for key, region in _regions(source, len(saliency)).items()
        },
    }


@torch.no_grad()
def references(study: Study, referee: Encoder) -> dict[str, dict[str, float]]:
    """The same measures for cells that no model chose."""
    source = with_emblems(study)
    images = _images(source, study.limit)
    objects, emblems = source.masks[: study.limit], source.emblem_masks[: study.limit]
    noise = np.random.default_rng(0).random(objects.shape)
    chosen = {
        "the objects": objects.astype(np.float64),
        "the emblems, then chance": np.where(emblems, 2, noise),
        "chance": noise,
    }
    found = {
        name: _equal_area(source, saliency, images, referee) for name, saliency in chosen.items()
    }
    whole = np.concatenate([_answers(referee, part) for part in torch.split(images, _BATCH)])
    return {
        **found,
        "nobody, nothing is masked out": {
            REFEREE.key: _share(whole == source.labels[: study.limit])
        },
    }


def _gallery(study: Study, models: dict[str, Run]) -> Gallery:
    """The first pictures with one object: saliency, and what masks of equal area leave."""
    source = with_emblems(study)
    shown = [i for i in range(study.limit) if len(source.boxes(i)) == 1][:_SHOWN]
    size = source.images.shape[1]
    repeat = max(1, _TILE // size)
    saliency, left = {}, {}
    for name, trained in models.items():
        model = trained.model()
        images = normalize(torch.from_numpy(source.images[shown]))
        with torch.no_grad():
            maps = model(images.to(next(model.parameters()).device))[0]
        kept = most_salient(maps[:, 0].cpu().numpy(), source.masks[shown].mean(axis=(1, 2)))
        hole = full_size(torch.from_numpy(kept)[:, None], (size, size))[:, 0].numpy()
        grey = (255 * full_size(maps.cpu(), (size, size))[:, 0].numpy()).astype(np.uint8)
        saliency[name] = np.repeat(grey[..., None], 3, axis=3)
        left[name] = np.where(hole[..., None], np.array(_GREY, np.uint8), source.images[shown])
    rows = [("original", "what the network sees", source.images[shown])]
    rows += [(name, f"saliency of {name}", pictures) for name, pictures in saliency.items()]
    rows += [
        (f"left by {name}", f"what {name} leaves when it masks as much as the object", pictures)
        for name, pictures in left.items()
    ]
    lines = [
        Line(name, "", say, [enlarge(picture, repeat) for picture in pictures])
        for name, say, pictures in rows
    ]
    return Gallery(
        "claims-pictures",
        "What masks mark, and what masks of equal area leave",
        "The first validation pictures with one object; the models of seed 0.",
        [lines],
        [[source.image_id(index) for index in shown]],
    )


def with_emblems(study: Study) -> SyntheticSource:
    """The validation images, whose evidence is known pixel by pixel."""
    source = study.validation
    if not isinstance(source, SyntheticSource) or source.emblem is None:
        raise ValueError(
            "claims: expected the embedded set with emblems, where evidence is known pixel by "
            f"pixel, got {source.name}; leave --data out, or give synthetic:emblem=N"
        )
    return source


def _images(source: SyntheticSource, limit: int) -> Tensor:
    return normalize(torch.from_numpy(source.images[:limit]))


def _regions(source: SyntheticSource, images: int) -> dict[str, NDArray[np.bool_]]:
    emblem = source.emblem_masks[:images]
    return {"body": source.masks[:images] & ~emblem, "emblem": emblem}


def _equal_area(
    source: SyntheticSource, saliency: NDArray[Any], images: Tensor, referee: Encoder | None
) -> dict[str, float]:
    """Coverage, LE and the referee's accuracy of masks as large as each picture's objects."""
    count, size = len(saliency), source.images.shape[1]
    kept = most_salient(saliency, source.masks[:count].mean(axis=(1, 2)))
    boxes, _ = mask_boxes(torch.from_numpy(kept.astype(np.float32))[:, None])
    truth = [source.boxes(index) for index in range(count)]
    scaled = boxes.numpy().astype(np.int64) * size // saliency.shape[-1]
    found = {key: _share(coverage(kept, region)) for key, region in _regions(source, count).items()}
    found[LE.key] = localisation_error(iou(scaled, truth))
    if referee is not None:
        parts = zip(
            torch.split(images, _BATCH), torch.split(torch.from_numpy(kept), _BATCH), strict=True
        )
        answers = np.concatenate([_answers(referee, part, mask.float()) for part, mask in parts])
        found[REFEREE.key] = _share(answers == source.labels[:count])
    return found


def _answers(
    classifier: Encoder, images: Tensor, saliency: Tensor | None = None
) -> NDArray[np.int64]:
    """Predicted classes ``[n]``, with the saliency ``[n, h, w]`` masked out where there is one."""
    device = next(classifier.parameters()).device
    images = images.to(device)
    if saliency is not None:
        images = blend(images, None, 1 - saliency[:, None].to(device))
    answers: NDArray[np.int64] = classifier(images)[0].argmax(1).cpu().numpy()
    return answers


def _share(values: NDArray[Any]) -> float:
    return float(np.nanmean(values))


def _means(values: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {c.key: float(np.mean([value[c.key] for value in values])) for c in COLUMNS}


def _verdict(found: dict[str, list[dict[str, Any]]], label: dict[str, str]) -> str:
    parts = []
    for key, values in found.items():
        shares = [100 * value["body"] for value in values]
        spread = f" ({min(shares):.0f} to {max(shares):.0f})" if len(shares) > 1 else ""
        parts.append(f"{label[key]} {np.mean(shares):.0f} %{spread}")
    return (
        f"Of the object without its emblem, masks as large as the object cover: {', '.join(parts)}."
    )


def _curves(found: dict[str, list[dict[str, Any]]], label: dict[str, str], region: str) -> Draw:
    """Coverage over area, one line per strategy, with its range over the runs."""

    def draw(axes: Axes, palette: Palette) -> None:
        x = 100 * np.array(SHARES)
        axes.plot(x, x, ":", color=palette.quiet, linewidth=1)
        colours = (palette.second, palette.quiet, palette.first)
        for (key, values), colour in zip(found.items(), colours, strict=True):
            lines = 100 * np.array([value["curve"][region] for value in values])
            axes.fill_between(x, lines.min(0), lines.max(0), color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, lines.mean(0), color=colour, linewidth=1.6, label=label[key])
        axes.set_xlim(0, x[-1])
        axes.set_ylim(0, 100)
        axes.set_xlabel("area kept, % of the picture")
        axes.set_ylabel("covered, %")
        axes.legend(frameon=False, loc="lower right")

    return draw


EXPERIMENT = Experiment(
    "claims",
    "the claim itself: what masks cover of an object with redundant evidence, at equal area",
    run,
    embedded="emblem=100",
)
