"""Damaged files of every kind: refused, or as before; never another exception, more memory or a long wait."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import reliability
from benchmarks.mutants import altered, changed, damaged
from benchmarks.reliability_subjects import Subject, subjects
from visadapt import VisadaptError

ROOT = Path(__file__).parents[1]

MUTANTS = {"prefix cache": 12, "task of": 120, "checkpoint": 150, "decider": 200}
OTHERS = 200


@pytest.mark.filterwarnings("ignore")
def test_two_thousand_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "intact").mkdir()
    every = list(subjects(tmp_path / "intact"))
    counts = {each.name: next((n for key, n in MUTANTS.items() if each.name.startswith(key)), OTHERS) for each in every}
    assert sum(counts.values()) >= 2000
    tallies = {each.name: reliability.measure(each, counts[each.name], 0, tmp_path) for each in every}
    assert [line for tally in tallies.values() for line in tally.wrong] == []
    refused = Counter(tallies[each.name].outcomes["refused"] for each in every if each.kind)
    assert min(refused) > 0
    assert all(tally.mutants == counts[name] for name, tally in tallies.items())


def test_what_must_not_be_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    fails = Subject("fails", file, lambda path: str(1 // (path.read_bytes() == b"0123456789")))
    tally = reliability.measure(fails, 5, 0, tmp_path)
    assert len(tally.wrong) == 5
    assert "ZeroDivisionError" in tally.wrong[0]
    other = Subject("gives other outputs", file, lambda path: path.read_bytes().hex())
    assert len(reliability.measure(other, 5, 0, tmp_path).wrong) == 5
    left = [0]

    def changes(path: Path) -> str:
        left[0] += 1
        return ""

    assert len(reliability.measure(Subject("changes", file, changes, lambda: str(left)), 5, 0, tmp_path).wrong) == 5


def test_damage_is_seeded_and_never_nothing() -> None:
    data = bytes(range(256))
    made = [damaged(data, random.Random(seed)) for seed in range(200)]
    assert made == [damaged(data, random.Random(seed)) for seed in range(200)]
    assert data not in made
    description = {"a": [1, {"b": "c"}], "d": {}}
    assert description == {"a": [1, {"b": "c"}], "d": {}}
    assert len({repr(changed(description, random.Random(seed))) for seed in range(100)}) > 20
    tensors = {"x": torch.ones(2, 3)}
    assert len({repr(altered(tensors, random.Random(seed))) for seed in range(50)}) > 5


def test_the_page_has_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    mark = "<!-- table: python -m benchmarks.reliability --mutants -->"
    page.write_text(f"before\n{mark}\nold\n<!-- end of table -->\nafter\n", encoding="utf-8")
    reliability.write_page(page, "--mutants", "3 copies:", reliability.table({"decider": reliability.Tally(3)}))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| decider | 3 |" in text
    with pytest.raises(VisadaptError, match="must have the line"):
        reliability.write_page(page, "--kills", "", reliability.table({}))


def test_the_real_page_has_both_tables() -> None:
    text = reliability.PAGE.read_text(encoding="utf-8")
    for option, subject in (("--mutants", "| decider |"), ("--kills", "| visadapt train |")):
        table = text.partition(f"<!-- table: python -m benchmarks.reliability {option} -->")[2]
        assert subject in table.partition("<!-- end of table -->")[0]


KILL = """
import json, pathlib, sys, tempfile
import torch
torch.set_num_threads(1)
from benchmarks import kills
folder = pathlib.Path(sys.argv[1])
found = kills.run(int(sys.argv[2]), 0, folder, steps=True)
print(json.dumps({name: [each.kills, each.lost] for name, each in found.items()}))
"""


def test_work_that_is_killed_at_its_steps_loses_nothing(tmp_path: Path) -> None:
    """One process, which forks: each kind of work is killed at steps from its first to its last."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", KILL, str(tmp_path), "3"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [line for _, lost in found.values() for line in lost] == []
    assert [count for count, _ in found.values()] == [3] * 6
