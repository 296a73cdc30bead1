"""Sanity checks: SciPy and scikit-image for the measures, hand-made networks for the rest."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refuses
from scipy import stats
from skimage import feature, metrics
from torch import nn
from torchvision.models import VisionTransformer

import casm_fast
from casm_fast.evaluation import (
    data_randomisation,
    join,
    parameter_randomisation,
    similarity,
)
from casm_fast.evaluation.measures import ranks
from casm_fast.evaluation.sanity import layers_from_top, randomise

GRADIENT = functools.partial(casm_fast.attribute, "gradient")
FAST = ("spearman", "ssim")


class Branching(nn.Module):
    """Registered in another order than it runs; the auxiliary head does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.auxiliary = nn.Linear(8, 3)
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 5, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 8, 3)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images).tanh().mean(dim=(2, 3)))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Branching()


def inputs(n: int = 3, side: int = 20) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None)
def test_ranks_are_those_of_scipy(values):
    ours = ranks(torch.tensor([values, values[::-1]], dtype=torch.float64))
    assert (ours[0].numpy() + 1).tolist() == stats.rankdata(values).tolist()
    assert (ours[1].numpy() + 1).tolist() == stats.rankdata(values[::-1]).tolist()


def test_measures_agree_with_scipy_and_scikit_image():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 50, 66))
    b = np.round(a + rng.normal(size=a.shape) * np.array([0.1, 0.5, 1, 3])[:, None, None], 1)
    found = similarity(a, torch.from_numpy(b)[:, None])
    for k in range(4):
        x, y = a[k], b[k]
        # Measured worst difference of all four over 40 pairs: 2.2e-16.
        assert found["spearman"][k] == pytest.approx(
            stats.spearmanr(x.ravel(), y.ravel()).statistic, abs=1e-10
        )
        assert found["spearman_abs"][k] == pytest.approx(
            stats.spearmanr(abs(x).ravel(), abs(y).ravel()).statistic, abs=1e-10
        )
        x, y = x / abs(x).max(), y / abs(y).max()
        assert found["ssim"][k] == pytest.approx(
            metrics.structural_similarity(x, y, win_size=5, data_range=2), abs=1e-10
        )
        histograms = [feature.hog(one, pixels_per_cell=(16, 16)) for one in (x, y)]
        assert found["hog"][k] == pytest.approx(stats.pearsonr(*histograms).statistic, abs=1e-10)
    assert all(np.diff(values).max() < 0 for values in found.values())


def test_equal_maps_score_one_and_constant_ones_nothing():
    a = np.random.default_rng(0).normal(size=(2, 48, 48))
    same = similarity(a, a)
    assert all(values == pytest.approx([1, 1]) for values in same.values())
    scaled = similarity(a, 7 * a)
    assert all(values == pytest.approx([1, 1]) for values in scaled.values())
    a[1] = 0.25
    found = similarity(a, a[::-1].copy())
    assert np.isnan(found["spearman"]).all()
    assert np.isnan(found["hog"]).all()
    assert np.isfinite(found["ssim"]).all()


def test_layers_come_in_the_order_in_which_they_run():
    assert layers_from_top(net(), inputs()) == ["head", "body.3", "body.1", "body.0"]
    with refuses(ValueError, "classifier: expected a module with parameters that runs, got none"):
        layers_from_top(nn.Flatten(), inputs())


def test_transformers_have_a_token_of_their_own():
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=3).eval()
    names = layers_from_top(model, inputs(1, 32))
    assert names[0] == "heads.head"
    assert names[-2:] == ["conv_proj", ""]
    assert names.index("encoder") > names.index("encoder.layers.encoder_layer_0.ln_1")
    before = copy.deepcopy(model.state_dict())
    assert randomise(model, "encoder", without=names) == ["encoder.pos_embedding"]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"encoder.pos_embedding"}
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert randomise(model, attention, without=names) == []
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert f"{attention}.in_proj_weight" in changed
    assert f"{attention}.out_proj.weight" in changed
    assert len(changed) == 4  # and the bias of out_proj, and the token from above


@pytest.mark.parametrize("order", ["cascading", "independent"])
def test_agrees_with_randomising_by_hand(order):
    classifier, images = net(), inputs()
    before = copy.deepcopy(classifier.state_dict())
    random_state = torch.random.get_rng_state()
    check = parameter_randomisation(
        classifier, images, [0, 1, 2], GRADIENT, order=order, measures=FAST, seed=4
    )
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())
    assert classifier.training
    assert check.steps == ("head", "body.3", "body.1", "body.0")
    assert check.values.shape == (4, 2, 3)
    trained = GRADIENT(classifier, images, [0, 1, 2])
    current = copy.deepcopy(classifier)
    for step, name in enumerate(check.steps):
        if order == "independent":
            current = copy.deepcopy(classifier)
        assert randomise(current, name, seed=4) == []
        other = GRADIENT(current, images, [0, 1, 2])
        for b in range(3):
            expected = stats.spearmanr(trained[b].flatten(), other[b].flatten()).statistic
            assert check.values[step, 0, b] == pytest.approx(expected, abs=1e-10)
    assert np.isfinite(check.values).all()


