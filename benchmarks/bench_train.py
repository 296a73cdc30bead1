"""Training steps: ours beside the CASM authors' loop, on the same networks, batches and threads.

`AuthorsLoop` is one iteration of the loop of Zolna, Geras and Cho's published code, written down
from its description, step by step, with what today's PyTorch forces on it:

* Comparisons are cast to numbers: a sum of booleans never equals 2, which switches the regulariser
  off without a word.
* Where the live classifier judges, its second step waits until the mask's gradient has been taken
  through the same graph; the authors' order is an error today. The gradients wait by reference: no
  work is added.
* Entries of the pool are cloned: on a CPU ``.cpu()`` alone gives the live weights.

Its networks have our weights and are written down here as the authors have them: ours order the
sums of the decoder and of the first convolution in another way.

Ours does the same arithmetic with ``classifier_update="alternating"``, the authors' scheme, and is
held to their weights after two steps before anything is timed. The default scheme, eq. 8 of the
paper, does more: a masked classifier step in every iteration, where the authors do one in those
that the live classifier judges. It is timed beside the others; so are compiled passes on a GPU, and
on a CPU with ``--compiled`` (the compiler takes minutes for each case).

F never trains the classifier, L is always judged by it. FL, L100 and L1000 draw a snapshot in half
of their iterations and cost the same: two steps are timed, one of each kind. Copying a snapshot
into the history, once in 100 or 1,000 steps, is timed apart. Images are in memory: no loader runs.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import placed, synchronized
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from casm_fast.models.decoder import Decoder
from casm_fast.models.encoder import Encoder
from casm_fast.models.saliency import SaliencyModel, build_model
from casm_fast.training import passes as passes_module
from casm_fast.training.config import TrainConfig
from casm_fast.training.descent import Descent
from casm_fast.training.engine import Engine
from casm_fast.training.history import History

CLASSES = 100
LAMBDA_R = 10.0
# Strategy -> whether a snapshot judges, step by step of a call.
DRAWS = {"F": (False,), "L": (False,), "FL, L100, L1000": (False, True)}
NETWORKS = [
    pytest.param("compact", 64, 64, id="compact-64x64-batch64"),
    pytest.param("resnet18", 112, 16, id="resnet18-112x112-batch16", marks=pytest.mark.long),
    pytest.param("resnet50", 224, 8, id="resnet50-224x224-batch8", marks=pytest.mark.long),
]
ROUNDS = 5
FEW_ROUNDS = 3  # where a step takes more than
LONG_STEP = 1.0  # seconds
# How far a tensor may end from where the authors' loop takes it in two steps of float64, as a share
# of the way; the worst measured is 5e-7 (ResNet-50, L:
# Adam divides by small numbers).
TOLERANCE = 1e-5
CHECKED_IMAGES = 4


def networks(backbone: str, size: int) -> SaliencyModel:
    torch.manual_seed(0)
    return build_model(backbone, classes=CLASSES, input_size=size)


def batch(size: int, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, 3, size, size, generator=generator)
    return pictures.to(device), torch.randint(CLASSES, (images,), generator=generator).to(device)


def classify(encoder: Encoder, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The authors' ResNet: logits and the activations that the decoder reads."""
    net: Any = encoder.backbone
    layers = [net.maxpool(net.relu(net.bn1(net.conv1(x))))]
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        layers.append(stage(layers[-1]))
    return net.fc(net.avgpool(layers[-1]).flatten(1)), layers


def decode(decoder: Decoder, layers: list[Tensor]) -> Tensor:
    """The authors' decoder: all activations at the size of the first, one 3x3 convolution."""
    features = [layers[0]]
    for index, projection in decoder.projections.items():
        feature = projection(layers[int(index)])
        features.append(
            F.interpolate(feature, layers[0].shape[-2:], mode="bilinear", align_corners=False)
        )
    return torch.sigmoid(decoder.final(torch.cat(features, 1)))


