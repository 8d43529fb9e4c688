"""Clipped axes: outliers are named by their numbers, so that they do not press all other marks onto one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from visadapt.report.formatting import signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REACH = 4.0
"""Interquartile ranges beyond the quartiles from which a value is an outlier."""

LEAST = 0.5
"""Points that the interquartile range is taken to be at least: a few equal values make no outliers of the others."""


@dataclass(frozen=True)
class Window:
    """The part of an axis that is drawn; an end is infinite where no value lies beyond it.

    Args:
        low: lower end.
        high: upper end.
    """

    low: float = -inf
    high: float = inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def clip(self, value: float) -> float:
        """Return the value, or the end that it lies beyond."""
        return min(max(value, self.low), self.high)

    def label(self, text: str) -> str:
        """Return the label of the axis, which says so if there are marks beyond its ends."""
        return text if self == Window() else f"{text}\n(clipped: the rest as numbers)"


def window(values: Sequence[float]) -> Window:
    """Return the part of an axis without outliers: `REACH` interquartile ranges beyond the quartiles.

    Args:
        values: all values in points; fewer than four have no outliers.
    """
    if len(values) < 4:
        return Window()
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    reach = REACH * max(LEAST, upper - lower)
    inside = [value for value in values if lower - reach <= value <= upper + reach]
    return Window(
        min(inside) if min(values) < lower - reach else -inf,
        max(inside) if max(values) > upper + reach else inf,
    )


def clipped_line(
    axes: Axes, visible: Window, x: Sequence[float], y: Sequence[float], row: int = 0, **style: Any
) -> None:
    """Draw a line whose marks beyond the window lie at its end, as a triangle with their number.

    Args:
        axes: axes to draw on.
        visible: the window.
        x: places.
        y: values.
        row: number of the line, so that the numbers of several lines at one place do not overlap.
        **style: style of the line.
    """
    axes.plot(x, [visible.clip(value) for value in y], **style)
    for place, value in zip(x, y, strict=True):
        if value not in visible:
            below = value < visible.low
            axes.plot(place, visible.clip(value), marker="v" if below else "^", color=style["color"], markersize=8)
            axes.annotate(
                signed(value),
                (place, visible.clip(value)),
                xytext=(7, (2 if below else -8) + (9 if below else -9) * row),
                textcoords="offset points",
                fontsize=7.5,
                color=style["color"],
            )
