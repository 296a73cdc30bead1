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


@torch.no_grad()
def validate(engine: Engine, source: ImageSource) -> dict[str, float]:
    """Scores of the engine's networks, in evaluation mode, over all images of `source`.

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
    engine.model.eval()
    try:
        # The noise infill draws random numbers; training must not notice.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(engine.config.seed)
            return _scores(engine, source)
    finally:
        engine.set_modes()


def _scores(engine: Engine, source: ImageSource) -> dict[str, float]:
    rows: list[Tensor] = []
    overlaps: list[NDArray[np.float64]] = []
    recipe = engine.recipe
    for batch in evaluation_batches(
        source, size=recipe.input_size, batch_size=recipe.batch_size, workers=engine.config.workers
    ):
        if not batch.indices:
            continue
        images = normalize(batch.images.to(engine.device))
        labels = torch.tensor([source.label(i) for i in batch.indices], device=engine.device)
        saliency, logits = engine.model(images)
        masked_logits, _ = engine.model.classifier(engine.masked_out(images, saliency))
        rows.append(
            torch.stack(
                [
                    F.cross_entropy(logits, labels, reduction="none"),
                    prediction_entropy(masked_logits),
                    saliency.mean(dim=(1, 2, 3)),
                    (logits.argmax(dim=1) == labels).float(),
                    (masked_logits.argmax(dim=1) == labels).float(),
                ]
            )
        )
        if source.has_boxes and engine.phase == "casm":
            boxes, _ = mask_boxes(saliency)
            truth = [
                geometry.to_network(source.boxes(index))
                for index, geometry in zip(batch.indices, batch.geometries, strict=True)
            ]
            known = [row for row, of_image in enumerate(truth) if len(of_image)]
            predicted = _enlarge(boxes, saliency, images)[known]
            overlaps.append(localization.iou(predicted, [truth[row] for row in known]))
    if not rows:
        raise ValueError(
            f"data: expected images to validate on, got none that can be read in {source.name}"
        )
    table = torch.cat(rows, dim=1).double()
    names = ("loss", "entropy", "mean_saliency", "accuracy", "masked_accuracy")
    scores = dict(zip(names, table.mean(dim=1).tolist(), strict=True))
    scores["std_saliency"] = float(table[2].std()) if table.shape[1] > 1 else 0.0
    if sum(len(part) for part in overlaps):
        scores["localisation_error"] = localization.localisation_error(np.concatenate(overlaps))
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
