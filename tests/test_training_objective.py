"""The objectives against scalar loops, the lambda presets, and what a configuration refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from casm_fast.training.config import EMBEDDED, PAPER, Strategy, TrainConfig, lambda_preset
from casm_fast.training.objective import (
    classification_loss,
    mask_loss,
    masked_in_loss,
    prediction_entropy,
    smoothness,
)


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def scalar_mask_loss(
    rows: list[list[float]],
    labels: list[int],
    correct: list[bool],
    saliency: list[list[float]],
    lambda_r: float,
    score: str,
) -> float:
    """Eq. 7 written image by image."""
    total = 0.0
    for row, label, right, pixels in zip(rows, labels, correct, saliency, strict=True):
        p = softmax(row)
        if score == "entropy":
            total += -sum(-q * math.log(q) for q in p) if right else 0.0
        else:
            total += math.log(p[label])
        if right and row.index(max(row)) != label:
            total += lambda_r * sum(pixels) / len(pixels)
    return total / len(rows)


@pytest.mark.parametrize("score", ["entropy", "classification"])
def test_mask_loss_is_the_negative_score_of_equation_7(score: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    labels[0] = logits[0].argmax()  # at least one image that is not confused
    correct = torch.tensor([True, True, False, True, False, True, True])
    saliency = torch.rand(7, 1, 3, 5, generator=generator, dtype=torch.float64)
    confused = correct & (logits.argmax(1) != labels)
    assert confused.any()
    assert (correct & ~confused).any()
    expected = scalar_mask_loss(
        logits.tolist(), labels.tolist(), correct.tolist(), saliency.flatten(1).tolist(), 2.5, score
    )
    assert float(mask_loss(logits, labels, correct, saliency, 2.5, score)) == pytest.approx(
        expected, abs=1e-12
    )


def test_regulariser_pulls_only_where_the_judge_is_confused() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    labels = torch.tensor([0, 1, 1])  # right, confused, wrong on the clean image already
    correct = torch.tensor([True, True, False])
    saliency = torch.full((3, 1, 2, 2), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        mask_loss(logits, labels, correct, saliency, 6.0, "entropy"), saliency
    )
    # lambda / batch / pixels = 6 / 3 / 4
    assert gradient.flatten(1).tolist() == [[0.0] * 4, [0.5] * 4, [0.0] * 4]


def test_entropy_and_classification_loss_by_hand() -> None:
    uniform = torch.zeros(1, 5)
    assert float(prediction_entropy(uniform)) == pytest.approx(math.log(5))
    assert float(prediction_entropy(torch.tensor([[1e4, 0.0, 0.0]]))) == 0.0
    certain = torch.tensor([[0.0, 0, 0, 0, 50]])
    loss = classification_loss([uniform, certain], torch.tensor([4]))
    assert float(loss) == pytest.approx(math.log(5) / 2, abs=1e-6)
    loss = classification_loss([uniform, certain, certain], torch.tensor([4]))
    assert float(loss) == pytest.approx(math.log(5) / 3, abs=1e-6)


def test_masked_in_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    labels[0] = logits[0].argmax()
    saliency = torch.rand(6, 1, 3, 5, generator=generator, dtype=torch.float64)
    expected = 0.0
    for row, label, pixels in zip(logits.tolist(), labels.tolist(), saliency, strict=True):
        expected -= math.log(softmax(row)[label])
        if row.index(max(row)) == label:
            expected += 1.7 * float(pixels.sum()) / 15
    assert 0 < int((logits.argmax(1) == labels).sum()) < 6
    assert float(masked_in_loss(logits, labels, saliency, 1.7)) == pytest.approx(
        expected / 6, abs=1e-12
    )


@pytest.mark.parametrize("factor", [1, 4])
def test_smoothness_is_the_variation_of_the_enlarged_mask(factor: int) -> None:
    """The successor's penalty, pixel by pixel on the mask as large as the image."""
    generator = torch.Generator().manual_seed(5)
    saliency = torch.rand(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    large = F.interpolate(saliency, scale_factor=factor, mode="nearest")
    height, width = large.shape[-2:]
    expected = 0.0
    for mask in large[:, 0].tolist():
        for y in range(height):
            for x in range(width):
                if y + 1 < height:
                    expected += (mask[y + 1][x] - mask[y][x]) ** 2
                if x + 1 < width:
                    expected += (mask[y][x + 1] - mask[y][x]) ** 2
        expected += 0.3 * sum(value**2 for value in (*mask[0], *mask[-1]))
        expected += 0.3 * sum(row[0] ** 2 + row[-1] ** 2 for row in mask)
    assert float(smoothness(saliency, height, width)) == pytest.approx(expected / 2, rel=1e-12)
    saliency.requires_grad_()
    assert torch.autograd.gradcheck(lambda mask: smoothness(mask, height, width), (saliency,))


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(4, 10).to(torch.bfloat16)
    labels = torch.arange(4)
    loss = classification_loss([logits, logits], labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, classification_loss([logits.float()] * 2, labels))


@pytest.mark.parametrize(
    ("strategy", "score", "authors"),
    [
        ("F", "entropy", 2.5),
        ("L", "entropy", 14),
        ("FL", "entropy", 7.5),
        ("L100", "entropy", 10),
        ("L1000", "entropy", 10),
        ("L7", "entropy", 10),
        ("F", "classification", 9),
        ("L", "classification", 18),
        ("FL", "classification", 11),
        ("L100", "classification", 17),
    ],
)
def test_lambda_presets_are_the_authors_for_1000_classes(
    strategy: str, score: Any, authors: float
) -> None:
    assert lambda_preset(strategy, score, 1000) == pytest.approx(authors)
    assert lambda_preset(strategy, score, 8) == pytest.approx(
        authors * math.log(8) / math.log(1000)
    )


@pytest.mark.parametrize(("strategy", "authors"), [("F", 10), ("L", 15), ("L100", 15)])
def test_lambda_presets_of_the_successor(strategy: str, authors: float) -> None:
    for score in ("entropy", "classification"):
        assert lambda_preset(strategy, score, 1000, "masked_in_out") == pytest.approx(authors)
    assert TrainConfig().lambda_in_value(1000) == pytest.approx(1.0)
    assert TrainConfig().lambda_in_value(8) == pytest.approx(math.log(8) / math.log(1000))
    assert TrainConfig(lambda_in=3).lambda_in_value(8) == 3.0


def test_the_successor_reads_the_coarsest_two_taps() -> None:
    assert TrainConfig().tap_indices() is None
    assert TrainConfig(objective="masked_in_out").tap_indices() == (-2, -1)
    assert TrainConfig(objective="masked_in_out", taps=(0, 4)).tap_indices() == (0, 4)


def test_strategies_are_read() -> None:
    assert Strategy.parse("F") == Strategy("F", fixed=True)
    assert Strategy.parse("L") == Strategy("L")
    assert Strategy.parse("FL") == Strategy("FL", keeps_first=True)
    assert Strategy.parse("L1000") == Strategy("L1000", interval=1000)


def test_recipe_follows_the_data_and_yields_to_what_is_set() -> None:
    assert TrainConfig().recipe() == EMBEDDED
    assert TrainConfig(data="synthetic:seed=3").recipe() == EMBEDDED
    assert TrainConfig(data="imagenet:/data").recipe() == PAPER
    recipe = TrainConfig(data="imagenet:/data", epochs=3, strategy="F").recipe()
    assert (recipe.epochs, recipe.strategy, recipe.batch_size) == (3, "F", PAPER.batch_size)
    assert TrainConfig(epochs=3).resolved().batch_size == EMBEDDED.batch_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": ""}, "data: expected a data set such as 'synthetic' or 'imagenet:DIR', got ''"),
        (
            {"strategy": "L0"},
            "strategy: expected F, L, FL or L followed by a number of steps such as L100, got 'L0'",
        ),
        ({"score": "area"}, "score: expected one of entropy, classification, got 'area'"),
        (
            {"classifier_update": "both"},
            "classifier_update: expected one of joint, alternating, got 'both'",
        ),
        ({"infill": "red"}, "infill: expected one of mean, colour, blur, noise, got 'red'"),
        (
            {"history_probability": 1.5},
            "history_probability: expected a probability from 0 to 1, got 1.5",
        ),
        (
            {"history_probability": math.nan},
            "history_probability: expected a probability from 0 to 1, got nan",
        ),
        ({"history_size": 0}, "history_size: expected a whole number >= 1, got 0"),
        ({"epochs": -1}, "epochs: expected a whole number >= 0, got -1"),
        ({"epochs": 2.5}, "epochs: expected a whole number >= 0, got 2.5"),
        ({"epochs": True}, "epochs: expected a whole number >= 0, got True"),
        ({"seed": None}, "seed: expected a whole number >= 0, got None"),
        (
            {"batch_size": 1},
            "batch_size: expected a whole number >= 2 (batch normalisation needs two images), "
            "got 1",
        ),
        (
            {"batch_size": 7, "accumulate": 4},
            "accumulate: expected micro-batches of at least 2 images (batch normalisation needs "
            "two), got 4 of a batch of 7",
        ),
        ({"decoder_ema": 1.0}, "decoder_ema: expected a decay from 0 (off) to below 1, got 1.0"),
        (
            {"epoch_fraction": 0},
            "epoch_fraction: expected a share greater than 0 and at most 1, got 0",
        ),
        ({"classifier_lr": -1.0}, "classifier_lr: expected a number >= 0, got -1.0"),
        ({"lambda_r": -1}, "lambda_r: expected a number >= 0, 'preset' or 'auto', got -1"),
        ({"lambda_r": "high"}, "lambda_r: expected a number >= 0, 'preset' or 'auto', got 'high'"),
        ({"lambda_r": math.inf}, "lambda_r: expected a number >= 0, 'preset' or 'auto', got inf"),
        ({"lambda_in": -1}, "lambda_in: expected a number >= 0 or 'preset', got -1"),
        ({"lambda_in": "auto"}, "lambda_in: expected a number >= 0 or 'preset', got 'auto'"),
        ({"lambda_tv": -0.5}, "lambda_tv: expected a number >= 0, got -0.5"),
        (
            {"objective": "both"},
            "objective: expected one of masked_out, masked_in_out, got 'both'",
        ),
        (
            {"infill_colour": (0.0, 2.0, 0.0)},
            "infill_colour: expected three numbers from 0 to 1, got (0.0, 2.0, 0.0)",
        ),
        (
            {"resume": True},
            "resume: expected `output` to name the folder of the run to continue, got output=None",
        ),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainConfig(**fields)


def test_description_is_json_and_complete() -> None:
    import json

    described = TrainConfig(output=Path("runs/x")).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["output"] == "runs/x"
    # Only `output` and what the network decides may stay open.
    unset = [name for name, value in described.items() if value is None]
    assert unset == ["taps", "tap0_projection"]
