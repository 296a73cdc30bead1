"""Figure 3: many classifiers on masked-in, masked-out and inpainted masked-out images.

A mask that belongs to no single classifier leaves what every classifier needs (masked-in images
stay recognisable), and takes it away from all of them, also where the hole is filled from its
surroundings (Telea). The masks are those of CASM, of Baseline, and random ones: each cell of the
decoder's grid with probability 1/2. As in the authors' evaluation b is the saliency map at its
mean (eq. 9), every kept pixel, and removed pixels are black.

The classifiers are the seventeen of torchvision that the paper names, with their ImageNet weights,
and ResNets that are trained here with different seeds (twenty in the paper). On another data set
than ImageNet nobody has weights for it: all of them are trained here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from casm_fast.data.loading import ImageBatch, evaluation_batches
from casm_fast.data.predictions import Convention
from casm_fast.data.transforms import normalize
from casm_fast.experiments.figure2 import need_opencv
from casm_fast.experiments.findings import Chart, Column, Findings, Row, Table
from casm_fast.experiments.inpainting import Inpainter
from casm_fast.experiments.study import Experiment, Run, Study
from casm_fast.experiments.table1 import BASELINE, CASM
from casm_fast.models import build_encoder
from casm_fast.models.placement import choose_device
from casm_fast.models.saliency import SaliencyModel, full_size
from casm_fast.report.charts import Draw, Palette
from casm_fast.report.pictures import threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TORCHVISION = (
    "densenet121",
    "densenet169",
    "densenet201",
    "densenet161",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
)
"""The paper's list (footnote 4)."""

TRAINED_TYPES: dict[str, tuple[str, ...]] = {
    "full": ("resnet18", "vgg11_bn", "densenet121"),
    "quick": (),
    "smoke": ("resnet18",),
}
"""Other networks than the data set's own that are trained where there are no weights, by scale."""

ALL_TRAINED = (
    "The paper's networks of torchvision have weights for ImageNet alone: on this data set the "
    "classifiers are trained from scratch, and fewer of them. The one with seed 0 is f(0), which "
    "the Baseline's masks are made to confuse."
)

MASKS = ("CASM", "Baseline", "random")
FORMS = {
    "in": "masked-in",
    "out": "masked-out",
    "inpainted": "masked-out, inpainted",
}
CLEAN = "clean"
CONDITIONS = (CLEAN, *(f"{mask}_{form}" for form in FORMS for mask in MASKS))

CHUNK = 1000
"""Images of a cell: so many are done again at most when the work was stopped."""

BATCH = 100
SEED = 2020


@dataclass(frozen=True)
class Classifier:
    """A network that is asked.

    Attributes:
        name: Unique.
        weights: Where its weights are from.
        load: Gives the network, ``[B, 3, S, S]`` -> logits, in eval mode, on its device.
        seeded: Whether it is one of the ResNets trained with different seeds.
    """

    name: str
    weights: str
    load: Callable[[], nn.Module]
    seeded: bool

    @cached_property
    def network(self) -> nn.Module:
        """The network, loaded when it is asked first."""
        return self.load()


