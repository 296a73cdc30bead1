"""Every method by name."""

from __future__ import annotations

from casm_fast.attribution import (
    baselines,
    casm,
    excitation,
    feedback,
    grad_cam,
    gradient,
    guided,
    inversion,
    occlusion,
    perturbation,
    realtime,
    relevance,
    rise,
)
from casm_fast.attribution.problem import Method

METHODS: dict[str, Method] = {
    method.name: method
    for module in (
        *(gradient, guided, grad_cam, excitation, relevance, feedback),
        *(occlusion, rise, inversion, realtime, perturbation, casm, baselines),
    )
    for method in module.METHODS
}
"""Every method by name, in the order of the paper's tables."""
