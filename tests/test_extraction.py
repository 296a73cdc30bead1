"""Extraction against full-resolution and scalar oracles, on models whose saliency is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from casm_fast.data import predictions
from casm_fast.data.decoding import DecodeError
from casm_fast.data.geometry import geometry
from casm_fast.data.predictions import Convention
from casm_fast.data.source import open_source
from casm_fast.data.synthetic import generate, write_tree
from casm_fast.extraction import ExtractConfig, Extractor, extract
from casm_fast.extraction.rows import label_numbers
from casm_fast.models import checkpoint, fingerprint
from casm_fast.models.saliency import SaliencyModel, build_model, full_size
from casm_fast.models.statistics import Cells, inside, measure

CONVENTION = Convention(32, "crop", "mean", 1.0, "largest", 4)


class Painted(SaliencyModel):
    """A model whose saliency is the red channel of the image at a quarter of the size."""

    def __init__(self, cell: int = 4, classes: Sequence[str] = ("a", "b", "c")) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(1))
        self.cell = cell
        self.classes = tuple(classes)
        self.input_size = 32
        self.resize_policy = "crop"
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.classifier = self.decoder = SimpleNamespace(description=dict)
        self.separate_encoder = None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        saliency = images[:, :1, :: self.cell, :: self.cell]
        logits = images.mean(dim=(2, 3)) + self.weight
        return saliency, logits


class Pixels:
    """A source of given pictures."""

    name = "pixels"
    has_boxes = True

    def __init__(
        self, images: NDArray[np.uint8], truth: Sequence[Any], broken: Sequence[int] = ()
    ) -> None:
        self.pictures, self.truth, self.broken = images, truth, broken
        self.classes: tuple[str, ...] = ("a", "b", "c")

    def __len__(self) -> int:
        return len(self.pictures)

    def image_id(self, index: int) -> str:
        return f"picture {index}"

    def image(self, index: int) -> NDArray[np.uint8]:
        if index in self.broken:
            raise DecodeError(f"picture {index}: it is cut short")
        return self.pictures[index]

    def label(self, index: int) -> int:
        return index % 3

    def boxes(self, index: int) -> NDArray[np.int32]:
        return np.array(self.truth[index], np.int32).reshape(-1, 4)


def pictures(count: int, size: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth random pictures, so that their thresholds have several components."""
    noise = np.random.default_rng(seed).random((count, size, size, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 3, 3, 0), mode="wrap")
    low, high = smooth.min((1, 2, 3), keepdims=True), smooth.max((1, 2, 3), keepdims=True)
    return np.asarray(np.rint(255 * (smooth - low) / (high - low)), np.uint8)


def truth_boxes(count: int, seed: int = 1) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        [
            [x, y, x + w, y + h]
            for x, y, w, h in np.hstack(
                [rng.integers(0, 16, (k, 2)), rng.integers(1, 20, (k, 2))]
            ).tolist()
        ]
        for k in rng.integers(0, 4, count)
    ]


