"""Several processes that do one run: what they share, and when they talk.

torchrun starts N processes ("ranks"). Each takes its N-th of every batch; all hold the same
weights, optimisers, history and random numbers, and do the same steps. Rank 0 alone writes.

Gradients are averaged explicitly instead of by `DistributedDataParallel`: its hooks fire in
``backward()`` alone, while a step takes the gradients of two objectives with
`torch.autograd.grad`, each for its own parameters (the judge must get none), and may run one
network twice. `World.start_mean` flattens them into one buffer: one collective per objective, both
on their way at once. Each rank's gradient is weighted by its number of images, so that the result
is the gradient of the mean over the whole batch also where a rank could not read all of its images.

Tensors on a GPU go through NCCL. Host values (stop requests, counts, checks) go through gloo and
never wait for a device.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from casm_fast.models.placement import choose_device

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

# Seconds for which the ranks that have nothing to tell wait: torchrun ends all as soon as one has
# ended, and the one that speaks must have spoken by then.
SPEAKING = 1.0

# How long the ranks wait for one another when they start.
JOINING = timedelta(minutes=30)

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Every method but `part` is a collective: all ranks call it, at the same place, in the same
    order. With one process each of them returns at once.

    Attributes:
        rank: This process, from 0.
        size: How many there are.
        device: Where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank writes logs, states and models: rank 0."""
        return self.rank == 0

    def part(self, count: int) -> tuple[int, int]:
        """Start and stop of this rank's share of `count` things; shares differ by one at most."""
        return count * self.rank // self.size, count * (self.rank + 1) // self.size

    def weight(self, images: int, batch_size: int) -> float:
        """What this rank's mean over `images` counts for: 1 for a full share of the batch."""
        return 1.0 if self.size == 1 else images * self.size / batch_size

    def start_mean(
        self, tensors: Sequence[Tensor | None], weight: float
    ) -> Callable[[], Sequence[Tensor | None]]:
        """Begin to average tensors over the ranks; nothing waits.

        Args:
            tensors: This rank's, times its weight, of any shapes, on `device`; `None` at the same
                places on every rank.
            weight: See `weight`.

        Returns:
            A function to call once. It returns the sums over the ranks divided by the sum of the
            weights: new tensors of the same shapes and layouts, equal in every bit on all ranks.
        """
        present = [tensor.detach() for tensor in tensors if tensor is not None]
        if self.size == 1 or not present:
            return lambda: tensors
        count = torch.full((1,), weight, dtype=present[0].dtype, device=self.device)
        flat = torch.cat([*(tensor.reshape(-1) for tensor in present), count])
        work = dist.all_reduce(flat, async_op=True)

        def finish() -> Sequence[Tensor | None]:
            work.wait()
            flat[:-1].div_(flat[-1].clone())
            means = [torch.empty_like(tensor) for tensor in present]
            parts = torch.split(flat[:-1], [tensor.numel() for tensor in present])
            torch._foreach_copy_(
                means, [part.view(mean.shape) for part, mean in zip(parts, means, strict=True)]
            )
            queue = iter(means)
            return [None if tensor is None else next(queue) for tensor in tensors]

        return finish

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in a new tensor; does not wait for a GPU."""
        summed = tensor.clone()
        if self.size > 1:
            dist.all_reduce(summed)
        return summed

    def smallest(self, tensor: Tensor) -> Tensor:
        """The elementwise minimum over the ranks, in a new tensor; does not wait for a GPU."""
        least = tensor.clone()
        if self.size > 1:
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return least

    def totals(self, *numbers: int) -> list[int]:
        """Sums of host numbers over the ranks; the hosts wait for one another."""
        if self.size == 1:
            return list(numbers)
        return [int(n) for n in self.total(torch.tensor(numbers, dtype=torch.int64)).tolist()]

    def gathered(self, texts: Sequence[str]) -> list[str]:
        """The texts of all ranks, in the order of the ranks; the hosts wait for one another."""
        if self.size == 1:
            return list(texts)
        parts: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(texts))
        return [text for part in parts for text in part]

    def wait(self) -> None:
        """Go on when every rank has come here."""
        self.totals(0)

    def told_by_leader(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.size == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def check_equal(self, what: str, value: str) -> None:
        """Refuse to go on when the ranks are not of one mind.

        Args:
            what: Names the value, and says what to do where it differs, in the message.
            value: Compared by its SHA-256.

        Raises:
            ValueError: On every rank, naming those that differ from rank 0.
        """
        if self.size == 1:
            return
        digest = int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        digests = torch.zeros(self.size, dtype=torch.int64)
        digests[self.rank] = digest
        found = self.total(digests).tolist()
        others = [rank for rank in range(self.size) if found[rank] != found[0]]
        if others:
            raise ValueError(
                f"{self.size} processes: expected all of them to have {what}; got another one on "
                f"rank {', '.join(map(str, others))} than on rank 0"
            )


def alone(device: torch.device) -> World:
    """The world of a single process."""
    return World(0, 1, device)


def leads() -> bool:
    """Whether this process may speak for the run: rank 0, by the environment alone."""
    return int(os.environ.get("WORLD_SIZE", "1")) <= 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun, a world of one.

    An error on one rank ends all of them. The first that meets one raises it; the others, which
    met the same one or lost the connection, leave with ``SystemExit(1)``, so that it is told once.

    Args:
        device: As in `TrainConfig`; ``"auto"`` and ``"cuda"`` give each process of a machine its
            own GPU.

    Yields:
        The world.

    Raises:
        ValueError: An environment, or a device, that cannot be used.
        ConnectionError: Another process is gone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield alone(choose_device(device))
        return
    rank, size, local_rank = _environment()
    # Not in a torch without torch.distributed, which _environment refuses.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=JOINING)))
    gpu = device != "cpu" and torch.cuda.is_available()
    try:
        store = PrefixStore(_attempt(store, rank, size), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
        )
        yield World(rank, size, _device(device, local_rank))
    except Exception as error:
        if not _first(store):
            logger.debug("rank %d leaves: %s", rank, error, exc_info=True)
            time.sleep(SPEAKING)
            raise SystemExit(1) from error
        if _connection_lost(error):
            reason = re.sub(r"^\[\S+\] ", "", str(error).partition("\n")[0]).rstrip(".")
            raise ConnectionError(
                f"rank {rank} of {size} lost the connection to another process ({reason}); if that "
                "one has ended, start all again with resume=True to go on from the last saved state"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def check_batch_size(world: World, batch_size: int) -> None:
    """Refuse a batch that the ranks cannot share.

    Raises:
        ValueError: Naming sizes that can be.
    """
    per_rank, rest = divmod(batch_size, world.size)
    if world.size > 1 and (rest or per_rank < 2):
        low = max(2, per_rank) * world.size
        nearest = low if low >= batch_size or per_rank < 2 else f"{low} or {low + world.size}"
        raise ValueError(
            f"batch_size: expected a multiple of the {world.size} processes, with 2 images or more "
            f"for each, got {batch_size}; pass {nearest}, or start another number of processes"
        )


def synchronize_batchnorm(model: nn.Module, world: World) -> None:
    """Make every batch normalisation of `model` normalise by the batch of all ranks, in place.

    `torch.nn.SyncBatchNorm` on a GPU; `HostSyncBatchNorm` on the CPU, for which torch has none.

    Raises:
        ValueError: For a layer that is more than a batch normalisation.
    """
    if world.size == 1:
        return
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for layer in layers:
        if type(layer) is not nn.BatchNorm2d:
            raise ValueError(
                f"sync_batchnorm: expected torch.nn.BatchNorm2d layers alone, got a "
                f"{type(layer).__name__} in the network; pass sync_batchnorm=False"
            )
    if world.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for layer in layers:
        layer.__class__ = HostSyncBatchNorm  # the same parameters, buffers and settings


class HostSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the batch of all ranks, from sums; for the CPU.

    In evaluation mode an ordinary `torch.nn.BatchNorm2d`. Differentiable: each rank's gradient
    holds what its images do to the losses of all ranks.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W] -> [B, C, H, W]``; the batches of the ranks may differ in size."""
        if not self.training:
            return super().forward(input)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = torch.full((1,), wide.numel() / wide.shape[1], dtype=wide.dtype)
        sums: Tensor = _Total.apply(torch.cat([wide.sum(dim=(0, 2, 3)), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean[:, None, None]
        squares: Tensor = _Total.apply(centred.square().sum(dim=(0, 2, 3)))
        variance = squares / count
        with torch.no_grad():
            if self.running_mean is not None and self.running_var is not None:
                momentum = 0.0 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
            shifted = torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None])
            return shifted.to(input.dtype)
        return (centred * scale[:, None, None]).to(input.dtype)


class _Total(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of the gradients over the ranks."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _environment() -> tuple[int, int, int]:
    """Rank, size and local rank, as torchrun sets them."""
    if not dist.is_available():
        raise ValueError(
            "expected a torch with torch.distributed to train with several processes, got one "
            "without; start one process, or install another build of torch"
        )
    if dist.is_initialized():
        raise ValueError(
            "expected to start the process group itself, got one that is initialised already; "
            "call torch.distributed.destroy_process_group() before train()"
        )
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: expected {', '.join(_VARIABLES)} in the "
            f"environment, got none for {', '.join(missing)}; start the processes with torchrun"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _attempt(store: Store, rank: int, size: int) -> str:
    """A name that all ranks share, and that no earlier attempt had.

    After a restart torchrun hands out the store of the attempt before it, with the addresses of
    processes that are gone, and TORCHELASTIC_RESTART_COUNT may differ between machines
    (pytorch/pytorch#135712, #108158). So each rank asks with a word of its own until rank 0, who
    answers whatever words it finds, has been heard by all.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"casm_fast/asked/{rank}", word)
        name = store.get(f"casm_fast/answer/{word}").decode()  # waits for it
        store.add(f"casm_fast/heard/{name}", 1)
        return name
    deadline = time.monotonic() + JOINING.total_seconds()
    while store.add(f"casm_fast/heard/{word}", 0) < size - 1:
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"expected {size} processes to join, got fewer within {JOINING}; see why the "
                "others did not start"
            )
        for key in (f"casm_fast/asked/{other}" for other in range(1, size)):
            if store.check([key]):
                store.set(f"casm_fast/answer/{store.get(key).decode()}", word)
        time.sleep(0.01)
    return word


def _device(name: str, local_rank: int) -> torch.device:
    """This process's device."""
    device = choose_device(name)
    if device.type != "cuda":
        return device
    if ":" in name:
        raise ValueError(
            f"device: expected 'auto', 'cuda' or 'cpu' with several processes, each of which takes "
            f"its own GPU, got {name!r}; choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"device: expected a GPU for each process of this machine, got {count} for "
            f"{os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes; start "
            f"--nproc-per-node={count}, or pass device='cpu'"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _first(store: Store) -> bool:
    """Whether no other rank has met an error yet."""
    try:
        return int(store.add("casm_fast/errors", 1)) == 1
    except RuntimeError:  # the store went with the process that held it: nobody else can tell
        return True


def _connection_lost(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error)
    )
