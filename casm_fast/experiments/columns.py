"""The columns that tables of localisation share, and their values from scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from casm_fast.evaluation.published import Published
from casm_fast.experiments.findings import Column

LE = Column("le", "LE ↓ %")
OM = Column("om", "OM ↓ %")
F1 = Column("f1", "F1 ↑ %")
VOLUME = Column("mean_saliency", "mean saliency", ".2f")


def localisation(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """LE, OM, F1 and the mean saliency of `Study.scores`."""
    found = scores["localisation"]
    if found is None:
        raise ValueError(
            f"expected images with true boxes among those scored, got none in {scores['source']}"
        )
    return {**{key: found[key] for key in ("le", "om", "f1")}, **volume(scores)}


def volume(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """The mean saliency of `Study.scores`."""
    return {"mean_saliency": scores["saliency"]["mean"]}


def published(entry: Published) -> dict[str, float | None]:
    """A published result by the keys of the columns."""
    return {"le": entry.le, "om": entry.om, "f1": entry.f1}
