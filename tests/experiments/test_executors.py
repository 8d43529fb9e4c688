"""Who makes the runs changes nothing, and neither does a kill in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.experiments.conftest import small, who
from visadapt import VisadaptError
from visadapt.experiments import Compare, Result, Sequence, read_results, run_experiment
from visadapt.experiments.run import Found, Training
from visadapt.experiments.train import Workplace
from visadapt.methods import Bottleneck, Full

ROOT = Path(__file__).parents[2]
ASKED = Compare((small(),), (who(Bottleneck(4), "bottleneck m=4"),), (0, 1, 2, 3))
CHAIN = Sequence((small("digits"), small("mnist"), small("fashion-mnist")), (who(),), who(Full(), "full"))


def figures(results: list[Result]) -> list[tuple[object, ...]]:
    """What must be the same whoever makes it."""
    return [(r.key, r.contender, r.seed, r.split, r.score, r.facts) for r in results]


def quietly(experiment: object, folder: Path, engine: str = "local", processes: int = 1) -> list[Result]:
    return run_experiment(experiment, folder, engine, processes, say=lambda _: None)  # type: ignore[arg-type]


def test_an_unknown_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="no engine 'rey'; did you mean 'ray'"):
        quietly(ASKED, tmp_path, "rey")


def test_a_device_that_is_not_there_is_named_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="device 'cuda:99' cannot be used here"):
        run_experiment(ASKED, tmp_path, device="cuda:99", say=lambda _: None)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Fatal(Training):
    """Kills its process at its first trial, as a system that is short of memory does."""

    def results(self, missing: Collection[str], workplace: Workplace) -> Iterator[Result]:
        mark = workplace.folder.parent / "died"
        if self.seed == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().results(missing, workplace)


class Deadly(Compare):
    def runs(self, found: Found) -> list[Training]:
        return [Fatal(**vars(run)) for run in super().runs(found)]


@pytest.mark.slow
def test_a_process_that_dies_is_told_of_and_the_same_call_goes_on(tmp_path: Path) -> None:
    asked = Deadly(ASKED.problems, ASKED.contenders, (0, 1))
    with pytest.raises(VisadaptError, match=r"one of the 2 processes died at work.* the same command goes on"):
        quietly(asked, tmp_path / "results", processes=2)
    assert len(quietly(asked, tmp_path / "results", processes=2)) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_ray_cluster_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    here, cluster = quietly(ASKED, tmp_path / "here"), quietly(ASKED, tmp_path / "ray", "ray", 2)
    assert figures(cluster) == figures(here)
    assert not ray.is_initialized(), "a cluster of our own is taken down"


def started(experiment: str, folder: Path, processes: int) -> subprocess.Popen[str]:
    code = (
        "from tests.experiments.test_executors import *\n"
        "if __name__ == '__main__':\n"
        f"    run_experiment({experiment}, {str(folder)!r}, 'local', {processes}, say=lambda s: print(s, flush=True))\n"
    )
    script = folder.parent / f"{folder.name}.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "processes"), [("ASKED", 2), ("CHAIN", 1)])
def test_what_was_killed_goes_on_and_ends_the_same(tmp_path: Path, experiment: str, processes: int) -> None:
    asked = globals()[experiment]
    whole = quietly(asked, tmp_path / "whole")
    killed = started(experiment, tmp_path / "killed", processes)
    assert killed.stdout is not None
    killed.stdout.readline()
    children = [int(p) for p in Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()]
    assert len(children) >= processes - 1
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    until = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{child}").exists() for child in children), "nobody works on for nobody"
    there = read_results(tmp_path / "killed")
    assert 1 <= len(there) < len(whole)
    said: list[str] = []
    rest = run_experiment(asked, tmp_path / "killed", "local", processes, say=said.append)
    assert len(said) == len(whole) - len(there)
    assert figures(rest) == figures(whole)
