"""The style of figures: one palette for colour-blind readers, for light and dark themes, wide and narrow pages."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visadapt.arguments import check_fields, takes
from visadapt.checks import check_choice, check_non_negative
from visadapt.errors import VisadaptError
from visadapt.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# the colours of Okabe & Ito (2008), without yellow, which is faint on white; lighter on dark backgrounds
_COLOURS = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9"),
    "dark": ("#56b4e9", "#f28e4b", "#3fd0a4", "#e29cc5", "#e6c229", "#9ecae1"),
}

_PAPER = {"light": "#ffffff", "dark": "#14181d"}

_INK = {"light": "#1d2530", "dark": "#e4e8ee"}

_FAINT = {"light": "#d4d9e0", "dark": "#39424e"}

_LOSS = {"light": "#b35806", "dark": "#f28e4b"}

_GAIN = {"light": "#2166ac", "dark": "#56b4e9"}

_PAINTED = ("fill", "stroke")

MARKERS = ("o", "s", "D", "^", "v", "P")

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)))


@dataclass(frozen=True)
class Look:
    """The theme and width that figures are drawn for.

    Args:
        theme: ``light`` or ``dark``.
        width: width of the figure in inches; below 5 inches, panels are stacked in one column.

    Examples:
        >>> from visadapt.report import Look
        >>> Look("dark", width=4.0).narrow
        True
    """

    theme: str = "light"
    width: float = 7.2

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice(self.theme, _PAPER, "theme")
        if not 1 <= self.width <= 100:
            raise VisadaptError(f"width must be from 1 to 100 inches, got {self.width!r}")

    @property
    def narrow(self) -> bool:
        """Whether panels are stacked in one column."""
        return self.width < 5

    @property
    def paper(self) -> str:
        """Colour of the background."""
        return _PAPER[self.theme]

    @property
    def ink(self) -> str:
        """Colour of text and axes."""
        return _INK[self.theme]

    @property
    def faint(self) -> str:
        """Colour of grid lines."""
        return _FAINT[self.theme]

    @takes()
    def colour(self, number: int) -> str:
        """Return the colour of a series; of more than six, some share colours and differ in their lines."""
        check_non_negative(number, "number")
        return _COLOURS[self.theme][number % 6]

    def series(self, number: int) -> dict[str, Any]:
        """Return colour, marker and line style of a series, so that colour is not the only difference."""
        return {
            "color": self.colour(number),
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[(number + number // 6) % len(LINES)],
        }

    def differences(self) -> Colormap:
        """Return a colour map from losses through nearly the background's colour at zero to gains."""
        middle = "#f2f3f5" if self.theme == "light" else "#252c35"
        shades = (_LOSS[self.theme], middle, _GAIN[self.theme])
        colormap: Colormap = _matplotlib("colors").LinearSegmentedColormap.from_list("differences", shades)
        return colormap

    def panels(self, count: int, height: float, title: str, **options: Any) -> tuple[Figure, list[Axes]]:
        """Create a figure with ``count`` panels of this height in inches, under a wrapped title."""
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
        """Add a legend below the panels."""
        handles, labels = figure.axes[0].get_legend_handles_labels()
        # 13 characters per inch, and 6 for the marker and the gap
        columns = max(1, int(self.width * 13 / (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(labels)))

    def rc(self) -> dict[Any, Any]:
        """Return the settings for ``matplotlib.rc_context``."""
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
            # names may have dollar signs
            "text.parse_math": False,
            "xtick.color": self.ink,
            "xtick.labelsize": 8.5,
            "ytick.color": self.ink,
            "ytick.labelsize": 8.5,
        }


def for_both_themes(svg: bytes) -> bytes:
    """Add a style sheet to an SVG of the light theme that replaces its colours where the reader's theme is dark.

    Colours between those of the palette, as in heat maps, stay as they are.
    """
    pairs = [*zip(_COLOURS["light"], _COLOURS["dark"], strict=True)]
    pairs += [(colours["light"], colours["dark"]) for colours in (_PAPER, _INK, _FAINT)]
    rules = "".join(
        f'[style*="{part}: {light}"] {{ {part}: {dark} !important }}' for light, dark in pairs for part in _PAINTED
    )
    start, tag, rest = svg.partition(b"<svg ")
    attributes, end, body = rest.partition(b">")
    style = f"<style>@media (prefers-color-scheme: dark) {{ {rules} }}</style>"
    return start + tag + attributes + end + style.encode() + body


def _matplotlib(module: str) -> Any:
    return require(f"matplotlib.{module}", "a figure", "visadapt[plots]")


def plain_ticks(axis: Axis, *, between: bool = False) -> None:
    """Label a logarithmic axis with plain numbers, 0.1 and 10, instead of powers of ten.

    Args:
        axis: the axis.
        between: label 0.2 and 0.5 too, for an axis of few powers of ten.
    """
    ticker = _matplotlib("ticker")
    if between:
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn for any theme and width.

    Args:
        name: file name without suffix.
        alt: alternative text: what the figure shows, for readers who cannot see it.
        draw: function that draws it.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> from visadapt.report import Drawing, Look
        >>> drawing = Drawing("empty", "An empty figure.", lambda look: Figure(figsize=(look.width, 2)))
        >>> drawing.render(Look())[:5]
        b'<?xml'
    """

    name: str
    alt: str
    draw: Callable[[Look], Figure]

    def render(self, look: Look, form: str = "svg", dpi: int = 150) -> bytes:
        """Render the figure as an SVG or PNG file; the same figure gives the same bytes.

        Args:
            look: theme and width.
            form: ``svg`` or ``png``.
            dpi: resolution of a PNG.

        Returns:
            The bytes of the file.

        Raises:
            VisadaptError: matplotlib is not installed.
        """
        buffer = io.BytesIO()
        # SVG files would otherwise contain the date, and differ each time
        metadata: dict[str, Any] = {"Date": None} if form == "svg" else {}
        with require("matplotlib", "a figure", "visadapt[plots]").rc_context(look.rc()):
            self.draw(look).savefig(buffer, format=form, dpi=dpi, metadata=metadata)
        return buffer.getvalue()
