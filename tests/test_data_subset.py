"""A part of a set looks like a set: the same images, labels and boxes in the order asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from casm_fast.data import ImageNetSource, generate, subset, training_batches, write_tree
from casm_fast.data.source import ArraySource, ImageSource

CHOSEN = [7, 0, 7, 3]


@pytest.mark.parametrize("in_memory", [True, False])
def test_members_are_those_of_the_whole_set(in_memory: bool, tmp_path) -> None:
    whole = generate(10)
    if not in_memory:
        whole = ImageNetSource(write_tree(tmp_path, whole, generate(25), sides=(36, 70)), "val")
    part = subset(whole, CHOSEN)
    assert isinstance(part, ImageSource)
    assert isinstance(part, ArraySource) == in_memory
    assert (len(part), part.classes, part.has_boxes) == (4, whole.classes, whole.has_boxes)
    for place, index in enumerate(CHOSEN):
        assert part.image_id(place) == whole.image_id(index)
        assert part.label(place) == whole.label(index)
        assert np.array_equal(part.image(place), whole.image(index))
        assert np.array_equal(part.boxes(place), whole.boxes(index))


def test_a_part_in_memory_is_loaded_as_one_on_disk_would_be() -> None:
    """Slices of the arrays against single images: the same batches."""
    part = subset(generate(40), range(5, 35))

    class OneByOne:
        """The same part without its arrays."""

        def __getattr__(self, name):
            if name in ("images", "labels"):
                raise AttributeError(name)
            return getattr(part, name)

        def __len__(self):
            return len(part)

    for name in ("name", "classes", "has_boxes"):
        setattr(OneByOne, name, getattr(part, name))
    options = {"size": 64, "batch_size": 8, "seed": 1, "epoch": 2, "augment": "flip"}
    for fast, slow in zip(
        training_batches(part, **options), training_batches(OneByOne(), **options), strict=True
    ):
        assert torch.equal(fast.images, slow.images)
        assert torch.equal(fast.labels, slow.labels)


@pytest.mark.parametrize("index", [10, -1])
def test_an_index_outside_the_set_is_refused(index: int) -> None:
    message = f"^Subset: expected indices from 0 to 9, got {index}$"
    with pytest.raises(ValueError, match=message):
        subset(generate(10), [0, index])
