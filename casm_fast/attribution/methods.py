"""Every method by name."""

from __future__ import annotations

from casm_fast.attribution import (
    baselines,
    gradient,
    occlusion,
    rise,
)
from casm_fast.attribution.problem import Method

METHODS: dict[str, Method] = {
    method.name: method
    for module in (
        gradient,
        occlusion,
        rise,
        baselines,
    )
    for method in module.METHODS
}
"""Every method by name, in the order of the paper's tables."""
