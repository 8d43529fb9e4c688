"""The benchmarks measure correctly, within a budget, lose nothing, and compare figures with their goals."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import figures, jobs, measure
from benchmarks.goals import GOALS, Goal, goal_of
from benchmarks.jobs import JOBS, Job, Run
from benchmarks.load import without_overhead
from benchmarks.measure import bytes_kept, interleaved, operations, ratio, spread

ROOT = Path(__file__).parents[1]


def rows(job="train_step", repeats="3", **values):
    facts = dict.fromkeys(figures.COLUMNS, "") | {"job": job, "low": "0.2", "high": "0.4", "device": "cpu"}
    setting = {"setting": "batch 16, 224 px, 1000 tasks", "unit": "×", "repeats": repeats}
    return [{**facts, **setting, "figure": figure, "value": value} for figure, value in values.items()]


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


def test_steps_end_with_the_fastest_optimiser():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    run = measure.Step(layer, list(layer.parameters()), lambda net: net(x), torch.zeros(4, dtype=torch.long))
    before = layer.weight.clone()
    with torch.profiler.profile() as profiler:
        run()
    assert "aten::_fused_adamw_" in {event.key for event in profiler.key_averages()}
    assert not layer.weight.equal(before)


def test_what_is_repeated_ends_with_its_time(monkeypatch):
    monkeypatch.setattr(measure, "_END", time.perf_counter())
    # one round of warming up, and one that counts
    assert [len(times) for times in interleaved({"a": lambda: None, "b": lambda: None}, 9).values()] == [1, 1]


def test_results_are_read_back_and_compared_with_their_goals(tmp_path):
    goal = GOALS[0]
    written = rows(**{goal.figure: "0.45", goal.limit: "0.7", "step: of no goal": "3"})
    figures.write(tmp_path / "results.csv", written)
    assert figures.read(tmp_path / "results.csv") == written
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    assert goal_of(goal.figure, "batch 16, 224 px") is goal
    assert goal_of("step: of no goal", "batch 16, 224 px") is None
    table = figures.table(written).markdown()
    assert "met" in table
    assert "0.700 ×" in table
    assert "of no goal" not in table
    written[0]["value"] = "0.55"
    assert "missed" in figures.table(written).markdown()
    figures.chart(written, tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")


def test_a_goal_may_be_a_lower_bound_or_for_the_cpu_only(monkeypatch):
    high, cpu = Goal("throughput", 0.8, at_least=True), Goal("inference", 0.6, cpu_only=True)
    monkeypatch.setattr(figures, "GOALS", (high, cpu))
    monkeypatch.setattr("benchmarks.goals.GOALS", (high, cpu))
    measured = rows(throughput="0.7", inference="0.7")
    assert [figures.missed(*each) for each in figures.with_goals(measured)] == [True, True]
    assert figures.missed(high, rows(throughput="0.9")[0]) is False
    assert str(high) == "≥ 0.8"
    on_gpu = [{**row, "device": "NVIDIA X"} for row in measured]
    assert [goal for goal, _ in figures.with_goals(on_gpu)] == [high]


def test_a_benchmark_that_was_interrupted_loses_nothing():
    took = {figures.TOOK: "12"}
    earlier = rows(repeats="3", one="1", two="2", **{"profile: step: a": "9", "profile: step: b": "1"}, **took)
    beside = rows(job="other", one="5")
    assert figures.repeats_of(earlier, "train_step") == 3
    assert figures.seconds_of(earlier, "train_step") == 12
    # more repeats of one figure, and another profile; the benchmark did not come to its end
    new = rows(repeats="9", one="1.5", **{"profile: step: c": "10"})
    merged = figures.updated([*earlier, *beside], "train_step", new)
    found = {(row["job"], row["figure"]): row["value"] for row in merged}
    assert found == {
        ("other", "one"): "5", ("train_step", "two"): "2", ("train_step", figures.TOOK): "12",
        ("train_step", "one"): "1.5", ("train_step", "profile: step: c"): "10",
    }  # fmt: skip
    assert figures.repeats_of(merged, "train_step") == 3
    # fewer repeats replace nothing
    assert figures.updated(earlier, "train_step", rows(repeats="2", one="7"))[0]["value"] == "1"
    # at its end, nothing of the earlier run is left
    assert figures.updated(earlier, "train_step", rows(repeats="2", one="7", **took)) == rows(
        repeats="2", one="7", **took
    )


@pytest.fixture
def calls(monkeypatch):
    """Calls of `run`, which measures one figure of each benchmark and takes no time."""
    made = []

    def run(job, device, repeats, record, *, python, seconds=None, limit=None):
        made.append((job.name(device), repeats, python, limit))
        for row in rows(job.name(device), str(repeats), inject="3", **{figures.TOOK: "0.1"}):
            record(row)
        return Run()

    monkeypatch.setattr(command, "run", run)
    return made


def call(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    command.main()


def test_existing_figures_are_not_measured_again(tmp_path, monkeypatch, capsys, calls):
    out = tmp_path / "results.csv"
    arguments = ["--out", str(out), "--only", "train_step,encoder_step", "--adapters-python", "other"]
    call(monkeypatch, *arguments)
    assert [name.split()[0] for name, *_ in calls] == ["train_step", "train_step", "encoder_step"]
    assert calls[-1][2] == "other" != calls[0][2]
    assert [repeats for _, repeats, *_ in calls] == [
        job.repeats for job in JOBS if job.module in ("train_step", "encoder_step")
    ]
    call(monkeypatch, *arguments)
    assert len(calls) == 3
    call(monkeypatch, *arguments, "--again")
    assert len(calls) == 6
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == 6
    with pytest.raises(SystemExit):
        call(monkeypatch, "--only", "train_stop")
    assert "no benchmark 'train_stop'; did you mean 'train_step'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(monkeypatch, "--budget", "0")
    assert "--budget must be a positive number of seconds, got 0.0" in capsys.readouterr().err


def test_a_budget_takes_few_repeats_of_everything_first(tmp_path, monkeypatch, capsys, calls):
    # whatever is published of this machine's torch
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path / "published")
    arguments = ["--out", str(tmp_path), "--only", "mixed_batches,prefix", "--budget"]
    call(monkeypatch, *arguments, "1000")
    assert [repeats for _, repeats, *_ in calls] == [2, 2, 2, 11, 5, 3, 33, 15, 9, 110, 50, 30]
    assert max(limit for *_, limit in calls) <= 1000
    (out,) = tmp_path.iterdir()
    assert out.name.startswith("performance-cpu-")
    assert "-float32-torch" in out.name
    # what is left of a later budget goes on from there; too small a one begins nothing
    calls.clear()
    call(monkeypatch, *arguments, "1000")
    call(monkeypatch, *arguments, "1", "--again")
    assert calls == []
    assert "prefix: no time is left for 2 repeats" in capsys.readouterr().err


def test_a_benchmark_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch, capsys, calls):
    run = command.run

    def fails(job, *arguments, **options):
        return Run(error="ImportError: no peer") if job.options == {"tasks": "8"} else run(job, *arguments, **options)

    monkeypatch.setattr(command, "run", fails)
    with pytest.raises(SystemExit, match="1 of 2 benchmarks failed"):
        call(monkeypatch, "--out", str(tmp_path / "a.csv"), "--only", "mixed_batches", "--budget", "1000")
    assert "mixed_batches --tasks 8: failed: ImportError: no peer" in capsys.readouterr().err
    assert [repeats for _, repeats, *_ in calls] == [2, 5, 15, 50]


PROGRAM = """
import json, subprocess, sys, time
print(json.dumps({"figure": "one", "setting": "", "value": 1.0, "low": 1.0, "high": 1.0, "unit": "×", "repeats": 1}))
sys.stdout.flush()
%s
"""


@pytest.mark.parametrize(
    ("rest", "error", "stopped", "found"),
    [
        ("", "", False, ["one", figures.TOOK]),
        ("raise ImportError('no peer')", "ImportError: no peer", False, ["one"]),
        ("subprocess.run(['sleep', '60'])", "", True, ["one"]),
    ],
)
def test_figures_are_recorded_as_soon_as_they_are_known(tmp_path, monkeypatch, rest, error, stopped, found):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "short.py").write_text(PROGRAM % rest)
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    recorded = []
    limit = 3 if stopped else None
    ended = jobs.run(Job("short"), "cpu", 1, recorded.append, python=sys.executable, limit=limit)
    assert (ended.error, ended.stopped) == (error, stopped)
    assert [row["figure"] for row in recorded] == found
    assert recorded[0]["torch"] == torch.__version__
    assert recorded[0]["machine"]
    assert set(recorded[0]) == set(figures.COLUMNS)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name("cpu"))
def test_options_of_the_jobs_are_those_of_their_programs(job):
    source = (ROOT / "benchmarks" / f"{job.module}.py").read_text(encoding="utf-8")
    (parsed,) = [line for line in source.splitlines() if "parse_args(__doc__" in line]
    assert all(f"{name}=" in parsed for name in ("repeats", *job.options, *job.on_gpu))


def test_peers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None if name == "adapters" else object())
    assert jobs.missing_peers(["train_step", "encoder_step"], given=True) == []
    (line,) = jobs.missing_peers(["encoder_step"], given=False)
    assert line == "encoder_step: figures beside adapters are left out (adapters is not installed)"


def size(root):
    """Bytes of the tracked files; of all files where there is no repository."""
    if (root / ".git").exists():
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=root, stdout=subprocess.PIPE, check=True)
        return len(archive.stdout)
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_the_tree_can_be_copied_to_a_machine_without_a_network():
    assert size(ROOT) <= 64 << 20


@pytest.mark.slow
def test_everything_for_a_gpu_runs_within_its_time_and_leaves_its_files(tmp_path):
    environment = {
        **os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        "GPU_TESTS": "-k save_and_load", "GPU_BENCHMARKS": "--only bookkeeping", "GPU_EVIDENCE": "--only init_scale",
    }  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(["bash", "benchmarks/gpu.sh", tmp_path / "out", "90", "cpu"], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE, text=True, timeout=200)  # fmt: skip
    assert {"tests: done", "benchmarks: done"} <= set(done.stdout.splitlines()), done.stdout
    assert time.monotonic() - start < 120
    assert "4 passed" in (tmp_path / "out" / "tests.log").read_text()
    assert "Python 3" in (tmp_path / "out" / "machine.txt").read_text()
    (file,) = (tmp_path / "out").glob("performance-*.csv")
    # a thousand tasks take longer than the budget: what was measured before its end is there
    assert "inject" in {row["figure"] for row in figures.read(file)}


@pytest.mark.parametrize(("forward", "best"), [({1: 1.0, 2: 1.1, 8: 1.7}, 8), ({1: 1.0, 2: 4.0, 8: 64.0}, 1)])
def test_the_limit_of_a_server_is_that_of_its_best_batch_size(forward: dict[int, float], best: int) -> None:
    only = {size: took for size, took in forward.items() if size <= best}
    found = without_overhead(forward, rate=0.5, share=0.95, requests=500)
    assert found == without_overhead(only, rate=0.5, share=0.95, requests=500)
    assert found >= forward[1]
