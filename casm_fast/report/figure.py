"""The gallery as one picture, for papers and front pages: Figure 2 of the CASM paper with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from casm_fast.data.source import ImageSource, open_source
from casm_fast.models.saliency import SaliencyModel
from casm_fast.report.page import HasTable, choose_group, load_model, net_box, read_table
from casm_fast.report.pictures import Pictures, draw

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TILE = 1.3  # inches
_PREDICTED, _TRUE = "#ff9d2e", "#ffffff"


def gallery(
    extraction: str | Path | pa.Table | HasTable,
    output: str | Path = "gallery.png",
    *,
    model: SaliencyModel | str | Path | None = None,
    source: ImageSource | str | Path | None = None,
    columns: int = 7,
    dpi: int = 150,
) -> Path:
    """Draw consecutive images: original with boxes, saliency, masked-in, masked-out, inpainted.

    Args:
        extraction: Parquet file of ``casm_fast.extract``, its table, or the extraction itself.
        output: The picture; its suffix names the format (png, pdf, svg ...).
        model: The model; by default the checkpoint that the table names.
        source: The images; by default those that the table names.
        columns: Images side by side.
        dpi: Dots per inch; an image is 1.3 inches wide.

    Returns:
        ``output``.
    """
    table, description = read_table(extraction)
    images = open_source(source if source is not None else description.source, split="val")
    rows: list[dict[str, Any]] = table.to_pylist()
    indices = choose_group(rows, columns, groups=1)[0]
    drawn = draw(load_model(model, description), images, indices, description.convention)
    forms = _forms(drawn)
    figure, grid = picture_grid(
        [(name, [getattr(picture, form) for picture in drawn]) for name, form in forms]
    )
    for axes, picture, index in zip(grid[0], drawn, indices, strict=True):
        _boxes(axes, rows[index], len(picture.original) / description.convention.size)
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=dpi)
    return output


def picture_grid(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], label: float = 0.95
) -> tuple[Figure, list[list[Axes]]]:
    """Pictures in rows, each with its name at the left.

    Args:
        rows: Names and equally many pictures ``[D, D, 3]`` each.
        label: Inches for the names.

    Returns:
        The figure, to be saved, and its axes by row and column.
    """
    from matplotlib.figure import Figure

    columns = len(rows[0][1])
    figure = Figure(figsize=(label + _TILE * columns, _TILE * len(rows)))
    grid = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        gridspec_kw={
            "left": label / figure.get_figwidth(),
            "right": 1,
            "bottom": 0,
            "top": 1,
            "wspace": 0.05,
            "hspace": 0.05,
        },
    )
    for axes_row, (name, pictures) in zip(grid, rows, strict=True):
        for axes, picture in zip(axes_row, pictures, strict=True):
            axes.imshow(picture, interpolation="lanczos")
            axes.set_axis_off()
        axes_row[0].text(
            -0.08, 0.5, name, transform=axes_row[0].transAxes, ha="right", va="center", size=9
        )
    return figure, grid.tolist()


def _forms(drawn: Sequence[Pictures]) -> list[tuple[str, str]]:
    """The rows that can be drawn, and the fields that hold them."""
    forms = [
        ("original", "original"),  # the first: boxes are drawn on it
        ("saliency", "saliency"),
        ("masked-in", "masked_in"),
        ("masked-out", "masked_out"),
        ("inpainted", "inpainted"),
    ]
    return [(name, form) for name, form in forms if getattr(drawn[0], form) is not None]


def _boxes(axes: Axes, row: dict[str, Any], scale: float) -> None:
    """The true boxes, dashed, and the predicted one, on a picture ``scale`` times as large."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    marked = [(box, _TRUE, (0, (3, 1.5))) for box in row["gt_net_boxes"] or []]
    for (x0, y0, x1, y1), colour, dashes in [*marked, (net_box(row), _PREDICTED, (0, ()))]:
        axes.add_patch(
            Rectangle(
                (x0 * scale - 0.5, y0 * scale - 0.5),
                (x1 - x0) * scale,
                (y1 - y0) * scale,
                fill=False,
                edgecolor=colour,
                linewidth=1.4,
                linestyle=dashes,
                path_effects=[withStroke(linewidth=2.8, foreground="#00000088")],
            )
        )
