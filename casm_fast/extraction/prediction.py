"""One photo: its box, its classes, and its saliency drawn over it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from casm_fast.data.decoders import choose_decoder
from casm_fast.data.geometry import Geometry, geometry
from casm_fast.data.predictions import Convention
from casm_fast.data.transforms import resize
from casm_fast.extraction.config import ExtractConfig
from casm_fast.extraction.drawing import full_saliency, overlay
from casm_fast.extraction.extractor import Extractor
from casm_fast.extraction.pipeline import borrowed, convention_of
from casm_fast.models import checkpoint
from casm_fast.models.placement import choose_device
from casm_fast.models.saliency import SaliencyModel


@dataclass(frozen=True)
class Prediction:
    """What a model finds in a photo.

    Attributes:
        image: ``[H, W, 3]`` uint8 RGB, upright.
        box: (x0, y0, x1, y1) half-open, in pixels of the photo; zeros where nothing is kept.
        classes: Names (numbers where they have none) and probabilities, best first, at most five.
        saliency: ``[h, w]`` float32 in [0, 1], the map's own cells.
        geometry: How the photo became the network's square.
        convention: How the map became the box.
        path: The photo, when it was a file.
    """

    image: NDArray[np.uint8]
    box: tuple[int, int, int, int]
    classes: tuple[tuple[str, float], ...]
    saliency: NDArray[np.float32]
    geometry: Geometry
    convention: Convention
    path: Path | None = None

    def __str__(self) -> str:
        named = ", ".join(f"{name} {score:.1%}" for name, score in self.classes)
        x0, y0, x1, y1 = self.box
        height, width = self.image.shape[:2]
        return (
            f"{self.path or 'photo'}: {width} x {height}, box x {x0} to {x1}, y {y0} to {y1} "
            f"({(x1 - x0) * (y1 - y0) / (width * height):.0%} of the picture); {named}"
        )

    def full_saliency(self) -> NDArray[np.float32]:
        """The saliency of every pixel of the photo, ``[H, W]``; NaN where the network saw nothing.

        A pixel has the value of the cell that its centre lies in.
        """
        return full_saliency(self.saliency, self.geometry, self.convention.size)

    def overlay(self) -> NDArray[np.uint8]:
        """The photo under its saliency in colours, with the box, ``[H, W, 3]``."""
        return overlay(self.image, self.full_saliency(), self.box)

    def save(self, path: str | Path) -> Path:
        """Write the overlay as a picture file, whole or not at all.

        Args:
            path: Its suffix names the format (png, jpg ...); folders are made.

        Returns:
            ``path``.

        Raises:
            ValueError: No format has this suffix.
        """
        from PIL import Image

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
        try:
            Image.fromarray(self.overlay()).save(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path


def predict(
    model: SaliencyModel | str | Path,
    photo: str | Path | NDArray[np.uint8],
    config: ExtractConfig | None = None,
    **overrides: Any,
) -> Prediction:
    """Find the box of one photo, as `casm_fast.extract` finds those of many.

    Args:
        model: A model, its checkpoint, or the folder of a training run; left as it was found.
        photo: A picture file, or ``[H, W, 3]`` uint8 RGB.
        config: Options of the geometry, the box rule, the device and the decoder.
        **overrides: Fields of :class:`ExtractConfig` by name.

    Returns:
        Box, classes and saliency; ``save`` draws them.

    Raises:
        DecodeError: The file cannot be read.
        ValueError: An option out of range, or an array of another shape or type.
    """
    config = dataclasses.replace(config or ExtractConfig(), **overrides)
    path = None
    if isinstance(photo, (str, Path)):
        path = Path(photo)
        image = choose_decoder(config.decoder)(path)
    else:
        image = photo
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"photo: expected a picture [H, W, 3] uint8, got {list(image.shape)} {image.dtype}"
            )
    if not isinstance(model, SaliencyModel):
        model = checkpoint.load(Path(model), device=choose_device(config.device))
    home = next(model.parameters()).device
    device = home if config.device == "auto" else choose_device(config.device)
    convention = convention_of(model, config)
    where = geometry(image.shape[0], image.shape[1], convention.size, convention.policy)
    square = torch.from_numpy(resize(image, convention.size, convention.policy).copy())[None]
    with borrowed(model, device), torch.inference_mode():
        extractor = Extractor(model, convention, device, config.amp)
        saliency, logits = extractor.forward(square)
        none = np.zeros((0, 4), np.int64), np.zeros(0, np.int64)
        found = extractor.measure(saliency, logits, convention.size, *none).measurements()
        likely = logits.softmax(1)[0].cpu()
    best = found.top[0].tolist()
    names = [model.classes[k] if k < len(model.classes) else str(k) for k in best]
    x0, y0, x1, y1 = where.to_original(found.boxes)[0].tolist()
    return Prediction(
        image=image,
        box=(x0, y0, x1, y1),
        classes=tuple(zip(names, likely[best].tolist(), strict=True)),
        saliency=saliency[0, 0].cpu().numpy(),
        geometry=where,
        convention=convention,
        path=path,
    )
