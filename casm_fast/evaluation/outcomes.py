"""Results that keep what every image gave, so that parts of a data set become one result.

A protocol's result is a frozen dataclass. Fields that hold a value for each image are declared as
``field(metadata=PER_IMAGE)``; all others, such as the convention, are the same for every part.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


PER_IMAGE = {"axis": 0}
"""Marks a field that is an array whose first axis counts the images."""

PER_IMAGE_LAST = {"axis": -1}
"""Marks a field that is an array whose last axis counts the images."""


def join(results: Iterable[T]) -> T:
    """One result for all images of several, in their order: this is how a data set streams through.

    Args:
        results: Of one protocol by one convention, at least one.

    Returns:
        What the protocol gives for all the images at once.

    Raises:
        TypeError: Something else than results of one protocol.
        ValueError: No result, or results by different conventions.
    """
    parts = list(results)
    if not parts:
        raise ValueError("join: expected at least one result, got none")
    first: Any = parts[0]
    kinds = sorted({type(part).__name__ for part in parts})
    if len(kinds) > 1 or not hasattr(first, "__dataclass_fields__"):
        raise TypeError(f"join: expected results of one protocol, got {', '.join(kinds)}")
    joined = {}
    for field in dataclasses.fields(first):
        values = [getattr(part, field.name) for part in parts]
        if "axis" in field.metadata:
            joined[field.name] = np.concatenate(values, axis=field.metadata["axis"])
        elif any(not np.array_equal(value, values[0]) for value in values):
            other = next(value for value in values if not np.array_equal(value, values[0]))
            raise ValueError(
                f"join: expected results that agree in `{field.name}`, "
                f"got {values[0]!r} and {other!r}"
            )
    whole: T = dataclasses.replace(first, **joined)
    return whole


def mean_of(values: Iterable[Any]) -> float:
    """Mean that does not depend on the order of the values; NaN without any."""
    numbers = [float(value) for value in values]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def paragraph(text: str) -> str:
    """A convention, indented and broken into lines for a terminal."""
    return textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  ")
