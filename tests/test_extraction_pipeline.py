"""The pipeline: batches that fit, memory that stays flat, a GPU that is never waited for."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_extraction import CONVENTION, Painted, Pixels, pictures, truth_boxes
from torch import Tensor, nn

from casm_fast.data.synthetic import generate
from casm_fast.extraction import Extractor, extract, local
from casm_fast.extraction.config import ExtractConfig
from casm_fast.models import memory
from casm_fast.models.saliency import build_model

CPU = torch.device("cpu")


class Cramped(Painted):
    """Memory for so many images at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.seen: list[int] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError(f"tried to allocate room for {len(images)} images")
        return super().forward(images)


def test_out_of_memory_halves_the_batch_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    source = Pixels(pictures(23), truth_boxes(23), broken=[3])
    model = Cramped(3)
    with caplog.at_level(logging.INFO):
        found = extract(model, source, batch_size=10).table
    assert found.to_pylist() == extract(Painted(), source, batch_size=10).table.to_pylist()
    # The batch of 9 (one image cannot be read) fails, and its 5; from then on 3 at a time.
    assert model.seen == [9, 5, 3, 3, 3, 3, 3, 3, 1, 3]
    assert "out of memory: going on with 3 images at once" in caplog.messages


def test_one_image_that_does_not_fit_stops_the_run() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        extract(Cramped(0), Pixels(pictures(3), truth_boxes(3)), batch_size=2)


def test_a_compiled_network_that_runs_out_of_memory_gets_smaller_static_batches() -> None:
    model = Cramped(3)
    extractor = Extractor(model.eval(), CONVENTION, CPU, static=8)
    images = torch.from_numpy(pictures(8))
    saliency, logits = extractor.forward(images)
    assert model.seen == [8, 4, 2, 2, 2, 2]
    extractor.forward(images[:1])
    assert model.seen[6:] == [2]  # filled up
    whole = Extractor(Painted().eval(), CONVENTION, CPU).forward(images)
    assert torch.equal(saliency, whole[0])
    assert torch.equal(logits, whole[1])


