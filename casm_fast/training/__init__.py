"""Training: Algorithm 1 with every thinning strategy, exactly resumable.

Read in this order: `config` (what can be chosen), `objective` (eq. 7 and 8), `history` (the sampled
classifiers), `passes` (forward passes and gradients), `compiled` (the same as graphs), `descent`
(gradients to steps), `average`, `engine` (one step), `distributed` (several processes), `loop`
(`train`), then `state`, `validation` and `progress`.
"""

from casm_fast.training.config import TrainConfig
from casm_fast.training.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
