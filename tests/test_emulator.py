"""The emulator: what its operations give, and that planted bugs are caught."""

from __future__ import annotations

import os
import subprocess
import sys

import emulator
import numpy as np
import pytest
import torch
from emulator import sanitize

from casm_fast import ops

THREADS = 96  # kThreads of planted.cu
SEEDS = range(8)


@pytest.fixture(scope="module")
def planted_kernels():
    reason = emulator.why_not()
    if reason:
        pytest.skip(reason)
    library = emulator.build(os.environ.get("CASM_FAST_TEST_SANITIZE", ""), "casm_fast_planted")
    torch.ops.load_library(str(library))


@pytest.fixture
def planted(planted_kernels, monkeypatch):
    def run(name, data=None, size=None, seed=0):
        monkeypatch.setenv("CASM_FAST_EMULATOR_SEED", str(seed))
        data = numbers() if data is None else data
        return torch.ops.casm_fast_planted.planted(data, name, size or len(data))

    return run


def numbers(blocks=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 2**30, (blocks * THREADS,), generator=generator, dtype=torch.int32)


def reversed_blocks(data):
    return data.view(-1, THREADS).flip(1).flatten()


def rotated_blocks(data):
    return data.view(-1, THREADS).roll(-3, 1).flatten()


def exchanged_pairs(data):
    return data.view(-1, 2).flip(1).flatten()


RIGHT = {"reverse": reversed_blocks, "rotate": rotated_blocks, "warp exchange": exchanged_pairs}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_give_the_same_in_any_order(name, planted):
    data = numbers(blocks=3)
    for seed in SEEDS:
        assert torch.equal(planted(name, data, seed=seed), RIGHT[name](data))


@pytest.mark.parametrize("name", RIGHT)
def test_a_missing_barrier_changes_the_result(name, planted):
    data = numbers(blocks=3)
    results = [planted(f"{name} without barrier", data, seed=seed) for seed in SEEDS]
    assert not any(torch.equal(result, RIGHT[name](data)) for result in results)
    assert len({tuple(result.tolist()) for result in results}) > 1


def test_the_seed_decides_the_order(planted):
    first, again = (planted("reverse without barrier", seed=5) for _ in range(2))
    assert torch.equal(first, again)


def test_shared_memory_is_poisoned_before_every_block(planted):
    assert planted("poison", numbers(blocks=4)).eq(1).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skipped barrier", "(left the kernel while|after) .*planted.cu"),
        ("late barrier", "(left the kernel while .* wait at the barrier|after .* left the kernel)"),
        ("two barriers", r"wait at different barriers, planted\.cu:\d+ and planted\.cu:\d+"),
        ("barrier and warp", "no thread of the block can go on: thread .* waits at the "),
        ("mask without caller", "the mask 0x0000ffff of a warp operation leaves out its caller"),
        ("masks differ", "lanes of one warp wait with different masks|leaves out its caller"),
        ("lane outside mask", "a shuffle reads a lane outside its mask"),
        ("lane has left", "names lanes that are not there, 0x00000020|its warp waits for it"),
        ("operations differ", "lanes of one warp wait in different operations"),
        ("partial warp", "names lanes that are not there, 0xf0000000"),
        ("large block", "expected 1 to 1024 threads per block, got 1056"),
    ],
)
def test_wrong_kernels_are_reported(name, message, planted):
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=f"emulated CUDA: .*({message})"):
            planted(name, seed=seed)
        assert torch.equal(planted("reverse", seed=seed), reversed_blocks(numbers()))  # goes on


REPORTS = {
    "reverse": None,
    "shared overrun": ("AddressSanitizer: heap-buffer-overflow", "shared_overrun_kernel"),
    "static overrun": ("index 96 out of bounds for type 'int [96]'", "planted.cu"),
    "global overrun": ("AddressSanitizer: heap-buffer-overflow", "global_overrun_kernel"),
    "misaligned": ("misaligned address", "launch.h"),
}

