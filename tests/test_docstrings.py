"""The functions that users start with have an example in their docstring, which runs as written."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import visadapt
import visadapt.training
from tests.models import ZOO
from visadapt.export.program import export
from visadapt.serving import Server

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(visadapt, name)
        for name in (
            "inject",
            "sites",
            "summary",
            "activate",
            "using",
            "parameters",
            "trainable",
            "save",
            "load",
            "merge",
            "unmerge",
            "remove",
            "eject",
            "split",
            "lean",
            "cache_prefix",
            "fit_decider",
            "decide",
            "tasks",
            "combine",
            "open",
            "preprocess",
            "predict",
            "fold",
            "set_alpha",
            "Bottleneck",
            "Mona",
            "DoRA",
            "CoLoRA",
            "Ladder",
        )
    },
    **{name: getattr(visadapt.training, name) for name in ("fit", "evaluate", "predict")},
    "export": export,
    "Server": Server,
}


def example(name: str) -> doctest.DocTest:
    """The doctest of a function; it sees torch, visadapt, the function, ``Recipe`` and a fresh ``backbone``."""
    function = FUNCTIONS[name]
    names = {
        "torch": torch,
        "visadapt": visadapt,
        "Recipe": visadapt.training.Recipe,
        "backbone": ZOO["tiny/resnet"].make(),
        name: function,
    }
    return doctest.DocTestParser().get_doctest(inspect.getdoc(function) or "", names, name, None, None)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_runs_as_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = example(name)
    assert test.examples, f"the docstring of {name} has no example"
    monkeypatch.chdir(tmp_path)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    if runner.run(test, out=report.append).failed:
        pytest.fail("".join(report), pytrace=False)
