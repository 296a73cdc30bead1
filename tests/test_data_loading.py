"""Batches: one stream for any number of workers and any start; broken files are named."""

from __future__ import annotations

import re
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from casm_fast.data import (
    DecodeError,
    FolderSource,
    ImageNetSource,
    batches_per_epoch,
    evaluation_batches,
    generate,
    geometry,
    normalize,
    resize,
    training_batches,
    write_tree,
)
from casm_fast.data.loading import random_crop, uniforms


@pytest.fixture(scope="module")
def memory():
    return generate(100)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading")
    return write_tree(root, generate(40), generate(25, split="val"), sides=(36, 70))


@pytest.fixture
def train(tree):
    return ImageNetSource(tree, "train")


class Counting:
    """A source that counts how often each image is read, and can refuse some."""

    def __init__(self, source, broken=()):
        self.source, self.broken, self.reads = source, set(broken), []
        self.lock = threading.Lock()

    def __getattr__(self, name):
        return getattr(self.source, name)

    def __len__(self):
        return len(self.source)

    def image(self, index):
        with self.lock:
            self.reads.append(index)
        if index in self.broken:
            raise DecodeError(f"cannot decode {self.source.image_id(index)}: broken")
        return self.source.image(index)


def same(first, second) -> bool:
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.labels, second.labels)
        and first.skipped == second.skipped
    )


COMMON = {"size": 32, "batch_size": 6, "seed": 3, "epoch": 2}


@pytest.mark.parametrize("augment", ["imagenet", "flip", "none"])
def test_the_stream_does_not_depend_on_workers_or_start(train, augment):
    plain = list(training_batches(train, **COMMON, augment=augment))
    threaded = list(training_batches(train, **COMMON, augment=augment, workers=3))
    resumed = list(training_batches(train, **COMMON, augment=augment, workers=2, first_batch=4))
    assert len(plain) == len(threaded) == 6
    assert all(map(same, plain, threaded))
    assert len(resumed) == 2
    assert all(map(same, plain[4:], resumed))
    assert plain[0].images.shape == (6, 32, 32, 3)
    assert plain[0].images.dtype == torch.uint8
    assert plain[0].labels.dtype == torch.int64


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40), st.floats(0.05, 1), st.booleans(), st.integers(0, 50), st.integers(0, 99)
)
def test_any_resume_continues_the_stream(batch_size, fraction, drop_last, first, seed):
    source = generate(60, 16)
    options = {
        "size": 16, "batch_size": batch_size, "seed": seed, "epoch": 1, "fraction": fraction,
        "drop_last": drop_last, "augment": "flip",
    }  # fmt: skip
    images = round(60 * fraction)
    expected = images // batch_size if drop_last else -(-images // batch_size)
    if expected == 0:
        with pytest.raises(ValueError, match="expected at least one batch"):
            training_batches(source, **options)
        return
    assert batches_per_epoch(source, batch_size, fraction, drop_last) == expected
    whole = list(training_batches(source, **options))
    assert len(whole) == expected
    first = min(first, expected)
    assert all(map(same, whole[first:], training_batches(source, **options, first_batch=first)))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_shards_are_parts_of_one_stream(train, memory, parts):
    order = np.random.default_rng([3, 2]).permutation(40)
    broken = [int(order[k]) for k in (0, 1, 2, 9, 38)]
    for source in (Counting(train, broken), memory):
        options = {**COMMON, "size": 64, "augment": "flip", "drop_last": False}
        whole = list(training_batches(source, **options))
        shards = [list(training_batches(source, **options, shard=(k, parts))) for k in range(parts)]
        assert all(len(shard) == len(whole) for shard in shards)
        for batch, *pieces in zip(whole, *shards, strict=True):
            assert torch.equal(batch.images, torch.cat([piece.images for piece in pieces]))
            assert torch.equal(batch.labels, torch.cat([piece.labels for piece in pieces]))
            assert batch.skipped == sum((piece.skipped for piece in pieces), ())
            sizes = [len(piece.labels) + len(piece.skipped) for piece in pieces]
            assert max(sizes) - min(sizes) <= 1
    counting = Counting(train)
    list(training_batches(counting, **COMMON, shard=(1, parts)))
    assert len(counting.reads) < 40 / parts + 6
    with pytest.raises(ValueError, match=r"^expected `shard` \(k, n\) with 0 <= k < n, got "):
        training_batches(train, **COMMON, shard=(parts, parts))


def test_an_epoch_shows_each_image_once_and_epochs_differ(memory):
    def order(epoch, **options):
        counting = Counting(memory)
        list(
            training_batches(
                counting, size=32, batch_size=10, seed=1, epoch=epoch, augment="none", **options
            )
        )
        return counting.reads

    assert sorted(order(0)) == list(range(100))
    assert order(0) == order(0) != order(1)
    share = order(0, fraction=0.2)
    assert len(set(share)) == 20
    assert set(share) != set(order(1, fraction=0.2))