class AuthorsLoop:
    """One iteration of the authors' training, and the statistics that they take in each."""

    def __init__(self, model: SaliencyModel, strategy: str, device: torch.device) -> None:
        self.classifier = model.classifier.to(device)
        self.decoder = model.decoder.to(device)
        self.fixed = strategy == "F"
        self.sgd = torch.optim.SGD(
            self.classifier.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4
        )
        self.adam = torch.optim.Adam(self.decoder.parameters(), lr=1e-3, weight_decay=1e-4)
        self.confuser = copy.deepcopy(self.classifier)
        self.pool = [self.store()]
        self.decoder.train()
        self.classifier.train(not self.fixed)
        self.sums: dict[str, float] = defaultdict(float)

    def store(self) -> dict[str, Tensor]:
        return {
            name: tensor.detach().cpu().clone()
            for name, tensor in self.classifier.state_dict().items()
        }

    def step(self, x: Tensor, y: Tensor, drawn: bool) -> None:
        output, layers = classify(self.classifier, x)
        loss = F.cross_entropy(output, y)
        if not self.fixed:
            self.sgd.zero_grad()
            loss.backward()
            self.sgd.step()
        mask = F.interpolate(
            decode(self.decoder, [layer.detach() for layer in layers]),
            x.shape[-2:],
            mode="nearest",
        )
        x_masked = x * (1 - mask)
        if drawn:
            self.confuser.load_state_dict(self.pool[0])
            self.confuser.eval()
            output_masked, _ = classify(self.confuser, x_masked)
        else:
            output_masked, _ = classify(self.classifier, x_masked)
        loss_masked = F.cross_entropy(output_masked, y)
        waiting: list[Tensor | None] = []
        if not drawn and not self.fixed:
            self.sgd.zero_grad()
            loss_masked.backward(retain_graph=True)
            waiting = [parameter.grad for parameter in self.classifier.parameters()]
            self.sgd.zero_grad()

        correct_on_clean = (output.argmax(1) == y).long()
        mistaken_on_masked = (output_masked.argmax(1) != y).long()
        confused = (correct_on_clean + mistaken_on_masked).eq(2).float()
        area = mask.view(len(x), -1).mean(1)
        regularization = -LAMBDA_R * F.relu(confused - area).mean()
        log_p = F.log_softmax(output_masked, 1)
        negative_entropy = (log_p.exp() * log_p).sum(1)
        loss_mask = (negative_entropy * correct_on_clean.float()).mean() + regularization
        self.adam.zero_grad()
        loss_mask.backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 10)
        self.adam.step()
        if waiting:
            for parameter, gradient in zip(self.classifier.parameters(), waiting, strict=True):
                parameter.grad = gradient
            self.sgd.step()
        self.measure(output, output_masked, y, loss, loss_masked, mask)

    def measure(self, *tensors: Tensor) -> None:
        """Meters and mask statistics, on the host, in every iteration."""
        output, output_masked, y, loss, loss_masked, mask = (t.detach() for t in tensors)
        self.sums["loss"] += loss.item()
        self.sums["loss_masked"] += loss_masked.item()
        self.sums["correct"] += (output.argmax(1) == y).float().sum().item()
        self.sums["correct_masked"] += (output_masked.argmax(1) == y).float().sum().item()
        self.sums["average"] += mask.mean().item()
        self.sums["std"] += mask.view(len(mask), -1).mean(1).std().item()
        values = mask.cpu().numpy().ravel()
        inside = values[(values > 0) & (values < 1)]
        self.sums["entropy"] += float(-(inside * np.log2(inside)).sum()) / values.size
        rows = (mask[:, :, 1:] - mask[:, :, :-1]).pow(2).mean()
        columns = (mask[..., 1:] - mask[..., :-1]).pow(2).mean()
        self.sums["tv"] += (rows + columns).item()

    def weights(self) -> dict[str, Tensor]:
        return {**self.classifier.state_dict(), **self.decoder.state_dict()}


class Ours:
    """The engine, its draws prescribed."""

    def __init__(
        self, model: SaliencyModel, strategy: str, device: torch.device, images: int, **fields: Any
    ) -> None:
        config = TrainConfig(
            data="folder:none",
            strategy=strategy.partition(",")[0],
            lambda_r=LAMBDA_R,
            schedule="constant",
            batch_size=images,
            **fields,
        )
        self.engine = Engine(model, config, classes=CLASSES, device=device)
        self.engine.begin("casm")
        self.engine.history.observe(0, self.engine.model.classifier)
        self.index = 1

    def step(self, x: Tensor, y: Tensor, drawn: bool) -> None:
        draw = History.draw
        try:
            History.draw = lambda history: history.snapshots[0] if drawn else None  # type: ignore[method-assign]
            self.engine.step(x, y, self.index, 1 << 30, 0)
        finally:
            History.draw = draw  # type: ignore[method-assign]
        self.index += 1

    def weights(self) -> dict[str, Tensor]:
        model = self.engine.model
        return {**model.classifier.state_dict(), **model.decoder.state_dict()}


Loop = AuthorsLoop | Ours


def competitors(strategy: str, device: torch.device, compiled: bool) -> dict[str, dict[str, Any]]:
    """Names and our options; the first is ours in the authors' scheme."""
    same = {"classifier_update": "alternating"}
    field: dict[str, dict[str, Any]] = {"ours": same, "authors": {}}
    if strategy != "F":
        field["ours, eq. 8"] = {}
    if device.type == "cuda":
        field["ours, bf16"] = {**same, "amp": "bf16"}
    if compiled:
        field["ours, compiled"] = {**same, "compile": True}
        if device.type == "cuda":
            field["ours, bf16, compiled, CUDA graphs"] = {
                **same,
                "amp": "bf16",
                "compile": True,
                "cuda_graphs": True,
            }
    return field


