"""How figures look: one palette that the colour-blind can tell apart, for light and for dark pages, wide and narrow."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visadapt.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Okabe & Ito's colours (2008), without the yellow that white paper swallows; lighter where the paper is dark
_COLOURS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9"),
    "dark": ("#56b4e9", "#f28e4b", "#3fd0a4", "#e29cc5", "#e6c229", "#9ecae1"),
}

_PAPER = {"light": "#ffffff", "dark": "#14181d"}

_INK = {"light": "#1d2530", "dark": "#e4e8ee"}

_FAINT = {"light": "#d4d9e0", "dark": "#39424e"}

_LOSS = {"light": "#b35806", "dark": "#f28e4b"}

_GAIN = {"light": "#2166ac", "dark": "#56b4e9"}

MARKERS = ("o", "s", "D", "^", "v", "P")

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))


@dataclass(frozen=True)
class Look:
    """A page to draw for.

    Args:
        theme: ``light`` or ``dark``.
        width: of the figure in inches; panels stand below one another on narrow ones.
    """

    theme: str = "light"
    width: float = 7.2

    @property
    def narrow(self) -> bool:
        """Whether there is room for one panel beside another."""
        return self.width < 5

    @property
    def paper(self) -> str:
        """The background."""
        return _PAPER[self.theme]

    @property
    def ink(self) -> str:
        """Text and axes."""
        return _INK[self.theme]

    @property
    def faint(self) -> str:
        """Lines to read values by."""
        return _FAINT[self.theme]

    def colour(self, number: int) -> str:
        """The colour of a series; more than six series share colours and differ by marker and line."""
        return _COLOURS[self.theme][number % 6]

    def series(self, number: int) -> dict[str, Any]:
        """Colour, marker and line of a series: nothing is told by colour alone."""
        return {
            "color": self.colour(number),
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[(number + number // 6) % len(LINES)],
        }

    def differences(self) -> Colormap:
        """From losses by the paper's own shade, where nothing changes, to gains."""
        middle = "#f2f3f5" if self.theme == "light" else "#252c35"
        shades = (_LOSS[self.theme], middle, _GAIN[self.theme])
        made: Colormap = _matplotlib("colors").LinearSegmentedColormap.from_list("differences", shades)
        return made

    def panels(self, count: int, height: float, title: str, **options: Any) -> tuple[Figure, list[Axes]]:
        """A figure of ``count`` panels of this height in inches, under a title that is wrapped to its width."""
        across = 1 if self.narrow else min(count, 2)
        down = -(-count // across)
        lines = textwrap.wrap(title, int(self.width * 11))
        figure: Figure = _matplotlib("figure").Figure(
            figsize=(self.width, down * height + 0.2 * len(lines)), layout="constrained"
        )
        if lines:
            figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        axes = list(figure.subplots(down, across, squeeze=False, **options).flat)
        for unused in axes[count:]:
            unused.set_visible(False)
        return figure, axes[:count]

    def legend(self, figure: Figure) -> None:
        """Names the series below the panels, where they hide nothing."""
        handles, labels = figure.axes[0].get_legend_handles_labels()
        # 13 letters an inch, and 6 for the mark and the gap
        columns = max(1, int(self.width * 13 / (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(labels)))

    def rc(self) -> dict[Any, Any]:
        """matplotlib's settings."""
        return {
            "axes.edgecolor": self.ink,
            "axes.facecolor": self.paper,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.labelcolor": self.ink,
            "axes.labelsize": 9,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": self.ink,
            "axes.titlelocation": "left",
            "axes.titlesize": 9.5,
            "figure.facecolor": self.paper,
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "grid.color": self.faint,
            "grid.linewidth": 0.7,
            "legend.fontsize": 8.5,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "savefig.facecolor": self.paper,
            "svg.hashsalt": "visadapt",
            "text.color": self.ink,
            "xtick.color": self.ink,
            "xtick.labelsize": 8.5,
            "ytick.color": self.ink,
            "ytick.labelsize": 8.5,
        }


def _matplotlib(module: str) -> Any:
    return require(f"matplotlib.{module}", "a figure", "visadapt[plots]")


def plain_ticks(axis: Axis) -> None:
    """Says 0.1 and 10 on a logarithmic axis, rather than powers of ten."""
    axis.set_major_formatter(_matplotlib("ticker").FuncFormatter(lambda value, _: f"{value:g}"))


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn for any page.

    Args:
        name: of its file.
        alt: what it shows, in words, for those who do not see it.
        draw: draws it.
    """

    name: str
    alt: str
    draw: Callable[[Look], Figure]

    def render(self, look: Look, form: str = "svg", dpi: int = 150) -> bytes:
        """The figure as the bytes of an SVG or PNG file, the same bytes each time.

        Raises:
            VisadaptError: matplotlib is not installed.
        """
        written = io.BytesIO()
        # a date in the file would make each run's another; PNG has none
        metadata: dict[str, Any] = {"Date": None} if form == "svg" else {}
        with require("matplotlib", "a figure", "visadapt[plots]").rc_context(look.rc()):
            self.draw(look).savefig(written, format=form, dpi=dpi, metadata=metadata)
        return written.getvalue()