def test_the_batch_size_follows_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("compact", classes=3, input_size=32).eval()
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:  # what autograd keeps, counted without our code
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer = model(image)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    each = sum(size for place, size in kept.items() if place not in own)
    assert answer[0].shape[0] == 1
    for room, expected in ((each * 1000, 64), (each * 40, 32), (each * 8, 8), (1, 1)):
        monkeypatch.setattr(local, "budget", lambda device, room=room: float(room))
        assert local.batch_size(model, 32, CPU, 1000) == expected
    assert local.batch_size(model, 32, CPU, 5) == local.FEW
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_budget_is_half_of_the_free_memory_and_at_most_four_gibibytes() -> None:
    assert 0 < memory.budget(CPU) <= 4 * 2**30


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_caller_gets_the_very_tensors_back(channels_last: bool) -> None:
    model = build_model("compact", classes=3, input_size=32)
    before = {
        name: (tensor.data_ptr(), tensor.stride(), tensor.clone())
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    parameters = list(model.parameters())
    source = generate(20, size=32, classes=3)
    extract(model, source, channels_last=channels_last, limit=5)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for name, tensor in model.state_dict(keep_vars=True).items():
        place, stride, value = before[name]
        assert (tensor.data_ptr(), tensor.stride()) == (place, stride)
        assert torch.equal(tensor, value)
    assert model.training


def nearly_equal(one: Any, other: Any) -> None:
    for name in ("mean_saliency", "entropy", "score"):
        # float32 sums in another order: 2e-7 measured.
        np.testing.assert_allclose(one[name].to_numpy(), other[name].to_numpy(), atol=5e-6)


@pytest.mark.parametrize("options", [{"channels_last": True}, {"fold": True}, {}])
def test_faster_networks_give_the_same_numbers_but_for_rounding(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = build_model("compact", classes=3, input_size=32)
    source = generate(20, size=32, classes=3)
    plain = {"channels_last": False, "fold": False}
    expected = extract(model, source, **plain).table
    nearly_equal(
        expected, extract(model, source, **({**plain, **options} if options else {})).table
    )


def test_channels_lie_last_where_that_is_faster() -> None:
    def chosen(device: str, **options: Any) -> bool:
        return local.channels_last(torch.device(device), ExtractConfig(**options))

    assert chosen("cpu")
    assert not chosen("cpu", channels_last=False)
    assert not chosen("cuda")
    assert chosen("cuda", amp="bf16")
    assert chosen("cuda", channels_last=True)


def test_an_extraction_runs_a_folded_network_unless_told_not_to() -> None:
    model = build_model("compact", classes=3, input_size=32).eval()

    def norms(**options: Any) -> int:
        extractor = local.extractor(model, CONVENTION, CPU, ExtractConfig(**options))
        return sum(isinstance(module, nn.BatchNorm2d) for module in extractor.model.modules())

    assert norms() == 0
    assert norms(fold=False) == sum(isinstance(one, nn.BatchNorm2d) for one in model.modules()) > 0


def test_a_compiled_network_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, one shape: the last batch is filled up."""
    compiled, shapes = torch.compile, []

    def eager(model: Any, **options: Any) -> Any:
        def backend(graph: Any, examples: Any) -> Any:
            shapes.append([e.shape for e in examples if e.shape[-3:] == (3, 32, 32)])
            return graph.forward

        return compiled(model, backend=backend, fullgraph=True, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", eager)
    torch.manual_seed(0)
    model = build_model("compact", classes=3, input_size=32)
    source = generate(20, size=32, classes=3)
    plain = extract(model, source, batch_size=8).table
    nearly_equal(plain, extract(model, source, batch_size=8, compile=True).table)
    assert shapes == [[torch.Size([8, 3, 32, 32])]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part_images": 0}, "part_images: expected at least 1, got 0"),
        ({"part_seconds": -1.0}, "part_seconds: expected at least 0, got -1.0"),
        ({"part_seconds": float("nan")}, "part_seconds: expected at least 0, got nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExtractConfig(**options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_no_batch_waits_for_the_gpu() -> None:
    device = torch.device("cuda")
    model = build_model("compact", classes=3, input_size=32).eval().to(device)
    images = torch.from_numpy(pictures(12)).pin_memory()
    truth = np.array([[1, 2, 20, 30]] * 12), np.arange(12)
    extractor = Extractor(model, CONVENTION, device)
    extractor.launch(images, *truth).measurements()  # constants go to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [extractor.launch(images, *truth) for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [one.measurements() for one in launched]
    assert all(np.array_equal(one.boxes, found[0].boxes) for one in found)


class Endless(Pixels):
    """Pictures that are made when they are asked for; notes the resident set."""

    def __init__(self, count: int) -> None:
        super().__init__(pictures(4), [[[1, 2, 20, 30]]] * 4)
        self.count = count
        self.resident: dict[int, int] = {}

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Any:
        if index % 1000 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.resident[index] = pages * os.sysconf("SC_PAGE_SIZE")
        return self.pictures[index % 4]

    def boxes(self, index: int) -> Any:
        return super().boxes(index % 4)


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    source = Endless(8000)
    made = extract(Painted(), source, tmp_path / "out", batch_size=64, part_images=640, workers=1)
    assert "table" not in made.__dict__  # read when it is asked for
    grown = source.resident[7000] - source.resident[2000]
    # 0.2 MB measured; rows kept as Python objects would take 12 MB.
    assert grown < 4 * 2**20, f"grew by {grown / 2**20:.1f} MB over 5,000 images"
    assert len(made.table) == 8000


def test_drafts_give_the_same_boxes_on_large_photos(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model("compact", classes=3, input_size=32)
    photos = generate(6, size=32, classes=3).images
    for k, (pixels, size) in enumerate(zip(photos, ((300, 400), (500, 280)) * 3, strict=True)):
        picture = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"{k}.jpg", quality=95)
    whole, drafted = (
        extract(model, tmp_path, tmp_path / f"out{draft}", draft=draft).table
        for draft in (False, True)
    )
    for name in ("image_id", "height", "width"):
        assert whole[name].equals(drafted[name])
    means = [table["mean_saliency"].to_numpy() for table in (whole, drafted)]
    assert 0 < np.abs(means[0] - means[1]).max() < 0.02  # 0.001 measured
    for name in ("net_x0", "net_y0", "net_x1", "net_y1"):  # a cell is 4 pixels
        assert np.abs(whole[name].to_numpy() - drafted[name].to_numpy()).max() <= 4
    with pytest.raises(ValueError, match="with draft None instead of True; give another output"):
        extract(model, tmp_path, tmp_path / "outFalse", draft=True)
    message = "draft: expected images by name, to be opened with it, got synthetic"
    with pytest.raises(ValueError, match=f"^{message}"):
        extract(model, generate(6, size=32, classes=3), draft=True)
