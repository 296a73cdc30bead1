"""Shards and the Ray engine give the rows of one local run."""

from __future__ import annotations

import importlib.machinery
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from casm_fast.data import predictions
from casm_fast.data.synthetic import generate, write_coco, write_tree
from casm_fast.evaluation import evaluate
from casm_fast.extraction import ExtractConfig, cluster, extract
from casm_fast.extraction.cluster import Plan, plan
from casm_fast.extraction.processes import _sendable, _work, shares
from casm_fast.models import checkpoint
from casm_fast.models.saliency import build_model

IMAGES = 37


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As Ray's worker has on two CPUs: convolutions add up in another order on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a tree with a file that cannot be read."""
    folder = tmp_path_factory.mktemp("engines")
    val = generate(IMAGES, size=32, classes=3, seed=4, split="val")
    write_tree(folder / "tree", None, val, layout="flat", sides=(40, 60))
    (folder / "tree/val/ILSVRC2012_val_00000020.JPEG").write_bytes(b"nothing")
    write_coco(folder / "coco", None, val, sides=(40, 60))
    model = build_model("compact", classes=val.classes, input_size=32)
    checkpoint.save(model, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Any:
    return extract(
        place / "model.safetensors", f"imagenet-val:{place / 'tree'}", place / "whole.parquet",
        batch_size=8, device="cpu",
    )  # fmt: skip


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 4, IMAGES])
def test_parts_together_are_one_run(place: Path, whole: Any, parts: int, tmp_path: Path) -> None:
    # Batches of one image: a network's sums may differ in the last bit with the batch's size.
    output = tmp_path / "boxes.parquet"
    source = f"imagenet-val:{place / 'tree'}"
    model = place / "model.safetensors"
    one = extract(model, source, batch_size=1)
    for part in range(1, parts + 1):
        made = extract(model, source, output, batch_size=1, shard=f"{part}/{parts}")
        assert made.path == predictions.part_path(output, part, parts)
        assert made.images in (IMAGES // parts, IMAGES // parts + 1)
    table, description = predictions.read(output)
    assert table.to_pylist() == one.table.to_pylist()
    assert description.source == source
    assert description.config["shard"] in (None, "1/1")
    assert description.convention == whole.description.convention
    assert str(evaluate(output)) == str(evaluate(one))


def test_the_name_of_a_part_and_its_images(place: Path, tmp_path: Path) -> None:
    source = f"imagenet-val:{place / 'tree'}"
    made = extract(
        place / "model.safetensors", source, tmp_path / "x.parquet", shard="2/3", limit=10
    )
    assert made.path == tmp_path / "x.2-of-3.parquet"
    assert [row["image_id"] for row in made.table.to_pylist()] == [
        f"ILSVRC2012_val_{k:08d}" for k in (4, 5, 6)
    ]


def test_parts_that_are_missing_or_strange_are_named(place: Path, tmp_path: Path) -> None:
    output, model = tmp_path / "boxes.parquet", place / "model.safetensors"
    source = f"imagenet-val:{place / 'tree'}"
    extract(model, source, output, shard="1/2", limit=6)
    with pytest.raises(FileNotFoundError) as missing:
        predictions.read(output)
    assert str(missing.value) == (
        f"{output}: expected all of its 2 parts, got none named boxes.2-of-2.parquet (1 missing); "
        "extract with --shard i/2 what is missing"
    )
    extract(model, source, output, shard="2/2", limit=6, rule="value")
    with pytest.raises(ValueError) as strange:
        predictions.read(output)
    assert str(strange.value) == (
        f"{output}: expected parts that agree, got two with another convention"
    )
    extract(model, source, output, shard="3/3", limit=6)
    with pytest.raises(ValueError) as mixed:
        predictions.read(output)
    assert str(mixed.value) == (
        f"{output}: expected parts of one division, got parts of 2 and of 3; remove the old ones"
    )


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2"])
def test_shards_that_are_none_are_refused(text: str) -> None:
    message = f'shard: expected "i/n" with i from 1 to n, got {text!r}'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExtractConfig(shard=text)


def test_more_parts_than_images_are_refused() -> None:
    with pytest.raises(ValueError) as caught:
        ExtractConfig(shard="1/9").span(8)
    assert str(caught.value) == "shard: expected at most 8 parts of 8 images, got 9"


# --- COCO -----------------------------------------------------------------------------------------


def test_coco_gives_the_boxes_and_scores_of_the_imagenet_layout(place: Path) -> None:
    model = place / "model.safetensors"
    tree, coco = (
        extract(model, spec, batch_size=1)
        for spec in (f"imagenet-val:{place / 'tree'}", f"coco:{place / 'coco'}")
    )
    rows = [
        [row for number, row in enumerate(made.table.to_pylist()) if number != 19]
        for made in (tree, coco)  # number 19 cannot be read in the tree
    ]
    for one, other in zip(*rows, strict=True):
        different = {name for name in one if one[name] != other[name]}
        assert different == {"image_id"}
    assert coco.description.source == f"coco-val2017:{place / 'coco'}"


# --- Ray ------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")

# Ray's workers would give way to the tests that run beside them, and take minutes to start.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="needs casm_fast[dist]")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local", num_cpus=2, num_gpus=0, object_store_memory=80 * 2**20,
        include_dashboard=False, logging_level="error", log_to_driver=False,
    )  # fmt: skip
    yield ray
    ray.shutdown()