def make(
    name: str, options: dict[str, Any], model: SaliencyModel, strategy: str, x: Tensor
) -> Loop:
    if name == "authors":
        return AuthorsLoop(model, strategy, x.device)
    return Ours(model, strategy, x.device, len(x), **options)


def run(loop: Loop, strategy: str, data: tuple[Tensor, Tensor]) -> None:
    """The steps of one call; the host waits for all of them."""
    for drawn in DRAWS[strategy]:
        loop.step(*data, drawn)
    synchronized(data[0].device)


def seconds(loop: Loop, strategy: str, data: tuple[Tensor, Tensor]) -> float:
    """Time of a step."""
    start = time.perf_counter()
    run(loop, strategy, data)
    return (time.perf_counter() - start) / len(DRAWS[strategy])


def check(backbone: str, size: int, strategy: str, device: torch.device) -> float:
    """Ours and the authors' loop move the same weights to the same place, in float64.

    Returns:
        The largest distance of a tensor, as a share of how far it moved.
    """
    x, y = batch(size, CHECKED_IMAGES, device)
    start = networks(backbone, size)
    before = {**start.classifier.state_dict(), **start.decoder.state_dict()}
    same = {"classifier_update": "alternating"}
    theirs, mine = (
        make(name, options, networks(backbone, size).double(), strategy, x)
        for name, options in (("authors", {}), ("ours", same))
    )
    for loop in (theirs, mine):
        for drawn in (*DRAWS[strategy], *DRAWS[strategy])[:2]:
            loop.step(x.double(), y, drawn)
    worst, found = 0.0, mine.weights()
    for name, expected in theirs.weights().items():
        moved = float((expected.cpu().double() - before[name]).norm())
        if moved > 1e-9:
            worst = max(worst, float((found[name] - expected).double().norm()) / moved)
    return worst


