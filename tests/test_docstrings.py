"""Public functions and classes say what they take, give and refuse, with an example that runs as written."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import visadapt
import visadapt.data
import visadapt.experiments
import visadapt.report
import visadapt.serving
import visadapt.training
from tests.models import ZOO
from visadapt.export.program import export


def public(*rooms: Any) -> dict[str, Any]:
    """The public functions and classes of rooms by name."""
    found = {}
    for room in rooms:
        for name, each in vars(room).items():
            known = inspect.isclass(each) or inspect.isfunction(inspect.unwrap(each) if callable(each) else each)
            if known and not name.startswith("_") and each.__module__.startswith("visadapt."):
                found[name if room is visadapt else f"{room.__name__}.{name}"] = each
    return found


FUNCTIONS = {
    **public(visadapt, visadapt.training, visadapt.data, visadapt.serving),
    **{name: each for name, each in public(visadapt.experiments, visadapt.report).items() if not inspect.isclass(each)},
    "export": export,
}

EXAMPLES = {**FUNCTIONS, **public(visadapt.experiments, visadapt.report)}


def example(name: str) -> doctest.DocTest:
    """The doctest of a function; it sees torch, visadapt, the function, ``Recipe`` and a fresh ``backbone``."""
    function = EXAMPLES[name]
    names = {
        "torch": torch,
        "visadapt": visadapt,
        "Recipe": visadapt.training.Recipe,
        "backbone": ZOO["tiny/resnet"].make(),
        name.rpartition(".")[2]: function,
    }
    return doctest.DocTestParser().get_doctest(inspect.getdoc(function) or "", names, name, None, None)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_as_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = example(name)
    assert test.examples, f"the docstring of {name} has no example"
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    if runner.run(test, out=report.append).failed:
        pytest.fail("".join(report), pytrace=False)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_results_and_errors_are_described(name: str) -> None:
    function = inspect.unwrap(FUNCTIONS[name])
    said = inspect.getdoc(function) or ""
    if inspect.isclass(function):
        fields = dataclasses.fields(function) if dataclasses.is_dataclass(function) else ()
        named = [field.name for field in fields if field.init]
    else:
        signature = inspect.signature(function)
        named = list(signature.parameters)
        gives = signature.return_annotation not in (None, "None")
        assert (
            not gives or re.search(r"^(Returns|Yields):$", said, re.MULTILINE) or said.startswith(("Return", "Yield"))
        ), "Returns"
        raises = "raise VisadaptError" in inspect.getsource(function)
        assert not raises or "\nRaises:\n" in said, "Raises"
    described = {word for line in said.splitlines() for word in re.findall(r"^ +\*{0,2}(\w+)[:,]|, (\w+):", line)[:1]}
    assert [each for each in named if not any(each in words for words in described)] == []
