"""Generated pages say what the code says; the code on the others is run as a reader would, in an empty folder."""

import importlib.util
import re
from pathlib import Path

import pytest

from visadapt import METHODS

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_methods_is_current() -> None:
    spec = importlib.util.spec_from_file_location("methods_page", DOCS / "build" / "methods.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / "methods.md").read_text() == script.page(), "run python docs/build/methods.py"


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