# A report ends its process: each kernel runs in a fork of one that has loaded everything.
PROGRAM = """
import os, sys, torch
library, *names = sys.argv[1:]
torch.ops.load_library(library)
data = torch.arange(96, dtype=torch.int32)
for name in names:
    child = os.fork()
    if child == 0:
        print("case", name, file=sys.stderr, flush=True)
        torch.ops.casm_fast_planted.planted(data, name, 96)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_sanitizers_see_what_is_planted():
    reason = emulator.why_not()
    if reason:
        pytest.skip(reason)
    try:
        environment = sanitize.environment()
    except RuntimeError as error:
        pytest.skip(str(error))
    library = emulator.build(sanitize.SANITIZERS, "casm_fast_planted")
    command = [sys.executable, "-c", PROGRAM, str(library), *REPORTS]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    codes = [int(line) for line in run.stdout.split()]
    errors = run.stderr.split("case ")[1:]
    for (name, expected), code, error in zip(REPORTS.items(), codes, errors, strict=True):
        if expected is None:
            assert code == 0, error
        else:
            report, place = expected
            assert code != 0, name
            assert report in error
            assert place in error


def shuffled(x, source, width=32):
    """A shuffle by NumPy: `source` of each lane within its segment, or -1 for its own value."""
    lane = np.arange(THREADS)
    first = lane // width * width
    picked = np.array([source(i) for i in lane - first])
    return x[np.where(picked < 0, lane, first + picked)]


def per_warp(f, x):
    return np.concatenate([np.broadcast_to(f(warp), 32) for warp in x.reshape(-1, 32)])


def bits(flags):
    """The ballot of the 32 lanes of a warp, as a signed int."""
    return int(sum(int(flag) << lane for lane, flag in enumerate(flags))) - (flags[31] << 32)


def operations_by_numpy(x):
    w32 = [f"{v:032b}" for v in x]
    return [
        shuffled(x, lambda i: 1),
        shuffled(x, lambda i: 3, 8),
        shuffled(x, lambda i: i - 5),
        shuffled(x, lambda i: i - 3, 16),
        shuffled(x, lambda i: i + 7 if i + 7 < 32 else -1),
        shuffled(x, lambda i: i + 2 if i + 2 < 4 else -1, 4),
        shuffled(x, lambda i: i ^ 9),
        per_warp(lambda w: bits([int(v % 3 == 0) for v in w]), x),
        per_warp(lambda w: (w == x[40]).any(), x),
        per_warp(lambda w: (w != x[40]).all(), x),
        np.concatenate(
            [[bits([int(o % 5 == v % 5) for o in w]) for v in w] for w in x.reshape(-1, 32)]
        ),
        per_warp(lambda w: w.sum(dtype=np.int32), x),
        np.full(THREADS, (x % 2).sum()),
        np.ones(THREADS),
        np.ones(THREADS),
        [v.count("1") for v in w32],
        [len(v) - len(v.lstrip("0")) for v in w32],
        [32 - v.rindex("1") for v in w32],
        [int(v[::-1], 2) - (int(v[-1]) << 32) for v in w32],
        np.full(THREADS, (x % 100).sum()),
    ]


def test_operations_equal_numpy(planted):
    data = numbers()
    expected = operations_by_numpy(data.numpy())
    for seed in SEEDS:
        rows = planted("operations", data, len(expected) * THREADS, seed).view(-1, THREADS).numpy()
        for row, (got, want) in enumerate(zip(rows, expected, strict=True)):
            np.testing.assert_array_equal(got, np.asarray(want).astype(np.int32), f"row {row}")


def test_half_warps_meet_on_their_own(planted):
    data = numbers(blocks=2)
    halves = data.view(-1, 2, 16)
    expected = torch.stack(
        [halves[:, 0].view(-1, 8, 2).flip(2).flatten(1), halves[:, 1].amax(1, True).expand(-1, 16)],
        dim=1,
    )
    for seed in SEEDS:
        assert torch.equal(planted("half warps", data, seed=seed), expected.flatten())


def test_atomics(planted):
    data = (numbers(blocks=3) - 2**29) | 6
    count, least, greatest, common, one = planted("atomics", data, 5)
    assert count == len(data) - 1  # from -1
    assert least == data.min()
    assert greatest == data.max()
    assert common == np.bitwise_and.reduce(data.numpy())
    assert one in data


def test_wide_values_travel_whole(planted):
    assert planted("wide").eq(1).all()


def sample_inputs():
    """One call per op with small inputs that cross the edges of tiles, as (room, function)."""
    generator = torch.Generator().manual_seed(2)

    def rand(*shape):
        return torch.rand(shape, generator=generator).requires_grad_()

    image, reference, mask, small = (
        rand(2, 3, 37, 45),
        rand(2, 3, 37, 45),
        rand(2, 1, 37, 45),
        rand(2, 1, 7, 9),
    )
    offset = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    return {
        "gaussian_blur": ("blur_mask", lambda: (ops.gaussian_blur(image, 2.0), image)),
        "blur_mask": ("blur_mask", lambda: (ops.blur_mask(image, mask, 2.0), image, mask)),
        "blend": (
            "jitter_mask",
            lambda: (ops.blend(image, reference, mask), image, reference, mask),
        ),
        "upsample_mask": ("jitter_mask", lambda: (ops.upsample_mask(small, (37, 45), 0.6), small)),
        "jitter_mask": (
            "jitter_mask",
            lambda: (ops.jitter_mask(image, reference, small, offset, (33, 40), 0.6), small),
        ),
        "tv_norm": ("tv_norm", lambda: (ops.tv_norm(mask), mask)),
        "mask_boxes": (
            "mask_boxes",
            lambda: (torch.cat([t.flatten() for t in ops.mask_boxes(mask)]),),
        ),
        "connected_components": (
            "mask_boxes",
            lambda: (ops.connected_components((mask > 0.5).float(), 8),),
        ),
    }


@pytest.mark.parametrize("name", sample_inputs())
def test_every_emulated_op_gives_the_same_in_any_order(name, emulated_kernels, monkeypatch):
    room, call = sample_inputs()[name]
    if not (emulator.ROOT / "csrc" / room / f"{room}_cuda.cu").exists():
        pytest.skip(f"{room} has no CUDA kernels")
    monkeypatch.setattr(torch.ops, "casm_fast", torch.ops.casm_fast_emulated)
    results = []
    for seed in range(4):
        monkeypatch.setenv("CASM_FAST_EMULATOR_SEED", str(seed))
        output, *inputs = call()
        weight = torch.linspace(-1, 1, output.numel()).view_as(output)
        gradients = torch.autograd.grad((output * weight).sum(), inputs) if inputs else ()
        results.append((output.detach(), *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
