"""Heat maps of differences: zero has nearly the background's colour, and cells show their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visadapt.optional import require
from visadapt.report.clipping import window
from visadapt.report.formatting import signed
from visadapt.report.style import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Matrix = Sequence[Sequence["float | None"]]
"""Rows of differences in points; None for an empty cell."""


def heatmaps(panels: Sequence[Axes], look: Look, matrices: Sequence[Matrix], names: Sequence[Sequence[str]]) -> None:
    """Draw matrices of differences in points on one colour scale, which outliers do not stretch.

    Args:
        panels: axes to draw on, one per matrix.
        look: look of the page.
        matrices: the matrices, with one column per name.
        names: names of the columns of each matrix; the first of them are the names of its rows.
    """
    np = require("numpy", "a figure", "visadapt[plots]")
    arrays = [np.array([[np.nan if v is None else v for v in row] for row in matrix], float) for matrix in matrices]
    values = np.concatenate([array[~np.isnan(array)] for array in arrays])
    sizes = np.abs(values)
    visible = window([*values.tolist(), *(-values).tolist()])
    limit = visible.clip(float(sizes.max())) or 1.0
    for axes, array, columns in zip(panels, arrays, names, strict=True):
        tilted = max(map(len, columns)) > 3 and (look.narrow or len(columns) > 6 or len(panels) > 1)
        image = axes.imshow(array, cmap=look.differences(), vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), value in np.ndenumerate(array):
            if not np.isnan(value) and len(columns) <= (7 if look.narrow else 12):
                # dark or light text, by the cell's Rec. 709 luminance
                red, green, blue, _ = image.cmap(image.norm(value))
                ink = "#111111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"
                axes.text(column, row, signed(value), ha="center", va="center", fontsize=7.5, color=ink)
        axes.set_xticks(range(len(columns)), columns, rotation=35 if tilted else 0, ha="right" if tilted else "center")
        axes.set_yticks(range(len(array)), columns[: len(array)])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure = panels[0].figure
    assert figure is not None
    bar = figure.colorbar(image, ax=list(panels), fraction=0.04, pad=0.02)
    if values.any():
        bar.ax.set_ylim(max(-limit, min(0, values.min())), min(limit, max(0, values.max())))
    beyond = int((sizes > limit).sum())
    bar.set_label(f"points; {beyond} of {len(values)} are beyond the scale" if beyond else "points")
    bar.outline.set_visible(False)  # type: ignore[operator]