def run(study: Study) -> Findings:
    """Ask every classifier about every image in every form."""
    need_opencv("figure3")
    runs = {"CASM": study.train(strategy=CASM), "Baseline": study.train(strategy=BASELINE)}
    asked = classifiers(study)
    hits = {one.name: dict.fromkeys(CONDITIONS, 0) for one in asked}
    images = 0
    for start in range(0, study.limit, CHUNK):
        stop = min(start + CHUNK, study.limit)
        study.progress(f"images {start:,} to {stop:,} of {study.limit:,}")
        found = study.cell(
            f"images-{start:06d}",
            partial(count, study, runs, asked, start, stop),
            masks=[trained.folder.name for trained in runs.values()],
            classifiers=[[one.name, one.weights] for one in asked],
            stop=stop,
        )
        images += found["images"]
        for name, counts in found["hits"].items():
            for condition, number in counts.items():
                hits[name][condition] += number
    rows = [
        Row(one.name, {key: hits[one.name][key] / images for key in CONDITIONS}) for one in asked
    ]
    mean = {key: sum(row.ours[key] or 0.0 for row in rows) / len(rows) for key in CONDITIONS}
    table = Table(
        "figure3",
        "Accuracy of the classifiers",
        [Column(key, _head(key)) for key in CONDITIONS],
        [*rows, Row("mean", mean, kind="ours")],
        note="Shares of correctly classified images, in percent. The paper shows its values as "
        "dots, without numbers.",
    )
    lift = {name: 100 * (mean[f"{name}_inpainted"] - mean[f"{name}_out"]) for name in runs}
    return Findings(
        f"Inpainting what the mask removed changes the mean accuracy of {len(asked)} classifiers "
        f"by {lift['Baseline']:+.1f} points for Baseline and by {lift['CASM']:+.1f} for CASM; on "
        f"what the masks keep it is {100 * mean['Baseline_in']:.1f} and "
        f"{100 * mean['CASM_in']:.1f} %.",
        [table],
        [
            Chart(
                "figure3",
                "Many classifiers",
                "Accuracy on masked-in (left), masked-out (centre) and inpainted masked-out images "
                "(right). Orange: ResNets trained with different seeds; blue: other networks. "
                "Dots are moved sideways to be told apart.",
                _draw(rows, {one.name for one in asked if one.seeded}),
                (9.0, 3.8),
            )
        ],
        notes=[
            "Removed pixels are black, as in the authors' evaluation; in training they are the "
            "mean colour.",
            *([] if _has_weights(study) else [ALL_TRAINED]),
            *study.remarks,
        ],
    )


def classifiers(study: Study) -> list[Classifier]:
    """Every network that is asked, the seeded ResNets last."""
    found = []
    if _has_weights(study):
        device = choose_device(study.device)
        for name in TORCHVISION:
            load = partial(_of_torchvision, name, device)
            found.append(Classifier(name, "imagenet", load, seeded=False))
    else:
        for name in TRAINED_TYPES[study.scale.name]:
            study.progress(f"classifier {name}")
            trained = study.classifier(backbone=name)
            load = partial(_of_run, trained)
            found.append(Classifier(name, trained.folder.name, load, seeded=False))
    for seed in range(study.repeats(full=20, quick=3, smoke=2)):
        study.progress(f"classifier with seed {seed}")
        trained = study.classifier(seed=seed)
        name = f"{trained.config.backbone}, seed {seed}"
        load = partial(_of_run, trained)
        found.append(Classifier(name, trained.folder.name, load, seeded=True))
    return found


def _of_torchvision(name: str, device: torch.device) -> nn.Module:
    return build_encoder(name, weights="imagenet").backbone.to(device).eval()


def _of_run(trained: Run) -> nn.Module:
    return trained.model().classifier.backbone


def count(
    study: Study,
    runs: dict[str, Run],
    asked: Sequence[Classifier],
    start: int,
    stop: int,
) -> dict[str, object]:
    """Correct answers of every classifier to the images from start to stop, by condition."""
    models = {name: trained.model() for name, trained in runs.items()}
    size = models["CASM"].input_size
    device = next(models["CASM"].parameters()).device
    totals = torch.zeros(len(asked), len(CONDITIONS), dtype=torch.int64, device=device)
    images = 0
    with Inpainter() as inpainter, torch.inference_mode():
        batches = evaluation_batches(
            study.validation,
            size=size,
            batch_size=BATCH,
            workers=study.workers,
            start=start,
            stop=stop,
        )
        for prepared in _ahead(prepare(study, models, batch, inpainter) for batch in batches):
            if not len(prepared.labels):
                continue
            images += len(prepared.labels)
            labels = prepared.labels.to(device)
            for column, condition in enumerate(CONDITIONS):
                shown = normalize(prepared.views(condition).to(device))
                for row, one in enumerate(asked):
                    right = one.network(shown).argmax(dim=1) == labels
                    totals[row, column] += right.sum()
    return {
        "images": images,
        "hits": {
            one.name: dict(zip(CONDITIONS, counts, strict=True))
            for one, counts in zip(asked, totals.tolist(), strict=True)
        },
    }


