"""Many classifiers against a loop over images, and classifiers whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refusals import refuses
from torch import nn

from casm_fast.evaluation import join, many_classifiers
from casm_fast.evaluation.masked_accuracy import marked


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    features = (nn.Conv2d(3, 6, 5, stride=2), nn.BatchNorm2d(6), nn.Tanh(), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(24, 3)).train()


def inputs(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, 16, 12, generator=generator)
    return images, torch.rand(n, 1, 8, 6, generator=generator)


def test_agrees_with_a_loop_over_images():
    networks = {"a": net(0), "b": net(1)}
    images, maps = inputs()
    labels = np.arange(8) % 3
    filled = torch.roll(images, 1, 0)
    found = many_classifiers(networks, images, maps, labels, inpainted=filled, batch_size=3)
    assert found.forms == ("whole", "masked-in", "masked-out", "inpainted")
    for row, network in enumerate(networks.values()):
        assert network.training
        network.eval()
        for b in range(8):
            m = maps[b, 0].double().numpy()
            keep = torch.from_numpy(np.kron(m >= m.mean(), np.ones((2, 2))) > 0)
            black = (0 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
            views = {
                "whole": images[b],
                "masked-in": torch.where(keep, images[b], black[:, None, None]),
                "masked-out": torch.where(keep, black[:, None, None], images[b]),
                "inpainted": filled[b],
            }
            for column, form in enumerate(found.forms):
                with torch.no_grad():
                    guess = int(network(views[form][None]).argmax())
                assert found.right[row, column, b] == (guess == labels[b])
        network.train()


def test_a_map_of_the_object_keeps_and_removes_it():
    def classifier(images: torch.Tensor) -> torch.Tensor:
        total = images.sum(dim=(1, 2, 3))
        return torch.stack([total, torch.ones_like(total)], dim=1)

    images = torch.zeros(2, 3, 8, 8)
    images[:, :, 2:4, 2:4] = 1
    good = images[:, :1]
    found = many_classifiers({"one": classifier}, images, good, [0, 0], removed="mean")
    assert found.right[0].all(axis=1).tolist() == [True, True, False]
    bad = many_classifiers({"one": classifier}, images, 1 - good, [0, 0], removed="mean")
    assert bad.right[0].all(axis=1).tolist() == [True, False, True]


def test_constant_maps_mark_everything():
    for value in (0.1, 0.5, 0.7):
        assert marked(np.full((1, 3, 3), value), (6, 6)).all()
    assert not marked(np.full((1, 3, 3), 0.1), (6, 6), alpha=1.1).any()


def test_batches_join_and_table_prints():
    networks = {"a": net(0), "b": net(1)}
    images, maps = inputs()
    labels = np.arange(8) % 3
    whole = many_classifiers(networks, images, maps, labels)
    parts = join(
        many_classifiers(networks, images[k : k + 5], maps[k : k + 5], labels[k : k + 5])
        for k in (0, 5)
    )
    assert parts.right.tolist() == whole.right.tolist()
    mean = whole.interval("masked-in")
    assert mean.value == pytest.approx(whole.right[:, 1].mean())
    text = str(whole)
    assert mean.show(scale=100) in text
    assert "removed pixels are black" in text


def test_bad_input_is_one_sentence():
    images, maps = inputs(2)
    networks = {"a": net(0)}
    with refuses(ValueError, "classifiers: expected at least one, got none"):
        many_classifiers({}, images, maps, [0, 1])
    with refuses(ValueError, "removed: expected black or mean, got 'white'"):
        many_classifiers(networks, images, maps, [0, 1], removed="white")
    with refuses(ValueError, "labels: expected [2], got [1]"):
        many_classifiers(networks, images, maps, [0])
    with refuses(ValueError, "inpainted: expected [2, 3, 16, 12], got [1, 3, 16, 12]"):
        many_classifiers(networks, images, maps, [0, 1], inpainted=images[:1])
    with refuses(ValueError, "maps: expected sides that divide 16 x 12, got 8 x 5"):
        many_classifiers(networks, images, maps[..., :5], [0, 1])
    found = many_classifiers(networks, images, maps, [0, 1])
    with refuses(ValueError, "form: expected one of whole, masked-in, masked-out, got 'inpainted'"):
        found.interval("inpainted")
    with refuses(ValueError, "classifier: expected one of a, got 'b'"):
        found.interval("whole", "b")
