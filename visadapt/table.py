"""A table that prints as text, Markdown or HTML, and in colour with rich."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from visadapt.optional import require
from visadapt.printable import markdown_text, printable


@dataclass(frozen=True)
class Table:
    """Rows and column headings.

    Args:
        headings: one per column.
        rows: each as long as ``headings``; columns of numbers are right-aligned.
        title: a line above the table.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""

    def _right(self) -> list[bool]:
        def number(cell: Any) -> bool:
            return not isinstance(cell, str) or cell.lstrip("+−")[:1].isdigit() or cell in ("", "–")

        return [bool(self.rows) and all(number(row[i]) for row in self.rows) for i in range(len(self.headings))]

    def __str__(self) -> str:
        cells = [[printable(cell) for cell in row] for row in (self.headings, *self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headings))]
        lines = [
            "  ".join(
                cell.rjust(w) if right else cell.ljust(w)
                for cell, w, right in zip(row, widths, self._right(), strict=True)
            ).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("─" * w for w in widths))
        return "\n".join([printable(self.title), *lines] if self.title else lines)

    def markdown(self) -> str:
        """Return a Markdown table."""
        rule = ["--:" if right else "---" for right in self._right()]
        rows = [self.headings, rule, *self.rows]
        return "\n".join("| " + " | ".join(markdown_text(cell) for cell in row) + " |" for row in rows)

    def html(self) -> str:
        """Return an HTML table; numbers have the class ``number``, the title is the caption."""
        right = self._right()

        def row(tag: str, cells: Sequence[Any]) -> str:
            kinds = [" class='number'" if number else "" for number in right]
            return "".join(
                f"<{tag}{kind}>{escape(printable(cell))}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
            )

        body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in self.rows)
        caption = f"<caption>{escape(printable(self.title))}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{row('th', self.headings)}</tr></thead><tbody>{body}</tbody></table>"

    def __rich__(self) -> Any:
        text = require("rich.text", "a table in colour", "visadapt[cli]").Text
        # as Text, since rich would interpret brackets in a plain string as markup
        table = require("rich.table", "a table in colour", "visadapt[cli]").Table(
            title=text(printable(self.title), style="table.title") if self.title else None
        )
        for heading, right in zip(self.headings, self._right(), strict=True):
            table.add_column(text(printable(heading)), justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*(text(printable(cell)) for cell in row))
        return table
