"""The objectives against scalar loops, the lambda presets, and what a configuration refuses."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from casm_fast.training.config import EMBEDDED, PAPER, Strategy, TrainConfig, lambda_preset
from casm_fast.training.objective import classification_loss, mask_loss, prediction_entropy


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
    loss = classification_loss(uniform, torch.tensor([[0.0, 0, 0, 0, 50]]), torch.tensor([4]))
    assert float(loss) == pytest.approx(0.5 * math.log(5), abs=1e-6)


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(4, 10).to(torch.bfloat16)
    labels = torch.arange(4)
    loss = classification_loss(logits, logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, classification_loss(logits.float(), logits.float(), labels))


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
            {"epoch_fraction": 0},
            "epoch_fraction: expected a share greater than 0 and at most 1, got 0",
        ),
        ({"classifier_lr": -1.0}, "classifier_lr: expected a number >= 0, got -1.0"),
        ({"lambda_r": -1}, "lambda_r: expected a number >= 0, 'preset' or 'auto', got -1"),
        ({"lambda_r": "high"}, "lambda_r: expected a number >= 0, 'preset' or 'auto', got 'high'"),
        ({"lambda_r": math.inf}, "lambda_r: expected a number >= 0, 'preset' or 'auto', got inf"),
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
    # Only `output` and tap0_projection ("as the network needs") may stay open.
    assert [name for name, value in described.items() if value is None] == ["tap0_projection"]
