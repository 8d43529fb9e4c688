"""Heat maps of differences: zero has nearly the background's colour, and cells show their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from visadapt.optional import require
from visadapt.report.formatting import signed
from visadapt.report.style import Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Matrix = Sequence[Sequence["float | None"]]
"""Rows of differences in points; None for an empty cell."""


def heatmaps(panels: Sequence[Axes], look: Look, matrices: Sequence[Matrix], names: Sequence[str]) -> None:
    """Draw matrices of differences in points on one colour scale.

    Args:
        panels: axes to draw on, one per matrix.
        look: look of the page.
        matrices: the matrices, with one column per name.
        names: names of the columns; the first of them are the names of the rows.
    """
    np = require("numpy", "a figure", "visadapt[plots]")
    arrays = [np.array([[np.nan if v is None else v for v in row] for row in matrix], float) for matrix in matrices]
    values = np.concatenate([array[~np.isnan(array)] for array in arrays])
    limit = float(np.abs(values).max()) or 1.0
    tilted = max(map(len, names)) > 3 and (look.narrow or len(names) > 6)
    for axes, array in zip(panels, arrays, strict=True):
        image = axes.imshow(array, cmap=look.differences(), vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), value in np.ndenumerate(array):
            if not np.isnan(value) and len(names) <= (7 if look.narrow else 12):
                # dark or light text, by the cell's Rec. 709 luminance
                red, green, blue, _ = image.cmap(image.norm(value))
                ink = "#111111" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"
                axes.text(column, row, signed(value), ha="center", va="center", fontsize=7.5, color=ink)
        axes.set_xticks(range(len(names)), names, rotation=35 if tilted else 0, ha="right" if tilted else "center")
        axes.set_yticks(range(len(array)), names[: len(array)])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure = panels[0].figure
    assert figure is not None
    bar = figure.colorbar(image, ax=list(panels), fraction=0.04, pad=0.02)
    if values.any():
        bar.ax.set_ylim(min(0, values.min()), max(0, values.max()))
    bar.set_label("points")
    bar.outline.set_visible(False)  # type: ignore[operator]
