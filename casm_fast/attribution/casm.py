"""CASM: the saliency of a trained `SaliencyModel`, which looks at no class.

Zolna, Geras & Cho (2020): the decoder's map, enlarged to the image by nearest neighbours as in the
paper. The model is the classifier itself, or given beside it, as an object or as the file or run
folder that ``casm_fast.train`` left::

    casm_fast.attribute("casm", casm_fast.load("runs/x"), images)
    casm_fast.attribute("casm", classifier, images, model="runs/x")
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from casm_fast.attribution.problem import Method, Problem
from casm_fast.attribution.trained import Opened, asked
from casm_fast.models.checkpoint import load
from casm_fast.models.saliency import SaliencyModel, full_size


@dataclass(frozen=True)
class Options:
    """Of CASM."""

    model: SaliencyModel | Opened[SaliencyModel] | str | Path | None = None
    """The trained model, its file or its run folder; None: the classifier, which is one."""

    def __post_init__(self) -> None:
        """Read the model, once for all batches."""
        if isinstance(self.model, (str, Path)):
            object.__setattr__(self, "model", Opened(load(self.model)))


def maps(problem: Problem, options: Options) -> Tensor:
    """See the module; ``[B, 1, H, W]`` in (0, 1)."""
    model = problem.lender if options.model is None else options.model
    if not isinstance(model, (SaliencyModel, Opened)):
        raise ValueError(
            "casm: expected a SaliencyModel as the classifier or as model=, "
            f"got {type(model).__name__}; train one by casm_fast.train, or give its file"
        )
    images = problem.images
    saliency = asked(model, images, lambda lent, shown: lent(shown)[0])
    return full_size(saliency, (images.shape[2], images.shape[3]))


METHODS = (Method("casm", "CASM", "Zolna et al. 2020", maps, Options, uses="nothing"),)