@contextmanager
def stopwatch(engine: Engine, device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of each phase of the engine's steps while the context is open."""
    spent: dict[str, float] = defaultdict(float)

    def timed(phase: Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            synchronized(device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            synchronized(device)
            spent[phase(*args)] += time.perf_counter() - start
            return result

        return wrapped

    model, history, passes = engine.model, engine.history, engine.passes
    gradients, step = passes_module._gradients, Descent.step
    forward = model.classifier.forward
    try:
        model.classifier.forward = timed(lambda *_: "classifier forward", forward)  # type: ignore[method-assign]
        model.decode = timed(lambda *_: "decoder forward", model.decode)  # type: ignore[method-assign]
        passes.blends = timed(lambda *_: "blend", passes.blends)  # type: ignore[method-assign]
        history.judge = timed(lambda *_: "snapshot forward", history.judge)  # type: ignore[method-assign]
        passes_module._gradients = timed(
            lambda loss, parameters, *_: (
                "classifier gradients"
                if parameters is passes.classifier_parameters
                else "mask gradients"
            ),
            gradients,
        )
        Descent.step = timed(lambda *_: "optimisers", step)  # type: ignore[method-assign]
        yield spent
    finally:
        for owner, name in (
            (model.classifier, "forward"),
            (model, "decode"),
            (passes, "blends"),
            (history, "judge"),
        ):
            del owner.__dict__[name]
        passes_module._gradients = gradients
        Descent.step = step  # type: ignore[method-assign]


def phases(loop: Ours, strategy: str, data: tuple[Tensor, Tensor], calls: int) -> dict[str, float]:
    """Share of each phase in a step."""
    start = time.perf_counter()
    with stopwatch(loop.engine, data[0].device) as spent:
        for _ in range(calls):
            run(loop, strategy, data)
        total = time.perf_counter() - start
    spent["rest"] = total - sum(spent.values())
    return {phase: share / total for phase, share in spent.items()}


class Convolutions(TorchDispatchMode):
    """Seconds that are spent inside convolutions, while the context is open: what no loop saves."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, call: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind = {
            torch.ops.aten.convolution.default: "forward",
            torch.ops.aten.convolution_backward.default: "gradients",
        }.get(call)
        if kind is None:
            return call(*args, **(kwargs or {}))
        synchronized(args[0].device)
        start = time.perf_counter()
        result = call(*args, **(kwargs or {}))
        synchronized(args[0].device)
        self.seconds[kind] += time.perf_counter() - start
        return result


def arithmetic(
    loop: Loop, strategy: str, data: tuple[Tensor, Tensor], calls: int
) -> dict[str, Any]:
    """What a step computes: operations, and the time of its convolutions alone, by kind."""
    steps = len(DRAWS[strategy])
    with FlopCounterMode(display=False) as counter:
        run(loop, strategy, data)
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(calls):
        with Convolutions() as convolutions:
            run(loop, strategy, data)
        for kind, spent in convolutions.seconds.items():
            taken[kind].append(spent / steps * 1e3)
    return {
        "gigaflops": counter.get_total_flops() / steps / 1e9,
        "convolutions_ms": {kind: statistics.median(times) for kind, times in taken.items()},
    }


def store_seconds(loop: Ours) -> float:
    """Time to copy a snapshot into the history."""
    history, model = loop.engine.history, loop.engine.model
    history.observe(0, model.classifier)
    times = []
    for _ in range(5):
        synchronized(history.device)
        start = time.perf_counter()
        {name: history._copy(tensor) for name, tensor in model.classifier.state_dict().items()}
        synchronized(history.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory(
    name: str,
    options: dict[str, Any],
    backbone: str,
    size: int,
    images: int,
    strategy: str,
    on: str,
) -> float:
    """Mebibytes at the peak of a call, over what the networks' process had before them.

    The allocator of the device on CUDA; the resident set of a process of its own on the CPU.
    """
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key}
    threads = torch.get_num_threads()
    task = json.dumps([name, options, backbone, size, images, strategy, on, threads])
    done = subprocess.run(
        [sys.executable, __file__, task], capture_output=True, text=True, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


def resident(name: str) -> int:
    """Bytes of this process in memory, now ("VmRSS") or at most ("VmHWM").

    Not `getrusage`: its peak goes on from that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure_memory(task: str) -> None:
    """The process of `peak_memory`."""
    name, options, backbone, size, images, strategy, on, threads = json.loads(task)
    torch.set_num_threads(threads)
    device = torch.device(on)
    data = batch(size, images, device)
    loop = make(name, options, networks(backbone, size), strategy, data[0])
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
    run(loop, strategy, data)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    print((peak - before) / 2**20)


@pytest.mark.parametrize("strategy", list(DRAWS))
@pytest.mark.parametrize(("backbone", "size", "images"), NETWORKS)
def test_step(
    backbone: str,
    size: int,
    images: int,
    strategy: str,
    benchmark: Any,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    data = batch(size, images, device)
    distance = check(backbone, size, strategy, device)
    assert distance <= TOLERANCE, f"{backbone} {strategy}: {distance:.3g} from the authors' weights"
    option = request.config.getoption
    compiled = option("--compiled") or (device.type == "cuda" and not option("--short"))
    field = competitors(strategy, device, compiled)
    loops = {
        name: make(name, options, networks(backbone, size), strategy, data[0])
        for name, options in field.items()
    }
    for loop in loops.values():
        run(loop, strategy, data)
    calls = {name: partial(run, loop, strategy, data) for name, loop in loops.items()}
    times: dict[str, list[float]] = {name: [] for name in loops}
    limit = 2 * option("--seconds")
    with placed(calls, device) as once:
        quick = once["authors"] < LONG_STEP * len(DRAWS[strategy])
        rounds = ROUNDS if quick else FEW_ROUNDS
        start = time.perf_counter()
        while len(times["ours"]) < rounds or time.perf_counter() - start < limit:
            for name, loop in loops.items():
                times[name].append(seconds(loop, strategy, data))
    rows = {}
    for name, taken in times.items():
        p10, median, p90 = (np.percentile(taken, [10, 50, 90]) * 1e3).tolist()
        memory = None
        # Not with the compiler, which would run in that process, too; on a CPU by what Linux tells.
        if "compiled" not in name and (device.type == "cuda" or sys.platform == "linux"):
            on = device.type
            memory = peak_memory(name, field[name], backbone, size, images, strategy, on)
        rows[name] = {
            "median_ms": median,
            "p10_ms": p10,
            "p90_ms": p90,
            "images_per_second": images / median * 1e3,
            "peak_mebibytes": memory,
        }
        if "compiled" not in name:
            rows[name] |= arithmetic(loops[name], strategy, data, rounds)
    mine = loops["ours"]
    assert isinstance(mine, Ours)
    shares = phases(mine, strategy, data, 3 if quick else 1)
    benchmark.group = "training step"
    benchmark.extra_info.update(
        {
            "training": backbone,
            "case": f"{backbone}, {size}x{size}, batch {images}",
            "strategy": strategy,
            "device": device.type,
            "threads": torch.get_num_threads(),
            "images": images,
            "rounds": len(times["ours"]),
            "distance": distance,
            "competitors": rows,
            "phases": shares,
            "store_ms": store_seconds(mine) * 1e3,
        }
    )
    benchmark.pedantic(lambda: run(mine, strategy, data), rounds=1)


if __name__ == "__main__":
    measure_memory(sys.argv[1])
