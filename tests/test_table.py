"""Tables print anywhere, and better with rich."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import visadapt
from tests.models import ZOO
from visadapt.table import Table

WORDS = st.text("abcxyz", min_size=1, max_size=8)


@pytest.fixture
def model():
    model = visadapt.inject(ZOO["tiny/resnet"].make(), m=2, task="flowers", num_classes=102)
    return visadapt.inject(model, m=4, task="birds", norms="frozen")


def rendered(thing):
    console = Console(file=io.StringIO(), width=200)
    console.print(thing)
    return console.file.getvalue()


def test_the_summary_says_what_each_task_costs(model) -> None:
    title, head, _, flowers, birds = str(visadapt.summary(model)).splitlines()
    whole = visadapt.summary(model).backbone
    assert title == f"backbone without head: {whole:,} parameters, frozen"
    assert head.split("  ")[0] == "task"
    assert flowers.startswith("flowers  ")
    assert "Bottleneck(m=2)" in flowers
    assert "(affine)" in flowers
    assert f"{102 * 33:,}" in flowers
    assert birds.startswith("birds *")
    assert "backbone's" in birds
    assert " %" in birds


@pytest.mark.parametrize("of", [visadapt.sites, visadapt.summary], ids=["sites", "summary"])
def test_rich_shows_the_same_cells(model, of) -> None:
    table = of(model).table()
    text = rendered(of(model))
    for row in table.rows:
        assert all(str(cell) in text for cell in row)
    assert all(heading in text for heading in table.headings)


def test_brackets_are_no_markup_on_a_terminal() -> None:
    table = Table(("[b]input",), [("see [/quote]",), ("[red]alert :smile:",)], title="[/t] on [x]")
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    console.print(table)
    text = console.file.getvalue()
    assert all(words in text for words in ("[b]input", "see [/quote]", "[red]alert :smile:", "[/t] on [x]"))


def test_columns_of_numbers_are_set_to_the_right() -> None:
    text = str(Table(("name", "count", "share"), [("a", 5, "1.5 %"), ("long", 1234, "12.5 %")], title="T"))
    assert text.splitlines() == [
        "T",
        "name  count   share",
        "────  ─────  ──────",
        "a         5   1.5 %",
        "long   1234  12.5 %",
    ]


def test_markdown() -> None:
    assert Table(("name", "count"), [("a", 5)]).markdown() == "| name | count |\n| --- | --: |\n| a | 5 |"


def test_a_table_without_rows() -> None:
    table = Table(("a", "b"), [])
    assert str(table).splitlines() == ["a  b", "─  ─"]
    assert "a" in rendered(table)


@given(st.lists(st.tuples(WORDS, st.integers(0, 10**9), WORDS), min_size=1, max_size=6))
def test_columns_line_up_whatever_is_in_them(rows) -> None:
    _, rule, *lines = str(Table(("x", "y", "z"), rows)).splitlines()
    starts = [i for i, c in enumerate(rule) if c == "─" and (i == 0 or rule[i - 1] == " ")]
    for line, row in zip(lines, rows, strict=True):
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert cells == [str(cell) for cell in row]


def test_signed_numbers_are_numbers_in_html_as_well() -> None:
    html = Table(("a<b", "change"), [("x & y", "−1.5"), ("z", "+0.2")], title='"T"').html()
    assert "<caption>&quot;T&quot;</caption>" in html
    assert "<th>a&lt;b</th><th class='number'>change</th>" in html
    assert "<td>x &amp; y</td><td class='number'>−1.5</td>" in html
