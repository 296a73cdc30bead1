"""Extraction from JPEG files to rows on the disk: by stage, end to end, and beside two others.

* ours: `casm_fast.extract` into a folder, as it is.
* an engineer's: what one writes with the usual libraries, and well: a DataLoader with processes,
  torchvision's transforms, the network by the batch without gradients, OpenCV's components at the
  map's own resolution, ElementTree, and one Parquet file at the end.
* the authors': the scoring of Zolna, Geras and Cho's published code, written down from its
  description: the same DataLoader, then image by image the quantile by sorting all pixels of the
  enlarged map, `scipy.ndimage.label`, rectangles as arrays, sums over them for IoU and F1, and the
  annotation read by an HTML parser (BeautifulSoup on html5lib, as theirs).

All read the same files with as many workers and run the same network on as many threads. Each runs
as its user runs it: `casm-fast extract` keeps freed memory, a script of one's own has glibc as it
comes. The two are also run with memory kept, as is everything that is timed by stage. Before
anything is timed, the boxes must be equal: ours and the engineer's by the rule ``mean``; ours on
the enlarged maps and the authors' by the rule ``area``.

Host work is everything but decoding, resizing and the network.

    python benchmarks/bench_extract.py --memory 50000

watches the resident set, file handles and threads of one extraction of so many small JPEG files.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import io
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.transforms as tv
from bs4 import BeautifulSoup
from conftest import synchronized
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from casm_fast import ops
from casm_fast.data import predictions
from casm_fast.data.decoding import decode_bytes
from casm_fast.data.loading import evaluation_batches
from casm_fast.data.predictions import Convention
from casm_fast.data.source import ImageSource, open_source
from casm_fast.data.synthetic import generate, write_tree
from casm_fast.extraction import Extractor, extract, local
from casm_fast.extraction.config import ExtractConfig
from casm_fast.extraction.rows import Naming, batch_table, true_boxes
from casm_fast.models.memory import keep_freed
from casm_fast.models.saliency import SaliencyModel, build_model, full_size

CLASSES = 20
SIDES, ASPECT = (375, 375), 4 / 3  # pixels, ImageNet's commonest size is 500 x 375
CASES = [  # network, its side in pixels, files, images of a batch
    pytest.param("compact", 64, 256, 32, id="compact-64x64"),
    pytest.param("resnet18", 224, 128, 32, id="resnet18-224x224", marks=pytest.mark.long),
    pytest.param("resnet50", 224, 96, 32, id="resnet50-224x224", marks=pytest.mark.long),
]
ROUNDS = 3
PLAIN: dict[str, Any] = {"fold": False, "channels_last": False}
REPEATS = 5  # of host work, which is short
EPSILON = 1e-6


# --- what everybody starts with -------------------------------------------------------------------


def model_of(backbone: str, size: int, device: torch.device) -> SaliencyModel:
    torch.manual_seed(0)
    model = build_model(backbone, classes=CLASSES, input_size=size)
    return model.eval().to(device)


def tree_of(folder: Path, files: int) -> Path:
    val = generate(files, size=64, classes=CLASSES, seed=0)
    return write_tree(folder / "tree", None, val, layout="flat", sides=SIDES, aspect=ASPECT)


class Files(torch.utils.data.Dataset[tuple[Tensor, int, int, str]]):
    """The files of a tree for a DataLoader: pixels, size, and the annotation's path."""

    def __init__(self, tree: Path, model: SaliencyModel) -> None:
        self.files = sorted((tree / "val").iterdir())
        self.notes = tree / "Annotations/CLS-LOC/val"
        self.transform = tv.Compose(
            [
                tv.Resize(model.input_size),
                tv.CenterCrop(model.input_size),
                tv.ToTensor(),
                tv.Normalize(model.mean, model.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int, str]:
        file = self.files[index]
        with Image.open(file) as image:
            picture = image.convert("RGB")
        note = str(self.notes / f"{file.stem}.xml")
        return self.transform(picture), picture.height, picture.width, note


def moved(boxes: list[list[int]], height: int, width: int, size: int) -> list[list[int]]:
    """Boxes of the annotation in the network's square, truncated towards zero."""
    scale = size / min(height, width)
    cut_x, cut_y = max(0, width * scale - size) / 2, max(0, height * scale - size) / 2
    cuts = (cut_x, cut_y, cut_x, cut_y)
    return [[int(c * scale - cut) for c, cut in zip(box, cuts, strict=True)] for box in boxes]


# --- the engineer ---------------------------------------------------------------------------------


def engineers_boxes(note: str) -> list[list[int]]:
    root = ElementTree.parse(note).getroot()
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        [int(box.findtext(name, "")) for name in corners] for box in root.iterfind("object/bndbox")
    ]


def engineers_box(mask: NDArray[np.float32]) -> tuple[list[int], int]:
    """Box and pixels of the largest component above the mean, in cells."""
    kept = (mask >= np.float32(mask.mean(dtype=np.float64))).astype(np.uint8)
    _, _, found, _ = cv2.connectedComponentsWithStats(kept, connectivity=4)
    x, y, w, h, area = found[1 + found[1:, cv2.CC_STAT_AREA].argmax()].tolist()
    return [x, y, x + w, y + h], area


def engineers_rows(
    saliency: Tensor, logits: Tensor, heights: Any, widths: Any, notes: Any, size: int
) -> list[dict[str, Any]]:
    score, top = logits.softmax(1).topk(5)
    masks, score, top = saliency[:, 0].cpu().numpy(), score.cpu().numpy(), top.cpu().numpy()
    rows = []
    for k, mask in enumerate(masks):
        cell = size // len(mask)
        box, area = engineers_box(mask)
        box = [c * cell for c in box]
        truth = moved(engineers_boxes(notes[k]), int(heights[k]), int(widths[k]), size)
        large = np.repeat(np.repeat(mask, cell, 0), cell, 1)
        f1 = []
        for x0, y0, x1, y1 in truth:
            held = float(large[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)].sum())
            precision = held / (float(large.sum()) + EPSILON)
            recall = held / ((x1 - x0) * (y1 - y0))
            f1.append(2 * precision * recall / (precision + recall + EPSILON))
        inside = mask[(mask > 0) & (mask < 1)]
        rows.append(
            {
                "image_id": Path(notes[k]).stem,
                "box": box,
                "area": area * cell * cell,
                "truth": truth,
                "f1": max(f1, default=None),
                "predicted": int(top[k, 0]),
                "top5": top[k].tolist(),
                "score": float(score[k, 0]),
                "mean": float(mask.mean()),
                "tv": float(np.square(np.diff(large, axis=0)).sum())
                + float(np.square(np.diff(large, axis=1)).sum()),
                "entropy": float(-(inside * np.log2(inside)).sum() / mask.size),
            }
        )
    return rows


