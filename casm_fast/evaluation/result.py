"""What a protocol found, and how it is shown: figures, published ones, and the convention."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from numpy.typing import NDArray

from casm_fast.evaluation.intervals import Floats, HasIntervals, Interval, bootstrap_sums, means
from casm_fast.evaluation.printing import columns, interval_lines, notes, percent


@dataclass(frozen=True)
class Result(HasIntervals):
    """What a protocol found. ``str(result)`` is the printed table with the convention below.

    Attributes:
        protocol: Its name.
        heads: Names of the figures, the headline first.
        figures: Shares in [0, 1], by head.
        convention: The convention as pairs of a short name and a sentence.
        published: Names and first figures of published results by the same convention on the same
            images; mostly empty.
        terms: ``[n, c]``, what each counted image adds to the sums that the figures are made of.
    """

    protocol: str
    heads: tuple[str, ...]
    figures: tuple[float, ...]
    convention: tuple[tuple[str, str], ...]
    published: tuple[tuple[str, float], ...] = field(kw_only=True, default=())
    terms: NDArray[Any] = field(kw_only=True, repr=False, compare=False)

    def sums_to_figures(self, sums: Floats, images: int) -> Floats:
        """The figures ``[R, k]`` of the sums ``[R, c]`` of the terms over so many images."""
        return means(sums, images)

    def bootstrap(self, **told: Any) -> dict[str, Interval]:
        """Every figure with its interval, by head; options of `casm_fast.evaluation.bootstrap`."""
        found = bootstrap_sums(self.terms, self.sums_to_figures, **told)
        return dict(zip(self.heads, found, strict=True))

    def __str__(self) -> str:
        blanks = ("-",) * (len(self.heads) - 1)
        rows = [
            ("these maps", *map(percent, self.figures)),
            *((name, percent(figure), *blanks) for name, figure in self.published),
        ]
        table = columns(("", *self.heads), rows)
        explained = (*interval_lines(self.intervals), *self.convention)
        return "\n".join([self.protocol, "", *table, "", *notes(explained)])

    def to_dict(self) -> dict[str, Any]:
        """What is printed, as plain dictionaries and numbers, for JSON."""
        return {
            "protocol": self.protocol,
            "figures": dict(zip(self.heads, self.figures, strict=True)),
            "intervals": {head: asdict(found) for head, found in self.intervals.items()},
            "convention": dict(self.convention),
            "published": dict(self.published),
        }