def test_reset_and_permute():
    classifier = net()
    original = copy.deepcopy(classifier.state_dict())
    permuted = randomise(classifier, "body.0", "permute", 0)
    assert permuted == ["body.0.weight", "body.0.bias"]
    weight = classifier.state_dict()["body.0.weight"]
    assert not torch.equal(weight, original["body.0.weight"])
    assert torch.equal(weight.flatten().sort()[0], original["body.0.weight"].flatten().sort()[0])
    again = net()
    randomise(again, "body.0", "permute", 0)
    assert torch.equal(again.state_dict()["body.0.weight"], weight)
    randomise(again, "head", "reset", 0)
    randomise(again, "auxiliary", "reset", 0)
    assert not torch.equal(again.head.weight, again.auxiliary.weight)
    assert torch.equal(again.body[3].weight, original["body.3.weight"])


def test_steps_may_be_groups():
    check = parameter_randomisation(net(), inputs(), None, GRADIENT, depth=1, measures=("ssim",))
    assert check.steps == ("head", "body")
    named = parameter_randomisation(
        net(), inputs(), None, GRADIENT, layers=["head", "body"], measures=("ssim",)
    )
    assert named.steps == ("head", "body")
    assert "predicted classes of the trained classifier" in named.convention


def test_maps_that_ignore_the_classifier_stay_the_same():
    def edges(_: nn.Module, images: torch.Tensor, __: Any) -> torch.Tensor:
        return torch.nn.functional.pad(images.mean(1, keepdim=True).diff(dim=3).abs(), (0, 1))

    check = parameter_randomisation(net(), inputs(), None, edges, measures=FAST)
    assert check.values == pytest.approx(np.ones((4, 2, 3)))
    check = data_randomisation(net(0), net(1), inputs(), None, edges, measures=FAST)
    assert check.values == pytest.approx(np.ones((1, 2, 3)))
    assert check.interval("random labels", "ssim").show(".2f") == "1.00 (1.00..1.00)"


def test_other_networks_give_other_maps():
    check = data_randomisation(net(0), net(1), inputs(), [0, 1, 2], GRADIENT, measures=FAST)
    assert (check.values < 0.9).all()
    same = data_randomisation(net(0), net(0), inputs(), [0, 1, 2], GRADIENT, measures=FAST)
    assert same.values == pytest.approx(np.ones((1, 2, 3)))


def test_batches_join():
    told = {"maps": GRADIENT, "measures": FAST}
    whole = parameter_randomisation(net(), inputs(), [0, 1, 2], **told)
    parts = join(parameter_randomisation(net(), inputs()[k : k + 1], [k], **told) for k in range(3))
    assert parts.values == pytest.approx(whole.values, abs=1e-6)


def test_prints_a_table_with_its_convention():
    check = parameter_randomisation(net(), inputs(), None, GRADIENT, measures=FAST)
    lines = str(check).splitlines()
    assert lines[2].split() == ["rank", "correlation", "SSIM"]
    assert lines[3].split()[0] == "head"
    assert "cascading randomisation from the output down, parameters drawn anew by " in (
        " ".join(str(check).split()) + " "
    )

    def blind(_: nn.Module, images: torch.Tensor, __: Any) -> torch.Tensor:
        return torch.zeros_like(images[:, :1])

    text = str(parameter_randomisation(net(), inputs(), 0, blind, measures=("spearman",)))
    assert "undefined" in text
    assert "(12 values undefined: a map is constant)" in text


def test_bad_input_is_one_sentence(monkeypatch):
    classifier, images = net(), inputs()
    with refuses(ValueError, "order: expected cascading or independent, got 'random'"):
        parameter_randomisation(classifier, images, 0, GRADIENT, order="random")
    with refuses(ValueError, "how: expected reset or permute, got 'zero'"):
        parameter_randomisation(classifier, images, 0, GRADIENT, how="zero")
    with refuses(TypeError, "classifier: expected a module to randomise, got function"):
        parameter_randomisation(refuses, images, 0, GRADIENT)
    with refuses(ValueError, "depth: expected at least 1, got 0"):
        parameter_randomisation(classifier, images, 0, GRADIENT, depth=0)
    with pytest.raises(ValueError, match="layer: expected the name of a module, got 'tail'"):
        parameter_randomisation(classifier, images, 0, GRADIENT, layers=["tail"])
    with refuses(
        ValueError,
        "measures: expected names out of spearman, spearman_abs, ssim, hog, got 'mse'",
    ):
        similarity(images[:, 0], images[:, 0], ("mse",))
    with refuses(
        ValueError, "maps: expected two batches of one shape, got [3, 20, 20] and [2, 20, 20]"
    ):
        similarity(images[:, 0], images[:2, 0])
    with refuses(ValueError, "ssim: expected maps of at least 5 x 5, got [3, 20]"):
        similarity(images[:, 0, :3], images[:, 0, :3], ("ssim",))
    with refuses(
        ValueError,
        "hog: expected maps of at least 48 x 48, got [20, 20]; leave hog out of the measures",
    ):
        similarity(images[:, 0], images[:, 0])
    check = parameter_randomisation(classifier, images, 0, GRADIENT, measures=("ssim",))
    with refuses(ValueError, "step: expected one of head, body.3, body.1, body.0, got 'tail'"):
        check.interval("tail", "ssim")
    monkeypatch.setitem(sys.modules, "skimage", None)
    with refuses(
        ImportError,
        "hog: expected scikit-image, which makes the histograms, but it is not installed: "
        "pip install 'casm_fast[eval]'",
    ):
        similarity(images[:, 0], images[:, 0], ("hog",))