def test_a_resumed_epoch_reads_nothing_that_it_passes_over(train):
    counting = Counting(train)
    list(training_batches(counting, **COMMON, first_batch=5))
    assert len(counting.reads) == 6


def test_the_path_in_memory_equals_the_path_by_image(memory):
    for augment in ("flip", "none"):
        options = {"size": 64, "batch_size": 25, "seed": 9, "epoch": 0, "augment": augment}
        fast = list(training_batches(memory, **options))
        slow = list(training_batches(OnlyImages(memory), **options))
        assert all(map(same, fast, slow))
    mirrored = next(
        training_batches(memory, size=64, batch_size=50, seed=9, epoch=0, augment="flip")
    )
    plain = next(training_batches(memory, size=64, batch_size=50, seed=9, epoch=0, augment="none"))
    flips = [not torch.equal(a, b) for a, b in zip(mirrored.images, plain.images, strict=True)]
    assert 12 < sum(flips) < 38
    for a, b, flipped in zip(mirrored.images, plain.images, flips, strict=True):
        assert torch.equal(a, b.flip(1) if flipped else b)


class OnlyImages:
    """Hides the arrays of a source in memory."""

    def __init__(self, source):
        self.source = source
        self.name, self.classes, self.has_boxes = source.name, source.classes, True

    def __len__(self):
        return len(self.source)

    def image_id(self, index):
        return self.source.image_id(index)

    def image(self, index):
        return self.source.image(index)

    def label(self, index):
        return self.source.label(index)

    def boxes(self, index):
        return self.source.boxes(index)


def test_the_source_is_not_written_to(memory):
    before = memory.images.copy()
    for batch in training_batches(memory, size=64, batch_size=50, seed=0, epoch=0, augment="flip"):
        batch.images.zero_()
    np.testing.assert_array_equal(memory.images, before)


def test_broken_images_are_skipped_counted_and_named(train):
    whole = list(training_batches(train, **COMMON, augment="flip"))
    order = np.random.default_rng([3, 2]).permutation(40)
    broken = [int(order[1]), int(order[8])]
    for workers in (0, 2):
        source = Counting(train, broken)
        batches = list(training_batches(source, **COMMON, augment="flip", workers=workers))
        assert [len(b.labels) for b in batches] == [5, 5, 6, 6, 6, 6]
        assert batches[0].skipped == (f"cannot decode {train.image_id(broken[0])}: broken",)
        assert batches[2].skipped == ()
        keep = [0, 2, 3, 4, 5]
        assert torch.equal(batches[0].images, whole[0].images[keep])
        assert torch.equal(batches[0].labels, whole[0].labels[keep])
        with pytest.raises(DecodeError) as caught:
            list(training_batches(source, **COMMON, augment="flip", workers=workers, strict=True))
        assert str(caught.value) == f"cannot decode {train.image_id(broken[0])}: broken"


def test_a_batch_of_nothing_but_broken_images_stops(train):
    source = Counting(train, range(40))
    with pytest.raises(DecodeError, match="broken"):
        next(training_batches(source, **COMMON))


def test_a_real_corrupt_jpeg_is_skipped(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    path = next((root / "train").glob("*/*.JPEG"))
    path.write_bytes(path.read_bytes()[:300])
    source = ImageNetSource(root, "train")
    batches = list(training_batches(source, **{**COMMON, "batch_size": 8}, workers=2))
    skipped = [name for batch in batches for name in batch.skipped]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"cannot decode {path}: ")
    assert sum(len(batch.labels) for batch in batches) == 39


def test_closing_early_stops_the_workers(train):
    before = threading.active_count()
    batches = training_batches(train, **COMMON, workers=4)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    time.sleep(0.05)
    assert threading.active_count() == before


def test_other_errors_reach_the_caller(train):
    class Failing(Counting):
        def image(self, index):
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        next(training_batches(Failing(train), **COMMON, workers=2))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_label_beyond_the_classes_is_refused(memory, train, in_memory):
    class Mislabelled(Counting):
        def label(self, index):
            return 9 if index == 3 else self.source.label(index)

    if in_memory:
        source = Counting(memory)
        source.labels = np.where(np.arange(len(memory)) == 3, 9, memory.labels)
    else:
        source = Mislabelled(train)
    message = (
        f"expected labels from 0 to 7, one for each class of {source.name}, got 9 for "
        f"{source.image_id(3)}; name every class in `classes`"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        list(training_batches(source, size=64, batch_size=20, seed=0, epoch=0, augment="none"))


def test_unlabelled_images_are_refused(tmp_path):
    for k in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
    source = FolderSource(tmp_path)
    with pytest.raises(ValueError) as caught:
        next(training_batches(source, size=8, batch_size=4, seed=0, epoch=0))
    assert str(caught.value).startswith(
        f"expected a label for every training image of folder:{tmp_path}, got none for "
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "expected `batch_size` of at least 1, got 0"),
        ({"fraction": 0.0}, "expected `fraction` above 0 and at most 1, got 0.0"),
        ({"first_batch": 7}, "expected `first_batch` from 0 to 6, got 7"),
        ({"seed": -1}, "expected `seed` of at least 0, got -1"),
        ({"workers": -1}, "expected `workers` of at least 0, got -1"),
        ({"size": 0}, "expected `size` of at least 1, got 0"),
        (
            {"augment": "mixup"},
            'expected `augment` "imagenet", "flip" or "none", got \'mixup\'',
        ),
        ({"resize_policy": "fit"}, 'expected resize policy "crop" or "squash", got \'fit\''),
        (
            {"batch_size": 64},
            "expected at least one batch of 64 images per epoch, got 40 images (1 of 40); lower "
            "`batch_size` or raise `fraction`",
        ),
    ],
)
def test_bad_arguments_are_refused_before_the_first_batch(train, change, message):
    with pytest.raises(ValueError) as caught:
        training_batches(train, **{**COMMON, **change})
    assert str(caught.value) == message


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinning works here")
def test_pinning_without_an_accelerator_is_refused(train):
    with pytest.raises(ValueError) as caught:
        training_batches(train, **COMMON, pin_memory=True)
    assert str(caught.value) == (
        "expected an accelerator for `pin_memory`, got none; pass pin_memory=False"
    )


