"""Pictures of masks: what is where, and files that can be opened."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import casm_fast
from casm_fast.perturbation import PerturbConfig, grid, overlay, panels


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


IMAGES = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(1))


def test_overlays_mix_image_and_colour() -> None:
    saliency = torch.zeros(2, 1, 24, 32)
    saliency[0, 0, 3, 4] = 1.0
    drawn = overlay(IMAGES.clamp(-1, 1), saliency, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert drawn.shape == (2, 24, 32, 3)
    assert drawn.dtype == np.uint8
    for y, x, value in ((3, 4, 1.0), (9, 9, 0.0)):
        image = (IMAGES[0, :, y, x].clamp(-1, 1).double().numpy() * 0.5) + 0.5
        colour = np.array(matplotlib.colormaps["jet"](value)[:3])
        expected = 255 * (0.5 * image + 0.5 * colour)
        assert np.abs(drawn[0, y, x] - expected).max() <= 0.5 + 1e-9
    assert drawn[0, 3, 4, 0] > drawn[0, 9, 9, 0]  # red is salient


def test_figures_are_written(net: nn.Module, tmp_path: Path) -> None:
    made = casm_fast.perturb(net, IMAGES, [1, 2], steps=3)
    wide = grid(
        made, IMAGES, tmp_path / "a" / "grid.png", others={"random": torch.rand(2, 1, 24, 32)}
    )
    twelve = panels(made, IMAGES, tmp_path / "panels.png", index=1)
    for path in (wide, twelve):
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 10
    with Image.open(wide) as narrow, Image.open(grid(made, IMAGES, tmp_path / "b.png")) as small:
        assert narrow.width > small.width  # one column more


def test_figures_of_layers_and_bad_input(net: nn.Module, tmp_path: Path) -> None:
    inner = casm_fast.perturb(net, IMAGES, 1, PerturbConfig.preset("layers", layer="0"), steps=2)
    assert grid(inner, IMAGES, tmp_path / "layer.png").exists()
    for call, text in (
        (
            lambda: panels(inner, IMAGES, tmp_path / "x.png"),
            "panels: expected masks of images, got masks of the layer '0'; use grid",
        ),
        (
            lambda: grid(inner, IMAGES[:1], tmp_path / "x.png"),
            "images: expected the masks' images [2, 3, 24, 32], got [1, 3, 24, 32]",
        ),
        (
            lambda: grid(inner, IMAGES, tmp_path / "x.png", others={"a": torch.rand(2, 1, 4, 4)}),
            "others: expected maps [2, 1, 24, 32], got [2, 1, 4, 4] from 'a'",
        ),
        (
            lambda: grid(inner, IMAGES, tmp_path / "x.png", titles=["one"]),
            "titles: expected 2, one per image, got 1",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == text
    assert not (tmp_path / "x.png").exists()
