"""Every method by name."""

from __future__ import annotations

from casm_fast.attribution import (
    baselines,
    casm,
    gradient,
    inversion,
    occlusion,
    perturbation,
    realtime,
    rise,
)
from casm_fast.attribution.problem import Method

METHODS: dict[str, Method] = {
    method.name: method
    for module in (
        gradient,
        occlusion,
        rise,
        inversion,
        perturbation,
        realtime,
        casm,
        baselines,
    )
    for method in module.METHODS
}
"""Every method by name, in the order of the paper's tables."""