# --- chance ---------------------------------------------------------------------------------------


def test_uniforms_equal_splitmix64_by_integers():
    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    # SplitMix64 of seed 1234567 begins with this number (the reference program of S. Vigna).
    assert mix(1234567) == 6457827717110365317
    got = uniforms(11, 4, np.array([0, 7]), 3)
    for row, index in enumerate((0, 7)):
        key = mix((mix((mix(11) + 4) % 2**64) + index) % 2**64)
        expected = [(mix((key + k) % 2**64) >> 11) / 2**53 for k in range(3)]
        assert got[row].tolist() == expected


def test_uniforms_are_uniform_and_independent():
    draws = uniforms(0, 0, np.arange(20000), 4)
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03
    other = uniforms(0, 1, np.arange(20000), 1)[:, 0]
    assert np.abs(np.corrcoef(draws[:, 0], other)[0, 1]) < 0.03


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
def test_random_crops_lie_inside(height, width, index):
    top, left, h, w = random_crop(height, width, uniforms(0, 0, np.array([index]), 22)[0])
    assert h >= 1
    assert w >= 1
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


def test_random_crops_are_distributed_like_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(3, 90, 160)
    oracle = np.array(
        [RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)]
    )
    ours = np.array([random_crop(90, 160, u) for u in uniforms(0, 0, np.arange(3000), 22)])
    for column in range(4):
        assert stats.ks_2samp(oracle[:, column], ours[:, column]).pvalue > 1e-3


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["crop", "squash"])
def test_evaluation_keeps_order_and_geometry(tree, policy):
    source = ImageNetSource(tree)
    plain = list(evaluation_batches(source, size=24, batch_size=10, policy=policy))
    threaded = list(evaluation_batches(source, size=24, batch_size=10, policy=policy, workers=3))
    assert [len(b.indices) for b in plain] == [10, 10, 5]
    assert [k for b in plain for k in b.indices] == list(range(25))
    for first, second in zip(plain, threaded, strict=True):
        assert torch.equal(first.images, second.images)
        assert first.indices == second.indices
        assert first.geometries == second.geometries
    for batch in plain:
        assert batch.images.dtype == torch.uint8
        for image, index, g in zip(batch.images, batch.indices, batch.geometries, strict=True):
            original = source.image(index)
            np.testing.assert_array_equal(image, resize(original, 24, policy))
            assert g == geometry(original.shape[0], original.shape[1], 24, policy)
    assert normalize(plain[0].images).shape == (10, 3, 24, 24)


def test_evaluation_of_a_part(memory):
    whole = list(evaluation_batches(memory, size=64, batch_size=7))
    part = list(evaluation_batches(memory, size=64, batch_size=7, start=14, stop=30))
    assert [k for b in part for k in b.indices] == list(range(14, 30))
    assert torch.equal(part[0].images, whole[2].images)
    assert list(evaluation_batches(memory, size=64, batch_size=7, start=3, stop=3)) == []
    with pytest.raises(ValueError) as caught:
        evaluation_batches(memory, size=64, batch_size=7, start=5, stop=101)
    assert str(caught.value) == "expected 0 <= `start` <= `stop` <= 100, got start 5 and stop 101"


def test_evaluation_reports_broken_images(memory):
    source = Counting(memory, [1, 4, 5])
    batches = list(evaluation_batches(source, size=32, batch_size=3, stop=7, workers=2))
    assert [b.indices for b in batches] == [[0, 2], [3], [6]]
    assert batches[1].errors == [
        (4, "cannot decode train-000004: broken"),
        (5, "cannot decode train-000005: broken"),
    ]
    alone = next(evaluation_batches(source, size=32, batch_size=1, start=4, stop=5))
    assert alone.images.shape == (0, 32, 32, 3)
    assert alone.geometries == []
