"""The sample set F of Algorithm 1: earlier classifiers that may be drawn as the judge f' of a mask.

The paper samples classifiers f(k) from a posterior by training one with SGD, and asks the mask to
confuse a classifier drawn from all of them, "the chance of selecting f(k) [the newest] 50 %, the
remaining 50 % uniformly over F" (section 3.3). What is kept of F is the thinning strategy: F and L
keep nothing beside the live classifier, FL keeps f(0), Lk keeps one of every k iterations, f(0)
included, and once `size` are held a random one makes room.

Snapshots are copies of all parameters and buffers. They judge in evaluation mode, with their own
running statistics, through `torch.func.functional_call` on a skeleton without storage, so that the
live classifier is never touched and no weights are loaded in the loop. The draws come from a
private generator on the host: no device synchronisation, and the same draws on every device.

On a GPU copies to and from pinned host memory are ordered with the steps, and nothing waits: who
reads a snapshot on the host waits for the device first, as `casm_fast.training.state` does.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from casm_fast.models.memory import free_on_gpu
from casm_fast.training.config import Strategy

Snapshot = dict[str, Tensor]


class History:
    """A bounded set of classifier snapshots.

    Attributes:
        snapshots: The samples, name -> tensor each; at most `size`.
        steps: The iteration at which each of them was taken.
    """

    def __init__(
        self,
        classifier: nn.Module,
        strategy: Strategy,
        *,
        size: int = 30,
        probability: float = 0.5,
        place: str = "auto",
        seed: int = 0,
    ) -> None:
        """Begin with an empty set; `observe` fills it.

        Args:
            classifier: The live classifier; only its structure and device are taken here.
            strategy: Which iterations are kept.
            size: Most snapshots held.
            probability: Chance that `draw` takes a snapshot instead of the live classifier.
            place: ``"device"`` (the classifier's), ``"host"``, or ``"auto"``: the device when
                `size` snapshots take at most a quarter of its free memory.
            seed: Seed of the draws.
        """
        self.strategy = strategy
        self.size = 1 if strategy.keeps_first else size
        self.probability = probability if strategy.keeps_first or strategy.interval else 0.0
        self.snapshots: list[Snapshot] = []
        self.steps: list[int] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.device = next(classifier.parameters()).device
        self.storage = _storage(classifier, self.device, self.size, place)
        self._skeleton = copy.deepcopy(classifier).to("meta").eval().requires_grad_(False)

    def observe(self, step: int, classifier: nn.Module) -> None:
        """Offer f(step), the classifier before its update number `step`, counted from 0."""
        interval = self.strategy.interval
        due = (
            step == 0
            if self.strategy.keeps_first
            else interval is not None and step % interval == 0
        )
        if not due:
            return
        live = _tensors(classifier)
        if len(self.snapshots) < self.size:
            self.snapshots.append({name: self._copy(tensor) for name, tensor in live.items()})
            self.steps.append(step)
            return
        slot = int(torch.randint(self.size, (), generator=self.generator))
        for name, tensor in live.items():
            self.snapshots[slot][name].copy_(tensor, non_blocking=True)
        self.steps[slot] = step

    def draw(self) -> Snapshot | None:
        """The judge of this iteration: a snapshot, or `None` for the live classifier."""
        if self.probability == 0.0 or not self.snapshots:
            return None
        if float(torch.rand((), generator=self.generator, dtype=torch.float64)) >= self.probability:
            return None
        return self.snapshots[int(torch.randint(len(self.snapshots), (), generator=self.generator))]

    def fetch(self) -> Snapshot | None:
        """`draw`, with the snapshot's tensors on the classifier's device; nothing waits."""
        snapshot = self.draw()
        if snapshot is None:
            return None
        return {
            name: tensor.to(self.device, non_blocking=True) for name, tensor in snapshot.items()
        }

    def judge(self, snapshot: Snapshot, images: Tensor) -> Tensor:
        """Logits of a snapshot in evaluation mode: ``[B, 3, H, W] -> [B, K]``, differentiable.

        Args:
            snapshot: What `fetch` gave, on the device of the images.
            images: Normalised, ``[B, 3, H, W]``.
        """
        logits: Tensor
        logits, _ = torch.func.functional_call(self._skeleton, snapshot, (images,), strict=True)
        return logits

    def restore(self, steps: list[int], snapshots: list[Snapshot], generator_state: Tensor) -> None:
        """Take copies of saved snapshots, the steps they are of, and the position of the draws."""
        self.steps = list(steps)
        self.snapshots = [
            {name: self._copy(tensor) for name, tensor in snapshot.items()}
            for snapshot in snapshots
        ]
        self.generator.set_state(generator_state)

    def _copy(self, tensor: Tensor) -> Tensor:
        pinned = self.storage.type == "cpu" and self.device.type == "cuda"
        copied = torch.empty_like(
            tensor, device=self.storage, pin_memory=pinned, requires_grad=False
        )
        return copied.copy_(tensor.detach(), non_blocking=True)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All that a forward pass reads: parameters, and buffers that are not persistent too."""
    return {**{n: p.detach() for n, p in module.named_parameters()}, **dict(module.named_buffers())}


def _storage(classifier: nn.Module, device: torch.device, size: int, place: str) -> torch.device:
    """Where snapshots are kept."""
    if place == "host":
        return torch.device("cpu")
    if place == "auto" and device.type == "cuda":
        needed = size * sum(tensor.nbytes for tensor in _tensors(classifier).values())
        return device if needed <= free_on_gpu(device) // 4 else torch.device("cpu")
    return device
