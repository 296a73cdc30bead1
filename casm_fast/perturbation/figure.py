"""Pictures of masks: overlays, a grid of images, and the twelve panels of one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from casm_fast import ops
from casm_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, denormalize
from casm_fast.perturbation.result import Perturbation
from casm_fast.perturbation.showing import pictures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPACITY = 0.5
"""Of the colours over an image."""

COLOURS = "jet"
"""The papers' own: red is salient."""


def overlay(
    images: Tensor,
    saliency: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> NDArray[np.uint8]:
    """Saliency as colour over images, as in the supplement's figures.

    Args:
        images: ``[B, 3, H, W]``, normalised by `mean` and `std`.
        saliency: ``[B, 1, H, W]`` in [0, 1].
        mean: Of the normalisation.
        std: Of the normalisation.

    Returns:
        ``[B, H, W, 3]`` RGB.
    """
    import matplotlib

    colours = matplotlib.colormaps[COLOURS](saliency[:, 0].double().cpu().numpy())[..., :3]
    mixed = (1 - OPACITY) * _visible(images, mean, std) + OPACITY * colours
    return np.asarray((255 * mixed).round(), dtype=np.uint8)


def grid(
    made: Perturbation,
    images: Tensor,
    path: str | Path,
    *,
    others: dict[str, Tensor] | None = None,
    titles: Sequence[str] = (),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Path:
    """Draw one row per image: itself, its mask, what is left, and other methods' maps beside it.

    The supplement's Figure 3.

    Args:
        made: Masks of B images.
        images: The images, ``[B, 3, H, W]``.
        path: Picture file.
        others: Maps ``[B, 1, H, W]`` of other methods by name, each stretched to [0, 1] per image.
        titles: One per image; without: its class and scores.
        mean: Of the images' normalisation.
        std: Of the images' normalisation.

    Returns:
        `path`.

    Raises:
        ValueError: `images` or a map do not fit to `made`, or the number of titles.
    """
    others = others or {}
    _check(made, images)
    for name, values in others.items():
        if values.shape != made.masks_full.shape:
            raise ValueError(
                f"others: expected maps {list(made.masks_full.shape)}, "
                f"got {list(values.shape)} from {name!r}"
            )
    if titles and len(titles) != len(images):
        raise ValueError(f"titles: expected {len(images)}, one per image, got {len(titles)}")
    columns: dict[str, NDArray[Any]] = {
        "image": _visible(images, mean, std),
        "saliency": overlay(images, made.saliency, mean, std),
    }
    if made.perturbed is not None:
        columns["perturbed"] = _visible(made.perturbed, mean, std)
    for name, values in others.items():
        columns[name] = overlay(images, _stretched(values), mean, std)
    rows = len(images)
    figure = _figure(1.8 * len(columns), 1.95 * rows)
    axes: Any = figure.subplots(rows, len(columns), squeeze=False)
    for place, (name, shown) in enumerate(columns.items()):
        axes[0, place].set_title(name, fontsize=9)
        for row in range(rows):
            _picture(axes[row, place], shown[row])
    for row in range(rows):
        axes[row, 0].set_ylabel(titles[row] if titles else _caption(made, row), fontsize=7)
    return _save(figure, path)


def panels(
    made: Perturbation,
    images: Tensor,
    path: str | Path,
    *,
    index: int = 0,
    title: str = "",
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Path:
    """Draw everything about one image: eight pictures and four curves.

    Args:
        made: Masks of B images, without a layer.
        images: The images, ``[B, 3, H, W]``.
        path: Picture file.
        index: Which image.
        title: Over the figure; without: its classes and scores.
        mean: Of the images' normalisation.
        std: Of the images' normalisation.

    Returns:
        `path`.

    Raises:
        ValueError: `images` do not fit to `made`, or it was made with a layer.
    """
    _check(made, images)
    if made.perturbed is None:
        raise ValueError(
            f"panels: expected masks of images, got masks of the layer {made.config.layer!r}; "
            "use grid"
        )
    one = slice(index, index + 1)
    image, mask = images[one].to(made.masks.dtype), made.masks[one]
    still = pictures(image, made.config)
    shift = torch.zeros(2, dtype=torch.int32, device=image.device)
    first = ops.upsample_mask(made.first_masks[one], still.size, made.config.mask_sigma)
    maps = made.saliency[one]
    shown = {
        "image": _visible(image, mean, std),
        "replacement": _visible(still.shown(torch.zeros_like(mask), shift), mean, std),
        "perturbed": _visible(made.perturbed[one], mean, std),
        "complement": _visible(still.shown(1 - mask, shift), mean, std),
        "first mask": first[:, 0].cpu().numpy(),
        "mask": made.masks_full[one, 0].cpu().numpy(),
        "mask, as learned": mask[:, 0].cpu().numpy(),
        "saliency": overlay(image, maps, mean, std),
    }
    figure = _figure(8.6, 6.8)
    axes: Any = figure.subplots(3, 4).flatten()
    for place, (name, picture) in enumerate(shown.items()):
        _picture(axes[place], picture[0])
        axes[place].set_title(name, fontsize=9)
    curves = made.curves
    for place, (name, values) in enumerate(
        {
            "objective": curves.objective,
            "score": curves.score,
            "L1 norm": curves.l1,
            "total variation": curves.tv,
        }.items(),
        start=len(shown),
    ):
        axes[place].plot(values[index].cpu().numpy(), linewidth=1)
        axes[place].set_title(name, fontsize=9)
        axes[place].tick_params(labelsize=7)
    figure.suptitle(title or _caption(made, index).replace("\n", ", "), fontsize=10)
    return _save(figure, path)


def _check(made: Perturbation, images: Tensor) -> None:
    B, _, H, W = made.masks_full.shape
    if images.shape != (B, 3, H, W):
        raise ValueError(
            f"images: expected the masks' images {[B, 3, H, W]}, got {list(images.shape)}"
        )


def _caption(made: Perturbation, row: int) -> str:
    classes = ", ".join(str(one) for one in made.targets[row].tolist() if one >= 0)
    before, after = float(made.score_before[row]), float(made.score_after[row])
    failed = "\ndiverged" if bool(made.diverged[row]) else ""
    return f"class {classes}\n{before:.3f} → {after:.3f}{failed}"


def _visible(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float64]:
    """``[B, H, W, 3]`` in [0, 1]."""
    seen = denormalize(images.detach().double(), tuple(mean), tuple(std))
    return np.asarray(seen.permute(0, 2, 3, 1).cpu().numpy())


def _stretched(maps: Tensor) -> Tensor:
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def _figure(width: float, height: float) -> Figure:
    # Not by pyplot, which would keep the figure, and ask for a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _picture(axes: Axes, values: NDArray[Any]) -> None:
    axes.imshow(values, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