# One test, because tests are spread over processes and each would start a cluster of its own.
def test_ray_gives_the_rows_of_the_local_engine(
    ray: Any, place: Path, whole: Any, tmp_path: Path
) -> None:
    model, tree = place / "model.safetensors", f"imagenet-val:{place / 'tree'}"
    made = extract(model, tree, tmp_path / "ray.parquet", batch_size=8, engine="ray")
    assert made.table.equals(whole.table)
    assert (made.images, made.errors) == (IMAGES, 1)
    table, description = predictions.read(tmp_path / "ray.parquet")
    assert table.equals(whole.table)
    assert description.device.startswith("1 x cpu (")
    assert description.device.endswith(f"by Ray {ray.__version__}")
    for name in ("source", "convention", "saliency_size", "classes", "model", "checkpoint"):
        assert getattr(description, name) == getattr(whole.description, name)

    # A part of a set in memory, by a model in memory.
    val = generate(IMAGES, size=32, classes=3, seed=4, split="val")
    loaded = checkpoint.load(model)
    options: dict[str, Any] = {"batch_size": 5, "shard": "2/3", "limit": 30}
    here, there = (extract(loaded, val, engine=engine, **options) for engine in ("local", "ray"))
    assert there.table.equals(here.table.replace_schema_metadata(there.table.schema.metadata))
    assert there.table["image_id"].to_pylist() == [f"val-{k:06d}" for k in range(10, 20)]

    # Maps beside the rows, masks in them.
    for kind in ("npy", "png", "rle"):
        here, there = (
            extract(loaded, val, tmp_path / f"{kind}-{engine}", engine=engine, masks=kind, limit=7)
            for engine in ("local", "ray")
        )
        assert here.table.to_pylist() == there.table.to_pylist()
        kept = [path for path in (tmp_path / f"{kind}-local").rglob("*") if "masks" in path.name]
        assert bool(kept) == (kind != "rle")
        for path in kept:
            other = tmp_path / f"{kind}-ray" / path.relative_to(tmp_path / f"{kind}-local")
            assert path.is_dir() or path.read_bytes() == other.read_bytes()

    # Images that cannot be sent.
    object.__setattr__(val, "lock", threading.Lock())
    with pytest.raises(ValueError, match=r"^engine: expected images and a model that can be sent"):
        extract(model, val, engine="ray")

    assert ray.is_initialized()  # what was not started by extract is not stopped by it