@given(st.integers(1, 40), st.integers(0, 60))
def test_cells_are_the_nearest_rule(cells: int, more: int) -> None:
    size = cells + more
    edges = Cells.of(cells, size).edges.tolist()
    owner = [pixel * cells // size for pixel in range(size)]
    for cell in range(cells):
        assert [p for p in range(size) if owner[p] == cell] == list(
            range(edges[cell], edges[cell + 1])
        )


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(0, 12), st.integers(0, 12)),
    st.integers(0, 2**32 - 1),
)
def test_statistics_are_those_of_the_full_resolution(
    cells: tuple[int, int], more: tuple[int, int], seed: int
) -> None:
    size = (cells[0] + more[0], cells[1] + more[1])
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(2, 1, *cells, generator=generator, dtype=torch.float64)
    saliency[0, 0, 0, 0] = 0
    saliency[1, 0, 0, 0] = 1
    found = measure(saliency, Cells.of(cells[0], size[0]), Cells.of(cells[1], size[1]))
    for image, row in zip(full_size(saliency, size)[:, 0].numpy(), found.numpy(), strict=True):
        tv = entropy = full = 0.0
        for y in range(size[0]):
            for x in range(size[1]):
                m = image[y, x]
                if y + 1 < size[0]:
                    tv += (image[y + 1, x] - m) ** 2
                if x + 1 < size[1]:
                    tv += (image[y, x + 1] - m) ** 2
                one = -m * np.log2(m) if m > 0 else 0.0
                entropy += one
                full += one - ((1 - m) * np.log2(1 - m) if m < 1 else 0.0)
        expected = [image.mean(), tv, entropy / image.size, full / image.size]
        np.testing.assert_allclose(row, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(0, 12),
    st.lists(st.tuples(*[st.integers(-10, 30)] * 4), min_size=1, max_size=5),
)
def test_the_saliency_inside_a_box_is_a_sum_over_pixels(
    cells: int, more: int, boxes: list[tuple[int, int, int, int]]
) -> None:
    size = cells + more
    saliency = torch.rand(2, 1, cells, cells, generator=torch.Generator().manual_seed(cells))
    owners = torch.arange(len(boxes)) % 2
    axis = Cells.of(cells, size)
    found = inside(saliency, torch.tensor(boxes), owners, axis, axis)
    full = full_size(saliency, (size, size))[:, 0].double().numpy()
    for (x0, y0, x1, y1), owner, value in zip(boxes, owners, found, strict=True):
        expected = sum(
            full[owner, y, x]
            for y in range(size)
            for x in range(size)
            if x0 <= x < x1 and y0 <= y < y1
        )
        assert float(value) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("cell", [1, 4])