# --- the authors ----------------------------------------------------------------------------------


def authors_boxes(note: str) -> list[list[int]]:
    page = BeautifulSoup(Path(note).read_text(), "html5lib")
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        [int(box.find(name).contents[0]) for name in corners] for box in page.find_all("bndbox")
    ]


def authors_box(mask: NDArray[np.float32]) -> list[int]:
    """Box of the largest component of the quantile that keeps a share of mean(m)."""
    values = np.sort(mask.ravel())
    k = 1 + int((len(values) - 1) * (1 - float(mask.mean(dtype=np.float64))) + 0.5)
    level = np.float32(min(max(float(values[k - 1]), EPSILON), 1 - EPSILON))
    binary = mask > level
    labels, _ = ndimage.label(binary)
    largest = labels == np.bincount(labels.ravel(), weights=binary.ravel()).argmax()
    if not binary.any():
        return [0, 0, 0, 0]
    rows, columns = np.flatnonzero(largest.any(1)), np.flatnonzero(largest.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def authors_rows(
    saliency: Tensor, logits: Tensor, heights: Any, widths: Any, notes: Any, size: int
) -> list[dict[str, Any]]:
    masks = full_size(saliency, (size, size))[:, 0].cpu().numpy()
    best = logits.max(1)[1].cpu().numpy()
    rectangles = np.zeros_like(masks)
    boxes = [authors_box(mask) for mask in masks]
    for rectangle, (x0, y0, x1, y1) in zip(rectangles, boxes, strict=True):
        rectangle[y0:y1, x0:x1] = 1
    rows = []
    for k, (mask, rectangle) in enumerate(zip(masks, rectangles, strict=True)):
        truth = moved(authors_boxes(notes[k]), int(heights[k]), int(widths[k]), size)
        iou, f1 = [0.0], [0.0]
        for x0, y0, x1, y1 in truth:
            area = (x1 - x0) * (y1 - y0)
            window = (slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0)))
            shared = float(rectangle[window].sum())
            iou.append(shared / (float(rectangle.sum()) + area - shared))
            precision = float(mask[window].sum()) / (float(mask.sum()) + EPSILON)
            recall = float(mask[window].sum()) / area
            f1.append(2 * precision * recall / (precision + recall + EPSILON))
        rows.append({"box": boxes[k], "iou": max(iou), "f1": max(f1), "best": int(best[k])})
    return rows