def test_ray_does_not_take_sigterm_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler exits with status 15, where ours ends the batch and exits with 143."""
    ray: Any = types.ModuleType("ray")
    ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    ray.data = types.ModuleType("ray.data")
    ray.is_initialized = lambda: False
    ray.shutdown = lambda: None
    ray.init = lambda **options: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    before = signal.getsignal(signal.SIGTERM)
    with cluster._cluster():
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_on_ray_goes_on_after_sigterm(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs casm_fast[dist]")
    output, images = tmp_path / "rows", 1200
    command = [
        *(sys.executable, "-m", "casm_fast", "extract", str(place / "model.safetensors")),
        *(f"synthetic:images={images},size=32,classes=3", "--output", str(output)),
        *("--engine", "ray", "--device", "cpu", "--batch-size", "4", "--part-images", "4"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    patience = time.monotonic() + 300
    while not (written := sorted(output.glob("*.parquet"))) and time.monotonic() < patience:
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said.decode()
    assert b"the same command goes on there" in said
    kept = {path: path.read_bytes() for path in sorted(output.glob("*.parquet"))}
    assert set(written) <= set(kept)
    assert len(kept) < images // 4

    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == content for path, content in kept.items())
    table, _ = predictions.read(output)
    assert table["image_id"].to_pylist() == [f"val-{k:06d}" for k in range(images)]


def test_the_plan_of_a_cluster() -> None:
    for gpus, cpus, device, expected in (
        (0, 2, "auto", Plan(1, 0, 1, 1)),
        (0, 4, "auto", Plan(1, 0, 3, 1)),
        (0, 64, "auto", Plan(16, 0, 3, 16)),
        (0, 7, "cpu", Plan(1, 0, 6, 1)),
        (1, 16, "auto", Plan(1, 1, 1, 15)),
        (8, 64, "cuda", Plan(8, 1, 1, 56)),
        (8, 4, "cuda", Plan(3, 1, 1, 1)),
        (8, 64, "cpu", Plan(16, 0, 3, 16)),
    ):
        found = plan(gpus, cpus, device)
        assert found == expected
        assert found.actors * found.cpus + found.readers == cpus
        assert found.readers >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (1, 8, "cuda:1"),
            "device: expected 'auto', 'cpu' or 'cuda' with the engine ray, which takes all GPUs of "
            "the cluster, got 'cuda:1'",
        ),
        (
            (0, 8, "cuda"),
            "device: expected a GPU in the Ray cluster, got none; choose 'auto'",
        ),
        (
            (0, 1, "auto"),
            "engine: expected a Ray cluster of at least 2 CPUs, one to read and one for the "
            "network, got 1",
        ),
    ],
)
def test_clusters_that_cannot_serve_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan(*arguments)
    assert str(caught.value) == message


def test_without_ray_there_is_one_sentence(place: Path) -> None:
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from casm_fast.extraction import extract\n"
        f"try: extract({str(place / 'model.safetensors')!r}, "
        f"{str(place / 'tree')!r}, engine='ray')\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == (
        "engine: expected Ray for the engine ray, but it is not installed: "
        "pip install 'casm_fast[dist]'\n"
    ), run.stderr


# --- processes ------------------------------------------------------------------------------------


def test_processes_are_shards_of_one_run(place: Path, whole: Any, tmp_path: Path) -> None:
    source = f"imagenet-val:{place / 'tree'}"
    model = place / "model.safetensors"
    options: dict[str, Any] = {"batch_size": 1, "device": "cpu"}
    made = extract(model, source, tmp_path / "boxes.parquet", processes=2, **options)
    one = extract(model, source, **options)
    assert os.listdir(tmp_path) == ["boxes.parquet"]
    assert made.table.to_pylist() == one.table.to_pylist()
    assert (made.images, made.made, made.errors) == (IMAGES, IMAGES, 1)


def test_an_error_of_a_process_is_sent(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class OddError(Exception):  # cannot be pickled, as some of other packages cannot
        pass

    received, sent = multiprocessing.Pipe(duplex=False)
    told = ExtractConfig(strict=True, progress=False)
    with caplog.at_level(logging.ERROR, "casm_fast"), pytest.raises(SystemExit) as caught:
        _work(
            place / "model.safetensors",
            str(place / "tree"),
            tmp_path / "out",
            told,
            torch.get_num_threads(),
            sent,
        )
    assert caught.value.code == 1
    assert "it is not an image of a known format (strict stops at the first" in str(received.recv())
    assert repr(_sendable(OddError("what?"))) == "RuntimeError('OddError: what?')"


def test_what_processes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ExtractConfig(processes=2, shard="2/3", device="cpu", progress=True)
    told = shares(config)
    assert [own.shard for own in told] == ["3/6", "4/6"]
    assert [(own.device, own.processes, own.progress) for own in told] == [("cpu", 1, False)] * 2
    for images in (12, 13, 35, 1000):
        spans = [own.span(images) for own in told]
        assert [*spans[0], *spans[1]] == list(config.span(images))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    for device in ("auto", "cuda"):
        own = shares(ExtractConfig(processes=3, device=device))
        assert [one.device for one in own] == ["cuda:0", "cuda:1", "cuda:2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": "cuda"},
            "processes: expected at most one for each of the 0 GPUs of this machine, got 2",
        ),
        (
            {"device": "cuda:1"},
            "device: expected 'auto', 'cpu' or 'cuda' with several processes, got 'cuda:1'",
        ),
    ],
)
def test_processes_without_devices_are_refused(
    options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError) as caught:
        shares(ExtractConfig(processes=2, **options))
    assert str(caught.value) == message


def test_processes_go_neither_with_ray_nor_without_an_output(place: Path) -> None:
    with pytest.raises(ValueError) as caught:
        ExtractConfig(processes=2, engine="ray")
    assert str(caught.value) == (
        "processes: expected 1 with the engine ray, which has its own, got 2"
    )
    with pytest.raises(ValueError) as caught:
        extract(place / "model.safetensors", str(place / "tree"), processes=2)
    assert str(caught.value) == ("processes: expected an output with several processes, got none")
