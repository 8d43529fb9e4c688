"""The progress bar on a terminal shows its text verbatim."""

from __future__ import annotations

import io
import sys

import pytest

from visadapt.training.progress import bar

pytest.importorskip("rich")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_brackets_are_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with bar(2, "[/task]", True) as advance:
        advance("see [/quote] and [red]")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "[/task]" in shown
    assert "see [/quote] and [red]" in shown