@dataclass(frozen=True)
class Prepared:
    """A batch, its masks, and the inpainting that is under way.

    Attributes:
        images: ``[B, S, S, 3]`` uint8.
        labels: ``[B]``.
        masks: ``[B, S, S]`` bool by name, true where a mask keeps the pixel in its masked-in image.
        filled: Inpainted masked-out images by mask.
    """

    images: NDArray[np.uint8]
    labels: Tensor
    masks: dict[str, NDArray[np.bool_]]
    filled: dict[str, list[Future[NDArray[np.uint8]]]]

    def views(self, condition: str) -> Tensor:
        """The images in one of `CONDITIONS`, ``[B, S, S, 3]`` uint8; waits for the inpainting."""
        if condition == CLEAN:
            return torch.from_numpy(self.images)
        mask, _, form = condition.rpartition("_")
        if form == "inpainted":
            return torch.from_numpy(np.stack([made.result() for made in self.filled[mask]]))
        kept = self.masks[mask] if form == "in" else ~self.masks[mask]
        return torch.from_numpy(self.images * kept[..., None])


def prepare(
    study: Study, models: dict[str, SaliencyModel], batch: ImageBatch, inpainter: Inpainter
) -> Prepared:
    """Masks of a batch, with the inpainting begun."""
    pictures = batch.images.numpy()
    size = pictures.shape[1]
    masks = {}
    for name, model in models.items():
        convention = Convention(size, model.resize_policy, "mean", 1.0, "all", 4)
        device = next(model.parameters()).device
        saliency, _ = model(normalize(batch.images.to(device), model.mean, model.std))
        cells = tuple(saliency.shape[-2:])
        kept = threshold(saliency.float().cpu(), convention)
        masks[name] = full_size(kept.float(), (size, size))[:, 0].numpy() > 0
    masks["random"] = np.stack([random_mask(index, cells, size) for index in batch.indices])
    labels = torch.tensor([study.validation.label(i) for i in batch.indices], dtype=torch.int64)
    return Prepared(
        pictures,
        labels,
        masks,
        {name: inpainter.start(pictures, mask) for name, mask in masks.items()},
    )


def random_mask(index: int, cells: tuple[int, ...], size: int) -> NDArray[np.bool_]:
    """Every cell of a grid with probability 1/2, always the same for the same image.

    Args:
        index: Of the image.
        cells: ``(h, w)``.
        size: Side S of the image.

    Returns:
        ``[S, S]``.
    """
    drawn = np.random.default_rng([SEED, index]).random(cells) < 0.5
    enlarged = full_size(torch.from_numpy(drawn)[None, None].float(), (size, size))
    return np.asarray(enlarged[0, 0].numpy() > 0)


def _ahead(batches: Iterator[Prepared]) -> Iterator[Prepared]:
    """The batches, the next one begun while one is in use."""
    waiting: deque[Prepared] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _has_weights(study: Study) -> bool:
    """Whether torchvision's weights are for this data set."""
    return study.validation.name.startswith("imagenet") and len(study.validation.classes) == 1000


def _head(condition: str) -> str:
    mask, _, form = condition.rpartition("_")
    return f"{mask} {form}" if mask else condition


def _draw(rows: Sequence[Row], seeded: set[str]) -> Draw:
    """Three panels side by side, a column of dots for every mask."""

    def draw(axes: Axes, palette: Palette) -> None:
        jitter = np.random.default_rng(SEED).uniform(-0.22, 0.22, len(rows))
        places, names = [], []
        for panel, (form, title) in enumerate(FORMS.items()):
            left = panel * (len(MASKS) + 1)
            for column, mask in enumerate(MASKS):
                places.append(left + column)
                names.append(mask)
                for row, shift in zip(rows, jitter, strict=True):
                    axes.plot(
                        left + column + shift,
                        100 * (row.ours[f"{mask}_{form}"] or 0.0),
                        "o",
                        markersize=4,
                        color=palette.second if row.name in seeded else palette.first,
                    )
            axes.text(left + 1, 103, title, ha="center", va="bottom", color=palette.ink)
        axes.set_xticks(places, names)
        axes.set_ylim(0, 102)
        axes.set_ylabel("accuracy %")

    return draw


EXPERIMENT = Experiment(
    "figure3",
    "many classifiers on masked-in, masked-out and inpainted images",
    run,
    needs_boxes=False,
)
