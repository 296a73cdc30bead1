"""Real-time saliency: its loss beside scalars, a short training on squares, exact resume."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

import casm_fast
from casm_fast.attribution import realtime_training
from casm_fast.attribution.realtime import RealTimeModel, load_real_time, save_real_time
from casm_fast.attribution.realtime_config import RealTimeConfig
from casm_fast.attribution.realtime_loss import mask_loss, masked
from casm_fast.attribution.realtime_training import (
    RealTimeResult,
    train_real_time,
)
from casm_fast.data import normalize
from casm_fast.models import TracedEncoder, build_encoder, build_model, save
from casm_fast.models.encoder import Encoder

SIDE, SQUARE, CLASSES = 32, 12, 3
COLOURS = np.array([[255, 40, 40], [40, 255, 40], [40, 40, 255]])


class Squares:
    """A square on noise; its colour is the class."""

    name = "squares"
    classes = ("red", "green", "blue")
    has_boxes = True

    def __init__(self, count: int = 96, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.labels = draw.integers(CLASSES, size=count)
        self.corners = draw.integers(SIDE - SQUARE + 1, size=(count, 2))
        self.images = draw.integers(90, 150, size=(count, SIDE, SIDE, 3)).astype(np.uint8)
        for image, label, (y, x) in zip(self.images, self.labels, self.corners, strict=True):
            image[y : y + SQUARE, x : x + SQUARE] = COLOURS[label]

    def __len__(self) -> int:
        return len(self.labels)

    def image_id(self, index: int) -> str:
        return str(index)

    def image(self, index: int) -> NDArray[np.uint8]:
        return self.images[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def boxes(self, index: int) -> NDArray[np.int32]:
        y, x = self.corners[index]
        return np.array([[x, y, x + SQUARE, y + SQUARE]], np.int32)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """A compact classifier of the squares, trained for some seconds."""
    torch.manual_seed(0)
    net, source = build_encoder("compact", classes=CLASSES), Squares()
    images, labels = normalize(torch.from_numpy(source.images)), torch.from_numpy(source.labels)
    adam = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(24):
        part = slice(step % 3 * 32, step % 3 * 32 + 32)
        adam.zero_grad()
        F.cross_entropy(net(images[part])[0], labels[part]).backward()
        adam.step()
    net.eval()
    with torch.no_grad():
        assert (net(images)[0].argmax(dim=1) == labels).float().mean() > 0.95
    return net


TINY: dict[str, Any] = {
    "selector_steps": 14,
    "mask_steps": 14,
    "selector_batch": 32,
    "mask_batch": 12,
    "input_size": SIDE,
    "width": 4,
    "augment": "flip",
    "device": "cpu",
    "workers": 0,
    "log_interval": 4,
    "progress": False,
}
LEARNS: dict[str, Any] = {
    **TINY,
    "mask_steps": 120,
    "mask_batch": 20,
    "mask_fakes": 0.5,
    "area_weight": 2.0,
    "width": 16,
    "learning_rate": 1e-2,
    "weight_decay": 0.0,
    "log_interval": 30,
    "seed": 2,
}


@pytest.fixture(scope="module")
def run(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> RealTimeResult:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return train_real_time(encoder, Squares(), output=folder, **TINY)


@pytest.fixture(scope="module")
def learned(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> RealTimeResult:
    folder = tmp_path_factory.mktemp("runs") / "learned"
    return train_real_time(encoder, Squares(), output=folder, **LEARNS)


def records(result: RealTimeResult) -> list[dict[str, Any]]:
    """The log without its timings."""
    rows = [json.loads(line) for line in result.log.read_text().splitlines()]
    timings = ("seconds", "images_per_second")
    return [{name: row[name] for name in row if name not in timings} for row in rows]


# --- training


def test_a_short_training_lowers_both_losses(learned: RealTimeResult, run: RealTimeResult) -> None:
    losses = [row["loss"] for row in records(run) if row["phase"] == "selector"]
    assert losses[-1] < 0.5 * losses[0], losses
    losses = [row["loss"] for row in records(learned) if row["phase"] == "masks"]
    assert losses[-1] < 0.9 * losses[0], losses  # 9.4 to 7.7 measured


def test_the_mask_finds_the_class_and_depends_on_it(
    encoder: Encoder, learned: RealTimeResult
) -> None:
    source = Squares(24, seed=1)
    images = normalize(torch.from_numpy(source.images))
    labels = torch.from_numpy(source.labels)

    def masks(targets: torch.Tensor) -> torch.Tensor:
        return casm_fast.attribute(
            "real_time", encoder, images, targets, model=learned.checkpoint, confidence=0.0
        )

    own, fake = masks(labels), masks((labels + 1) % CLASSES)
    inside = torch.zeros_like(own, dtype=torch.bool)
    for flag, (y, x) in zip(inside, source.corners, strict=True):
        flag[:, y : y + SQUARE, x : x + SQUARE] = True
    assert own.min() >= 0
    assert own.max() <= 1
    # 0.55, 0.07 and 0.01 measured; with other seeds the last is up to 0.16
    assert own[inside].mean() > 2 * own[~inside].mean()
    assert own[inside].mean() > 1.5 * fake[inside].mean()
    both = masks(torch.stack([labels, (labels + 1) % CLASSES], dim=1))
    assert both.shape == own.shape
    padded = masks(torch.stack([labels, torch.full_like(labels, -1)], dim=1))
    assert torch.equal(padded, own)


def test_of_several_classes_each_cell_takes_the_highest_mask(encoder: Encoder) -> None:
    torch.manual_seed(0)
    model = RealTimeModel(encoder, width=4, input_size=SIDE).eval()
    images = normalize(torch.from_numpy(Squares(3).images))
    with torch.no_grad():
        taps = model.read(images)
        each = [model(taps, torch.full((3,), k), 1.5)[0] for k in (0, 2)]
    expected = F.interpolate(each[0].maximum(each[1]), (SIDE, SIDE), mode="bilinear")
    made = casm_fast.attribute(
        "real_time", encoder, images, [[0, 2]] * 3, model=model, confidence=1.5
    )
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


class BrokenError(RuntimeError):
    pass


@pytest.mark.parametrize(("phase", "stopped"), [("selector", 7), ("masks", 3), ("masks", 12)])
def test_a_killed_run_goes_on_to_the_same_weights(
    encoder: Encoder,
    run: RealTimeResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    stopped: int,
) -> None:
    advance = realtime_training._Run._advance

    def breaking(self: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        if self.phase == phase and self.step == stopped:
            raise BrokenError
        advance(self, images, labels)

    monkeypatch.setattr(realtime_training._Run, "_advance", breaking)
    options = {**TINY, "output": tmp_path, "save_interval": 5}
    with pytest.raises(BrokenError):
        train_real_time(encoder, Squares(), **options)
    monkeypatch.undo()
    torch.manual_seed(stopped)  # the caller's random numbers play no part
    resumed = train_real_time(encoder, Squares(), resume=True, **options)
    assert resumed.checkpoint.read_bytes() == run.checkpoint.read_bytes()
    assert records(resumed) == records(run)
    assert not list(tmp_path.glob("*.tmp"))


def test_ctrl_c_saves_the_state(
    encoder: Encoder, run: RealTimeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = realtime_training._Run._advance

    def interrupted(self: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        if self.phase == "masks" and self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, images, labels)

    monkeypatch.setattr(realtime_training._Run, "_advance", interrupted)
    options = {**TINY, "output": tmp_path}
    with pytest.raises(KeyboardInterrupt) as caught:
        train_real_time(encoder, Squares(), **options)
    assert str(caught.value) == (
        f"stopped after step 4 of the masks phase; to go on: resume=True, output={str(tmp_path)!r}"
    )
    monkeypatch.undo()
    resumed = train_real_time(encoder, Squares(), resume=True, **options)
    assert resumed.checkpoint.read_bytes() == run.checkpoint.read_bytes()
    again = train_real_time(encoder, Squares(), resume=True, **options)  # nothing is left to do
    assert again.checkpoint.read_bytes() == run.checkpoint.read_bytes()


def test_training_leaves_the_classifier_and_the_random_numbers(
    encoder: Encoder, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    encoder.train()
    short = {**TINY, "selector_steps": 2, "mask_steps": 2}
    train_real_time(encoder, Squares(), output=tmp_path, **short)
    assert torch.equal(torch.rand(3), expected)
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    encoder.eval()


def test_a_saliency_model_s_classifier_is_explained(tmp_path: Path) -> None:
    model = build_model("compact", classes=Squares.classes, input_size=SIDE)
    save(model, tmp_path / "model.safetensors")
    short = {**TINY, "selector_steps": 1, "mask_steps": 1}
    runs = [
        train_real_time(given, Squares(), output=tmp_path / name, **short)
        for name, given in (("object", model), ("file", tmp_path))
    ]
    first, second = (made.checkpoint.read_bytes() for made in runs)
    assert first == second


# --- the loss


@pytest.mark.parametrize("real", [True, False])
def test_the_loss_is_the_sum_of_its_terms(encoder: Encoder, real: bool) -> None:
    config = RealTimeConfig(blur_probability=0.0, colour_range=0.0, noise=0.0, image_noise=0.0)
    net = encoder.double().eval()
    images = normalize(torch.from_numpy(Squares(2).images)).double()
    labels = torch.from_numpy(Squares(2).labels)
    masks = torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        made = mask_loss(
            net, images, labels, torch.tensor([real] * 2), masks, config, torch.Generator()
        )
        hidden, shown = net(images * (1 - masks))[0], net(images * masks)[0]
    net.float()

    def margin(logits: torch.Tensor, label: int) -> float:
        row = logits.tolist()
        return row[label] - max(value for k, value in enumerate(row) if k != label)

    destroyer = preserver = area = rough = 0.0
    for n in range(2):
        out, kept = margin(hidden[n], int(labels[n])), margin(shown[n], int(labels[n]))
        destroyer += max(0.0, out + 5 if real else 1 - out) / 2
        preserver += max(0.0, 1 - kept if real else kept + 1) / 2
        m = masks[n, 0].tolist()
        for y in range(SIDE):
            for x in range(SIDE):
                area += (m[y][x] + 0.0005) ** 0.3 / (2 * SIDE**2)
                rough += (m[y][x] - m[y][x - 1]) ** 2 if x else 0
                rough += (m[y][x] - m[y - 1][x]) ** 2 if y else 0
                rough += 0.3 * m[y][x] ** 2 * ((y in (0, SIDE - 1)) + (x in (0, SIDE - 1)))
    expected = destroyer + 8 * area + 0.005 * rough / 4 + 0.3 * preserver
    assert math.isclose(made["destroyer"], destroyer, rel_tol=1e-12)
    assert math.isclose(made["loss"], expected, rel_tol=1e-12)  # 6e-16 measured


def test_half_of_the_replacements_are_blurs_and_the_rest_noisy_colours() -> None:
    config = RealTimeConfig(image_noise=0.0)
    images = torch.full((2000, 3, 8, 8), 2.0)  # its blur is itself
    shown = masked(images, torch.zeros(2000, 1, 8, 8), config, torch.Generator().manual_seed(0))
    blurred = (shown - 2).abs().flatten(1).amax(dim=1) < 1e-5
    assert abs(float(blurred.float().mean()) - 0.5) < 0.056  # five standard errors
    plain = shown[~blurred]
    colour = plain.mean(dim=(2, 3))
    assert colour.abs().max() < 0.66 + 0.22  # uniform in +-0.66, and the noise's mean
    assert abs(float(colour.std()) - 1.32 / math.sqrt(12)) < 0.03
    spread = (plain - colour[:, :, None, None]).std()
    assert abs(float(spread) - 0.22 * math.sqrt(63 / 64)) < 0.005
    kept = masked(images, torch.ones(2000, 1, 8, 8), config, torch.Generator())
    assert torch.equal(kept, images)


# --- the model and its file


def test_resnet50_gives_the_authors_network() -> None:
    with torch.device("meta"):
        model = RealTimeModel(build_encoder("resnet50"))
    assert model.taps == (4, 3, 2, 1)
    assert tuple(model.selector.embedding.weight.shape) == (1000, 2048)
    assert [step.shortcut.in_channels for step in model.steps] == [1024 + 256, 512 + 128, 256 + 64]
    assert [step.shortcut.out_channels for step in model.steps] == [256, 128, 64]
    assert tuple(model.last.weight.shape) == (2, 64, 1, 1)


def test_the_gate_lets_only_what_looks_like_the_class_through(encoder: Encoder) -> None:
    model = RealTimeModel(encoder, width=4, input_size=SIDE).eval()
    taps = model.read(normalize(torch.from_numpy(Squares(2).images)))
    classes = torch.tensor([0, 2])
    embeddings = model.selector.embedding.weight.detach()
    with torch.no_grad():
        masks, present = model(taps, classes)
        closed, _ = model(taps, classes, 1e4)
        nothing, _ = model([torch.zeros_like(taps[0]), *taps[1:]], classes)
    for n, k in enumerate(classes.tolist()):
        places = (taps[0][n] * embeddings[k][:, None, None]).sum(dim=0)
        assert math.isclose(float(present[n]), float(places.mean()), rel_tol=1e-4, abs_tol=1e-6)
    assert masks.shape == (2, 1, SIDE // 4, SIDE // 4)
    assert not torch.equal(closed, masks)
    torch.testing.assert_close(closed, nothing)


def test_a_file_holds_everything(encoder: Encoder, tmp_path: Path) -> None:
    model = RealTimeModel(encoder, width=3, input_size=SIDE).eval()
    path = save_real_time(model, tmp_path / "real_time.safetensors")
    state = torch.get_rng_state()
    for where in (path, tmp_path):
        loaded = load_real_time(where)
        assert (loaded.width, loaded.input_size, loaded.training) == (3, SIDE, False)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    assert torch.equal(torch.get_rng_state(), state)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.coarse = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.coarse(torch.relu(self.fine(images))).mean(dim=(2, 3)))


def test_sides_that_are_no_multiple_of_the_stride() -> None:
    own = TracedEncoder(Own(), input_size=64)
    model = RealTimeModel(own, width=4).eval()
    images = torch.randn(2, 3, 37, 30)
    made = casm_fast.attribute("real_time", own, images, [0, 1], model=model)
    assert made.shape == (2, 1, 37, 30)
    alone = casm_fast.attribute("real_time", own, images[1:], 1, model=model)
    torch.testing.assert_close(made[1:], alone)


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_batch": 0}, "mask_batch: expected a number of at least 1, got 0"),
        ({"noise": -1.0}, "noise: expected a number of at least 0, got -1.0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, got 0.0"),
        ({"mask_fakes": 1.5}, "mask_fakes: expected a share in [0, 1], got 1.5"),
        ({"blur_sigma": -2.0}, "blur_sigma: expected a number of at least 0, got -2.0"),
    ],
)
def test_refused_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RealTimeConfig(**fields)
    assert str(caught.value) == message


def test_refused_classifiers(tmp_path: Path) -> None:
    def refused(kind: type[Exception], classifier: Any, data: Any = None) -> str:
        with pytest.raises(kind) as caught:
            train_real_time(classifier, data or Squares(), output=tmp_path / "new", **TINY)
        return str(caught.value)

    assert refused(TypeError, Own()) == (
        "classifier: expected an encoder from build_encoder, a SaliencyModel or its file, got Own"
    )
    assert refused(ValueError, TracedEncoder(Own(), input_size=64)) == (
        "classifier: expected an encoder from build_encoder, which the model's file can name, "
        "got a Own of the caller's own"
    )
    assert refused(ValueError, build_encoder("compact", classes=5)) == (
        "classifier: expected one of the 3 classes of squares, got one of 5"
    )
    assert not (tmp_path / "new").exists()


def test_refused_folders(encoder: Encoder, run: RealTimeResult, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        train_real_time(encoder, Squares(), output=run.folder, **TINY)
    assert str(caught.value) == (
        f"output: expected a new folder, got {run.folder}, which holds a run; "
        "pass resume=True to continue that run, or choose another folder"
    )
    changed = {**TINY, "area_weight": 7.0}
    with pytest.raises(ValueError) as caught:
        train_real_time(encoder, Squares(), output=run.folder, resume=True, **changed)
    assert "(area_weight was 8.0, now 7.0)" in str(caught.value)
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(ValueError) as caught:
        train_real_time(encoder, Squares(), output=tmp_path, resume=True, **TINY)
    assert str(caught.value) == (
        f"{tmp_path / 'state.pt'}: expected a state written by train_real_time, "
        "got an unreadable file"
    )


def test_a_loss_that_is_not_finite_stops_the_run(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError) as caught:
        train_real_time(
            encoder, Squares(), output=tmp_path, **{**TINY, "image_noise": math.inf, "noise": 0.0}
        )
    assert str(caught.value) == (
        "the loss is not a finite number by step 4 of the masks phase: "
        "try a lower learning_rate; the state saved last is from before"
    )


def test_refused_models(encoder: Encoder, tmp_path: Path) -> None:
    images = torch.zeros(1, 3, SIDE, SIDE)

    def refused(kind: type[Exception], **options: Any) -> str:
        with pytest.raises(kind) as caught:
            casm_fast.attribute("real_time", encoder, images, 0, **options)
        return str(caught.value)

    assert refused(ValueError) == (
        "real_time: expected model= a RealTimeModel or its file, got NoneType; "
        "train one by train_real_time"
    )
    missing = tmp_path / "none.safetensors"
    assert refused(FileNotFoundError, model=missing) == (
        f"load_real_time: expected a model of train_real_time, got {missing}, which does not exist"
    )
    other = save(build_model("compact", classes=3), tmp_path / "other.safetensors")
    assert refused(ValueError, model=other) == (
        "load_real_time: expected a model of train_real_time, got another or damaged file in "
        f"{other}"
    )
    few = RealTimeModel(build_encoder("compact", classes=2), width=3)
    with pytest.raises(ValueError) as caught:
        casm_fast.attribute("real_time", encoder, images, 2, model=few)
    assert str(caught.value) == (
        "real_time: expected targets in 0 ... 1, the classes of the model, got 2"
    )
    with pytest.raises(ValueError) as caught:
        save_real_time(few, tmp_path / "model.pt")
    assert str(caught.value) == (
        f"save_real_time: expected path to end on .safetensors, got {tmp_path / 'model.pt'}"
    )
