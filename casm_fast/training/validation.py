"""Validation during training: classifier and mask on images that neither is trained on."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.data import localization
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.source import ImageSource
from casm_fast.data.transforms import normalize
from casm_fast.ops import mask_boxes
from casm_fast.training.engine import Engine
from casm_fast.training.objective import prediction_entropy

ROWS = ("loss", "entropy", "mean_saliency", "accuracy", "masked_accuracy", "overlap", "seen")


@torch.no_grad()
def validate(engine: Engine, source: ImageSource) -> dict[str, float]:
    """Scores of the engine's networks, in evaluation mode, over all images of `source`.

    Of several processes each looks at its share of the images, and all return the same scores.

    Args:
        engine: What is trained; its modes and random numbers are left as they were.
        source: Labelled images.

    Returns:
        Means over the images: `loss` (cross-entropy, clean images, nats), `accuracy` (clean
        images), `masked_accuracy` and `entropy` (prediction on the masked-out images, nats),
        `mean_saliency`, `std_saliency` (of the images' mean saliency); and where the source has
        boxes, `localisation_error`: the share of the images with boxes whose box (largest
        4-connected component of m >= mean(m)) has an IoU of at most 0.5 with every true box.
    """
    devices = [engine.device] if engine.device.type == "cuda" else []
    engine.outcome.eval()
    try:
        # The noise infill draws random numbers; training must not notice.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(engine.config.seed)
            return _scores(engine, source)
    finally:
        engine.set_modes()


def _scores(engine: Engine, source: ImageSource) -> dict[str, float]:
    recipe, world, device = engine.recipe, engine.world, engine.device
    pinned = device.type == "cuda"  # copies from there are not waited for
    start, stop = world.part(len(source))
    # One column per image. Each process fills its own; the sum over the processes is the whole.
    table = torch.zeros(len(ROWS), len(source), dtype=torch.float64)
    for batch in evaluation_batches(
        source,
        size=recipe.input_size,
        batch_size=-(-recipe.batch_size // world.size),
        workers=engine.config.workers,
        start=start,
        stop=stop,
        pin_memory=pinned,
    ):
        if not batch.indices:
            continue
        # The noise infill is one picture, whatever the batches are.
        torch.manual_seed(engine.config.seed)
        images = normalize(batch.images.to(device, non_blocking=True))
        labels = torch.tensor([source.label(i) for i in batch.indices], pin_memory=pinned)
        labels = labels.to(device, non_blocking=True)
        saliency, logits = engine.outcome(images)
        masked_logits, _ = engine.outcome.classifier(engine.passes.masked_out(images, saliency))
        overlap = torch.full((len(labels),), torch.nan, dtype=torch.float64)
        if source.has_boxes and engine.phase == "casm":
            boxes, _ = mask_boxes(saliency)
            truth = [
                geometry.to_network(source.boxes(index))
                for index, geometry in zip(batch.indices, batch.geometries, strict=True)
            ]
            overlap = torch.from_numpy(localization.iou(_enlarge(boxes, saliency, images), truth))
        measured = torch.stack(
            [
                F.cross_entropy(logits, labels, reduction="none"),
                prediction_entropy(masked_logits),
                saliency.mean(dim=(1, 2, 3)),
                (logits.argmax(dim=1) == labels).float(),
                (masked_logits.argmax(dim=1) == labels).float(),
            ]
        )
        seen = torch.ones(1, len(labels), dtype=torch.float64)
        table[:, batch.indices] = torch.cat([measured.cpu().double(), overlap[None], seen])
    table = world.total(table)
    table = table[:-1, table[-1] > 0]
    if not table.shape[1]:
        raise ValueError(
            f"data: expected images to validate on, got none that can be read in {source.name}"
        )
    measured, overlap = table[:-1], table[-1]
    scores = dict(zip(ROWS, measured.mean(dim=1).tolist(), strict=False))
    scores["std_saliency"] = float(measured[2].std()) if measured.shape[1] > 1 else 0.0
    overlap = overlap[~overlap.isnan()]  # NaN: an image without boxes
    if len(overlap):
        scores["localisation_error"] = localization.localisation_error(overlap.numpy())
    return scores


def _enlarge(boxes: Tensor, saliency: Tensor, images: Tensor) -> NDArray[np.int64]:
    """Boxes in cells of the saliency -> boxes in network pixels, by the nearest-neighbour rule.

    A pixel y belongs to the cell y*h//H, so that the cells from y0 to y1 cover the pixels from
    ceil(y0*H/h) to ceil(y1*H/h).
    """
    sides = np.array([images.shape[-1], images.shape[-2]] * 2, np.int64)
    cells = np.array([saliency.shape[-1], saliency.shape[-2]] * 2, np.int64)
    scaled: NDArray[np.int64] = -((-boxes.cpu().numpy().astype(np.int64) * sides) // cells)
    return scaled
