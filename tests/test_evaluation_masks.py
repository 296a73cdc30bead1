"""Statistics of maps against a loop over pixels and SciPy's entropy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from refusals import refuses

from casm_fast.evaluation import join, mask_statistics


def test_agrees_with_a_loop_over_pixels():
    maps = np.random.default_rng(0).random((3, 4, 6))
    maps[0, 0, 0], maps[1, 1, 1] = 0, 1
    found = mask_statistics(torch.from_numpy(maps)[:, None], (8, 18))
    for k, one in enumerate(np.kron(maps, np.ones((1, 2, 3)))):
        tv = entropy = full = 0.0
        for y in range(8):
            for x in range(18):
                m = one[y, x]
                tv += (one[y + 1, x] - m) ** 2 if y < 7 else 0
                tv += (one[y, x + 1] - m) ** 2 if x < 17 else 0
                entropy -= m * np.log2(m) if m > 0 else 0
                full -= (1 - m) * np.log2(1 - m) if m < 1 else 0
        assert found.mean[k] == pytest.approx(one.mean())
        assert found.tv[k] == pytest.approx(tv)
        assert found.entropy[k] == pytest.approx(entropy / 144)
        assert found.entropy_full[k] == pytest.approx((entropy + full) / 144)


def test_mean_form_of_squares():
    maps = np.random.default_rng(0).random((2, 7, 7))
    down, across = np.diff(maps, axis=1) ** 2, np.diff(maps, axis=2) ** 2
    expected = down.mean(axis=(1, 2)) + across.mean(axis=(1, 2))
    assert mask_statistics(maps).tv_mean == pytest.approx(expected)


def test_intervals_and_batches():
    maps = np.random.default_rng(0).random((6, 5, 5))
    whole = mask_statistics(maps)
    parts = join(mask_statistics(maps[k : k + 4]) for k in (0, 4))
    assert parts.mean.tolist() == whole.mean.tolist()
    volume = maps.mean(axis=(1, 2))
    assert whole.interval("std").value == pytest.approx(volume.std(ddof=1))
    assert whole.interval("mean").value == pytest.approx(volume.mean())
    text = str(whole)
    assert re.search(r"entropy one-sided, bits +0\.\d{3} \(0\.\d{3}\.\.0\.\d{3}\)", text)
    assert "maps of 5 x 5 cells as 5 x 5 pixels" in text


def test_bad_input_is_one_sentence():
    with refuses(ValueError, "maps: expected numbers in [0, 1], got 0 to 2"):
        mask_statistics(np.array([[[0.0, 2.0]]]))
    with refuses(
        ValueError,
        "name: expected one of mean, std, tv, tv_mean, entropy, entropy_full, got 'area'",
    ):
        mask_statistics(np.zeros((1, 2, 2))).interval("area")
