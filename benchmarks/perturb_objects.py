"""Do masks lie on the objects? Perturbation beside gradient, centre and random, as a table.

    casm-fast train --output runs/x                     # or any checkpoint that learned the set
    python benchmarks/perturb_objects.py runs/x

Shows the first validation pictures of the embedded set that the checkpoint's classifier gets right.
A map is cut at the object's own area (pixels tied at the cut count in part) for its IoU with the
object's pixels. Pointing: the mean place of the map's maxima lies on the object (supplement of
Fong & Vedaldi 2017, section 4). Score left: what hiding the region leaves of the probability.
Extremal perturbations take long on a CPU, all 800 steps of them, and get the first few pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import casm_fast
from casm_fast.data.source import open_source
from casm_fast.data.synthetic import SyntheticSource
from casm_fast.data.transforms import normalize
from casm_fast.models import open_classifier
from casm_fast.perturbation import PerturbConfig, extremal

SHARE = 64 / 224
"""The embedded set's pictures beside the paper's."""

DEFAULT = PerturbConfig()
SCALED = PerturbConfig(blur_sigma=DEFAULT.blur_sigma * SHARE, jitter=2)
DELETIONS = {
    "deletion, default": DEFAULT,
    "deletion, blur and shifts scaled to 64 pixels": SCALED,
    "deletion, localization's weights": PerturbConfig(lambda_l1=1e-3, tv_beta=2.0),
    "deletion, constant, lambda_l1 1e-3": PerturbConfig(perturbation="constant", lambda_l1=1e-3),
    "deletion, default, random first mask": PerturbConfig(initial="random"),
    "deletion, constant, random first mask": PerturbConfig(
        perturbation="constant", lambda_l1=1e-3, initial="random"
    ),
}


def overlap(maps: Tensor, objects: Tensor) -> Tensor:
    """IoU of maps ``[N, 1, H, W]``, cut at the objects' areas, with objects ``[N, H, W]``."""
    values, inside = maps.flatten(1).double(), objects.flatten(1)
    area = inside.sum(dim=1, keepdim=True)
    border = values.sort(dim=1, descending=True).values.gather(1, area - 1)
    above, tied = values > border, values == border
    share = (area - above.sum(dim=1, keepdim=True)) / tied.sum(dim=1, keepdim=True)
    chosen = above.double() + share * tied
    both = (chosen * inside).sum(dim=1)
    return both / (2 * area[:, 0] - both)


def pointing(maps: Tensor, objects: Tensor) -> Tensor:
    """Whether the mean place of each map's maxima lies on its object, ``[N]``."""
    N, _, H, W = maps.shape
    top = (maps == maps.amax(dim=(2, 3), keepdim=True))[:, 0].double()
    count = top.sum(dim=(1, 2))
    y = (top.sum(dim=2) @ torch.arange(H, dtype=torch.float64) / count).round().long()
    x = (top.sum(dim=1) @ torch.arange(W, dtype=torch.float64) / count).round().long()
    return objects[torch.arange(N), y, x].double()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint or run folder")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--steps", type=int, default=150, help="of deletion")
    parser.add_argument("--extremal-images", type=int, default=16)
    options = parser.parse_args()
    source = open_source("synthetic", split="val")
    if not isinstance(source, SyntheticSource):
        raise SystemExit("expected the embedded set")
    classifier = open_classifier(options.model)
    network = classifier.network
    some = slice(0, 4 * options.images)
    images = normalize(torch.from_numpy(source.images[some]), classifier.mean, classifier.std)
    labels = torch.from_numpy(source.labels[some])
    objects = torch.from_numpy(source.masks[some])
    with torch.no_grad():
        right = torch.nonzero(network(images).argmax(dim=1) == labels)[: options.images, 0]
    images, labels, objects = images[right], labels[right], objects[right]
    print(f"{len(images)} pictures, objects cover {100 * objects.double().mean():.0f} % of them\n")
    print("| map | IoU with the object's pixels | pointing | score left |\n|---|---|---|---|")

    def row(name: str, maps: Tensor, left: str = "") -> None:
        iou, hits = (float(one(maps, objects).mean()) for one in (overlap, pointing))
        print(f"| {name} | {iou:.2f} | {hits:.2f} | {left} |", flush=True)

    targets = labels.tolist()
    for name in ("random", "centre", "gradient"):
        row(name, casm_fast.attribute(name, network, images, targets))
    final = {}
    for name, config in DELETIONS.items():
        made = casm_fast.perturb(network, images, targets, config, steps=options.steps)
        row(name, made.saliency, f"{float(made.score_after.mean()):.3f}")
        final[name] = made.curves.objective[:, -options.steps // 10 :].mean(dim=1)
    print()
    for kind in ("default", "constant"):
        disc, noise = (value for name, value in final.items() if f", {kind}" in name)
        lower = 100 * float((disc < noise).double().mean())
        print(
            f"{kind}: the disc ends at a lower objective on {lower:.0f} % of the pictures, "
            f"{float(disc.mean()):.4f} against {float(noise.mean()):.4f} from a random mask",
            flush=True,
        )
    few = slice(0, options.extremal_images)
    images, labels, objects = images[few], labels[few], objects[few]
    found = extremal(
        network,
        images,
        labels.tolist(),
        areas=(0.05, 0.1, 0.2),
        cell=2,
        sigma=21 * SHARE,
        max_blur=20 * SHARE,
        # Logits a tenth of ImageNet's: the same steps as with ten times the logits.
        area_weight=30.0,
        learning_rate=0.1,
    )
    print(f"\nthe first {len(images)} of them: {found}; areas reached {found.reached.mean(dim=0)}")
    row("extremal, 5, 10 and 20 %, summed", found.saliency)
    row("gradient, of the same", casm_fast.attribute("gradient", network, images, labels.tolist()))
    row(
        "deletion, default, of the same",
        casm_fast.perturb(network, images, labels.tolist(), steps=options.steps).saliency,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