def test_boxes_areas_and_f1_against_scipy_at_full_resolution(cell: int) -> None:
    images, truth = pictures(12), truth_boxes(12)
    found = Extractor(Painted(cell).eval(), CONVENTION, torch.device("cpu"))(
        torch.from_numpy(images), [np.array(boxes, np.int32).reshape(-1, 4) for boxes in truth]
    )
    assert found.saliency_size == (32 // cell, 32 // cell)
    for i in range(12):
        full = images[i, ::cell, ::cell, 0].repeat(cell, 0).repeat(cell, 1).astype(np.float64) / 255
        kept = full >= full.mean()
        labels, _ = ndimage.label(kept)
        sizes = np.bincount(labels[kept])
        rows, columns = np.nonzero(labels == sizes.argmax())
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert found.boxes[i].tolist() == expected
        assert found.area[i] == sizes.max()
        scores = []
        for x0, y0, x1, y1 in truth[i]:
            held = full[y0:y1, x0:x1].sum()
            precision = held / (full.sum() + 1e-6)
            recall = held / ((x1 - x0) * (y1 - y0))
            scores.append(2 * precision * recall / (precision + recall + 1e-6))
        if scores:
            # float32 pixels against float64 ones: 4e-8 measured.
            assert found.f1[i] == pytest.approx(max(scores), abs=1e-6)
            assert found.f1_mean[i] == pytest.approx(np.mean(scores), abs=1e-6)
        else:
            assert np.isnan(found.f1[i])
            assert np.isnan(found.f1_mean[i])


def test_cells_that_are_no_whole_pixels_give_the_boxes_of_the_enlarged_map() -> None:
    class Odd(Painted):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            saliency, logits = super().forward(images)
            return saliency[:, :, :5, :7], logits

    images = pictures(6)
    found = Extractor(Odd().eval(), CONVENTION, torch.device("cpu"))(
        torch.from_numpy(images), [np.zeros((0, 4), np.int32)] * 6
    )
    for i in range(6):
        small = images[i, ::4, ::4, 0][:5, :7].astype(np.float64) / 255
        kept = small >= small.mean()
        labels, _ = ndimage.label(kept)
        chosen = labels == np.bincount(labels[kept]).argmax()
        full = full_size(torch.from_numpy(chosen[None, None]).float(), (32, 32))[0, 0].numpy() > 0
        rows, columns = np.nonzero(full)
        assert found.boxes[i].tolist() == [
            columns.min(), rows.min(), columns.max() + 1, rows.max() + 1,
        ]  # fmt: skip
        assert found.area[i] == round(chosen.sum() * 32 * 32 / 35)


def test_a_row_holds_what_was_found() -> None:
    images, truth = pictures(5), truth_boxes(5)
    made = extract(Painted(), Pixels(images, truth), batch_size=2)
    assert (made.images, made.errors, made.path) == (5, 0, None)
    assert made.table.schema.remove_metadata() == predictions.schema()
    for i, row in enumerate(made.table.to_pylist()):
        logits = images[i].reshape(-1, 3).mean(0) / 255
        share = np.exp(logits) / np.exp(logits).sum()
        assert row["image_id"] == f"picture {i}"
        assert (row["height"], row["width"], row["label"], row["rule"]) == (32, 32, i % 3, "mean")
        assert row["top5"] == np.argsort(-logits, kind="stable").tolist()
        assert row["predicted"] == row["top5"][0]
        assert row["predicted_name"] == "abc"[row["predicted"]]
        assert row["score"] == pytest.approx(share.max(), abs=1e-6)
        assert row["gt_boxes"] == row["gt_net_boxes"] == truth[i]
        assert [row[c] for c in ("x0", "y0", "x1", "y1")] == [
            row[f"net_{c}"] for c in ("x0", "y0", "x1", "y1")
        ]
        assert row["error"] is None


def test_neither_batches_nor_workers_change_the_table() -> None:
    source = Pixels(pictures(9), truth_boxes(9), broken=[4])
    tables = [
        extract(Painted(), source, batch_size=size, workers=workers).table.to_pylist()
        for size, workers in ((1, 0), (4, 0), (4, 2), (9, 1))
    ]
    assert all(table == tables[0] for table in tables)


def test_a_bad_image_is_a_row_and_stops_nothing() -> None:
    made = extract(Painted(), Pixels(pictures(4), truth_boxes(4), broken=[0, 2]), batch_size=2)
    rows = made.table.to_pylist()
    assert (made.images, made.errors) == (4, 2)
    assert [row["image_id"] for row in rows] == [f"picture {i}" for i in range(4)]
    assert rows[0]["error"] == "picture 0: it is cut short"
    assert [row["error"] is None for row in rows] == [False, True, False, True]
    assert rows[2]["label"] == 2
    known = {"image_id", "label", "error"}
    assert all(value is None for name, value in rows[2].items() if name not in known)
    assert "2 unreadable" in str(made)


def test_an_output_that_is_not_finite_is_an_error_of_its_image() -> None:
    class Broken(Painted):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            saliency, logits = super().forward(images)
            saliency = saliency.clone()
            saliency[1] = torch.nan
            return saliency, logits

    rows = extract(Broken(), Pixels(pictures(3), truth_boxes(3))).table.to_pylist()
    assert [row["error"] for row in rows] == [None, "the model's output is not finite", None]


def test_a_flat_map_keeps_the_whole_picture() -> None:
    grey = np.full((1, 32, 32, 3), 100, np.uint8)
    (row,) = extract(Painted(), Pixels(grey, [[]])).table.to_pylist()
    assert [row[f"net_{c}"] for c in ("x0", "y0", "x1", "y1")] == [0, 0, 32, 32]
    assert (row["area"], row["f1"], row["gt_boxes"]) == (32 * 32, None, [])


def test_the_model_is_left_as_it_was() -> None:
    model = build_model("compact", classes=3)
    model.train()
    model.decoder.eval()
    before = fingerprint(model)
    extract(model, generate(3, size=32, classes=3), batch_size=2)
    assert model.training
    assert model.classifier.training
    assert not any(module.training for module in model.decoder.modules())
    assert fingerprint(model) == before


def test_fingerprints_follow_the_weights() -> None:
    model = build_model("compact", classes=3)
    before = fingerprint(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert fingerprint(model) != before


def test_limit_takes_the_first_images() -> None:
    source = Pixels(pictures(5), truth_boxes(5))
    rows = extract(Painted(), source, limit=3, batch_size=2).table.to_pylist()
    assert [row["image_id"] for row in rows] == ["picture 0", "picture 1", "picture 2"]


def test_labels_follow_names_where_names_are_shared() -> None:
    assert label_numbers(("a", "b"), ("a", "b")) is None
    assert label_numbers((), ("a", "b")) is None
    assert label_numbers(("n1", "n2"), ("cat", "dog")) is None
    assert label_numbers(("b", "x"), ("a", "b", "c")) == {0: 1, 1: -1}
    source = Pixels(pictures(3), truth_boxes(3))
    source.classes = ("b", "c", "x")
    rows = extract(Painted(), source).table.to_pylist()
    assert [row["label"] for row in rows] == [1, 2, -1]


def test_a_tree_of_files_from_a_checkpoint(tmp_path: Path) -> None:
    val = generate(12, size=32, classes=3, seed=4)
    write_tree(tmp_path / "tree", None, val, layout="flat")
    model = build_model("compact", classes=val.classes, input_size=32)
    file = checkpoint.save(model, tmp_path / "model.safetensors")
    made = extract(file, f"imagenet-val:{tmp_path / 'tree'}", tmp_path / "out" / "boxes.parquet")
    assert made.path is not None
    assert [entry.name for entry in made.path.parent.iterdir()] == ["boxes.parquet"]
    assert pq.read_table(made.path).equals(made.table)
    description = predictions.read(made.path)[1]
    assert description == made.description
    assert description.convention == CONVENTION
    assert (description.checkpoint, description.model) == (str(file), fingerprint(model))
    assert description.config["rule"] == "mean"
    source = open_source(f"imagenet-val:{tmp_path / 'tree'}")
    for i, row in enumerate(made.table.to_pylist()):
        height, width = source.image(i).shape[:2]
        assert (row["height"], row["width"]) == (height, width)
        assert row["gt_boxes"] == source.boxes(i).tolist()
        where = geometry(height, width, 32)
        assert row["gt_net_boxes"] == where.to_network(source.boxes(i)).tolist()
        box = np.array([[row[f"net_{c}"] for c in ("x0", "y0", "x1", "y1")]])
        assert [row[c] for c in ("x0", "y0", "x1", "y1")] == where.to_original(box)[0].tolist()
        assert 0 <= row["x0"] < row["x1"] <= width
        assert 0 <= row["y0"] < row["y1"] <= height


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(table: Any, stream: Any, **options: Any) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        extract(Painted(), Pixels(pictures(1), [[]]), tmp_path / "boxes.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "otsu"}, "rule: expected one of mean, area, value, energy, got 'otsu'"),
        ({"component": "two"}, "component: expected one of largest, all, got 'two'"),
        ({"connectivity": 6}, "connectivity: expected one of 4, 8, got 6"),
        ({"amp": "fp8"}, "amp: expected one of off, bf16, fp16, got 'fp8'"),
        ({"resize_policy": "pad"}, "resize_policy: expected one of crop, squash, got 'pad'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"alpha": float("nan")}, "alpha: expected a number >= 0, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExtractConfig(**options)


def test_what_cannot_be_extracted_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^pixels: expected at least one image, got none$"):
        extract(Painted(), Pixels(pictures(0), []))
    message = "device: expected 'auto', 'cpu' or a GPU of this machine, got 'gpu'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        extract(Painted(), Pixels(pictures(1), [[]]), device="gpu")
    with pytest.raises(FileNotFoundError):
        extract(tmp_path / "none.safetensors", Pixels(pictures(1), [[]]))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="no CUDA device on this machine"
            ),
        ),
    ],
)
def test_mixed_precision_gives_nearly_the_same_statistics(device: str) -> None:
    torch.manual_seed(0)
    model = build_model("compact", classes=3, input_size=32).to(device)
    source = generate(16, size=32, classes=3)
    exact = extract(model, source).table
    mixed = extract(model, source, amp="bf16").table
    for name in ("mean_saliency", "entropy"):
        # bfloat16 keeps 8 bits: 2e-3 measured on an untrained network.
        np.testing.assert_allclose(exact[name].to_numpy(), mixed[name].to_numpy(), atol=0.02)