Rows = Callable[..., list[dict[str, Any]]]


def usual(
    tree: Path, model: SaliencyModel, rows: Rows, output: Path, batch: int, workers: int
) -> list[dict[str, Any]]:
    """The DataLoader's way, with the rows of the engineer or of the authors."""
    device = next(model.parameters()).device
    loader = torch.utils.data.DataLoader(
        Files(tree, model), batch, num_workers=workers, pin_memory=device.type == "cuda"
    )
    made: list[dict[str, Any]] = []
    with torch.inference_mode():
        for images, heights, widths, notes in loader:
            saliency, logits = model(images.to(device, non_blocking=True))
            made += rows(saliency, logits, heights, widths, notes, model.input_size)
    pq.write_table(pa.Table.from_pylist(made), output)
    return made


# --- measuring ------------------------------------------------------------------------------------


def boxes_of(table: pa.Table) -> list[list[int]]:
    columns = [table[f"net_{name}"].to_pylist() for name in ("x0", "y0", "x1", "y1")]
    return [list(row) for row in zip(*columns, strict=True)]


def keep_memory(keep: bool) -> None:
    """Sets glibc as our programs do, or to where it goes by itself in a process like this."""
    if keep:
        keep_freed()
    else:
        library = ctypes.CDLL(None)
        for option, value in ((-3, 2**25), (-1, 2**26), (-2, 2**17)):
            library.mallopt(option, value)
        library.malloc_trim(0)


def check(tree: Path, model: SaliencyModel, source: ImageSource, folder: Path, batch: int) -> None:
    """Equal boxes, by both rules."""
    ours = extract(
        model, source, batch_size=batch, decoder="pillow", progress=False,
        **PLAIN,  # folded, it rounds otherwise
    ).table  # fmt: skip
    theirs = usual(tree, model, engineers_rows, folder / "b.parquet", batch, 0)
    assert boxes_of(ours) == [row["box"] for row in theirs]
    np.testing.assert_allclose(
        ours["f1"].to_numpy(), np.array([row["f1"] for row in theirs], float), atol=1e-5
    )
    (images,) = itertools.islice(
        evaluation_batches(source, size=model.input_size, batch_size=batch), 1
    )
    extractor = Extractor(model, convention_of(model), next(model.parameters()).device)
    with torch.inference_mode():
        saliency, _ = extractor.forward(images.images)
        large = full_size(saliency, (model.input_size,) * 2).contiguous()
        found = ops.mask_boxes(large, rule="area")[0].tolist()
    assert found == [authors_box(mask) for mask in large[:, 0].cpu().numpy()]


def convention_of(model: SaliencyModel) -> Convention:
    return Convention(model.input_size, "crop", "mean", 1.0, "largest", 4)


