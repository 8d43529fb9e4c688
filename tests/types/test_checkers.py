"""What a type checker sees of the public functions: mypy and pyright on a user's program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("user_program.py")
BUILDERS = Path(__file__).with_name("builders.py")

WRONG = {
    'visadapt.inject(Net(), norms="afine")': "norms",
    'visadapt.inject(Net(), task=3)': "task",
    "visadapt.inject(Net(), m=4).width.lower()": "lower",
    'visadapt.load(Net(), "a.visadapt", check="weight")': "check",
    'visadapt.combine(Net(), {"a": 0.5, "b": 0.5}, into="c", how="tie")': "how",
    'visadapt.predict(Net(), "a.png", "a")[0].lable': "lable",
}  # fmt: skip
"""Mistakes that a checker finds before the program runs, and the word that its message has."""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a checker of this Python's environment in a folder without configuration."""
    given = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=given, timeout=800)


def with_mistakes(folder: Path) -> Path:
    """The program with one line per mistake behind it."""
    file = folder / "mistakes.py"
    file.write_text("\n".join([PROGRAM.read_text(encoding="utf-8"), *WRONG]) + "\n", encoding="utf-8")
    return file


def lines_of_mistakes(file: Path) -> dict[int, str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return {lines.index(wrong) + 1: wrong for wrong in WRONG}


@pytest.mark.slow
def test_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = with_mistakes(tmp_path)
    # torchvision has annotations, but no py.typed
    options = ("--strict", "--config-file=", "--follow-imports=silent", "--follow-untyped-imports", "--output=json")
    done = run("mypy", *options, f"--cache-dir={tmp_path / 'cache'}", str(file), MYPYPATH=str(ROOT))
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    errors = {each["line"]: each["message"] for each in found if each["severity"] == "error"}
    assert set(errors) == set(lines_of_mistakes(file)), done.stdout + done.stderr
    for line, wrong in lines_of_mistakes(file).items():
        assert WRONG[wrong] in errors[line] or "No overload variant" in errors[line], errors[line]


@pytest.mark.slow
def test_pyright(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    file = with_mistakes(tmp_path)
    # pyright takes paths below its project only
    shutil.copy(BUILDERS, tmp_path)
    project = tmp_path / "pyrightconfig.json"
    project.write_text(json.dumps({"include": ["."], "extraPaths": [str(ROOT)]}), encoding="utf-8")
    done = run("pyright", "--project", str(project), "--pythonpath", sys.executable, "--outputjson")
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    found = report["generalDiagnostics"]
    errors = {(each["file"], each["range"]["start"]["line"] + 1) for each in found if each["severity"] == "error"}
    assert errors == {(str(file), line) for line in lines_of_mistakes(file)}, found
