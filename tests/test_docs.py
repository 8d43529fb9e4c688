"""Generated pages say what the code says; the code on the others is run as a reader would, in an empty folder."""

import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import RESULTS, missed, read, with_goals
from benchmarks.goals import GOALS
from visadapt import METHODS
from visadapt.experiments import read_results
from visadapt.report.assembly import build
from visadapt.report.markdown_page import markdown

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["methods", "performance"])
def test_a_page_is_current(name) -> None:
    spec = importlib.util.spec_from_file_location(f"{name}_page", DOCS / "build" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / f"{name}.md").read_text() == script.page(), f"run python docs/build/{name}.py"


def test_every_goal_was_measured_and_every_miss_has_its_reason() -> None:
    files = sorted(RESULTS.glob("performance-*.csv"))
    assert files
    for file in files:
        measured = with_goals(read(file))
        assert {goal for goal, _ in measured} == set(GOALS)
        assert [goal.figure for goal, row in measured if missed(goal, row) and not goal.why] == []


def test_the_page_of_results_is_current() -> None:
    report = build(read_results(RESULTS / "evidence.csv"))
    said = markdown(report, "results")
    assert (DOCS / "results.md").read_text(encoding="utf-8") == said, "run visadapt report --force"
    drawings = {drawing.name for section in report.sections for drawing in section.drawings}
    assert {path.stem for path in (DOCS / "results").glob("*.svg")} == drawings


@pytest.mark.parametrize("page", ["add-a-method.md"])
def test_the_code_of_a_page(page, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    known = dict(METHODS)
    space = {"__name__": "page"}
    try:
        for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(block, page, "exec"), space)
    finally:
        METHODS.clear()
        METHODS.update(known)
    said = capsys.readouterr().out
    assert "Gate(m=8)" in said
    assert "cannot be merged: GateAdapter has no rule for it" in said
