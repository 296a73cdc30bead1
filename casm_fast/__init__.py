"""casm_fast: fast saliency-map training and mask extraction.

* `casm_fast.train` trains classifier-agnostic saliency maps (CASM),
* `casm_fast.load` opens a trained model: images -> (saliency, logits),
* `casm_fast.extract` turns image sets into boxes and mask statistics,
* `casm_fast.evaluate` scores them,
* `casm_fast.ops` holds the fused operators.
"""

from casm_fast import ops

__version__ = "0.1.0"
__all__ = ["__version__", "ops"]