def stages(
    model: SaliencyModel, source: ImageSource, folder: Path, batch: int, workers: int
) -> dict[str, float]:
    """Seconds per image of every stage of ours, each alone; host work in seconds of the processor.

    What else the machine does then stretches the time of no stage but the first two.
    """
    device = next(model.parameters()).device
    extractor = local.extractor(model, convention_of(model), device, ExtractConfig())
    spent = {}

    start = time.perf_counter()
    batches = list(
        evaluation_batches(
            source, size=model.input_size, batch_size=batch, workers=workers, boxes=True
        )
    )
    spent["read and decode"] = (time.perf_counter() - start) / len(source)

    if device.type == "cuda":  # as they come in an extraction, where few lie in memory at once
        batches = [dataclasses.replace(one, images=one.images.pin_memory()) for one in batches]
    first = batches[0]
    with torch.inference_mode():
        extractor.forward(first.images)  # once to warm up
        synchronized(device)
        start = time.perf_counter()
        answers = [extractor.forward(one.images) for one in batches]
        synchronized(device)
    spent["network"] = (time.perf_counter() - start) / len(source)
    for name, options in (("as it stands", PLAIN), ("compiled", {"compile": True})):
        config = ExtractConfig(batch_size=batch, **options)
        other = local.extractor(model, convention_of(model), device, config)
        with torch.inference_mode():
            other.forward(first.images)
            synchronized(device)
            start = time.perf_counter()
            for one in batches:
                other.forward(one.images)
            synchronized(device)
        spent[f"network, {name}"] = (time.perf_counter() - start) / len(source)

    naming = Naming(source, model.classes, None, "mean")
    again = list(zip(batches, answers, strict=True)) * REPEATS
    count = len(source) * REPEATS

    def measure() -> list[Any]:
        launched = []
        for one, answer in again:
            truth = true_boxes(one)
            with torch.inference_mode():
                numbers = extractor.measure(*answer, model.input_size, truth.network, truth.owners)
            launched.append((numbers, truth))
        return launched

    measure()  # once to warm up
    synchronized(device)
    start = time.process_time()
    launched = measure()
    spent["boxes and statistics"] = (time.process_time() - start) / count
    synchronized(device)  # not counted: a thread that waits for a GPU is busy

    start = time.process_time()
    tables = [
        batch_table(naming, one, numbers.measurements(), truth)
        for (one, _), (numbers, truth) in zip(again, launched, strict=True)
    ]
    spent["rows"] = (time.process_time() - start) / count

    table = pa.concat_tables(tables)
    table = pa.concat_tables([table] * max(1, 10_000 // len(table)))  # a part's default size
    start = time.process_time()
    predictions.write(table, folder / "part.parquet")
    spent["write"] = (time.process_time() - start) / len(table)

    note = str(next(iter(sorted(source.annotations.iterdir()))))  # type: ignore[attr-defined]
    start = time.process_time()
    for _ in range(count):
        source.boxes(0)
    spent["annotation, a reader's"] = (time.process_time() - start) / count
    for name, rows in (("engineer", engineers_rows), ("authors", authors_rows)):
        saliency, logits = answers[0]
        sizes = [g.height for g in first.geometries], [g.width for g in first.geometries]
        start = time.process_time()
        for _ in range(REPEATS):
            rows(saliency, logits, *sizes, [note] * batch, model.input_size)
        spent[f"host work, {name}"] = (time.process_time() - start) / (batch * REPEATS)
    return spent


HOST = ("boxes and statistics", "rows", "write")


@pytest.mark.parametrize(("backbone", "size", "files", "batch"), CASES)
def test_extraction(
    backbone: str,
    size: int,
    files: int,
    batch: int,
    benchmark: Any,
    request: pytest.FixtureRequest,
    device: torch.device,
    tmp_path: Path,
) -> None:
    cores = os.cpu_count() or 2
    if device.type == "cpu":  # a core for the reader, for everybody's
        request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - 1)))
    workers = max(1, cores - torch.get_num_threads())
    model = model_of(backbone, size, device)
    tree = tree_of(tmp_path, files)
    source = open_source(f"imagenet-val:{tree}")
    check(tree, model, source, tmp_path, batch)
    number = itertools.count()

    def ours() -> None:
        extract(
            model, source, tmp_path / f"out{next(number)}",
            batch_size=batch, workers=workers, progress=False,
        )  # fmt: skip

    def engineers() -> None:
        usual(tree, model, engineers_rows, tmp_path / "b.parquet", batch, workers)

    def authors() -> None:
        usual(tree, model, authors_rows, tmp_path / "a.parquet", batch, workers)

    field = {
        "ours": (ours, True),
        "engineer": (engineers, False),
        "authors": (authors, False),
        "engineer, memory kept": (engineers, True),
    }
    taken: dict[str, list[float]] = {name: [] for name in field}
    parts: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        for name, (call, keep) in field.items():
            keep_memory(keep)
            start = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - start) / files)
        parts.append(stages(model, source, tmp_path, batch, workers))
    spent = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    end = {name: statistics.median(times) for name, times in taken.items()}
    host = sum(spent[name] for name in HOST)
    slower = max(("read and decode", "network"), key=spent.__getitem__)
    result = {
        "extraction": backbone,
        "case": f"{backbone}, {size}x{size}, {files} files, batch {batch}",
        "device": device.type,
        "threads": torch.get_num_threads(),
        "workers": workers,
        "milliseconds_per_image": {name: value * 1e3 for name, value in spent.items()},
        "images_per_second": {name: 1 / value for name, value in end.items()},
        "limiting_stage": slower,
        "host_share_of_network": host / spent["network"],
        # Of each round, whose measurements are neighbours.
        "share_of_slower_stage": statistics.median(
            part[slower] / ours for part, ours in zip(parts, taken["ours"], strict=True)
        ),
        **{
            f"times_{name}".replace(", ", "_").replace(" ", "_"): statistics.median(
                theirs / ours for theirs, ours in zip(taken[name], taken["ours"], strict=True)
            )
            for name in field
            if name != "ours"
        },
        # Annotations are read by our readers, so that their time is host work of ours, too.
        "host_times_less_than_authors": spent["host work, authors"]
        / (host + spent["annotation, a reader's"]),
    }
    benchmark.group = "extraction"
    benchmark.extra_info.update(result)
    benchmark.pedantic(lambda: None, rounds=1)
    print(json.dumps(result, indent=1))


