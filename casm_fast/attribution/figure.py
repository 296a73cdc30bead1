"""Pictures of saliency maps: images beside the maps of several methods."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from casm_fast.attribution.methods import METHODS
from casm_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, denormalize
from casm_fast.perturbation.figure import overlay

PER_ROW = 5
"""Pictures side by side where there is one image."""


def comparison(
    images: Tensor,
    maps: Mapping[str, Tensor],
    path: str | Path,
    *,
    titles: Sequence[str] = (),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Path:
    """Draw images and the maps of several methods as colour over them (supplement, Figure 3).

    Several images: a row each, the methods side by side. One image: as many rows as it takes.

    Args:
        images: ``[B, 3, H, W]``, normalised by `mean` and `std`.
        maps: ``[B, 1, H, W]`` by the name of the method, see `shade`.
        path: Picture file.
        titles: One per image.
        mean: Of the images' normalisation.
        std: Of the images' normalisation.

    Returns:
        `path`.

    Raises:
        ValueError: Maps of another shape, or another number of titles.
    """
    from matplotlib.figure import Figure

    B, _, H, W = images.shape
    for name, values in maps.items():
        if values.shape != (B, 1, H, W):
            raise ValueError(
                f"maps: expected {[B, 1, H, W]}, got {list(values.shape)} from {name!r}"
            )
    if titles and len(titles) != B:
        raise ValueError(f"titles: expected {B}, one per image, got {len(titles)}")
    columns: dict[str, NDArray[Any]] = {"": visible(images, mean, std)}
    for name, values in maps.items():
        title = METHODS[name].title if name in METHODS else name
        columns[title] = overlay(images, shade(values), mean, std)
    across = len(columns) if B > 1 else min(PER_ROW, len(columns))
    down = B if B > 1 else -(-len(columns) // across)
    tall = H / W
    # Not by pyplot, which would keep the figure, and ask for a display.
    figure = Figure(figsize=(1.7 * across, (1.7 * tall + 0.25) * down), layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False)
    for one in axes.flat:
        one.set_axis_off()
    for number, (name, shown) in enumerate(columns.items()):
        for row in range(B):
            place = axes[row, number] if B > 1 else axes[divmod(number, across)]
            place.imshow(shown[row], interpolation="nearest")
            if row == 0:
                place.set_title(textwrap.fill(name, 22), fontsize=9)
    for row, title in enumerate(titles):
        axes[row, 0].set_title(title, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp{path.suffix}")
    figure.savefig(unfinished, dpi=150)
    unfinished.replace(path)
    return path


def shade(maps: Tensor) -> Tensor:
    """Maps of any scale as shades in [0, 1]: each from its least value to its highest.

    A map that is the same everywhere becomes 0.

    Args:
        maps: ``[B, 1, H, W]``.
    """
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    return (maps - low) / (high - low).masked_fill(flat, 1)


def visible(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float64]:
    """Normalised images ``[B, 3, H, W]`` as RGB ``[B, H, W, 3]`` in [0, 1]."""
    seen = denormalize(images.detach().double(), tuple(mean), tuple(std))
    return np.asarray(seen.permute(0, 2, 3, 1).cpu().numpy())
