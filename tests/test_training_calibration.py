"""lambda_R = "auto": the controller against its formula and a simulated decoder; whole runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from casm_fast.data.synthetic import generate
from casm_fast.training import TrainConfig, train
from casm_fast.training.calibration import INTEGRAL, PROPORTIONAL, RECENT, Calibration, split


def calibration(start: float, target: float = 0.5, classes: int = 8) -> Calibration:
    return Calibration(torch.tensor(start, dtype=torch.float64), target, classes)


def test_steering_is_the_proportional_integral_formula() -> None:
    controller = calibration(3.0, target=0.4, classes=5)
    integral, setpoint, recent = 3.0, 0.4, 0.1
    for step, area in enumerate((0.1, 0.2, 0.55, 0.41)):
        controller.steer(torch.tensor(area, dtype=torch.float64))
        recent += RECENT * (area - recent)
        integral += INTEGRAL * math.log(5) * (area - setpoint)
        expected = integral + PROPORTIONAL * math.log(5) * (area - setpoint)
        assert float(controller.lambda_r) == pytest.approx(expected, abs=1e-12)
        if step == 1:  # held-out masks are larger than those of the batches: aim lower
            controller.correct(0.45)
            setpoint = 0.4 - (0.45 - recent)


@pytest.mark.parametrize("gap", [-0.1, 0.0, 0.08])
@pytest.mark.parametrize("floor", [0.3, 0.7])
def test_held_out_masks_reach_the_target_of_a_sluggish_decoder(gap: float, floor: float) -> None:
    """A decoder whose masks drift to a size that depends on lambda_R, `floor` at 0, and whose
    held-out masks differ from those of the batches by `gap`: 0.3 needs a negative lambda_R."""
    controller, area = calibration(3.0), 0.1
    for _ in range(12):
        for _ in range(60):
            size = 1 / (1 + math.exp(2.0 * float(controller.lambda_r)) * (1 / floor - 1))
            area += 0.04 * (size - area)
            controller.steer(torch.tensor(area, dtype=torch.float64))
        controller.correct(area + gap)
    assert area + gap == pytest.approx(0.5, abs=0.01)
    assert (float(controller.lambda_r) < 0) == (floor < 0.5 - gap)


def test_the_state_is_all_that_the_next_steps_depend_on() -> None:
    first, second = calibration(3.0), calibration(1.0)
    for area in (0.2, 0.7):
        first.steer(torch.tensor(area, dtype=torch.float64))
    first.correct(0.3)
    second.restore(first.state())
    assert float(second.lambda_r) == float(first.lambda_r)
    for controller in (first, second):
        controller.steer(torch.tensor(0.6, dtype=torch.float64))
    assert float(second.lambda_r) == float(first.lambda_r)


@pytest.mark.parametrize(("images", "apart"), [(32, 16), (1000, 50), (1_281_167, 1024)])
def test_a_part_is_held_out_by_the_seed(images: int, apart: int) -> None:
    kept, held_out = split(images, seed=3)
    assert len(held_out) == apart
    assert np.array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(images))
    assert np.array_equal(held_out, split(images, seed=3)[1])
    assert not np.array_equal(held_out, split(images, seed=4)[1])


def test_too_few_images_are_refused() -> None:
    message = (
        'lambda_r="auto": expected at least 32 training images, of which 16 are held out, got 31; '
        'pass a number or "preset"'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        split(31, seed=0)


def test_a_run_is_logged_stored_and_trains_on_no_held_out_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = set()
    whole = generate(96, size=32, classes=4, workers=1)

    class Watched:
        """Files, so to speak: images are read one by one."""

        name, classes, has_boxes = whole.name, whole.classes, False
        label, boxes = whole.label, whole.boxes

        def __len__(self) -> int:
            return len(whole)

        def image_id(self, index: int) -> str:
            return whole.image_id(index)

        def image(self, index: int) -> np.ndarray:
            seen.add(index)
            return whole.image(index)

    config = TrainConfig(
        data="synthetic:images=96,size=32,classes=4",
        output=tmp_path / "run",
        lambda_r="auto",
        strategy="L",
        input_size=32,
        batch_size=16,
        pretrain_epochs=1,
        epochs=0,
        device="cpu",
        progress=False,
        tensorboard=False,
    )
    train(config, sources=(Watched(), None))
    kept, _ = split(96, config.seed)
    assert seen == set(kept.tolist())
    run = train(config, sources=(Watched(), None), epochs=2, resume=True)
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    measured = [row for row in rows if row["split"] == "held_out"]
    assert [row["epoch"] for row in measured] == [1, 2]
    assert run.scores["held_out_saliency"] == measured[-1]["mean_saliency"]
    assert run.scores["lambda_r"] == measured[-1]["lambda_r"]
    assert seen == set(range(96))  # now measured, too
    assert "16 held-out images instead of 0.500 +- 0.02: train for more epochs" in caplog.text
