"""The benchmarks measure correctly, skip what is measured already, and compare figures with their goals."""

import csv

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks.goals import GOALS, goal_of
from benchmarks.measure import bytes_kept, interleaved, operations, ratio, spread


def rows(**values):
    facts = {"job": "train_step", "low": "0.2", "high": "0.4", "repeats": "3", "device": "cpu", "threads": "2"}
    return [
        {
            "figure": figure,
            "setting": "batch 16, 224 px, 1000 tasks",
            "value": value,
            "unit": "×",
            "torch": "2",
            **facts,
        }
        for figure, value in values.items()
    ]


def test_contenders_take_turns():
    turns = []
    times = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    assert turns == ["a", "b"] * 4
    assert len(times["a"]) == len(times["b"]) == 3
    times = {"a": [1.0, 2.0, 9.0], "b": [2.0, 2.0, 3.0]}
    row = ratio("a / b", "here", times, "a", "b")
    assert (row.value, row.repeats, row.unit) == (1.0, 3, "×")
    assert spread("one", "here", [4.0], "ms").low == 4.0


def test_bytes_and_operations_of_a_known_layer():
    layer, x = nn.Conv2d(4, 8, 1, bias=False), torch.randn(2, 4, 5, 5)
    assert bytes_kept(layer, lambda: layer(x).exp().sum(), [x]) == 2 * 8 * 5 * 5 * 4
    assert operations(lambda: layer(x)) == 2 * 2 * 4 * 8 * 5 * 5


def test_results_are_read_back_and_compared_with_their_goals(tmp_path):
    goal = GOALS[0]
    written = rows(**{goal.figure: "0.45", goal.limit: "0.7", "step: of no goal": "3"})
    command.write(tmp_path / "results.csv", written)
    assert command.read(tmp_path / "results.csv") == written
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    assert goal_of(goal.figure, "batch 16, 224 px") is goal
    assert goal_of("step: of no goal", "batch 16, 224 px") is None
    table = command.table(written).markdown()
    assert "met" in table
    assert "0.700 ×" in table
    assert "of no goal" not in table
    written[0]["value"] = "0.55"
    assert "missed" in command.table(written).markdown()
    command.chart(written, tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")


def test_existing_figures_are_not_measured_again(tmp_path, monkeypatch, capsys):
    out, calls = tmp_path / "results.csv", []

    def run(job, python, device):
        calls.append((job.name, python))
        return [{**row, "job": job.name} for row in rows(inject="3")]

    monkeypatch.setattr(command, "run", run)
    arguments = ["benchmarks", "--out", str(out), "--only", "train_step,encoder_step", "--adapters-python", "other"]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    assert [name.split()[0] for name, _ in calls] == ["train_step", "train_step", "encoder_step"]
    assert calls[-1][1] == "other" != calls[0][1]
    command.main()
    assert len(calls) == 3
    monkeypatch.setattr("sys.argv", [*arguments, "--again"])
    command.main()
    assert len(calls) == 6
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == 3
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "train_stop"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no benchmark 'train_stop'; did you mean 'train_step'" in capsys.readouterr().err