# --- memory ---------------------------------------------------------------------------------------


class Many:
    """So many small JPEG files, a few of them over and over, from memory."""

    name, classes, has_boxes = "many", (), True

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.count = count
        self.files = []
        for _ in range(64):
            height, width = rng.integers(40, 90, 2)
            file = io.BytesIO()
            pixels = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
            Image.fromarray(pixels).resize((width, height)).save(file, "JPEG")
            self.files.append(file.getvalue())
        self.samples: list[tuple[int, float, int, int]] = []

    def __len__(self) -> int:
        return self.count

    def image_id(self, index: int) -> str:
        return f"many-{index:09d}"

    def image(self, index: int) -> NDArray[np.uint8]:
        if index % max(1, self.count // 200) == 0:
            status = Path("/proc/self/status").read_text()
            fields = dict(line.split(":", 1) for line in status.splitlines())
            resident = int(fields["VmRSS"].split()[0]) / 1024
            handles = len(os.listdir("/proc/self/fd"))
            self.samples.append((index, resident, handles, int(fields["Threads"])))
        return decode_bytes(self.files[index % len(self.files)], "many")

    def label(self, index: int) -> int:
        return -1

    def boxes(self, index: int) -> NDArray[np.int32]:
        return np.array([[3, 4, 30, 31]], np.int32)


def watch_memory(count: int, folder: Path) -> dict[str, Any]:
    """Resident set, handles and threads over an extraction; the slope after its first tenth."""
    source = Many(count)
    model = build_model("compact", classes=10, input_size=32)
    start = time.perf_counter()
    extract(model, source, folder / "out", batch_size=64, workers=2, part_images=2000)
    seconds = time.perf_counter() - start
    samples = np.array(sorted(source.samples))
    late = samples[samples[:, 0] >= count / 10]
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0]
    return {
        "images": count,
        "images_per_second": count / seconds,
        "resident_mebibytes": samples[:: len(samples) // 20, 1].round(1).tolist(),
        "slope_bytes_per_image": float(slope) * 2**20,
        "handles": [int(late[:, 2].min()), int(late[:, 2].max())],
        "threads": [int(late[:, 3].min()), int(late[:, 3].max())],
    }


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, required=True, metavar="IMAGES")
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(watch_memory(parser.parse_args().memory, Path(place)), indent=1))
