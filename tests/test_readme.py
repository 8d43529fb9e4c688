"""The README's example runs as written, and CI runs its test command."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

import visadapt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


OPTIONAL = ("accelerate", "matplotlib", "onnx", "ray", "rich", "sklearn", "torchmetrics", "transformers", "typer")
"""Libraries of the extras, which a plain ``pip install visadapt`` does not bring."""


@pytest.mark.slow
def test_the_example_runs_as_written_without_extras(tmp_path, monkeypatch, capsys):
    for library in OPTIONAL:
        monkeypatch.setitem(sys.modules, library, None)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["logits"].shape == (3, 10)
    assert (tmp_path / "cifar10.visadapt").stat().st_size < 5_000_000
    assert "cifar10" in capsys.readouterr().out
    assert not any("visadapt" in key for key in names["model"].state_dict())


def test_ci_runs_readmes_test_command():
    commands = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 2
    grep = subprocess.run(
        ["grep", "-m", "1", "&& pytest$", "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert grep.stdout.strip() == commands[1]
    assert "grep -m 1 '&& pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_workflow_runs_the_same_script():
    assert "run: .ci/run\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_citation_is_of_this_version():
    assert f"\nversion: {visadapt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_results_are_those_that_were_printed():
    printed = (ROOT / "docs" / "cifar10.md").read_text().splitlines()
    rows = [line for line in printed if line.startswith("| ")]
    assert len(rows) > 6
    assert [line for line in README.splitlines() if line.startswith("| ")] == rows


def test_the_reasons_are_those_that_were_measured():
    with (ROOT / "benchmarks" / "results" / "why.csv").open(encoding="utf-8") as file:
        tasks, copies, ours, peft = (f"{row['value']} {row['unit']}".strip() for row in csv.DictReader(file))
    text = " ".join(README.split())
    assert f"100 tasks on one ResNet-50 take {tasks}; 100 fine-tuned networks take {copies}" in text
    assert f"training task b changes task a's logits by {ours};" in text
    assert f"by {peft} of their norm (`python -m benchmarks.why`)" in text


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
