"""What a protocol found, and how it is shown: figures, published ones, and the convention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from casm_fast.evaluation.printing import columns, notes, percent


@dataclass(frozen=True)
class Result:
    """What a protocol found. ``str(result)`` is the printed table with the convention below.

    Attributes:
        protocol: Its name.
        heads: Names of the figures, the headline first.
        figures: Shares in [0, 1], by head.
        convention: The convention as pairs of a short name and a sentence.
        published: Names and first figures of published results by the same convention on the same
            images; mostly empty.
    """

    protocol: str
    heads: tuple[str, ...]
    figures: tuple[float, ...]
    convention: tuple[tuple[str, str], ...]
    published: tuple[tuple[str, float], ...] = field(kw_only=True, default=())

    def __str__(self) -> str:
        blanks = ("-",) * (len(self.heads) - 1)
        rows = [
            ("these maps", *map(percent, self.figures)),
            *((name, percent(figure), *blanks) for name, figure in self.published),
        ]
        table = columns(("", *self.heads), rows)
        return "\n".join([self.protocol, "", *table, "", *notes(self.convention)])

    def to_dict(self) -> dict[str, Any]:
        """What is printed, as plain dictionaries and numbers, for JSON."""
        return {
            "protocol": self.protocol,
            "figures": dict(zip(self.heads, self.figures, strict=True)),
            "convention": dict(self.convention),
            "published": dict(self.published),
        }
