"""What an extraction is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from casm_fast.data.geometry import Policy

Rule = Literal["mean", "area", "value", "energy"]
Component = Literal["largest", "all"]
Precision = Literal["off", "bf16", "fp16"]

CHOICES: dict[str, tuple[object, ...]] = {
    "resize_policy": ("crop", "squash", None),
    "rule": ("mean", "area", "value", "energy"),
    "component": ("largest", "all"),
    "connectivity": (4, 8),
    "amp": ("off", "bf16", "fp16"),
}
LEAST = {"input_size": 1, "batch_size": 1, "workers": 0, "limit": 1}


@dataclass(frozen=True)
class ExtractConfig:
    """How images become boxes. The defaults are the conventions of the CASM paper."""

    input_size: int | None = None
    """Side of the square that the network sees, in pixels; else the model's training size."""

    resize_policy: Policy | None = None
    """Shorter side to the input size and centre crop, or squash both sides; else as in training."""

    rule: Rule = "mean"
    """Threshold of the saliency m. mean: m >= alpha * mean(m). area: the pixels with the highest m,
    as many as a share of alpha * mean(m). value: alpha of the way from min to max. energy: the
    highest m that hold alpha of the mass."""

    alpha: float = 1.0
    """Parameter of the rule."""

    component: Component = "largest"
    """Box of the largest connected component, or of all kept pixels."""

    connectivity: Literal[4, 8] = 4
    """Neighbours of a pixel."""

    batch_size: int = 64
    """Images per forward pass."""

    workers: int = 4
    """Threads that decode images beside the network; 0 decodes in between. The boxes do not depend
    on it, and a set in memory needs none."""

    device: str = "auto"
    """"auto" (for a model from a file: a GPU when there is one), "cpu", "cuda", "cuda:1" ..."""

    amp: Precision = "off"
    """Mixed precision of the network's forward pass; everything after it is float32 or better."""

    limit: int | None = None
    """Only the first so many images; else all."""

    progress: bool = True
    """Show a progress bar when the error stream is a terminal."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            ValueError: Naming the field, what was expected and what came.
        """
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                known = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha: expected a number >= 0, got {self.alpha}")
